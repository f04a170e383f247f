"""Parcels carry the rows of each rank, all of them, in the order of the stream."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from pipelines.pairs.dataset import filled
from pipelines.pairs.order import Rows, Span, spans
from pipelines.pairs.parcels import Turns, from_block, joined, to_block
from pipelines.shards.parquet import RowGroup

BATCH = 24
GROUPS = [RowGroup(f"s{i // 7}", i % 7, 3 + i % 14) for i in range(60)]


def rows_of(task: list[Span]) -> Rows:
    return np.concatenate([np.arange(span.start, span.stop) for span in task])


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 8, 24])
@pytest.mark.parametrize("turn_rows", [10, 24, 50, 300])
def test_ranks_together_get_every_row_of_their_slots_in_order(num_ranks: int, turn_rows: int) -> None:
    """Ranks that cannot share a batch evenly, 24 rows of 5, differ by one row."""
    start, stop = 7 * BATCH, 900
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for task in filled(spans(GROUPS, 1, start, stop), itertools.repeat(200), 150):
        rows = rows_of(task)
        parcels = Turns(BATCH, num_ranks, turn_rows).parcels(rows)
        assert len(parcels) % num_ranks == 0
        for i, parcel in enumerate(parcels):
            dealt[i % num_ranks] += rows[parcel].tolist()
    for rank, found in enumerate(dealt):
        own = range(rank * BATCH // num_ranks, (rank + 1) * BATCH // num_ranks)
        assert found == [row for row in range(start, stop) if row % BATCH in own]


def test_turns_begin_where_a_batch_begins() -> None:
    rows = np.arange(100, 600)
    parcels = Turns(batch_size=64, num_ranks=2, rows=128).parcels(rows)
    firsts = [min(rows[parcels[i]].min(), rows[parcels[i + 1]].min()) for i in range(0, len(parcels), 2)]
    assert firsts[0] == 100
    assert all(first % 64 == 0 for first in firsts[1:])
    assert len(firsts) == 4


def test_tasks_keep_windows_whole_and_fill_to_their_size() -> None:
    windows = list(spans([RowGroup("s", i, 16) for i in range(160)], 0, 0, 2560))
    assert [span.num_rows for span in windows] == [256] * 10
    sizes = iter([256, 256, 512, 700, *[1024] * 5])
    tasks = list(filled(windows, sizes, 1024))
    assert [len(rows_of(task)) for task in tasks] == [256, 256, 512, 512, 1024]
    assert all(span.num_rows == 256 for task in tasks for span in task)


def test_a_window_that_has_no_room_is_cut() -> None:
    windows = list(spans([RowGroup("s", i, 16) for i in range(32)], 0, 0, 512))
    tasks = list(filled(windows, itertools.repeat(100), 100))
    assert [len(rows_of(task)) for task in tasks] == [100, 100, 56, 100, 100, 56]
    assert np.concatenate([rows_of(task) for task in tasks]).tolist() == list(range(512))


def batch_of(num_rows: int, mask: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(num_rows)
    batch = {
        "key": np.array([f"ключ/{i}.png" for i in range(num_rows)], object),
        "epoch": rng.integers(0, 9, num_rows),
        "row": rng.integers(0, 1 << 40, num_rows),
        "substituted": rng.integers(0, 2, num_rows, np.uint8),
        "hq": rng.integers(0, 256, (num_rows, 8, 8, 3), np.uint8),
        "lq": rng.integers(0, 256, (num_rows, 2, 2, 3), np.uint8),
    }
    return batch | ({"mask": rng.integers(0, 256, (num_rows, 2, 2), np.uint8)} if mask else {})


@pytest.mark.parametrize("num_rows", [1, 5])
@pytest.mark.parametrize("mask", [False, True])
def test_a_parcel_comes_back_as_it_was(num_rows: int, mask: bool) -> None:
    batch = batch_of(num_rows, mask)
    block = to_block(batch, 3)
    assert len(block) == 1
    found = from_block(block, 3)
    assert list(found) == list(batch)
    for name, column in batch.items():
        assert found[name].dtype == column.dtype
        np.testing.assert_array_equal(found[name], column)


def test_an_empty_parcel_has_the_schema_of_a_full_one() -> None:
    """Ray Data would warn of blocks that differ."""
    empty = to_block(batch_of(0, mask=True), 0)
    assert empty.schema == to_block(batch_of(2, mask=True), 0).schema
    assert len(from_block(empty, 0)["row"]) == 0


def test_a_parcel_is_not_copied_when_it_is_opened() -> None:
    block = to_block(batch_of(4, mask=False), 0)
    data = pa.chunked_array(block["hq"]).chunk(0).buffers()[2]
    assert from_block(block, 0)["hq"].ctypes.data == data.address


def test_a_parcel_of_another_rank_is_refused() -> None:
    with pytest.raises(RuntimeError, match="rank 2 was given pairs of rank 1"):
        from_block(to_block(batch_of(1, mask=False), 1), 2)


def test_parts_are_joined_in_their_order() -> None:
    first, second = batch_of(2, mask=False), batch_of(3, mask=False)
    assert joined([first])["hq"] is first["hq"]
    np.testing.assert_array_equal(
        joined([first, second])["row"], np.concatenate([first["row"], second["row"]])
    )
