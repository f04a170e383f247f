"""One run at a time at a destination: each run writes a heartbeat file there.

    DST/_resshift/working/ID.json      where the run is, and a number that grows

    with held(target, options):        raises Occupied when another run works there
        ...

A run rewrites its file every few seconds and removes it at its end. A run that finds the file of another one
watches it: while the number grows, that run is working; when it has not grown for several beats, that run was
killed, and its file is removed. No clocks of two machines are compared. A run whose process was on this
machine and is gone is not waited for. Of two runs that watch each other, the first by name stays.

This keeps two runs from doing the same work, but it is not a lock: when a run hangs for longer than it is
watched, another may start beside it. Nothing is lost then; the same pictures are made twice, with the same
bytes.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import secrets
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.command import UsageError
from pipelines.ledger.ledger import DIRECTORY
from resshift import storage
from resshift.storage import StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

BEAT_S = 10.0
_BEATS_TO_WATCH = 2.5

logger = logging.getLogger(__name__)


class Occupied(UsageError):
    """Another run works at the destination; the message says where it is."""


class Lease:
    """The announcement of a run that it works at a destination.

    Args:
        target: DST.
        options: Options of its store.
        beat_s: Seconds between two beats, the same for all runs; default `BEAT_S`.
    """

    def __init__(self, target: str, options: S3Options = s3.DEFAULT, beat_s: float | None = None) -> None:
        self._target, self._options, self._beat_s = target, options, beat_s or BEAT_S
        self._root = storage.join(target, f"{DIRECTORY}/working")
        self._name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}.json"
        self._beats = 0
        self._is_working = False  # or still watching others
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._beating: threading.Thread | None = None

    def take(self) -> None:
        """Begin to beat; wait until it is clear whether another run works there.

        Raises:
            Occupied: Another run does.
            StorageError: The destination cannot be read or written.
        """
        self._write()
        beating = threading.Thread(target=self._beat, name="lease", daemon=True)
        beating.start()
        self._beating = beating  # a thread that has not started cannot be joined by `release`
        try:
            self._watch()
            if self._ended.is_set():
                return
            self._is_working = True
            self._write()
            # A run that began while this one watched others sees by now that this one works, and vice versa.
            self._give_way(
                {
                    name: beat
                    for name, beat in self._others().items()
                    if beat["is_working"] and name < self._name
                }
            )
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """End the announcement; a `take` in another thread gives up."""
        self._ended.set()
        if self._beating is not None:
            self._beating.join()
        with self._writing:  # after this nothing writes the file again
            self._remove(self._name)

    def _watch(self) -> None:
        """Watch the other runs; remove the files of those that do not go on."""
        others = self._others()
        for name in [
            name for name, beat in others.items() if beat["place"] == place() and not _is_alive(beat["pid"])
        ]:
            self._remove(name)
            del others[name]
        if not others:
            return
        seconds = self._beat_s * _BEATS_TO_WATCH
        logger.info("another run may be at work at %s: watching it for %.0f s", self._target, seconds)
        until = time.monotonic() + seconds
        while others and time.monotonic() < until:
            if self._ended.wait(self._beat_s / 4):
                return
            now = self._others()
            moved = {
                name: beat
                for name, beat in now.items()
                if name in others and beat["beats"] != others[name]["beats"]
            }
            self._give_way(
                {name: beat for name, beat in moved.items() if beat["is_working"] or name < self._name}
            )
            # A run whose file is gone has ended. One that moves and should give way may still be killed
            # first.
            others = {name: beat for name, beat in others.items() if name in now}
        for name, beat in others.items():
            if self._others().get(name, {}).get("beats") == beat["beats"]:
                self._remove(name)

    def _give_way(self, others: dict[str, dict[str, Any]]) -> None:
        for name, beat in others.items():
            raise Occupied(
                f"another run works at {self._target} (host {beat['host']}, process {beat['pid']}, since "
                f"{name[:15]} UTC): "
                "wait until it ends, or stop it"
            )

    def _others(self) -> dict[str, dict[str, Any]]:
        """Return the files of other runs."""
        found: dict[str, dict[str, Any]] = {}
        for entry in storage.list_entries(self._root, self._options):
            if entry.key != self._name and entry.key.endswith(".json"):
                try:
                    found[entry.key] = json.loads(storage.read_bytes(entry.uri, options=self._options))
                except StorageError as error:
                    if error.reason is not StorageReason.MISSING:  # it has just ended
                        raise
        return found

    def _beat(self) -> None:
        while not self._ended.wait(self._beat_s):
            try:
                self._write()
            except StorageError as error:
                logger.warning("this run could not announce itself: %s", error)

    def _write(self) -> None:
        with self._writing:
            if self._ended.is_set():
                return
            self._beats += 1
            beat = {
                "host": platform.node(),
                "pid": os.getpid(),
                "place": place(),
                "beats": self._beats,
                "is_working": self._is_working,
            }
            storage.write_bytes(
                storage.join(self._root, self._name),
                json.dumps(beat).encode(),
                self._options,
                "application/json",
            )

    def _remove(self, name: str) -> None:
        try:
            storage.remove(storage.join(self._root, name), self._options)
        except StorageError as error:
            logger.warning(
                "the next run will watch for %.0f s before it begins: %s",
                self._beat_s * _BEATS_TO_WATCH,
                error,
            )


@contextmanager
def held(target: str, options: S3Options = s3.DEFAULT) -> Generator[None]:
    """Hold the lease of a destination; see `Lease.take` for errors."""
    lease = Lease(target, options)
    lease.take()
    try:
        yield
    finally:
        lease.release()


def place() -> str:
    """Return a name of the space of process ids that this process belongs to; each container of a machine has
    its own.
    """
    try:
        return (
            f"{platform.node()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} "
            f"{os.readlink('/proc/self/ns/pid')}"
        )
    except OSError:  # not Linux
        return platform.node()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True
