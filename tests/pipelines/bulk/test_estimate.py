"""The estimate of a bulk job, with figures worked out by hand."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from pipelines.bulk.estimate import describe, estimate
from pipelines.bulk.selection import Worklist
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.bulk.sweep import Inputs
from pipelines.ledger.digests import DigestSet, OwnerMap
from pipelines.ledger.ledger import Known
from tests.pictures import encoded

JOB = UpscaleOptions(model="nearest-x4", identity="nearest-x4", scale=4)


def worklist(source: Path) -> Worklist:
    known = Known(DigestSet(), OwnerMap(), Counter())
    return Worklist(Inputs(source=str(source)).entries(), known, JOB.output_key, JOB.scale)


def test_the_estimate_reads_headers_and_tells_hours_and_cost(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.png").write_bytes(encoded(i, 500, 1000))
    (tmp_path / "in" / "0.jpg").write_bytes(
        encoded(0, 500, 1000, "JPEG")
    )  # sorts before 0.png and takes its name
    (tmp_path / "in" / "bad.png").write_bytes(b"bad")
    work = worklist(tmp_path / "in")
    found = estimate(work, StageOptions(outputs=JOB, target=str(tmp_path / "out")))
    assert (found.pending, found.num_refused, found.sampled, len(found.unreadable)) == (5, 1, 5, 1)
    assert found.megapixels == pytest.approx(2.0)
    shown = "\n".join(describe(found, work, (0.001, "in the ledger"), replicas=2, price_per_hour=9.0))
    assert "0.png: name_collision: 0.jpg is written to 0_x4.png already" in shown
    assert "headers read: 5 (all), unreadable: 1" in shown
    assert "megapixels: 2.0 of input, 32.0 of output" in shown
    assert (
        "time: 0.28 h with 2 replicas at 0.001 MP/s each (in the ledger)" in shown
    )  # 2 / 0.001 / 2 = 1000 s
    assert "cost: 5.00 at 9 per replica and hour" in shown  # 2000 s of a replica
    assert not (tmp_path / "out").exists()


def test_the_estimate_gives_a_name_to_what_is_a_picture(tmp_path: Path) -> None:
    for name, data in {"a.gif": b"cut", "a.jpg": encoded(0), "a.png": encoded(1)}.items():
        (tmp_path / name).write_bytes(data)
    found = estimate(worklist(tmp_path), StageOptions(outputs=JOB, target="/out"))
    assert [(row["key"], row["reason"]) for row in found.refused] == [("a.png", "name_collision")]
    assert (found.pending, found.readable, [key for key, *_ in found.unreadable]) == (2, 1, ["a.gif"])


def test_a_sample_stands_for_the_rest(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    data = encoded(0, 100, 200)
    for i in range(300):
        (tmp_path / "in" / f"{i}.png").write_bytes(data)
    work = worklist(tmp_path / "in")
    found = estimate(work, StageOptions(outputs=JOB, target=str(tmp_path / "out")), num_samples=50)
    assert (found.pending, found.sampled) == (300, 50)
    assert found.megapixels == pytest.approx(6.0)
