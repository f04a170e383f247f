"""The parameters of one sample as a record of fixed size, which a device reads.

`encode` turns the operations that were drawn into numbers; `decode` gives the columns of a batch of records.
The numbers are float64, so factors are exact, and travel as bytes beside the pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resshift import seeds
from resshift.degradation.apply import DegradationParams, Operation, resized_to
from resshift.degradation.jpeg import Jpeg
from resshift.degradation.kernels import Blur, GaussianKernel, GaussianType, PulseKernel, SincKernel
from resshift.degradation.noise import Noise, noise_stream
from resshift.degradation.recipe import ON_DEVICE, DegradationRecipe, camera_x4, imagenet_test_x4
from resshift.degradation.resize import InterpolationMode, Resize

MODES: tuple[InterpolationMode, ...] = get_args(InterpolationMode)
KERNELS: tuple[str, ...] = ("pulse", "sinc", *get_args(GaussianType))
PULSE = KERNELS.index("pulse")
NOISES = ("none", "gaussian", "poisson")


class KernelPlan(NamedTuple):
    """A blur kernel: columns (B,). `type` is an index of KERNELS."""

    type: Tensor
    size: Tensor
    sigma_x: Tensor
    sigma_y: Tensor
    theta: Tensor
    beta: Tensor
    omega: Tensor


class NoisePlan(NamedTuple):
    """Noise: columns (B,). `kind` is an index of NOISES; `word0` to `word3` are the key of its stream, 32
    bits each, the lowest first.
    """

    kind: Tensor
    level: Tensor
    gray: Tensor
    correlated: Tensor
    word0: Tensor
    word1: Tensor
    word2: Tensor
    word3: Tensor


class Plan(NamedTuple):
    """Parameters of a batch: columns (B,) float64.

    Fields:
        chain: 1 for the real-world chain, 0 for bicubic alone.
        size1, size2: Sides after the two resizes, in pixels; without a second order they are equal.
        mode1, mode2, mode3: Interpolation of the two and of the one to the final size, indices of MODES.
        quality1, quality2: Qualities of the two JPEGs.
        jpeg_last: Whether the second JPEG comes after the last filter.
    """

    chain: Tensor
    size1: Tensor
    mode1: Tensor
    quality1: Tensor
    size2: Tensor
    mode2: Tensor
    mode3: Tensor
    quality2: Tensor
    jpeg_last: Tensor
    kernel1: KernelPlan
    kernel2: KernelPlan
    kernel3: KernelPlan
    noise1: NoisePlan
    noise2: NoisePlan
    noise3: NoisePlan


_NUM_SCALARS = len(Plan._fields) - 6
_NUM_KERNEL, _NUM_NOISE = len(KernelPlan._fields), len(NoisePlan._fields)
PLAN_BYTES = 8 * (_NUM_SCALARS + 3 * _NUM_KERNEL + 3 * _NUM_NOISE)
_PULSE = (0.0,) * _NUM_KERNEL
_SILENCE = (0.0,) * _NUM_NOISE


def encode(params: DegradationParams, side_px: int) -> NDArray[np.uint8]:
    """Return the record of a sample, (PLAN_BYTES,) uint8.

    Args:
        params: What was drawn from a recipe of a kind in `ON_DEVICE`.
        side_px: Side of the clean picture, which is a square.

    Raises:
        ValueError: The operations are not those of such a recipe.
    """
    ops, noise3 = _without_noise3(params.ops)
    match ops:
        case (Resize(mode="matlab_bicubic"),):
            head = (0.0, side_px, 0.0, 75.0, side_px, 0.0, 0.0, 75.0, 0.0)
            numbers = (*head, *_PULSE * 3, *_SILENCE * 2, *_noise(noise3))
        case (Blur() as blur1, Resize() as resize1, Noise() as noise1, Jpeg() as jpeg1, *second, a, b, c):
            resize3, blur3, jpeg2 = _last(params, (a, b, c))
            blur2, resize2, noise2 = _second(params, second)
            size1 = resized_to(resize1, side_px, params.scale)
            size2 = size1 if resize2 is None else resized_to(resize2, side_px, params.scale)
            numbers = (
                1.0,
                size1,
                MODES.index(_mode(resize1)),
                jpeg1.quality,
                size2,
                0.0 if resize2 is None else MODES.index(_mode(resize2)),
                MODES.index(_mode(resize3)),
                jpeg2.quality,
                float(c is jpeg2),
                *_kernel(blur1),
                *(_PULSE if blur2 is None else _kernel(blur2)),
                *_kernel(blur3),
                *_noise(noise1),
                *_noise(noise2),
                *_noise(noise3),
            )
        case _:
            raise _unknown(params)
    return np.array(numbers, np.float64).view(np.uint8)


def _unknown(params: DegradationParams) -> ValueError:
    names = ", ".join(op.op for op in params.ops)
    return ValueError(
        f"operations ({names}): a device applies those of recipes of kind {' or '.join(ON_DEVICE)}"
    )


def _without_noise3(ops: Sequence[Operation]) -> tuple[Sequence[Operation], Noise | None]:
    """Take the noise out that follows the last filter, or bicubic."""
    match ops:
        case (*others, (Blur() | Resize(mode="matlab_bicubic")) as before, Noise() as noise3):
            return (*others, before), noise3
        case (*others, Blur() as before, Noise() as noise3, Jpeg() as jpeg):
            return (*others, before, jpeg), noise3
        case _:
            return ops, None


def _last(params: DegradationParams, ops: Sequence[Operation]) -> tuple[Resize, Blur, Jpeg]:
    match ops:
        case (Resize() as resize, Blur() as blur, Jpeg() as jpeg):
            return resize, blur, jpeg
        case (Jpeg() as jpeg, Resize() as resize, Blur() as blur):
            return resize, blur, jpeg
        case _:
            raise _unknown(params)


def _second(
    params: DegradationParams, ops: Sequence[Operation]
) -> tuple[Blur | None, Resize | None, Noise | None]:
    match ops:
        case ():
            return None, None, None
        case (Resize() as resize, Noise() as noise):
            return None, resize, noise
        case (Blur() as blur, Resize() as resize, Noise() as noise):
            return blur, resize, noise
        case _:
            raise _unknown(params)


def _mode(op: Resize) -> InterpolationMode:
    if op.mode == "matlab_bicubic":
        raise ValueError("matlab_bicubic: a device applies it alone, not within the chain")
    return op.mode


def _kernel(op: Blur) -> tuple[float, ...]:
    spec = op.kernel
    index = float(KERNELS.index(spec.type))
    match spec:
        case PulseKernel():
            return _PULSE
        case SincKernel():
            return (index, spec.size, 0.0, 0.0, 0.0, 0.0, spec.omega)
        case GaussianKernel():
            return (index, spec.size, spec.sigma_x, spec.sigma_y, spec.theta, spec.beta, 0.0)


def _noise(op: Noise | None) -> tuple[float, ...]:
    if op is None:
        return _SILENCE
    key = seeds.derive(*noise_stream(op.seed))
    words = (float(key >> 32 * i & 0xFFFFFFFF) for i in range(4))
    return (float(NOISES.index(op.kind)), op.level, float(op.gray), float(op.correlated), *words)


def decode(records: Tensor) -> Plan:
    """Return the columns of records, (B, PLAN_BYTES) uint8; nothing is copied."""
    columns = iter(records.view(torch.float64).unbind(1))
    scalars = list(islice(columns, _NUM_SCALARS))
    kernels = [KernelPlan._make(islice(columns, _NUM_KERNEL)) for _ in range(3)]
    noises = [NoisePlan._make(islice(columns, _NUM_NOISE)) for _ in range(3)]
    return Plan._make([*scalars, *kernels, *noises])


class Bounds(NamedTuple):
    """The largest numbers that a recipe gives.

    Fields:
        side_px: Side of a picture on its way from the clean to the low-quality one.
        kernels: Sides of the three kernels.
    """

    side_px: int
    kernels: tuple[int, int, int]

    @classmethod
    def of(cls, recipe: DegradationRecipe, side_px: int) -> Bounds:
        """Return the bounds of a recipe for clean pictures of this side."""
        others = ((recipe.mild_share, imagenet_test_x4()), (recipe.camera_share, camera_x4()))
        recipes = [recipe, *(other for share, other in others if share)]
        sides = [side_px, *(int(side_px * one.resize1.factor[1]) for one in recipes)]
        sides += [int(side_px // recipe.scale * one.resize2.factor[1]) for one in recipes]
        return cls(
            max(sides),
            (
                max(one.kernel1.size[1] for one in recipes),
                max(one.kernel2.size[1] for one in recipes),
                max(one.final_sinc_size[1] for one in recipes),
            ),
        )
