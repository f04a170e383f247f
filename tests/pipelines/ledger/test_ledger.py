"""The ledger: one latest row a key, locally and on S3."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.ledger import ledger
from pipelines.ledger.digests import digests
from pipelines.ledger.ledger import LedgerWriter, Row
from resshift import storage


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('bucket')}/out"


def test_later_rows_replace_earlier_ones(root: str) -> None:
    assert ledger.read(root).num_rows == 0
    ledger.append(root, [ledger.row("a", "1", "failed", reason="truncated"), ledger.row("b", "1", "ok")])
    ledger.append(root, [])
    ledger.append(root, [ledger.row("a", "2", "ok", sha256_out="x")])
    rows = {row["key"]: row for row in ledger.read(root).to_pylist()}
    assert {key: (row["etag"], row["status"]) for key, row in rows.items()} == {
        "a": ("2", "ok"),
        "b": ("1", "ok"),
    }
    assert rows["a"]["sha256_out"] == "x"


def test_options_of_a_job_cannot_change(root: str) -> None:
    ledger.begin_job(root, {"model": "tiny-x4", "seed": 0})
    ledger.begin_job(root, {"model": "tiny-x4", "seed": 0})
    with pytest.raises(ledger.JobMismatch, match=r"options: seed: 0 -> 1\. Use"):
        ledger.begin_job(root, {"model": "tiny-x4", "seed": 1})
    with pytest.raises(ledger.JobMismatch, match=r"tile: None -> 64"):
        ledger.begin_job(root, {"model": "tiny-x4", "seed": 0, "tile": 64})


def test_a_job_is_continued_with_the_same_model_at_another_address(tmp_path: Path) -> None:
    """A job that began with a name goes on when these weights ship no longer and lie in a bucket."""
    root = str(tmp_path)
    ledger.begin_job(root, {"model": "tiny-x4", "identity": "c6"})
    ledger.begin_job(root, {"model": "s3://bucket/tiny", "identity": "c6"})
    with pytest.raises(ledger.JobMismatch, match=r"identity: 'c6' -> 'a2'; model: 'tiny-x4' -> 'other'"):
        ledger.begin_job(root, {"model": "other", "identity": "a2"})


def test_failed_rows_are_done_unless_they_are_retried(root: str) -> None:
    ledger.append(
        root, [ledger.row("a", "1", "ok", output="a_x4"), ledger.row("b", "2", "failed", reason="empty")]
    )
    ledger.append(
        root, [ledger.row("c", "3", "failed", reason="empty"), ledger.row("d", "4", "skipped", output="d_x4")]
    )
    versions = digests([("a", "1"), ("b", "2"), ("c", "3"), ("d", "4"), ("a", "2")])
    assert ledger.load_known(root).done.contains(versions).tolist() == [True, True, True, True, False]
    assert ledger.load_known(root, retry_failed=True).done.contains(versions).tolist() == [
        True,
        False,
        False,
        True,
        False,
    ]
    assert ledger.total_counts(root) == {"ok": 1, "failed": 2, "failed: empty": 2, "skipped": 1}
    again = ledger.load_known(root, again={"a", "c", "not there"})
    assert again.done.contains(versions).tolist() == [False, True, False, True, False]
    assert again.counts == {"done": 1, "failed": 1}
    assert again.owners.claim(digests(["a_x4"]), digests(["a"])).tolist() == [True]
    assert again.owners.claim(digests(["a_x4"]), digests(["b"])).tolist() == [False]


def test_only_the_latest_row_of_a_key_counts(tmp_path: Path) -> None:
    """An input that changed and changed back has the output of its second content."""
    for etag in ("1", "2"):
        ledger.append(str(tmp_path), [ledger.row("a", etag, "ok", output="a_x4")])
    assert ledger.load_known(str(tmp_path)).done.contains(digests([("a", "1"), ("a", "2")])).tolist() == [
        False,
        True,
    ]
    ledger.append(str(tmp_path), [ledger.row("a", "2", "failed", reason="empty")])
    assert ledger.total_counts(str(tmp_path)) == {"failed": 1, "failed: empty": 1}
    assert len(ledger.load_known(str(tmp_path)).owners) == 0


def test_rows_of_a_range_of_keys_are_found_without_the_others(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts by statistics, in a part by key: what the whole ledger says of these keys, and no more."""
    keys = [f"{i:02}/写{i}.png" for i in range(40)]
    for i in range(0, 40, 2):
        ledger.append(root, [ledger.row(key, "1", "ok", output=f"{key}_x4") for key in keys[i : i + 2]])
    ledger.append(root, [ledger.row(keys[9], "1", "failed", reason="empty")])
    parts = ledger.look_into_parts(root)
    assert [(part.first, part.last, part.num_rows) for part in parts[:2]] == [
        (keys[0], keys[1], 2),
        (keys[2], keys[3], 2),
    ]
    within = [(keys[3], keys[6]), (keys[9], keys[10]), (keys[39], None)]
    read: list[str] = []
    original = storage.read_bytes
    monkeypatch.setattr(storage, "read_bytes", lambda uri, **how: read.append(uri) or original(uri, **how))
    known = ledger.load_known(root, of_parts=parts, within=within)
    assert len(read) == 5
    versions = digests([(key, "1") for key in keys])
    assert np.flatnonzero(known.done.contains(versions)).tolist() == [3, 4, 5, 9, 39]
    assert known.counts == {"done": 4, "failed": 1}
    assert len(known.owners) == 4


def test_names_that_are_taken_are_known_after_a_restart(tmp_path: Path) -> None:
    ledger.append(
        str(tmp_path),
        [
            ledger.row("a.png", "1", "ok", output="a_x4.png"),
            ledger.row("b.png", "1", "failed", output="b_x4.png"),
        ],
    )
    owners = ledger.load_known(str(tmp_path)).owners
    wanted = digests(["a_x4.png", "a_x4.png", "b_x4.png"])
    assert owners.claim(wanted, digests(["a.png", "a.jpg", "b.jpg"])).tolist() == [True, False, True]


def test_a_part_from_before_a_column_came_can_be_read(tmp_path: Path) -> None:
    old = pa.Table.from_pylist([{"key": "a", "etag": "1", "status": "ok"}])
    (tmp_path / "_resshift" / "ledger").mkdir(parents=True)
    pq.write_table(old, tmp_path / "_resshift" / "ledger" / "part-0.parquet")
    (row,) = ledger.read(str(tmp_path)).to_pylist()
    assert (row["key"], row["run"]) == ("a", None)


def test_the_columns_on_disk_are_those_of_the_first_release(tmp_path: Path) -> None:
    """A ledger is continued by later versions, so names, order and types stay."""
    ledger.append(str(tmp_path), [ledger.row("a", "1", "ok")])
    (part,) = (tmp_path / "_resshift" / "ledger").iterdir()
    columns = (
        "key etag size status reason message output frames width_in height_in width_out height_out bytes_in "
    )
    columns += "bytes_out sha256_in sha256_out notes seconds model_seconds attempts model run written_at"
    types = [
        "s",
        "s",
        "l",
        "s",
        "s",
        "s",
        "s",
        "i",
        "i",
        "i",
        "i",
        "i",
        "l",
        "l",
        "s",
        "s",
        "s",
        "d",
        "d",
        "i",
        "s",
        "s",
        "d",
    ]
    by_letter = {"s": pa.string(), "i": pa.int32(), "l": pa.int64(), "d": pa.float64()}
    expected = [pa.field(name, by_letter[type]) for name, type in zip(columns.split(), types, strict=True)]
    assert list(pq.read_schema(part)) == expected
    assert ledger.row("a", "1", "ok").keys() == set(columns.split())


def test_unknown_columns_are_refused() -> None:
    with pytest.raises(KeyError, match="resaon"):
        ledger.row("a", "1", "failed", resaon="typo")


def test_the_writer_loses_no_row() -> None:
    parts: list[Sequence[Row]] = []

    async def write(count: int) -> None:
        writer = LedgerWriter(parts.append)
        for i in range(count):
            writer.add([ledger.row(str(i), "e", "ok")])
        await asyncio.to_thread(writer.close)

    asyncio.run(write(250))
    assert [len(part) for part in parts if part] == [100, 100, 50]
    assert [row["key"] for part in parts for row in part] == [str(i) for i in range(250)]


def test_a_part_that_could_not_be_written_is_told_by_every_later_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever asks first may be somebody who only looks: the job must not end well for that."""
    monkeypatch.setattr(ledger, "time", SimpleNamespace(monotonic=lambda: now))
    now, parts = 0.0, list[str]()

    def write(rows: Sequence[Row]) -> None:
        parts.append("".join(row["key"] for row in rows))
        if len(parts) == 1:
            raise OSError("the store is down")

    async def play() -> None:
        nonlocal now
        writer = LedgerWriter(write)
        writer.add([ledger.row("a", "e", "ok")])
        now = 11.0
        writer.flush_if_due()
        while not parts:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        writer.add([ledger.row("b", "e", "ok")])
        now = 22.0
        for _ in range(2):
            with pytest.raises(OSError, match="the store is down"):
                writer.flush_if_due()
        with pytest.raises(OSError, match="the store is down"):
            await asyncio.to_thread(writer.close)

    asyncio.run(play())
    assert parts == ["a", "b"]


def division(monkeypatch: pytest.MonkeyPatch, events: Iterable[tuple[float, str]]) -> list[str]:
    """Return the keys of each part of a writer that is made at second 0 and closed at the end.

    Args:
        monkeypatch: Fixture that replaces the clock of the ledger.
        events: Seconds at which rows come, with their one-letter keys; "" only asks whether a part is due.
    """
    now = 0.0
    monkeypatch.setattr(ledger, "time", SimpleNamespace(monotonic=lambda: now))
    parts: list[str] = []

    async def play() -> None:
        nonlocal now
        writer = LedgerWriter(lambda rows: parts.append("".join(row["key"] for row in rows)))
        for seconds, key in events:
            now = seconds
            if key:
                writer.add([ledger.row(key, "e", "ok")])
            else:
                writer.flush_if_due()
        await asyncio.to_thread(writer.close)

    asyncio.run(play())
    return parts


def test_rows_wait_at_most_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a crash little is done again. No further row has to come for a part to be due."""
    events = [(0, "a"), (9.9, ""), (9.95, "b"), (10.1, ""), (10.2, "c"), (20, "d"), (20.3, "e"), (21, "f")]
    assert division(monkeypatch, events) == ["ab", "cde", "f"]


def test_nothing_is_written_when_nothing_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    assert division(monkeypatch, [(50, ""), (100, ""), (100.5, "a")]) == ["a", ""]


@pytest.mark.parametrize(
    ("begun", "patience"), [(900, 10), (3000, 30), (12_000, 120), (1_000_000, 120)], ids=str
)
def test_a_long_run_writes_less_often(begun: float, patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One per cent of the run's time, at most two minutes: ten million rows make some thousand parts."""
    later = [(0.0, "b"), (0.95, ""), (0.97, "c"), (1.05, ""), (1.06, "d")]
    events = [(begun, "a"), *((begun + share * patience, key) for share, key in later)]
    assert division(monkeypatch, events) == ["a", "bc", "d"]
