"""Row groups are read ahead, once, and patiently."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.pairs import photos
from pipelines.pairs.order import stream
from pipelines.pairs.photos import groups_ahead, read_groups
from pipelines.shards.build import ShardOptions
from pipelines.shards.parquet import RowGroup, read_manifest, row_groups
from pipelines.shards.prepare import prepare_here
from resshift.storage import StorageError, StorageReason


@pytest.fixture
def shards(tree: Path, tmp_path: Path) -> str:
    prepare_here(str(tree), str(tmp_path / "s"), ShardOptions(row_group_rows=3))
    return str(tmp_path / "s")


def test_groups_hold_the_rows_that_the_plan_names(shards: str) -> None:
    for piece in stream(row_groups(read_manifest(shards)), 1, 4, 7, 25):
        found = read_groups(shards, piece.groups)
        assert [len(photos) for photos in found] == [group.num_ok for group in piece.groups]
    keys = [
        photo.key for group in row_groups(read_manifest(shards)) for photo in read_groups(shards, [group])[0]
    ]
    assert sorted(keys) == sorted(f"class{i % 2}/{i}.png" for i in range(10))


def test_an_outage_is_waited_for_and_nothing_else(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    original = photos.read_pictures

    def failing(reason: StorageReason, times: int) -> Callable[[str, RowGroup], Any]:
        def read(root: str, group: RowGroup) -> Any:
            calls.append(0)
            if len(calls) <= times:
                raise StorageError(root, reason, "try again")
            return original(root, group)

        return read

    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    groups = row_groups(read_manifest(shards))[:1]
    monkeypatch.setattr(photos, "read_pictures", failing(StorageReason.UNAVAILABLE, 3))
    assert len(read_groups(shards, groups)[0]) == groups[0].num_ok
    assert waits == [0.5, 1.0, 2.0]
    for reason, num_calls in ((StorageReason.MISSING, 1), (StorageReason.UNAVAILABLE, 7)):
        calls.clear()
        monkeypatch.setattr(photos, "read_pictures", failing(reason, 100))
        with pytest.raises(StorageError, match=str(reason)):
            read_groups(shards, groups)
        assert len(calls) == num_calls


class Store:
    """Answers a request when it is told to, and counts them."""

    def __init__(self) -> None:
        self.asked: list[int] = []
        self.answer = threading.Event()
        self.changed = threading.Condition()

    def read(self, root: str, group: RowGroup) -> Any:
        del root
        with self.changed:
            self.asked.append(group.index)
            self.changed.notify_all()
        assert self.answer.wait(30)
        return group.index

    def has_asked(self, num: int) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: len(self.asked) >= num, 30)


def test_groups_are_read_once_in_the_order_of_their_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.answer.set()
    monkeypatch.setattr(photos, "read_pictures", store.read)
    order = np.random.default_rng(0).integers(0, 40, 500)
    found = list(groups_ahead("here", [RowGroup("s", i, 1) for i in range(40)], order))
    assert found == order.tolist()
    assert store.asked == list(dict.fromkeys(order.tolist()))


def test_groups_are_asked_for_before_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen requests to a bucket at a time, for the first of forty groups."""
    store = Store()
    monkeypatch.setattr(photos, "read_pictures", store.read)
    coming = groups_ahead("s3://bucket", [RowGroup("s", i, 1) for i in range(40)], np.arange(40))
    first: list[Any] = []
    thread = threading.Thread(target=lambda: first.append(next(coming)))
    thread.start()
    assert store.has_asked(16)
    store.answer.set()
    thread.join(30)
    assert first == [0]
    assert store.has_asked(17)
    assert list(coming) == list(range(1, 40))


def test_a_reader_that_is_closed_asks_for_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store()
    store.answer.set()
    monkeypatch.setattr(photos, "read_pictures", store.read)
    coming = groups_ahead("here", [RowGroup("s", i, 1) for i in range(40)], np.arange(40))
    next(coming)
    coming.close()
    assert len(store.asked) <= 17


def test_the_next_groups_are_read_while_all_of_a_window_are_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of a window use all its sixteen groups until its end."""
    store = Store()
    store.answer.set()
    monkeypatch.setattr(photos, "read_pictures", store.read)
    order = np.concatenate([np.tile(np.arange(16), 16), np.tile(np.arange(16, 32), 16)])
    coming = groups_ahead("here", [RowGroup("s", i, 1) for i in range(32)], order)
    for _ in range(16):
        next(coming)
    assert store.has_asked(32)
