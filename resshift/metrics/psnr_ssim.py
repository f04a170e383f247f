"""PSNR and SSIM as the field reports them, on luma or on RGB, from 8-bit pictures.

Luma is MATLAB's rgb2ycbcr: Y = (65.481 R + 128.553 G + 24.966 B) / 255 + 16 for 8-bit R, G, B, rounded to 8
bits. SSIM is that of Wang et al., IEEE TIP 2004, with the 11 x 11 Gaussian window of sigma 1.5, on the region
where the window fits ("valid"), without downsampling. `border` pixels are cut from each side first; results
depend on this number, so every report gives it.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]


def luma(rgb_u8: Image) -> Image:
    """(H, W, 3) uint8 RGB -> (H, W) uint8 Y, 16 to 235."""
    y = rgb_u8.astype(np.float64) @ np.array([65.481, 128.553, 24.966]) / 255 + 16
    return np.round(y).astype(np.uint8)


def psnr(x: Image, y: Image, border: int = 0) -> float:
    """Return 10 log10(255^2 / MSE) in dB; infinity for equal pictures.

    Raises:
        ValueError: The pictures differ in shape, are not uint8, or have nothing inside the border.
    """
    a, b = _inside(x, y, border)
    mse = float(np.mean((a - b) ** 2))
    return float("inf") if mse == 0 else 10 * float(np.log10(255**2 / mse))


def ssim(x: Image, y: Image, border: int = 0) -> float:
    """Return the mean structural similarity in [-1, 1], averaged over channels.

    Raises:
        ValueError: As for `psnr`, or a side is shorter than the window of 11 pixels.
    """
    a, b = _inside(x, y, border)
    if min(a.shape[:2]) < 11:
        raise ValueError(
            f"SSIM needs at least 11 x 11 pixels inside the border, got {a.shape[0]} x {a.shape[1]}"
        )
    window = cv2.getGaussianKernel(11, 1.5)

    def blurred(image: NDArray[np.float64]) -> NDArray[np.float64]:
        return cv2.sepFilter2D(image, -1, window, window)[5:-5, 5:-5]  # type: ignore[return-value]

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_a, mean_b = blurred(a), blurred(b)
    var_a, var_b = blurred(a * a) - mean_a**2, blurred(b * b) - mean_b**2
    covariance = blurred(a * b) - mean_a * mean_b
    similarity = (
        (2 * mean_a * mean_b + c1)
        * (2 * covariance + c2)
        / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    )
    return float(similarity.mean())


def _inside(x: Image, y: Image, border: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if x.shape != y.shape or x.dtype != np.uint8 or y.dtype != np.uint8:
        raise ValueError(
            f"pictures must be uint8 and of one shape, got {x.dtype} {x.shape} and {y.dtype} {y.shape}"
        )
    if border < 0 or 2 * border >= min(x.shape[:2]):
        raise ValueError(
            f"border must lie in [0, {(min(x.shape[:2]) - 1) // 2}] for {x.shape[0]} x {x.shape[1]} "
            f"pictures, got {border}"
        )
    inside = slice(border, -border or None)
    return x[inside, inside].astype(np.float64), y[inside, inside].astype(np.float64)
