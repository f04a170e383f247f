"""One page of before and after: pictures of a run beside bicubic upsampling or another model's, in a single
HTML file that loads nothing.

`comparison_page` is a pure function of its arguments. The demo writes what it returns to `demo/index.html`,
`jobs/evaluate.py` to its report. Pictures are data: URIs, each embedded once; a content security policy
allows these and the page's own style and script, named by their hashes, and no request. Without JavaScript
the page shows the two upscaled pictures side by side instead of the slider.

Layout, style and script are in `page.html`. All text comes from callers and is escaped here.

What it does not do: measure, resize or re-encode pictures. Reduce their size before, a page of 100 MB opens
in no browser with pleasure.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from types import MappingProxyType
from typing import Literal

from resshift.images.exif import read_orientation
from resshift.images.header import read_header
from resshift.images.types import ImageLimits

__all__ = ["Card", "Histogram", "comparison_page", "security_policy"]

_TEMPLATE = Path(__file__).with_name("page.html")
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
        name: heading, plain text.
        lq: the low-resolution picture, encoded as PNG, JPEG or WebP like the three below.
        before: what `ours` is compared with, bicubic upsampling of `lq` or another model's result, of the
            same size as `ours`.
        ours: the upscaled picture.
        gt: the picture `lq` was made from, of the same size as `ours`; None when there is none.
        figures: (before, ours) by name of the metric, with units: {"PSNR-Y": ("25.50 dB", "26.10 dB")}. The
            better one is marked when both start with a number and the direction is known: from an arrow at
            the end of the name ("CLIPIQA+ ↑", "NRQM ↓"), else from the usual metrics (PSNR, SSIM, ... higher;
            LPIPS, DISTS, NIQE, FID lower), whatever follows: "PSNR-Y", "LPIPS (alex)".
        before_name: what `before` is called.
        note: shown beside the size, for example "0.8 s".
        focus: where the magnified detail opens, as fractions of width and height.
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
        title: plain text.
        values: at least one, finite.
        shown: writes a difference with its unit.
        better: the side of zero on which ours is better.
    """

    title: str
    values: tuple[float, ...]
    shown: Callable[[float], str]
    better: Literal["left", "right"]

    def __post_init__(self) -> None:
        if not self.values or not all(math.isfinite(value) for value in self.values):
            raise ValueError(f"a histogram needs finite values, {self.title!r} has {self.values[:5]}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Embedded:
    """A picture ready for an <img>: data: URI and the size a browser shows it at, EXIF orientation
    applied.
    """

    uri: str
    width: int
    height: int

    @property
    def size(self) -> str:
        return f"{self.width} × {self.height}"

    def img(self, alt: str) -> str:
        return f'<img src="{self.uri}" width="{self.width}" height="{self.height}" alt="{escape(alt)}" draggable="false">'


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
        title: heading and window title.
        lead: one paragraph below it.
        cards: the pictures, in the order of the page.
        summary: rows of a table above the pictures, the first one its header; all of one length.
        histograms: below the table.
        facts: what a reader needs to repeat the run (model, steps, seed, machine, commit), at the foot of the
            page.

    Raises:
        ValueError: rows of different lengths; a picture that is not PNG, JPEG or WebP; before, ours and gt of
            different sizes.
    """
    template = _TEMPLATE.read_text(encoding="utf-8")
    return Template(template).substitute(
        policy=security_policy(template),
        title=escape(title),
        lead=escape(lead),
        summary=_summary_table(summary),
        histograms=_histograms(histograms),
        cards="\n".join(_card(card, number) for number, card in enumerate(cards, start=1)),
        facts=_fact_list(facts),
    )


def security_policy(template: str) -> str:
    """Return the content security policy of a page: this style, this script if any, embedded pictures,
    nothing else.
    """
    hashes: dict[str, str] = {}
    for tag in ("style", "script"):
        if f"<{tag}>" in template:
            content = template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
            hashes[tag] = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    sources = "; ".join(f"{tag}-src 'sha256-{digest}'" for tag, digest in hashes.items())
    return f"default-src 'none'; img-src data:; {sources}; base-uri 'none'; form-action 'none'"


def _embed(data: bytes, what: str) -> _Embedded:
    image = read_header(data, ImageLimits())
    mime = _MIME_BY_FORMAT.get(image.format or "")
    if mime is None:
        raise ValueError(f"{what} is {image.format}, a page holds {', '.join(_MIME_BY_FORMAT)}")
    # Only JPEG and WebP are asked for their orientation, a PNG would be decoded for it; 5 to 8 are quarter
    # turns.
    is_turned = image.format != "PNG" and read_orientation(image) >= 5
    width, height = image.size[::-1] if is_turned else image.size
    return _Embedded(uri=f"data:{mime};base64,{base64.b64encode(data).decode()}", width=width, height=height)


def _card(card: Card, number: int) -> str:
    lq, before, ours = (
        _embed(getattr(card, role), f"{role} of {card.name!r}") for role in ("lq", "before", "ours")
    )
    gt = None if card.gt is None else _embed(card.gt, f"gt of {card.name!r}")
    for role, picture in (("before", before), ("gt", gt)):
        if picture is not None and picture.size != ours.size:
            raise ValueError(
                f"{role} of {card.name!r} is {picture.size}, it must have the size of ours, {ours.size}"
            )
    name, before_name = escape(card.name), escape(card.before_name)
    meta = " · ".join(escape(part) for part in (f"{lq.size} → {ours.size} px", card.note) if part)
    focus = f'data-x="{card.focus[0]}" data-y="{card.focus[1]}"'
    return f"""\
<section class="card" id="picture-{number}" data-width="{ours.width}" data-height="{ours.height}" {focus} aria-labelledby="name-{number}">
<header><h2 id="name-{number}">{name}</h2><p class="meta">{meta}</p></header>
<div class="frame">
<div class="stage">
<figure class="before">{before.img(f"{card.name}, {card.before_name}")}<figcaption>{before_name}</figcaption></figure>
<figure class="after">{ours.img(f"{card.name}, ours")}<figcaption>ours</figcaption></figure>
<input type="range" min="0" max="100" step="any" value="50" aria-label="{name}: how much of the picture is {before_name}, from the left">
<div class="marker" hidden></div>
<div class="divider" aria-hidden="true"><i></i><i></i></div>
</div>
</div>
{_detail(card, number, lq, gt)}
{_figures_table(card.figures, before_name)}
</section>"""


def _detail(card: Card, number: int, lq: _Embedded, gt: _Embedded | None) -> str:
    """Return the row of versions. Two of them are in the stage already: the script copies them, so that the
    file holds them once.
    """
    views = [
        f'<figure class="view low"><div class="window">{lq.img(f"{card.name}, low resolution")}</div>'
        f"<figcaption>low resolution</figcaption></figure>",
        '<figure class="view copy" data-of="before"><div class="window"></div>'
        f"<figcaption>{escape(card.before_name)}</figcaption></figure>",
        '<figure class="view copy" data-of="after"><div class="window"></div><figcaption>ours</figcaption></figure>',
    ]
    if gt is not None:
        views.append(
            f'<figure class="view"><div class="window">{gt.img(f"{card.name}, ground truth")}</div>'
            f"<figcaption>ground truth</figcaption></figure>"
        )
    choices = "".join(
        f'<label><input type="radio" name="zoom-{number}" value="{factor}"{" checked" if factor == 2 else ""}>{label}</label>'
        for factor, label in ((0, "whole"), (1, "1×"), (2, "2×"), (4, "4×"))
    )
    rows = "\n".join(views)
    hint = (
        '<p class="hint">Drag across the picture to compare. Click or tap it to choose the detail.</p>\n'
        if number == 1
        else ""
    )
    return f"""\
<div class="bar">
{hint}\
<fieldset class="zoom"><legend>Detail</legend>{choices}</fieldset>
</div>
<div class="views of-{len(views)}" role="group" aria-label="{escape(card.name)}: the same detail in every version, arrow keys move it">
{rows}
</div>"""


def _summary_table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lengths = sorted({len(row) for row in rows})
    if len(lengths) > 1:
        raise ValueError(f"the rows of summary must have one length, got {lengths}")
    names = [
        re.sub(r"\S+ [↑↓]$", r'<span class="metric">\g<0></span>', escape(cell)) for cell in rows[0]
    ]  # no break within "PSNR-Y ↑"
    header = "".join(f'<th scope="col">{name}</th>' for name in names)
    body = "\n".join(_row(row) for row in rows[1:])
    table = f"<table><thead><tr>{header}</tr></thead>\n<tbody>\n{body}\n</tbody></table>"
    return f'<div class="summary scroll" tabindex="0" role="region" aria-label="Summary">{table}</div>'


def _row(cells: Sequence[str]) -> str:
    head = "".join(f'<th scope="row">{escape(cell)}</th>' for cell in cells[:1])
    return f"<tr>{head}{''.join(f'<td>{escape(cell)}</td>' for cell in cells[1:])}</tr>"


def _histograms(histograms: Sequence[Histogram]) -> str:
    return f'<div class="histograms">{"".join(map(_histogram, histograms))}</div>' if histograms else ""


def _histogram(histogram: Histogram) -> str:
    """Return bars whose middle is zero, so that both sides are seen at their true weight."""
    reach = max(abs(value) for value in histogram.values) or 1.0
    counts = [0] * (2 * _BARS_A_SIDE)
    for value in histogram.values:
        counts[min(len(counts) - 1, int((value / reach + 1) * _BARS_A_SIDE))] += 1
    bars = "".join(
        f'<rect x="{10 * i + 1}" y="{100 - 100 * count / max(counts):.1f}" width="8" height="{100 * count / max(counts):.1f}" '
        f'class="{"good" if (i < _BARS_A_SIDE) == (histogram.better == "left") else "bad"}"/>'
        for i, count in enumerate(counts)
        if count
    )
    good = sum(value < 0 if histogram.better == "left" else value > 0 for value in histogram.values)
    title, found = escape(histogram.title), f"better in {good} of {len(histogram.values)}"
    low, high = (escape(histogram.shown(end)) for end in (-reach, reach))
    return f"""\
<figure class="histogram"><figcaption>{title}</figcaption>
<svg viewBox="0 0 {10 * len(counts)} 101" preserveAspectRatio="none" role="img" aria-label="{title}: {found}">
{bars}<path d="M0 100.5H{10 * len(counts)}M{10 * _BARS_A_SIDE} 0V100" class="axis"/></svg>
<p><span>{low}</span><span>{found}</span><span>{high}</span></p></figure>
"""


def _figures_table(figures: Mapping[str, tuple[str, str]], before_name: str) -> str:
    if not figures:
        return ""
    rows: list[str] = []
    for name, pair in figures.items():
        direction = _direction(name)
        label = f"{name.rstrip('↑↓ ')} {'↑' if direction > 0 else '↓'}" if direction else name
        better = _better(pair, direction)
        cells = [escape(value) for value in pair]
        if better is not None:
            cells[better] = f'<span class="better">better</span> <strong>{cells[better]}</strong>'
        rows.append(f'<tr><th scope="row">{escape(label)}</th><td>{cells[0]}</td><td>{cells[1]}</td></tr>')
    header = f'<thead><tr><th scope="col">metric</th><th scope="col">{before_name}</th><th scope="col">ours</th></tr></thead>'
    body = "\n".join(rows)
    return f'<div class="figures scroll"><table>{header}\n<tbody>\n{body}\n</tbody></table></div>'


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


def _fact_list(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    lines = "\n".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    return f'<dl class="facts">\n{lines}\n</dl>'
