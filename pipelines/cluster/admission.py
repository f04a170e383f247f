"""Room for a job on a cluster that others use, too: what is free, and what a job waits for until there is
enough.

Workers and replicas hold their CPUs and GPUs for as long as a job runs; tasks come and go. A job that starts
with what a cluster has, and not with what is free, can end up with workers that wait for data and no CPU left
to make it, beside another job in the same state, and nothing says so.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping

import ray

from pipelines.cluster.capacity import reachable

logger = logging.getLogger(__name__)
_LOOK_S = 3.0  # tasks come and go: what is free at one of the moments within is not held
_TELL_EVERY_S = 30.0


def free() -> dict[str, float]:
    """Return what nothing holds, CPUs and GPUs, with what an autoscaler would still start."""
    total: dict[str, float] = dict(ray.cluster_resources())
    now: dict[str, float] = dict(ray.available_resources())
    have = reachable()
    return {name: now.get(name, 0.0) + have.get(name, 0.0) - total.get(name, 0.0) for name in ("CPU", "GPU")}


def wait_for_room(
    who: str,
    needed: Mapping[str, float],
    look: Callable[[], Mapping[str, float]] = free,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, float]:
    """Wait until so much is free, and say every half minute what is missing.

    Args:
        who: What waits, for the message.
        needed: CPUs and GPUs.
        look: Function that returns what is free at the moment.
        sleep: Function that waits.
        clock: Clock in seconds.

    Returns:
        What is free: the most of each that was seen at once within three seconds.
    """
    told_at: float | None = None
    while True:
        best: dict[str, float] = {}
        until = clock() + _LOOK_S
        while True:
            now = look()
            best = {name: max(now.get(name, 0.0), best.get(name, 0.0)) for name in ("CPU", "GPU")}
            if all(best[name] >= number for name, number in needed.items()):
                return best
            if clock() >= until:
                break
            sleep(0.2)
        if told_at is None or clock() - told_at >= _TELL_EVERY_S:
            told_at = clock()
            wants = " and ".join(
                f"{number:g} {name}s ({best[name]:g} free)" for name, number in needed.items() if number
            )
            logger.warning("%s waits for %s: the rest of the cluster is held by others", who, wants)


class Patience:
    """Says that a job stands still, and what is free meanwhile, while it does.

    Args:
        who: What stands still, for the message.
        after_s: Seconds after which that is said, and between two times.
    """

    def __init__(self, who: str, after_s: float = 60.0) -> None:
        self._who, self._after_s = who, after_s
        self._moved_at: float | None = None
        self._ended = threading.Event()
        threading.Thread(target=self._watch, name="patience", daemon=True).start()

    def waits(self) -> None:
        """Begin to wait, or go on waiting after something has moved."""
        self._moved_at = time.monotonic()

    def works(self) -> None:
        """End to wait."""
        self._moved_at = None

    def close(self) -> None:
        """End the watch."""
        self._ended.set()

    def _watch(self) -> None:
        told_at = 0.0
        while not self._ended.wait(self._after_s / 10):
            moved_at, now = self._moved_at, time.monotonic()
            if moved_at is None or now - max(moved_at, told_at) < self._after_s:
                continue
            told_at = now
            resources: dict[str, float] = dict(ray.available_resources())
            total: dict[str, float] = dict(ray.cluster_resources())
            logger.warning(
                "%s for %.0f s; free are %g of %g CPUs and %g of %g GPUs",
                self._who,
                now - moved_at,
                resources.get("CPU", 0.0),
                total.get("CPU", 0.0),
                resources.get("GPU", 0.0),
                total.get("GPU", 0.0),
            )
