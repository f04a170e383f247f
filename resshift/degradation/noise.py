"""Gaussian and Poisson noise of the Real-ESRGAN degradation, in colour or grey.

    Gaussian   x + (sigma / 255) n,                    n ~ N(0, 1)
    Poisson    x + scale (Poisson(v u) / v - u),       u = x rounded to 8 bits, v = 2^ceil(log2(number of levels in u))

v is the number of photons that make white: a picture with few levels is treated as shot with few photons. Grey noise is one plane added to
all three channels; grey Poisson noise takes u from the luma of the picture. The result is clipped to [0, 1].

Reference: Wang et al., "Real-ESRGAN", ICCVW 2021 (noise); the choice of v follows the official ResShift configuration's implementation.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from resshift.seeds import philox

# Rec. 601 luma, with the rounding that torchvision's rgb_to_grayscale (used by the official code) has
_LUMA = np.array([0.2989, 0.587, 0.114], dtype=np.float32)


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Noise:
    """One operation of a degradation: additive noise.

    Args:
        kind: which law.
        level: for Gaussian noise sigma in 8-bit levels, for Poisson noise the factor `scale`.
        gray: one noise plane for all channels.
        seed: names the noise stream; with it `degrade` is a pure function.
    """

    op: Literal["noise"] = "noise"
    kind: Literal["gaussian", "poisson"]
    level: float
    gray: bool
    seed: int

    def __post_init__(self) -> None:
        if self.level < 0:
            raise ValueError(f"noise level {self.level}: must be at least 0")


def _poisson_deviation(plane: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Return Poisson(v u) / v - u for a picture or plane in [0, 1]."""
    u_u8 = np.rint(np.clip(plane, 0, 1) * np.float32(255)).astype(np.uint8)
    num_levels = np.count_nonzero(np.bincount(u_u8.ravel(), minlength=256))
    photons = np.float32(2 ** int(np.ceil(np.log2(num_levels))))
    u = u_u8 * np.float32(1 / 255)
    return np.subtract(rng.poisson(u * photons) / photons, u, dtype=np.float32)


def add_noise(image: NDArray[np.float32], noise: Noise) -> NDArray[np.float32]:
    """Return the picture with noise added, (H, W, 3) float32 clipped to [0, 1]."""
    rng = philox("degradation-noise", noise.seed)
    if noise.kind == "gaussian":
        shape = (*image.shape[:2], 1) if noise.gray else image.shape
        deviation = rng.standard_normal(shape, dtype=np.float32) * np.float32(noise.level / 255)
    else:
        source = (image @ _LUMA)[..., None] if noise.gray else image
        deviation = _poisson_deviation(source, rng) * np.float32(noise.level)
    return np.clip(image + deviation, 0, 1, dtype=np.float32)
