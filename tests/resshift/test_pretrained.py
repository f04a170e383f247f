"""The weights that ship: they are those of their preset, and they restore what bicubic cannot."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from resshift import Upscaler
from resshift.degradation.resize import imresize
from resshift.metrics.psnr_ssim import psnr
from resshift.models import PRETRAINED, read_model_config
from resshift.presets import preset

SHIPPED = sorted(
    directory.name for directory in PRETRAINED.iterdir() if (directory / "config.json").is_file()
)


def drawn(side: int) -> NDArray[np.uint8]:
    """Discs, bars and a ring on a gradient, drawn four times as large and averaged, so that edges are those
    of a camera.
    """
    large = 4 * side
    down = np.linspace(70, 140, large, dtype=np.float32)[:, None, None]
    picture = np.ascontiguousarray(np.broadcast_to(down, (large, large, 3)).astype(np.uint8))
    for x, y, radius, colour in (
        (0.3, 0.3, 0.17, (200, 60, 40)),
        (0.7, 0.35, 0.12, (30, 90, 210)),
        (0.4, 0.75, 0.14, (240, 230, 90)),
    ):
        cv2.circle(picture, (int(x * large), int(y * large)), int(radius * large), colour, -1)
    cv2.circle(
        picture, (int(0.75 * large), int(0.75 * large)), int(0.13 * large), (20, 20, 20), int(0.02 * large)
    )
    for i in range(4):
        start, end = (0.05, 0.55 + 0.05 * i), (0.95, 0.05 + 0.1 * i)
        cv2.line(
            picture,
            (int(start[0] * large), int(start[1] * large)),
            (int(end[0] * large), int(end[1] * large)),
            (250, 250, 250),
            large // 90,
        )
    return np.asarray(cv2.resize(picture, (side, side), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def resized(image_u8: NDArray[np.uint8], scale: float) -> NDArray[np.uint8]:
    """MATLAB's imresize of 8-bit pictures."""
    return np.rint(imresize(image_u8.astype(np.float64), scale).clip(0, 255)).astype(np.uint8)


def test_three_models_ship() -> None:
    assert SHIPPED == ["tiny-inpaint", "tiny-x4", "tiny-x4-s4"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configuration_is_that_of_the_preset(name: str) -> None:
    assert read_model_config(PRETRAINED / name) == (name, preset(name).model)


@pytest.mark.parametrize("name", [name for name in SHIPPED if preset(name).model.scale == 4])
def test_edges_come_out_nearer_to_the_truth_than_by_bicubic(name: str) -> None:
    hq = drawn(192)
    lq = resized(hq, 1 / 4)
    by_model = Upscaler.from_pretrained(name, device="cpu")(lq, seed=0)
    assert psnr(by_model, hq) > psnr(resized(lq, 4), hq) + 1


def test_holes_in_a_texture_have_its_colour_and_texture_again() -> None:
    """The membrane that it starts from has a tenth of the detail there."""
    texture = cv2.GaussianBlur(np.random.default_rng(0).normal(size=(192, 192, 3)), (0, 0), 1.2)
    picture = np.clip(120 + 30 * texture / texture.std(), 0, 255).round().astype(np.uint8)
    hole = np.zeros((192, 192), np.bool_)
    hole[40:60, 20:170] = hole[90:170, 100:112] = True
    filled = Upscaler.from_pretrained("tiny-inpaint", device="cpu")(picture, mask=hole).astype(np.float64)
    np.testing.assert_array_equal(filled[~hole], picture[~hole])
    assert filled[hole].mean() == pytest.approx(picture[hole].mean(), abs=5)
    detail = filled - cv2.GaussianBlur(filled, (0, 0), 3)
    assert detail[hole].std() > detail[~hole].std() / 3


def test_another_seed_of_the_chain_is_another_detail_of_the_same_picture() -> None:
    """Pixels differ by levels, means over 16 x 16 pixels hardly; the model of one step has no seeds."""
    lq = resized(np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8), 1 / 4)
    for name, differs in (("tiny-x4", False), ("tiny-x4-s4", True)):
        model = Upscaler.from_pretrained(name, device="cpu")
        first, second = (np.asarray(model(lq, seed=seed), np.float64) for seed in (0, 1))
        assert (np.abs(first - second).mean() > 1) == differs
        means = [x.reshape(12, 16, 12, 16, 3).mean((1, 3)) for x in (first, second)]
        assert np.abs(means[0] - means[1]).mean() < 2
