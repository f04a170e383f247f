"""Pictures that tests make: noise, in which a mixed-up or damaged pixel cannot go unseen."""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def noise(seed: int = 0, height: int = 40, width: int = 48) -> NDArray[np.uint8]:
    """Return random pixels, (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def encoded(seed: int = 0, height: int = 40, width: int = 48, format: str = "PNG", **options: Any) -> bytes:
    """Return a file of `noise`.

    Args:
        seed: Seed of the pixels.
        height: Height in pixels.
        width: Width in pixels.
        format: Name of a format that Pillow writes.
        options: Options of Pillow's encoder.
    """
    return file_of(noise(seed, height, width), format, **options)


def file_of(pixels: NDArray[Any], format: str = "PNG", **options: Any) -> bytes:
    """Encode pixels with Pillow."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **options)
    return out.getvalue()


def decoded(data: bytes) -> NDArray[np.uint8]:
    """Return the pixels of a file, read by Pillow."""
    return np.asarray(Image.open(io.BytesIO(data)))


def enlarged(data: bytes) -> NDArray[np.uint8]:
    """Return what `nearest-x4` makes of a file."""
    return decoded(data).repeat(4, axis=0).repeat(4, axis=1)


def tiff_of(pages: Sequence[tuple[NDArray[np.uint8], Mapping[int, int]]]) -> bytes:
    """Return a TIFF of uncompressed (H, W, 3) pages, each with further tags, or other values of its own."""
    data = bytearray(b"II*\0\0\0\0\0")
    pointer = 4  # where the offset of the next directory belongs
    for pixels, tags in pages:
        height, width = pixels.shape[:2]
        known = {256: width, 257: height, 258: 8, 259: 1, 262: 2, 273: len(data), 277: 3, 278: height}
        directory = {**known, 279: pixels.size, **tags}
        data += pixels.tobytes() + bytes(pixels.size % 2)
        data[pointer : pointer + 4] = struct.pack("<I", len(data))
        data += struct.pack("<H", len(directory))
        for tag in sorted(directory):
            data += struct.pack("<HHII", tag, 4, 1, directory[tag])
        pointer = len(data)
        data += bytes(4)
    return bytes(data)
