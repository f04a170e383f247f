"""Draw the degradation parameters of one sample from a recipe."""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from resshift.degradation.apply import BICUBIC, DegradationParams, Gray, Operation
from resshift.degradation.jpeg import Jpeg
from resshift.degradation.kernels import Blur, GaussianKernel, GaussianType, PulseKernel, SincKernel
from resshift.degradation.masks import draw_mask
from resshift.degradation.noise import Noise
from resshift.degradation.ranges import Draws, IntRange
from resshift.degradation.recipe import (
    NOISE3,
    DegradationRecipe,
    FaceRecipe,
    KernelRecipe,
    NoiseRecipe,
    ResizeRecipe,
    camera_x4,
    imagenet_test_x4,
)
from resshift.degradation.resize import InterpolationMode, Resize

_KERNEL_TYPES: tuple[GaussianType, ...] = get_args(GaussianType)
_MODES: tuple[InterpolationMode, ...] = get_args(InterpolationMode)
_MILD, _CAMERA = imagenet_test_x4(), camera_x4()
_SEED_BITS = 53  # integers of 53 bits are exact in every JSON reader


def draw_kernel(draws: Draws, recipe: KernelRecipe) -> GaussianKernel | SincKernel:
    """Draw a blur kernel of the first or second stage."""
    size = draws.integer(recipe.size, step=2)
    if draws.chance(recipe.sinc_prob):
        small = size < recipe.sinc_large_size
        return SincKernel(
            size=size, omega=draws.uniform(recipe.sinc_omega_small if small else recipe.sinc_omega_large)
        )
    kernel_type = _KERNEL_TYPES[draws.index(recipe.type_probs)]
    sigma_x = sigma_y = draws.uniform(recipe.sigma)
    theta, beta = 0.0, 1.0
    if kernel_type in ("aniso", "generalized_aniso", "plateau_aniso"):
        sigma_y = draws.uniform(recipe.sigma)
        theta = draws.uniform((-math.pi, math.pi))
    if kernel_type in ("generalized_iso", "generalized_aniso"):
        beta = draws.around_one(recipe.beta_generalized)
    elif kernel_type in ("plateau_iso", "plateau_aniso"):
        beta = draws.around_one(recipe.beta_plateau)
    return GaussianKernel(
        type=kernel_type, size=size, sigma_x=sigma_x, sigma_y=sigma_y, theta=theta, beta=beta
    )


def draw_final_kernel(draws: Draws, recipe: DegradationRecipe) -> SincKernel | PulseKernel:
    """Draw the filter of the final stage."""
    if draws.chance(recipe.final_sinc_prob):
        return SincKernel(
            size=draws.integer(recipe.final_sinc_size, step=2), omega=draws.uniform(recipe.final_sinc_omega)
        )
    return PulseKernel()


def _draw_mode(draws: Draws) -> InterpolationMode:
    return _MODES[draws.integer((0, len(_MODES) - 1))]


def _draw_resize(draws: Draws, recipe: ResizeRecipe, of: Literal["hq", "lq"]) -> Resize:
    up, down = (1.0, recipe.factor[1]), (recipe.factor[0], 1.0)
    interval = (up, down, (1.0, 1.0))[draws.index(recipe.probs)]
    return Resize(of=of, factor=draws.uniform(interval), mode=_draw_mode(draws))


def _draw_seed(draws: Draws) -> int:
    return int(draws.unit() * 2**_SEED_BITS)


def _draw_noise(draws: Draws, recipe: NoiseRecipe) -> Noise:
    gaussian = draws.chance(recipe.gaussian_prob)
    return Noise(
        kind="gaussian" if gaussian else "poisson",
        level=draws.uniform(recipe.gaussian_sigma if gaussian else recipe.poisson_scale),
        gray=draws.chance(recipe.gray_prob),
        # Not drawn for official recipes, whose samples stay as they were.
        correlated=recipe.correlated_prob > 0 and draws.chance(recipe.correlated_prob),
        seed=_draw_seed(draws),
    )


def _draw_jpeg(draws: Draws, quality: IntRange) -> Jpeg:
    return Jpeg(quality=draws.integer(quality))


def _draw_realesrgan(draws: Draws, recipe: DegradationRecipe) -> tuple[Operation, ...]:
    ops: list[Operation] = [
        Blur(kernel=draw_kernel(draws, recipe.kernel1)),
        _draw_resize(draws, recipe.resize1, "hq"),
        _draw_noise(draws, recipe.noise1),
        _draw_jpeg(draws, recipe.jpeg1_quality),
    ]
    if draws.chance(recipe.second_order_prob):
        if draws.chance(recipe.blur2_prob):
            ops.append(Blur(kernel=draw_kernel(draws, recipe.kernel2)))
        ops += [_draw_resize(draws, recipe.resize2, "lq"), _draw_noise(draws, recipe.noise2)]
    shrink: list[Operation] = [
        Resize(of="lq", factor=1.0, mode=_draw_mode(draws)),
        Blur(kernel=draw_final_kernel(draws, recipe)),
    ]
    jpeg2 = _draw_jpeg(draws, recipe.jpeg2_quality)
    ops += [*shrink, jpeg2] if draws.chance(recipe.jpeg_last_prob) else [jpeg2, *shrink]
    return tuple(ops)


def _draw_face(draws: Draws, recipe: FaceRecipe) -> tuple[Operation, ...]:
    ops: list[Operation] = [
        Blur(kernel=draw_kernel(draws, recipe.kernel)),
        Resize(of="hq", factor=1 / draws.uniform(recipe.shrink), mode="bilinear"),
        Noise(kind="gaussian", level=draws.uniform(recipe.noise_sigma), gray=False, seed=_draw_seed(draws)),
        _draw_jpeg(draws, recipe.jpeg_quality),
        Resize(of="lq", factor=1.0, mode="bilinear"),
    ]
    return (*ops, Gray()) if draws.chance(recipe.gray_prob) else tuple(ops)


def draw(rng: np.random.Generator, recipe: DegradationRecipe) -> DegradationParams:
    """Draw the degradation of one sample.

    Args:
        rng: Generator of the sample, from `resshift.seeds.philox(run_seed, "degrade", epoch, key)`.
        recipe: Ranges and probabilities to draw from.

    Returns:
        Parameters for `degrade`, which is not random.
    """
    draws = Draws(rng)
    # Drawn even if all shares are 0. Bicubic is counted from the lower end of [0, 1), mild and then camera
    # from the upper, so changing the share of bicubic or of camera changes only the samples that it adds or
    # removes.
    kind = draws.unit()
    ops: tuple[Operation, ...]
    if recipe.kind == "bicubic" or kind < recipe.bicubic_share:
        ops = (BICUBIC,)
    elif recipe.kind == "face":
        ops = _draw_face(draws, recipe.face)
    elif recipe.kind == "inpainting":
        ops = (draw_mask(draws, recipe.mask),)
    else:
        is_mild = kind >= 1 - recipe.mild_share
        is_camera = kind >= 1 - recipe.mild_share - recipe.camera_share
        ops = _draw_realesrgan(draws, _MILD if is_mild else _CAMERA if is_camera else recipe)
    # Drawn last, so that the share changes nothing else.
    if recipe.noise3_prob and draws.chance(recipe.noise3_prob):
        noise3 = _draw_noise(draws, NOISE3)
        ops = (*ops[:-1], noise3, ops[-1]) if isinstance(ops[-1], Jpeg) else (*ops, noise3)
    return DegradationParams(scale=recipe.scale, ops=ops)
