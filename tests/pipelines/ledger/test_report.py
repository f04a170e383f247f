"""Plan, report and progress, with figures worked out by hand."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.bulk.job import entries
from pipelines.bulk.plan import describe, make_plan
from pipelines.bulk.progress import Progress, Rate, line
from pipelines.bulk.selection import Selection, Tally, Worklist
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.ledger import ledger
from pipelines.ledger.digests import DigestSet, OwnerMap
from pipelines.ledger.ledger import Known, Row
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


def worklist(source: Path) -> Worklist:
    known = Known(DigestSet(), OwnerMap(), Counter())
    return Worklist(entries(str(source), Selection()), known, JOB.output_key, JOB.scale)


def test_the_plan_reads_headers_and_tells_hours_and_cost(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.png").write_bytes(encode(i, 500, 1000))
    (tmp_path / "in" / "0.jpg").write_bytes(
        encode(0, 500, 1000, "JPEG")
    )  # sorts before 0.png and takes its name
    (tmp_path / "in" / "bad.png").write_bytes(b"bad")
    work = worklist(tmp_path / "in")
    plan = make_plan(work, StageOptions(job=JOB, target=str(tmp_path / "out")))
    assert (plan.pending, plan.num_refused, plan.sampled, len(plan.unreadable)) == (5, 1, 5, 1)
    assert plan.megapixels == pytest.approx(2.0)
    shown = "\n".join(describe(plan, work, mp_per_s=0.001, replicas=2, price_per_hour=9.0))
    assert "0.png: name_collision: 0.jpg is written to 0_x4.png already" in shown
    assert "headers read: 5 (all), unreadable: 1" in shown
    assert "megapixels: 2.0 of input, 32.0 of output" in shown
    assert "time: 0.28 h with 2 replicas" in shown  # 2 / 0.001 / 2 = 1000 s
    assert "cost: 5.00 at 9 per replica and hour" in shown  # 2000 s of a replica
    assert not (tmp_path / "out").exists()


def test_a_sample_stands_for_the_rest(tmp_path: Path, encode: Encode) -> None:
    (tmp_path / "in").mkdir()
    data = encode(0, 100, 200)
    for i in range(300):
        (tmp_path / "in" / f"{i}.png").write_bytes(data)
    work = worklist(tmp_path / "in")
    plan = make_plan(work, StageOptions(job=JOB, target=str(tmp_path / "out")), num_samples=50)
    assert (plan.pending, plan.sampled) == (300, 50)
    assert plan.megapixels == pytest.approx(6.0)


def test_rates_look_back_a_minute() -> None:
    rate = Rate()
    for second in range(200):
        rate.add(float(second), 2.0 * second, 0.5 * second)
    assert rate.value() == (pytest.approx(2.0), pytest.approx(0.5))


def test_progress_is_json_where_nobody_looks() -> None:
    out = io.StringIO()
    tally = Tally(listed=5, done=1, pending=3, refused=1)
    with Progress(tally, out) as progress:
        progress.count(ok("a"))
        progress.count(ledger.row("b", "e", "failed", reason="empty"))
        progress.is_listed, progress.num_replicas = True, 2
    state = json.loads(out.getvalue().splitlines()[-1])
    assert (state["done"], state["failed"], state["skipped"], state["before"], state["replicas"]) == (
        1,
        1,
        0,
        1,
        2,
    )
    assert line(state | {"pictures_per_s": 2.0, "megapixels_per_s": 1.0, "eta_s": 3725}).endswith(
        "2 replicas  ETA 1:02:05"
    )
