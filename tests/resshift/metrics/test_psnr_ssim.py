"""PSNR, SSIM and luma: the released values, skimage's, and what must hold by definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from resshift.metrics.psnr_ssim import luma, psnr, ssim

Load = Callable[[str], dict[str, np.ndarray]]


def noise(seed: int, height: int = 40, width: int = 30) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_metrics_against_official(parity: Load) -> None:
    arrays = parity("image_ops")
    x, y = arrays["u8"], arrays["v8"]
    np.testing.assert_array_equal(luma(x), arrays["y_u8"])
    assert psnr(x, y) == pytest.approx(30.20429474050158, abs=1e-5)
    assert psnr(luma(x), luma(y)) == pytest.approx(34.798273030341726, abs=1e-5)
    assert psnr(x, y, border=4) == pytest.approx(30.237490158064073, abs=1e-5)
    assert ssim(x, y) == pytest.approx(0.9941139699910432, abs=1e-5)
    assert ssim(luma(x), luma(y)) == pytest.approx(0.9940940976486046, abs=1e-5)


def test_psnr_of_a_known_difference() -> None:
    x = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(x, x + 5) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr(x, x) == float("inf")


def test_ssim_against_skimage() -> None:
    x, y = noise(0), (noise(0) * 0.8 + noise(1) * 0.2).astype(np.uint8)
    result: Any = structural_similarity(
        x,
        y,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        data_range=255,
        full=True,
    )
    # skimage cuts its window at 3.5 sigma = 5 pixels, as we do, but averages over the border as well.
    assert ssim(x, y) == pytest.approx(result[1][5:-5, 5:-5].mean(), abs=1e-6)


def test_metrics_are_symmetric_and_one_for_equal_pictures() -> None:
    x, y = noise(0), noise(1)
    assert ssim(x, x) == pytest.approx(1, abs=1e-12)
    assert ssim(x, y) == pytest.approx(ssim(y, x), abs=1e-12)
    assert psnr(x, y) == psnr(y, x)


def test_luma_of_black_and_white() -> None:
    assert luma(np.array([[[0, 0, 0], [255, 255, 255]]], np.uint8)).tolist() == [[16, 235]]


@pytest.mark.parametrize(
    ("x", "y", "border", "message"),
    [
        (noise(0), noise(0, 41), 0, "of one shape"),
        (noise(0).astype(np.float32), noise(0).astype(np.float32), 0, "must be uint8"),
        (noise(0), noise(0), 15, "border must lie in"),
        (noise(0), noise(0), -1, "border must lie in"),
    ],
)
def test_bad_input_is_named(x: np.ndarray, y: np.ndarray, border: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        psnr(x, y, border)


def test_ssim_needs_room_for_its_window() -> None:
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(noise(0, 10, 30), noise(1, 10, 30))
