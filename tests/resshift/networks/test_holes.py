"""Holes that are filled from their surroundings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from resshift.networks.holes import fill_holes
from tests.holes import box


def ramp(height: int, width: int) -> Tensor:
    """Return a plane in each channel: it is harmonic, every pixel is the mean of its four neighbours."""
    rows, columns = torch.meshgrid(torch.arange(height) / 64, torch.arange(width) / 64, indexing="ij")
    return torch.stack((rows, columns, rows - 2 * columns))[None]


def mask_of(hole: np.ndarray) -> Tensor:
    return torch.from_numpy(hole).float()[None, None] * 2 - 1


def inner(height: int, width: int, side: int) -> np.ndarray:
    hole = np.zeros((height, width), np.bool_)
    hole[height // 3 : height // 3 + side, width // 4 : width // 4 + side] = True
    return hole


@pytest.mark.parametrize(("side", "levels"), [(1, 0.01), (3, 0.1), (8, 1.0), (30, 5.0)])
def test_a_ramp_is_filled_by_the_ramp(side: int, levels: float) -> None:
    """The membrane of a plane is the plane; 255 levels are 2."""
    picture, mask = ramp(67, 90), mask_of(inner(67, 90, side))
    filled = fill_holes(torch.where(mask > 0, -1.0, picture), mask)
    assert float((filled - picture).abs().max()) < levels * 2 / 255


def test_the_fill_lies_between_the_values_around_it() -> None:
    """No maximum and no minimum of a membrane is inside of its hole."""
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand((2, 3, 40, 52), generator=generator)
    mask = mask_of(inner(40, 52, 12)).repeat(2, 1, 1, 1)
    filled = fill_holes(picture, mask)
    assert filled.min() >= picture.min()
    assert filled.max() <= picture.max()
    inside = filled[mask.expand_as(filled) > 0]
    assert inside.std() < 0.5 * picture.std()


@pytest.mark.parametrize("hole", [box(33, 47), inner(64, 64, 20)], ids=["at the edge", "inside"])
def test_known_pixels_stay_and_hidden_ones_do_not_matter(hole: np.ndarray) -> None:
    generator = torch.Generator().manual_seed(1)
    picture, mask = torch.rand((1, 3, *hole.shape), generator=generator), mask_of(hole)
    filled = fill_holes(picture, mask)
    known = (mask <= 0).expand_as(picture)
    assert torch.equal(filled[known], picture[known])
    assert torch.equal(filled, fill_holes(torch.where(mask > 0, 7.0, picture), mask))


def test_each_picture_of_a_batch_is_filled_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    pictures = torch.rand((3, 3, 31, 40), generator=generator)
    masks = torch.cat([mask_of(inner(31, 40, side)) for side in (2, 5, 9)])
    for i, filled in enumerate(fill_holes(pictures, masks)):
        torch.testing.assert_close(filled, fill_holes(pictures[i : i + 1], masks[i : i + 1])[0])


def test_a_picture_without_known_pixels_is_zero() -> None:
    assert not fill_holes(torch.ones(1, 3, 9, 9), torch.ones(1, 1, 9, 9)).any()
