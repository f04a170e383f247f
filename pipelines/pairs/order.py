"""The order of training data: a pure function of (seed, batch size), divided among ranks by arithmetic.

The stream of a run is epoch 0, epoch 1, ...; its rows are numbered from 0. Step s takes rows [s B, (s + 1)
B), B the global batch size, and rank r of N owns the slots [r B / N, (r + 1) B / N) of every batch. So what a
step holds depends on (seed, step) alone, not on how many ranks there are, and a run resumes at any row.

An epoch permutes the row groups of all shards and takes them `groups_per_window` at a time. The pictures of a
window are permuted inside their row group, laid end to end, and filled into the window's part of the stream
*slot by slot*: first slot 0 of all its batches, then slot 1, and so on. A batch thus takes its rows evenly
from all row groups of the window, yet the rows of one rank are contiguous in that order. Of a
window of G row groups, N ranks together read at most G + N - 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.parquet import RowGroup
from resshift import seeds
from resshift.training.slots import Slots

GROUPS_PER_WINDOW = 16
Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Window:
    """Row groups whose pictures are mixed; they fill the stream from row `first_row`. `index` counts from
    the start of the epoch.
    """

    epoch: int
    index: int
    groups: tuple[RowGroup, ...]
    first_row: int

    @property
    def num_rows(self) -> int:
        return sum(group.num_ok for group in self.groups)


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """The rows of one window that one rank owns, in stream order.

    Fields:
        epoch: Epoch of all rows.
        groups: Row groups that hold the rows, and no others.
        sources: (n,) index of each row among the good rows of `groups`, laid end to end.
        rows: (n,) number of each in the stream, ascending.
    """

    epoch: int
    groups: tuple[RowGroup, ...]
    sources: Rows
    rows: Rows

    def cut(self, start: int, stop: int) -> Piece:
        """Return its rows [start, stop), counted from the first, and the groups that hold them."""
        return _with_used_groups(
            Piece(self.epoch, self.groups, self.sources[start:stop], self.rows[start:stop])
        )


def epoch_windows(
    groups: Sequence[RowGroup], seed: int, epoch: int, groups_per_window: int = GROUPS_PER_WINDOW
) -> Iterator[Window]:
    """Yield the windows of one epoch; every row group is in exactly one. `first_row` counts from the
    start of the stream.
    """
    first_row = epoch * sum(group.num_ok for group in groups)
    order = seeds.philox(seed, "row groups", epoch).permutation(len(groups))
    for index, start in enumerate(range(0, len(groups), groups_per_window)):
        window = Window(
            epoch, index, tuple(groups[i] for i in order[start : start + groups_per_window]), first_row
        )
        yield window
        first_row += window.num_rows


def window_order(window: Window, seed: int, batch_size: int) -> Rows:
    """Return, for each stream row of the window, its index among the pictures of the window's groups laid end
    to end.
    """
    i_group = np.repeat(np.arange(len(window.groups)), [group.num_ok for group in window.groups])
    shuffle = seeds.philox(seed, "rows", window.epoch, window.index).random(len(i_group))
    lined_up = np.lexsort((shuffle, i_group))
    rows = np.arange(window.first_row, window.first_row + len(lined_up))
    slot_by_slot = np.lexsort((rows // batch_size, rows % batch_size))
    order = np.empty_like(lined_up)
    order[slot_by_slot] = lined_up
    return order


def stream(
    groups: Sequence[RowGroup],
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    groups_per_window: int = GROUPS_PER_WINDOW,
) -> Iterator[Piece]:
    """Yield what one rank reads of stream rows [start, stop), a piece for each window that holds some of it.

    Raises:
        ValueError: There is no picture at all, or the batch cannot be shared by the ranks.
    """
    per_epoch = sum(group.num_ok for group in groups)
    if not per_epoch:
        raise ValueError("the shards hold no picture with status ok")
    if batch_size < num_ranks or not 0 <= rank < num_ranks:
        raise ValueError(
            f"batch_size ({batch_size}) must be at least the number of ranks ({num_ranks}), and rank "
            f"({rank}) one of them"
        )
    for epoch in range(start // per_epoch, -(-stop // per_epoch)):
        for window in epoch_windows(groups, seed, epoch, groups_per_window):
            if window.first_row < stop and start < window.first_row + window.num_rows:
                piece = _cut(
                    window, window_order(window, seed, batch_size), batch_size, start, stop, rank, num_ranks
                )
                if len(piece.rows):
                    yield piece


def _cut(
    window: Window, order: Rows, batch_size: int, start: int, stop: int, rank: int, num_ranks: int
) -> Piece:
    """Keep the rows in [start, stop) whose slot belongs to the rank, and the groups that hold them."""
    rows = np.arange(window.first_row, window.first_row + len(order))
    own, slots = Slots.of_rank(batch_size, rank, num_ranks), rows % batch_size
    kept = (own.start <= slots) & (slots < own.stop) & (start <= rows) & (rows < stop)
    return _with_used_groups(Piece(window.epoch, window.groups, order[kept], rows[kept]))


def _with_used_groups(piece: Piece) -> Piece:
    """Drop the groups that hold no row of the piece."""
    starts = _starts(piece.groups)
    i_group = np.searchsorted(starts, piece.sources, side="right") - 1
    used, i_used = np.unique(i_group, return_inverse=True)
    groups = tuple(piece.groups[i] for i in used)
    return Piece(piece.epoch, groups, piece.sources - starts[i_group] + _starts(groups)[i_used], piece.rows)


def _starts(groups: Sequence[RowGroup]) -> Rows:
    """Return where the pictures of each group begin when all are laid end to end."""
    return np.cumsum([0, *(group.num_ok for group in groups)], dtype=np.int64)[:-1]
