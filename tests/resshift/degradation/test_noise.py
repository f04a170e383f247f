"""Noise: its laws against the exact ones, its colour, its clipping."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from scipy.stats import kstest, norm, poisson

from resshift.degradation.noise import Noise, add_noise, normal_table, poisson_table
from resshift.seeds import philox

pytestmark = pytest.mark.usefixtures("one_thread")


def test_normal_table_is_the_normal_law() -> None:
    table = normal_table().astype(np.float64)
    assert table.mean() == pytest.approx(0, abs=1e-7)
    assert table.var() == pytest.approx(1, rel=1e-6)
    assert (
        np.abs(norm.cdf(table) - (np.arange(65536) + 0.5) / 65536).max() < 1e-4
    )  # of which scaling to variance 1 costs 2e-5


@pytest.mark.parametrize("photons", [2, 16, 256])
def test_poisson_table_is_the_poisson_law(photons: int) -> None:
    u = np.arange(256)[:, None] / 255
    counts = np.rint((poisson_table(photons) + u) * photons)
    np.testing.assert_allclose(counts / photons - u, poisson_table(photons), rtol=0, atol=1e-6)
    expected = poisson.cdf(np.arange(counts.max() + 1), photons * u)
    found = np.stack(
        [np.searchsorted(row, np.arange(counts.max() + 1), side="right") / 4096 for row in counts]
    )
    assert np.abs(found - expected).max() <= 0.5 / 4096 + 1e-9
    assert not counts[0].any()
    deviation = (counts - photons * u)[1:] / np.sqrt(photons * u[1:])
    bright = (photons * u[1:, 0]) > 1
    assert np.abs(deviation.mean(axis=1)[bright]).max() < 1e-3
    assert np.abs(deviation.var(axis=1)[bright] - 1).max() < 3e-3


@pytest.mark.parametrize("gray", [False, True])
def test_gaussian_noise_is_normal_and_independent_between_pixels(gray: bool) -> None:
    image = np.full((128, 128, 3), 0.5, dtype=np.float32)
    deviation = (add_noise(image, Noise(kind="gaussian", level=10.0, gray=gray, seed=4)) - image) * 25.5
    values = deviation[..., 0] if gray else deviation
    assert kstest(values.ravel(), "norm").pvalue > 1e-3  # pyright: ignore[reportAttributeAccessIssue]
    for axis in (0, 1):
        neighbours = np.corrcoef(np.delete(values, 0, axis).ravel(), np.delete(values, -1, axis).ravel())[
            0, 1
        ]
        assert abs(neighbours) < 4 / np.sqrt(values.size)


@pytest.mark.parametrize("kind", ["gaussian", "poisson"])
def test_correlated_noise_has_its_covariance(kind: Literal["gaussian", "poisson"]) -> None:
    """The sums of products of the weights 1 and four times 1/2, over sqrt(2), also across edges."""
    image = np.full((128, 128, 3), 0.5, dtype=np.float32)
    image[:8, :, :] += np.arange(128)[:, None] / 1000  # many levels, so Poisson noise has many photons
    plain, correlated = (
        add_noise(image, Noise(kind=kind, level=0.5, gray=False, correlated=is_correlated, seed=6)) - image
        for is_correlated in (False, True)
    )
    variance = plain.var()
    for dy, dx, expected in (
        (0, 0, 1.0),
        (0, 1, 0.5),
        (1, 0, 0.5),
        (1, 1, 0.25),
        (2, 0, 0.125),
        (2, 1, 0.0),
    ):
        shifted = np.roll(correlated, (dy, dx), (0, 1))
        assert (correlated * shifted).mean() / variance == pytest.approx(expected, abs=0.02)


def test_noise_is_a_function_of_its_seed() -> None:
    image = philox("test", "image").random((40, 50, 3), dtype=np.float32)
    for kind in ("gaussian", "poisson"):
        first, again, other = (
            add_noise(image, Noise(kind=kind, level=1.0, gray=False, seed=seed)) for seed in (1, 1, 2)
        )
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_gaussian_has_its_level() -> None:
    gray_picture = np.full((128, 128, 3), 0.5, dtype=np.float32)
    for gray in (False, True):
        deviation = (
            add_noise(gray_picture, Noise(kind="gaussian", level=20.0, gray=gray, seed=1)) - gray_picture
        )
        assert deviation.std() * 255 == pytest.approx(20, rel=0.03)
        assert abs(float(deviation.mean())) * 255 < 0.6
        between = np.corrcoef(deviation[..., 0].ravel(), deviation[..., 1].ravel())[0, 1]
        assert between == pytest.approx(1.0 if gray else 0.0, abs=0.04)


@pytest.mark.parametrize("gray", [False, True])
@pytest.mark.parametrize(("num_levels", "photons"), [(2, 2), (5, 8), (64, 64), (100, 128)])
def test_poisson_has_the_variance_of_its_photons(num_levels: int, photons: int, gray: bool) -> None:
    levels = (80 + np.arange(num_levels)).astype(np.float32) / 255
    image = np.repeat(philox("test", "levels").choice(levels, (128, 128, 1)), 3, axis=2)
    image[0, :num_levels] = levels[:, None]  # every level is there
    scale = 0.2
    deviation = add_noise(image, Noise(kind="poisson", level=scale, gray=gray, seed=3)) - image
    expected = scale**2 * image.mean() / photons  # var(Poisson(v u) / v) = u / v
    assert deviation.var() == pytest.approx(expected, rel=0.06)
    assert bool((np.ptp(deviation, axis=2) < 1e-6).all()) is gray


def test_poisson_in_grey_counts_the_levels_of_the_luma() -> None:
    red = np.full((64, 64, 3), 0.4, dtype=np.float32)
    red[::2, :, 0] = 0.8  # colour: 2 levels; luma: 2 levels of 0.299 * 0.8 + ...
    deviation = add_noise(red, Noise(kind="poisson", level=0.1, gray=True, seed=5)) - red
    luma = red @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    for row in (0, 1):
        assert deviation[row::2].var() == pytest.approx(0.01 * luma[row].mean() / 2, rel=0.15)


def test_clips_and_leaves_its_input() -> None:
    image = np.tile(np.array([0.0, 1.0], dtype=np.float32)[:, None, None], (16, 32, 3))
    before = image.copy()
    for kind in ("gaussian", "poisson"):
        out = add_noise(
            image, Noise(kind=kind, level=30.0 if kind == "gaussian" else 3.0, gray=False, seed=2)
        )
        assert out.dtype == np.float32
        assert out.min() == 0
        assert out.max() == 1
    np.testing.assert_array_equal(image, before)
