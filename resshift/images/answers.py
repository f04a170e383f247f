"""What a decoder process answers, as bytes that its parent need not trust.

    8 bytes: length of the head | head: JSON | the bytes that the head announces: pixels, alpha, metadata

Pickles would run what they say. Here every field is checked for its type, and all sizes against what decoding
was allowed to take, before memory is reserved for them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np

from resshift.images.animation import Frames
from resshift.images.identify import FORMATS
from resshift.images.types import ImageError, ImageHeader, ImageReason, Picture

Buffer: TypeAlias = bytes | memoryview
Answer: TypeAlias = Frames | ImageHeader | ImageError
LENGTH = struct.Struct(">Q")
_MAX_HEAD_BYTES = 4 << 20  # a thousand frames, or ten thousand texts, have one of 300 kB
_MAX_TEXT = 100_000  # characters of a message or a note
_METADATA = ("icc", "source_icc", "exif", "xmp")
_DTYPES = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}


class BadAnswer(ValueError):
    """Bytes that are no answer."""


def pack(answer: Answer) -> list[Buffer]:
    """Return the parts of an answer, to be sent one after the other."""
    if isinstance(answer, ImageError):
        return _parts({"reason": str(answer.reason), "message": str(answer)[:_MAX_TEXT]}, [])
    if isinstance(answer, ImageHeader):
        return _parts({"header": asdict(answer)}, [])
    bodies: list[Buffer] = []
    pictures = [_described(picture, bodies) for picture in answer.pictures]
    head = {"pictures": pictures, "durations_ms": answer.durations_ms, "loop": answer.loop}
    return _parts(head, bodies)


def _described(picture: Picture, bodies: list[Buffer]) -> dict[str, Any]:
    """Return what the head says of a picture, and append its bytes to `bodies`."""
    arrays = [picture.pixels] if picture.alpha is None else [picture.pixels, picture.alpha]
    bodies += [np.ascontiguousarray(one).data.cast("B") for one in arrays]
    metadata = {name: getattr(picture, name) for name in _METADATA}
    texts = [[one.encode("utf-8", "surrogatepass") for one in pair] for pair in picture.text]
    bodies += [value for value in metadata.values() if value is not None]
    bodies += [one for pair in texts for one in pair]
    return {
        "shape": picture.pixels.shape,
        "bits": 8 * picture.pixels.itemsize,
        "has_alpha": picture.alpha is not None,
        "metadata": {name: None if value is None else len(value) for name, value in metadata.items()},
        "text": [[len(one) for one in pair] for pair in texts],
        "resolution": picture.resolution,
        "format": picture.format,
        "notes": picture.notes,
    }


def _parts(head: Mapping[str, Any], bodies: list[Buffer]) -> list[Buffer]:
    data = json.dumps(head).encode()
    if len(data) > _MAX_HEAD_BYTES:
        reason = f"the description of the picture takes {len(data)} bytes, at most {_MAX_HEAD_BYTES} are read"
        return pack(ImageError(ImageReason.TOO_LARGE, reason))
    return [LENGTH.pack(len(data)), data, *bodies]


def receive(fill: Callable[[memoryview], None], max_bytes: int, max_pixels: int) -> Answer:
    """Receive an answer.

    Args:
        fill: Function that fills a buffer with the next bytes.
        max_bytes: Largest size of pixels and metadata together.
        max_pixels: Largest number of pixels of a picture.

    Raises:
        BadAnswer: The bytes are no answer.
    """
    (length,) = LENGTH.unpack(_filled(fill, LENGTH.size))
    if length > _MAX_HEAD_BYTES:
        raise BadAnswer(f"a head of {length} bytes")
    try:
        head: Any = json.loads(_filled(fill, length))
        if "reason" in head:
            return ImageError(ImageReason(head["reason"]), _text(head["message"]))
        if "header" in head:
            return _header(head["header"])
        pictures: list[Any] = head["pictures"]
        left = max_bytes - sum(_num_bytes(one, max_pixels) for one in pictures)
        if not pictures or left < 0:
            raise BadAnswer(f"{len(pictures)} pictures, {-left} bytes too many")
        return Frames(
            tuple(_picture(one, fill) for one in pictures),
            tuple(_whole(one, 0, 1 << 32) for one in head["durations_ms"]),
            _whole(head["loop"], 0, 1 << 32),
        )
    except BadAnswer:
        raise
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        raise BadAnswer(f"{type(error).__name__}: {error}"[:200]) from error


def _filled(fill: Callable[[memoryview], None], length: int) -> bytes:
    buffer = bytearray(length)
    fill(memoryview(buffer))
    return bytes(buffer)


def _whole(value: Any, least: int, most: int) -> int:
    if type(value) is not int or not least <= value <= most:
        raise BadAnswer(f"{str(value)[:40]} is no whole number in [{least}, {most}]")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > _MAX_TEXT:
        raise BadAnswer("something else than a text")
    return value


def _format(value: Any) -> str:
    if value not in FORMATS and value != "":
        raise BadAnswer(f"{str(value)[:40]!r} is no format")
    return value


def _header(head: Mapping[str, Any]) -> ImageHeader:
    most = 1 << 32
    return ImageHeader(
        format=_format(head["format"]),
        width=_whole(head["width"], 1, most),
        height=_whole(head["height"], 1, most),
        mode=_text(head["mode"])[:20],
        num_frames=_whole(head["num_frames"], 1, most),
        sample_bits=_whole(head["sample_bits"], 1, 64),
    )


def _num_bytes(head: Mapping[str, Any], max_pixels: int) -> int:
    """Return how many bytes follow for a picture; checks all its sizes."""
    height, width, channels = _shape(head)
    if height * width > max_pixels:
        raise BadAnswer(f"a picture of {width}x{height}")
    samples = height * width * (channels + bool(head["has_alpha"]))
    metadata = [one for one in head["metadata"].values() if one is not None]
    sizes = [*metadata, *(one for pair in head["text"] for one in pair)]
    return samples * _DTYPES[head["bits"]].itemsize + sum(_whole(one, 0, 1 << 40) for one in sizes)


def _shape(head: Mapping[str, Any]) -> tuple[int, int, int]:
    height, width, channels = (_whole(one, 1, 1 << 32) for one in head["shape"])
    return height, width, channels


def _picture(head: Mapping[str, Any], fill: Callable[[memoryview], None]) -> Picture:
    def array(shape: Sequence[int]) -> np.ndarray:
        made = np.empty(shape, _DTYPES[head["bits"]])
        fill(made.data.cast("B"))
        return made

    shape = _shape(head)
    pixels = array(shape)
    alpha = array(shape[:2]) if head["has_alpha"] else None
    metadata = {
        name: None if (length := head["metadata"][name]) is None else _filled(fill, length)
        for name in _METADATA
    }
    texts = [
        tuple(_filled(fill, length).decode("utf-8", "surrogatepass") for length in pair)
        for pair in head["text"]
    ]
    resolution = head["resolution"]
    if resolution is not None:
        across, down = map(float, resolution)
        if not (math.isfinite(across) and math.isfinite(down)):
            raise BadAnswer(f"a resolution of {across} and {down}")
        resolution = (across, down)
    return Picture(
        pixels=pixels,
        alpha=alpha,
        icc=metadata["icc"],
        source_icc=metadata["source_icc"],
        exif=metadata["exif"],
        xmp=metadata["xmp"],
        text=tuple((name, text) for name, text in texts),
        resolution=resolution,
        format=_format(head["format"]),
        notes=tuple(_text(note) for note in head["notes"]),
    )
