"""The whole degradation on a device against that of the CPU, with equal parameters and equal noise."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from resshift import degradation, seeds
from resshift.degradation import DegradationRecipe, degrade, draw
from resshift.degradation.on_device.chain import DeviceDegradation
from resshift.degradation.on_device.plan import encode

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 32
MIXED = replace(
    degradation.realesrgan_x4(),
    bicubic_share=0.2,
    mild_share=0.2,
    camera_share=0.2,
    noise1=replace(degradation.realesrgan_x4().noise1, correlated_prob=0.5),
    noise3_prob=0.5,
)
Pictures = NDArray[np.uint8]


def pictures(num: int) -> Pictures:
    """Textures of several sizes in one picture."""
    found: list[Pictures] = []
    for i in range(num):
        rng = np.random.default_rng(i)
        picture = np.zeros((SIDE, SIDE, 3))
        for k, side in enumerate((2, 5, 16, SIDE)):
            layer = rng.random((side, side, 3), np.float32)
            picture += cv2.resize(layer, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC) / (1 + k)
        found.append(np.rint(255 * (picture - picture.min()) / np.ptp(picture)).astype(np.uint8))
    return np.stack(found)


def both(recipe: DegradationRecipe, num: int) -> tuple[Pictures, Pictures, Pictures]:
    """Return clean pictures, their records, and what the CPU makes of them."""
    hq = pictures(num)
    params = [draw(seeds.philox(0, "chain", i), recipe) for i in range(num)]
    records = np.stack([encode(one, SIDE) for one in params])
    return hq, records, np.stack([degrade(one, drawn) for one, drawn in zip(hq, params, strict=True)])


def on_device(recipe: DegradationRecipe, hq: Pictures, records: Pictures) -> Pictures:
    made = DeviceDegradation(recipe, SIDE)(torch.from_numpy(hq), torch.from_numpy(records))
    return made.numpy()


@pytest.mark.parametrize("num", [6, pytest.param(96, marks=pytest.mark.slow)])
def test_low_quality_pictures_are_those_of_the_cpu(num: int) -> None:
    """The tolerance, noise included: at least 5 of 6 samples are equal, byte for byte (93 of 96), and values
    differ by at most 0.05 levels of 255 in the mean (0.002). Samples differ where a float lay between two
    levels, or a coefficient of JPEG between two steps.
    """
    hq, records, expected = both(MIXED, num)
    difference = np.abs(on_device(MIXED, hq, records).astype(int) - expected).reshape(num, -1)
    assert np.count_nonzero(difference.any(axis=1)) <= num / 6
    assert difference.mean() < 0.05


@pytest.mark.parametrize("noise3_prob", [0.0, 0.5])
def test_bicubic_is_that_of_the_cpu(noise3_prob: float) -> None:
    """But for a level where a sum that lies between two is rounded."""
    recipe = replace(degradation.bicubic_x4(), noise3_prob=noise3_prob)
    hq, records, expected = both(recipe, 8)
    difference = np.abs(on_device(recipe, hq, records).astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


def test_a_sample_does_not_depend_on_its_batch() -> None:
    hq, records, _ = both(MIXED, 5)
    together = on_device(MIXED, hq, records)
    parts = [on_device(MIXED, hq[part], records[part]) for part in (slice(0, 2), slice(2, 5))]
    np.testing.assert_array_equal(np.concatenate(parts), together)


def test_autocast_does_not_round_levels() -> None:
    hq, records, _ = both(MIXED, 5)
    expected = on_device(MIXED, hq, records)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_array_equal(on_device(MIXED, hq, records), expected)
