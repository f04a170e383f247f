"""The fast convolution equals the direct one, and nothing else changes its result."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resshift.config import ModelConfig
from resshift.networks.autoencoder import VectorQuantizer, VQAutoencoder
from resshift.networks.config import FirstStageConfig, UNetConfig, VQConfig
from resshift.networks.conv_unet import build_unet
from resshift.networks.convolution import Conv3x3, norm_silu_conv, prepare
from resshift.networks.normalisation import GroupNorm32
from resshift.networks.unet import UNetSwin
from resshift.upscaler import Upscaler

Load = Callable[[str], dict[str, np.ndarray]]
Fill = Callable[[nn.Module], nn.Module]
Settle = Callable[[VectorQuantizer, np.ndarray], None]
SHAPES = [(1, 1), (1, 9), (4, 4), (5, 7), (16, 33), (64, 40)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def convolution(in_channels: int, out_channels: int) -> Conv3x3:
    conv = Conv3x3(in_channels, out_channels)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(conv.weight.shape, generator=generator(1)) / (9 * in_channels) ** 0.5)
    assert prepare(conv) == 4 * 36 * in_channels * out_channels
    return conv


def direct(conv: Conv3x3, x: Tensor) -> Tensor:
    assert conv.bias is not None
    return F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), padding=1)


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("channels", [(128, 64), (64, 160)])
@torch.no_grad()
def test_convolution_equals_the_direct_sum(size: tuple[int, int], channels: tuple[int, int]) -> None:
    conv = convolution(*channels)
    x = torch.randn((2, channels[0], *size), generator=generator(2))
    torch.testing.assert_close(
        conv(x).double(), direct(conv, x), atol=1e-4, rtol=0
    )  # outputs reach 5; the direct float32 sum errs by 1e-5


@torch.no_grad()
def test_norm_and_activation_are_those_of_the_layers() -> None:
    conv, norm = convolution(128, 128), GroupNorm32(32, 128)
    norm.weight.copy_(torch.randn(128, generator=generator(3)))
    norm.bias.copy_(torch.randn(128, generator=generator(4)))
    x = 3 + 2 * torch.randn((2, 128, 12, 10), generator=generator(5))
    scale, shift = (torch.randn((2, 128, 1, 1), generator=generator(seed)) for seed in (6, 7))
    expected = direct(conv, F.silu(norm(x) * (1 + scale) + shift))
    torch.testing.assert_close(
        norm_silu_conv(norm, conv, x, (scale, shift)).double(), expected, atol=3e-4, rtol=0
    )
    torch.testing.assert_close(
        norm_silu_conv(norm, conv, x).double(), direct(conv, F.silu(norm(x))), atol=3e-4, rtol=0
    )


@torch.no_grad()
def test_statistics_hold_for_a_large_mean() -> None:
    """With E[x^2] - E[x]^2 in float32 nothing would be left of a spread of 0.01 at a mean of 100."""
    conv, norm = convolution(64, 128), GroupNorm32(32, 64)
    x = 100 + 0.01 * torch.randn((1, 64, 40, 40), generator=generator(8))
    exact = F.silu(F.group_norm(x.double(), 32, None, None, norm.eps))
    # x itself is stored to 4e-6, which is 4e-4 of its spread.
    torch.testing.assert_close(norm_silu_conv(norm, conv, x).double(), direct(conv, exact), atol=3e-3, rtol=0)


@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch() -> None:
    conv, norm = convolution(128, 128), GroupNorm32(32, 128)
    x = torch.randn((5, 128, 24, 20), generator=generator(9))
    together = norm_silu_conv(norm, conv, x)
    assert all(torch.equal(together[i : i + 1], norm_silu_conv(norm, conv, x[i : i + 1])) for i in range(5))


def test_gradients_and_other_precisions_take_the_direct_way() -> None:
    conv = convolution(128, 128)
    x = torch.randn((1, 128, 8, 8), generator=generator(10))
    assert torch.equal(conv(x), F.conv2d(x, conv.weight, conv.bias, padding=1))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x).dtype == torch.bfloat16


def test_transformed_weights_are_no_state() -> None:
    assert set(convolution(128, 128).state_dict()) == {"weight", "bias"}


def test_narrow_and_very_wide_layers_stay_direct() -> None:
    assert prepare(Conv3x3(64, 64)) == prepare(Conv3x3(3, 128)) == prepare(Conv3x3(640, 640)) == 0


@pytest.fixture
def every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fixtures' networks are narrow: let every convolution that can, use the fast form."""
    monkeypatch.setattr("resshift.networks.convolution._MIN_PRODUCT", 0)


@pytest.mark.usefixtures("every_layer")
@torch.no_grad()
def test_optimised_unet_against_official(parity: Load, recipe_weights: Fill) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in parity("unet_base").items()}
    network = recipe_weights(UNetSwin(UNetConfig(model_channels=32, swin_embed_dim=64)))
    assert prepare(network) > 0
    torch.testing.assert_close(
        network(arrays["x"], arrays["t"], arrays["lq"]), arrays["out"], atol=1e-4, rtol=0
    )


@pytest.mark.usefixtures("every_layer")
@torch.no_grad()
def test_optimised_autoencoder_against_official(parity: Load, recipe_weights: Fill) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in parity("vq_f4_small").items()}
    network = recipe_weights(VQAutoencoder(VQConfig(ch=32, n_embed=256)))
    assert isinstance(network, VQAutoencoder)
    assert prepare(network) > 0
    torch.testing.assert_close(network.encode(arrays["x"]), arrays["z"], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        network.decode(arrays["z"], quantize=False), arrays["out_noquant"], atol=1e-4, rtol=0
    )


@pytest.mark.slow
@pytest.mark.usefixtures("every_layer")
@torch.no_grad()
def test_optimised_chain_against_official(parity: Load, recipe_weights: Fill, settle_ties: Settle) -> None:
    arrays = parity("e2e_x4_64")
    stage = FirstStageConfig(vq=VQConfig(ch=32, n_embed=256))
    config = ModelConfig(unet=UNetConfig(model_channels=32, swin_embed_dim=64), first_stage=stage)
    vq = recipe_weights(VQAutoencoder(stage.vq))
    assert isinstance(vq, VQAutoencoder)
    up = Upscaler(config, recipe_weights(build_unet(config.unet)), vq, device="cpu", dtype="float32")
    assert any(
        isinstance(layer, Conv3x3) and layer.transformed is not None for layer in up.chain.unet.modules()
    )
    settle_ties(vq.quantize, arrays["idx"])
    noise = torch.Generator().manual_seed(700)
    out = up.upscale_tensor(
        torch.from_numpy(arrays["lq"]), noise=lambda _: torch.randn((1, 3, 64, 64), generator=noise)
    )
    torch.testing.assert_close(
        out, torch.from_numpy(arrays["out"]).float(), atol=2e-3, rtol=0
    )  # stored as float16
