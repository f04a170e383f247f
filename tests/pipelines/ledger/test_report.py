"""The report, with figures worked out by hand."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.bulk.stages import UpscaleOptions
from pipelines.ledger import ledger
from pipelines.ledger.ledger import Row
from pipelines.ledger.report import RunRecord, page, summarise, to_csv, write_report, write_run

Encode = Callable[..., bytes]
JOB = UpscaleOptions(model="nearest-x4", identity="nearest-x4", scale=4)


def ok(key: str, **values: Any) -> Row:
    sizes = {
        "width_in": 1000,
        "height_in": 500,
        "width_out": 4000,
        "height_out": 2000,
        "bytes_in": 10,
        "bytes_out": 70,
        "frames": 1,
    }
    common = {"output": f"{key}_x4", "model_seconds": 2.0, "run": "r1"}
    return ledger.row(key, "e", "ok", **(common | sizes | values))


@pytest.fixture
def root(tmp_path: Path) -> str:
    out = str(tmp_path / "out")
    ledger.append(
        out,
        [
            ok("a"),
            ok("b", notes="orientation 6 applied"),
            ok("c", notes="orientation 8 applied; EXIF dropped"),
        ],
    )
    failed = ledger.row("<d>", "e", "failed", reason="truncated", message="cut & short", run="r1")
    ledger.append(out, [failed, ledger.row("f", "e", "skipped", reason="exists", output="f_x4", run="r1")])
    write_run(
        out,
        RunRecord(
            run="r1",
            started=100.0,
            ended=160.0,
            replica_seconds=120.0,
            busy_share=0.98,
            facts={"engine": "actors"},  # as earlier versions wrote
        ),
    )
    return out


def test_the_report_adds_up(root: str) -> None:
    summary, others = summarise(root, price_per_hour=3.0)
    assert summary.counts == {
        "ok": 3,
        "failed": 1,
        "skipped": 1,
        "failed: truncated": 1,
        "skipped: exists": 1,
    }
    assert (summary.megapixels_in, summary.megapixels_out, summary.bytes_in, summary.bytes_out) == (
        1.5,
        24.0,
        30,
        210,
    )
    assert summary.wall_seconds == 60
    assert summary.pictures_per_s == pytest.approx(3 / 60)
    assert summary.replica_megapixels_per_s == pytest.approx(1.5 / 6)
    assert summary.replica_hours == pytest.approx(120 / 3600)
    assert summary.cost == pytest.approx(0.1)
    assert summary.notes == {"orientation N applied": 2, "EXIF dropped": 1}
    assert others["key"].to_pylist() == ["<d>", "f"]


def test_the_report_is_written_and_escaped(root: str) -> None:
    write_report(root, JOB.record("photos"), 3.0)
    folder = Path(root) / "_resshift"
    page = (folder / "report.html").read_text()
    assert "&lt;d&gt;" in page
    assert "<d>" not in page
    assert "cut &amp; short" in page
    assert "<script" not in page
    assert json.loads((folder / "report.json").read_text())["counts"]["ok"] == 3
    lines = (folder / "report.csv").read_text().splitlines()
    assert lines[0].startswith("key,status,reason,message")
    assert lines[1].startswith("<d>,failed,truncated,cut & short")
    assert len(lines) == 3


def made_up_rows(num: int, num_keys: int) -> list[Row]:
    """Return rows of few keys, so that most are replaced by later ones, of all statuses and four runs."""
    rng = random.Random(num)
    rows: list[Row] = []
    for i in range(num):
        key = f'{rng.randrange(num_keys)}, "x".png'
        run = f"r{i * 4 // num}"
        if rng.random() < 0.7:
            notes = "; ".join(rng.sample(["orientation 6 applied", "frame 1 of 12", "frame 3", "EXIF"], k=2))
            sides = {
                f"{side}_{where}": rng.randint(1, 60_000)
                for side in ("width", "height")
                for where in ("in", "out")
            }
            sizes = {"bytes_in": rng.randint(0, 1 << 40), "bytes_out": rng.randint(0, 1 << 40)}
            frames, seconds = rng.choice([None, 0, 1, 7]), rng.choice([None, rng.random()])
            done = ok(key, notes=notes, frames=frames, model_seconds=seconds, run=run, **sides, **sizes)
            rows.append(done)
        else:
            reason, message = rng.choice(
                [("truncated", "early,\nit ended"), ("empty", 'no "byte"'), ("", "")]
            )
            status: ledger.Status = rng.choice(["failed", "skipped"])
            why: dict[str, Any] = {"reason": reason, "message": message, "run": run, "size": i}
            rows.append(ledger.row(key, "e", status, **why))
    return rows


def test_the_report_is_that_of_a_loop_over_the_rows(tmp_path: Path) -> None:
    root, folder = str(tmp_path), tmp_path / "_resshift" / "ledger"
    rows = made_up_rows(2000, 700)
    written: list[dict[str, Any]] = [row | {"written_at": 1000.0 + i * 2} for i, row in enumerate(rows)]
    folder.mkdir(parents=True)
    for start in range(0, len(written), 90):
        part = pa.Table.from_pylist(written[start : start + 90], schema=ledger.SCHEMA)
        pq.write_table(part, folder / f"part-{start:05d}.parquet")
    write_run(
        root,
        RunRecord(run="r1", started=0.0, ended=70.0, replica_seconds=99.0, busy_share=None, facts={}),
    )

    last = {row["key"]: i for i, row in enumerate(written)}
    latest = [row for i, row in enumerate(written) if last[row["key"]] == i]
    done = [row for row in latest if row["status"] == "ok"]
    rest = [row for row in latest if row["status"] != "ok"]
    counts: Counter[str] = Counter(row["status"] for row in latest)
    counts.update(f"{row['status']}: {row['reason']}" for row in rest)
    notes: Counter[str] = Counter()
    for row in done:
        notes.update({re.sub(r"\d+", "N", note) for note in row["notes"].split("; ")})
    frames = [row["frames"] or 1 for row in done]
    times = [row["written_at"] for row in latest]
    width = (max(times) - min(times)) / 60
    bins = Counter(min(59, int((t - min(times)) / width)) for t in times)
    times_of = {run: [row["written_at"] for row in latest if row["run"] == run] for run in ("r0", "r2", "r3")}
    seconds = [row["model_seconds"] or 0.0 for row in latest if row["run"] != "r1"]

    summary, others = summarise(root, 2.0)
    assert summary.counts == counts
    assert summary.notes == notes
    assert summary.bytes_in == sum(row["bytes_in"] for row in done)
    assert summary.bytes_out == sum(row["bytes_out"] for row in done)
    for megapixels, where in ((summary.megapixels_in, "in"), (summary.megapixels_out, "out")):
        sides = [(row[f"width_{where}"], row[f"height_{where}"]) for row in done]
        pixels = sum(w * h * n for (w, h), n in zip(sides, frames, strict=True))
        assert megapixels == pytest.approx(pixels / 1e6, rel=1e-12)
    assert summary.model_seconds == pytest.approx(sum(row["model_seconds"] or 0.0 for row in done))
    assert summary.wall_seconds == 70.0 + sum(max(known) - min(known) for known in times_of.values())
    assert summary.replica_hours == pytest.approx((99.0 + sum(seconds)) / 3600)
    assert summary.timeline == [(round(i * width, 1), bins[i]) for i in range(60)]
    for name in ("key", "reason", "message", "size", "written_at"):
        assert others[name].to_pylist() == [row[name] for row in rest]
    assert list(csv.reader(io.StringIO(to_csv(others).decode(), newline="")))[1:] == [
        ["" if row[name] is None else str(row[name]) for name in others.column_names] for row in rest
    ]


def test_rows_without_an_output_are_listed_up_to_a_limit(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.append(root, [ledger.row(f"g{i}", "e", "failed") for i in range(5)])
    monkeypatch.setattr("pipelines.ledger.report._MAX_CSV_ROWS", 4)
    monkeypatch.setattr("pipelines.ledger.report._MAX_PAGE_ROWS", 3)
    summary, others = summarise(root)
    assert others["key"].to_pylist() == ["<d>", "f", "g0", "g1"]
    assert summary.counts["failed"] == 6
    assert "<p>1 more in report.csv</p>" in page(root, summary, others, {}, None)


def test_a_timeline_of_a_long_job_is_exact_to_a_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 rows, one a second, counted in 128 spans at most: no limit of a bin is off by more than one."""
    monkeypatch.setattr("pipelines.ledger.report._MOST_SPANS", 128)
    ledger.append(str(tmp_path), [ok(str(i)) for i in range(600)])
    (part,) = (tmp_path / ledger.DIRECTORY / "ledger").iterdir()
    table = pq.read_table(part)
    times = pa.array([1.7e9 + i for i in range(600)])
    pq.write_table(table.set_column(table.schema.get_field_index("written_at"), "written_at", times), part)
    timeline = summarise(str(tmp_path))[0].timeline
    told = list(itertools.accumulate(count for _, count in timeline))
    assert told[-1] == 600
    assert max(abs(told[i] - 10 * (i + 1)) for i in range(60)) <= 8
    assert timeline[30][0] == pytest.approx(300, abs=8)


def test_a_report_of_nothing_is_empty(tmp_path: Path) -> None:
    summary, others = summarise(str(tmp_path))
    assert (summary.counts, summary.timeline, others.num_rows) == ({}, [], 0)
    assert to_csv(others).startswith(b"key,status,reason,message,")


def test_a_run_that_was_killed_is_counted_by_its_rows(tmp_path: Path) -> None:
    ledger.append(str(tmp_path), [ok("a"), ok("b")])
    summary, _ = summarise(str(tmp_path), 3600.0)
    assert summary.replica_hours == pytest.approx(4 / 3600)
    assert summary.cost == pytest.approx(4.0)


def test_failed_inputs_are_named_up_to_a_number(root: str) -> None:
    assert ledger.some_failures(root) == ["failed: <d>: truncated: cut & short"]
    ledger.append(root, [ledger.row(f"g{i}", "e", "failed", reason="empty") for i in range(3)])
    told = ledger.some_failures(root, most=2)
    assert told[0] == "failed: <d>: truncated: cut & short"
    assert (len(told), told[-1]) == (3, "more are in the report")
