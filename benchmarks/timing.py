"""Time one call: warm up, time single calls until there are enough, take the median.

CUDA work is asynchronous: a call is timed by events on the device's stream, and awaited. Other devices are
timed by the process's clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Call = Callable[[], object]
Stopwatch = Callable[[Call], float]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median and the quartiles of all calls."""

    median_s: float
    lower_quartile_s: float
    upper_quartile_s: float
    num_calls: int

    @property
    def spread(self) -> float:
        """Interquartile range over the median: differences smaller than this are noise."""
        return (self.upper_quartile_s - self.lower_quartile_s) / self.median_s if self.median_s else 0.0

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise the seconds of at least one call."""
        quartiles = (
            statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        )
        return cls(statistics.median(seconds), quartiles[0], quartiles[2], len(seconds))


def host_stopwatch(call: Call) -> float:
    """Run `call` and return its wall time in seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_stopwatch(call: Call) -> float:
    """Run `call` and return the CPU seconds of this thread, which exclude other work of the machine."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def cuda_stopwatch(call: Call) -> float:
    """Run `call` and return the seconds between its first and last work on the current CUDA stream, including
    launch gaps.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Return the stopwatch for work on `device`."""
    return cuda_stopwatch if device.type == "cuda" else host_stopwatch


def measure(
    call: Call,
    stopwatch: Stopwatch = host_stopwatch,
    *,
    warmup: int = 2,
    min_calls: int = 3,
    max_calls: int = 30,
    limit_s: float = 1.0,
) -> Timing:
    """Time `call`.

    Args:
        call: Work to time; its result is discarded.
        stopwatch: Function that runs a call and returns its seconds.
        warmup: Number of untimed calls first, for module loading, algorithm choice and the allocator.
        min_calls: Smallest number of timed calls.
        max_calls: Largest number of timed calls.
        limit_s: Total seconds of timed calls after which no further call starts.
    """
    for _ in range(warmup):
        stopwatch(call)
    seconds: list[float] = []
    while len(seconds) < min_calls or (len(seconds) < max_calls and sum(seconds) < limit_s):
        seconds.append(stopwatch(call))
    return Timing.of(seconds)


def fastest(works: Sequence[Call], repeats: int) -> list[float]:
    """Return the shortest wall time of each work, in seconds; works run in turn, so that a busy moment of the
    machine affects all of them.

    The works must end on the host: GPU work is not awaited.
    """
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, own in zip(works, times, strict=True):
            own.append(host_stopwatch(work))
    return [min(own) for own in times]
