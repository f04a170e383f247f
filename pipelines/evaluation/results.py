"""What an evaluation found: means with intervals, paired differences, tables, and the files that hold them.

    OUT/summary.json     what was found, and how to repeat it
    OUT/report.csv       a line for each picture
    OUT/records.jsonl    the records from which all of it is made
    OUT/report.html      the table, histograms and pictures

Everything here is a function of the records, so reports of parts of a test set merge into the report of the
whole. A difference is taken picture by picture: what makes one picture harder than another cancels, and its
interval is far narrower than those of the two means. How sure a mean over pictures is: percentile bootstrap
(Efron 1979); pictures are drawn again with replacement, always the same draws.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NotRequired, TypedDict

import numpy as np

from pipelines.evaluation.figures import FIGURES
from pipelines.evaluation.page import Card, Histogram, comparison_page
from pipelines.evaluation.protocols import Protocol, reproduced
from pipelines.spreadsheet import cell
from resshift import seeds, storage

Method = Literal["bicubic", "against", "ours"]
METHODS: tuple[Method, ...] = ("bicubic", "against", "ours")
MOST_PICTURES_ON_THE_PAGE = 32
NUM_WORST = 10
LEVEL = 0.95
RESAMPLES = 10_000
_AT_A_TIME = 500  # resamples in memory: 3,000 pictures then take 12 MB
_VERSIONS = ("resshift", "torch", "numpy", "opencv-python-headless", "pillow", "lpips")


class Record(TypedDict):
    """What was measured on one picture: a line of records.jsonl.

    A picture that failed has no figures, one without a truth has fewer.

    Fields:
        set: Name of its test set; reports from before there were sets have none.
        key: Name of the picture in the set.
        status, reason, message: Whether it could be measured, and why not.
        seconds: Seconds that the model took.
        width, height: Size of the result in pixels.
        device: Type of the device that computed it.
        bicubic, against, ours: Figures of each method by name, see `FIGURES`.
    """

    set: NotRequired[str]
    key: str
    status: Literal["ok", "failed"]
    reason: str
    message: str
    seconds: NotRequired[float]
    width: NotRequired[int]
    height: NotRequired[int]
    device: NotRequired[str]
    bicubic: NotRequired[dict[str, float]]
    against: NotRequired[dict[str, float]]
    ours: NotRequired[dict[str, float]]


class MergeError(ValueError):
    """Reports that do not belong together; the message says why."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, and the bounds between which it lies with a confidence of 95 %; None for fewer than two
    pictures or infinite figures.
    """

    mean: float
    low: float | None
    high: float | None


def bootstrap(values: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    """Return the mean of at least one value with its interval; a pure function of the values in their order.

    Raises:
        ValueError: There are no values.
    """
    if not len(values):
        raise ValueError("a mean needs at least one value")
    sample = np.asarray(values, np.float64)
    mean = float(sample.mean())
    if len(sample) < 2 or not np.isfinite(mean):
        return Interval(mean, None, None)
    rng = seeds.philox("bootstrap", len(sample))
    means = np.empty(resamples)
    for start in range(0, resamples, _AT_A_TIME):
        count = min(_AT_A_TIME, resamples - start)
        means[start : start + count] = sample[rng.integers(len(sample), size=(count, len(sample)))].mean(
            axis=1
        )
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high))


def reference_of(records: Sequence[Record]) -> Method:
    """Return what ours is compared with: the other model when there is one, else bicubic."""
    return "against" if any("against" in record for record in records) else "bicubic"


def measured(records: Sequence[Record]) -> list[str]:
    """Return the names of the figures that any picture has, in the order of `FIGURES`."""
    found = {name for record in records for name in record.get("ours", {})}
    return [name for name in FIGURES if name in found]


def means(records: Sequence[Record]) -> dict[str, dict[str, Interval]]:
    """Return {method: {figure: mean with interval}} over the pictures that have the figure."""
    result: dict[str, dict[str, Interval]] = {}
    for method in METHODS:
        rows = [row for record in records if (row := record.get(method)) is not None]
        values = {name: [row[name] for row in rows if name in row] for name in FIGURES}
        if rows:
            result[method] = {name: bootstrap(column) for name, column in values.items() if column}
    return result


def differences(records: Sequence[Record]) -> dict[str, list[float]]:
    """Return {figure: [ours - reference]} over the pictures in which both are finite."""
    reference = reference_of(records)
    found: dict[str, list[float]] = {}
    for record in records:
        ours, other = record.get("ours", {}), record.get(reference, {})
        for name in FIGURES:
            if name in ours and name in other and abs(difference := ours[name] - other[name]) < float("inf"):
                found.setdefault(name, []).append(difference)
    return found


def identity(record: Record) -> str:
    """Return set and key of a record as one name."""
    name = record.get("set")
    return f"{name}/{record['key']}" if name else record["key"]


def by_set(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Return the records of each set, sets and pictures in order of name."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.get("set", ""), record["key"])):
        found.setdefault(record.get("set", ""), []).append(record)
    return found


def worst(records: Sequence[Record], count: int = NUM_WORST) -> list[Record]:
    """Return the pictures on which ours did worst, worst first: by LPIPS if it was measured, else by PSNR-Y;
    none without a truth.
    """
    for name in ("lpips", "psnr_y"):
        rows = [record for record in records if name in record.get("ours", {})]
        if rows:
            is_descending = not FIGURES[name].higher_is_better
            return sorted(rows, key=lambda row: row.get("ours", {})[name], reverse=is_descending)[:count]
    return []


def on_the_page(records: Sequence[Record]) -> list[tuple[Record, str]]:
    """Return the pictures that a page shows, each with a note: the worst ones first, then others in order of
    name, 32 at most.
    """
    usable = [
        record for members in by_set(records).values() for record in members if record["status"] == "ok"
    ]
    lowest = worst(usable) if len(usable) > NUM_WORST else []
    chosen = [(record, f"number {place} of the worst") for place, record in enumerate(lowest, start=1)]
    taken = {identity(record) for record in lowest}
    others = [(record, "") for record in usable if identity(record) not in taken]
    return chosen + others[: MOST_PICTURES_ON_THE_PAGE - len(chosen)]


class Gallery:
    """Records of an evaluation, and the pictures of those that a page may show.

    A picture that is not on the page of some records is not on the page of more: what is held does not grow
    with the test set.
    """

    def __init__(self) -> None:
        self.records: list[Record] = []
        self._pictures: dict[str, Mapping[str, bytes]] = {}

    def add(self, record: Record, pictures: Mapping[str, bytes]) -> None:
        """Take the record and the encoded pictures of one input."""
        self.records.append(record)
        self._pictures[identity(record)] = pictures
        if len(self._pictures) > 2 * MOST_PICTURES_ON_THE_PAGE:
            names = {identity(one) for one, _ in on_the_page(self.records)}
            self._pictures = {name: held for name, held in self._pictures.items() if name in names}

    def cards(self, names: Mapping[str, str]) -> list[Card]:
        """Return the cards of the page.

        Args:
            names: Names of the methods.
        """
        chosen = on_the_page(self.records)
        return [card(record, self._pictures[identity(record)], names, note) for record, note in chosen]


def summary(
    records: Sequence[Record], facts: Mapping[str, Any], protocol: Protocol | None, model: str
) -> dict[str, Any]:
    """Return summary.json: the same for the same records, whoever computed them and in whatever order.

    Args:
        records: Records of all pictures.
        facts: Facts that a reader needs to repeat the run: model, settings, versions.
        protocol: Protocol by which the pictures were measured, if any.
        model: Name of the model, for the comparison with what was published for it.
    """
    sets: dict[str, Any] = {}
    for name, rows in by_set(records).items():
        found = means(rows)
        entry: dict[str, Any] = {
            "pictures": len(rows),
            "failed": sum(row["status"] != "ok" for row in rows),
            "means": {
                method: {figure: asdict(value) for figure, value in columns.items()}
                for method, columns in found.items()
            },
            "difference": {figure: asdict(bootstrap(column)) for figure, column in differences(rows).items()},
        }
        if protocol is not None and "ours" in found:
            ours = {figure: value.mean for figure, value in found["ours"].items()}
            entry["reproduced"] = {
                figure: asdict(result) | {"agrees": result.agrees}
                for figure, result in reproduced(protocol, model, ours).items()
            }
        sets[name] = entry
    devices = sorted({record["device"] for record in records if "device" in record})
    return {
        **facts,
        "protocol": protocol.name if protocol else None,
        "devices": devices,
        "reference": reference_of(records),
        "sets": sets,
    }


def versions() -> dict[str, str]:
    """Return the versions of everything that figures depend on."""
    found = {"python": platform.python_version()}
    for package in _VERSIONS:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def table(
    records: Sequence[Record], names: Mapping[str, str], protocol: Protocol | None = None
) -> list[list[str]]:
    """Return a table with a header row, one line a figure of a set.

    Args:
        records: Records of all pictures.
        names: Names of the methods in the header: bicubic, against, ours.
        protocol: Protocol whose published methods get a column each.
    """
    reference = reference_of(records)
    methods = [method for method in METHODS if method != "against" or reference == "against"]
    anchors = protocol.anchors if protocol else ()
    header = ["", *(names[method] for method in methods), f"{names['ours']} - {names[reference]}, 95 %"]
    rows = [header + [f"{anchor.method} (published)" for anchor in anchors]]
    sets = by_set(records)
    for name, members in sets.items():
        found, paired = means(members), differences(members)
        for figure in measured(members):
            shown = FIGURES[figure].shown
            cells = [
                shown(found[method][figure].mean) if figure in found.get(method, {}) else ""
                for method in methods
            ]
            label = FIGURES[figure].label if len(sets) == 1 else f"{name}: {FIGURES[figure].label}"
            published = [
                shown(anchor.figures[figure]) if figure in anchor.figures else "" for anchor in anchors
            ]
            rows.append([label, *cells, _shown_difference(figure, paired.get(figure, [])), *published])
    return rows


def _shown_difference(figure: str, column: Sequence[float]) -> str:
    if not column:
        return ""
    interval, form = bootstrap(column), FIGURES[figure].difference
    if interval.low is None or interval.high is None:
        return form(interval.mean)
    return f"{form(interval.mean)} [{form(interval.low).split()[0]}, {form(interval.high).split()[0]}]"


def histograms(records: Sequence[Record], names: Mapping[str, str]) -> list[Histogram]:
    """Return how the paired differences of each figure are spread."""
    reference = names[reference_of(records)]
    return [
        Histogram(
            title=f"{FIGURES[figure].label}: {names['ours']} - {reference}",
            values=tuple(column),
            shown=FIGURES[figure].difference,
            better="right" if FIGURES[figure].higher_is_better else "left",
        )
        for figure, column in differences(records).items()
        if len(column) > 1
    ]


def card(
    record: Record,
    pictures: Mapping[str, bytes],
    names: Mapping[str, str],
    note: str = "",
    name: str | None = None,
) -> Card:
    """Return a picture's card for the page."""
    reference = reference_of([record])
    before, ours = record.get(reference, {}), record.get("ours", {})
    figures = {
        figure.label: (figure.shown(before[name]), figure.shown(ours[name]))
        for name, figure in FIGURES.items()
        if name in before and name in ours
    }
    return Card(
        name=name or identity(record),
        lq=pictures["lq"],
        before=pictures[reference],
        before_name=names[reference],
        ours=pictures["ours"],
        gt=pictures["gt"] or None,
        figures=figures,
        note=" · ".join(part for part in (f"{record.get('seconds', 0.0):.1f} s", note) if part),
    )


def to_csv(records: Sequence[Record]) -> str:
    """Return one line a picture: set, key, status, reason, size, seconds, and every figure of every
    method.
    """
    columns = ["set", "key", "status", "reason", "width", "height", "seconds"]
    columns += [f"{figure}_{method}" for figure in measured(records) for method in METHODS]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        flat = {
            f"{name}_{method}": value for method in METHODS for name, value in record.get(method, {}).items()
        }
        writer.writerow({name: cell(value) for name, value in (dict(record) | flat).items()})
    return out.getvalue()


def to_lines(records: Sequence[Record]) -> str:
    """Return records.jsonl."""
    return "".join(json.dumps(record) + "\n" for record in records)


def read(root: str) -> tuple[dict[str, Any], list[Record]]:
    """Return the facts and the records of a report.

    Raises:
        StorageError: The report cannot be read.
    """
    found = json.loads(storage.read_bytes(storage.join(root, "summary.json")))
    lines = storage.read_bytes(storage.join(root, "records.jsonl")).decode().splitlines()
    facts = {name: found[name] for name in ("model", "against", "names", "settings", "versions")}
    return facts, [json.loads(line) for line in lines]


def merged(
    parts: Sequence[tuple[str, Mapping[str, Any], Sequence[Record]]],
) -> tuple[dict[str, Any], list[Record]]:
    """Join reports of parts of one evaluation.

    Args:
        parts: Place, facts and records of each report.

    Returns:
        The facts that they share, and all records.

    Raises:
        MergeError: The reports differ in model, settings or versions, or a picture is in two of them.
    """
    (first, facts, _), *others = parts
    for where, other, _ in others:
        different = sorted(name for name in facts.keys() | other.keys() if facts.get(name) != other.get(name))
        if different:
            raise MergeError(
                f"{first} and {where} differ in {', '.join(different)}: figures of the two cannot be averaged"
            )
    seen: dict[str, str] = {}
    for where, _, records in parts:
        for record in records:
            if identity(record) in seen:
                raise MergeError(f"{identity(record)} is in {seen[identity(record)]} and in {where}")
            seen[identity(record)] = where
    return dict(facts), [record for _, _, records in parts for record in records]


@dataclass(frozen=True, slots=True)
class Written:
    """What a report says.

    Fields:
        table: Its table with a header row.
        failed: Name and record of each picture without figures.
    """

    table: list[list[str]]
    failed: list[tuple[str, Record]]

    def lines(self) -> list[str]:
        """Return the table in columns, and a line for each picture without figures."""
        widths = [max(len(row[i]) for row in self.table) for i in range(len(self.table[0]))]
        aligned = [
            [
                cell.rjust(width) if i else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            for row in self.table
        ]
        failed = [
            f"failed {name}: {record['reason']}: {record['message'].splitlines()[-1]}"
            for name, record in self.failed
        ]
        return ["  ".join(row) for row in aligned] + failed


def write(
    out: str,
    facts: Mapping[str, Any],
    records: Sequence[Record],
    protocol: Protocol | None,
    cards: Sequence[Card],
) -> Written:
    """Write the report; summary.json last, so that a report that has one is whole.

    Args:
        out: Directory of the report.
        facts: The entries model, against, names (of the methods), settings and versions of summary.json.
        records: Records of all pictures.
        protocol: Protocol by which they were measured, if any.
        cards: Pictures on the page.
    """
    model, names, settings = facts["model"], facts["names"], facts["settings"]
    comparable = protocol.measured_with(settings["lpips_net"]) if protocol else None
    sets = by_set(records)
    ordered = [record for members in sets.values() for record in members]
    failed = [(identity(record), record) for record in ordered if record["status"] != "ok"]
    num_ok = len(ordered) - len(failed)
    rows = table(ordered, names, comparable)

    shown = {name: str(value) for name, value in settings.items() if value not in (None, [], ())}
    if protocol and protocol.pictures not in (None, num_ok):
        shown["published figures"] = f"means of {protocol.pictures} pictures; these are of {num_ok}"
    installed = {name: value for name, value in facts["versions"].items() if name in ("resshift", "torch")}
    page = comparison_page(
        title=f"{names['ours']} on {', '.join(sets)}",
        lead=(
            f"{num_ok} pictures, upscaled {model['scale']}x. Bicubic is MATLAB's imresize. Intervals: 95 %, "
            "by bootstrap over pictures."
        ),
        cards=cards,
        summary=rows if len(rows) > 1 else (),
        histograms=histograms(ordered, names),
        facts={"model": f"{model['name']} ({model['identity']}), steps: {model['steps']}"}
        | shown
        | installed,
    )
    found = summary(ordered, facts, comparable, model["name"])
    for name, text in (
        ("report.csv", to_csv(ordered)),
        ("records.jsonl", to_lines(ordered)),
        ("report.html", page),
        ("summary.json", json.dumps(found, indent=2) + "\n"),
    ):
        storage.write_bytes(storage.join(out, name), text.encode())
    return Written(rows, failed)
