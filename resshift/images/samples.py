"""Samples of pictures: their order, their depth, and their range as tensors.

Values are uint8 0-255 or uint16 0-65535 in arrays, float32 in [-1, 1] in tensors. Channels are in RGB order;
only this module knows OpenCV's order, which is BGR.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from resshift.images.icc import to_srgb
from resshift.images.types import Array, Picture, check_pixels

if TYPE_CHECKING:
    # The two functions that need torch import it, so that a process that only decodes starts in 0.3 s.
    from torch import Tensor


def swap_red_blue(pixels: Array) -> Array:
    """Convert (H, W, 3) from RGB to the order of OpenCV's codecs, or back."""
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))


def to_eight_bit(samples: Array) -> NDArray[np.uint8]:
    """Round uint16 to uint8: 65535 / 255 = 257 exactly."""
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def rgb_u8(picture: Picture) -> NDArray[np.uint8]:
    """Return the pixels as (H, W, 3) uint8 in sRGB: 16 bit rounded, grey repeated, alpha dropped."""
    pixels = picture.pixels if picture.pixels.dtype == np.uint8 else to_eight_bit(picture.pixels)
    pixels = to_srgb(pixels, picture.icc)
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def from_array(array: Array) -> Picture:
    """Return (H, W), or (H, W, 1, 3 or 4) with RGB order and alpha last, uint8 or uint16, as a picture.

    Raises:
        ValueError: Not such an array; the message says what is allowed.
    """
    if not isinstance(array, np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance] - what types forbid is what people try
        raise ValueError(
            f"an image must be a PIL image or an array, got {type(array).__name__}: a file is opened with "
            "PIL.Image.open"
        )
    if array.dtype.type not in (np.uint8, np.uint16):
        raise ValueError(f"an array must be uint8 or uint16, got {array.dtype}")
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"an array must be (H, W) or (H, W, 1 | 3 | 4) and not empty, got {array.shape}")
    samples = array.reshape(*array.shape[:2], channels)
    return Picture(
        pixels=np.ascontiguousarray(samples[..., :3]),
        alpha=np.ascontiguousarray(samples[..., 3]) if channels == 4 else None,
    )


def to_array(picture: Picture) -> Array:
    """Return the pixels, alpha as the last channel: (H, W, 1 | 3), or (H, W, 2 | 4) with alpha."""
    if picture.alpha is None:
        return picture.pixels
    return np.concatenate([picture.pixels, picture.alpha[..., None]], axis=2)


def to_tensor(pixels: Array) -> Tensor:
    """Convert (H, W, 1 or 3) uint8 or uint16 to (1, 3, H, W) float32 in [-1, 1]; grey becomes three equal
    channels.
    """
    import torch

    check_pixels(pixels)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
    planes /= np.float32(np.iinfo(pixels.dtype).max / 2)
    planes -= 1
    return torch.as_tensor(planes).expand(3, -1, -1)[None].contiguous()


def from_tensor(x: Tensor, dtype: type[np.uint8] | type[np.uint16] = np.uint8) -> Array:
    """Convert (1, C, H, W) or (C, H, W) in [-1, 1] to (H, W, C) integers, round(max * (x + 1) / 2). Halves
    are rounded up, values outside [-1, 1] are clamped.

    Raises:
        ValueError: x has another shape, or holds NaN or infinity.
    """
    import torch

    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[0] != 1):
        raise ValueError(f"x must be (1, C, H, W) or (C, H, W), got {tuple(x.shape)}")
    planes = x.detach().to("cpu", torch.float32).reshape(x.shape[-3:])
    if not bool(torch.isfinite(planes).all()):
        raise ValueError("x holds NaN or infinity, finite values are needed")
    scaled = planes.clamp(-1, 1).add_(1).mul_(np.iinfo(dtype).max / 2).add_(0.5).floor_()
    return np.ascontiguousarray(scaled.permute(1, 2, 0).numpy()).astype(dtype)
