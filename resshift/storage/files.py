"""Files and objects: plain paths, file:// and s3://, one set of functions.

Listing streams: one page of a bucket or one directory at a time, so ten million keys cost no memory and work
starts with the first page. Keys come in the order of their UTF-8 bytes from both kinds of store. Writing is
atomic: a reader sees the whole new file or what was there before (local: temporary name, fsync, rename; S3:
one PUT).

S3 is in `resshift.storage.s3`; how a bucket is reached are its `S3Options`, which local paths ignore.
Credentials come from the environment or a profile, never from a URI. URIs are taken literally: nothing is
percent-decoded. What it does not do: other schemes, objects above 5 GiB, deleting more than one file at a
time.
"""

# botocore, fsspec and s3fs ship no types: what they leave unknown is not an error of ours.
# pyright: reportMissingTypeStubs=false, reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import errno
import os
import posixpath
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import IO, Any, TypeVar, cast

from resshift.storage import s3
from resshift.storage.s3 import S3Options

_TEMPORARY = re.compile(r"\.resshift-[0-9a-f]{16}\.partial")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
EPOCH = datetime.fromtimestamp(0, UTC)  # of entries that have no time
T = TypeVar("T")


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


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def _split_s3(uri: str) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not _BUCKET.fullmatch(bucket):
        raise StorageError(
            uri,
            StorageReason.INVALID,
            "the URI must be s3://BUCKET/KEY; credentials come from the environment",
        )
    return bucket, key


def _split_object(uri: str) -> tuple[str, str]:
    bucket, key = _split_s3(uri)
    if not key or key.endswith("/"):
        raise StorageError(uri, StorageReason.INVALID, "an object needs a key that does not end in /")
    return bucket, key


def _local_path(uri: str) -> str:
    if uri.startswith("file://"):
        path = uri.removeprefix("file://")
        if not path.startswith("/"):
            raise StorageError(uri, StorageReason.INVALID, "a file URI must be file:///ABSOLUTE/PATH")
    else:
        path = uri
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", uri):
            raise StorageError(uri, StorageReason.INVALID, "allowed are plain paths, file:// and s3://")
    if not path or "\0" in path:
        raise StorageError(uri, StorageReason.INVALID, "an empty path or one with a NUL byte")
    return path


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


def _attempt(uri: str, access: Callable[[], T]) -> T:
    """Run one access and turn what the operating system, s3fs or botocore raise into a StorageError, the
    cause kept.
    """
    try:
        return access()
    except StorageError:
        raise
    except s3.TooLargeError as error:
        raise StorageError(
            uri, StorageReason.TOO_LARGE, f"{error.size_bytes} bytes are more than allowed"
        ) from error
    except s3.ACCESS_ERRORS as error:
        raise _failure(uri, error) from error


def _call_s3(uri: str, options: S3Options, method: str, **arguments: object) -> dict[str, Any]:
    return _attempt(uri, lambda: s3.call(options, method, **arguments))


def list_entries(root: str, options: S3Options = s3.DEFAULT) -> Iterator[Entry]:
    """List every file below `root`, recursively, in the order of the UTF-8 bytes of the keys.

    Keys that end in "/" (directory markers) and our own temporary files are skipped. Irregular files and
    directories that cannot be read are yielded with `irregular` set and are never opened; links are followed
    unless they lead back to a directory above them.

    Args:
        root: a directory, a prefix, or one single file or object.
        options: how a bucket is reached.

    Raises:
        StorageError: the root itself is missing (an empty prefix of an existing bucket is not) or cannot be
            read.
    """
    return _list_s3(root, options) if is_s3(root) else _list_local(root)


def find_entry(root: str, key: str, options: S3Options = s3.DEFAULT) -> Entry:
    """Return the entry of one key below a root, as `list_entries` would.

    Raises:
        StorageError: it is missing or cannot be reached.
    """
    uri = join(root, key)
    if not is_s3(uri):
        path = _local_path(uri)
        if not os.path.lexists(path):
            raise StorageError(uri, StorageReason.MISSING, "no such file")
        return _local_entry(key, uri, path)
    bucket, name = _split_object(uri)
    found = _look_up(uri, bucket, name, options)
    if found is None:
        raise StorageError(uri, StorageReason.MISSING, "no such object")
    return _s3_entry(bucket, name, key, found["Size"], found)


def _look_up(uri: str, bucket: str, key: str, options: S3Options) -> dict[str, Any] | None:
    """Return what a listing says of one key, None when it is not there.

    Not a HEAD request: what a store answers to one that finds nothing has no body to say why, and Swift's
    breaks the connection.
    """
    page = _call_s3(
        uri, options, "list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1, **options.for_reading()
    )
    return next(
        (item for item in page.get("Contents", ()) if item["Key"] == key), None
    )  # the key itself sorts first


def _list_s3(root: str, options: S3Options) -> Iterator[Entry]:
    bucket, prefix = _split_s3(root)
    folder = prefix if not prefix or prefix.endswith("/") else prefix + "/"
    is_empty, token = True, {}
    while True:
        page = _call_s3(
            root, options, "list_objects_v2", Bucket=bucket, Prefix=folder, **options.for_reading(), **token
        )
        for item in page.get("Contents", ()):
            is_empty = False
            if not item["Key"].endswith("/"):
                yield _s3_entry(bucket, item["Key"], item["Key"][len(folder) :], item["Size"], item)
        if not page.get("IsTruncated"):
            break
        token = {"ContinuationToken": page["NextContinuationToken"]}
    if (
        is_empty
        and prefix
        and not prefix.endswith("/")
        and (found := _look_up(root, bucket, prefix, options)) is not None
    ):
        yield _s3_entry(bucket, prefix, posixpath.basename(prefix), found["Size"], found)


def _s3_entry(bucket: str, key: str, relative: str, size_bytes: int, item: dict[str, Any]) -> Entry:
    return Entry(relative, f"s3://{bucket}/{key}", size_bytes, item["ETag"].strip('"'), item["LastModified"])


def _list_local(root: str) -> Iterator[Entry]:
    path = _local_path(root)
    status = _attempt(root, lambda: os.stat(path))
    if stat.S_ISDIR(status.st_mode):
        _attempt(
            root, lambda: os.scandir(path).close()
        )  # an unreadable root is an error, not an empty listing
        yield from _walk(root.rstrip("/") or "/", path, "", ((status.st_dev, status.st_ino),))
    else:
        yield _local_entry(os.path.basename(path), root, path)


def _walk(root: str, directory: str, prefix: str, ancestors: tuple[tuple[int, int], ...]) -> Iterator[Entry]:
    try:
        with os.scandir(directory) as scan:
            children = [
                (os.fsencode(child.name) + (b"/" if _is_directory(child) else b""), child.name)
                for child in scan
            ]
    except OSError as error:
        yield _irregular(
            prefix.rstrip("/"), f"{root}/{prefix}".rstrip("/"), f"unreadable directory: {error.strerror}"
        )
        return
    for encoded, name in sorted(children):
        key, path = prefix + name, os.path.join(directory, name)
        uri = f"/{key}" if root == "/" else f"{root}/{key}"
        if not encoded.endswith(b"/"):
            if not _TEMPORARY.fullmatch(name):
                yield _local_entry(key, uri, path)
            continue
        try:
            status = os.stat(path)
        except OSError as error:
            yield _irregular(key, uri, f"unreadable directory: {error.strerror}")
            continue
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            yield _irregular(key, uri, "link to a directory above it")
        else:
            yield from _walk(root, path, f"{key}/", (*ancestors, identity))


def _is_directory(child: os.DirEntry[str]) -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _irregular(key: str, uri: str, why: str) -> Entry:
    return Entry(key, uri, 0, "", EPOCH, why)


def _local_entry(key: str, uri: str, path: str) -> Entry:
    try:
        status = os.stat(path)
    except OSError as error:
        return _irregular(
            key, uri, f"broken link: {error.strerror}" if os.path.islink(path) else str(error.strerror)
        )
    if not stat.S_ISREG(status.st_mode):
        return _irregular(key, uri, f"not a regular file: {_kind(status.st_mode)}")
    modified = datetime.fromtimestamp(status.st_mtime_ns / 1e9, UTC)
    return Entry(key, uri, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size:x}", modified)


def _kind(mode: int) -> str:
    names = {
        stat.S_IFDIR: "directory",
        stat.S_IFIFO: "FIFO",
        stat.S_IFSOCK: "socket",
        stat.S_IFCHR: "device",
        stat.S_IFBLK: "device",
    }
    return names.get(stat.S_IFMT(mode), "unknown kind")


def read_bytes(uri: str, max_bytes: int | None = None, options: S3Options = s3.DEFAULT) -> bytes:
    """Read a whole file or object. Anything but a regular file is refused without being opened.

    Raises:
        StorageError: with the reason; too_large before a byte is read when the size is above `max_bytes`.
    """
    if is_s3(uri):
        bucket, key = _split_object(uri)
        return _attempt(uri, lambda: s3.get(options, bucket, key, max_bytes))
    path = _local_path(uri)
    return _attempt(uri, lambda: _read_local(uri, path, max_bytes))


def read_first_bytes(uri: str, num_bytes: int, options: S3Options = s3.DEFAULT) -> bytes:
    """Read the beginning of a file or object, at most `num_bytes`; no more than that travels.

    Raises:
        StorageError: with the reason.
    """
    return _read_part(uri, 0, num_bytes, options)


def read_range(uri: str, offset: int, num_bytes: int, options: S3Options = s3.DEFAULT) -> bytes:
    """Read a part of a file or object, in one request.

    Args:
        uri: of the file.
        offset: of the first byte; negative counts from the end, and a file shorter than that is read from its
            start.
        num_bytes: how many.
        options: how a bucket is reached.

    Raises:
        StorageError: with the reason; invalid when the file ends before the part does.
    """
    data = _read_part(uri, offset, num_bytes, options)
    if offset >= 0 and len(data) < num_bytes:
        raise StorageError(uri, StorageReason.INVALID, f"it ends before byte {offset + num_bytes}")
    return data


def _read_part(uri: str, offset: int, num_bytes: int, options: S3Options) -> bytes:
    if num_bytes == 0:
        return b""
    if is_s3(uri):
        bucket, key = _split_object(uri)
        part = f"bytes={offset}-{offset + num_bytes - 1}" if offset >= 0 else f"bytes={offset}"
        return _attempt(uri, lambda: s3.get(options, bucket, key, None, part))[:num_bytes]
    path = _local_path(uri)
    return _attempt(uri, lambda: _read_local_part(uri, path, offset, num_bytes))


def _open_regular(uri: str, path: str) -> int:
    """Return a descriptor of a regular file."""
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        # Non-blocking, so that a FIFO put in its place a moment ago cannot hang the reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return descriptor
        os.close(descriptor)
    raise StorageError(uri, StorageReason.IRREGULAR, f"it is not a regular file but a {_kind(mode)}")


def _read_local(uri: str, path: str, max_bytes: int | None) -> bytes:
    with open(_open_regular(uri, path), "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size_bytes > max_bytes:
            raise StorageError(
                uri, StorageReason.TOO_LARGE, f"{size_bytes} bytes, at most {max_bytes} are allowed"
            )
        return file.read()


def _read_local_part(uri: str, path: str, offset: int, num_bytes: int) -> bytes:
    with open(_open_regular(uri, path), "rb") as file:
        file.seek(offset if offset >= 0 else max(0, os.fstat(file.fileno()).st_size + offset))
        return file.read(num_bytes)


def write_bytes(
    uri: str, data: bytes, options: S3Options = s3.DEFAULT, content_type: str | None = None
) -> None:
    """Write a whole file or object atomically; local directories are created.

    Args:
        uri: where to.
        data: all of it.
        options: how a bucket is reached, and what its new object is given.
        content_type: of an object; a local file has none.

    Raises:
        StorageError: nothing was written.
    """
    if is_s3(uri):
        bucket, key = _split_object(uri)
        _call_s3(
            uri, options, "put_object", Bucket=bucket, Key=key, Body=data, **options.for_writing(content_type)
        )
    else:
        path = _local_path(uri)
        _attempt(uri, lambda: _write_local(path, data))


def _write_local(path: str, data: bytes) -> None:
    directory = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise IsADirectoryError(path)
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f".resshift-{secrets.token_hex(8)}.partial")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


def remove(uri: str, options: S3Options = s3.DEFAULT) -> None:
    """Delete one file or object; nothing happens when it is not there. A local directory that is left empty
    goes with it.

    Raises:
        StorageError: it cannot be deleted.
    """
    if is_s3(uri):
        bucket, key = _split_object(uri)
        _call_s3(uri, options, "delete_object", Bucket=bucket, Key=key, **options.for_reading())
        return
    path = _local_path(uri)
    _attempt(uri, lambda: _remove_local(path))


def _remove_local(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    try:
        os.rmdir(os.path.dirname(path) or ".")
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EINVAL, errno.EBUSY):
            raise


def exists(uri: str, options: S3Options = s3.DEFAULT) -> bool:
    """Return whether a file or object is there (a prefix or a bucket is not an object).

    Raises:
        StorageError: the answer is not known: access denied, store unreachable.
    """
    if is_s3(uri):
        bucket, key = _split_object(uri)
        return _look_up(uri, bucket, key, options) is not None
    return os.path.exists(_local_path(uri))


def join(root: str, key: str) -> str:
    """Return the URI of a relative key below a root.

    Raises:
        StorageError: invalid, when the key is empty, absolute, has a NUL byte or a ".." segment, or (local)
            segments that would make two keys one file ("." and "//").
    """
    segments = key.split("/")
    refused = {".."} if is_s3(root) else {"..", ".", ""}
    if not key or key.startswith("/") or "\0" in key or refused & set(segments):
        raise StorageError(
            f"{root.rstrip('/')}/{key}",
            StorageReason.INVALID,
            "the key must be a relative path inside the root",
        )
    return f"{root.rstrip('/')}/{key}"


def is_inside(child: str, parent: str) -> bool:
    """Return whether `child` is `parent` or lies below it; links, "..", "." and trailing slashes resolved.
    Nothing needs to exist.
    """
    if is_s3(child) != is_s3(parent):
        return False
    if not is_s3(child):
        inner, outer = os.path.realpath(_local_path(child)), os.path.realpath(_local_path(parent))
        return os.path.commonpath([inner, outer]) == outer
    (child_bucket, child_key), (parent_bucket, parent_key) = _split_s3(child), _split_s3(parent)
    if child_bucket != parent_bucket:
        return False
    # Keys are literal for S3, but a ".." typed by a user means what it means in a path: inside by either
    # reading is inside.
    plain, parent_plain = child_key.strip("/"), parent_key.strip("/")
    resolved, parent_resolved = (posixpath.normpath(f"/{key}").strip("/") for key in (child_key, parent_key))
    readings = ((plain, parent_plain), (resolved, parent_resolved))
    return any(not outer or inner == outer or inner.startswith(f"{outer}/") for inner, outer in readings)


def open_input(uri: str, options: S3Options = s3.DEFAULT) -> IO[bytes]:
    """Open a file or object for random access; only the parts that are read travel.

    Raises:
        StorageError: it cannot be opened.
    """
    if is_s3(uri):
        bucket, key = _split_object(uri)
        return cast(
            IO[bytes],
            _attempt(uri, lambda: s3.client(options).open(f"{bucket}/{key}", "rb", block_size=8 << 20)),
        )
    path = _local_path(uri)
    return _attempt(uri, lambda: open(path, "rb"))
