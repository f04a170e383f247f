"""The ledger: one latest row a key, locally and on S3."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import ledger


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('bucket')}/out"


def test_later_rows_replace_earlier_ones(root: str) -> None:
    assert ledger.read(root).num_rows == 0
    ledger.append(root, [ledger.row("a", "1", "failed", reason="truncated"), ledger.row("b", "1", "ok")])
    ledger.append(root, [])
    ledger.append(root, [ledger.row("a", "2", "ok", sha256_out="x")])
    rows = {row["key"]: row for row in ledger.read(root).to_pylist()}
    assert {key: (row["etag"], row["status"]) for key, row in rows.items()} == {"a": ("2", "ok"), "b": ("1", "ok")}
    assert rows["a"]["sha256_out"] == "x"


def test_options_of_a_job_cannot_change(root: str) -> None:
    ledger.begin_job(root, {"model": "tiny-x4", "seed": 0})
    ledger.begin_job(root, {"model": "tiny-x4", "seed": 0})
    with pytest.raises(ledger.JobMismatch, match=r"options: seed: 0 -> 1\. Use"):
        ledger.begin_job(root, {"model": "tiny-x4", "seed": 1})
    with pytest.raises(ledger.JobMismatch, match=r"tile: None -> 64"):
        ledger.begin_job(root, {"model": "tiny-x4", "seed": 0, "tile": 64})


def test_failed_rows_are_done_unless_they_are_retried(tmp_path: Path) -> None:
    rows = [ledger.row("a", "1", "ok"), ledger.row("b", "2", "failed", reason="empty"), ledger.row("c", "3", "failed", reason="empty")]
    ledger.append(str(tmp_path), rows)
    table = ledger.read(str(tmp_path))
    assert ledger.done_keys(table, retry_failed=False) == {"a": "1", "b": "2", "c": "3"}
    assert ledger.done_keys(table, retry_failed=True) == {"a": "1"}
    assert ledger.counts(table.to_pylist()) == {"ok": 1, "failed": 2, "failed: empty": 2}


def test_unknown_columns_are_refused() -> None:
    with pytest.raises(KeyError, match="resaon"):
        ledger.row("a", "1", "failed", resaon="typo")
