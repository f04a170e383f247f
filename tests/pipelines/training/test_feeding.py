"""Every step sees its own batch, however late a device does what is queued on it.

CUDA is stood in for by streams that run what is queued at the last moment: when somebody waits for it. Any
wait that is missing in `feeding` then shows as a batch that is overwritten or not there yet.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipelines.training import feeding
from pipelines.training.feeding import Batch, feed

NUM_BATCHES = 7
LOCK = threading.RLock()


class Stream:
    def __init__(self, *_: object) -> None:
        self.queued: list[Callable[[], object]] = []
        self.done = 0

    def run(self, stop: int) -> None:
        with LOCK:
            while self.done < stop:
                self.done += 1
                self.queued[self.done - 1]()

    def wait_event(self, event: Event) -> None:
        stream, position = event.stream, event.position
        if stream is not None:
            self.queued.append(lambda: stream.run(position))


class Event:
    def __init__(self) -> None:
        self.stream: Stream | None = None
        self.position = 0

    def record(self, stream: Stream) -> None:
        self.stream, self.position = stream, len(stream.queued)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.run(self.position)


class LateCuda(SimpleNamespace):
    """The part of torch.cuda that `feeding` uses; the loop has the stream `steps`."""

    def __init__(self) -> None:
        super().__init__(Stream=Stream, Event=Event)
        self.steps = Stream()
        self.copies: Stream | None = None

    def device(self, _: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def current_stream(self, _: object = None) -> Stream:
        return self.steps

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Generator[None]:
        self.copies = stream
        yield

    def queue_copy(self, target: Tensor, source: Tensor) -> None:
        assert self.copies is not None
        self.copies.queued.append(lambda: target.copy_(source))


class CudaDevice:
    """A device of type cuda whose tensors are on the CPU."""

    type = "cuda"


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateCuda:
    late = LateCuda()
    monkeypatch.setattr(feeding, "cuda", late)
    monkeypatch.setattr(feeding, "_queue_copy", late.queue_copy)
    monkeypatch.setattr(feeding, "_empty", lambda shape, _: torch.empty(shape, dtype=torch.uint8))
    return late


def batches(closed: list[bool], broken_at: int | None = None) -> Generator[Batch]:
    try:
        for i in range(100):
            if i == broken_at:
                raise ValueError("no more pictures")
            yield {"hq": np.full((2, 8, 8, 3), i, np.uint8), "row": np.array([2 * i, 2 * i + 1])}
    finally:
        closed.append(True)


def seen_by_steps(late: LateCuda) -> list[int]:
    """Return the value of the pictures that each step reads; steps run after all of them are queued."""
    device: Any = CudaDevice()
    seen: list[int] = []
    rows: list[int] = []
    for fed in feed(batches([]), device, NUM_BATCHES):
        rows.append(int(fed.batch["row"][0]))
        late.steps.queued.append(lambda hq=fed.pictures["hq"]: seen.append(int(hq[0, 0, 0, 0])))
    late.steps.run(len(late.steps.queued))
    assert rows == [2 * i for i in range(NUM_BATCHES)]
    return seen


def test_every_step_sees_its_batch(late: LateCuda) -> None:
    assert seen_by_steps(late) == list(range(NUM_BATCHES))


@pytest.mark.parametrize("missing", ["copies for steps", "steps for copies", "thread for copies"])
def test_without_a_wait_a_step_sees_another_batch(
    missing: str, late: LateCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in is strict enough: each of the three waits is needed."""
    original = Stream.wait_event

    def wait_event(stream: Stream, event: Event) -> None:
        if (stream is late.steps) == (missing == "copies for steps"):
            original(stream, event)

    if missing == "thread for copies":
        monkeypatch.setattr(Event, "synchronize", lambda self: None)
    else:
        monkeypatch.setattr(Stream, "wait_event", wait_event)
    assert seen_by_steps(late) != list(range(NUM_BATCHES))


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("device", [CudaDevice(), torch.device("cpu")], ids=["cuda", "cpu"])
def test_source_is_closed_and_its_error_is_raised(device: Any) -> None:
    closed: list[bool] = []
    with pytest.raises(ValueError, match="no more pictures"):
        list(feed(batches(closed, broken_at=3), device, NUM_BATCHES))
    assert closed == [True]
    closed.clear()
    assert len(list(feed(batches(closed), device, 2))) == 2
    assert closed == [True]
    closed.clear()
    with contextlib.closing(feed(batches(closed), device, NUM_BATCHES)) as stopped:
        next(stopped)
    assert closed == [True]
