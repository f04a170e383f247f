"""The order of training data is a function of seed and row number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from pipelines.pairs.order import Piece, Window, epoch_windows, spans, stream, window_order
from pipelines.shards.parquet import RowGroup

GROUPS = [
    RowGroup("a", 0, 5),
    RowGroup("a", 1, 3),
    RowGroup("b", 0, 4),
    RowGroup("b", 1, 1),
    RowGroup("c", 0, 6),
]
PER_EPOCH = 19
BATCH = 24
Row = tuple[int, str, int, int]


def rows(pieces: Iterable[Piece]) -> list[tuple[int, Row]]:
    """Spell a stream out: (number in the stream, (epoch, shard, group, row in the group))."""
    return list(spelled(pieces))


def spelled(pieces: Iterable[Piece]) -> Iterator[tuple[int, Row]]:
    for piece in pieces:
        members = [(g.shard, g.index, i) for g in piece.groups for i in range(g.num_ok)]
        for number, source in zip(piece.rows.tolist(), piece.sources.tolist(), strict=True):
            yield number, (piece.epoch, *members[source])


def many(num_groups: int, seed: int = 0) -> list[RowGroup]:
    sizes = np.random.default_rng(seed).integers(1, 17, num_groups)
    return [RowGroup(f"s{i // 7}", i % 7, int(size)) for i, size in enumerate(sizes)]


@pytest.mark.parametrize("groups_per_window", [1, 2, 4, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 24, 64])
def test_an_epoch_holds_every_picture_once(groups_per_window: int, batch_size: int) -> None:
    expected = sorted((7, g.shard, g.index, i) for g in GROUPS for i in range(g.num_ok))
    start, stop = 7 * PER_EPOCH, 8 * PER_EPOCH
    found = rows(stream(GROUPS, 1, batch_size, start, stop, groups_per_window=groups_per_window))
    assert sorted(row for _, row in found) == expected
    assert [number for number, _ in found] == list(range(start, stop))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def order(seed: int, epoch: int) -> list[tuple[str, int, int]]:
        pieces = stream(GROUPS, seed, 4, epoch * PER_EPOCH, (epoch + 1) * PER_EPOCH)
        return [row[1:] for _, row in rows(pieces)]

    orders = [order(seed, epoch) for seed, epoch in ((1, 0), (1, 1), (2, 0), (2, 1), (1, 2))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize("start", range(0, 2 * PER_EPOCH + 1, 3))
@pytest.mark.parametrize("length", [1, 8, PER_EPOCH, 2 * PER_EPOCH + 3])
def test_resuming_anywhere_gives_the_rest_of_the_same_stream(start: int, length: int) -> None:
    whole = rows(stream(GROUPS, 3, 8, 0, 6 * PER_EPOCH, groups_per_window=2))
    found = rows(stream(GROUPS, 3, 8, start, start + length, groups_per_window=2))
    assert found == [row for row in whole if start <= row[0] < start + length]


def test_an_epoch_reads_each_row_group_once() -> None:
    groups = many(160)
    pieces = list(stream(groups, 2, BATCH, 0, sum(g.num_ok for g in groups)))
    assert sorted((g for piece in pieces for g in piece.groups), key=repr) == sorted(groups, key=repr)


def test_a_part_of_a_span_has_the_groups_of_its_rows_and_no_others() -> None:
    (whole,) = spans(many(16), 4, 10, 100)
    first, rest = whole.cut(7)
    assert [first.num_rows, rest.num_rows] == [7, 83]
    assert rows([first.piece(4, 24), rest.piece(4, 24)]) == rows([whole.piece(4, 24)])
    one = whole.cut(1)[0].piece(4, 24)
    assert len(one.groups) == 1


def test_a_batch_takes_its_rows_evenly_from_the_window() -> None:
    groups = tuple(RowGroup("s", i, 16) for i in range(16))
    order = window_order(Window(0, 0, groups, 1000 * 64), seed=0, batch_size=64)
    for batch in order.reshape(4, 64):
        assert np.bincount(batch // 16, minlength=16).tolist() == [4] * 16


def test_windows_follow_one_another() -> None:
    windows = list(epoch_windows(GROUPS, seed=1, epoch=3, groups_per_window=2))
    assert [window.first_row for window in windows] == [
        3 * PER_EPOCH + n for n in np.cumsum([0, *(w.num_rows for w in windows[:-1])])
    ]
    assert sorted((group for window in windows for group in window.groups), key=repr) == sorted(
        GROUPS, key=repr
    )


def test_no_picture_at_all_is_said() -> None:
    with pytest.raises(ValueError, match="no picture with status ok"):
        list(stream([], 0, 8, 0, 10))
