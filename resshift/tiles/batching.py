"""Batches of tiles for the networks: of one picture, or of several pictures together.

Whatever needs a network is a generator, `Work`: it yields a `TileCall` and is sent the result. The caller
that drives it decides what shares a call:

    picture = alone(work)                   one picture: a call holds its tiles only
    future = batcher.submit(work)           many pictures: tiles of the same shape share calls

All calls on tiles of one shape have the same size; missing tiles are filled up. Kernels are chosen by shape.
As far as they treat all places of a batch alike, which `benchmarks/together.py` checks, a picture has the
same bytes alone, beside others, and when it is computed again.
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
MOST_OPEN = 16  # number of works under way at a time
_SMALL = 1 / 8  # of the size of the oldest work under way: such a work does not wait for it


@dataclass(frozen=True, slots=True, eq=False)
class TileCall:
    """A request to call a function on n tiles.

    Fields:
        function: Function of n values of every input that returns n results, each independent of the others.
            Calls of the same function (the same method of the same object) may be merged.
        inputs: Tensors on the function's device; the first axis has length n.
        size: Number of tiles in each call that is made, at least n.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    size: int

    @property
    def count(self) -> int:
        """Number of tiles."""
        return len(self.inputs[0])

    @property
    def key(self) -> Hashable:
        """Key that is equal for calls that can be merged."""
        return self.function, self.size, tuple(tensor.shape[1:] for tensor in self.inputs)


Work = Generator[TileCall, Tensor, T]


@dataclass(frozen=True, slots=True)
class Done(Generic[T]):
    """Result of a work.

    Fields:
        value: Value that the work returned.
        seconds: wall-clock time of the work itself plus its share of the calls, in proportion to its tiles. A
            call returns before a GPU has computed it, so the time is charged to the work that reads the
            result.
    """

    value: T
    seconds: float


@dataclass(eq=False, slots=True)
class _Open:
    """A work under way, with the call that it waits for and the results so far."""

    work: Work[Any]
    is_wanted: Callable[[], bool]
    size: float = 0.0
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
    """Runs works together. `submit` may be called from any thread; `turn` and `serve` from one thread at a
    time.

    The oldest work is part of every call, so none waits forever; others with tiles of the same shape fill the
    call up. A new work is begun only while those under way have too few tiles for a call: large pictures are
    computed one after the other, small ones together. Small works pass a large one: every other call is
    theirs, and they are begun while theirs have too few tiles for a call.

    Args:
        most_open: Number of works under way at a time; each may hold windows of its picture.
        watch: Called with True before each step of a work and each call, and by `serve` with False when
            there is nothing to do.
    """

    def __init__(self, most_open: int = MOST_OPEN, watch: Callable[[bool], None] = lambda _: None) -> None:
        self._most_open, self._watch = most_open, watch
        self._waiting: collections.deque[_Open] = collections.deque()
        self._open: list[_Open] = []
        self._is_turn_of_small = False
        self._changed = threading.Condition()

    def submit(
        self, work: Work[T], is_wanted: Callable[[], bool] = lambda: True, size: float = 0.0
    ) -> Future[Done[T]]:
        """Queue a work.

        Args:
            work: Work that has not begun.
            is_wanted: Asked before each call; when it returns False, the work ends and the future is
                cancelled.
            size: Size of the work in any unit, for example pixels; 0: it neither passes nor is passed.

        Returns:
            A future of the result, or of the error that ended the work.
        """
        entry = _Open(work, is_wanted, size)
        with self._changed:
            self._waiting.append(entry)
            self._changed.notify()
        return entry.future

    def serve(self) -> None:
        """Process works until the process ends.

        Raises:
            torch.AcceleratorError: See `turn`.
        """
        while True:
            with self._changed:
                if not (self._waiting or self._open):
                    self._watch(False)
                self._changed.wait_for(lambda: bool(self._waiting or self._open))
            self.turn()

    @torch.inference_mode()
    def turn(self) -> bool:
        """Make one call and resume every work that has its result; return False when there is nothing to do.

        Raises:
            torch.AcceleratorError: Illegal access on the device, which makes its context and all works
                unusable.
        """
        parts = self._next_parts()
        if parts:
            self._make(parts)
        return bool(self._open or self._waiting)

    def _next_parts(self) -> list[_Part]:
        """Return the parts of the next call; end works that nobody wants, begin works until there are enough
        tiles.
        """
        for entry in tuple(self._open):
            if not entry.is_wanted():
                self._open.remove(entry)
                _drop(entry)
        while not self._has_enough() and self._begin():
            pass
        while not self._has_enough_small() and self._begin(self._is_small):
            pass
        small = next(filter(self._is_small, self._open), None)
        self._is_turn_of_small = small is not None and not self._is_turn_of_small
        lead = small if self._is_turn_of_small else next(iter(self._open), None)
        return [] if lead is None else self._parts_for(lead)

    def _is_small(self, entry: _Open) -> bool:
        """Tell whether a work need not wait for the oldest one under way."""
        return bool(self._open) and 0 < entry.size <= _SMALL * self._open[0].size

    def _has_enough_small(self) -> bool:
        """Tell whether the small works under way fill a call."""
        small = list(filter(self._is_small, self._open))
        num_waiting = sum(_call(entry).count - entry.num_done for entry in small)
        return len(self._open) >= self._most_open or bool(small and num_waiting >= _call(small[0]).size)

    def _has_enough(self) -> bool:
        """Tell whether the works under way fill a call, regardless of the shapes of their tiles: each may
        hold windows of a picture.
        """
        if not self._open:
            return False
        num_waiting = sum(_call(entry).count - entry.num_done for entry in self._open)
        return num_waiting >= _call(self._open[0]).size or len(self._open) >= self._most_open

    def _parts_for(self, lead: _Open) -> list[_Part]:
        """Return tiles of a work and of others that can share its call, the oldest first, up to the call's
        size.
        """
        first = _call(lead)
        parts: list[_Part] = []
        room = first.size
        for entry in (lead, *(other for other in self._open if other is not lead)):
            if room and _call(entry).key == first.key:
                stop = min(_call(entry).count, entry.num_done + room)
                parts.append(_Part(entry, entry.num_done, stop))
                room -= stop - entry.num_done
        return parts

    def _begin(self, may: Callable[[_Open], bool] = lambda _: True) -> bool:
        """Begin the next work of the queue that may begin; return False when there is none."""
        with self._changed:
            entry = next(filter(may, self._waiting), None)
            if entry is None:
                return False
            self._waiting.remove(entry)
        if not entry.is_wanted():
            _drop(entry)
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
                for part in parts:  # so that the error reaches only the work that caused it
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
        """Make a call. An error is returned without the tensors that its frames hold: the next call may need
        their memory.
        """
        self._watch(True)
        try:
            return _compute(_call(parts[0].entry), [part.inputs for part in parts])
        except torch.AcceleratorError:
            raise
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            return error

    def _go_on(self, entry: _Open, step: Callable[[], TileCall]) -> None:
        """Run a work to its next call, or to its end."""
        entry.results, entry.num_done = [], 0
        self._watch(True)
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
    """Run a work by itself and return its result.

    Raises:
        Exception: Error that ended the work.
    """
    batcher = Batcher()
    future = batcher.submit(work)
    while batcher.turn():
        pass
    return future.result().value


def _drop(entry: _Open) -> None:
    entry.work.close()
    entry.future.cancel()


def _send(work: Work[Any], results: Sequence[Tensor]) -> TileCall:
    return work.send(results[0] if len(results) == 1 else torch.cat(list(results)))


def _call(entry: _Open) -> TileCall:
    assert entry.call is not None  # every open work waits for a call
    return entry.call


def _compute(call: TileCall, parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """Make one call of `call.size` tiles and return the results of each part. If there are fewer tiles, the
    last one is repeated.
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
