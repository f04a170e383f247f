"""Blocks that one process produces, dealt to ranks in turn: block k to rank k mod N.

Ray Data's own way, `streaming_split` (2.60), gives a block to the rank that has had the fewest rows, which is
the same as long as each has one row, but lets every rank that waits look for its block a hundred times a
second, in the process that schedules the tasks; and starts such a process for each execution.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Deal(Generic[T]):
    """Deals what an iterator yields. It is asked, in a thread, only while a rank waits, so no more blocks are
    held than that takes; ranks sleep until their block is there.
    """

    def __init__(self, blocks: Iterator[T], num_ranks: int) -> None:
        lock = threading.Lock()
        self._wanted = threading.Condition(lock)
        self._came = [threading.Condition(lock) for _ in range(num_ranks)]
        self._dealt = [deque[T]() for _ in range(num_ranks)]
        self._waiting = set[int]()
        self._has_ended = False
        self._told = set[int]()
        self._error: Exception | None = None
        threading.Thread(target=self._deal, args=(blocks,), daemon=True, name="deal").start()

    def next(self, rank: int) -> T | None:
        """Return the next block of a rank, which asks for one after the other; None when there are no more.

        Raises:
            Exception: As the iterator raised it, after all blocks before.
        """
        came, dealt = self._came[rank], self._dealt[rank]
        with came:
            if not dealt and not self._has_ended:
                self._waiting.add(rank)
                self._wanted.notify()
                came.wait_for(lambda: dealt or self._has_ended)
            if dealt:
                return dealt.popleft()
            if self._error is not None:
                raise self._error
            self._told.add(rank)
            return None

    @property
    def is_over(self) -> bool:
        """Whether every rank has been told that there are no more blocks."""
        with self._wanted:
            return len(self._told) == len(self._dealt)

    def _deal(self, blocks: Iterator[T]) -> None:
        rank = 0
        try:
            while True:
                with self._wanted:
                    self._wanted.wait_for(lambda: self._waiting)
                block = next(blocks)
                with self._came[rank]:
                    self._dealt[rank].append(block)
                    self._waiting.discard(rank)
                    self._came[rank].notify()
                rank = (rank + 1) % len(self._dealt)
        except StopIteration:
            self._end(None)
        except Exception as error:  # it is the ranks' that wait for the block
            self._end(error)

    def _end(self, error: Exception | None) -> None:
        with self._wanted:
            self._has_ended, self._error = True, error
            for came in self._came:
                came.notify_all()
