"""Photos of row groups, read ahead of the pairs that are made of them.

A store answers a request in tens of milliseconds. Were row groups read when their first pair is due, a core
would wait for each; so threads read the next ones meanwhile, and what has been used for the last time is
dropped.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipelines.cluster.retry import retried
from pipelines.pairs.order import Rows
from pipelines.shards.parquet import RowGroup
from pipelines.shards.pictures import Photo, read_pictures
from resshift import storage

_READERS = 16  # requests to a bucket at a time
_AHEAD = 16  # row groups that wait for their first use, of 4 MiB or a little more each


def read_groups(root: str, groups: Sequence[RowGroup]) -> list[list[Photo]]:
    """Read the pictures of some row groups; a store that fails for a moment is asked again."""
    return list(groups_ahead(root, groups, np.arange(len(groups))))


def groups_ahead(root: str, groups: Sequence[RowGroup], order: Rows) -> Generator[list[Photo]]:
    """Yield the pictures of `groups[i]` for each i of `order`; each group that occurs there is read once, up
    to 16 of them before they are asked for.

    Raises:
        StorageError: A shard cannot be read.
    """
    used, first_use = np.unique(order, return_index=True)
    last_use = len(order) - 1 - np.unique(order[::-1], return_index=True)[1]
    coming = iter(used[np.argsort(first_use)].tolist())
    starts, ends = (dict(zip(used.tolist(), at.tolist(), strict=True)) for at in (first_use, last_use))
    with ThreadPoolExecutor(_READERS if storage.is_s3(root) else 1, "photos") as pool:
        reading: dict[int, Future[list[Photo]]] = {}

        def read(i: int) -> list[Photo]:
            return retried(lambda: read_pictures(root, groups[i]))

        def begin_next() -> None:
            if (i := next(coming, None)) is not None:
                reading[i] = pool.submit(read, i)

        try:
            for _ in range(_AHEAD):
                begin_next()
            for position, i in enumerate(order.tolist()):
                if position == starts[i]:
                    begin_next()
                yield reading[i].result()
                if position == ends[i]:
                    del reading[i]
        finally:
            for future in reading.values():
                future.cancel()
