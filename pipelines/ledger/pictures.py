"""Some pictures of a bulk job for its report: outputs, and of each a detail beside that of the input.

The pictures are a sample of the rows that are ok, each as likely as any other, and the same one for the same
ledger. Their number and the pixels that are decoded for them have limits, so memory and time do not depend on
the number of inputs. Files may be others by then: they are decoded in a process of its own, and those that
cannot be read are left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cv2
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.pages import Embedded, embed
from resshift import images, seeds, storage
from resshift.images import ImageError, Picture
from resshift.images.sandbox import Decoder, DecoderDied, DecoderLimits, DecoderTimeout
from resshift.storage import StorageError, s3
from resshift.storage.s3 import S3Options

_MOST_PICTURES = 12
_MOST_PIXELS = 100_000_000  # of all outputs that are decoded for a report
_MOST_S = 20.0  # after it no further picture is begun
_DETAIL_PX = 64  # side of the detail in input pixels
_MOST_DETAIL_PX = 256  # side of the detail in the output
_THUMBNAIL_PX = 320
_COLUMNS = ("key", "output", "width_in", "height_in", "width_out", "height_out")

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Places:
    """Where the pictures of a job are.

    Fields:
        source, target: SRC and DST.
        source_s3, target_s3: How they are reached.
    """

    source: str
    target: str
    source_s3: S3Options = s3.DEFAULT
    target_s3: S3Options = s3.DEFAULT

    def link_to_input(self, key: str) -> str | None:
        """Return the address of an input for a page on the same machine, None where a browser has none."""
        if storage.is_s3(self.source):
            return None
        try:
            return Path(os.path.abspath(storage.join(self.source, key))).as_uri()
        except StorageError:  # a list of keys may name anything
            return None


@dataclass(frozen=True, slots=True)
class Card:
    """A picture on the page.

    Fields:
        key: Key of the input.
        sizes: Sizes of input and output, for readers.
        input, output: Addresses of both; of the output, relative to the page.
        whole: The output, or the input where the output is too large to be decoded for a page.
        before, after: A detail of the input as it is, and of the output, if that was decoded.
    """

    key: str
    sizes: str
    input: str | None
    output: str
    whole: Embedded
    before: Embedded | None = None
    after: Embedded | None = None


class Sample:
    """Rows that are drawn from all that are shown to it.

    Args:
        number: Number of rows that are kept.
    """

    def __init__(self, number: int = _MOST_PICTURES) -> None:
        self._number = number
        self._rng = seeds.philox("pictures of a report")
        self._drawn: list[tuple[float, dict[str, Any]]] = []

    def add(self, rows: pa.Table) -> None:
        """Show it further rows."""
        draws = self._rng.random(rows.num_rows)
        number = min(self._number, len(draws))
        # Sorting a whole part would take as long as the rest of a large report.
        first = np.argpartition(draws, number - 1)[:number] if number else np.empty(0, np.intp)
        found = rows.select(_COLUMNS).take(pa.array(first, pa.int64())).to_pylist()
        self._drawn += zip(draws[first].tolist(), found, strict=True)
        self._drawn = sorted(self._drawn, key=lambda pair: pair[0])[: self._number]

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows that were drawn."""
        return [row for _, row in self._drawn]


def cards(rows: Sequence[dict[str, Any]], places: Places) -> list[Card]:
    """Return what the page shows of rows that are ok, by key; what cannot be read is left out."""
    made: list[Card] = []
    limits = DecoderLimits(images=images.ImageLimits(max_pixels=_MOST_PIXELS), seconds=_MOST_S)
    ends, left = time.monotonic() + _MOST_S, _MOST_PIXELS
    with Decoder(limits) as decoder:
        for row in rows:
            if time.monotonic() > ends:
                break
            if row["width_out"] is None or row["height_out"] is None:
                continue
            num_pixels = row["width_out"] * row["height_out"]
            try:
                made.append(_card(row, places, decoder, shows_output=num_pixels <= left))
            except (StorageError, ImageError, DecoderDied, DecoderTimeout):
                continue
            left -= num_pixels if made[-1].after is not None else 0
    return sorted(made, key=lambda card: card.key)


def _card(row: dict[str, Any], places: Places, decoder: Decoder, *, shows_output: bool) -> Card:
    def read(root: str, key: str, options: S3Options) -> Pixels:
        data = storage.read_bytes(storage.join(root, key), decoder.limits.images.max_bytes, options)
        return images.rgb_u8(decoder.decode(data).pictures[0])

    given = whole = read(places.source, row["key"], places.source_s3)
    before = after = None
    if shows_output:
        whole = read(places.target, row["output"], places.target_s3)
        before, after = _details(given, whole)
    return Card(
        key=row["key"],
        sizes=f"{row['width_in']} × {row['height_in']} → {row['width_out']} × {row['height_out']}",
        input=places.link_to_input(row["key"]),
        output="../" + quote(row["output"], errors="backslashreplace"),
        whole=_thumbnail(whole),
        before=before,
        after=after,
    )


def _details(given: Pixels, made: Pixels) -> tuple[Embedded, Embedded]:
    """Return the same part of an input, (h, w, 3), and its output, (H, W, 3), at the same size: the square in
    which the input varies most.
    """
    scales = made.shape[0] / given.shape[0], made.shape[1] / given.shape[1]
    side = max(1, min(_DETAIL_PX, int(_MOST_DETAIL_PX / max(scales)), *given.shape[:2]))
    top, left = _busiest(given, side)
    ends = (
        (round(start * scale), round((start + side) * scale))
        for start, scale in zip((top, left), scales, strict=True)
    )
    rows, columns = (slice(start, max(stop, start + 1)) for start, stop in ends)
    after = made[rows, columns]
    height, width = after.shape[:2]
    before = given[top : top + side, left : left + side]
    return _embedded(before, width, height), _embedded(after, width, height)


def _busiest(pixels: Pixels, side: int) -> tuple[int, int]:
    """Return top and left of the square, of those of a grid, with the largest variance."""
    rows, columns = (length // side for length in pixels.shape[:2])
    grid = pixels[: rows * side, : columns * side, 1].reshape(rows, side, columns, side)
    row, column = np.unravel_index(grid.var(axis=(1, 3), dtype=np.float32).argmax(), (rows, columns))
    return int(row) * side, int(column) * side


def _thumbnail(pixels: Pixels) -> Embedded:
    factor = min(1.0, _THUMBNAIL_PX / max(pixels.shape[:2]))
    height, width = (max(1, round(factor * length)) for length in pixels.shape[:2])
    shrunk = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return _embedded(shrunk.astype(np.uint8, copy=False), width, height)


def _embedded(pixels: Pixels, width: int, height: int) -> Embedded:
    encoded = images.encode(Picture(pixels=np.ascontiguousarray(pixels)), "jpeg", 90)
    return embed(encoded, "image/jpeg", width, height)
