"""Distorted crops: each step by its known answer, and the numbers that are drawn."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from resshift.config import DataConfig
from resshift.pairs.augment import Distortion, distorted_square, draw_distortion
from resshift.pairs.crops import training_crop
from resshift.seeds import philox

SIDE = 200


def ramps() -> NDArray[np.uint8]:
    """Return a picture whose red says x and whose green says y, 1 level a pixel."""
    axis = np.arange(SIDE, dtype=np.uint8)
    return np.stack(
        [*np.broadcast_arrays(axis[None, :], axis[:, None]), np.zeros((SIDE, SIDE), np.uint8)], axis=-1
    )


def square(distortion: Distortion) -> NDArray[np.float64]:
    return distorted_square(ramps(), distortion, SIDE, 0.0, 0.0).astype(np.float64)


def test_nothing_drawn_changes_nothing() -> None:
    photo = philox("test", "photo").integers(0, 256, (60, 90, 3), dtype=np.uint8)
    np.testing.assert_array_equal(distorted_square(photo, Distortion(), 60, 0.5, 0.0), photo[:, 15:75])


def test_the_short_side_is_brought_to_the_crop_by_averages() -> None:
    photo = philox("test", "photo").integers(0, 256, (120, 180, 3), dtype=np.uint8)
    expected = photo.reshape(60, 2, 90, 2, 3).mean(axis=(1, 3))[:, :60]
    assert np.abs(distorted_square(photo, Distortion(), 60, 0.0, 0.0) - expected).max() <= 0.5


def test_a_quarter_turn_is_clockwise() -> None:
    np.testing.assert_allclose(square(Distortion(rotation_deg=90)), np.rot90(ramps(), -1), atol=1)


def test_scale_is_about_the_centre() -> None:
    i = np.arange(SIDE)
    expected = (i + 0.5 - SIDE / 2) / 1.25 + SIDE / 2 - 0.5
    np.testing.assert_allclose(
        square(Distortion(scale=1.25))[..., 0], np.broadcast_to(expected, (SIDE, SIDE)), atol=0.6
    )
    mirrored = square(Distortion(scale=0.8))[100, :, 0]
    assert mirrored[0] == pytest.approx(24.5, abs=1)  # 25 pixels beyond the edge, reflected


def test_shear_moves_rows_by_their_height() -> None:
    out = square(Distortion(shear_deg=10.0))[..., 0]
    moved = out[150, 100] - out[50, 100]
    assert moved == pytest.approx(100 * math.tan(math.radians(10)), abs=1)


def test_the_inset_corners_come_to_the_corners_of_the_frame() -> None:
    corners = (0.1, 0.05, 0.0, 0.1, 0.2, 0.15, 0.05, 0.0)
    out = square(Distortion(corners=corners))[..., :2]
    expected = SIDE * np.array([[0.1, 0.05], [1.0, 0.1], [0.8, 0.85], [0.05, 1.0]])
    found = np.array([out[0, 0], out[0, -1], out[-1, -1], out[-1, 0]])
    np.testing.assert_allclose(found, np.minimum(expected, SIDE - 1), atol=1.5)


def test_the_lens_moves_along_the_radius() -> None:
    out = square(Distortion(lens=-0.05))[100, :, 0]
    r = (np.arange(SIDE) + 0.5 - SIDE / 2) / SIDE
    expected = SIDE / 2 + SIDE * r * (1 - 0.05 * (r**2 + r**4)) - 0.5
    np.testing.assert_allclose(out, expected, atol=0.6)


def test_tone_is_a_line_clipped() -> None:
    out = square(Distortion(contrast=1.2, brightness=-0.1))
    np.testing.assert_allclose(out, np.clip(ramps() * 1.2 - 25.5, 0, 255), atol=0.5 + 1e-9)


def test_colour_shifts_hue_saturation_and_value() -> None:
    photo = np.full((32, 32, 3), (200, 100, 100), dtype=np.uint8)
    out = distorted_square(photo, Distortion(hue=5.0, saturation=-30.0, value=4.0), 32, 0.0, 0.0)
    before, after = (cv2.cvtColor(image, cv2.COLOR_RGB2HSV).astype(int)[0, 0] for image in (photo, out))
    np.testing.assert_allclose(after - before, [5, -30, 4], atol=1)


def test_clahe_spreads_the_lightness_and_keeps_greys_grey() -> None:
    gray = np.repeat(philox("test", "grey").integers(110, 140, (128, 128, 1), dtype=np.uint8), 3, axis=2)
    spread = [
        distorted_square(gray, Distortion(clahe_limit=limit), 128, 0.0, 0.0).std() for limit in (1.0, 4.0)
    ]
    assert gray.std() < spread[0] < spread[1]
    assert np.ptp(distorted_square(gray, Distortion(clahe_limit=4.0), 128, 0.0, 0.0), axis=2).max() <= 1


def test_draws_follow_the_documented_numbers() -> None:
    drawn = [draw_distortion(philox("test", "distortion", i)) for i in range(4000)]
    plain = Distortion()
    ranges = {
        "scale": (0.7, 1.3),
        "rotation_deg": (-40, 40),
        "shear_deg": (-0.1, 0.1),
        "lens": (-0.05, 0.05),
        "contrast": (0.8, 1.2),
        "brightness": (-0.2, 0.2),
        "hue": (-5, 5),
        "saturation": (-30, 30),
        "value": (-5, 5),
        "clahe_limit": (1, 4),
    }
    for name, (low, high) in ranges.items():
        values = [getattr(d, name) for d in drawn if getattr(d, name) != getattr(plain, name)]
        assert len(values) == pytest.approx(2000, abs=4 * math.sqrt(1000))
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx(
            (low + high) / 2, abs=4 * (high - low) / math.sqrt(12 * len(values))
        )
    insets = np.array([d.corners for d in drawn if any(d.corners)])
    assert len(insets) == pytest.approx(2000, abs=4 * math.sqrt(1000))
    assert insets.mean() == pytest.approx(
        0.03 * math.sqrt(2 / math.pi), rel=0.05
    )  # mean of |N(0, sigma)| with sigma from U(0, 0.06)


def test_distorted_crops_are_a_function_of_their_stream() -> None:
    photo = philox("test", "photo").integers(0, 256, (90, 120, 3), dtype=np.uint8)
    data = DataConfig(crop="distorted", crop_px=64)
    first, again, other = (training_crop(photo, philox("crop", i), data) for i in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
