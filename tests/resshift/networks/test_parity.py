"""The networks equal the released ones: same keys, and same numbers for the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from resshift.networks.autoencoder import VectorQuantizer, VQAutoencoder
from resshift.networks.config import UNetConfig, VQConfig
from resshift.networks.swin import BasicLayer, shifted_window_mask
from resshift.networks.unet import UNetSwin, timestep_embedding
from resshift.sampler import network_denoiser, sample
from resshift.schedule import ShiftSchedule, Target

PARITY = Path(__file__).parents[2] / "parity"
Load = Callable[[str], dict[str, np.ndarray]]
Fill = Callable[[nn.Module], nn.Module]
Settle = Callable[[VectorQuantizer, np.ndarray], None]
SMALL_UNET = UNetConfig(model_channels=32, swin_embed_dim=64)
SMALL_VQ = VQConfig(ch=32, n_embed=256)


def keys_and_shapes(network: nn.Module) -> dict[str, list[object]]:
    return {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in network.state_dict().items()
    }


def test_realsr_x4_has_the_released_keys_and_shapes() -> None:
    with torch.device("meta"):
        network = UNetSwin(UNetConfig())
    assert keys_and_shapes(network) == json.loads((PARITY / "full_unet_realsr_v3_keys.json").read_text())
    assert sum(parameter.numel() for parameter in network.parameters()) == 118_593_583


def test_vq_f4_has_the_released_keys_and_shapes() -> None:
    with torch.device("meta"):
        network = VQAutoencoder(VQConfig())
    assert keys_and_shapes(network) == json.loads((PARITY / "full_vq_f4_keys.json").read_text())
    assert sum(parameter.numel() for parameter in network.parameters()) == 55_322_782


@pytest.mark.parametrize(
    ("config", "parameters", "keys"),
    [
        pytest.param(UNetConfig(lq_size=128), 118_640_431, 568, id="x2"),
        pytest.param(UNetConfig(lq_size=256, cond_mask=True), 118_714_399, 572, id="inpaint"),
        pytest.param(UNetConfig(in_channels=8, out_channels=8, lq_size=512), 118_931_604, 576, id="face"),
    ],
)
def test_other_tasks_have_the_released_size(config: UNetConfig, parameters: int, keys: int) -> None:
    with torch.device("meta"):
        network = UNetSwin(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == keys


def test_vq_f8_has_the_released_size() -> None:
    with torch.device("meta"):
        network = VQAutoencoder(
            VQConfig(
                ch=64,
                ch_mult=(1, 2, 4, 8),
                num_res_blocks=(1, 2, 3, 4),
                z_channels=8,
                embed_dim=8,
                n_embed=4096,
            )
        )
    assert sum(parameter.numel() for parameter in network.parameters()) == 77_009_115
    assert len(network.state_dict()) == 285


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("unet_base", SMALL_UNET),
        ("unet_fe128", UNetConfig(model_channels=32, swin_embed_dim=64, lq_size=128)),
        ("unet_mask_lq64", UNetConfig(model_channels=32, swin_embed_dim=64, cond_mask=True)),
    ],
)
@torch.no_grad()
def test_unet_against_official(name: str, config: UNetConfig, parity: Load, recipe_weights: Fill) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in parity(name).items()}
    network = recipe_weights(UNetSwin(config))
    mask = arrays["mask"].float() if "mask" in arrays else None
    torch.testing.assert_close(
        network(arrays["x"], arrays["t"], arrays["lq"], mask), arrays["out"], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("case", "map_size"),
    [
        ("a_img16_16x16", 16),
        ("b_img16_16x24", 16),
        ("c_img16_32x32", 16),
        ("d_img8_8x8", 8),
        ("e_img8_16x16", 8),
        ("f_img4_8x8", 4),
    ],
)
@torch.no_grad()
def test_swin_layer_against_official(case: str, map_size: int, parity: Load, recipe_weights: Fill) -> None:
    arrays = parity("swin_basiclayer")
    layer = recipe_weights(
        BasicLayer(channels=64, embed_dim=64, num_heads=2, depth=2, window=8, map_size=map_size)
    )
    out = layer(torch.from_numpy(arrays[f"{case}_x"]))
    torch.testing.assert_close(out, torch.from_numpy(arrays[f"{case}_out"]), atol=1e-5, rtol=1e-5)


def test_shift_mask_against_official(parity: Load) -> None:
    arrays = parity("swin_masks")
    np.testing.assert_array_equal(shifted_window_mask(16, 24, 8, 4).numpy(), arrays["attn_mask_16x24"])
    layer = BasicLayer(channels=32, embed_dim=32, num_heads=1, depth=1, window=8, map_size=16)
    np.testing.assert_array_equal(
        layer.state_dict()["blocks.0.attn.relative_position_index"].numpy(), arrays["relative_position_index"]
    )


def test_network_built_without_memory_leaves_real_masks_behind() -> None:
    """Masks are cached by size: one made inside torch.device("meta") must not reach the next network."""
    shifted_window_mask.cache_clear()
    with torch.device("meta"):
        BasicLayer(channels=32, embed_dim=32, num_heads=1, depth=2, window=8, map_size=16)
    layer = BasicLayer(channels=32, embed_dim=32, num_heads=1, depth=2, window=8, map_size=16)
    assert layer(torch.zeros(1, 32, 16, 16)).shape == (1, 32, 16, 16)
    assert {buffer.device.type for buffer in layer.buffers()} == {"cpu"}


@pytest.mark.parametrize("dim", [32, 160, 33])
def test_timestep_embedding_against_official(dim: int, parity: Load) -> None:
    arrays = parity("timestep_embedding")
    embedding = timestep_embedding(torch.from_numpy(arrays["t"]), dim)
    torch.testing.assert_close(embedding, torch.from_numpy(arrays[f"dim{dim}"]), atol=1e-5, rtol=0)


@torch.no_grad()
def test_vq_against_official(parity: Load, recipe_weights: Fill) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in parity("vq_f4_small").items()}
    network = recipe_weights(VQAutoencoder(SMALL_VQ))
    assert isinstance(network, VQAutoencoder)
    z = network.encode(arrays["x"])
    z_q, indices = network.quantize(arrays["z"])
    torch.testing.assert_close(z, arrays["z"], atol=1e-4, rtol=0)
    assert torch.equal(indices.flatten(), arrays["idx"].long())
    torch.testing.assert_close(z_q, arrays["zq"], atol=1e-4, rtol=0)
    torch.testing.assert_close(network.decode(z), arrays["out"], atol=1e-4, rtol=0)
    torch.testing.assert_close(network.decode(z, quantize=False), arrays["out_noquant"], atol=1e-4, rtol=0)


def test_codebook_search_does_not_depend_on_its_chunks(recipe_weights: Fill) -> None:
    network = recipe_weights(VQAutoencoder(SMALL_VQ))
    assert isinstance(network, VQAutoencoder)
    z = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole = network.quantize.nearest(z)
    network.quantize.chunk = 7
    assert torch.equal(network.quantize.nearest(z), whole)


def test_quantiser_passes_the_gradient_straight_through(recipe_weights: Fill) -> None:
    network = recipe_weights(VQAutoencoder(SMALL_VQ))
    assert isinstance(network, VQAutoencoder)
    z = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    (network.quantize(z)[0] * weight).sum().backward()
    torch.testing.assert_close(z.grad, weight)


@pytest.mark.slow
@torch.no_grad()
def test_end_to_end_against_official(parity: Load, recipe_weights: Fill, settle_ties: Settle) -> None:
    """Bicubic, encode, prior, four steps, decode, as the released sampler does on a 64x64 picture with small
    networks.
    """
    arrays = parity("e2e_x4_64")
    lq = torch.from_numpy(arrays["lq"])
    unet, vq = recipe_weights(UNetSwin(SMALL_UNET)), recipe_weights(VQAutoencoder(SMALL_VQ))
    assert isinstance(vq, VQAutoencoder)
    schedule = ShiftSchedule.released(steps=4, kappa=2.0, min_noise=0.2)
    generator = torch.Generator().manual_seed(700)
    y0 = vq.encode(torch.nn.functional.interpolate(lq, scale_factor=4, mode="bicubic"))
    denoise = network_denoiser(unet, lq, y0, schedule, Target.X0)
    latent = sample(denoise, y0, schedule, lambda step: torch.randn(y0.shape, generator=generator))
    torch.testing.assert_close(latent, torch.from_numpy(arrays["final_latent"]), atol=1e-3, rtol=0)

    settle_ties(vq.quantize, arrays["idx"])
    out = vq.decode(latent).clamp(-1, 1)
    torch.testing.assert_close(out, torch.from_numpy(arrays["out"]).float(), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    ("shape_x", "shape_lq", "shape_mask"),
    [
        ((1, 3, 60, 64), (1, 3, 60, 64), None),
        ((1, 4, 64, 64), (1, 3, 64, 64), None),
        ((1, 3, 64, 64), (1, 3, 32, 64), None),
        ((1, 3, 64, 64), None, None),
        ((1, 3, 64, 64), (1, 3, 64, 64), (1, 1, 64, 64)),
    ],
)
def test_wrong_shapes_are_named(
    shape_x: tuple[int, ...], shape_lq: tuple[int, ...] | None, shape_mask: tuple[int, ...] | None
) -> None:
    network = UNetSwin(
        UNetConfig(model_channels=32, channel_mult=(1, 1, 1, 1), swin_embed_dim=32, num_res_blocks=1)
    )
    inputs = [None if shape is None else torch.zeros(shape) for shape in (shape_x, shape_lq, shape_mask)]
    x, lq, mask = inputs
    assert x is not None
    with pytest.raises(ValueError, match=r"must|needs|takes"):
        network(x, torch.zeros(1, dtype=torch.int64), lq, mask)


def test_condition_can_be_left_out() -> None:
    network = UNetSwin(
        UNetConfig(model_channels=32, channel_mult=(1, 1), swin_embed_dim=32, num_res_blocks=1, cond_lq=False)
    )
    assert network(torch.zeros(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64)).shape == (1, 3, 16, 16)
