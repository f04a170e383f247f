"""Write TIFF: Pillow has no 16-bit RGB, and tifffile cannot write EXIF and GPS directories.

One page, Adobe Deflate with the horizontal predictor (TIFF 6.0, section 14), strips of 1 MiB. The bytes
depend on what those of a PNG do.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, TiffImagePlugin

from resshift.images.exif import with_text
from resshift.images.png import deflater
from resshift.images.resolution import resolution_tags

_STRIP_BYTES = 1 << 20


def encode_tiff(
    pixels: np.ndarray,
    alpha: np.ndarray | None,
    icc: bytes | None,
    exif: bytes | None,
    xmp: bytes | None,
    resolution: tuple[float, float] | None = None,
) -> bytes:
    """Return a one-page little-endian TIFF, Deflate with the horizontal predictor, alpha unassociated.

    Args:
        pixels: (H, W, 1 or 3) uint8 or uint16.
        alpha: (H, W) of the same dtype, or None.
        icc: Profile to embed.
        exif: Block to embed, as in `Picture.exif`; its descriptive tags are written to the first directory.
        xmp: Packet to embed.
        resolution: Dots per inch across and down.
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
        stream = deflater()
        strips.append(stream.compress(strip) + stream.flush())

    directory = TiffImagePlugin.ImageFileDirectory_v2(b"II*\0\x08\0\0\0")
    block = Image.Exif()
    if exif:
        block.load(exif)
        for tag in block:
            inner = block.get_ifd(tag) if tag in (0x8769, 0x8825) else None
            directory[tag] = block[tag] if inner is None else inner
    for tag, value in resolution_tags(resolution).items() if resolution else ():
        directory[tag] = value
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
    # Offsets are relative to the end of the directory; tobytes converts them.
    directory[TiffImagePlugin.STRIPOFFSETS] = tuple(sum(map(len, strips[:i])) for i in range(len(strips)))
    directory[TiffImagePlugin.STRIPBYTECOUNTS] = tuple(map(len, strips))
    return with_text(b"II*\0\x08\0\0\0" + directory.tobytes(8), block) + b"".join(strips)
