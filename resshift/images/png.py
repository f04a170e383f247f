"""PNG by OpenCV's encoder (7x faster than Pillow's), with the chunks that OpenCV does not write.

OpenCV writes no profile, EXIF or XMP, and no grey with alpha. Chunks are a small and fixed format (ISO/IEC
15948), so they are written here. The bytes depend only on the arguments and on the builds of zlib and OpenCV.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image

from resshift.images.samples import swap_red_blue
from resshift.images.types import Array, ImageError, ImageReason

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = len(_SIGNATURE) + 25  # IHDR: length, name, 13 bytes, CRC
_MAX_TEXT = 1 << 20
_ZLIB_LEVEL = 1  # photographs: level 6 is 10x slower for about 5 % fewer bytes
# OpenCV's defaults may change with its version, so all options are set. These are the fastest for
# photographs.
_PNG_OPTIONS = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB),
)


def encode_png(
    pixels: Array,
    alpha: Array | None,
    icc: bytes | None,
    exif: bytes | None,
    xmp: bytes | None,
    chunks: Sequence[bytes] = (),
) -> bytes:
    """Return a PNG with its metadata.

    Args:
        pixels: (H, W, 1 or 3) uint8 or uint16.
        alpha: (H, W) of the same dtype, or None.
        icc: Profile to embed.
        exif: Block to embed, as in `Picture.exif`.
        xmp: Packet to embed.
        chunks: Further chunks that may stand behind the header.

    Raises:
        ImageError: too_large, if OpenCV cannot write a picture of this size.
    """
    return insert_chunks(_pixel_chunks(pixels, alpha), icc, exif, xmp, chunks)


def resolution_chunks(resolution: tuple[float, float] | None) -> Sequence[bytes]:
    """Return the pHYs chunk that says dots per inch."""
    if resolution is None:
        return ()
    across, down = (round(dots / 0.0254) for dots in resolution)
    return (_chunk(b"pHYs", struct.pack(">IIB", across, down, 1)),)


def text_chunks(text: Sequence[tuple[str, str]]) -> Sequence[bytes]:
    """Return a tEXt chunk for each (name, text), or iTXt where it is not Latin-1."""
    chunks: list[bytes] = []
    for name, value in text:
        key = name.encode("latin-1", "replace")[:79]
        try:
            chunks.append(_chunk(b"tEXt", key + b"\0" + value.encode("latin-1")))
        except UnicodeEncodeError:
            chunks.append(_chunk(b"iTXt", key + b"\0\0\0\0\0" + value.encode("utf-8", "replace")))
    return chunks


def read_text(image: Image.Image) -> tuple[tuple[tuple[str, str], ...], tuple[str, ...]]:
    """Return the names and texts of a loaded PNG, and notes; XMP and raw profiles are none."""
    found: dict[str, str] = getattr(image, "text", None) or {}
    text = [
        (name, str(value))
        for name, value in found.items()
        if name and name != "XML:com.adobe.xmp" and not name.startswith("Raw profile type")
    ]
    size = sum(len(value) for _, value in text)
    if size > _MAX_TEXT:
        return (), (f"text of the PNG dropped, it has {size} characters, {_MAX_TEXT} are carried",)
    return tuple(text), ()


def scale_transparent_level(image: Image.Image, bits: int) -> None:
    """Bring the transparent level of grey of 2 or 4 bit to the 8 bit that Pillow gives the pixels."""
    level = image.info.get("transparency")
    if image.mode == "L" and bits < 8 and isinstance(level, int):
        image.info["transparency"] = level * 255 // ((1 << bits) - 1)


def _pixel_chunks(pixels: Array, alpha: Array | None) -> bytes:
    if pixels.shape[2] == 1 and alpha is not None:
        return _grey_alpha(pixels, alpha)
    if pixels.shape[2] == 3:
        swapped = swap_red_blue(pixels)
        pixels = swapped if alpha is None else np.concatenate([swapped, alpha[..., None]], axis=2)
    encoded, buffer = cv2.imencode(".png", pixels, _PNG_OPTIONS)
    if not encoded:
        height, width = pixels.shape[:2]
        raise ImageError(ImageReason.TOO_LARGE, f"OpenCV could not write a PNG of {width}x{height}")
    return buffer.tobytes()


def _chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def essential_png(png: bytes) -> bytes:
    """Return a PNG with no chunks but IHDR, tRNS, IDAT and IEND.

    OpenCV 5 allocates the size that any chunk claims to have (2 GiB for four damaged bytes) and reads
    animation chunks; this removes both.
    """
    kept, position = [_SIGNATURE], len(_SIGNATURE)
    while position + 12 <= len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4])
        if png[position + 4 : position + 8] in (b"IHDR", b"tRNS", b"IDAT") and end <= len(png):
            kept.append(png[position:end])
        position = end
    return b"".join((*kept, _chunk(b"IEND", b"")))


def insert_chunks(
    png: bytes, icc: bytes | None, exif: bytes | None, xmp: bytes | None, chunks: Sequence[bytes]
) -> bytes:
    """Return a PNG with iCCP, eXIf and iTXt (XMP) chunks inserted after IHDR, where all are allowed."""
    extra = b""
    if icc:
        extra += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc, 9))
    if exif:
        extra += _chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    if xmp:
        extra += _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    extra += b"".join(chunks)
    return png[:_HEADER_END] + extra + png[_HEADER_END:] if extra else png


def _grey_alpha(pixels: np.ndarray, alpha: np.ndarray) -> bytes:
    """Return a PNG of grey with alpha, every row with the Up filter.

    Args:
        pixels: (H, W, 1) uint8 or uint16.
        alpha: (H, W) of the same dtype.
    """
    height, width = alpha.shape
    depth = pixels.dtype.itemsize
    samples = np.concatenate([pixels, alpha[..., None]], axis=2).astype(f">u{depth}")
    rows = samples.view(np.uint8).reshape(height, width * 2 * depth)
    filtered = np.full((height, rows.shape[1] + 1), 2, dtype=np.uint8)
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">IIBBBBB", width, height, 8 * depth, 4, 0, 0, 0)
    body = zlib.compress(filtered.tobytes(), _ZLIB_LEVEL)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
