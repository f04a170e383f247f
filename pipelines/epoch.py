"""The order of training data: a pure function of (seed, epoch), cut so that it can be read in large pieces and resumed at any row.

An epoch permutes the row groups of all shards, takes them `groups_per_window` at a time, and permutes the rows inside each window. A
window is read by one task. The stream of a run is epoch 0, epoch 1, ...; its rows are numbered from 0, and "resume at row r" means exactly
that row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelines.imagenet import ShardSummary
from resshift import seeds


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group that holds `num_ok` pictures."""

    shard: str
    index: int
    num_ok: int


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of the stream.

    `order` indexes the good rows of `groups`, concatenated; stream row `first_row` is `order[0]`.
    """

    epoch: int
    groups: tuple[RowGroup, ...]
    order: tuple[int, ...]
    first_row: int


def row_groups(shards: Sequence[ShardSummary]) -> list[RowGroup]:
    """Return the row groups that hold at least one picture, in the order of the shards' names."""
    ordered = sorted(shards, key=lambda shard: shard.name)
    return [RowGroup(s.name, i, num_ok) for s in ordered for i, (_, num_ok) in enumerate(s.row_groups) if num_ok]


def epoch_windows(groups: Sequence[RowGroup], seed: int, epoch: int, groups_per_window: int = 4) -> Iterator[Window]:
    """Yield the windows of one epoch; every picture stands in exactly one, once. `first_row` counts from the start of the stream."""
    first_row = epoch * sum(group.num_ok for group in groups)
    shuffled = [groups[i] for i in seeds.philox(seed, "row groups", epoch).permutation(len(groups))]
    for i_window, start in enumerate(range(0, len(shuffled), groups_per_window)):
        members = tuple(shuffled[start : start + groups_per_window])
        num_rows = sum(group.num_ok for group in members)
        order = seeds.philox(seed, "rows", epoch, i_window).permutation(num_rows)
        yield Window(epoch, members, tuple(int(i) for i in order), first_row)
        first_row += num_rows


def stream(groups: Sequence[RowGroup], seed: int, start: int, stop: int, groups_per_window: int = 4) -> Iterator[Window]:
    """Yield the windows that cover stream rows [start, stop), the first and the last cut to fit.

    Raises:
        ValueError: there is no picture at all.
    """
    per_epoch = sum(group.num_ok for group in groups)
    if not per_epoch:
        raise ValueError("the shards hold no picture with status ok")
    for epoch in range(start // per_epoch, -(-stop // per_epoch)):
        for window in epoch_windows(groups, seed, epoch, groups_per_window):
            low = max(0, start - window.first_row)
            high = min(len(window.order), stop - window.first_row)
            if low < high:
                yield Window(epoch, window.groups, window.order[low:high], window.first_row + low)
