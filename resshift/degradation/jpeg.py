"""JPEG compression as an operation on pictures, by the real codec.

Official ResShift training runs an approximate JPEG on the GPU (DiffJPEG). Photographs in the wild went through libjpeg: it rounds the
quantisation tables to integers, rounds pixels to 8 bits before and after, and smooths the subsampled chroma when decoding. The codec is
also faster on a CPU. Chroma is subsampled 4:2:0 whatever the quality, as in DiffJPEG and as cameras and the web do.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Jpeg:
    """One operation of a degradation: encode and decode at `quality` 1 to 100 (the libjpeg scale)."""

    op: Literal["jpeg"] = "jpeg"
    quality: int

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise ValueError(f"JPEG quality {self.quality}: must be in 1..100")


def to_u8(image: NDArray[np.float32] | NDArray[np.float64]) -> NDArray[np.uint8]:
    """Round a picture in [0, 1] to 8 bits, half to even as torch.round does; outside values are clipped."""
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def compress(image: NDArray[np.float32], quality: int) -> NDArray[np.float32]:
    """Return the picture after JPEG at `quality`, (H, W, 3) float32 RGB in [0, 1]."""
    red, green, blue = cv2.split(to_u8(image))
    ok, data = cv2.imencode(
        ".jpg",
        cv2.merge((blue, green, red)),  # imencode takes blue first: the luma weights depend on it
        [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420],
    )
    if not ok:
        raise RuntimeError(f"OpenCV could not encode a JPEG of shape {image.shape} at quality {quality}")
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB), dtype=np.float32)
    return decoded * np.float32(1 / 255)
