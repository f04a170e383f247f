"""Batches on the device, the next one copied while a step is computed.

    thread:  source -> pinned memory A, B, A, ... -> device buffers A, B, A, ...  on a stream of its own
    loop:                                            step on A, on B, on A, ...

A buffer is written again when the step that read it has ended, and pinned memory when the copy from it has.
The device or the thread waits for both, so the loop waits for data alone. On a CPU there is nothing to copy
to: batches are taken from the source between two steps.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, cuda

Batch = Mapping[str, NDArray[Any]]
PICTURES = ("hq", "lq", "mask", "plan")
_CLOSE_S = 10.0  # for a source that does not answer when a run fails


class Fed(NamedTuple):
    """A batch for a step.

    Fields:
        batch: Columns of the batch besides the pictures.
        pictures: "hq" and "lq", or "hq" and "plan", and perhaps "mask" on the device, uint8; valid until the
            next batch is asked for.
        waited_s: Seconds that the loop waited for it.
    """

    batch: Batch
    pictures: dict[str, Tensor]
    waited_s: float


@dataclass(eq=False, slots=True)
class _Buffer:
    """Memory of one batch on both sides, and what must have happened before it is written again."""

    pinned: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    pictures: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    copied: cuda.Event = field(default_factory=lambda: cuda.Event())
    used: cuda.Event = field(default_factory=lambda: cuda.Event())


def feed(source: Generator[Batch], device: torch.device, num_batches: int) -> Generator[Fed]:
    """Yield the first batches of a source on a device. Closes the source at the end.

    Args:
        source: Batches with pictures as uint8 arrays, always of the same shapes.
        device: Device of the steps, which are queued on its current stream before the next batch is asked
            for.
        num_batches: Number of batches to take.

    Raises:
        Exception: What the source raised.
    """
    if device.type != "cuda":
        yield from _taken(source, num_batches)
        return
    copies = cuda.Stream(device)
    free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[Batch, _Buffer] | BaseException] = queue.SimpleQueue()
    for _ in range(2):
        free.put(_Buffer())

    def work() -> None:
        try:
            with cuda.device(device):  # of this thread
                for _ in range(num_batches):
                    batch = next(source)
                    if (buffer := free.get()) is None:
                        break
                    _fill(buffer, batch, device, copies)
                    rest = {name: column for name, column in batch.items() if name not in PICTURES}
                    ready.put((rest, buffer))
        except BaseException as error:  # the loop raises it
            ready.put(error)
        finally:
            source.close()

    thread = threading.Thread(target=work, name="feed", daemon=True)
    thread.start()
    try:
        for _ in range(num_batches):
            started = time.perf_counter()
            found = ready.get()
            if isinstance(found, BaseException):
                raise found
            batch, buffer = found
            stream = cuda.current_stream(device)
            stream.wait_event(buffer.copied)
            yield Fed(batch, buffer.pictures, time.perf_counter() - started)
            buffer.used.record(stream)
            free.put(buffer)
    finally:
        free.put(None)
        thread.join(_CLOSE_S)


def _fill(buffer: _Buffer, batch: Batch, device: torch.device, copies: cuda.Stream) -> None:
    """Queue the copy of a batch to the device."""
    names = [name for name in PICTURES if name in batch]
    if not buffer.pinned:
        buffer.pinned = {name: _empty(batch[name].shape, None) for name in names}
        buffer.pictures = {name: _empty(batch[name].shape, device) for name in names}
    buffer.copied.synchronize()
    for name in names:
        buffer.pinned[name].numpy()[...] = batch[name]
    copies.wait_event(buffer.used)
    with cuda.stream(copies):
        for name in names:
            _queue_copy(buffer.pictures[name], buffer.pinned[name])
        buffer.copied.record(copies)


def _empty(shape: tuple[int, ...], device: torch.device | None) -> Tensor:
    """Return memory on the device, or pinned memory of the host."""
    return torch.empty(shape, dtype=torch.uint8, device=device, pin_memory=device is None)


def _queue_copy(target: Tensor, source: Tensor) -> None:
    target.copy_(source, non_blocking=True)


def _taken(source: Generator[Batch], num_batches: int) -> Generator[Fed]:
    try:
        for _ in range(num_batches):
            started = time.perf_counter()
            batch = next(source)
            waited_s = time.perf_counter() - started
            # Copied: the arrays are in Ray's shared memory, which is read-only.
            pictures = {name: torch.from_numpy(batch[name].copy()) for name in PICTURES if name in batch}
            yield Fed(batch, pictures, waited_s)
    finally:
        source.close()
