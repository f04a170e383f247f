"""Which keys a pass has finished, against sets of numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.ledger import cursors
from pipelines.ledger.cursors import Finished

PASS = {"source": "s3://in", "include": ["*.jpg"], "retry_failed": False}


def test_intervals_and_their_gaps_are_the_keys_and_the_others() -> None:
    rng = np.random.default_rng(0)
    finished = Finished()
    for _ in range(200):
        finished, expected = Finished(), set[int]()
        for start, length in zip(rng.integers(0, 40, 6), rng.integers(0, 8, 6), strict=True):
            finished.add(f"{start:02}", f"{start + length:02}")
            expected |= set(range(start, start + length))
        keys = {i for start, stop in finished.intervals for i in range(int(start), int(stop or 99))}
        others = {i for start, stop in finished.gaps() for i in range(int(start or 0), int(stop or 60))}
        assert keys == expected
        assert others == set(range(60)) - expected
        assert finished.intervals == sorted(set(finished.intervals))
    finished.add("", None)
    assert (finished.intervals, finished.gaps()) == ([("", None)], [])


def test_a_pass_is_continued_for_a_day_by_one_that_asks_for_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = str(tmp_path)
    assert cursors.read(root, PASS).intervals == []
    intervals = [("", "2024/写"), ("2025/\udcff", None)]
    cursors.write(root, PASS, Finished(intervals))
    assert cursors.read(root, PASS).intervals == intervals
    assert cursors.read(root, PASS | {"retry_failed": True}).intervals == []
    now = cursors.time.time()
    monkeypatch.setattr(cursors, "time", SimpleNamespace(time=lambda: now + 25 * 3600))
    assert cursors.read(root, PASS).intervals == []
    cursors.remove(root)
    assert not (tmp_path / "_resshift" / "cursors.json").exists()
