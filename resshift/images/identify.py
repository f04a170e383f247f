"""Which format a file has, by its first bytes and never by its name.

The allow-list is `FORMATS`. What is refused is told apart: `unsupported_format` is a picture of another kind,
camera raw among them, and `not_an_image` is anything else (a video, a document, a sidecar of an editor).

A TIFF is opened far enough to see what its directories hold. Camera raw files are TIFFs (or look like them)
whose first directory is a small preview, and so are scans with the thumbnail first: the picture must not be
taken from there.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator

from resshift.images.types import ImageError, ImageReason

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "HEIF", "AVIF", "JXL")
MAX_PAGES = 1000  # directories of a TIFF that are looked at
_HEAD_BYTES = 64 << 10
_FAR_HEAD_BYTES = 4 << 20  # where a preview lies in front of the first directory of a TIFF
_EXTENSIONS = frozenset(
    [
        *("jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "webp", "tif", "tiff", "gif", "bmp"),
        *("heic", "heif", "hif", "avif", "jxl"),
    ]
)
_MAX_ENTRIES = 4096
_MAX_RAW_DIRECTORIES = 30  # that are looked at for a sensor; cameras write a handful
_FOREIGN = {
    b"\0\0\x01\0": "ICO",
    b"8BPS": "PSD",
    b"qoif": "QOI",
    b"v/1\x01": "EXR",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    **dict.fromkeys(
        (b"FUJIFILMCCD-RAW", b"IIU\0", b"IIRO", b"IIRS", b"MMOR", b"FOVb", b"\0MRM"), "camera raw"
    ),
}
_NO_PICTURE = {  # what people have beside their pictures
    b"%PDF": "a PDF",
    b"PK\3\4": "a ZIP archive",
    b"<?xml": "XML",
    b"<svg": "an SVG drawing",
    b"\x1aE\xdf\xa3": "a film",
}
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PNM = re.compile(rb"P[1-6]\s+[#\d]|P7\nWIDTH|P[Ff]\s+\d")
_BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_AVIF_BRANDS = frozenset((b"avif", b"avis"))
# TIFF 6.0, and DNG 1.7 section 4.
_NEW_SUBFILE_TYPE, _SUBFILE_TYPE, _WIDTH, _HEIGHT, _PHOTOMETRIC = 254, 255, 256, 257, 262
_SUB_IFDS, _DNG_VERSION = 330, 50706
_SENSOR = (32803, 34892)  # photometric interpretations: colour filter array, linear raw


def is_named_as_picture(name: str) -> bool:
    """Return whether a name promises a picture; content alone tells whether a file is one."""
    name = name.rpartition("/")[2]
    # "._photo.jpg" is what macOS leaves beside photo.jpg on foreign file systems.
    return not name.startswith("._") and name.rpartition(".")[2].lower() in _EXTENSIONS


def read_head(read: Callable[[int], bytes]) -> bytes:
    """Return as much of a file as `identify` needs: 64 KB, or 4 MB of a TIFF that has no directory there.

    Args:
        read: Function from a number to so many first bytes of the file.
    """
    data = read(_HEAD_BYTES)
    is_far = data.startswith(_TIFF) and next(tiff_directories(data), None) is None
    return read(_FAR_HEAD_BYTES) if is_far else data


def identify(data: bytes) -> str:
    """Return the format of encoded bytes, one of `FORMATS`.

    Args:
        data: Content of the file, or what `read_head` returns.

    Raises:
        ImageError: empty, not_an_image, or unsupported_format; the message says what the file is.
    """
    if not data:
        raise ImageError(ImageReason.EMPTY, "the file has 0 bytes")
    name = _name(data)
    if name is None:
        raise ImageError(
            ImageReason.NOT_AN_IMAGE,
            f"the file {_told(data)}, which is none of {', '.join(FORMATS)}",
        )
    if name not in FORMATS:
        raise ImageError(
            ImageReason.UNSUPPORTED_FORMAT,
            f"the file is {name}, allowed are {', '.join(FORMATS)}"
            + ": develop it to one of them first" * (name == "camera raw"),
        )
    return name


def _name(data: bytes) -> str | None:
    """Return the name of a kind of picture, None for anything else."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM") and int.from_bytes(data[14:18], "little") in _BMP_HEADER_BYTES:
        return "BMP"
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JXL"
    if data.startswith(_TIFF):
        return "camera raw" if _is_raw(data) else "TIFF"
    if data[4:8] == b"ftyp":
        brands = _brands(data)
        for name, known in (("AVIF", _AVIF_BRANDS), ("HEIF", _HEIF_BRANDS), ("camera raw", {b"crx "})):
            if brands & known:
                return name
        return None  # a video
    if _PNM.match(data):
        return "PPM"
    return next((name for magic, name in _FOREIGN.items() if data.startswith(magic)), None)


def _told(data: bytes) -> str:
    """Say what a file is that is no picture."""
    if data[4:8] in (b"ftyp", b"wide", b"moov", b"mdat"):
        return "is a film or sound"
    name = next((name for magic, name in _NO_PICTURE.items() if data.startswith(magic)), None)
    return f"is {name}" if name else f"starts with {data[:16]!r}"


def _brands(data: bytes) -> set[bytes]:
    """Return the brands of an ISO media file (ISO/IEC 14496-12, section 4.3)."""
    end = min(int.from_bytes(data[:4]), len(data), 1024)
    return {data[8:12], *(data[at : at + 4] for at in range(16, end - 3, 4))}


def _is_raw(data: bytes) -> bool:
    if data[8:11] == b"CR\x02":  # Canon's mark behind the header of a TIFF
        return True
    directories = tiff_directories(data, with_sub=True)
    first = next(directories, {})
    return (
        _DNG_VERSION in first
        or first.get(_PHOTOMETRIC) in _SENSOR
        or (_is_reduced(first) and _SUB_IFDS in first)
        # Not every camera marks its preview as one.
        or any(
            tags.get(_PHOTOMETRIC) in _SENSOR and _num_pixels(tags) > _num_pixels(first)
            for tags in directories
        )
    )


def _num_pixels(tags: dict[int, int]) -> int:
    return tags.get(_WIDTH, 0) * tags.get(_HEIGHT, 0)


def pages(data: bytes) -> range:
    """Return the numbers of the pages of a TIFF. Thumbnails and masks in front of the first picture are none;
    if all pages claim to be such, all count.
    """
    directories = list(tiff_directories(data))
    first = next((i for i, tags in enumerate(directories) if not _is_reduced(tags)), 0)
    return range(first, max(1, len(directories)))


def _is_reduced(tags: dict[int, int]) -> bool:
    return bool(tags.get(_NEW_SUBFILE_TYPE, 0) & 0b101) or tags.get(_SUBFILE_TYPE) == 2


def tiff_directories(data: bytes, *, with_sub: bool = False) -> Iterator[dict[int, int]]:
    """Yield the tags of one directory after the other, each with its first value where that is an integer
    beside it. What lies behind the end of the bytes is left out.

    Args:
        data: Content of the file, or its first bytes.
        with_sub: Whether directories that are listed in others (SubIFDs) are looked at too, behind them, and
            a few in all. Without them at most `MAX_PAGES` are.
    """
    order = "<" if data[:2] == b"II" else ">"
    is_big = data[2:4] in (b"+\0", b"\0+")
    count, entry, pointer = (
        order + text for text in (("Q", "HHQ8s", "Q") if is_big else ("H", "HHI4s", "I"))
    )
    integers = {kind: order + text for kind, text in zip((1, 3, 4, 13, 16, 18), "BHIIQQ", strict=True)}
    most = _MAX_RAW_DIRECTORIES if with_sub else MAX_PAGES
    seen: set[int] = set()
    found = [*_unpacked(pointer, data, 8 if is_big else 4)]
    while found and len(seen) < most:
        if not (at := found.pop()) or at in seen:
            continue
        seen.add(at)
        tags: dict[int, int] = {}
        sub = order, b"", 0
        try:
            (num_entries,) = struct.unpack_from(count, data, at)
            at += struct.calcsize(count)
            for _ in range(min(num_entries, _MAX_ENTRIES)):
                tag, kind, number, value = struct.unpack_from(entry, data, at)
                tags[tag] = struct.unpack_from(integers[kind], value)[0] if kind in integers else 0
                if with_sub and tag == _SUB_IFDS and kind in integers:
                    text = f"{order}{min(number, most)}{integers[kind][1:]}"
                    sub = (text, value, 0) if struct.calcsize(text) <= len(value) else (text, data, tags[tag])
                at += struct.calcsize(entry)
        except (struct.error, OverflowError):  # BigTIFF may point beyond 2^63
            continue
        yield tags
        found += (*_unpacked(pointer, data, at), *_unpacked(*sub))


def _unpacked(text: str, data: bytes, at: int) -> tuple[int, ...]:
    """Return the integers at a position, none where they lie behind the end."""
    try:
        return struct.unpack_from(text, data, at)
    except (struct.error, OverflowError):
        return ()
