"""Files on a local disk: plain paths and file://.

Writing is atomic: temporary name, fsync, rename. Only regular files are opened, so a FIFO or a device in a
directory cannot hang its reader.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import IO

from resshift.storage.types import EPOCH, Entry, StorageError, StorageReason, accessing

_COPY_BYTES = 1 << 24
_TEMPORARY = re.compile(r"\.resshift-[0-9a-f]{16}\.partial")


def path_of(uri: str) -> str:
    """Return the path that a URI names.

    Raises:
        StorageError: Invalid, when it is not a plain path or file:///ABSOLUTE/PATH.
    """
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


def list_entries(root: str, start: str = "", stop: str | None = None) -> Iterator[Entry]:
    """List the files below a directory from `start` to before `stop`, or the one file that `root` is."""
    path = path_of(root)
    with accessing(root):
        status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        with accessing(root):  # an unreadable root is an error, not an empty listing
            os.scandir(path).close()
        found = _walk(root.rstrip("/") or "/", path, "", ((status.st_dev, status.st_ino),), start)
    else:
        found = iter([_entry(os.path.basename(path), root, path)])
    for entry in found:
        if stop is not None and entry.key >= stop:
            return
        if entry.key >= start:
            yield entry


def find_entry(uri: str, key: str) -> Entry:
    """Return the entry of one file, with `key` as its key."""
    path = path_of(uri)
    if not os.path.lexists(path):
        raise StorageError(uri, StorageReason.MISSING, "no such file")
    return _entry(key, uri, path)


def _walk(
    root: str, directory: str, prefix: str, ancestors: tuple[tuple[int, int], ...], start: str
) -> Iterator[Entry]:
    """Walk through a directory, but not through those all of whose keys come before `start`."""
    try:
        with os.scandir(directory) as scan:
            # By the points of the text, as keys are compared; of valid UTF-8 the bytes have the same order.
            children = [(child.name + ("/" if _is_directory(child) else ""), child.name) for child in scan]
    except OSError as error:
        yield _irregular(
            prefix.rstrip("/"), f"{root}/{prefix}".rstrip("/"), f"unreadable directory: {error.strerror}"
        )
        return
    for shown, name in sorted(children):
        key, path = prefix + name, os.path.join(directory, name)
        if prefix + shown < start and not start.startswith(prefix + shown):
            continue
        uri = f"/{key}" if root == "/" else f"{root}/{key}"
        if not shown.endswith("/"):
            if not _TEMPORARY.fullmatch(name):
                yield _entry(key, uri, path)
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
            yield from _walk(root, path, f"{key}/", (*ancestors, identity), start)


def _is_directory(child: os.DirEntry[str]) -> bool:
    try:
        return child.is_dir()
    except OSError:  # a link to itself
        return False


def _irregular(key: str, uri: str, why: str) -> Entry:
    return Entry(key, uri, 0, "", EPOCH, why)


def _entry(key: str, uri: str, path: str) -> Entry:
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


def read_bytes(uri: str, max_bytes: int | None) -> bytes:
    """Read a regular file of at most `max_bytes`."""
    with accessing(uri), open(_open_regular(uri), "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if max_bytes is not None and size_bytes > max_bytes:
            raise StorageError.too_large(uri, size_bytes, max_bytes)
        return file.read()


def read_part(uri: str, offset: int, num_bytes: int) -> bytes:
    """Read at most `num_bytes` from `offset` on; a negative offset counts from the end."""
    with accessing(uri), open(_open_regular(uri), "rb") as file:
        file.seek(offset if offset >= 0 else max(0, os.fstat(file.fileno()).st_size + offset))
        return file.read(num_bytes)


def open_input(uri: str) -> IO[bytes]:
    """Open a file for random access."""
    path = path_of(uri)
    with accessing(uri):
        return open(path, "rb")


def _open_regular(uri: str) -> int:
    """Return a descriptor of a regular file."""
    path = path_of(uri)
    mode = os.stat(path).st_mode
    if stat.S_ISREG(mode):
        # Non-blocking, so that a FIFO that has just replaced the file cannot block the reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        mode = os.fstat(descriptor).st_mode
        if stat.S_ISREG(mode):
            return descriptor
        os.close(descriptor)
    raise StorageError(uri, StorageReason.IRREGULAR, f"it is not a regular file but a {_kind(mode)}")


def write_bytes(uri: str, data: bytes) -> None:
    """Write a whole file; its directory is created."""
    path = path_of(uri)
    with accessing(uri):
        _write(path, data)


def write_file(uri: str, source: str) -> None:
    """Write a whole file with the content of another; its directory is created."""
    path = path_of(uri)
    with accessing(uri), open(source, "rb") as content:
        _write(path, content)


def read_file(uri: str, target: str) -> None:
    """Copy a regular file."""
    with accessing(uri), open(_open_regular(uri), "rb") as content, open(target, "wb") as file:
        shutil.copyfileobj(content, file, _COPY_BYTES)


def _write(path: str, data: bytes | IO[bytes]) -> None:
    directory = os.path.dirname(path) or "."
    if os.path.isdir(path):
        raise IsADirectoryError(path)
    os.makedirs(directory, exist_ok=True)
    temporary = os.path.join(directory, f".resshift-{secrets.token_hex(8)}.partial")
    try:
        with open(temporary, "xb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                shutil.copyfileobj(data, file, _COPY_BYTES)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise


def remove(uri: str) -> None:
    """Delete a file if it exists, and its directory if that is then empty."""
    path = path_of(uri)
    with accessing(uri):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return
        try:
            os.rmdir(os.path.dirname(path) or ".")
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EINVAL, errno.EBUSY):
                raise


def exists(uri: str) -> bool:
    """Tell whether a file or directory exists."""
    return os.path.exists(path_of(uri))
