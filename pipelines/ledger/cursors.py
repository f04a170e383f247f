"""How far a pass over the inputs has come: ranges of keys whose inputs all have their rows in the ledger.

    DST/_resshift/cursors.json     {"pass": {...}, "at": 1764028800.0, "finished": [["", "2024/07"], ...]}

A job that was stopped lists only what is not in these ranges when it is started again, so what is done costs
nothing. The file is written after the rows and removed when the pass is complete: the next run is a new pass,
which lists everything and finds what is new. What came into a finished range meanwhile waits until then, and
for that reason a pass is not continued when it has rested for a day.

Without the file, or with that of another pass, the ledger says what is done, as always.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from pipelines.ledger.ledger import DIRECTORY, Interval
from resshift import storage
from resshift.storage import StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

_CONTINUED_WITHIN_S = 24 * 3600.0


class Finished:
    """A set of keys as disjoint intervals in ascending order."""

    def __init__(self, intervals: Iterable[Interval] = ()) -> None:
        self.intervals: list[Interval] = []
        for start, stop in intervals:
            self.add(start, stop)

    def add(self, start: str, stop: str | None) -> None:
        """Add the keys from `start` to before `stop`."""
        if stop is not None and stop <= start:
            return
        merged: list[Interval] = []
        for one in sorted([*self.intervals, (start, stop)], key=lambda interval: interval[0]):
            if merged and (merged[-1][1] is None or one[0] <= merged[-1][1]):
                stops = (merged[-1][1], one[1])
                merged[-1] = (merged[-1][0], None if None in stops else max(filter(None, stops)))
            else:
                merged.append(one)
        self.intervals = merged

    def gaps(self) -> list[Interval]:
        """Return the intervals between them, in ascending order."""
        found: list[Interval] = []
        at: str | None = ""
        for start, stop in self.intervals:
            if at is not None and at < start:
                found.append((at, start))
            at = stop
        return found if at is None else [*found, (at, None)]


def _uri(root: str) -> str:
    return storage.join(root, f"{DIRECTORY}/cursors.json")


def read(root: str, which: Mapping[str, Any], options: S3Options = s3.DEFAULT) -> Finished:
    """Return what a pass that was stopped has finished; nothing where there is no such pass.

    Args:
        root: DST.
        which: What makes two passes the same: source, selection and the like, as JSON has it.
        options: How DST is reached.
    """
    try:
        found = json.loads(storage.read_bytes(_uri(root), options=options))
    except StorageError as error:
        if error.reason is not StorageReason.MISSING:
            raise
        return Finished()
    if found["pass"] != which or time.time() - found["at"] > _CONTINUED_WITHIN_S:
        return Finished()
    return Finished((start, stop) for start, stop in found["finished"])


def write(root: str, which: Mapping[str, Any], finished: Finished, options: S3Options = s3.DEFAULT) -> None:
    """Write what a pass has finished. Call it after the rows of these inputs are in place."""
    record = {"pass": dict(which), "at": time.time(), "finished": finished.intervals}
    storage.write_bytes(_uri(root), (json.dumps(record) + "\n").encode(), options, "application/json")


def remove(root: str, options: S3Options = s3.DEFAULT) -> None:
    """Remove the file: a pass is complete. Where nothing can be deleted it says that nothing is finished."""
    try:
        storage.remove(_uri(root), options)
    except StorageError:
        write(root, {}, Finished(), options)
