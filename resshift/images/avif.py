"""AVIF of more than 8 bit, which Pillow does not write: 10 bit, by OpenCV.

Colour is subsampled (4:2:0) below quality 100, which is lossless.
"""

from __future__ import annotations

import cv2
import numpy as np

from resshift.images.samples import swap_red_blue
from resshift.images.types import Array

_BITS = 10
_HIGHEST = (1 << _BITS) - 1


def encode_deep_avif(
    pixels: Array,
    alpha: Array | None,
    quality: int,
    speed: int,
    icc: bytes | None,
    exif: bytes | None,
    xmp: bytes | None,
) -> bytes:
    """Return an AVIF file of 10 bit.

    Args:
        pixels: (H, W, 1 or 3) uint16.
        alpha: (H, W) uint16, or None.
        quality: 1 to 100.
        speed: 0, small files, to 10.
        icc: Profile to embed.
        exif: Block to embed, as in `Picture.exif`.
        xmp: Packet to embed.
    """
    if pixels.shape[2] == 3 or alpha is not None:
        pixels = swap_red_blue(pixels) if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)
    if alpha is not None:
        pixels = np.concatenate([pixels, alpha[..., None]], axis=2)
    samples = (pixels.astype(np.uint32) * _HIGHEST + 32767) // 65535
    boxes = {
        cv2.IMAGE_METADATA_ICCP: icc,
        cv2.IMAGE_METADATA_EXIF: exif.removeprefix(b"Exif\0\0") if exif else None,
        cv2.IMAGE_METADATA_XMP: xmp,
    }
    given = {kind: np.frombuffer(box, np.uint8) for kind, box in boxes.items() if box}
    how = [cv2.IMWRITE_AVIF_QUALITY, quality, cv2.IMWRITE_AVIF_DEPTH, _BITS, cv2.IMWRITE_AVIF_SPEED, speed]
    _, encoded = cv2.imencodeWithMetadata(
        ".avif", np.ascontiguousarray(samples.astype(np.uint16)), list(given), list(given.values()), how
    )
    return encoded.tobytes()
