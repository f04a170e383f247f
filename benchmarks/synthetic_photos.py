"""Draw photos for benchmarks on machines without any, as costly to decode as those of ImageNet.

A picture is a sum of smooth noise at scales of 1 to 128 pixels, stronger at the coarse ones as in
photographs, with a few polygons for edges, encoded as JPEG 4:2:0 of quality 90. Like ImageNet photos, they
have 2 to 3 bits per pixel.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from resshift.seeds import philox

HEIGHT, WIDTH, QUALITY = 375, 500, 90
_NUM_OCTAVES = 8
_GRAIN = 0.012  # standard deviation of the finest scale, 3 levels


def synthetic_photo(i_photo: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    """Return photo number `i_photo` as a JPEG file; the same number gives the same pixels."""
    rng = philox("synthetic photo", i_photo)
    image = np.full((height, width, 3), 0.5, dtype=np.float32)
    for octave in range(_NUM_OCTAVES):
        cell_px = 2**octave
        coarse = rng.standard_normal((height // cell_px + 2, width // cell_px + 2, 3), dtype=np.float32)
        coarse[..., 1:] = (
            0.95 * coarse[..., :1] + 0.3 * coarse[..., 1:]
        )  # the channels of a photo are correlated
        image += (
            _GRAIN
            * cell_px**0.6
            * np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.float32)
        )
        if octave == 3:
            _paint_polygons(image, rng)
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        QUALITY,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    levels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    return cv2.imencode(".jpg", levels, options)[1].tobytes()


def _paint_polygons(image: NDArray[np.float32], rng: np.random.Generator) -> None:
    height, width = image.shape[:2]
    for _ in range(6):
        corners = (rng.random((5, 2)) * (width, height)).astype(np.int32)
        colour = 0.5 * (rng.random() - 0.5) + 0.2 * (rng.random(3) - 0.5)
        shape = np.zeros_like(image)
        cv2.fillConvexPoly(shape, cv2.convexHull(corners), colour.tolist(), cv2.LINE_AA)
        image += shape
