"""JPEG XL by libjxl (pylibjxl): a file for Pillow, and an encoder. Both are of 8 bit, as the binding is.

The first frame of an animation is read. The orientation is applied by libjxl.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pylibjxl
from PIL import ImageFile

_EFFORT = 3  # photographs: the default takes four times as long for as many bytes
_MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def _codec() -> Any:
    return pylibjxl.JXL(threads=1, pool_size=1)


class JxlImageFile(ImageFile.ImageFile):
    """A file of which the header is read at once, and the pixels and boxes when it is loaded."""

    format = "JXL"
    format_description = "JPEG XL"

    def _open(self) -> None:
        assert self.fp is not None
        self._encoded = self.fp.read()
        with _codec() as codec:
            header: dict[str, Any] = codec.probe(self._encoded)
        if header["channels"] not in _MODES:
            raise SyntaxError(f"{header['channels']} channels, 1 to 4 are read")
        self._size = (header["width"], header["height"])
        self._mode = _MODES[header["channels"]]
        self.sample_bits: int = header["bits_per_sample"]
        self.is_animated: bool = header["have_animation"]

    def load(self) -> Any:
        if self._encoded:
            with _codec() as codec:
                pixels, boxes = codec.decode(self._encoded, metadata=True)
            height, width = pixels.shape[:2]
            if (width, height) != self._size or pixels.dtype != np.uint8:
                raise SyntaxError(f"the header says {self._size}, the pixels are {(width, height)}")
            self._encoded = b""
            self._mode = _MODES[1 if pixels.ndim == 2 else pixels.shape[2]]
            for box, name in (("exif", "exif"), ("xmp", "xmp"), ("icc", "icc_profile")):
                if boxes.get(box):
                    self.info[name] = boxes[box]
            self.fp = io.BytesIO(pixels.tobytes())
            self.tile = [ImageFile._Tile("raw", (0, 0, width, height), 0, self._mode)]  # pyright: ignore[reportPrivateUsage]
        return super().load()


def encode_jxl(
    pixels: np.ndarray,
    alpha: np.ndarray | None,
    quality: int,
    icc: bytes | None,
    exif: bytes | None,
    xmp: bytes | None,
) -> bytes:
    """Return a JPEG XL file.

    Args:
        pixels: (H, W, 1 or 3) uint8.
        alpha: (H, W) uint8, or None.
        quality: 1 to 100; 100 is lossless, 90 a distance of 1, at which the eye sees no difference.
        icc: Profile to embed.
        exif: Block to embed, as in `Picture.exif`.
        xmp: Packet to embed.
    """
    if alpha is not None:
        colours = pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)
        pixels = np.concatenate([colours, alpha[..., None]], axis=2)
    # The scale of libjxl's own tools.
    distance = (
        0.1 + 0.09 * (100 - quality) if quality >= 30 else 53 / 3000 * quality**2 - 23 / 20 * quality + 25
    )
    with _codec() as codec:
        return codec.encode(
            np.require(pixels, requirements=("C", "W")),  # the binding takes no read-only array
            effort=_EFFORT,
            distance=distance,
            lossless=quality == 100,
            icc=icc,
            exif=exif.removeprefix(b"Exif\0\0") if exif else None,
            xmp=xmp,
        )
