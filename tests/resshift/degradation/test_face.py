"""The face recipe: official numbers, order and sizes, and grey for both pictures of the pair."""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from resshift.degradation import DegradationParams, DegradationRecipe, degrade, draw, face, target
from resshift.degradation.apply import Gray
from resshift.degradation.jpeg import Jpeg
from resshift.degradation.kernels import Blur, GaussianKernel, kernel
from resshift.degradation.noise import Noise
from resshift.degradation.recipe import FaceRecipe
from resshift.degradation.resize import Resize
from resshift.seeds import philox

pytestmark = pytest.mark.usefixtures("one_thread")


def draws(recipe: DegradationRecipe, num_draws: int) -> list[DegradationParams]:
    return [draw(philox("test", "face", i), recipe) for i in range(num_draws)]


def picture(side: int) -> NDArray[np.uint8]:
    coarse = philox("test", "face picture").integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return np.asarray(cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)


def test_draw_follows_the_official_numbers() -> None:
    all_params = draws(face(), 4000)
    kernels: list[GaussianKernel] = []
    shrinks: list[float] = []
    levels: list[float] = []
    qualities: list[int] = []
    for params in all_params:
        blur, shrink, noise, jpeg, back = params.ops[:5]
        assert isinstance(blur, Blur)
        assert isinstance(blur.kernel, GaussianKernel)
        assert isinstance(shrink, Resize)
        assert isinstance(noise, Noise)
        assert isinstance(jpeg, Jpeg)
        assert back == Resize(of="lq", factor=1.0, mode="bilinear")
        assert (shrink.of, shrink.mode, noise.kind, noise.gray) == ("hq", "bilinear", "gaussian", False)
        kernels.append(blur.kernel)
        shrinks.append(1 / shrink.factor)
        levels.append(noise.level)
        qualities.append(jpeg.quality)
    assert {k.size for k in kernels} == {41}
    assert {k.type for k in kernels} == {"iso", "aniso"}
    assert np.mean([k.type == "iso" for k in kernels]) == pytest.approx(0.5, abs=0.03)
    for values, low, high in (
        ([k.sigma_x for k in kernels], 0.1, 15),
        (shrinks, 0.8, 32),
        (levels, 0, 20),
        (qualities, 30, 100),
    ):
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=4 * (high - low) / math.sqrt(12 * 4000))
    grey = [len(params.ops) == 6 and params.ops[5] == Gray() for params in all_params]
    assert sum(grey) + sum(len(params.ops) == 5 for params in all_params) == 4000
    assert np.mean(grey) == pytest.approx(0.01, abs=4 * math.sqrt(0.01 * 0.99 / 4000))


def test_blur_and_resizes_equal_their_definition() -> None:
    """Without noise and JPEG the chain is linear: correlate, shrink, enlarge, each written out here in
    float64.
    """
    hq_u8 = picture(64)
    spec = GaussianKernel(type="aniso", size=41, sigma_x=3.0, sigma_y=1.2, theta=0.4)
    factor = 1 / 3.7
    ops = (
        Blur(kernel=spec),
        Resize(of="hq", factor=factor, mode="bilinear"),
        Resize(of="lq", factor=1.0, mode="bilinear"),
    )
    out = degrade(hq_u8, DegradationParams(scale=1, ops=ops))

    def linear(num_in: int, num_out: int) -> NDArray[np.float64]:
        centre = np.clip((np.arange(num_out) + 0.5) * num_in / num_out - 0.5, 0, num_in - 1)
        return np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(num_in)))

    padded = np.pad(hq_u8 / 255, ((20, 20), (20, 20), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (41, 41), axis=(0, 1))
    blurred = np.einsum("hwcij,ij->hwc", windows, kernel(spec).astype(np.float64))
    there_and_back = linear(17, 64) @ linear(64, 17)  # floor(64 / 3.7) = 17
    expected = np.einsum("yh,xw,hwc->yxc", there_and_back, there_and_back, blurred)
    assert np.abs(out - 255 * np.clip(expected, 0, 1)).max() < 0.51


def test_low_quality_has_the_size_of_the_clean_picture() -> None:
    hq_u8 = picture(64)
    for params in draws(face(), 40):
        assert degrade(hq_u8, params).shape == hq_u8.shape


def test_grey_takes_the_colour_of_both_pictures() -> None:
    hq_u8 = picture(64)
    recipe = replace(face(), face=replace(FaceRecipe(), gray_prob=1.0))
    (params,) = draws(recipe, 1)
    clean, lq_u8 = target(hq_u8, params), degrade(hq_u8, params)
    for image in (clean, lq_u8):
        assert (np.ptp(image, axis=2) == 0).all()
    assert np.abs(clean[..., 0] - hq_u8 @ np.array([0.299, 0.587, 0.114])).max() < 0.51
    coloured = DegradationParams(scale=1, ops=params.ops[:5])
    assert target(hq_u8, coloured) is hq_u8
    assert np.ptp(degrade(hq_u8, coloured), axis=2).max() > 0


def test_impossible_face_recipes_raise_and_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"shrink = \(32\.0, 0\.8\)"):
        FaceRecipe(shrink=(32.0, 0.8))
    with pytest.raises(ValueError, match=r"gray_prob = 2"):
        FaceRecipe(gray_prob=2.0)
