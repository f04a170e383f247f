"""What a bulk job shows while it runs."""

from __future__ import annotations

import io
import json

import pytest

from pipelines.bulk.progress import Progress, ProgressSnapshot, Rate, line
from pipelines.bulk.selection import ListingCounts
from pipelines.ledger import ledger


def test_rates_look_back_a_minute() -> None:
    rate = Rate()
    for second in range(200):
        rate.add(float(second), 2.0 * second, 0.5 * second)
    assert rate.value() == (pytest.approx(2.0), pytest.approx(0.5))


def test_progress_is_json_where_nobody_looks() -> None:
    out = io.StringIO()
    counts = ListingCounts(listed=5, done=1, pending=3, refused=1)
    with Progress(counts, out) as progress:
        progress.count(ledger.row("a", "e", "ok", width_in=1000, height_in=500))
        progress.count(ledger.row("b", "e", "failed", reason="empty"))
        progress.is_listed, progress.num_replicas = True, 2
    state: ProgressSnapshot = json.loads(out.getvalue().splitlines()[-1])
    assert (state["done"], state["failed"], state["skipped"], state["before"], state["replicas"]) == (
        1,
        1,
        0,
        1,
        2,
    )
    assert line({**state, "pictures_per_s": 2.0, "megapixels_per_s": 1.0, "eta_s": 3725}).endswith(
        "2 replicas  ETA 1:02:05"
    )
