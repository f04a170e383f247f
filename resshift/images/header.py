"""Read the header of an encoded picture, without decoding a pixel.

Pillow's plugins for other formats than those of `identify.FORMATS` never see a user's bytes. Only `refusals`
turns exceptions of a decoder into an `ImageError`.
"""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from collections.abc import Callable, Generator
from typing import Any

import cv2
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from resshift.images.identify import MAX_PAGES, identify, pages
from resshift.images.types import ImageError, ImageHeader, ImageLimits, ImageReason


def _heif(fp: io.BytesIO) -> Image.Image:
    from pi_heif.as_plugin import HeifImageFile  # loaded by those who need it

    return HeifImageFile(fp, "")


def _jxl(fp: io.BytesIO) -> Image.Image:
    from resshift.images.jxl import JxlImageFile

    return JxlImageFile(fp, "")


_FACTORIES: dict[str, Callable[[io.BytesIO], Image.Image]] = {
    "JPEG": lambda fp: JpegImagePlugin.jpeg_factory(fp, ""),
    "PNG": lambda fp: PngImagePlugin.PngImageFile(fp, ""),
    "WEBP": lambda fp: WebPImagePlugin.WebPImageFile(fp, ""),
    "TIFF": lambda fp: TiffImagePlugin.TiffImageFile(fp, ""),
    "GIF": lambda fp: GifImagePlugin.GifImageFile(fp, ""),
    "BMP": lambda fp: BmpImagePlugin.BmpImageFile(fp, ""),
    "HEIF": _heif,
    "AVIF": lambda fp: AvifImagePlugin.AvifImageFile(fp, ""),
    "JXL": _jxl,
}
_MAX_META_BYTES = 1 << 20  # of an AVIF, in which its properties are looked for
_MAX_COUNTED_BYTES = 8 << 20  # Pillow takes up to 0.2 s per megabyte to walk along the frames of a GIF

# All exceptions that Pillow 13 and OpenCV 5 were seen to raise on hostile bytes, or can raise according to
# their code.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    cv2.error,
    Image.DecompressionBombError,
    Warning,  # when the application turns warnings into errors
)


@contextlib.contextmanager
def refusals(what: str) -> Generator[None]:
    """Turn exceptions of a decoder into an ImageError; the cause is kept."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise ImageError(ImageReason.TOO_LARGE, f"{what}: {str(error) or 'out of memory'}") from error
    except _DECODER_ERRORS as error:
        text = f"{type(error).__name__}: {error}"[:200]
        raise ImageError(_reason(error, text.lower()), f"{what}: {text}") from error


def _reason(error: BaseException, text: str) -> ImageReason:
    if isinstance(error, EOFError) or any(
        words in text for words in ("truncated", "not enough", "end of data")
    ):
        return ImageReason.TRUNCATED
    if "out of memory" in text or "bad_alloc" in text:
        return ImageReason.TOO_LARGE
    if "unknown pixel mode" in text or "unknown data organization" in text:
        return ImageReason.UNSUPPORTED_MODE
    return ImageReason.CORRUPT


def read_header(data: bytes, limits: ImageLimits) -> Image.Image:
    """Read the header only, and check the sizes against the limits."""
    if len(data) > limits.max_bytes:
        raise ImageError(
            ImageReason.TOO_LARGE, f"the file has {len(data)} bytes, at most {limits.max_bytes} are allowed"
        )
    name = identify(data)
    with refusals(f"{name} header"):
        # The plugin is called directly: Image.open applies the process-wide MAX_IMAGE_PIXELS, whereas these
        # limits are an argument.
        image = _FACTORIES[name](io.BytesIO(data))
        if name == "TIFF" and (page := pages(data)[0]):
            image.seek(page)
    limits.check_size(*image.size)
    return image


def count_frames(data: bytes) -> tuple[int, bool]:
    """Return the number of frames or pages, and whether it is exact: counting stops early in files that would
    take long to count.
    """
    name = identify(data)
    if name in ("JPEG", "HEIF", "JXL"):
        return 1, True  # what follows a photo in its file is a gain map, a preview or a second view
    if name == "TIFF":
        num_pages = len(pages(data))
        return num_pages, num_pages < MAX_PAGES
    try:
        image: Any = _FACTORIES[name](io.BytesIO(data))  # opened again, as counting moves along the file
        if name == "GIF" and len(data) > _MAX_COUNTED_BYTES:
            return (2, False) if image.is_animated else (1, True)
        return int(getattr(image, "n_frames", 1)), True
    except _DECODER_ERRORS:
        return 1, True  # a damaged later frame is no reason to refuse the first


def sample_bits(image: Image.Image, data: bytes) -> int:
    """Return the bits per sample in the file, which do not follow from Pillow's mode."""
    if image.format == "PNG":
        return data[24]
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits: tuple[int, ...] = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,))
        return max(bits)
    if image.format == "AVIF":
        return _av1_bits(data)
    return int(getattr(image, "sample_bits", 0) or image.info.get("bit_depth") or 8)


def _av1_bits(data: bytes) -> int:
    """Return the bits of the deepest item of an AVIF (AV1-ISOBMFF, section 2.3.3)."""
    bits = [8]
    at = data.find(b"av1C", 0, _MAX_META_BYTES)
    while 0 <= at <= len(data) - 7:
        flags = data[at + 6]
        bits.append(8 if not flags & 0x40 else 12 if flags & 0x20 else 10)
        at = data.find(b"av1C", at + 4, _MAX_META_BYTES)
    return max(bits)


def probe(data: bytes, limits: ImageLimits | None = None) -> ImageHeader:
    """Read a header, without decoding a pixel.

    Raises:
        ImageError: The file is empty, not of an accepted format, damaged, or outside the limits.
    """
    image = read_header(data, limits or ImageLimits())
    with refusals("header"):
        name, bits = identify(data), sample_bits(image, data)
        width, height = image.size
        return ImageHeader(
            format=name,
            width=width,
            height=height,
            mode=image.mode,
            num_frames=count_frames(data)[0],
            sample_bits=bits,
        )
