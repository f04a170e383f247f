"""Area averages: each rule against its library and against the integral it stands for."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from resshift.resize.area import Rule, area_resize
from resshift.seeds import philox

SIZES = [(12, 9), (33, 47), (61, 90), (64, 51), (31, 100)]


def picture(height: int, width: int) -> NDArray[np.float32]:
    return philox("test", "area", height, width).random((height, width, 3), dtype=np.float32)


@pytest.mark.parametrize("size", SIZES)
def test_touched_equals_adaptive_pooling(size: tuple[int, int]) -> None:
    image = picture(64, 51)
    expected = (
        F.adaptive_avg_pool2d(torch.from_numpy(image).permute(2, 0, 1)[None], size)[0]
        .permute(1, 2, 0)
        .numpy()
    )
    np.testing.assert_allclose(area_resize(image, *size, "touched"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(256, 256), (100, 37), (64, 51), (63, 50)])
def test_covered_equals_opencv_when_shrinking(size: tuple[int, int]) -> None:
    image = picture(301, 333)
    expected = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(area_resize(image, *size, "covered"), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rule", ["covered", "touched"])
def test_8_bit_pictures_and_views_give_the_same_rounded(rule: Rule) -> None:
    image_u8 = (picture(70, 90) * 255).astype(np.uint8)
    view = image_u8[3:60, 10:80]
    expected = area_resize(np.ascontiguousarray(view, dtype=np.float32), 31, 44, rule)
    assert area_resize(view, 31, 44, rule).dtype == np.uint8
    np.testing.assert_array_equal(area_resize(view, 31, 44, rule), np.rint(expected))


def test_halves_of_8_bit_pixels_round_to_even() -> None:
    pairs = np.array([[0, 1], [1, 2], [2, 3], [254, 255]], dtype=np.uint8)
    halves = area_resize(np.repeat(pairs[:, :, None], 3, axis=2), 4, 1, "covered")
    np.testing.assert_array_equal(halves[:, 0, 0], [0, 2, 2, 254])


@pytest.mark.parametrize(("num_in", "num_out"), [(7, 3), (3, 7), (10, 4), (5, 5), (1, 4)])
def test_covered_is_the_integral_of_the_pixels(num_in: int, num_out: int) -> None:
    column = picture(num_in, 1)[:, :, :1].repeat(3, axis=2)
    integral = np.concatenate([[0], np.cumsum(column[:, 0, 0], dtype=np.float64)])
    edges = np.interp(np.arange(num_out + 1) * num_in / num_out, np.arange(num_in + 1), integral)
    expected = np.diff(edges) * num_out / num_in
    np.testing.assert_allclose(area_resize(column, num_out, 1, "covered")[:, 0, 0], expected, rtol=1e-5)
