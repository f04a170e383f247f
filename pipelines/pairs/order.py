"""The order of training data: a pure function of (seed, batch size), divided among ranks by arithmetic.

The stream of a run is epoch 0, epoch 1, ...; its rows are numbered from 0. Step s takes rows [s B, (s + 1)
B), B the global batch size, and rank r of N owns the slots [r B / N, (r + 1) B / N) of every batch. So what a
step holds depends on (seed, step) alone, not on how many ranks there are, and a run resumes at any row.

An epoch permutes the row groups of all shards and takes them `groups_per_window` at a time. The pictures of a
window are permuted inside their row group, laid end to end, and filled into the window's part of the stream
*slot by slot*: first slot 0 of all its batches, then slot 1, and so on. A batch thus takes its rows evenly
from all row groups of the window, yet the rows of one rank are contiguous in that order. A window is
read as a whole, for all ranks at once (`pipelines.pairs.dataset`): each of its row groups once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelines.shards.parquet import RowGroup
from resshift import seeds

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
    """Consecutive rows of the stream, all in one window.

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

    def positions(self) -> tuple[Rows, Rows]:
        """Return for each row the index of its group among `groups`, and its own among the group's good
        rows.
        """
        starts = _starts(self.groups)
        i_group = np.searchsorted(starts, self.sources, side="right") - 1
        return i_group, self.sources - starts[i_group]


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


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) of the stream, all in one window: what a task is told of them."""

    window: Window
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    def cut(self, num_rows: int) -> tuple[Span, Span]:
        """Divide it after so many rows."""
        middle = self.start + num_rows
        return Span(self.window, self.start, middle), Span(self.window, middle, self.stop)

    def piece(self, seed: int, batch_size: int) -> Piece:
        """Return its rows and where their pictures are."""
        first = self.window.first_row
        order = window_order(self.window, seed, batch_size)[self.start - first : self.stop - first]
        return _with_used_groups(
            Piece(self.window.epoch, self.window.groups, order, np.arange(self.start, self.stop))
        )


def spans(
    groups: Sequence[RowGroup],
    seed: int,
    start: int,
    stop: int,
    *,
    groups_per_window: int = GROUPS_PER_WINDOW,
) -> Iterator[Span]:
    """Yield the windows that hold stream rows [start, stop), each with those of its rows.

    Raises:
        ValueError: There is no picture at all.
    """
    per_epoch = sum(group.num_ok for group in groups)
    if not per_epoch:
        raise ValueError("the shards hold no picture with status ok")
    for epoch in range(start // per_epoch, -(-stop // per_epoch)):
        for window in epoch_windows(groups, seed, epoch, groups_per_window):
            first, last = max(start, window.first_row), min(stop, window.first_row + window.num_rows)
            if first < last:
                yield Span(window, first, last)


def stream(
    groups: Sequence[RowGroup],
    seed: int,
    batch_size: int,
    start: int,
    stop: int,
    *,
    groups_per_window: int = GROUPS_PER_WINDOW,
) -> Iterator[Piece]:
    """Yield stream rows [start, stop) in order, a piece for each window that holds some of them.

    Raises:
        ValueError: There is no picture at all.
    """
    for span in spans(groups, seed, start, stop, groups_per_window=groups_per_window):
        yield span.piece(seed, batch_size)


def _with_used_groups(piece: Piece) -> Piece:
    """Drop the groups that hold no row of the piece."""
    i_group, i_row = piece.positions()
    used, i_used = np.unique(i_group, return_inverse=True)
    groups = tuple(piece.groups[i] for i in used)
    return Piece(piece.epoch, groups, _starts(groups)[i_used] + i_row, piece.rows)


def _starts(groups: Sequence[RowGroup]) -> Rows:
    """Return where the pictures of each group begin when all are laid end to end."""
    return np.cumsum([0, *(group.num_ok for group in groups)], dtype=np.int64)[:-1]
