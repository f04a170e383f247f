"""Kernels against the official formulas' numbers, and drawn kernels against 2000 official draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import chi2_contingency, ks_2samp

from resshift.degradation.drawing import draw_final_kernel, draw_kernel
from resshift.degradation.kernels import GaussianKernel, PulseKernel, SincKernel, blur, kernel
from resshift.degradation.ranges import Draws
from resshift.degradation.recipe import KernelRecipe, imagenet_test_x4, realesrgan_x4
from resshift.seeds import philox

pytestmark = pytest.mark.usefixtures("one_thread")

Load = Callable[[str], dict[str, np.ndarray]]
AnyKernel = GaussianKernel | SincKernel | PulseKernel

TYPES = [
    "iso",
    "aniso",
    "generalized_iso",
    "generalized_aniso",
    "plateau_iso",
    "plateau_aniso",
    "sinc",
    "pulse",
]
FIXED: dict[str, AnyKernel] = {
    "iso": GaussianKernel(type="iso", size=21, sigma_x=1.7, sigma_y=1.7),
    "aniso": GaussianKernel(type="aniso", size=19, sigma_x=2.5, sigma_y=0.6, theta=0.7),
    "gen_iso": GaussianKernel(type="generalized_iso", size=15, sigma_x=1.3, sigma_y=1.3, beta=0.6),
    "gen_aniso": GaussianKernel(
        type="generalized_aniso", size=13, sigma_x=2.0, sigma_y=0.9, theta=-1.1, beta=3.0
    ),
    "plateau_iso": GaussianKernel(type="plateau_iso", size=11, sigma_x=1.1, sigma_y=1.1, beta=1.5),
    "plateau_aniso": GaussianKernel(
        type="plateau_aniso", size=9, sigma_x=2.2, sigma_y=0.5, theta=2.0, beta=0.7
    ),
    "sinc7": SincKernel(size=7, omega=1.3),
    "sinc13": SincKernel(size=13, omega=2.9),
    "sinc9_pad15": SincKernel(size=9, omega=1.1),
}


@pytest.mark.parametrize("name", FIXED)
def test_kernel_against_official(name: str, parity: Load) -> None:
    expected = parity("degradation_kernels")[f"k_{name}"]
    k = kernel(FIXED[name])
    pad = (
        len(expected) - len(k)
    ) // 2  # official code pads kernels with zeros to one size; ours keep their size
    np.testing.assert_allclose(np.pad(k, pad), expected, rtol=0, atol=1e-6)


def p_value(result: Any) -> float:
    return float(result.pvalue)


def statistics(spec: AnyKernel) -> list[float]:
    k = kernel(spec).astype(np.float64)
    squared = (np.arange(len(k)) - len(k) // 2) ** 2
    return [
        TYPES.index(spec.type),
        spec.size,
        (k.sum(axis=0) * squared).sum(),
        (k.sum(axis=1) * squared).sum(),
        k.max(),
        np.abs(k).sum(),
        spec.omega if isinstance(spec, SincKernel) else math.nan,
    ]


def drawn(name: str, num_draws: int) -> NDArray[np.float64]:
    recipe, draws = realesrgan_x4(), Draws(philox("test", "kernels", name))
    draw_by_name: dict[str, Callable[[], AnyKernel]] = {
        "kernel1": lambda: draw_kernel(draws, recipe.kernel1),
        "kernel2": lambda: draw_kernel(draws, recipe.kernel2),
        "kernel3": lambda: draw_final_kernel(draws, recipe),
    }
    return np.array([statistics(draw_by_name[name]()) for _ in range(num_draws)])


@pytest.mark.parametrize("name", ["kernel1", "kernel2", "kernel3"])
def test_drawn_kernels_have_the_official_distribution(name: str, parity: Load) -> None:
    ours = drawn(name, 2000)
    official = parity("degradation_kernels")[f"stats_{name}"][:, [0, 1, 2, 3, 5, 6, 7]]
    table = np.array([np.bincount(rows[:, 0].astype(int), minlength=len(TYPES)) for rows in (ours, official)])
    assert ((table[0] > 0) == (table[1] > 0)).all()
    assert p_value(chi2_contingency(table[:, table.sum(axis=0) > 0])) > 1e-3
    for i_type in np.flatnonzero(table[1]):
        if TYPES[i_type] == "pulse":
            continue
        mine, theirs = (rows[rows[:, 0] == i_type] for rows in (ours, official))
        assert set(mine[:, 1]) <= set(theirs[:, 1]), "a kernel size that official training never draws"
        is_sinc = TYPES[i_type] == "sinc"
        for column in (
            (1, 2, 3, 4, 5, 6) if is_sinc else (1, 2, 3, 4)
        ):  # abs_sum is 1 but for rounding where nothing is negative
            p = p_value(ks_2samp(mine[:, column], theirs[:, column]))
            assert p > 1e-3, f"{name} {TYPES[i_type]} column {column}: KS p = {p:.2g}"


def test_all_sizes_of_the_training_recipe_are_drawn_and_21_is_not() -> None:
    assert set(drawn("kernel1", 500)[:, 1]) == set(range(3, 20, 2))
    assert set(drawn("kernel2", 500)[:, 1]) == set(range(3, 14, 2))


def test_gaussian_parameters_fill_the_official_ranges() -> None:
    recipe, draws = realesrgan_x4(), Draws(philox("test", "ranges"))
    for kernel_recipe, sigma_max in ((recipe.kernel1, 3.0), (recipe.kernel2, 1.5)):
        specs = [
            spec
            for spec in (draw_kernel(draws, kernel_recipe) for _ in range(3000))
            if isinstance(spec, GaussianKernel)
        ]
        aniso = [spec for spec in specs if "aniso" in spec.type]
        for values, low, high in (
            ([spec.sigma_x for spec in specs], 0.2, sigma_max),
            ([spec.sigma_y for spec in aniso], 0.2, sigma_max),
            ([spec.theta for spec in aniso], -math.pi, math.pi),
            ([spec.beta for spec in specs if "generalized" in spec.type], 0.5, 4.0),
            ([spec.beta for spec in specs if "plateau" in spec.type], 1.0, 2.0),
        ):
            assert low <= min(values) < low + 0.05 * (high - low)
            assert high - 0.05 * (high - low) < max(values) <= high
        plateau_betas = [spec.beta for spec in specs if "plateau" in spec.type]
        assert np.mean(np.equal(plateau_betas, 1.0)) == pytest.approx(
            0.5, abs=0.1
        )  # half of the draws are U(1, 1)
        generalized_betas = np.array([spec.beta for spec in specs if "generalized" in spec.type])
        assert np.mean(generalized_betas < 1) == pytest.approx(0.5, abs=0.1)


def test_sinc_cutoff_depends_on_the_size() -> None:
    recipe, draws = realesrgan_x4().kernel1, Draws(philox("test", "sinc"))
    always_sinc = KernelRecipe(size=recipe.size, sigma=recipe.sigma, sinc_prob=1.0)
    specs = [draw_kernel(draws, always_sinc) for _ in range(2000)]
    small = [spec.omega for spec in specs if isinstance(spec, SincKernel) and spec.size < 13]
    large = [spec.omega for spec in specs if isinstance(spec, SincKernel) and spec.size >= 13]
    assert len(small) + len(large) == len(specs)
    assert math.pi / 3 <= min(small) < math.pi / 3 + 0.05
    assert math.pi / 5 <= min(large) < math.pi / 5 + 0.05
    assert max(*small, *large) <= math.pi


def test_test_recipe_draws_mild_plain_gaussians_or_sinc() -> None:
    recipe, draws = imagenet_test_x4(), Draws(philox("test", "mild"))
    specs = [draw_kernel(draws, recipe.kernel1) for _ in range(1000)]
    gaussians = [spec for spec in specs if isinstance(spec, GaussianKernel)]
    assert {spec.type for spec in specs} == {"iso", "aniso", "sinc"}
    assert {spec.size for spec in specs} == {3, 5, 7, 9, 11}
    assert 0.2 <= min(spec.sigma_x for spec in gaussians) <= max(spec.sigma_x for spec in gaussians) <= 0.8
    assert sum(spec.type == "iso" for spec in gaussians) / len(gaussians) == pytest.approx(0.6, abs=0.06)
    assert not any(isinstance(draw_kernel(draws, recipe.kernel2), SincKernel) for _ in range(200))


def test_blur_against_official_filter2d(parity: Load) -> None:
    arrays = parity("degradation_ops")
    for image, name, expected in zip(
        arrays["smooth"], ("gen_iso", "aniso"), arrays["filter2D"], strict=True
    ):  # the fixture's two kernels
        out = blur(np.ascontiguousarray(image.transpose(1, 2, 0)), FIXED[name])
        np.testing.assert_allclose(out.transpose(2, 0, 1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "size", [(24, 19), (150, 131)]
)  # sums by OpenCV whatever the taps, and products in Fourier space
@pytest.mark.parametrize("name", FIXED)
def test_blur_is_correlation_with_reflected_borders(name: str, size: tuple[int, int]) -> None:
    image = philox("test", "blur").random((*size, 3), dtype=np.float32)
    spec = FIXED[name]
    pad = spec.size // 2
    padded = np.pad(image.astype(np.float64), ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (spec.size, spec.size), axis=(0, 1))
    expected = np.einsum("hwcij,ij->hwc", windows, kernel(spec).astype(np.float64))
    np.testing.assert_allclose(blur(image, spec), expected, rtol=0, atol=3e-6)  # of float32


def test_pulse_changes_nothing() -> None:
    image = philox("test", "pulse").random((7, 9, 3), dtype=np.float32)
    np.testing.assert_array_equal(blur(image, PulseKernel()), image)
    assert kernel(PulseKernel(size=5)).tolist() == np.pad([[1.0]], 2).tolist()


def test_impossible_kernels_raise() -> None:
    with pytest.raises(ValueError, match="kernel size 4"):
        SincKernel(size=4, omega=1.0)
    with pytest.raises(ValueError, match=r"omega 3\.5"):
        SincKernel(size=5, omega=3.5)
    with pytest.raises(ValueError, match="must be equal"):
        GaussianKernel(type="iso", size=5, sigma_x=1.0, sigma_y=2.0)
    with pytest.raises(ValueError, match="must be above 0"):
        GaussianKernel(type="aniso", size=5, sigma_x=0.0, sigma_y=2.0)
    with pytest.raises(ValueError, match="must be 1"):
        GaussianKernel(type="aniso", size=5, sigma_x=1.0, sigma_y=2.0, beta=2.0)
