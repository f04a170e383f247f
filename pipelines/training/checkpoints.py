"""Checkpoints of a run on local or S3 storage: published whole, found, verified, removed.

    OUT/step-00005000/{run.json, model.safetensors, ...}, and last files.json
    OUT/best.json             step and figure of the best checkpoint by validation

A checkpoint exists from the moment its `files.json` does, which one atomic write decides: whatever is killed
before leaves a directory without it, which no reader sees and the next start removes. Deleting begins with
`files.json` for the same reason. Ray Train has a publication of its own; it is not used, because its list of
checkpoints is one file that is rewritten in place (on a local disk a kill in that moment ends the run for
good), and because it leaves the directories of killed uploads behind (Ray 2.60).

In a sharded run each worker uploads its own part, and then a receipt with the part's size and sha256; the
first worker waits for the receipts of all, which become lines of `files.json`.
"""

from __future__ import annotations

import json
import logging
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resshift import storage
from resshift.models import WeightsError
from resshift.storage import StorageError, StorageReason
from resshift.training import checkpoint
from resshift.training.autoencoder import AnyRunConfig
from resshift.training.checkpoint import MANIFEST, Snapshot, manifest_text

logger = logging.getLogger(__name__)
_RECEIPT = ".json"
_ASK_EVERY_S = 0.5
_FILE = re.compile(r"step-(\d{8,})/([^/]+)")


@dataclass(slots=True)
class Stored:
    """A checkpoint directory in storage: the names in it; complete when one is `files.json`."""

    step: int
    names: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return MANIFEST in self.names


def uri_of(out: str, step: int, name: str = "") -> str:
    """Return the URI of a checkpoint, or of one file in it."""
    return storage.join(out, f"step-{step:08d}" + (f"/{name}" if name else ""))


def stored(out: str) -> list[Stored]:
    """List the checkpoint directories of a run, complete or not, the newest first."""
    found: dict[int, Stored] = {}
    try:
        for entry in storage.list_entries(out):
            if match := _FILE.fullmatch(entry.key):
                step = int(match[1])
                found.setdefault(step, Stored(step)).names.append(match[2])
    except StorageError as error:
        if error.reason is not StorageReason.MISSING:
            raise
    return [found[step] for step in sorted(found, reverse=True)]


def newest_step(out: str) -> int:
    """Return the step of the newest complete checkpoint, 0 without one.

    Raises:
        StorageError: The run directory cannot be listed.
    """
    return max((found.step for found in stored(out) if found.complete), default=0)


def publish(directory: Path, out: str, manifest: dict[str, Any], parts: PartsOfAll | None = None) -> None:
    """Upload what `checkpoint.write` made. A checkpoint of the same step that is already there is
    replaced.

    Raises:
        StorageError: The store fails, or a worker's part does not come.
    """
    step = int(manifest["step"])
    # One manifest must never cover files of two attempts.
    storage.remove(uri_of(out, step, MANIFEST))
    for name in manifest["files"]:
        storage.write_file(uri_of(out, step, name), str(directory / name))
    receipts = {} if parts is None else parts.wait_for(out, step)
    if receipts:
        files = manifest["files"] | receipts
        (directory / MANIFEST).write_text(manifest_text({**manifest, "files": files}))
    storage.write_file(uri_of(out, step, MANIFEST), str(directory / MANIFEST))
    for name in receipts:
        storage.remove(uri_of(out, step, name + _RECEIPT))


def publish_part(directory: Path, out: str, manifest: dict[str, Any], attempt: str) -> None:
    """Upload a worker's part of a sharded checkpoint, and last its receipt."""
    step = int(manifest["step"])
    for name, facts in manifest["files"].items():
        storage.write_file(uri_of(out, step, name), str(directory / name))
        receipt = json.dumps({"attempt": attempt, **facts})
        storage.write_bytes(uri_of(out, step, name + _RECEIPT), receipt.encode())


@dataclass(frozen=True, slots=True)
class PartsOfAll:
    """What the first worker of a sharded run waits for.

    Fields:
        count: Number of parts; its own is the first.
        attempt: Name of this start of the workers: an earlier one may have left receipts of the same step.
        patience_s: Seconds after which a part that has not come ends the run.
    """

    count: int
    attempt: str
    patience_s: float

    def wait_for(self, out: str, step: int) -> dict[str, Any]:
        """Return size and sha256 of every other worker's part once it is there.

        Raises:
            StorageError: One does not come.
        """
        found: dict[str, Any] = {}
        deadline = time.monotonic() + self.patience_s
        for name in (checkpoint.part_name(i, self.count) for i in range(1, self.count)):
            while (facts := self._receipt(uri_of(out, step, name + _RECEIPT))) is None:
                if time.monotonic() > deadline:
                    raise StorageError(
                        uri_of(out, step, name),
                        StorageReason.UNAVAILABLE,
                        f"not written within {self.patience_s:g} s",
                    )
                time.sleep(_ASK_EVERY_S)
            found[name] = facts
        return found

    def _receipt(self, uri: str) -> dict[str, Any] | None:
        try:
            receipt: dict[str, Any] = json.loads(storage.read_bytes(uri))
        except StorageError as error:
            if error.reason is not StorageReason.MISSING:
                raise
            return None
        return receipt if receipt.pop("attempt") == self.attempt else None


def fetch(out: str, step: int, directory: Path) -> None:
    """Download a complete checkpoint and verify it.

    Raises:
        WeightsError: It is damaged or a file is gone.
    """
    directory.mkdir(parents=True, exist_ok=True)
    names = [MANIFEST]
    try:
        manifest: Any = json.loads(storage.read_bytes(uri_of(out, step, MANIFEST)))
        names += manifest["files"]
        for name in names:
            storage.read_file(uri_of(out, step, name), str(directory / name))
    except StorageError as error:
        if error.reason is StorageReason.MISSING:
            raise WeightsError(str(error)) from error
        raise  # the network failed, not the checkpoint: an older one would be the wrong answer
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{uri_of(out, step, MANIFEST)} is damaged: {error}") from error
    checkpoint.verify(directory)


def fetch_latest(out: str, directory: Path) -> int | None:
    """Download the newest checkpoint that verifies into `directory` and return its step; None when the run
    has none.

    Raises:
        WeightsError: There are checkpoints, and all are damaged: starting again from nothing is not ours to
            decide.
    """
    complete = [found for found in stored(out) if found.complete]
    problems: list[str] = []
    for found in complete:
        try:
            fetch(out, found.step, directory)
        except WeightsError as error:
            logger.warning("step=%d is not used: %s", found.step, error)
            problems.append(str(error))
        else:
            return found.step
    if problems:
        raise WeightsError(
            f"no checkpoint of {out} can be read: {'; '.join(problems)}. Remove its step-* directories to "
            "start again"
        )
    return None


@dataclass(frozen=True, slots=True)
class Keeping:
    """The checkpoints that are kept: the last `last`, every multiple of `milestone_every`, and the best."""

    last: int
    milestone_every: int | None = None

    def doomed(self, steps: Iterable[int], best: int | None) -> list[int]:
        """Return the steps of complete checkpoints that may be removed."""
        newest_first = sorted(steps, reverse=True)
        stays = {*newest_first[: self.last], best}
        return [
            step
            for step in newest_first
            if step not in stays and not (self.milestone_every and step % self.milestone_every == 0)
        ]


def clear(out: str, keeping: Keeping, up_to: float = math.inf) -> None:
    """Remove checkpoints that are not kept, and what killed uploads left behind: of steps up to a given one,
    as another worker may be uploading its part of the next.
    """
    found = stored(out)
    best = read_best(out)
    doomed = keeping.doomed((item.step for item in found if item.complete), best[0] if best else None)
    for item in found:
        if item.step > up_to or (item.complete and item.step not in doomed):
            continue
        for name in sorted(item.names, key=lambda name: name != MANIFEST):
            storage.remove(uri_of(out, item.step, name))


def read_best(out: str) -> tuple[int, float] | None:
    """Return step and figure of the best checkpoint; None before the first validation."""
    try:
        best = json.loads(storage.read_bytes(storage.join(out, "best.json")))
    except StorageError as error:
        if error.reason is StorageReason.MISSING:
            return None
        raise
    return int(best["step"]), float(best["value"])


def write_best(out: str, step: int, name: str, value: float, higher_is_better: bool) -> None:
    """Record a validated checkpoint if it is the best one."""
    best = read_best(out)
    if best is None or best[0] == step or (value > best[1] if higher_is_better else value < best[1]):
        record = {"step": step, "figure": name, "value": value}
        storage.write_bytes(storage.join(out, "best.json"), (json.dumps(record) + "\n").encode())


class CheckpointWriter:
    """Writes and uploads snapshots while training continues, one at a time, in order.

    Args:
        out: Run directory.
        config: Configuration of the run.
        keeping: Rule of the checkpoints that are kept.
        attempt: Name of this start of the workers, the same on all.
    """

    def __init__(self, out: str, config: AnyRunConfig, keeping: Keeping, attempt: str = "") -> None:
        self.out = out
        self.config = config
        self.keeping = keeping
        self.attempt = attempt
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def submit(
        self,
        snapshot: Snapshot,
        before: Sequence[Callable[[], None]] = (),
        after: Sequence[Callable[[], None]] = (),
    ) -> None:
        """Start to write and upload; waits for the previous snapshot and raises its error.

        Args:
            snapshot: Snapshot to publish.
            before: Functions that run before the checkpoint exists, for example the upload of the log that
                leads to it.
            after: Functions that run once it exists.
        """
        self.wait()
        self._running = self._thread.submit(self._work, snapshot, before, after)

    def wait(self) -> None:
        """Wait until every submitted snapshot is published.

        Raises:
            StorageError: It could not be.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def _work(
        self, snapshot: Snapshot, before: Sequence[Callable[[], None]], after: Sequence[Callable[[], None]]
    ) -> None:
        for step in before:
            step()
        with tempfile.TemporaryDirectory(prefix="resshift-checkpoint-") as directory:
            manifest = checkpoint.write(directory, snapshot, self.config)
            if not snapshot.leads:
                publish_part(Path(directory), self.out, manifest, self.attempt)
                return
            parts = None
            if snapshot.place is not None:
                patience_s = 4 * self.config.train.step_timeout_s  # of saving, for the watchdog too
                parts = PartsOfAll(snapshot.place.count, self.attempt, patience_s)
            publish(Path(directory), self.out, manifest, parts)
        for step in after:
            step()
        clear(self.out, self.keeping, snapshot.step)
