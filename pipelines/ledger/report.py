"""What a bulk job did, from its ledger: report.json, report.csv (what did not become an output) and
report.html, with some of the pictures (`pipelines.ledger.pictures`), next to the ledger.

DST/_resshift/runs/RUN.json        of every run that came to its end: wall clock, replica hours, busy share

The ledger is read part by part and never held: memory depends on the size of a part, on how many keys have
several rows (`ledger.latest`) and on how many rows have no output (a million are kept), not on the number of
inputs. All figures are exact except the times of the timeline, which are rounded to milliseconds, or in long
jobs to a two-thousandth of the job.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from pipelines.ledger import ledger
from pipelines.ledger.ledger import DIRECTORY
from pipelines.ledger.pictures import Card, Places, Sample, cards
from pipelines.pages import render
from pipelines.spreadsheet import cell
from resshift import storage
from resshift.storage import StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

pc: Any = pyarrow.compute  # makes its functions when it is imported: type checkers know none of them
_CSV_COLUMNS = [
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
]
_COLUMNS = [
    *_CSV_COLUMNS,
    *("frames", "width_out", "height_out", "bytes_in", "bytes_out", "notes", "model_seconds", "run"),
]
_ROWS_AT_ONCE = 10_000
_MAX_CSV_ROWS = 1_000_000
_MAX_PAGE_ROWS = 200
_NUM_BINS = 60
_MOST_SPANS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """One run that ended by itself or by Ctrl-C.

    Fields:
        run: Id of the run, which its rows carry.
        started, ended: Unix times at which it started and ended.
        replica_seconds: Number of ready replicas, summed over time in seconds.
        busy_share: Share of the replicas' time that was spent in the model; None when there was nothing to
            do.
        facts: Versions and machine, for readers.
    """

    run: str
    started: float
    ended: float
    replica_seconds: float
    busy_share: float | None
    facts: Mapping[str, str]


@dataclass(slots=True)
class JobSummary:
    """Figures of all runs together. Sizes are of the ok rows; notes are counted without their numbers, and
    `examples` has one of each kind as it is.
    """

    counts: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict[str, str])
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
    root: str,
    price_per_hour: float | None = None,
    options: S3Options = s3.DEFAULT,
    see: Callable[[pa.Table], None] = lambda _: None,
) -> tuple[JobSummary, pa.Table]:
    """Sum up the latest row of every key.

    Args:
        root: DST.
        price_per_hour: Price of one replica for an hour.
        options: How DST is reached.
        see: Function that is called with the ok rows of each part.

    Returns:
        The figures, and the rows that are not ok with the columns of report.csv (at most a million).
    """
    summary = JobSummary()
    timeline = _Timeline()
    rows_by_run: dict[str, _RunRows] = {}
    others = [ledger.SCHEMA.empty_table().select(_CSV_COLUMNS)]
    num_others = 0
    for table in ledger.latest(root, options, _COLUMNS):
        is_ok = pc.equal(table["status"], "ok")
        _add_reasons(summary.counts, table)
        ok = table.filter(is_ok)
        _add_sizes(summary, ok)
        see(ok)
        timeline.add(table["written_at"])
        _add_runs(rows_by_run, table)
        rest = table.filter(pc.invert(is_ok)).select(_CSV_COLUMNS).slice(0, _MAX_CSV_ROWS - num_others)
        num_others += rest.num_rows
        others.append(rest)
    summary.runs = _runs(root, options)
    known = {run["run"] for run in summary.runs}
    # A run that was killed left no record: its rows tell its time, and what its replicas worked is what is
    # known of them.
    unknown = [rows for run, rows in rows_by_run.items() if run not in known]
    summary.wall_seconds = sum(run["ended"] - run["started"] for run in summary.runs) + sum(
        rows.last - rows.first for rows in unknown
    )
    replica_seconds = sum(run["replica_seconds"] for run in summary.runs) + sum(
        rows.model_seconds for rows in unknown
    )
    summary.replica_hours = replica_seconds / 3600
    if summary.wall_seconds > 0:
        summary.pictures_per_s = summary.counts["ok"] / summary.wall_seconds
        summary.megapixels_per_s = summary.megapixels_in / summary.wall_seconds
    if summary.model_seconds > 0:
        summary.replica_megapixels_per_s = summary.megapixels_in / summary.model_seconds
    summary.cost = None if price_per_hour is None else summary.replica_hours * price_per_hour
    summary.timeline = timeline.bins()
    return summary, pa.concat_tables(others)


@dataclass(slots=True)
class _RunRows:
    """What the rows of a run tell about it.

    Fields:
        first, last: Unix times at which its first and its last rows were written.
        model_seconds: Time in the model, over all rows.
    """

    first: float
    last: float
    model_seconds: float


def _add_reasons(counts: Counter[str], table: pa.Table) -> None:
    """Count rows by status, and those that are not ok by reason ("failed: truncated") too."""
    groups = table.group_by(["status", "reason"], use_threads=False).aggregate([([], "count_all")])
    for group in groups.to_pylist():
        counts[group["status"]] += group["count_all"]
        if group["status"] != "ok":
            counts[f"{group['status']}: {group['reason']}"] += group["count_all"]


def _add_sizes(summary: JobSummary, ok: pa.Table) -> None:
    """Add sizes, seconds and notes of rows that are ok."""
    frames = pc.max_element_wise(ok["frames"], pa.scalar(1))  # 1 where it is not known
    for side in ("in", "out"):
        width, height = (ok[f"{what}_{side}"].cast(pa.int64()) for what in ("width", "height"))
        pixels = _sum(pc.multiply(pc.multiply(width, height), frames))
        setattr(summary, f"megapixels_{side}", getattr(summary, f"megapixels_{side}") + pixels / 1e6)
    summary.bytes_in += _sum(ok["bytes_in"])
    summary.bytes_out += _sum(ok["bytes_out"])
    summary.model_seconds += _sum(ok["model_seconds"])
    for notes, num in _value_counts(ok["notes"]).items():
        for kind, note in _kinds(notes).items():
            summary.notes[kind] += num
            summary.examples.setdefault(kind, note)


def _add_runs(rows_by_run: dict[str, _RunRows], table: pa.Table) -> None:
    """Add the times of rows to those of their runs; rows of no run count as those of a run ""."""
    groups = table.group_by("run", use_threads=False).aggregate(
        [("written_at", "min"), ("written_at", "max"), ("model_seconds", "sum")]
    )
    for group in groups.to_pylist():
        first, last = group["written_at_min"], group["written_at_max"]
        rows = rows_by_run.setdefault(group["run"] or "", _RunRows(first, last, 0.0))
        rows.first, rows.last = min(rows.first, first), max(rows.last, last)
        rows.model_seconds += group["model_seconds_sum"] or 0.0


def _sum(values: pa.ChunkedArray) -> Any:
    return pc.sum(values, min_count=0).as_py()


def _value_counts(values: pa.ChunkedArray) -> dict[Any, int]:
    """Return how often each value occurs; nulls are left out."""
    counted = pc.value_counts(values.drop_null())
    return dict(zip(counted.field("values").to_pylist(), counted.field("counts").to_pylist(), strict=True))


def _kinds(notes: str) -> dict[str, str]:
    """Return the notes of a row by what they are without their numbers, so that they can be counted."""
    kinds = {
        "".join("N" if c.isdigit() else c for c in note).replace("NN", "N"): note
        for note in notes.split("; ")
    }
    kinds.pop("", None)
    return kinds


class _Timeline:
    """Counts rows in equal spans of time, whose length doubles when there are too many of them."""

    def __init__(self) -> None:
        self._doublings = 0  # of a millisecond
        self._counts: Counter[int] = Counter()

    def add(self, times: pa.ChunkedArray) -> None:
        """Count rows by their Unix times; nulls are left out."""
        milliseconds = np.rint(1000 * times.drop_null().to_numpy()).astype(np.int64)
        spans, counts = np.unique(milliseconds >> self._doublings, return_counts=True)
        self._counts.update(dict(zip(spans.tolist(), counts.tolist(), strict=True)))
        while len(self._counts) > _MOST_SPANS:
            self._doublings += 1
            halved: Counter[int] = Counter()
            for span, count in self._counts.items():
                halved[span >> 1] += count
            self._counts = halved

    def bins(self) -> list[tuple[float, int]]:
        """Return (seconds since the first row, rows) of equal parts of the time."""
        counts = {(span << self._doublings) / 1000: count for span, count in self._counts.items()}
        if len(counts) < 2:
            return [(0.0, count) for count in counts.values()]
        first, last = min(counts), max(counts)
        width = (last - first) / _NUM_BINS
        bins: Counter[int] = Counter()
        for t, count in counts.items():
            bins[min(_NUM_BINS - 1, int((t - first) / width))] += count
        return [(round(i * width, 1), bins[i]) for i in range(_NUM_BINS)]


def write_report(
    root: str,
    job: Mapping[str, Any],
    price_per_hour: float | None,
    options: S3Options = s3.DEFAULT,
    places: Places | None = None,
) -> JobSummary:
    """Write the three files and return the figures.

    Args:
        root: DST.
        job: Options of the job, for the page.
        price_per_hour: Price of one replica for an hour.
        options: How DST is reached.
        places: Where the pictures are; None: the page has none.
    """
    sample = Sample()
    summary, others = summarise(root, price_per_hour, options, sample.add)
    shown = [] if places is None else cards(sample.rows(), places)
    html = page(root, summary, others, job, price_per_hour, shown, places)
    for name, data, content_type in (
        ("report.json", to_json(summary, job).encode(), "application/json"),
        ("report.csv", to_csv(others), "text/csv; charset=utf-8"),
        ("report.html", html.encode("utf-8", "backslashreplace"), "text/html; charset=utf-8"),
    ):
        storage.write_bytes(storage.join(root, f"{DIRECTORY}/{name}"), data, options, content_type)
    return summary


def to_json(summary: JobSummary, job: Mapping[str, Any]) -> str:
    """Return the figures and the options of the job."""
    values = {one.name: getattr(summary, one.name) for one in fields(summary)}  # asdict cannot copy a Counter
    del values["examples"]
    return json.dumps({"job": dict(job)} | values, indent=1) + "\n"


def to_csv(others: pa.Table) -> bytes:
    """Return one line a row in UTF-8: what failed or was skipped, and why."""
    data = io.BytesIO()
    with io.TextIOWrapper(data, "utf-8", newline="", write_through=True) as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(others.column_names)
        for batch in others.to_batches(max_chunksize=_ROWS_AT_ONCE):
            writer.writerows(map(cell, row.values()) for row in batch.to_pylist())
        return data.getvalue()


def page(
    root: str,
    summary: JobSummary,
    others: pa.Table,
    job: Mapping[str, Any],
    price_per_hour: float | None,
    pictures: Sequence[Card] = (),
    places: Places | None = None,
) -> str:
    """Return the HTML page; it loads nothing and runs no script."""
    total = sum(summary.counts[status] for status in ("ok", "failed", "skipped"))
    figures = {
        "inputs": f"{total:,}",
        "upscaled": f"{summary.counts['ok']:,}",
        "failed": f"{summary.counts['failed']:,}",
        "skipped": f"{summary.counts['skipped']:,}",
        "megapixels in → out": f"{_number(summary.megapixels_in)} → {_number(summary.megapixels_out)}",
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
    return render(
        "ledger/report.html",
        title=storage.printable(root),
        when=datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%d %H:%M UTC") if ended else "",
        figures=figures,
        bar=_bar(summary, total),
        chart=_chart(summary.timeline),
        seconds=f"{summary.timeline[-1][0]:,.0f}" if summary.timeline else "",
        reasons=[(name, f"{count:,}") for name, count in reasons],
        notes=[(summary.examples[kind], f"{count:,}") for kind, count in summary.notes.most_common(30)],
        failures=[
            (row["key"], places and places.link_to_input(row["key"]), row["reason"], row["message"])
            for row in others.slice(0, _MAX_PAGE_ROWS).to_pylist()
        ],
        pictures=pictures,
        num_more=others.num_rows - _MAX_PAGE_ROWS,
        runs=[
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
        job=[(name, _printed(value)) for name, value in job.items()],
    )


def _printed(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"  # never 1.2e+03


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def _bar(summary: JobSummary, total: int) -> list[dict[str, Any]]:
    """Return the shares of the statuses one after the other, in percent."""
    parts: list[dict[str, Any]] = []
    start = 0.0
    for status in ("ok", "skipped", "failed"):
        share = 100 * summary.counts[status] / max(1, total)
        parts += [{"status": status, "start": start, "share": share}] if share else []
        start += share
    return parts


def _chart(timeline: Sequence[tuple[float, int]]) -> list[dict[str, float]]:
    """Return the rows over time as bars in a field of 720 x 80."""
    highest = max((count for _, count in timeline), default=0)
    if not highest or len(timeline) < 2:
        return []
    width = 720 / len(timeline)
    return [
        {"x": i * width, "width": max(1.0, width - 1), "height": 80 * count / highest}
        for i, (_, count) in enumerate(timeline)
    ]
