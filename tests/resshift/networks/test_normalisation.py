"""Group normalisation: equal to PyTorch's, and to itself for any number of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resshift.networks.conv_unet import build_unet
from resshift.networks.normalisation import GroupNorm32, norm_silu
from resshift.presets import preset
from resshift.upscaler import Upscaler


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def norm_of(channels: int) -> GroupNorm32:
    norm = GroupNorm32(32, channels, eps=1e-5)
    generator = torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=generator)
    return norm


def maps(*shape: int) -> Tensor:
    return 3 + 2 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 64, 5, 7), torch.float32), ((1, 96, 64, 80), torch.float32), ((1, 32, 9, 9), torch.bfloat16)],
)
def test_without_gradients_it_is_what_pytorch_computes(
    shape: tuple[int, int, int, int], dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    norm, x = norm_of(shape[1]), maps(*shape).to(dtype).contiguous(memory_format=memory_format)
    expected = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    with torch.inference_mode():
        found = norm(x)
    assert found.dtype == dtype
    torch.testing.assert_close(
        found.double(), expected, rtol=0, atol=2e-6 if dtype == torch.float32 else 0.05
    )


def test_statistics_hold_where_the_mean_is_large_and_changes_across_the_map() -> None:
    norm, x = norm_of(64), torch.randn(1, 64, 80, 90, generator=torch.Generator().manual_seed(0)) + 1000
    x[:, :, 40:] -= 2000  # another part of the sums
    with torch.inference_mode():
        found = norm(x)
    expected = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.08)])
def test_norm_modulation_and_silu_in_one_pass_are_what_three_give(
    dtype: torch.dtype, tolerance: float
) -> None:
    norm, x = norm_of(64), maps(2, 64, 80, 90).to(dtype)
    scale, shift = (
        part[:, :, None, None] for part in torch.randn(2, 2, 64, generator=torch.Generator().manual_seed(2))
    )
    expected = F.group_norm(x.double(), 32, norm.weight.double(), norm.bias.double(), norm.eps)
    with torch.inference_mode():
        found, modulated = norm_silu(norm, x), norm_silu(norm, x, (scale, shift))
    assert found.dtype == modulated.dtype == dtype
    torch.testing.assert_close(found.double(), F.silu(expected), rtol=0, atol=tolerance)
    torch.testing.assert_close(
        modulated.double(), F.silu(expected * (1 + scale) + shift), rtol=0, atol=2 * tolerance
    )
    with torch.enable_grad():
        trained = norm_silu(norm, x, (scale, shift))
    torch.testing.assert_close(trained.double(), modulated.double(), rtol=0, atol=2 * tolerance)


def test_gradients_flow() -> None:
    norm, x = norm_of(32), maps(1, 32, 4, 4).requires_grad_()
    norm(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_the_shipped_network_gives_the_same_bytes_with_one_two_and_four_threads() -> None:
    model = preset("tiny-x4-swin").model
    torch.manual_seed(0)
    network = build_unet(model.unet)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)  # a fresh network says nothing
    up = Upscaler(model, network, device="cpu")
    lq = maps(1, 3, 48, 80).clamp(-1, 1)
    results: list[Tensor] = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        results.append(up.upscale_tensor(lq))
    assert results[0].std() > 0.1
    assert all(torch.equal(result, results[0]) for result in results)
