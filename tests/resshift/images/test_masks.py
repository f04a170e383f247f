"""Masks: which pixels are a hole, and which masks cannot be used."""

from __future__ import annotations

import numpy as np
import pytest

from resshift.images import ImageError, Picture
from resshift.images.masks import hole_of, with_mask
from tests.holes import box

HOLE = box(12, 16)


def grey(dtype: type = np.uint8, channels: int = 1) -> Picture:
    """Just below half, and half."""
    highest = np.iinfo(dtype).max
    levels = np.where(HOLE, highest // 2 + 1, highest // 2).astype(dtype)
    return Picture(pixels=np.repeat(levels[..., None], channels, axis=2))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_bright_pixels_of_a_grey_mask_are_the_hole(dtype: type, channels: int) -> None:
    assert np.array_equal(hole_of(grey(dtype, channels)), HOLE)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_transparent_pixels_are_the_hole_whatever_their_colour(dtype: type) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 3)).astype(dtype)
    highest = np.iinfo(dtype).max
    alpha = np.where(HOLE, highest // 2, highest).astype(dtype)
    assert np.array_equal(hole_of(Picture(pixels=pixels, alpha=alpha)), HOLE)
    opaque = Picture(pixels=grey(dtype, 3).pixels, alpha=np.full((12, 16), highest, dtype))
    assert np.array_equal(hole_of(opaque), HOLE)


def test_a_picture_without_a_mask_has_its_transparency_as_one_and_loses_it() -> None:
    pixels = np.zeros((12, 16, 3), np.uint8)
    alpha = np.where(HOLE, 0, 255).astype(np.uint8)
    found = with_mask(Picture(pixels=pixels, alpha=alpha), None)
    assert found.mask is not None
    assert np.array_equal(found.mask, HOLE)
    assert found.alpha is None
    alpha[-1, -1] = 200  # beside the hole
    found = with_mask(Picture(pixels=pixels, alpha=alpha), None)
    assert found.alpha is not None
    assert np.array_equal(found.alpha, np.where(HOLE, 255, alpha))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (None, "needs a mask, or transparent pixels"),
        (Picture(pixels=np.zeros((16, 12, 1), np.uint8)), "the mask is 12x16, and must be 16x12"),
        (Picture(pixels=np.zeros((12, 16, 1), np.uint8)), "is empty; it must be a part of the picture"),
        (Picture(pixels=np.full((12, 16, 1), 255, np.uint8)), "covers the whole picture"),
        (Picture(pixels=np.full((12, 16, 3), (200, 90, 0), np.uint8)), "the mask is in colour"),
    ],
)
def test_masks_that_cannot_be_used_are_refused_in_one_line(mask: Picture | None, message: str) -> None:
    with pytest.raises(ImageError, match=message) as error:
        with_mask(Picture(pixels=np.zeros((12, 16, 3), np.uint8)), mask)
    assert error.value.reason == ("no_mask" if mask is None else "bad_mask")
    assert "\n" not in str(error.value)
