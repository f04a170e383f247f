"""The measure of a screen of dots, on pictures that have one and pictures that have none."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scripts import load_script

screen_db = load_script("benchmarks/screen.py").screen_db


def noise(sigma: float = 20.0, side: int = 256) -> np.ndarray:
    grey = np.random.default_rng(0).normal(128, sigma, (side, side))
    return np.repeat(grey[..., None], 3, axis=2)


def as_u8(picture: np.ndarray) -> np.ndarray:
    return picture.clip(0, 255).round().astype(np.uint8)


def test_noise_has_none_and_a_pattern_is_found() -> None:
    dots = np.tile(np.random.default_rng(1).normal(0, 1, (4, 4)), (64, 64))[..., None]
    clean, faint, strong = (screen_db(as_u8(noise() + amount * dots), 4) for amount in (0, 16, 32))
    assert abs(clean) < 2.5
    assert faint > clean + 10
    assert strong == pytest.approx(faint + 20 * np.log10(2), abs=1)  # power grows with the square


def test_a_pattern_of_another_period_is_not_meant() -> None:
    dots = np.tile(np.random.default_rng(1).normal(0, 8, (7, 7)), (37, 37))[:256, :256, None]
    assert abs(screen_db(as_u8(noise() + dots), 4)) < 3


def test_small_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="31x256, both sides must be at least 32"):
        screen_db(np.zeros((256, 31, 3), np.uint8), 4)
