"""A training pair in plain OpenCV and NumPy, the baseline of `resshift.pairs.training_pair`.

A straightforward first version of the same recipe: one thread, no tables, no precomputation, no checks;
choices from NumPy's generator, kernels from their formulas, noise from `normal` and `poisson`, sums by
`cv2.filter2D`. It is a fair baseline: OpenCV's own area resize and channel order, kernels of their actual
size (the official code pads all to 21 x 21), one generator for all pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resshift.degradation import DegradationRecipe
from resshift.degradation.recipe import KernelRecipe, NoiseRecipe, ResizeRecipe

Image = NDArray[np.float32]
_TYPES = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")
_MODES = (cv2.INTER_AREA, cv2.INTER_LINEAR, cv2.INTER_CUBIC)
_bessel_j1 = cast("Callable[[Tensor], Tensor]", torch.special.bessel_j1)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch


def crop(data: bytes, side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Decode a photo, cut its largest square at a random position, resize it to `side`, flip half of them."""
    photo = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    assert photo is not None
    height, width = photo.shape[:2]
    short = min(height, width)
    top, left = rng.integers(height - short + 1), rng.integers(width - short + 1)
    square = cv2.resize(
        photo[top : top + short, left : left + short], (side, side), interpolation=cv2.INTER_AREA
    )
    return np.ascontiguousarray(square[:, ::-1] if rng.random() < 0.5 else square, dtype=np.uint8)


def _odd(rng: np.random.Generator, sizes: tuple[int, int]) -> int:
    return int(rng.choice(np.arange(sizes[0], sizes[1] + 1, 2)))


def _sinc(size: int, omega: float) -> Image:
    axis = np.arange(size) - size // 2
    r = np.hypot(*np.meshgrid(axis, axis))
    r[size // 2, size // 2] = 1
    k = omega * _bessel_j1(torch.from_numpy(omega * r)).numpy() / (2 * math.pi * r)
    k[size // 2, size // 2] = omega**2 / (4 * math.pi)
    return (k / k.sum()).astype(np.float32)


def _kernel(rng: np.random.Generator, recipe: KernelRecipe) -> Image:
    size = _odd(rng, recipe.size)
    if rng.random() < recipe.sinc_prob:
        return _sinc(
            size,
            rng.uniform(
                *(recipe.sinc_omega_small if size < recipe.sinc_large_size else recipe.sinc_omega_large)
            ),
        )
    kind = str(rng.choice(_TYPES, p=recipe.type_probs))
    sigma_x = sigma_y = rng.uniform(*recipe.sigma)
    theta = 0.0
    if kind.endswith("aniso"):
        sigma_y, theta = rng.uniform(*recipe.sigma), rng.uniform(-math.pi, math.pi)
    axis = np.arange(size) - size // 2
    x, y = np.meshgrid(axis, axis)
    turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    inverse = np.linalg.inv(turn @ np.diag([sigma_x**2, sigma_y**2]) @ turn.T)
    p = np.stack([x, y], axis=-1)
    q = np.sum((p @ inverse) * p, axis=-1)
    beta = 1.0
    if kind.startswith(("generalized", "plateau")):
        low, high = recipe.beta_generalized if kind.startswith("generalized") else recipe.beta_plateau
        beta = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
    k = 1 / (1 + q**beta) if kind.startswith("plateau") else np.exp(-0.5 * q**beta)
    return (k / k.sum()).astype(np.float32)


def _blur(image: Image, k: Image) -> Image:
    return np.asarray(cv2.filter2D(image, -1, k, borderType=cv2.BORDER_REFLECT_101), dtype=np.float32)


def _resize(image: Image, side: int, rng: np.random.Generator) -> Image:
    return np.asarray(
        cv2.resize(image, (side, side), interpolation=_MODES[rng.integers(3)]), dtype=np.float32
    )


def _factor(rng: np.random.Generator, recipe: ResizeRecipe) -> float:
    direction = rng.choice(["up", "down", "keep"], p=recipe.probs)
    return (
        1.0
        if direction == "keep"
        else rng.uniform(1, recipe.factor[1])
        if direction == "up"
        else rng.uniform(recipe.factor[0], 1)
    )


def _noise(image: Image, rng: np.random.Generator, recipe: NoiseRecipe) -> Image:
    gaussian, gray = rng.random() < recipe.gaussian_prob, rng.random() < recipe.gray_prob
    source = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[..., None] if gray else image
    if gaussian:
        noise = rng.normal(0, rng.uniform(*recipe.gaussian_sigma) / 255, source.shape)
    else:
        rounded = np.clip(np.round(source * 255), 0, 255) / 255
        photons = 2 ** np.ceil(np.log2(len(np.unique(rounded))))
        noise = (rng.poisson(rounded * photons) / photons - rounded) * rng.uniform(*recipe.poisson_scale)
    return np.clip(image + noise, 0, 1).astype(np.float32)


def _jpeg(image: Image, quality: int) -> Image:
    levels = np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        quality,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    decoded = cv2.imdecode(cv2.imencode(".jpg", levels, options)[1], cv2.IMREAD_COLOR)
    return np.asarray(decoded, dtype=np.float32) / np.float32(255)


def degrade(hq: NDArray[np.uint8], recipe: DegradationRecipe, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Draw and apply the real-world chain of `recipe`."""
    side = hq.shape[0]
    out = side // recipe.scale
    image = hq.astype(np.float32) / np.float32(255)
    image = _blur(image, _kernel(rng, recipe.kernel1))
    image = _resize(image, int(side * _factor(rng, recipe.resize1)), rng)
    image = _noise(image, rng, recipe.noise1)
    image = _jpeg(image, int(rng.integers(recipe.jpeg1_quality[0], recipe.jpeg1_quality[1] + 1)))
    if rng.random() < recipe.second_order_prob:
        if rng.random() < recipe.blur2_prob:
            image = _blur(image, _kernel(rng, recipe.kernel2))
        image = _resize(image, int(out * _factor(rng, recipe.resize2)), rng)
        image = _noise(image, rng, recipe.noise2)
    quality = int(rng.integers(recipe.jpeg2_quality[0], recipe.jpeg2_quality[1] + 1))
    jpeg_last = rng.random() < recipe.jpeg_last_prob
    if not jpeg_last:
        image = _jpeg(image, quality)
    image = _resize(image, out, rng)
    if rng.random() < recipe.final_sinc_prob:
        image = _blur(image, _sinc(_odd(rng, recipe.final_sinc_size), rng.uniform(*recipe.final_sinc_omega)))
    if jpeg_last:
        image = _jpeg(image, quality)
    return np.round(np.clip(image, 0, 1) * 255).astype(np.uint8)


def plain_pair(
    data: bytes, side: int, recipe: DegradationRecipe, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return a clean crop and its degraded copy, RGB."""
    hq = crop(data, side, rng)
    lq = degrade(hq, recipe, rng)
    hq, lq = (np.asarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), dtype=np.uint8) for image in (hq, lq))
    return hq, lq
