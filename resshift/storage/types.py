"""Types of `resshift.storage`: listed files, and the reasons of failed accesses."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

EPOCH = datetime.fromtimestamp(0, UTC)  # of entries that have no time


class StorageReason(StrEnum):
    """Why a file could not be read or written. The vocabulary is closed."""

    MISSING = "missing"
    DENIED = "denied"
    IRREGULAR = "irregular"
    TOO_LARGE = "too_large"
    INVALID = "invalid"
    UNAVAILABLE = "unavailable"


class StorageError(OSError):
    """A failed access: `uri`, `reason` (one of `StorageReason`) and a message without credentials."""

    def __init__(self, uri: str, reason: StorageReason, detail: str) -> None:
        super().__init__(f"{printable(uri)}: {reason}: {detail}")
        self.uri = uri
        self.reason = reason
        self.detail = detail

    @classmethod
    def too_large(cls, uri: str, size_bytes: int, max_bytes: int) -> StorageError:
        """Return the error of a file that is larger than its reader accepts."""
        return cls(uri, StorageReason.TOO_LARGE, f"{size_bytes} bytes, at most {max_bytes} are allowed")

    def __reduce__(self) -> tuple[type[StorageError], tuple[str, StorageReason, str]]:
        return StorageError, (self.uri, self.reason, self.detail)  # survives the trip from a worker


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed file.

    Fields:
        key: POSIX path relative to the listed root (the file's name when the root is the file). Not UTF-8 on
            disk: surrogate escapes.
        uri: what `read_bytes` takes.
        size_bytes: 0 when irregular.
        etag: changes when the content does; local: from modification time and size.
        modified: aware, UTC.
        irregular: why it cannot be read (FIFO, broken link, unreadable directory, ...), None for a regular
            file.
    """

    key: str
    uri: str
    size_bytes: int
    etag: str
    modified: datetime
    irregular: str | None = None


def printable(uri: str) -> str:
    """Return the URI for a message: undecodable bytes escaped, user information (s3://key:secret@bucket)
    masked.
    """
    shown = uri.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"^([a-z0-9+.-]+://)[^/]*@", r"\1***@", shown, flags=re.IGNORECASE)


@contextlib.contextmanager
def accessing(uri: str, *errors: type[BaseException]) -> Generator[None]:
    """Turn errors of the operating system, and `errors`, into a StorageError; the cause is kept."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, UnicodeError, *errors) as error:
        raise _failure(uri, error) from error


def _failure(uri: str, error: BaseException) -> StorageError:
    """Name the reason of a failed access. Server texts are cut to one line; they carry no secrets (AWS error
    reference).
    """
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return StorageError(uri, StorageReason.MISSING, "no such file or bucket")
    if isinstance(error, PermissionError):
        return StorageError(uri, StorageReason.DENIED, error.strerror or detail)
    if isinstance(error, IsADirectoryError):
        return StorageError(uri, StorageReason.IRREGULAR, "it is a directory")
    if isinstance(error, NotADirectoryError | FileExistsError):
        return StorageError(uri, StorageReason.INVALID, "a file is in the place of a directory")
    if isinstance(error, OSError) and error.strerror:
        invalid = error.errno in (errno.ENAMETOOLONG, errno.ELOOP)
        return StorageError(
            uri, StorageReason.INVALID if invalid else StorageReason.UNAVAILABLE, error.strerror
        )
    if isinstance(error, UnicodeError):
        return StorageError(uri, StorageReason.INVALID, "the key is not valid UTF-8")
    return StorageError(uri, StorageReason.UNAVAILABLE, detail)
