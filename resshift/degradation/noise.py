"""Gaussian and Poisson noise of the Real-ESRGAN degradation, in colour or grey.

    Gaussian   x + (sigma / 255) n,                    n ~ N(0, 1)
    Poisson    x + scale (Poisson(v u) / v - u),       u = x rounded to 8 bits,
                                                       v = 2^ceil(log2(number of levels in u))

v is the number of photons of white: a picture with few levels is treated as one taken with few photons. Grey
noise is one plane added to all three channels; grey Poisson noise takes u from the luma of the picture.
Correlated noise is that of a camera, which computes each colour of a pixel from its neighbours:

    d'(y, x) = (d(y, x) + (d(y - 1, x) + d(y + 1, x) + d(y, x - 1) + d(y, x + 1)) / 2) / sqrt(2),

where d is the noise as above, continued periodically. Its variance stays, and neighbours have a correlation
of 1/2. The result is clipped to [0, 1].

Both distributions are inverted with tables of quantiles, which takes a fifth of the time of NumPy's samplers:
a value is the quantile of one of 65 536 (Gaussian) or 4096 (Poisson, for each of the 256 values of u) equally
likely intervals.

Reference: Wang et al., "Real-ESRGAN", ICCVW 2021 (noise); the choice of v follows the official ResShift
configuration's implementation.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from resshift.degradation.jpeg import to_u8
from resshift.seeds import Part, philox

# Rec. 601 luma, rounded as in torchvision's rgb_to_grayscale, which the official code uses.
LUMA = np.array([[0.2989, 0.587, 0.114]], dtype=np.float32)
POISSON_BITS = 12
_FEW_PIXELS = 1 << 14


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Noise:
    """One operation of a degradation: additive noise.

    Fields:
        kind: Distribution of the noise.
        level: Sigma in 8-bit levels for Gaussian noise, the factor `scale` for Poisson noise.
        gray: Whether all channels have the same noise.
        correlated: Whether neighbouring pixels share part of their noise.
        seed: Seed of the noise, which makes `degrade` a pure function.
    """

    op: Literal["noise"] = "noise"
    kind: Literal["gaussian", "poisson"]
    level: float
    gray: bool
    correlated: bool = False
    seed: int

    def __post_init__(self) -> None:
        if self.level < 0:
            raise ValueError(f"noise level {self.level}: must be at least 0")


def noise_stream(seed: int) -> tuple[Part, ...]:
    """Return the name of the stream of random numbers of a noise."""
    return ("degradation-noise", seed)


def add_noise(image: NDArray[np.float32], noise: Noise) -> NDArray[np.float32]:
    """Return the picture with noise added, (H, W, 3) float32 clipped to [0, 1]."""
    rng = philox(*noise_stream(noise.seed))
    if noise.kind == "gaussian":
        uniform_u16 = _random_u16(rng, image.shape[: 2 if noise.gray else 3])
        deviation = np.asarray(cv2.LUT(uniform_u16, normal_table()), dtype=np.float32).reshape(
            uniform_u16.shape
        )
        deviation *= np.float32(noise.level / 255)
    else:
        source = np.asarray(cv2.transform(image, LUMA), dtype=np.float32) if noise.gray else image
        deviation = _poisson_deviation(source, rng)
        deviation *= np.float32(noise.level)
    if noise.correlated:
        deviation = _correlated(deviation)
    if noise.gray:
        deviation = np.asarray(cv2.cvtColor(deviation, cv2.COLOR_GRAY2RGB), dtype=np.float32)
    deviation += image
    return np.clip(deviation, 0, 1, out=deviation)


def _correlated(deviation: NDArray[np.float32]) -> NDArray[np.float32]:
    neighbours = sum(np.roll(deviation, by, axis) for axis in (0, 1) for by in (1, -1))
    return (deviation + np.float32(0.5) * neighbours) * np.float32(math.sqrt(0.5))


def _random_u16(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.uint16]:
    size = math.prod(shape)
    return rng.bit_generator.random_raw(-(-size // 4)).view(np.uint16)[:size].reshape(shape)


def _poisson_deviation(plane: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return Poisson(v u) / v - u for a picture or plane of values in [0, 1]."""
    u_u8 = to_u8(plane)
    table = poisson_table(2 ** math.ceil(math.log2(_num_levels(u_u8))))
    index = u_u8.astype(np.int32)
    index <<= POISSON_BITS
    index += _random_u16(rng, plane.shape) >> (16 - POISSON_BITS)
    # index_select takes 32-bit indices; NumPy would convert them to 64 bits first.
    return (
        torch.index_select(torch.from_numpy(table.ravel()), 0, torch.from_numpy(index.ravel()))
        .numpy()
        .reshape(plane.shape)
    )


def _num_levels(u_u8: NDArray[np.uint8]) -> int:
    """Count the levels of a picture, or of its first part if that has more than 128: all such counts mean 256
    photons.
    """
    levels = u_u8.reshape(-1, 1)
    for part in (levels[:_FEW_PIXELS], levels):
        count = int(np.count_nonzero(cv2.calcHist([part], [0], None, [256], [0, 256])))
        if count > 128:
            break
    return count


@functools.cache
def normal_table() -> NDArray[np.float32]:
    """Return the quantiles of the standard normal distribution at the middles of 65 536 equally likely
    intervals, scaled to variance 1. The largest is 4.3.
    """
    middles = (torch.arange(1 << 16, dtype=torch.float64) + 0.5) / (1 << 16)
    table = torch.special.ndtri(middles)
    return (table / table.std(correction=0)).float().numpy()


@functools.cache
def poisson_table(photons: int) -> NDArray[np.float32]:
    """Return the quantiles of Poisson(photons u) / photons - u at the middles of 4096 equally likely
    intervals, for u = 0, 1/255, ..., 1: (256, 4096) float32.

    Probabilities are wrong by at most 1 / 4096; at 256 photons the mean is wrong by less than 0.1 % of a
    standard deviation, the variance by less than 0.3 %.
    """
    u = np.arange(256) / 255
    counts = np.arange(photons + int(12 * math.sqrt(photons)) + 24)
    log_factorials = np.log(np.maximum(counts, 1)).cumsum()
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 log 0 at u = 0, corrected below
        mass = np.exp(counts * np.log(photons * u[:, None]) - photons * u[:, None] - log_factorials)
    mass[0] = counts == 0
    middles = (np.arange(1 << POISSON_BITS) + 0.5) / (1 << POISSON_BITS)
    quantiles = np.stack([np.searchsorted(cumulated, middles) for cumulated in mass.cumsum(axis=1)])
    return (quantiles / photons - u[:, None]).astype(np.float32)
