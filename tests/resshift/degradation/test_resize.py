"""Resizing: MATLAB's bicubic against official arrays, the plain modes against F.interpolate, and
alignment.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from resshift.degradation import DegradationParams, degrade, imresize
from resshift.degradation.resize import InterpolationMode, Resize, resize
from resshift.seeds import philox

pytestmark = pytest.mark.usefixtures("one_thread")

Load = Callable[[str], dict[str, np.ndarray]]


@pytest.mark.parametrize(
    ("scale", "name"), [(0.25, "0.2500"), (0.5, "0.5000"), (1 / 3, "0.3333"), (2, "2.0000"), (4, "4.0000")]
)
def test_imresize_against_official(scale: float, name: str, parity: Load) -> None:
    arrays = parity("image_ops")
    expected = arrays[f"imresize_{name}"]
    np.testing.assert_allclose(imresize(arrays["smooth"], scale), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(
        imresize(arrays["smooth"].astype(np.float64), scale), expected, rtol=0, atol=2e-6
    )


def cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    return np.where(
        x <= 1, 1.5 * x**3 - 2.5 * x**2 + 1, np.where(x < 2, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2, 0)
    )


@pytest.mark.parametrize("scale", [0.25, 0.37, 0.8, 1.5, 3.0])
def test_imresize_equals_the_sum_of_matlabs_definition(scale: float) -> None:
    column = philox("test", "imresize").random((23, 1, 1))
    num_out = int(np.ceil(23 * scale))
    shrink = min(scale, 1)
    centre = (np.arange(num_out) + 0.5) / scale - 0.5
    taps = np.arange(-60, 83)  # far beyond both ends
    weights = cubic((centre[:, None] - taps) * shrink)
    mirrored = np.pad(column[:, 0, 0], (60, 60), mode="symmetric")
    expected = (weights @ mirrored) / weights.sum(axis=1)
    out = imresize(np.repeat(column, 4, axis=1), scale)
    np.testing.assert_allclose(out[:, 0, 0], expected, rtol=0, atol=1e-12)


def test_imresize_keeps_dtype_and_rejects_what_it_cannot_do() -> None:
    image = philox("test", "dtype").random((9, 10, 1))
    assert imresize(image, 0.5).dtype == np.float64
    assert imresize(image.astype(np.float32), 0.5).dtype == np.float32
    assert imresize(image, 0.5).shape == (5, 5, 1)
    for scale in (0.0, -1.0, float(np.pi)):
        with pytest.raises(ValueError, match="positive fraction"):
            imresize(image, scale)
    with pytest.raises(ValueError, match="float32 or float64"):
        imresize(np.zeros((4, 4, 3), dtype=np.uint8), 0.5)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(12, 9), (33, 47), (61, 90), (32, 32), (31, 100)])
def test_resize_equals_interpolate(mode: InterpolationMode, size: tuple[int, int]) -> None:
    image = philox("test", "resize").random((64, 51, 3), dtype=np.float32)
    expected = (
        F.interpolate(torch.from_numpy(image).permute(2, 0, 1)[None], size=size, mode=mode)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    out = resize(image, *size, mode)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)  # torch computes coordinates in float32


@pytest.mark.parametrize("mode", ["area", "bilinear", "bicubic"])
def test_two_resizes_stay_aligned_at_the_far_edge(mode: InterpolationMode) -> None:
    # 256 * 0.151 = 38.66 is floored to 38; spacing by 1/0.151 would shift the far edge by 4.3 pixels, 8.6
    # levels on this ramp
    ramp_u8 = np.broadcast_to((np.arange(256) // 2 + 60).astype(np.uint8)[:, None, None], (256, 256, 3))
    ramp_u8 = np.ascontiguousarray(np.maximum(ramp_u8, ramp_u8.transpose(1, 0, 2)))
    first = Resize(of="hq", factor=0.151, mode=mode)
    lq_u8 = degrade(ramp_u8, DegradationParams(scale=4, ops=(first, Resize(of="lq", factor=1.0, mode=mode))))
    expected = imresize(ramp_u8.astype(np.float64), 0.25)
    error = lq_u8.astype(np.float64) - expected
    assert np.abs(error[-12:-3]).mean() < 1.2
    assert np.abs(error[:, -12:-3]).mean() < 1.2


def test_factors_refer_to_the_clean_or_the_final_size() -> None:
    hq_u8 = np.zeros((60, 90, 3), dtype=np.uint8)
    final = Resize(of="lq", factor=1.0, mode="area")
    for scale in (2, 3, 5):
        for middle in (
            Resize(of="hq", factor=0.151, mode="area"),
            Resize(of="lq", factor=1.2, mode="area"),
            Resize(of="hq", factor=1e-3, mode="area"),
        ):
            assert degrade(hq_u8, DegradationParams(scale=scale, ops=(middle, final))).shape == (
                60 // scale,
                90 // scale,
                3,
            )


def test_impossible_resizes_raise() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Resize(of="hq", factor=0.0, mode="area")
    with pytest.raises(ValueError, match="must be of='lq'"):
        Resize(of="hq", factor=0.25, mode="matlab_bicubic")
