"""Parcels: how pairs travel from the task that makes them to the rank that trains on them.

A task makes consecutive rows of the stream, for all ranks. It divides them into turns and hands over a parcel
for each rank in every turn, rank 0 first, an empty one where a rank has no row. A parcel is a block of Ray
Data, with one row, and block k goes to rank k mod N (`pipelines.pairs.deal`). It says whose it is, so that
blocks that come in another order or in parts are an error.

Columns: rank; num_rows; key, a list; all others as the bytes of the array in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.pairs.order import Rows
from resshift.degradation.on_device.plan import PLAN_BYTES
from resshift.training.slots import Slots

Batch = dict[str, NDArray[Any]]
_NUMBERS = {"epoch": np.dtype(np.int64), "row": np.dtype(np.int64), "substituted": np.dtype(np.uint8)}


@dataclass(frozen=True, slots=True)
class Turns:
    """How the rows of a task become parcels.

    Fields:
        batch_size: Global batch size.
        num_ranks: Number of ranks that share each batch.
        rows: Rows of the stream in a turn, of all ranks together, about.
    """

    batch_size: int
    num_ranks: int
    rows: int

    def parcels(self, rows: Rows) -> list[Rows]:
        """Return for each parcel, in the order in which they are handed over, the indices of its rows among
        those of a task, ascending. There are `num_ranks` for each turn.

        Args:
            rows: (n,) rows of the stream that a task makes, consecutive.
        """
        edges = self._edges(int(rows[0]), int(rows[-1]) + 1)
        turn = np.searchsorted(edges, rows, side="right") - 1
        starts = [Slots.of_rank(self.batch_size, i, self.num_ranks).start for i in range(self.num_ranks)]
        rank = np.searchsorted(starts, rows % self.batch_size, side="right") - 1
        parcel = turn * self.num_ranks + rank
        counts = np.bincount(parcel, minlength=(len(edges) - 1) * self.num_ranks)
        return np.split(np.argsort(parcel, kind="stable"), np.cumsum(counts)[:-1])

    def _edges(self, start: int, stop: int) -> Rows:
        """Divide rows into turns of equal size, which begin where a batch begins if they hold one."""
        num_turns = max(1, round((stop - start) / self.rows))
        edges = np.linspace(start, stop, num_turns + 1).round().astype(np.int64)
        if self.rows >= self.batch_size:
            inner = edges[1:-1] + self.batch_size // 2
            edges[1:-1] = np.clip(inner - inner % self.batch_size, start, stop)
        return np.unique(edges)


def to_block(batch: Mapping[str, NDArray[Any]], rank: int) -> pa.Table:
    """Pack rows of one rank, none or more."""
    columns: dict[str, pa.Array] = {
        "rank": pa.array([rank], pa.int32()),
        "num_rows": pa.array([len(batch["row"])], pa.int32()),
        "key": pa.array([batch["key"].tolist()], pa.list_(pa.string())),
    }
    for name, column in batch.items():
        if name != "key":
            data = pa.py_buffer(np.ascontiguousarray(column).reshape(-1))
            ends = pa.py_buffer(np.array([0, column.nbytes], np.int64))
            columns[name] = cast(Any, pa).Array.from_buffers(pa.large_binary(), 1, [None, ends, data])
    return pa.table(columns)


def from_block(block: pa.Table, rank: int) -> Batch:
    """Return the rows of a parcel; arrays are views of it. Pictures are square.

    Raises:
        RuntimeError: It is another rank's.
    """
    if (found := block["rank"][0].as_py()) != rank:
        raise RuntimeError(f"rank {rank} was given pairs of rank {found}: Ray Data changed their order")
    num_rows = block["num_rows"][0].as_py()
    batch: Batch = {"key": np.array(block["key"][0].as_py(), object)}
    for name in block.column_names:
        if name not in ("rank", "num_rows", "key"):
            data = _bytes_of(block[name].chunk(0))
            if name in _NUMBERS:
                batch[name] = data.view(_NUMBERS[name])
            elif name == "plan":
                batch[name] = data.reshape(num_rows, PLAN_BYTES)
            else:
                batch[name] = _pictures(data, num_rows, 1 if name == "mask" else 3)
    return batch


def _bytes_of(column: pa.Array) -> NDArray[np.uint8]:
    """Return the one value of a column; a scalar of Arrow would be a copy."""
    _, ends, data = column.buffers()
    start, stop = np.frombuffer(cast(Any, ends), np.int64)[column.offset : column.offset + 2]
    return np.frombuffer(cast(Any, data or b""), np.uint8)[start:stop]


def _pictures(data: NDArray[np.uint8], num_rows: int, channels: int) -> NDArray[np.uint8]:
    side = round((len(data) / max(1, num_rows) / channels) ** 0.5)
    return data.reshape((num_rows, side, side, *((channels,) if channels > 1 else ())))


def joined(parts: list[Batch]) -> Batch:
    """Return consecutive rows as one batch: the part itself where there is only one."""
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
