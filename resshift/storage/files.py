"""Files and objects by one set of functions: plain paths, file:// and s3://.

Listings are streamed, one page of a bucket or one directory at a time, so ten million keys take no memory and
work starts with the first page. Keys come in the order of their UTF-8 bytes from both kinds of storage.
Writing is atomic: a reader sees either the whole new file or the previous one (local: temporary name, fsync,
rename; S3: one PUT, or parts that become an object together).

Local files are in `resshift.storage.local`, objects in `resshift.storage.s3`. `S3Options` are the options of
access to a bucket; local paths ignore them. Credentials come from the environment or a profile, never from a
URI. URIs are taken literally: nothing is percent-decoded. What it does not do: other schemes, deleting more
than one file at a time.
"""

from __future__ import annotations

import codecs
import os
import posixpath
from collections.abc import Iterator
from typing import IO

from resshift.storage import local, s3
from resshift.storage.s3 import S3Options
from resshift.storage.types import Entry, StorageError, StorageReason

_PROBED_KEYS = 4  # of which one may lie before the start, or be the marker of a directory


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def list_encoding(start: bytes) -> tuple[str, str]:
    """Return the encoding, and what becomes of wrong bytes, of a text that lists names.

    Editors and spreadsheets of Windows write UTF-16 or UTF-8, both with a byte order mark.

    Args:
        start: At least the first two bytes of the text.
    """
    if start[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16", "replace"
    return "utf-8-sig", "surrogateescape"


def list_entries(
    root: str, options: S3Options = s3.DEFAULT, start: str = "", stop: str | None = None
) -> Iterator[Entry]:
    """List every file below `root`, recursively, in the order of the UTF-8 bytes of the keys.

    Keys that end in "/" (directory markers) and temporary files of `write_bytes` are skipped. Irregular files
    and directories that cannot be read are yielded with `irregular` set and never opened; links are followed
    unless they lead back to a directory above them.

    Args:
        root: Directory, prefix, or single file or object.
        options: Options of access to a bucket.
        start, stop: First key, and the key before which the listing ends; None: its end. What lies outside is
            not listed: pages of a bucket before `start` are not asked for, directories not opened.

    Raises:
        StorageError: The root itself cannot be read, or is missing; an empty prefix of an existing bucket is
            not missing.
    """
    if is_s3(root):
        return s3.list_entries(root, options, start, stop)
    return local.list_entries(root, start, stop)


def first_key(
    root: str, options: S3Options = s3.DEFAULT, start: str = "", stop: str | None = None
) -> str | None:
    """Return the first key of a listing from `start` to before `stop`, None if there is none, by one small
    request to a bucket.

    Raises:
        StorageError: As `list_entries`.
    """
    if is_s3(root):
        found = s3.list_entries(root, options, start, stop, page_keys=_PROBED_KEYS)
    else:
        found = local.list_entries(root, start, stop)
    return next((entry.key for entry in found), None)


def find_entry(root: str, key: str, options: S3Options = s3.DEFAULT) -> Entry:
    """Return the entry that `list_entries` would yield for a key below a root.

    Raises:
        StorageError: The file or object is missing or cannot be reached; invalid, if `join` refuses the key
            of a file. Any text is a key of a bucket.
    """
    if is_s3(root):
        return s3.find_entry(s3.uri_of(root, key), key, options)
    return local.find_entry(join(root, key), key)


def name_problem(root: str, key: str) -> str | None:
    """Return why nothing can be written below a root under a key because of its length; None if it can."""
    if is_s3(root):
        part, most_bytes = join(root, key).split("/", 3)[-1], 1024
    else:
        part, most_bytes = max(key.split("/"), key=lambda one: len(os.fsencode(one))), 255
    num_bytes = len(os.fsencode(part))
    return (
        f"{part!r} has {num_bytes} bytes, at most {most_bytes} are allowed"
        if num_bytes > most_bytes
        else None
    )


def read_bytes(uri: str, max_bytes: int | None = None, options: S3Options = s3.DEFAULT) -> bytes:
    """Read a whole file or object. A file that is not regular is refused without being opened.

    Raises:
        StorageError: The file cannot be read; too_large, before a byte is read, if its size is above
            `max_bytes`.
    """
    return s3.read_bytes(uri, max_bytes, options) if is_s3(uri) else local.read_bytes(uri, max_bytes)


def read_first_bytes(uri: str, num_bytes: int, options: S3Options = s3.DEFAULT) -> bytes:
    """Read at most `num_bytes` at the beginning of a file or object; no more than that is transferred.

    Raises:
        StorageError: The file cannot be read.
    """
    return _read_part(uri, 0, num_bytes, options)


def read_range(uri: str, offset: int, num_bytes: int, options: S3Options = s3.DEFAULT) -> bytes:
    """Read a part of a file or object, in one request.

    Args:
        uri: URI of the file or object.
        offset: Position of the first byte. A negative offset counts from the end; a file shorter than that is
            read from its start.
        num_bytes: Number of bytes.
        options: Options of access to a bucket.

    Raises:
        StorageError: The part cannot be read; invalid, if the file ends before the part does.
    """
    data = _read_part(uri, offset, num_bytes, options)
    if offset >= 0 and len(data) < num_bytes:
        raise StorageError(uri, StorageReason.INVALID, f"it ends before byte {offset + num_bytes}")
    return data


def _read_part(uri: str, offset: int, num_bytes: int, options: S3Options) -> bytes:
    if num_bytes == 0:
        return b""
    if is_s3(uri):
        return s3.read_part(uri, offset, num_bytes, options)
    return local.read_part(uri, offset, num_bytes)


def write_bytes(
    uri: str, data: bytes, options: S3Options = s3.DEFAULT, content_type: str | None = None
) -> None:
    """Write a whole file or object atomically; local directories are created.

    Args:
        uri: URI of the file or object.
        data: Content of the file.
        options: Options of access to a bucket, and of the new object.
        content_type: Content type of an object; a local file has none.

    Raises:
        StorageError: The file cannot be written; nothing was changed.
    """
    if is_s3(uri):
        s3.write_bytes(uri, data, options, content_type)
    else:
        local.write_bytes(uri, data)


def write_file(
    uri: str, source: str, options: S3Options = s3.DEFAULT, content_type: str | None = None
) -> None:
    """Write a whole file or object with the content of a local file, as `write_bytes` does, whatever its size
    and without holding it in memory.

    Args:
        uri: URI of the file or object.
        source: Path of the local file.
        options: Options of access to a bucket, and of the new object.
        content_type: Content type of an object; a local file has none.

    Raises:
        StorageError: The file cannot be written; nothing was changed.
    """
    if is_s3(uri):
        s3.write_file(uri, source, options, content_type)
    else:
        local.write_file(uri, source)


def read_file(uri: str, target: str, options: S3Options = s3.DEFAULT) -> None:
    """Copy a file or object into a local file, whatever its size and without holding it in memory.

    Args:
        uri: URI of the file or object.
        target: Path of the local file, which is overwritten.
        options: Options of access to a bucket.

    Raises:
        StorageError: The file cannot be read.
    """
    if is_s3(uri):
        s3.read_file(uri, target, options)
    else:
        local.read_file(uri, target)


def remove(uri: str, options: S3Options = s3.DEFAULT) -> None:
    """Delete a file or object if it exists, and its local directory if that is then empty.

    Raises:
        StorageError: The file cannot be deleted.
    """
    if is_s3(uri):
        s3.remove(uri, options)
    else:
        local.remove(uri)


def exists(uri: str, options: S3Options = s3.DEFAULT) -> bool:
    """Tell whether a file or object exists; a prefix or a bucket is not an object.

    Raises:
        StorageError: Access is denied, or the store cannot be reached.
    """
    return s3.exists(uri, options) if is_s3(uri) else local.exists(uri)


def join(root: str, key: str) -> str:
    """Return the URI of a relative key below a root.

    Raises:
        StorageError: Invalid, if the key is empty or absolute, has a NUL byte or a ".." segment, or, for a
            local root, segments by which two keys would name the same file ("." and "//").
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
    """Tell whether `child` is `parent` or lies below it, after links, "..", "." and trailing slashes are
    resolved. Neither needs to exist.
    """
    if is_s3(child) != is_s3(parent):
        return False
    if not is_s3(child):
        inner, outer = os.path.realpath(local.path_of(child)), os.path.realpath(local.path_of(parent))
        return os.path.commonpath([inner, outer]) == outer
    (child_bucket, child_key), (parent_bucket, parent_key) = s3.split(child), s3.split(parent)
    if child_bucket != parent_bucket:
        return False
    # Keys are literal in S3, but a user who types ".." means the directory above: a key is inside if it is by
    # either reading.
    plain, parent_plain = child_key.strip("/"), parent_key.strip("/")
    resolved, parent_resolved = (posixpath.normpath(f"/{key}").strip("/") for key in (child_key, parent_key))
    readings = ((plain, parent_plain), (resolved, parent_resolved))
    return any(not outer or inner == outer or inner.startswith(f"{outer}/") for inner, outer in readings)


def open_input(uri: str, options: S3Options = s3.DEFAULT) -> IO[bytes]:
    """Open a file or object for random access; only the parts that are read are transferred.

    Raises:
        StorageError: The file cannot be opened.
    """
    return s3.open_input(uri, options) if is_s3(uri) else local.open_input(uri)
