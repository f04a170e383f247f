"""How a bulk job is doing: a live line on a terminal, JSON lines elsewhere, and Prometheus metrics through
Ray.

    {"time": 1764028800.0, "done": 1200, "failed": 3, "skipped": 0, "listed": 5000, "is_listed": false, "pictures_per_s": 14.2, ...}

Metrics (exported by every Ray node): `ray_resshift_bulk_pictures_total{status,reason}`,
`ray_resshift_bulk_megapixels_total`, `ray_resshift_bulk_replicas`, `ray_resshift_bulk_pending`.
"""

from __future__ import annotations

import collections
import json
import sys
import time
from collections import Counter
from types import TracebackType
from typing import TextIO

from ray.util.metrics import Counter as MetricsCounter
from ray.util.metrics import Gauge
from rich.console import Console
from rich.live import Live
from rich.text import Text
from typing_extensions import TypedDict  # the one that pydantic takes below Python 3.12

from pipelines.bulk.selection import ListingCounts
from pipelines.ledger.ledger import Row

_WINDOW_S = 60.0


class ProgressSnapshot(TypedDict):
    """The state of a bulk job that runs.

    Fields:
        time: Unix time.
        done, failed, skipped: Number of inputs with such a row from this run.
        before: Number of inputs that were done before this run.
        listed: Number of inputs in the listing so far.
        is_listed: Whether the listing has come to its end.
        pictures_per_s, megapixels_per_s: Rates of inputs over the last minute.
        eta_s: Expected seconds to the end; None until the listing has come to its end.
        replicas: Number of replicas that are ready.
    """

    time: float
    done: int
    failed: int
    skipped: int
    before: int
    listed: int
    is_listed: bool
    pictures_per_s: float
    megapixels_per_s: float
    eta_s: int | None
    replicas: int


class Rate:
    """Events a second over the last minute."""

    def __init__(self) -> None:
        self._points: collections.deque[tuple[float, float, float]] = collections.deque()

    def add(self, now: float, pictures: float, megapixels: float) -> None:
        """Note the totals at a time."""
        self._points.append((now, pictures, megapixels))
        while len(self._points) > 2 and now - self._points[0][0] > _WINDOW_S:
            self._points.popleft()

    def value(self) -> tuple[float, float]:
        """Return (pictures a second, megapixels of input a second)."""
        if len(self._points) < 2:
            return 0.0, 0.0
        (t0, pictures0, megapixels0), (t1, pictures1, megapixels1) = self._points[0], self._points[-1]
        seconds = max(t1 - t0, 1e-9)
        return (pictures1 - pictures0) / seconds, (megapixels1 - megapixels0) / seconds


class Progress:
    """Counts rows and shows them.

    Args:
        listing: Counts of the listing, shared with the `Worklist`.
        out: Stream to write to, standard error when None: a live line on a terminal, JSON lines elsewhere.
        every_s: Seconds between two JSON lines.
    """

    def __init__(self, listing: ListingCounts, out: TextIO | None = None, every_s: float = 10.0) -> None:
        self.listing = listing
        self.counts: Counter[str] = Counter()
        self.megapixels = 0.0
        self.num_replicas = 0
        self.is_listed = False
        self._out, self._every_s = out or sys.stderr, every_s
        self._rate = Rate()
        self._last_line = time.monotonic()
        self._live = (
            Live(console=Console(file=self._out), refresh_per_second=4, transient=False)
            if self._out.isatty()
            else None
        )
        self._pictures = MetricsCounter(
            "resshift_bulk_pictures_total", "Inputs with a row", tag_keys=("status", "reason")
        )
        self._megapixels = MetricsCounter("resshift_bulk_megapixels_total", "Megapixels of input upscaled")
        self._replicas = Gauge("resshift_bulk_replicas", "Replicas that are ready")
        self._pending = Gauge("resshift_bulk_pending", "Inputs listed and without a row")

    def __enter__(self) -> Progress:
        if self._live is not None:
            self._live.start()
        self._rate.add(time.monotonic(), 0, 0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.show(force=True)
        if self._live is not None:
            self._live.stop()

    def count(self, row: Row) -> None:
        """Count a finished row."""
        self.counts[row["status"]] += 1
        megapixels = (row["width_in"] or 0) * (row["height_in"] or 0) / 1e6
        self._pictures.inc(1, {"status": row["status"], "reason": row["reason"] or ""})
        if row["status"] == "ok" and megapixels:
            self.megapixels += megapixels
            self._megapixels.inc(megapixels)

    def snapshot(self) -> ProgressSnapshot:
        """Return what is shown."""
        pictures_per_s, megapixels_per_s = self._rate.value()
        left = self.listing.pending + self.listing.refused - sum(self.counts.values())
        return {
            "time": round(time.time(), 1),
            "done": self.counts["ok"],
            "failed": self.counts["failed"],
            "skipped": self.counts["skipped"],
            "before": self.listing.done,
            "listed": self.listing.listed,
            "is_listed": self.is_listed,
            "pictures_per_s": round(pictures_per_s, 2),
            "megapixels_per_s": round(megapixels_per_s, 3),
            # Until the listing is through, nobody knows how much there is.
            "eta_s": round(left / pictures_per_s) if self.is_listed and pictures_per_s > 0 else None,
            "replicas": self.num_replicas,
        }

    def show(self, *, force: bool = False) -> None:
        """Show the state when it is time to."""
        now = time.monotonic()
        self._rate.add(now, sum(self.counts.values()), self.megapixels)
        self._replicas.set(self.num_replicas)
        self._pending.set(max(0, self.listing.pending + self.listing.refused - sum(self.counts.values())))
        state = self.snapshot()
        if self._live is not None:
            self._live.update(Text(line(state)))
        elif force or now - self._last_line >= self._every_s:
            self._last_line = now
            self._out.write(json.dumps(state) + "\n")
            self._out.flush()


def line(state: ProgressSnapshot) -> str:
    """Return the live line of a snapshot."""
    of = f"/{state['listed'] - state['before']}{'' if state['is_listed'] else '+'}"
    eta = (
        ""
        if state["eta_s"] is None
        else f"  ETA {state['eta_s'] // 3600}:{state['eta_s'] // 60 % 60:02d}:{state['eta_s'] % 60:02d}"
    )
    return (
        f"{state['done']}{of} done  {state['failed']} failed  {state['skipped']} skipped  "
        f"{state['pictures_per_s']:.1f} img/s  {state['megapixels_per_s']:.2f} MP/s  {state['replicas']} "
        f"replicas{eta}"
    )
