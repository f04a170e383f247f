"""Cache of files that come from elsewhere, keyed by their content.

    CACHE/blobs/SHA256.SUFFIX     a file, under the sha256 of its bytes
    CACHE/origins/SHA256.json     for each address: the version that was fetched last, and its sha256
    CACHE/locks/SHA256            held by the process that fetches from that address

Processes of one machine fetch a file once: the first fetches, the others wait for it. A file gets its name
after all its bytes were written and their sha256 was checked, so an interrupted fetch leaves nothing that
could be taken for the file. When the files together exceed the limit, those that were not used for the
longest time are deleted.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from resshift.models.files import WeightsError

_logger = logging.getLogger(__name__)
_DEFAULT_LIMIT_GB = 50.0
# A file that was used within this time may be about to be read: it is not deleted.
_IN_USE_S = 600.0


def cache_directory() -> Path:
    """Return the directory of the cache: $RESSHIFT_CACHE, or ~/.cache/resshift."""
    return Path(os.environ.get("RESSHIFT_CACHE", "~/.cache/resshift")).expanduser()


def cache_limit() -> int:
    """Return the number of bytes that the cache may hold: $RESSHIFT_CACHE_GB gigabytes, or 50.

    Raises:
        WeightsError: The variable is no positive number.
    """
    text = os.environ.get("RESSHIFT_CACHE_GB", str(_DEFAULT_LIMIT_GB))
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not limit > 0:
        raise WeightsError(f"RESSHIFT_CACHE_GB must be a positive number of gigabytes, got {text!r}")
    return int(limit * 1e9)


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """A file elsewhere.

    Fields:
        address: Address of the file, for messages and as its name in the cache.
        version: Text that changes with the content, such as an ETag; empty if the origin gives none. Then
            the content may never change, and other bytes than the first ones are refused.
        suffix: Suffix of the name of the file, with its dot.
        size_bytes: Size of the file; None if it is not known before it is read.
        sha256: Digest that the file must have; None if nobody published one.
        chunks: Function that reads the file, part by part.
    """

    address: str
    version: str
    suffix: str
    chunks: Callable[[], Iterator[bytes]]
    size_bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Cache:
    """The cache in one directory.

    Args:
        directory: Directory of the cache.
        limit_bytes: Number of bytes that its files may have together; a single larger file is kept.
    """

    directory: Path = field(default_factory=cache_directory)
    limit_bytes: int = field(default_factory=cache_limit)

    def get(self, origin: Origin) -> Path:
        """Return the local copy of a file, which is fetched unless this version of it is there.

        Raises:
            WeightsError: The file is incomplete or has another sha256 than expected; nothing was stored.
            OSError: The origin cannot be read, or the cache cannot be written.
        """
        key = hashlib.sha256(origin.address.encode()).hexdigest()
        for name in ("blobs", "origins", "locks"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        record = self.directory / "origins" / f"{key}.json"
        with FileLock(self.directory / "locks" / key):
            known = _read_record(record)
            same_version = known is not None and known["version"] == origin.version
            if known is not None and same_version and origin.sha256 in (None, known["sha256"]):
                path = self._blob(known["sha256"], origin.suffix)
                if path.is_file() and digest_of(path) == known["sha256"]:
                    os.utime(path)
                    return path
            expected, remedy = origin.sha256, "try again"
            if expected is None and known is not None and not origin.version:
                expected, remedy = known["sha256"], f"if you trust the source, delete {record} and try again"
            digest = self._fetch(origin, expected, remedy)
            _write(record, {"address": origin.address, "version": origin.version, "sha256": digest})
        path = self._blob(digest, origin.suffix)
        self._delete_oldest(keep=path)
        return path

    def _blob(self, digest: str, suffix: str) -> Path:
        return self.directory / "blobs" / f"{digest}{suffix}"

    def _fetch(self, origin: Origin, expected: str | None, remedy: str) -> str:
        """Fetch a file into its place and return its sha256."""
        temporary = self.directory / "blobs" / f".{secrets.token_hex(8)}"
        digest, size = hashlib.sha256(), 0
        try:
            with temporary.open("xb") as out, _shown(origin) as advance:
                for chunk in origin.chunks():
                    out.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                    advance(len(chunk))
                out.flush()
                os.fsync(out.fileno())
            if origin.size_bytes not in (None, size):
                raise WeightsError(
                    f"{origin.address} ended after {size} of {origin.size_bytes} bytes; try again"
                )
            if expected not in (None, digest.hexdigest()):
                raise WeightsError(
                    f"{origin.address} has sha256 {digest.hexdigest()}, expected {expected}: {remedy}"
                )
            temporary.replace(self._blob(digest.hexdigest(), origin.suffix))
        finally:
            temporary.unlink(missing_ok=True)
        return digest.hexdigest()

    def _delete_oldest(self, keep: Path) -> None:
        """Delete files that were not used for the longest time until the rest is within the limit."""
        with FileLock(self.directory / "locks" / "limit"):
            found = [(path, path.stat()) for path in (self.directory / "blobs").glob("[!.]*")]
            total = sum(stat.st_size for _, stat in found)
            newest_to_delete = time.time() - _IN_USE_S
            for path, stat in sorted(found, key=lambda one: one[1].st_mtime):
                if total <= self.limit_bytes or stat.st_mtime > newest_to_delete:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)
                    total -= stat.st_size


def digest_of(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_record(path: Path) -> dict[str, str] | None:
    """Return what is known of an address; None if nothing is, or if it cannot be read."""
    try:
        known: Any = json.loads(path.read_text())
        return {"version": str(known["version"]), "sha256": str(known["sha256"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, values: dict[str, str]) -> None:
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    temporary.write_text(json.dumps(values) + "\n")
    temporary.replace(path)


@contextmanager
def _shown(origin: Origin) -> Generator[Callable[[int], None]]:
    """Show how far a fetch has come: a bar in a terminal, else one line of the log at the start."""
    if not sys.stderr.isatty():
        size = "" if origin.size_bytes is None else f" ({origin.size_bytes / 1e6:.1f} MB)"
        _logger.info("fetching %s%s", origin.address, size)
        yield lambda _: None
        return
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(origin.address.rsplit("/", 1)[-1], total=origin.size_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
