"""EXIF: the orientation, and the tags that are carried to an upscaled picture.

Descriptive tags (camera, lens, exposure, dates, author, GPS) are kept. Tags that describe the old file and
would be wrong for the new one are dropped: strip offsets, thumbnails, sub-pictures, geographic pixel scales.
The caller applies the orientation to the pixels once; a block without one says 1.

Pillow serialises the blocks again, so maker notes that contain absolute offsets (some Canon cameras) keep
their bytes but not their meaning.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from resshift.images.resolution import resolution_tags

ORIENTATION = 0x0112
_EXIF_IFD, _GPS_IFD = 0x8769, 0x8825
_PIXEL_WIDTH, _PIXEL_HEIGHT = 0xA002, 0xA003
_INTEROP_IFD = 0xA005
_ASCII, _UTF8 = 2, 129  # types of a tag; the second is that of Exif 3.0, section 4.6.2
# TIFF 6.0 and Exif 3.0 section 4.6.5: text, resolution, date, rights; Windows rating and XP* comment fields.
_KEPT_TAGS = (
    *(
        0x010D,
        0x010E,
        0x010F,
        0x0110,
        0x011A,
        0x011B,
        0x0128,
        0x0131,
        0x0132,
        0x013B,
        0x013C,
        0x4746,
        0x4749,
        0x8298,
    ),
    *(0x9C9B, 0x9C9C, 0x9C9D, 0x9C9E, 0x9C9F),
)
# Exceptions that Pillow was seen to raise on damaged blocks, or can raise according to its code, when it
# reads them and when it writes them again.
_EXIF_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    struct.error,
    RuntimeError,
)

_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: a.swapaxes(0, 1)[:, ::-1],
    7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
    8: lambda a: a.swapaxes(0, 1)[::-1],
}


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Rotate and mirror stored pixels, (H, W) or (H, W, C), as EXIF orientation 1-8 says; the result is
    contiguous, and (W, H, ...) for 5-8.
    """
    return np.ascontiguousarray(_TURNS[orientation](array))


def read_orientation(image: Image.Image) -> int:
    """Return the orientation of an opened or loaded picture; 1 if it is absent, damaged or outside 1-8."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except _EXIF_ERRORS:
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def descriptive_exif(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    """Return the descriptive tags of a loaded picture, as bytes that start with `Exif\\0\\0`, and notes; None
    if there are no such tags.
    """
    try:
        old = image.getexif()
        block = image.info.get("exif") or b""
        if (known := _utf8_as_ascii(block)) != block:
            old = Image.Exif()
            old.load(known)
        new = Image.Exif()
        new.endian = old.endian
        for tag in _KEPT_TAGS:
            if tag in old:
                new[tag] = old[tag]
        for pointer in (_EXIF_IFD, _GPS_IFD):
            inner = {tag: value for tag, value in old.get_ifd(pointer).items() if tag != _INTEROP_IFD}
            if inner:
                new[pointer] = inner
        if not len(new):
            return None, ()
        return with_text(new.tobytes(), new), ()
    except _EXIF_ERRORS as error:
        return None, (f"EXIF dropped, it is damaged: {str(error)[:120]}",)


def _utf8_as_ascii(block: bytes) -> bytes:
    """Return a block in which texts of type UTF-8 are of type ASCII: Pillow skips types that it does not
    know, and UTF-8 in texts of type ASCII is what editors write and programs read.
    """
    start = 6 * block[:12].count(b"Exif\0\0")
    patched = bytearray(block)
    order = "<" if block[start : start + 2] == b"II" else ">"
    try:
        directories = list(struct.unpack_from(order + "I", block, start + 4))
        for at in directories:
            (count,) = struct.unpack_from(order + "H", block, start + at)
            for entry in range(start + at + 2, start + at + 2 + 12 * count, 12):
                tag, kind, _, offset = struct.unpack_from(order + "HHII", block, entry)
                if tag in (_EXIF_IFD, _GPS_IFD) and len(directories) < 3:
                    directories.append(offset)
                elif kind == _UTF8:
                    struct.pack_into(order + "H", patched, entry + 2, _ASCII)
    except struct.error:  # the block ends here; what Pillow makes of it is told there
        pass
    return bytes(patched)


def resize_exif(
    exif: bytes | None, width: int, height: int, resolution: tuple[float, float] | None = None
) -> bytes:
    """Return the block with its pixel-size tags set to the size of the picture that it is written into.

    Args:
        exif: Block, or None for an empty one.
        width, height: Size in pixels.
        resolution: Dots per inch to be set; None leaves them.
    """
    old = Image.Exif()
    if exif:
        old.load(exif)
    new = Image.Exif()
    new.endian = old.endian
    for tag in old:
        new[tag] = old.get_ifd(tag) if tag in (_EXIF_IFD, _GPS_IFD) else old[tag]
    if _EXIF_IFD in new:
        new[_EXIF_IFD] = {**new[_EXIF_IFD], _PIXEL_WIDTH: width, _PIXEL_HEIGHT: height}
    for tag, value in resolution_tags(resolution).items() if resolution else ():
        new[tag] = value
    return with_text(new.tobytes(), new)


def with_text(block: bytes, exif: Image.Exif) -> bytes:
    """Return a block that Pillow has written, with the bytes of its texts as they were.

    Pillow reads a text of type ASCII as Latin-1 and writes every character above 127 as a question mark. What
    cameras and editors write there is mostly UTF-8. The lengths are equal, so bytes are put back in place.

    Args:
        block: EXIF block that starts with `Exif\\0\\0`, or TIFF.
        exif: The tags that were written.
    """
    start = 6 if block.startswith(b"Exif\0\0") else 0
    patched = bytearray(block)
    order = "<" if block[start : start + 2] == b"II" else ">"
    directories: list[tuple[int, Mapping[int, Any]]] = [
        (struct.unpack_from(order + "I", block, start + 4)[0], exif)
    ]
    for at, tags in directories:
        (count,) = struct.unpack_from(order + "H", block, start + at)
        for entry in range(start + at + 2, start + at + 2 + 12 * count, 12):
            tag, kind, length, offset = struct.unpack_from(order + "HHII", block, entry)
            if tag in (_EXIF_IFD, _GPS_IFD) and tags is exif:  # not in those: a damaged one may name itself
                inner = exif[tag]
                directories.append((offset, inner if isinstance(inner, dict) else exif.get_ifd(tag)))
                continue
            text = tags.get(tag)
            if kind != _ASCII or not isinstance(text, str) or text.isascii():
                continue
            try:
                data = text.encode("latin-1") + b"\0"
            except UnicodeEncodeError:  # set by a program, and no bytes of a file
                continue
            if len(data) == length:
                place = entry + 8 if length <= 4 else start + offset
                patched[place : place + length] = data
    return bytes(patched)
