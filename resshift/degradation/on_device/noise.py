"""Noise with another law for each sample, from the streams and tables of `resshift.degradation.noise`: for
equal pictures the noise is that of the CPU, number for number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resshift.degradation.noise import LUMA, POISSON_BITS, poisson_table
from resshift.degradation.on_device.canvas import chosen, inside, steps, taken, to_levels
from resshift.degradation.on_device.philox import random_u16
from resshift.degradation.on_device.plan import NOISES, NoisePlan

_RED, _GREEN, _BLUE = LUMA[0].tolist()
_NONE, _GAUSSIAN = NOISES.index("none"), NOISES.index("gaussian")
_MOST_BITS = 8  # of the number of photons


def poisson_tables() -> NDArray[np.float32]:
    """Return the tables of 1, 2, 4, ..., 256 photons, (9, 256, 4096) float32."""
    return np.stack([poisson_table(1 << bits) for bits in range(_MOST_BITS + 1)])


def random_levels(plans: Sequence[NoisePlan], side: int) -> tuple[Tensor, ...]:
    """Return the random numbers of each noise for pictures of up to this side, (B, 3 side^2) int32 each."""
    words = torch.stack([torch.stack(plan[-4:]) for plan in plans], dim=1).long()  # (4, num, B)
    keys = (words[0::2] | (words[1::2] << 32)).flatten(1)
    return random_u16(keys, 3 * side * side).chunk(len(plans))


def add_noise(
    canvas: Tensor, sides: Tensor, plan: NoisePlan, random: Tensor, normal: Tensor, poisson: Tensor
) -> Tensor:
    """Return the pictures with noise, clipped to [0, 1]; one without noise is not changed.

    Args:
        canvas: Canvases, (B, 3, S, S) float32.
        sides: Sides of the pictures.
        plan: What to add.
        random: Random numbers, from `random_levels`.
        normal, poisson: `resshift.degradation.noise.normal_table` and `poisson_tables`.
    """
    side = canvas.shape[3]
    is_grey = (plan.gray > 0)[:, None, None, None]
    uniform = _of_pixels(random, sides, is_grey, side)
    gaussian = normal[uniform] * (plan.level / 255).float()[:, None, None, None]
    r, g, b = canvas.split(1, dim=1)
    luma = _RED * r + _GREEN * g + _BLUE * b
    source = to_levels(torch.where(is_grey, luma, canvas)).long()
    photon_bits = _photon_bits(torch.where(inside(sides, side), source, 256))
    index = (photon_bits[:, None, None, None] * 256 + source << POISSON_BITS) + (
        uniform >> (16 - POISSON_BITS)
    )
    deviation = poisson.view(-1)[index] * plan.level.float()[:, None, None, None]
    deviation = chosen(plan.kind == _GAUSSIAN, gaussian, deviation)
    deviation = chosen(plan.correlated > 0, _correlated(deviation, sides), deviation)
    noisy = (canvas + deviation).clamp(0, 1)
    return chosen(plan.kind == _NONE, canvas, noisy)


def _correlated(deviation: Tensor, sides: Tensor) -> Tensor:
    side = deviation.shape[3]
    padded = taken(deviation, steps(-1, side + 1, sides).remainder(sides[:, None]))
    middle = slice(1, side + 1)
    neighbours = padded[..., :side, middle] + padded[..., 2:, middle]
    neighbours = neighbours + padded[..., middle, :side] + padded[..., middle, 2:]
    return (deviation + 0.5 * neighbours) * math.sqrt(0.5)


def _of_pixels(random: Tensor, sides: Tensor, is_grey: Tensor, side: int) -> Tensor:
    """Return the random numbers of all pixels and channels, (B, 3, side, side) int32: row by row, channels
    last, one number for a pixel of grey noise.
    """
    along = steps(0, side, sides).minimum(sides[:, None] - 1)
    pixel = along[:, None, :, None] * sides[:, None, None, None] + along[:, None, None, :]
    channel = torch.arange(3, device=sides.device)[:, None, None]
    index = torch.where(is_grey, pixel, 3 * pixel + channel)
    return random.gather(1, index.flatten(1)).view(index.shape)


def _photon_bits(levels: Tensor) -> Tensor:
    """Return ceil(log2(number of levels)), (B,) int64. Level 256 is none."""
    flat = levels.flatten(1)
    seen = torch.zeros(len(flat), 257, dtype=torch.bool, device=flat.device)
    count = seen.scatter(1, flat, True)[:, :256].sum(dim=1)
    powers = 2 ** torch.arange(_MOST_BITS, device=flat.device)
    return (count[:, None] > powers).sum(dim=1)
