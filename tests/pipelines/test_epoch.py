"""The order of training data is a function of seed and row number."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from pipelines.epoch import RowGroup, Window, epoch_windows, row_groups, stream
from pipelines.imagenet import ShardSummary

GROUPS = [RowGroup("a", 0, 5), RowGroup("a", 1, 3), RowGroup("b", 0, 4), RowGroup("b", 1, 1), RowGroup("c", 0, 6)]
PER_EPOCH = 19
Row = tuple[int, str, int, int]


def rows(windows: Iterable[Window]) -> list[tuple[int, Row]]:
    """Spell a stream out: (number in the stream, (epoch, shard, group, row in the group))."""
    out: list[tuple[int, Row]] = []
    for window in windows:
        members = [(g.shard, g.index, i) for g in window.groups for i in range(g.num_ok)]
        out += [(window.first_row + n, (window.epoch, *members[i])) for n, i in enumerate(window.order)]
    return out


@pytest.mark.parametrize("groups_per_window", [1, 2, 4, 100])
def test_an_epoch_holds_every_picture_once(groups_per_window: int) -> None:
    expected = sorted((7, g.shard, g.index, i) for g in GROUPS for i in range(g.num_ok))
    found = rows(epoch_windows(GROUPS, seed=1, epoch=7, groups_per_window=groups_per_window))
    assert sorted(row for _, row in found) == expected
    assert [number for number, _ in found] == list(range(7 * PER_EPOCH, 8 * PER_EPOCH))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [[row[1:] for _, row in rows(epoch_windows(GROUPS, seed, epoch))] for seed, epoch in ((1, 0), (1, 1), (2, 0), (2, 1), (1, 2))]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


@pytest.mark.parametrize("start", range(0, 2 * PER_EPOCH + 1, 3))
@pytest.mark.parametrize("length", [1, 8, PER_EPOCH, 2 * PER_EPOCH + 3])
def test_resuming_anywhere_gives_the_rest_of_the_same_stream(start: int, length: int) -> None:
    whole = rows(stream(GROUPS, 3, 0, 6 * PER_EPOCH, groups_per_window=2))
    assert rows(stream(GROUPS, 3, start, start + length, groups_per_window=2)) == whole[start : start + length]


def test_failed_rows_are_not_in_the_plan() -> None:
    shards = [ShardSummary("z", "", ((4, 0), (4, 3)), 0, {}), ShardSummary("a", "", ((2, 2),), 0, {})]
    assert row_groups(shards) == [RowGroup("a", 0, 2), RowGroup("z", 1, 3)]


def test_no_picture_at_all_is_said() -> None:
    with pytest.raises(ValueError, match="no picture with status ok"):
        list(stream([], 0, 0, 10))
