"""Training photos: encoded bytes -> 8-bit RGB, by the fastest decoder that gives the same pixels.

`images.decode` handles all files that a user may send. Nearly all photos of a training set are plain JPEG: 8
bit, RGB or grey, upright, no colour profile. OpenCV decodes these to the same pixels in two thirds of the
time. Files that are not plain, or look damaged, are given to `images.decode`, which decodes them or gives the
reason of the refusal.

A JPEG of at least twice the size that is needed may be decoded at 1/2, 1/4 or 1/8: libjpeg then computes a
smaller inverse transform of each 8 x 8 block, which is close to the average of the pixels (48 dB PSNR on
ImageNet photos, equally sharp).
"""

from __future__ import annotations

import struct

import cv2
import numpy as np
from numpy.typing import NDArray

from resshift.images import ImageLimits, decode, rgb_u8

_START, _END = b"\xff\xd8", b"\xff\xd9"
_SOS, _EXIF, _ICC = 0xDA, 0xE1, 0xE2
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman, which every decoder reads
# IMREAD_REDUCED_COLOR_* means blue first and excludes IMREAD_COLOR_RGB; the flags of grey are only divisors.
_FLAGS_BY_DIVISOR = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_COLOR_RGB | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}


def decode_photo(data: bytes, least_side_px: int | None = None) -> NDArray[np.uint8]:
    """Decode a photo to (H, W, 3) uint8 RGB: upright, sRGB, grey repeated, 16 bit rounded to 8, transparency
    dropped.

    Args:
        data: Content of a file of any format that `images.decode` accepts.
        least_side_px: Length that the shorter side must keep if a JPEG is decoded at 1/2, 1/4 or 1/8; None
            decodes it at its full size.

    Raises:
        ImageError: The file is refused, as by `images.decode`.
    """
    size = _plain_jpeg_size(data)
    if size is not None:
        ImageLimits().check_size(*size)
        divisor = _divisor(min(size), least_side_px)
        pixels = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), _FLAGS_BY_DIVISOR[divisor])
        if pixels is not None:
            return np.asarray(pixels, dtype=np.uint8)
    return rgb_u8(decode(data))


def _divisor(short_side_px: int, least_side_px: int | None) -> int:
    if least_side_px is None:
        return 1
    return max(
        divisor for divisor in _FLAGS_BY_DIVISOR if divisor == 1 or short_side_px >= divisor * least_side_px
    )


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (width, height) of a plain JPEG; None for any other file.

    Plain means: complete, 8 bits, one or three components, and neither an Exif block (it may hold an
    orientation) nor a colour profile.
    """
    if not data.startswith(_START) or not data.endswith(_END):
        return None
    size: tuple[int, int] | None = None
    position = 2
    while position + 4 <= len(data):
        prefix, marker, length = struct.unpack_from(">BBH", data, position)
        if prefix != 0xFF or marker == _SOS:
            break
        if marker in (_EXIF, _ICC):
            return None
        if marker in _FRAMES and position + 10 <= len(data):
            bits, height, width, num_components = struct.unpack_from(">BHHB", data, position + 4)
            if bits != 8 or num_components not in (1, 3):
                return None
            size = (width, height)
        position += 2 + length
    return size if size and min(size) > 0 else None
