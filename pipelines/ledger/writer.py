"""Rows on their way into the ledger: in parts, in order, beside the work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from pipelines.bulk.stages import Row


class LedgerWriter:
    """Collects rows and writes them in parts, in a thread of its own: a slow store must not hold up the loop.

    A part is full with 100 rows or 1 % of what this run has written, and is not kept longer than 10 s,
    growing to 2 minutes in a long run: little is repeated after a crash, and ten million rows make some
    thousand parts.

    Args:
        write: writes a part and returns when it is there.
    """

    def __init__(self, write: Callable[[Sequence[Row]], None]) -> None:
        self._write = write
        self._rows: list[Row] = []
        self._num_written = 0
        self._started = self._last = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._parts: list[asyncio.Future[None]] = []

    def add(self, row: Row) -> None:
        """Take a row whose output is in place; called in the loop."""
        self._rows.append(row)
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Write a part when it is full or old enough.

        Raises:
            StorageError: an earlier part could not be written.
        """
        now = time.monotonic()
        patience = min(120.0, max(10.0, (now - self._started) / 100))
        if len(self._rows) >= max(100, self._num_written // 100) or (
            self._rows and now - self._last > patience
        ):
            rows, self._rows, self._last = self._rows, [], now
            self._num_written += len(rows)
            done = [part for part in self._parts if part.done()]
            self._parts = [part for part in self._parts if not part.done()]
            for part in done:
                part.result()
            self._parts.append(asyncio.get_running_loop().run_in_executor(self._pool, self._write, rows))

    def close(self) -> None:
        """Write what is left and wait for everything; blocks.

        Raises:
            StorageError: a part could not be written.
        """
        rows, self._rows = self._rows, []
        last = self._pool.submit(self._write, rows)
        self._pool.shutdown(wait=True)
        for part in self._parts:
            if part.done() and not part.cancelled():
                part.result()
        last.result()
