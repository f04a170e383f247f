"""The few bytes of PNG and TIFF that OpenCV and Pillow do not write.

OpenCV encodes PNG quickly but without profile and EXIF, and has no grey + alpha; Pillow cannot write 16-bit
RGB to TIFF. Chunks and directories are small and fixed formats (PNG, ISO/IEC 15948; TIFF 6.0 with Adobe
Deflate), so they are written here. The bytes depend only on the arguments and on the zlib build.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np
from PIL import Image, TiffImagePlugin

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_END = len(PNG_SIGNATURE) + 25  # IHDR: length, name, 13 bytes, CRC
_ZLIB_LEVEL = 1  # photographs: level 6 is 10x slower for about 5 % fewer bytes
_STRIP_BYTES = 1 << 20


def _chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def essential_png(png: bytes) -> bytes:
    """Return a PNG of IHDR, tRNS, IDAT and IEND alone.

    OpenCV 5 allocates what any chunk claims to hold (2 GiB for four damaged bytes) and reads animation
    chunks; neither is left after this.
    """
    kept, position = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while position + 12 <= len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4])
        if png[position + 4 : position + 8] in (b"IHDR", b"tRNS", b"IDAT") and end <= len(png):
            kept.append(png[position:end])
        position = end
    return b"".join((*kept, _chunk(b"IEND", b"")))


def insert_png_chunks(png: bytes, icc: bytes | None, exif: bytes | None, xmp: bytes | None) -> bytes:
    """Return a PNG with iCCP, eXIf and iTXt (XMP) chunks put right after IHDR, where all are allowed."""
    extra = b""
    if icc:
        extra += _chunk(b"iCCP", b"ICC profile\0\0" + zlib.compress(icc, 9))
    if exif:
        extra += _chunk(b"eXIf", exif.removeprefix(b"Exif\0\0"))
    if xmp:
        extra += _chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    return png[:_HEADER_END] + extra + png[_HEADER_END:] if extra else png


def grey_alpha_png(pixels: np.ndarray, alpha: np.ndarray) -> bytes:
    """Return a grey + alpha PNG, every row with the Up filter.

    Args:
        pixels: (H, W, 1) uint8 or uint16.
        alpha: (H, W), same dtype.
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
    return PNG_SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def tiff_bytes(
    pixels: np.ndarray, alpha: np.ndarray | None, icc: bytes | None, exif: bytes | None, xmp: bytes | None
) -> bytes:
    """Return a one-page little-endian TIFF, Deflate with the horizontal predictor, alpha unassociated.

    Args:
        pixels: (H, W, 1 or 3) uint8 or uint16.
        alpha: (H, W) of the same dtype, or None.
        icc: profile to embed.
        exif: block as in `Picture.exif`; its descriptive tags go to the first directory.
        xmp: packet to embed.
    """
    samples = pixels if alpha is None else np.concatenate([pixels, alpha[..., None]], axis=2)
    height, width, num_samples = samples.shape
    depth = samples.dtype.itemsize
    little = samples.astype(f"<u{depth}", copy=False)
    rows_per_strip = max(1, _STRIP_BYTES // (width * num_samples * depth))
    strips: list[bytes] = []
    for top in range(0, height, rows_per_strip):
        strip = little[top : top + rows_per_strip].copy()
        strip[:, 1:] -= little[top : top + rows_per_strip, :-1]  # modulo 2^bits, as the predictor is defined
        strips.append(zlib.compress(strip.tobytes(), _ZLIB_LEVEL))

    directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    if exif:
        block = Image.Exif()
        block.load(exif)
        for tag in block:
            inner = block.get_ifd(tag) if tag in (0x8769, 0x8825) else None
            directory[tag] = block[tag] if inner is None else inner
    directory[TiffImagePlugin.IMAGEWIDTH] = width
    directory[TiffImagePlugin.IMAGELENGTH] = height
    directory[TiffImagePlugin.BITSPERSAMPLE] = (8 * depth,) * num_samples
    directory[TiffImagePlugin.COMPRESSION] = 8
    directory[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 2 if pixels.shape[2] == 3 else 1
    directory[TiffImagePlugin.SAMPLESPERPIXEL] = num_samples
    directory[TiffImagePlugin.ROWSPERSTRIP] = rows_per_strip
    directory[TiffImagePlugin.PREDICTOR] = 2
    directory[TiffImagePlugin.SAMPLEFORMAT] = (1,) * num_samples
    if alpha is not None:
        directory[TiffImagePlugin.EXTRASAMPLES] = 2
    if icc:
        directory.tagtype[TiffImagePlugin.ICCPROFILE] = 7  # UNDEFINED
        directory[TiffImagePlugin.ICCPROFILE] = icc
    if xmp:
        directory.tagtype[TiffImagePlugin.XMP] = 1  # BYTE
        directory[TiffImagePlugin.XMP] = xmp
    directory.tagtype[TiffImagePlugin.STRIPOFFSETS] = directory.tagtype[TiffImagePlugin.STRIPBYTECOUNTS] = (
        4  # LONG, whatever the values
    )
    # Offsets are relative to the end of the directory: tobytes moves them.
    directory[TiffImagePlugin.STRIPOFFSETS] = tuple(sum(map(len, strips[:i])) for i in range(len(strips)))
    directory[TiffImagePlugin.STRIPBYTECOUNTS] = tuple(map(len, strips))
    return b"II*\0\x08\0\0\0" + directory.tobytes(8) + b"".join(strips)
