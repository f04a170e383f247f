"""Resizing by rows equals resizing at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resshift.resize.bicubic import RowResampler


def resized(picture: Tensor, size: tuple[int, int], band: int) -> Tensor:
    resampler = RowResampler(picture.shape[1], picture.shape[2], *size)
    return torch.cat([resampler.push(rows) for rows in picture.split(band, dim=1)], 1)


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (13, 17), (26, 34), (9, 20), (80, 23), (208, 136)])
def test_rows_equal_the_whole(size: tuple[int, int]) -> None:
    picture = torch.rand((3, 26, 17), generator=torch.Generator().manual_seed(0))
    whole = F.interpolate(picture[None], size=size, mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(resized(picture, size, 5), whole, atol=2e-6, rtol=0)
    assert torch.equal(resized(picture, size, 1), resized(picture, size, 26))


def test_the_own_size_changes_nothing() -> None:
    picture = torch.rand((1, 7, 5), generator=torch.Generator().manual_seed(1))
    assert torch.equal(resized(picture, (7, 5), 2), picture)


def test_a_flat_picture_stays_flat() -> None:
    torch.testing.assert_close(
        resized(torch.full((1, 31, 29), 0.3), (12, 50), 4), torch.full((1, 12, 50), 0.3), atol=1e-6, rtol=0
    )
