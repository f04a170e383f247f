"""Training crops."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from scipy import stats

from resshift.config import DataConfig
from resshift.pairs.crops import training_crop
from resshift.seeds import philox

RANDOM = DataConfig(crop="random", crop_px=16, flip=False)


def photo(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height + width).integers(0, 256, (height, width, 3), np.uint8)


@pytest.mark.parametrize("seed", range(8))
def test_random_crop_is_a_piece_of_the_photo(seed: int) -> None:
    image = photo(40, 60)
    crop = training_crop(image, philox(seed), RANDOM)
    windows = np.lib.stride_tricks.sliding_window_view(image, (16, 16), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    assert (windows == crop).all((2, 3, 4)).sum() == 1


def test_half_of_the_crops_are_flipped() -> None:
    image = photo(16, 16)
    crops = [
        training_crop(image, philox("flip", i), DataConfig(crop="random", crop_px=16)) for i in range(200)
    ]
    flipped = sum(np.array_equal(crop, image[:, ::-1]) for crop in crops)
    assert flipped + sum(np.array_equal(crop, image) for crop in crops) == 200
    assert 70 < flipped < 130


def test_short_side_takes_the_whole_short_side() -> None:
    image = photo(48, 48)
    crop = training_crop(image, philox(0), DataConfig(crop="short_side", crop_px=16, flip=False))
    np.testing.assert_array_equal(crop, cv2.resize(image, (16, 16), interpolation=cv2.INTER_AREA))


def test_scaled_sides_are_as_often_in_every_octave() -> None:
    """On a ramp of one level a pixel, the columns of a crop are side / crop_px levels apart: read the side
    off and test its logarithm.
    """
    ramp = np.ascontiguousarray(np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3)))
    data = DataConfig(crop="scaled", crop_px=16, flip=False)
    crops = np.stack([training_crop(ramp, philox("scale", i), data) for i in range(600)]).astype(float)
    sides = (crops[:, 0, -1, 0] - crops[:, 0, 0, 0]) * 16 / 15
    assert 15 < sides.min() < 17.5
    assert 235 < sides.max() < 257
    assert stats.kstest(np.log2(sides / 16) / 4, "uniform").pvalue > 0.01
    np.testing.assert_allclose(
        crops, np.broadcast_to(crops[:, :1], crops.shape), atol=1
    )  # whatever the side: still the ramp, in every row


def test_scaled_is_a_piece_of_a_photo_of_the_size_of_the_crop() -> None:
    image = photo(16, 40)
    crop = training_crop(image, philox(0), DataConfig(crop="scaled", crop_px=16, flip=False))
    np.testing.assert_array_equal(crop, training_crop(image, philox(0), RANDOM))


def test_random_crops_reach_every_corner() -> None:
    image = photo(17, 18)
    corners: set[tuple[int, int]] = set()
    for i in range(200):
        crop = training_crop(image, philox("corner", i), RANDOM)
        corners |= {
            (y, x) for y in range(2) for x in range(3) if np.array_equal(image[y : y + 16, x : x + 16], crop)
        }
    assert corners == {(y, x) for y in range(2) for x in range(3)}


@pytest.mark.parametrize("rule", ["random", "short_side", "scaled", "distorted"])
def test_crop_draws_the_same_count_whatever_the_photo(rule: str) -> None:
    """What is drawn after the crop, the degradation, must not depend on the size of the photo."""
    data = DataConfig(crop=rule, crop_px=16)  # pyright: ignore[reportArgumentType]
    following: set[float] = set()
    for size in ((1, 1), (16, 16), (40, 60), (5, 300)):
        rng = philox("draws")
        training_crop(photo(*size), rng, data)
        following.add(rng.random())
    assert len(following) == 1


def test_a_photo_that_is_too_small_is_reflected_about_its_middle() -> None:
    image = photo(16, 14)
    crop = training_crop(image, philox(0), RANDOM)
    np.testing.assert_array_equal(crop, np.concatenate([image[:, 1:2], image, image[:, -2:-1]], axis=1))


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (300, 5), (15, 15), (16, 17)])
@pytest.mark.parametrize("rule", ["random", "short_side", "scaled", "distorted"])
def test_small_photos_are_extended(size: tuple[int, int], rule: str) -> None:
    crop = training_crop(photo(*size), philox(1), DataConfig(crop=rule, crop_px=16))  # pyright: ignore[reportArgumentType]
    assert (crop.shape, crop.dtype, crop.flags.c_contiguous) == ((16, 16, 3), np.uint8, True)
