"""How long one call takes: warm-up, then single calls timed until there are enough, then the median.

CUDA work is asynchronous, so there a call is timed by events on the device's stream and waited for; elsewhere
by the process's clock.
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
    """Seconds of one call: the median, and the middle half of all calls."""

    median_s: float
    lower_quartile_s: float
    upper_quartile_s: float
    num_calls: int

    @property
    def spread(self) -> float:
        """Width of the middle half over the median: differences smaller than this are noise."""
        return (self.upper_quartile_s - self.lower_quartile_s) / self.median_s if self.median_s else 0.0

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise measured calls; at least one."""
        quartiles = (
            statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
        )
        return cls(statistics.median(seconds), quartiles[0], quartiles[2], len(seconds))


def host_stopwatch(call: Call) -> float:
    """Run `call` and return the seconds that the process waited for it."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cpu_stopwatch(call: Call) -> float:
    """Run `call` and return the CPU seconds of this thread: what one core is busy with it, however many
    others share the machine.
    """
    start = time.thread_time()
    call()
    return time.thread_time() - start


def cuda_stopwatch(call: Call) -> float:
    """Run `call` and return the seconds between its first and its last work on the current CUDA stream,
    launch gaps included.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def stopwatch_for(device: torch.device) -> Stopwatch:
    """Return the stopwatch that is right for work on `device`."""
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
        call: the work; what it returns is dropped.
        stopwatch: runs a call and returns its seconds.
        warmup: calls before the first that counts: module load, algorithm choice, allocator.
        min_calls: timed in any case.
        max_calls: timed at most.
        limit_s: no further call once the timed ones have taken this long together.
    """
    for _ in range(warmup):
        stopwatch(call)
    seconds: list[float] = []
    while len(seconds) < min_calls or (len(seconds) < max_calls and sum(seconds) < limit_s):
        seconds.append(stopwatch(call))
    return Timing.of(seconds)


def fastest(works: Sequence[Call], repeats: int) -> list[float]:
    """Return the shortest wall time of each, in seconds; they take turns, so that a busy machine is busy for
    all of them.

    For works that end on the host: nothing is waited for on a GPU.
    """
    times: list[list[float]] = [[] for _ in works]
    for _ in range(repeats):
        for work, own in zip(works, times, strict=True):
            own.append(host_stopwatch(work))
    return [min(own) for own in times]
