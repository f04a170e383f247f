"""A result gets the colours of its input and keeps its detail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resshift.tiles.colour_fix import WaveletFix


def corrected(hq: Tensor, lq: Tensor, scale: int, band: int) -> Tensor:
    fix = WaveletFix(lq.shape[1], scale)
    return torch.cat(
        [fix.push(a, b) for a, b in zip(hq.split(band * scale, 1), lq.split(band, 1), strict=True)], 1
    )


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (40, 9), (64, 64)])
def test_a_shift_of_tone_is_undone_exactly(size: tuple[int, int]) -> None:
    hq = noise(3, 4 * size[0], 4 * size[1])
    lq = F.avg_pool2d(hq[None], 4)[0]
    shifted = hq + torch.tensor([0.1, -0.05, 0.2])[:, None, None]
    torch.testing.assert_close(corrected(shifted, lq, 4, 8), hq, atol=2e-6, rtol=0)


@pytest.mark.parametrize("height", [1, 2, 13, 60])
def test_bands_of_any_height_give_the_same_bytes(height: int) -> None:
    hq, lq = noise(3, 2 * height, 34), noise(3, height, 17)
    whole = corrected(hq, lq, 2, height)
    assert whole.shape == hq.shape
    assert all(torch.equal(corrected(hq, lq, 2, band), whole) for band in (1, 5, 24))


def test_a_slow_change_of_tone_is_followed_and_fine_detail_is_kept() -> None:
    detail = noise(3, 400, 400)
    detail -= F.interpolate(F.avg_pool2d(detail[None], 4), scale_factor=4)[
        0
    ]  # nothing is left of it at the input's resolution
    slow = torch.linspace(-0.5, 0.5, 100).expand(3, 100, 100)
    out = corrected(detail, slow, 4, 10)
    inside = (out - detail)[:, 80:-80, 80:-80]
    expected = F.interpolate(slow[None], scale_factor=4, mode="bilinear")[0][:, 80:-80, 80:-80]
    torch.testing.assert_close(inside, expected, atol=1e-3, rtol=0)
