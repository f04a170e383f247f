"""NIQE: distance of the statistics of a picture from those of undistorted photographs. It needs no reference
picture; lower is better.

Mittal, Soundararajan and Bovik, "Making a 'Completely Blind' Image Quality Analyzer", IEEE Signal Processing
Letters 2013:

    n = (Y - mu) / (sigma + 1)          mu, sigma: 7 x 7 Gaussian of 7/6 pixels
    f = 18 parameters of asymmetric generalised Gaussians, fitted to n and its products with four neighbours,
        in blocks of 96 x 96; and again at half the size in blocks of 48 x 48, so 36 for each block
    d = sqrt((m - m_p)^T ((S + S_p) / 2)^+ (m - m_p))        m, S: mean and covariance of f over the blocks

m_p and S_p are those of photographs. They are read from the file that BasicSR and others distribute
(`niqe_pris_params.npz`, from the authors' release); this package does not contain it.
"""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from resshift.degradation import imresize
from resshift.metrics.psnr_ssim import Image, luma

Float64Array = NDArray[np.float64]
BLOCK_PX = 96
_WINDOW = cv2.getGaussianKernel(7, 7 / 6)
_SHAPES = np.arange(0.2, 10, 0.001)
_RATIOS = np.array([math.gamma(2 / a) ** 2 / (math.gamma(1 / a) * math.gamma(3 / a)) for a in _SHAPES])
_NEIGHBOURS = ((0, 1), (1, 0), (1, 1), (1, -1))


class Niqe:
    """NIQE with one set of statistics of undistorted photographs.

    Args:
        parameters: .npz file with `mu_pris_param` (36 numbers) and `cov_pris_param` (36 x 36).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file does not hold these arrays.
    """

    def __init__(self, parameters: str | Path) -> None:
        if not Path(parameters).is_file():
            raise FileNotFoundError(f"no NIQE parameters at {parameters}")
        with np.load(parameters) as file:
            missing = {"mu_pris_param", "cov_pris_param"} - set(file.files)
            if missing:
                raise ValueError(f"{parameters} does not hold {', '.join(sorted(missing))}")
            self.mean = np.asarray(file["mu_pris_param"], np.float64).reshape(-1)
            self.covariance = np.asarray(file["cov_pris_param"], np.float64)
        if self.mean.shape != (36,) or self.covariance.shape != (36, 36):
            raise ValueError(
                f"{parameters} must hold 36 means and a 36 x 36 covariance, got {self.mean.shape} and "
                f"{self.covariance.shape}"
            )

    def __call__(self, rgb_u8: Image, border: int = 0) -> float | None:
        """Return the distance of an (H, W, 3) uint8 picture, at least 0; None if there are fewer than two
        textured blocks of 96 x 96 pixels inside the border, too few for a covariance.
        """
        found = features(luma(rgb_u8[border : len(rgb_u8) - border, border : rgb_u8.shape[1] - border]))
        usable = found[np.isfinite(found).all(axis=1)]  # a block without texture has no shape
        if len(usable) < 2:
            return None
        distance = self.mean - np.nanmean(found, axis=0)
        inverse = np.linalg.pinv((self.covariance + np.cov(usable, rowvar=False)) / 2)
        return float(np.sqrt(distance @ inverse @ distance))


def features(y_u8: Image) -> Float64Array:
    """Return the 36 parameters of every whole block, (blocks, 36), row by row. The remainder at the right and
    at the bottom is ignored.
    """
    rows, columns = (side // BLOCK_PX for side in y_u8.shape)
    y = y_u8[: rows * BLOCK_PX, : columns * BLOCK_PX].astype(np.float64)
    if not y.size:
        return np.empty((0, 36))
    halves = [_normalised(y), _normalised(imresize(y[..., None] / 255, 0.5)[..., 0] * 255)]
    scales: list[Float64Array] = []
    for normalised, block in zip(halves, (BLOCK_PX, BLOCK_PX // 2), strict=True):
        cut = normalised.reshape(rows, block, columns, block).swapaxes(1, 2).reshape(-1, block, block)
        scales.append(np.array([_block_features(part) for part in cut]))
    return np.concatenate(scales, axis=1)


def _normalised(y: Float64Array) -> Float64Array:
    mean = _blurred(y)
    return (y - mean) / (np.sqrt(np.abs(_blurred(y * y) - mean * mean)) + 1)


def _blurred(y: Float64Array) -> Float64Array:
    return np.asarray(cv2.sepFilter2D(y, -1, _WINDOW, _WINDOW, borderType=cv2.BORDER_REPLICATE), np.float64)


def _block_features(block: Float64Array) -> list[float]:
    shape, left, right = fit_asymmetric_gaussian(block)
    result = [shape, (left + right) / 2]
    for shift in _NEIGHBOURS:
        shape, left, right = fit_asymmetric_gaussian(block * np.roll(block, shift, axis=(0, 1)))
        result += [shape, (right - left) * math.gamma(2 / shape) / math.gamma(1 / shape), left, right]
    return result


def fit_asymmetric_gaussian(x: Float64Array) -> tuple[float, float, float]:
    """Fit an asymmetric generalised Gaussian by moments (Lasmar, Stitou and Berthoumieu, ICIP 2009), and
    return its shape, left scale and right scale.

    p(x) ~ exp(-(-x / left)^shape) below zero and exp(-(x / right)^shape) above; shape 2 is the Gaussian,
    1 the Laplacian. NaN if one side has no values.
    """
    negative, positive = x[x < 0], x[x > 0]
    if not len(negative) or not len(positive):
        return float("nan"), float("nan"), float("nan")
    std_left, std_right = (float(np.sqrt(np.mean(side**2))) for side in (negative, positive))
    skew = std_left / std_right
    ratio = np.mean(np.abs(x)) ** 2 / np.mean(x**2) * (skew**3 + 1) * (skew + 1) / (skew**2 + 1) ** 2
    shape = float(_SHAPES[np.argmin((_RATIOS - ratio) ** 2)])
    scale = math.sqrt(math.gamma(1 / shape) / math.gamma(3 / shape))
    return shape, std_left * scale, std_right * scale
