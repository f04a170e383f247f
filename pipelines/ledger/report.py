"""What a bulk job did, from its ledger: report.json, report.csv (what did not become an output) and
report.html, next to the ledger.

DST/_resshift/runs/RUN.json        of every run that came to its end: wall clock, replica hours, busy share
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from pipelines.ledger import ledger
from pipelines.ledger.ledger import DIRECTORY
from resshift import storage
from resshift.storage import StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

_TEMPLATE = Path(__file__).with_name("report.html")
_CSV_COLUMNS = (
    "key",
    "status",
    "reason",
    "message",
    "etag",
    "size",
    "output",
    "width_in",
    "height_in",
    "attempts",
    "written_at",
)
_MAX_CSV_ROWS = 1_000_000
_MAX_PAGE_ROWS = 200
_NUM_BINS = 60


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """One run that ended by itself or by Ctrl-C.

    Fields:
        run: its id, which its rows carry.
        started, ended: wall clock.
        replica_seconds: ready replicas, summed over time.
        busy_share: of the replicas' time, spent in the model; None when there was nothing to do.
        facts: engine, versions, machine.
    """

    run: str
    started: float
    ended: float
    replica_seconds: float
    busy_share: float | None
    facts: Mapping[str, str]


@dataclass(slots=True)
class Summary:
    """Figures of all runs together. Sizes are of the ok rows."""

    counts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    megapixels_in: float = 0.0
    megapixels_out: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    model_seconds: float = 0.0
    wall_seconds: float = 0.0
    replica_hours: float = 0.0
    pictures_per_s: float | None = None
    megapixels_per_s: float | None = None
    replica_megapixels_per_s: float | None = None
    cost: float | None = None
    runs: list[dict[str, Any]] = field(default_factory=list)
    timeline: list[tuple[float, int]] = field(default_factory=list)


def write_run(root: str, record: RunRecord, options: S3Options = s3.DEFAULT) -> None:
    """Write the record of a run."""
    uri = storage.join(root, f"{DIRECTORY}/runs/{record.run}.json")
    storage.write_bytes(
        uri, (json.dumps(asdict(record), indent=1) + "\n").encode(), options, "application/json"
    )


def _runs(root: str, options: S3Options) -> list[dict[str, Any]]:
    try:
        entries = list(storage.list_entries(storage.join(root, f"{DIRECTORY}/runs"), options))
    except StorageError as error:
        if error.reason is not StorageReason.MISSING:
            raise
        return []
    return [
        json.loads(storage.read_bytes(entry.uri, options=options))
        for entry in entries
        if entry.key.endswith(".json")
    ]


def summarise(
    root: str, price_per_hour: float | None = None, options: S3Options = s3.DEFAULT
) -> tuple[Summary, list[dict[str, Any]]]:
    """Read the ledger once.

    Args:
        root: DST.
        price_per_hour: of one replica.
        options: how DST is reached.

    Returns:
        The figures, and the rows that are not ok (at most a million).
    """
    summary = Summary()
    others: list[dict[str, Any]] = []
    times: list[float] = []
    seconds_by_run: dict[str, float] = {}
    span_by_run: dict[str, tuple[float, float]] = {}
    for table in ledger.latest(root, options):
        for row in table.to_pylist():
            summary.counts[row["status"]] += 1
            times.append(row["written_at"])
            low, high = span_by_run.get(row["run"] or "", (row["written_at"], row["written_at"]))
            span_by_run[row["run"] or ""] = (min(low, row["written_at"]), max(high, row["written_at"]))
            seconds_by_run[row["run"] or ""] = seconds_by_run.get(row["run"] or "", 0.0) + (
                row["model_seconds"] or 0.0
            )
            if row["status"] == "ok":
                summary.megapixels_in += row["width_in"] * row["height_in"] * (row["frames"] or 1) / 1e6
                summary.megapixels_out += row["width_out"] * row["height_out"] * (row["frames"] or 1) / 1e6
                summary.bytes_in += row["bytes_in"]
                summary.bytes_out += row["bytes_out"]
                summary.model_seconds += row["model_seconds"] or 0.0
                summary.notes.update(_kinds(row["notes"]))
            else:
                summary.counts[f"{row['status']}: {row['reason']}"] += 1
                if len(others) < _MAX_CSV_ROWS:
                    others.append(row)
    summary.runs = _runs(root, options)
    known = {run["run"] for run in summary.runs}
    # A run that was killed left no record: its rows tell its time, and what its replicas worked is what is
    # known of them.
    unknown = [run for run in span_by_run if run not in known]
    summary.wall_seconds = sum(run["ended"] - run["started"] for run in summary.runs) + sum(
        span_by_run[run][1] - span_by_run[run][0] for run in unknown
    )
    replica_seconds = sum(run["replica_seconds"] for run in summary.runs) + sum(
        seconds_by_run[run] for run in unknown
    )
    summary.replica_hours = replica_seconds / 3600
    if summary.wall_seconds > 0:
        summary.pictures_per_s = summary.counts["ok"] / summary.wall_seconds
        summary.megapixels_per_s = summary.megapixels_in / summary.wall_seconds
    if summary.model_seconds > 0:
        summary.replica_megapixels_per_s = summary.megapixels_in / summary.model_seconds
    summary.cost = None if price_per_hour is None else summary.replica_hours * price_per_hour
    summary.timeline = _timeline(times)
    return summary, others


def _kinds(notes: str | None) -> Iterable[str]:
    """Return the notes of a row without their numbers, so that they can be counted."""
    return {
        "".join("N" if c.isdigit() else c for c in note).replace("NN", "N")
        for note in (notes or "").split("; ")
        if note
    }


def _timeline(times: Sequence[float]) -> list[tuple[float, int]]:
    """Return (seconds since the first row, rows) of equal spans; rows carry the time of their part."""
    if not times:
        return []
    first, last = min(times), max(times)
    width = max((last - first) / _NUM_BINS, 1e-9)
    bins = Counter(min(_NUM_BINS - 1, int((t - first) / width)) for t in times)
    return [(round(i * width, 1), bins[i]) for i in range(_NUM_BINS)] if last > first else [(0.0, len(times))]


def write_report(
    root: str, job: Mapping[str, Any], price_per_hour: float | None, options: S3Options = s3.DEFAULT
) -> Summary:
    """Write the three files and return the figures.

    Args:
        root: DST.
        job: options of the job, for the page.
        price_per_hour: of one replica.
        options: how DST is reached.
    """
    summary, others = summarise(root, price_per_hour, options)
    files = {
        "report.json": (
            to_json(summary, job),
            "application/json",
        ),
        "report.csv": (to_csv(others), "text/csv; charset=utf-8"),
        "report.html": (page(root, summary, others, job, price_per_hour), "text/html; charset=utf-8"),
    }
    for name, (text, content_type) in files.items():
        data = text.encode("utf-8", "backslashreplace")
        storage.write_bytes(storage.join(root, f"{DIRECTORY}/{name}"), data, options, content_type)
    return summary


def to_json(summary: Summary, job: Mapping[str, Any]) -> str:
    """Return the figures and the options of the job."""
    values = {one.name: getattr(summary, one.name) for one in fields(summary)}  # asdict cannot copy a Counter
    return json.dumps({"job": dict(job)} | values, indent=1) + "\n"


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line a row: what failed or was skipped, and why."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_CSV_COLUMNS)
    writer.writerows([row[name] for name in _CSV_COLUMNS] for row in rows)
    return out.getvalue()


def page(
    root: str,
    summary: Summary,
    others: Sequence[Mapping[str, Any]],
    job: Mapping[str, Any],
    price_per_hour: float | None,
) -> str:
    """Return the HTML page; it loads nothing and runs no script."""
    total = sum(summary.counts[status] for status in ("ok", "failed", "skipped"))
    figures = {
        "inputs": f"{total:,}",
        "upscaled": f"{summary.counts['ok']:,}",
        "failed": f"{summary.counts['failed']:,}",
        "skipped": f"{summary.counts['skipped']:,}",
        "megapixels in → out": f"{summary.megapixels_in:,.1f} → {summary.megapixels_out:,.1f}",
        "bytes in → out": f"{_size(summary.bytes_in)} → {_size(summary.bytes_out)}",
        "pictures / s": _number(summary.pictures_per_s),
        "input megapixels / s": _number(summary.megapixels_per_s),
        "replica hours": _number(summary.replica_hours),
        "cost": "–"
        if summary.cost is None
        else f"{summary.cost:,.2f} (at {price_per_hour:g} per replica hour)",
    }
    reasons = sorted(
        ((name, count) for name, count in summary.counts.items() if ": " in name), key=lambda pair: -pair[1]
    )
    ended = max((run["ended"] for run in summary.runs), default=0.0)
    return Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(storage.printable(root)),
        when=datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%d %H:%M UTC") if ended else "",
        figures="".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in figures.items()
        ),
        bar=_bar(summary, total),
        chart=_chart(summary.timeline),
        reasons=_table(("reason", "inputs"), [(name, f"{count:,}") for name, count in reasons]),
        notes=_table(
            ("note", "pictures"), [(name, f"{count:,}") for name, count in summary.notes.most_common(30)]
        ),
        failures=_table(
            ("input", "reason", "message"),
            [(r["key"], r["reason"], r["message"]) for r in others[:_MAX_PAGE_ROWS]],
        ),
        more=f"<p>{len(others) - _MAX_PAGE_ROWS:,} more in report.csv</p>"
        if len(others) > _MAX_PAGE_ROWS
        else "",
        runs=_table(
            ("run", "began", "wall clock", "replica hours", "replicas busy", "with"),
            [
                (
                    run["run"],
                    datetime.fromtimestamp(run["started"], UTC).strftime("%Y-%m-%d %H:%M:%S"),
                    f"{run['ended'] - run['started']:,.0f} s",
                    f"{run['replica_seconds'] / 3600:.3f}",
                    "–" if run["busy_share"] is None else f"{100 * run['busy_share']:.1f} %",
                    ", ".join(f"{name} {value}" for name, value in run["facts"].items()),
                )
                for run in summary.runs
            ],
        ),
        job=_table(("option", "value"), [(name, json.dumps(value)) for name, value in job.items()]),
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.3g}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def _bar(summary: Summary, total: int) -> str:
    shares = {status: 100 * summary.counts[status] / max(1, total) for status in ("ok", "skipped", "failed")}
    return "".join(
        f'<i class="{status}" style="width:{share:.3f}%"></i>' for status, share in shares.items() if share
    )


def _chart(timeline: Sequence[tuple[float, int]]) -> str:
    """Return the rows over time as an SVG of bars."""
    highest = max((count for _, count in timeline), default=0)
    if not highest or len(timeline) < 2:
        return ""
    width = 720 / len(timeline)
    heights = [80 * count / highest for _, count in timeline]
    bars = "".join(
        f'<rect x="{i * width:.1f}" y="{80 - height:.1f}" width="{max(1.0, width - 1):.1f}" height="{height:.1f}"/>'
        for i, height in enumerate(heights)
    )
    axis = f'<p class="axis">rows over {timeline[-1][0]:,.0f} s</p>'
    return f'<svg viewBox="0 0 720 80" role="img" aria-label="rows over time">{bars}</svg>{axis}'


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    if not rows:
        return "<p>none</p>"
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
