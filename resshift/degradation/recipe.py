"""Degradation recipes (ranges and probabilities) and the draw of one sample's parameters.

The real-world chain is the "high-order" model of Wang et al., "Real-ESRGAN", ICCVW 2021, with the numbers of the official ResShift
configurations, which differ from Real-ESRGAN's own (smaller kernels, a second order only half of the time, weaker noise):

    blur 1, resize 1, noise 1, JPEG 1                              always
    blur 2 (sometimes), resize 2, noise 2                          with probability `second_order_prob`
    resize to H / scale, sinc or nothing, JPEG 2                   always; JPEG first or last with equal chances

Deviation from official code: there scales, modes and branches are drawn once per batch; here everything is drawn per sample, from one
generator per sample, so a sample does not depend on its batch. JPEG qualities are integers, as the real codec needs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from resshift.degradation.apply import DegradationParams, Operation
from resshift.degradation.jpeg import Jpeg
from resshift.degradation.kernels import Blur, GaussianKernel, GaussianType, PulseKernel, SincKernel
from resshift.degradation.noise import Noise
from resshift.degradation.resize import InterpolationMode, Resize

Range = tuple[float, float]
IntRange = tuple[int, int]

_RECORD = ConfigDict(extra="forbid", allow_inf_nan=False)
_KERNEL_TYPES: tuple[GaussianType, ...] = get_args(GaussianType)
_MODES: tuple[InterpolationMode, ...] = get_args(InterpolationMode)


def _check_prob(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} = {value}: must be a probability in [0, 1]")


def _check_probs(name: str, values: tuple[float, ...]) -> None:
    if min(values) < 0 or abs(sum(values) - 1) > 1e-6:
        raise ValueError(f"{name} = {values}: must be probabilities that sum to 1")


def _check_range(name: str, value: tuple[float, float], low: float, high: float = math.inf) -> None:
    if not low <= value[0] <= value[1] <= high:
        raise ValueError(f"{name} = {value}: must be (low, high) with {low} <= low <= high <= {high}")


def _check_sizes(name: str, value: IntRange) -> None:
    _check_range(name, value, 1)
    if value[0] % 2 == 0 or value[1] % 2 == 0:
        raise ValueError(f"{name} = {value}: both kernel sizes must be odd")


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class KernelRecipe:
    """How a blur kernel is drawn: a sinc filter with `sinc_prob`, else one of the six Gaussian kinds.

    Args:
        size: (smallest, largest) side, both odd, both drawn.
        type_probs: probabilities of iso, aniso, generalized_iso, generalized_aniso, plateau_iso, plateau_aniso.
        sigma: standard deviation along each axis, in pixels. The angle is uniform in [-pi, pi].
        beta_generalized, beta_plateau: shape; half of the draws come from [low, 1] and half from [1, high].
        sinc_omega_small, sinc_omega_large: cut-off below `sinc_large_size` pixels and from there on.
    """

    size: IntRange
    type_probs: tuple[float, float, float, float, float, float] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sigma: Range
    beta_generalized: Range = (0.5, 4.0)
    beta_plateau: Range = (1.0, 2.0)
    sinc_prob: float = 0.1
    sinc_omega_small: Range = (math.pi / 3, math.pi)
    sinc_omega_large: Range = (math.pi / 5, math.pi)
    sinc_large_size: int = 13

    def __post_init__(self) -> None:
        _check_sizes("size", self.size)
        _check_probs("type_probs", self.type_probs)
        _check_range("sigma", self.sigma, 1e-3)
        for name, beta in (("beta_generalized", self.beta_generalized), ("beta_plateau", self.beta_plateau)):
            if not 0 < beta[0] <= 1 <= beta[1]:
                raise ValueError(f"{name} = {beta}: must be (low, high) with 0 < low <= 1 <= high")
        _check_prob("sinc_prob", self.sinc_prob)
        _check_range("sinc_omega_small", self.sinc_omega_small, 1e-3, math.pi)
        _check_range("sinc_omega_large", self.sinc_omega_large, 1e-3, math.pi)


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class ResizeRecipe:
    """How a random resize is drawn: up by U(1, high), down by U(low, 1) or not at all; the mode is uniform of three.

    Args:
        probs: probabilities of up, down, keep.
        factor: (low, high) with low <= 1 <= high.
    """

    probs: tuple[float, float, float]
    factor: Range

    def __post_init__(self) -> None:
        _check_probs("probs", self.probs)
        if not 0 < self.factor[0] <= 1 <= self.factor[1]:
            raise ValueError(f"factor = {self.factor}: must be (low, high) with 0 < low <= 1 <= high")


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class NoiseRecipe:
    """How noise is drawn: Gaussian with `gaussian_prob` (sigma in 8-bit levels), else Poisson; grey with `gray_prob`."""

    gaussian_prob: float = 0.5
    gaussian_sigma: Range
    poisson_scale: Range
    gray_prob: float = 0.4

    def __post_init__(self) -> None:
        _check_prob("gaussian_prob", self.gaussian_prob)
        _check_prob("gray_prob", self.gray_prob)
        _check_range("gaussian_sigma", self.gaussian_sigma, 0)
        _check_range("poisson_scale", self.poisson_scale, 0)


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class DegradationRecipe:
    """All ranges and probabilities of a degradation. The defaults are those of official ResShift training.

    Args:
        kind: "realesrgan" is the chain of the module docstring; "bicubic" is MATLAB's imresize alone, and ignores the rest.
        scale: side of the clean picture over side of the low-quality one.
        bicubic_share: probability that a sample takes plain bicubic instead of the chain (mixed training); 0 in official recipes.
        final_sinc_prob, final_sinc_size, final_sinc_omega: the last filter; without it nothing is filtered.
        jpeg_last_prob: probability of (resize, sinc, JPEG); otherwise (JPEG, resize, sinc).
        jpeg1_quality, jpeg2_quality: (lowest, highest), both drawn.
    """

    kind: Literal["realesrgan", "bicubic"]
    scale: int
    bicubic_share: float = 0.0
    # Official configurations name the maxima 21 and 15, but sizes come from range(3, 21, 2) and range(3, 15, 2), which exclude the end.
    kernel1: KernelRecipe = KernelRecipe(size=(3, 19), sigma=(0.2, 3.0))
    resize1: ResizeRecipe = ResizeRecipe(probs=(0.2, 0.7, 0.1), factor=(0.15, 1.5))
    noise1: NoiseRecipe = NoiseRecipe(gaussian_sigma=(1.0, 30.0), poisson_scale=(0.05, 3.0))
    jpeg1_quality: IntRange = (30, 95)
    second_order_prob: float = 0.5
    blur2_prob: float = 0.8
    kernel2: KernelRecipe = KernelRecipe(size=(3, 13), sigma=(0.2, 1.5))
    resize2: ResizeRecipe = ResizeRecipe(probs=(0.3, 0.4, 0.3), factor=(0.3, 1.2))
    noise2: NoiseRecipe = NoiseRecipe(gaussian_sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5))
    final_sinc_prob: float = 0.8
    final_sinc_size: IntRange = (3, 13)
    final_sinc_omega: Range = (math.pi / 3, math.pi)
    jpeg_last_prob: float = 0.5
    jpeg2_quality: IntRange = (30, 95)

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"scale = {self.scale}: must be at least 1")
        for name in ("bicubic_share", "second_order_prob", "blur2_prob", "final_sinc_prob", "jpeg_last_prob"):
            _check_prob(name, getattr(self, name))
        _check_sizes("final_sinc_size", self.final_sinc_size)
        _check_range("final_sinc_omega", self.final_sinc_omega, 1e-3, math.pi)
        _check_range("jpeg1_quality", self.jpeg1_quality, 1, 100)
        _check_range("jpeg2_quality", self.jpeg2_quality, 1, 100)


def realesrgan_x4() -> DegradationRecipe:
    """Training degradation of realsr-x4 (all official versions)."""
    return DegradationRecipe(kind="realesrgan", scale=4)


def realesrgan_x2() -> DegradationRecipe:
    """Training degradation of realsr-x2: as x4 but for the scale."""
    return replace(realesrgan_x4(), scale=2)


def imagenet_test_x4() -> DegradationRecipe:
    """Degradation of the ImageNet-Test pairs (official degradation_testing_realesrgan.yaml): mild, first order only."""
    kernel = KernelRecipe(
        size=(3, 11),  # the file says 13, excluded as in training
        type_probs=(0.6, 0.4, 0.0, 0.0, 0.0, 0.0),
        sigma=(0.2, 0.8),
        beta_generalized=(1.0, 1.5),
        beta_plateau=(1.0, 1.2),
    )
    return DegradationRecipe(
        kind="realesrgan",
        scale=4,
        kernel1=kernel,
        resize1=ResizeRecipe(probs=(0.2, 0.7, 0.1), factor=(0.5, 1.5)),
        noise1=NoiseRecipe(gaussian_sigma=(1.0, 15.0), poisson_scale=(0.05, 0.3)),
        jpeg1_quality=(70, 95),
        second_order_prob=0.0,
        blur2_prob=0.2,
        kernel2=replace(kernel, size=(3, 5), sigma=(0.2, 0.5), sinc_prob=0.0),
        final_sinc_prob=0.2,
        final_sinc_size=(3, 5),
        jpeg2_quality=(80, 100),
    )


def bicubic_x4() -> DegradationRecipe:
    """MATLAB bicubic alone. Official training keeps it in float; here it is clipped and rounded to 8 bits, as its test sets are."""
    return DegradationRecipe(kind="bicubic", scale=4)


def _odd(rng: np.random.Generator, sizes: IntRange) -> int:
    return sizes[0] + 2 * int(rng.integers((sizes[1] - sizes[0]) // 2, endpoint=True))


def _uniform(rng: np.random.Generator, interval: Range) -> float:
    return float(rng.uniform(interval[0], interval[1]))


def _around_one(rng: np.random.Generator, interval: Range) -> float:
    """Half of the draws below 1, half above: a plain uniform draw of (0.5, 4) would hardly ever be below."""
    return _uniform(rng, (interval[0], 1.0) if rng.random() < 0.5 else (1.0, interval[1]))


def draw_kernel(rng: np.random.Generator, recipe: KernelRecipe) -> GaussianKernel | SincKernel:
    """Draw a blur kernel of the first or second stage."""
    size = _odd(rng, recipe.size)
    if rng.random() < recipe.sinc_prob:
        small = size < recipe.sinc_large_size
        return SincKernel(size=size, omega=_uniform(rng, recipe.sinc_omega_small if small else recipe.sinc_omega_large))
    kernel_type = _KERNEL_TYPES[int(rng.choice(len(_KERNEL_TYPES), p=recipe.type_probs))]
    sigma_x = sigma_y = _uniform(rng, recipe.sigma)
    theta, beta = 0.0, 1.0
    if kernel_type in ("aniso", "generalized_aniso", "plateau_aniso"):
        sigma_y = _uniform(rng, recipe.sigma)
        theta = _uniform(rng, (-math.pi, math.pi))
    if kernel_type in ("generalized_iso", "generalized_aniso"):
        beta = _around_one(rng, recipe.beta_generalized)
    elif kernel_type in ("plateau_iso", "plateau_aniso"):
        beta = _around_one(rng, recipe.beta_plateau)
    return GaussianKernel(type=kernel_type, size=size, sigma_x=sigma_x, sigma_y=sigma_y, theta=theta, beta=beta)


def draw_final_kernel(rng: np.random.Generator, recipe: DegradationRecipe) -> SincKernel | PulseKernel:
    """Draw the filter of the final stage."""
    if rng.random() < recipe.final_sinc_prob:
        return SincKernel(size=_odd(rng, recipe.final_sinc_size), omega=_uniform(rng, recipe.final_sinc_omega))
    return PulseKernel()


def _draw_mode(rng: np.random.Generator) -> InterpolationMode:
    return _MODES[int(rng.integers(len(_MODES)))]


def _draw_resize(rng: np.random.Generator, recipe: ResizeRecipe, of: Literal["hq", "lq"]) -> Resize:
    direction = int(rng.choice(3, p=recipe.probs))
    factor = (_uniform(rng, (1.0, recipe.factor[1])), _uniform(rng, (recipe.factor[0], 1.0)), 1.0)[direction]
    return Resize(of=of, factor=factor, mode=_draw_mode(rng))


def _draw_noise(rng: np.random.Generator, recipe: NoiseRecipe) -> Noise:
    gaussian = bool(rng.random() < recipe.gaussian_prob)
    return Noise(
        kind="gaussian" if gaussian else "poisson",
        level=_uniform(rng, recipe.gaussian_sigma if gaussian else recipe.poisson_scale),
        gray=bool(rng.random() < recipe.gray_prob),
        seed=int(rng.integers(2**53)),  # any JSON reader keeps 53 bits
    )


def _draw_jpeg(rng: np.random.Generator, quality: IntRange) -> Jpeg:
    return Jpeg(quality=int(rng.integers(quality[0], quality[1], endpoint=True)))


def _draw_chain(rng: np.random.Generator, recipe: DegradationRecipe) -> tuple[Operation, ...]:
    ops: list[Operation] = [
        Blur(kernel=draw_kernel(rng, recipe.kernel1)),
        _draw_resize(rng, recipe.resize1, "hq"),
        _draw_noise(rng, recipe.noise1),
        _draw_jpeg(rng, recipe.jpeg1_quality),
    ]
    if rng.random() < recipe.second_order_prob:
        if rng.random() < recipe.blur2_prob:
            ops.append(Blur(kernel=draw_kernel(rng, recipe.kernel2)))
        ops += [_draw_resize(rng, recipe.resize2, "lq"), _draw_noise(rng, recipe.noise2)]
    shrink: list[Operation] = [Resize(of="lq", factor=1.0, mode=_draw_mode(rng)), Blur(kernel=draw_final_kernel(rng, recipe))]
    jpeg2 = _draw_jpeg(rng, recipe.jpeg2_quality)
    ops += [*shrink, jpeg2] if rng.random() < recipe.jpeg_last_prob else [jpeg2, *shrink]
    return tuple(ops)


def draw(rng: np.random.Generator, recipe: DegradationRecipe) -> DegradationParams:
    """Draw the degradation of one sample.

    Args:
        rng: the sample's own generator, from `resshift.seeds.philox(run_seed, "degrade", epoch, key)`.
        recipe: what to draw from.

    Returns:
        Parameters for `degrade`, which draws nothing further.
    """
    plain = rng.random() < recipe.bicubic_share  # drawn even when the share is 0: changing the share leaves the other samples as they were
    if recipe.kind == "bicubic" or plain:
        return DegradationParams(scale=recipe.scale, ops=(Resize(of="lq", factor=1.0, mode="matlab_bicubic"),))
    return DegradationParams(scale=recipe.scale, ops=_draw_chain(rng, recipe))
