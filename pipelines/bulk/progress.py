"""How far a bulk job has come, for people and as Prometheus metrics through Ray.

    {"time": 1764028800.0, "done": 1200, "failed": 3, ..., "megapixels_per_s": 5.6, "replicas": 4}

Metrics (exported by every Ray node): `ray_resshift_bulk_pictures_total{status,reason}`,
`ray_resshift_bulk_megapixels_total`, `ray_resshift_bulk_replicas`, `ray_resshift_bulk_pending`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NotRequired, cast

from ray.util.metrics import Counter as MetricsCounter
from ray.util.metrics import Gauge
from typing_extensions import TypedDict  # the one that pydantic takes below Python 3.12

from pipelines.bulk.selection import ListingCounts
from pipelines.ledger.ledger import Row
from resshift.progress import Progress, Rate


class ProgressSnapshot(TypedDict):
    """The state of a bulk job that runs.

    Fields:
        time: Unix time.
        done, failed, skipped: Number of inputs with such a row from this run.
        before: Number of inputs that were done before this run.
        listed: Number of inputs in the listing so far.
        is_listed: Whether the listing has come to its end.
        pictures_per_s, megapixels_per_s: Rates of inputs that were upscaled, over the last minute.
        eta_s: Expected seconds to the end if no input fails; None until the listing has come to its end.
        replicas: Number of replicas that are ready.
        share: Sum of the shares of inputs under way that are done, of those that take long; left out if 0.
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
    share: NotRequired[float]


class JobProgress(Progress):
    """Counts of the rows of a bulk job.

    Args:
        listing: Counts of the listing, shared with the `Worklist`.
    """

    def __init__(self, listing: ListingCounts) -> None:
        super().__init__("pictures")
        self.listing = listing
        self.is_listed = False
        self.megapixels = 0.0
        self.num_replicas = 0
        self._megapixel_rate = Rate()
        self._pictures = MetricsCounter(
            "resshift_bulk_pictures_total", "Inputs with a row", tag_keys=("status", "reason")
        )
        self._megapixels = MetricsCounter("resshift_bulk_megapixels_total", "Megapixels of input upscaled")
        self._replicas = Gauge("resshift_bulk_replicas", "Replicas that are ready")
        self._pending = Gauge("resshift_bulk_pending", "Inputs listed and without a row")

    def count(self, rows: Sequence[Row]) -> None:
        """Count finished rows."""
        for (status, reason), num in Counter((row["status"], row["reason"] or "") for row in rows).items():
            self.add(status, num)
            self._pictures.inc(num, {"status": status, "reason": reason})
        sides = ((row["width_in"] or 0, row["height_in"] or 0) for row in rows if row["status"] == "ok")
        if megapixels := sum(width * height for width, height in sides) / 1e6:
            self.megapixels += megapixels
            self._megapixels.inc(megapixels)

    def take(self, counts: Counter[str], megapixels: float) -> None:
        """Show what others have counted."""
        self.counts, self.megapixels = counts, megapixels

    def watch(self, num_replicas: int, is_listed: bool) -> None:
        """Note the state of the job beyond its rows; called twice a second, so that rates follow it."""
        self.num_replicas, self.is_listed = num_replicas, is_listed
        self._replicas.set(num_replicas)
        state = self.snapshot()
        num_worked_on = state["done"] + state["failed"] + state["skipped"]
        self._pending.set(max(0, state["listed"] - state["before"] - num_worked_on))

    def snapshot(self) -> ProgressSnapshot:
        """Return the state that is shown."""
        self.listed, self.before = self.listing.listed, self.listing.done
        more: dict[str, Any] = {
            "megapixels_per_s": round(self._megapixel_rate.update(self.megapixels), 3),
            "replicas": self.num_replicas,
        }
        return cast(ProgressSnapshot, {**super().snapshot(), **more})
