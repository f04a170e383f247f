"""JPEG compression as an operation on pictures, by the real codec.

Official ResShift training uses an approximate JPEG on the GPU (DiffJPEG). Real photographs were encoded by
libjpeg, which rounds the quantisation tables to integers, rounds pixels to 8 bits before and after, and
smooths the subsampled chroma when decoding. The codec is also faster on a CPU. Chroma is subsampled 4:2:0 at
every quality, as in DiffJPEG and as most cameras and websites do.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from resshift.images import swap_red_blue


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Jpeg:
    """One operation of a degradation: encode and decode at `quality` 1 to 100 (the libjpeg scale)."""

    op: Literal["jpeg"] = "jpeg"
    quality: int

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"JPEG quality {self.quality}: must be in 1..100")


def to_u8(image: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.uint8]:
    """Round a picture or plane in [0, 1] to 8 bits, half to even as torch.round does. Values outside [0, 1],
    up to a million, are clipped.
    """
    _, not_negative = cv2.threshold(image, 0, 0, cv2.THRESH_TOZERO)
    return np.asarray(cv2.convertScaleAbs(not_negative, alpha=255), dtype=np.uint8)  # which clips at 255


def from_u8(image_u8: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Convert 8-bit pixels to [0, 1]."""
    return image_u8.astype(np.float32) * np.float32(1 / 255)


def compress(image: NDArray[np.float32], quality: int) -> NDArray[np.float32]:
    """Return the picture after JPEG at `quality`, (H, W, 3) float32 RGB in [0, 1]."""
    ok, data = cv2.imencode(
        ".jpg",
        swap_red_blue(to_u8(image)),  # the luma weights depend on the order
        [
            cv2.IMWRITE_JPEG_QUALITY,
            quality,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
        ],
    )
    if not ok:
        raise RuntimeError(f"OpenCV could not encode a JPEG of shape {image.shape} at quality {quality}")
    return from_u8(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB), dtype=np.uint8))
