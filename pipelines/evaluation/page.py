"""One page of before and after: pictures of a run beside bicubic upsampling or another model's, in a single
HTML file that loads nothing.

`comparison_page` is a pure function of its arguments. The demo writes what it returns to `demo/index.html`,
`jobs/evaluate.py` to its report. Each picture is embedded once. Without JavaScript the page shows the two
upscaled pictures side by side instead of the slider.

Layout, style and script are in `page.html`; what holds for every page is in `pipelines.pages`.

What it does not do: measure, resize or re-encode pictures. Reduce their size before: a page of 100 MB is slow
to open in any browser.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pipelines.pages import Embedded, embed, render
from resshift.images import ImageLimits
from resshift.images.exif import read_orientation
from resshift.images.header import read_header

__all__ = ["Card", "Histogram", "comparison_page"]

_MIME_BY_FORMAT = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}  # what every browser shows
_HIGHER_IS_BETTER = ("PSNR", "SSIM", "MS-SSIM", "MUSIQ", "CLIPIQA", "MANIQA")
_LOWER_IS_BETTER = ("LPIPS", "DISTS", "NIQE", "FID")
_BARS_A_SIDE = 12
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?(?:e[-+]?\d+)?|inf\b)", re.IGNORECASE)
_NO_FACTS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One picture of the page.

    Fields:
        name: Heading, plain text.
        lq: Low-resolution picture, encoded as PNG, JPEG or WebP like the three below.
        before: Picture that `ours` is compared with, bicubic upsampling of `lq` or another model's result,
            of the same size as `ours`.
        ours: Upscaled picture.
        gt: Picture that `lq` was made from, of the same size as `ours`; None when there is none.
        figures: Values (before, ours) by name of the metric, with units:
            {"PSNR-Y": ("25.50 dB", "26.10 dB")}. The better one is marked when both start with a number and
            the direction is known: from an arrow at the end of the name ("CLIPIQA+ ↑", "NRQM ↓"), else from
            the usual metrics (PSNR, SSIM, ... higher; LPIPS, DISTS, NIQE, FID lower), whatever follows:
            "PSNR-Y", "LPIPS (alex)".
        before_name: Name of `before` for readers.
        note: Text beside the size, for example "0.8 s".
        focus: Place where the magnified detail opens, as fractions of width and height.
    """

    name: str
    lq: bytes
    before: bytes
    ours: bytes
    gt: bytes | None
    figures: Mapping[str, tuple[str, str]]
    before_name: str = "bicubic"
    note: str = ""
    focus: tuple[float, float] = (0.5, 0.5)

    def __post_init__(self) -> None:
        if not all(0 <= share <= 1 for share in self.focus):
            raise ValueError(f"focus must be two fractions from 0 to 1, got {self.focus}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """How the differences of one figure are spread over the pictures.

    Fields:
        title: Caption, plain text.
        values: Differences, at least one, finite.
        shown: Function that writes a difference with its unit.
        better: Side of zero on which ours is better.
    """

    title: str
    values: tuple[float, ...]
    shown: Callable[[float], str]
    better: Literal["left", "right"]

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"a histogram needs finite values, {self.title!r} has {self.values[:5]}")


def comparison_page(
    *,
    title: str,
    lead: str,
    cards: Sequence[Card],
    summary: Sequence[Sequence[str]] = (),
    histograms: Sequence[Histogram] = (),
    facts: Mapping[str, str] = _NO_FACTS,
) -> str:
    """Render the page; write it as UTF-8.

    Args:
        title: Heading and window title.
        lead: Paragraph below the heading.
        cards: Pictures in the order of the page.
        summary: Rows of a table above the pictures, the first one its header; all of one length.
        histograms: Histograms below the table.
        facts: Facts that a reader needs to repeat the run (model, steps, seed, machine, commit), at the foot
            of the page.

    Raises:
        ValueError: Rows have different lengths; a picture is not PNG, JPEG or WebP; before, ours and gt of
            different sizes.
    """
    lengths = sorted({len(row) for row in summary})
    if len(lengths) > 1:
        raise ValueError(f"the rows of summary must have one length, got {lengths}")
    return render(
        "evaluation/page.html",
        title=title,
        lead=lead,
        cards=[_card(card) for card in cards],
        summary=summary,
        summary_header=[_split_metric(name) for name in summary[0]] if summary else [],
        histograms=[_histogram(histogram) for histogram in histograms],
        facts=facts,
    )


def _embed(data: bytes, what: str) -> Embedded:
    """Embed a picture at the size at which it is seen, EXIF orientation applied."""
    image = read_header(data, ImageLimits())
    mime = _MIME_BY_FORMAT.get(image.format or "")
    if mime is None:
        raise ValueError(f"{what} is {image.format}, a page holds {', '.join(_MIME_BY_FORMAT)}")
    # Only JPEG and WebP are asked for their orientation, a PNG would be decoded for it; 5 to 8 are quarter
    # turns.
    is_turned = image.format != "PNG" and read_orientation(image) >= 5
    width, height = image.size[::-1] if is_turned else image.size
    return embed(data, mime, width, height)


def _card(card: Card) -> dict[str, Any]:
    """Return what the template shows of a card."""
    lq, before, ours = (
        _embed(getattr(card, role), f"{role} of {card.name!r}") for role in ("lq", "before", "ours")
    )
    gt = None if card.gt is None else _embed(card.gt, f"gt of {card.name!r}")
    for role, picture in (("before", before), ("gt", gt)):
        if picture is not None and picture.size != ours.size:
            raise ValueError(
                f"{role} of {card.name!r} is {picture.size}, it must have the size of ours, {ours.size}"
            )
    return {
        "name": card.name,
        "before_name": card.before_name,
        "meta": " · ".join(filter(None, (f"{lq.size} → {ours.size} px", card.note))),
        "focus": card.focus,
        "lq": lq,
        "before": before,
        "ours": ours,
        "gt": gt,
        "figures": [_figure(name, pair) for name, pair in card.figures.items()],
    }


def _split_metric(name: str) -> tuple[str, str]:
    """Split "method PSNR-Y ↑" before its last two words, which must not be broken apart."""
    match = re.search(r"\S+ [↑↓]$", name)
    return (name[: match.start()], match[0]) if match else (name, "")


def _histogram(histogram: Histogram) -> dict[str, Any]:
    """Return bars whose middle is zero, so that both sides are seen at their true weight."""
    reach = max(abs(value) for value in histogram.values) or 1.0
    counts = [0] * (2 * _BARS_A_SIDE)
    for value in histogram.values:
        counts[min(len(counts) - 1, int((value / reach + 1) * _BARS_A_SIDE))] += 1
    good = sum(value < 0 if histogram.better == "left" else value > 0 for value in histogram.values)
    return {
        "title": histogram.title,
        "found": f"better in {good} of {len(histogram.values)}",
        "low": histogram.shown(-reach),
        "high": histogram.shown(reach),
        "width": 10 * len(counts),
        "bars": [
            {
                "x": 10 * i + 1,
                "height": 100 * count / max(counts),
                "is_good": (i < _BARS_A_SIDE) == (histogram.better == "left"),
            }
            for i, count in enumerate(counts)
            if count
        ],
    }


def _figure(name: str, pair: tuple[str, str]) -> dict[str, Any]:
    direction = _direction(name)
    label = f"{name.rstrip('↑↓ ')} {'↑' if direction > 0 else '↓'}" if direction else name
    return {"label": label, "cells": pair, "better": _better(pair, direction)}


def _direction(name: str) -> int:
    """Return 1 when higher is better, -1 when lower is, 0 when unknown."""
    if name.endswith(("↑", "↓")):
        return 1 if name.endswith("↑") else -1
    if re.match(rf"(?:{'|'.join(_HIGHER_IS_BETTER)})\b", name, re.IGNORECASE):
        return 1
    return -1 if re.match(rf"(?:{'|'.join(_LOWER_IS_BETTER)})\b", name, re.IGNORECASE) else 0


def _better(pair: tuple[str, str], direction: int) -> int | None:
    """Return the column of the better value; None for equal values, for text, and without a direction."""
    matches = [_NUMBER.match(value.strip().replace("\N{MINUS SIGN}", "-")) for value in pair]
    if not direction or matches[0] is None or matches[1] is None:
        return None
    before, ours = (direction * float(match.group()) for match in (matches[0], matches[1]))
    return None if before == ours else int(ours > before)
