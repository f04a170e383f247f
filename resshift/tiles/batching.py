"""Calls of networks on tiles: those of one picture, or those of several pictures together.

What needs a network is a generator, `Work`: it yields a `TileCall` and is sent the result. So whoever drives
it decides what shares a call:

    picture = alone(work)                   one picture: a call has its own tiles
    future = batcher.submit(work)           many pictures: tiles of the same shape go through a network together

All calls on tiles of a shape have one size, filled up where there are fewer tiles. Kernels are chosen by
shape; as far as they treat the places of a batch alike, which `benchmarks/together.py` looks at, the same
picture gives the same bytes alone, beside others, and again.
"""

from __future__ import annotations

import collections
import threading
import time
import traceback
from collections.abc import Callable, Generator, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
MOST_OPEN = 16  # works under way at a time


@dataclass(frozen=True, slots=True, eq=False)
class TileCall:
    """A function that is wanted on n tiles.

    Fields:
        function: n values of every input -> n results; what it makes of one does not depend on the others.
            Calls of the same function (the same method of the same object) may be made as one.
        inputs: tensors whose first axis is n, on the function's device.
        size: n of every call that is made on such tiles; here n is at most that.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    size: int

    @property
    def count(self) -> int:
        """How many tiles."""
        return len(self.inputs[0])

    @property
    def key(self) -> Hashable:
        """Equal for calls that can be made as one."""
        return self.function, self.size, tuple(tensor.shape[1:] for tensor in self.inputs)


Work = Generator[TileCall, Tensor, T]


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """What a work returned, and its seconds of wall clock: its own, and its share of the calls by tiles.

    A GPU is not waited for after a call; the work that reads results from it has the seconds of all that it
    waits for.
    """

    value: T
    seconds: float


@dataclass(eq=False, slots=True)
class _Open:
    """A work under way: the call that it waits for, and what is there of it."""

    work: Work[Any]
    is_wanted: Callable[[], bool]
    future: Future[Done[Any]] = field(default_factory=Future[Done[Any]])
    call: TileCall | None = None
    results: list[Tensor] = field(default_factory=list[Tensor])
    num_done: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class _Part:
    """Tiles [start, stop) of the call that a work waits for."""

    entry: _Open
    start: int
    stop: int

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        assert self.entry.call is not None
        return tuple(tensor[self.start : self.stop] for tensor in self.entry.call.inputs)


class Batcher:
    """Drives works together. `submit` may be called from any thread; one thread at a time calls `turn`, or
    `serve`.

    The oldest work is always in the next call, so none waits for ever; others of the same shape fill it up. A
    new work is begun only while those under way have too few tiles for a call: large pictures are made one
    after the other, small ones together.

    Args:
        most_open: works under way at a time; each may hold windows of its picture.
    """

    def __init__(self, most_open: int = MOST_OPEN) -> None:
        self._most_open = most_open
        self._waiting: collections.deque[_Open] = collections.deque()
        self._open: list[_Open] = []
        self._changed = threading.Condition()

    def submit(self, work: Work[T], is_wanted: Callable[[], bool] = lambda: True) -> Future[Done[T]]:
        """Take a work into the line.

        Args:
            work: not yet begun.
            is_wanted: asked before it is begun; when it no longer is, the future is cancelled.

        Returns:
            Has the result, or the error that ended the work.
        """
        entry = _Open(work, is_wanted)
        with self._changed:
            self._waiting.append(entry)
            self._changed.notify()
        return entry.future

    def serve(self) -> None:
        """Work for ever.

        Raises:
            torch.AcceleratorError: see `turn`.
        """
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._waiting or self._open))
            self.turn()

    @torch.inference_mode()
    def turn(self) -> bool:
        """Make one call and let every work that has its result go on; False when there is nothing to do.

        Raises:
            torch.AcceleratorError: an illegal access. The context of the device is unusable, and with it all
                works.
        """
        parts = self._next_parts()
        if parts:
            self._make(parts)
        return bool(self._open or self._waiting)

    def _next_parts(self) -> list[_Part]:
        """Return what the next call is made of; begins works until there are tiles enough."""
        while True:
            if self._has_enough() or not self._begin():
                return self._parts_for_oldest()

    def _has_enough(self) -> bool:
        """Tell whether works under way fill a call, whatever their shapes: each may hold windows of a
        picture.
        """
        if not self._open:
            return False
        num_waiting = sum(_call(entry).count - entry.num_done for entry in self._open)
        return num_waiting >= _call(self._open[0]).size or len(self._open) >= self._most_open

    def _parts_for_oldest(self) -> list[_Part]:
        """Return tiles of the oldest work, and of others that can share its call, up to the size of one."""
        if not self._open:
            return []
        first = _call(self._open[0])
        parts: list[_Part] = []
        room = first.size
        for entry in self._open:
            if room and _call(entry).key == first.key:
                stop = min(_call(entry).count, entry.num_done + room)
                parts.append(_Part(entry, entry.num_done, stop))
                room -= stop - entry.num_done
        return parts

    def _begin(self) -> bool:
        """Begin the next work of the line; False when there is none."""
        with self._changed:
            if not self._waiting:
                return False
            entry = self._waiting.popleft()
        if not entry.is_wanted():
            entry.work.close()
            entry.future.cancel()
            return True
        self._open.append(entry)
        self._go_on(entry, partial(next, entry.work))
        return True

    def _make(self, parts: Sequence[_Part]) -> None:
        started = time.perf_counter()
        results = self._results(parts)
        if isinstance(results, Exception):
            if len(parts) > 1:
                del results
                for part in parts:  # so that the error meets only the work that it belongs to
                    self._make([part])
            else:
                self._go_on(parts[0].entry, partial(parts[0].entry.work.throw, results))
            return
        seconds = (time.perf_counter() - started) / sum(map(len, results))
        for part, result in zip(parts, results, strict=True):
            entry = part.entry
            entry.results.append(result)
            entry.num_done, entry.seconds = part.stop, entry.seconds + seconds * len(result)
            if entry.num_done == _call(entry).count:
                self._go_on(entry, partial(_send, entry.work, entry.results))

    def _results(self, parts: Sequence[_Part]) -> list[Tensor] | Exception:
        """Make a call; an error is returned, without the tensors that its frames hold: what comes next may
        need their memory.
        """
        try:
            return _compute(_call(parts[0].entry), [part.inputs for part in parts])
        except torch.AcceleratorError:
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            return error

    def _go_on(self, entry: _Open, step: Callable[[], TileCall]) -> None:
        """Let a work run to its next call, or to its end."""
        entry.results, entry.num_done = [], 0
        started = time.perf_counter()
        try:
            entry.call = step()
        except StopIteration as end:
            self._open.remove(entry)
            entry.future.set_result(Done(end.value, entry.seconds + time.perf_counter() - started))
        except torch.AcceleratorError:
            raise
        except Exception as error:
            self._open.remove(entry)
            entry.call = None
            traceback.clear_frames(error.__traceback__)
            entry.future.set_exception(error)
        else:
            entry.seconds += time.perf_counter() - started


def alone(work: Work[T]) -> T:
    """Do a work with calls of its own and return its result.

    Raises:
        Exception: what ended the work.
    """
    batcher = Batcher()
    future = batcher.submit(work)
    while batcher.turn():
        pass
    return future.result().value


def _send(work: Work[Any], results: Sequence[Tensor]) -> TileCall:
    return work.send(results[0] if len(results) == 1 else torch.cat(list(results)))


def _call(entry: _Open) -> TileCall:
    assert entry.call is not None  # of every work that is open
    return entry.call


def _compute(call: TileCall, parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Make one call of `call.size` tiles, the last repeated where there are fewer, and return the results of
    each part.
    """
    counts = [len(part[0]) for part in parts]
    num_missing = call.size - sum(counts)
    inputs: list[Tensor] = []
    for tensors in zip(*parts, strict=True):
        filled = (
            [*tensors, tensors[-1][-1:].expand(num_missing, *tensors[-1].shape[1:])]
            if num_missing
            else list(tensors)
        )
        inputs.append(filled[0] if len(filled) == 1 else torch.cat(filled))
    return list(call.function(*inputs)[: sum(counts)].split(counts))
