"""What a bulk job shows while it runs."""

from __future__ import annotations

from pydantic import TypeAdapter

from pipelines.bulk.progress import JobProgress, ProgressSnapshot
from pipelines.bulk.selection import ListingCounts
from pipelines.ledger import ledger


def test_rows_are_counted_against_the_listing() -> None:
    listing = ListingCounts(listed=4, done=1, pending=2, refused=1)
    progress = JobProgress(listing)
    progress.count([ledger.row("a", "e", "ok", width_in=1000, height_in=500)])
    progress.count([ledger.row("b", "e", "failed", reason="empty", width_in=1000, height_in=500)])
    assert progress.snapshot()["eta_s"] is None
    listing.listed, listing.pending = 5, 3
    progress.watch(num_replicas=2, is_listed=True)
    state = progress.snapshot()
    shown = ("done", "failed", "skipped", "before", "listed", "is_listed", "replicas")
    assert [state[name] for name in shown] == [1, 1, 0, 1, 5, True, 2]  # type: ignore[literal-required]
    assert list(state) == [
        *("time", "done", "failed", "skipped", "before", "listed", "is_listed", "pictures_per_s", "eta_s"),
        *("megapixels_per_s", "replicas"),
    ]
    assert progress.megapixels == 0.5
    progress.share = 0.25
    told = TypeAdapter(ProgressSnapshot).validate_python(progress.snapshot())  # as an answer over HTTP
    assert told.get("share") == 0.25
    assert state["eta_s"] is not None
