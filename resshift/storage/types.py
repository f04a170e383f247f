"""Types of `resshift.storage`: listed files, and errors of access with their reasons."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Generator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

EPOCH = datetime.fromtimestamp(0, UTC)  # for entries without a modification time


class StorageReason(StrEnum):
    """Reason of a failed access. The vocabulary is closed."""

    MISSING = "missing"
    DENIED = "denied"
    IRREGULAR = "irregular"
    TOO_LARGE = "too_large"
    INVALID = "invalid"
    FULL = "full"
    UNAVAILABLE = "unavailable"


_REASONS = {
    errno.ENAMETOOLONG: StorageReason.INVALID,
    errno.ELOOP: StorageReason.INVALID,
    errno.ENOSPC: StorageReason.FULL,
    errno.EDQUOT: StorageReason.FULL,
    errno.EROFS: StorageReason.DENIED,
}


class StorageError(OSError):
    """A failed access to a file or object, with a message without credentials.

    Args:
        uri: URI of the file or object.
        reason: Reason of the failure.
        detail: Detail for the message.
    """

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
        return StorageError, (self.uri, self.reason, self.detail)  # so that it can be sent from a worker


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed file.

    Fields:
        key: POSIX path relative to the listed root, or the name of the file if the root is the file. Bytes
            that are not UTF-8 are surrogate escapes.
        uri: URI for `read_bytes`.
        size_bytes: Size of the file; 0 if it is irregular.
        etag: Tag that changes with the content; that of a local file is made of modification time and size.
        modified: Time of the last modification, with the time zone UTC.
        irregular: Reason why the file cannot be read (FIFO, broken link, unreadable directory, ...); None for
            a regular file.
    """

    key: str
    uri: str
    size_bytes: int
    etag: str
    modified: datetime
    irregular: str | None = None


def printable(uri: str) -> str:
    """Return the URI for a message, with undecodable bytes escaped and user information
    (s3://key:secret@bucket) masked.
    """
    shown = uri.encode("utf-8", "backslashreplace").decode()
    return re.sub(r"^([a-z0-9+.-]+://)[^/]*@", r"\1***@", shown, flags=re.IGNORECASE)


# A byte that is not UTF-8 (as a surrogate), or the text of its escape, with the backslashes in front.
_ESCAPED = re.compile(r"(\\*)(?:([\udc80-\udcff])|(?<=\\)(udc[89a-f][0-9a-f]))")


def printable_key(key: str) -> str:
    """Return a key as text, with undecodable bytes escaped; keys that differ have texts that differ."""

    def escape(found: re.Match[str]) -> str:
        # An odd number of backslashes stands before a byte, an even one before the text of an escape.
        slashes, byte, text = found.groups()
        return slashes * 2 + (text if byte is None else f"\\udc{ord(byte) & 0xFF:02x}")

    return _ESCAPED.sub(escape, key).encode("utf-8", "backslashreplace").decode()


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
    """Return the error with the reason of a failed access. Messages of servers are cut to one line; they
    contain no secrets (AWS error reference).
    """
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    if isinstance(error, FileNotFoundError):
        return StorageError(uri, StorageReason.MISSING, "no such file or bucket")
    if isinstance(error, PermissionError):
        return StorageError(uri, StorageReason.DENIED, error.strerror or detail)
    if isinstance(error, IsADirectoryError):
        return StorageError(uri, StorageReason.IRREGULAR, "it is a directory")
    if isinstance(error, NotADirectoryError | FileExistsError):
        return StorageError(uri, StorageReason.INVALID, "a file is where a directory is needed")
    if isinstance(error, OSError) and error.strerror:
        reason = _REASONS.get(error.errno or 0, StorageReason.UNAVAILABLE)
        return StorageError(uri, reason, error.strerror)
    if isinstance(error, UnicodeError):
        return StorageError(uri, StorageReason.INVALID, "the key is not valid UTF-8")
    return StorageError(uri, StorageReason.UNAVAILABLE, detail)
