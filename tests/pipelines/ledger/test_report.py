"""The report, with figures worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.bulk.stages import UpscaleOptions
from pipelines.ledger import ledger
from pipelines.ledger.ledger import Row
from pipelines.ledger.report import RunRecord, summarise, write_report, write_run

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
            facts={"engine": "actors"},
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
    assert [row["key"] for row in others] == ["<d>", "f"]


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


def test_a_run_that_was_killed_is_counted_by_its_rows(tmp_path: Path) -> None:
    ledger.append(str(tmp_path), [ok("a"), ok("b")])
    summary, _ = summarise(str(tmp_path), 3600.0)
    assert summary.replica_hours == pytest.approx(4 / 3600)
    assert summary.cost == pytest.approx(4.0)
