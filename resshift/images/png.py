"""PNG with the Deflate of zlib-ng, several times as fast as zlib's, and all metadata.

Chunks are a small and fixed format (ISO/IEC 15948), so they are written here. The bytes depend only on the
arguments and on the build of zlib-ng. (ISA-L is faster still, but five in 72,000 of its streams had other
bytes for the same picture, and a job that is done again must have the same.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from zlib_ng import zlib_ng

from resshift.images.types import Array

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = len(_SIGNATURE) + 25  # IHDR: length, name, 13 bytes, CRC
_MAX_TEXT = 1 << 20
_BLOCK_BYTES = 1 << 20  # of rows that are filtered at a time
_COLOUR_TYPE = {1: 0, 2: 4, 3: 2, 4: 6}  # by the number of samples of a pixel
_SUB = 1  # the filter of every row


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
    """
    height, width, num_samples = pixels.shape
    colour_type = _COLOUR_TYPE[num_samples + (alpha is not None)]
    header = struct.pack(">IIBBBBB", width, height, 8 * pixels.dtype.itemsize, colour_type, 0, 0, 0)
    data = (_chunk(b"IDAT", part) for part in _deflated(pixels, alpha) if part)
    png = b"".join((_SIGNATURE, _chunk(b"IHDR", header), *data, _chunk(b"IEND", b"")))
    return insert_chunks(png, icc, exif, xmp, chunks)


def _deflated(pixels: Array, alpha: Array | None) -> Iterator[bytes]:
    """Yield the parts of the zlib stream, every row with the Sub filter (section 9.2)."""
    height, width, num_samples = pixels.shape
    depth = pixels.dtype.itemsize
    pixel_bytes = depth * (num_samples + (alpha is not None))
    row_bytes = width * pixel_bytes
    rows_at_a_time = max(1, _BLOCK_BYTES // row_bytes)
    stream = deflater()
    for top in range(0, height, rows_at_a_time):
        block = pixels[top : top + rows_at_a_time]
        if alpha is not None:
            block = np.concatenate([block, alpha[top : top + rows_at_a_time, :, None]], axis=2)
        block = np.ascontiguousarray(block, f">u{depth}")
        rows = block.view(np.uint8).reshape(len(block), row_bytes)
        filtered = np.empty((len(block), 1 + row_bytes), np.uint8)
        filtered[:, 0] = _SUB
        filtered[:, 1 : 1 + pixel_bytes] = rows[:, :pixel_bytes]
        np.subtract(rows[:, pixel_bytes:], rows[:, :-pixel_bytes], out=filtered[:, 1 + pixel_bytes :])
        yield stream.compress(filtered)
    yield stream.flush()


def deflater() -> Any:
    """Return a compressor that finds runs of a byte and no other repetitions: differences of neighbouring
    samples of a photograph have none.
    """
    return zlib_ng.compressobj(1, strategy=zlib_ng.Z_RLE)


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


def _chunk(name: bytes, payload: bytes) -> bytes:
    crc = zlib_ng.crc32(payload, zlib_ng.crc32(name))
    return b"".join((struct.pack(">I", len(payload)), name, payload, struct.pack(">I", crc)))


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
        extra += _chunk(b"iCCP", b"ICC profile\0\0" + zlib_ng.compress(icc, 9))
    if exif:
        extra += _chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    if xmp:
        extra += _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    extra += b"".join(chunks)
    return png[:_HEADER_END] + extra + png[_HEADER_END:] if extra else png
