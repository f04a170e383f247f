"""The sources of `prepare`: a folder, a bucket prefix, a tar of pictures or of tars, WebDataset shards, or a
text list -> single inputs.

A file that ends in .tar, wherever it stands, is opened (`pipelines.shards.archives`) and its members are
inputs under its name without the ending: `n01440764.tar` with `n01440764_10026.JPEG` gives the key
`n01440764/n01440764_10026.JPEG`, the same as the extracted tree. A tar that *is* the source adds nothing to
the keys.

A text list (SRC ends in .txt) names one file or directory a line, absolute, relative to the list, or as a
URI; after a tab may stand a label. Empty lines and lines that start with # are skipped.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from resshift import storage
from resshift.storage import StorageError, StorageReason

_MAX_LABEL_BYTES = 1 << 20
_READERS = 16  # lines of a list looked up at a time
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".zip", ".7z", ".rar")


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A WebDataset file beside a picture that holds its label: the text of a .cls, or "label" or "cls" of a
    .json.
    """

    offset: int
    size_bytes: int
    kind: str


@dataclass(frozen=True, slots=True)
class Item:
    """One input.

    Fields:
        key: POSIX path that names it in the data set.
        uri: URI of the file that holds it.
        etag: Tag that changes when the content does.
        size_bytes: Size of the encoded picture.
        offset: Position of its first byte in the file; None when it is the whole file.
        label: None takes the directory in the key.
        sidecar: File that holds the label instead.
        outcome: (status, reason, message), when it is known without reading.
    """

    key: str
    uri: str
    etag: str
    size_bytes: int
    offset: int | None = None
    label: str | None = None
    sidecar: Sidecar | None = None
    outcome: tuple[str, str, str] | None = None


@dataclass(frozen=True, slots=True)
class Archive:
    """A tar, in a file of its own or inside another. `prefix` precedes the names of its members: empty,
    or ends in /.
    """

    key: str
    prefix: str
    uri: str
    etag: str
    size_bytes: int
    offset: int = 0


def read(item: Item, max_bytes: int) -> bytes:
    """Read an input.

    Raises:
        StorageError: With the reason.
    """
    if item.offset is None:
        return storage.read_bytes(item.uri, max_bytes=max_bytes)
    if item.size_bytes > max_bytes:
        raise StorageError(
            item.uri,
            StorageReason.TOO_LARGE,
            f"{item.key} has {item.size_bytes} bytes, at most {max_bytes} are allowed",
        )
    return storage.read_range(item.uri, item.offset, item.size_bytes)


def label_of(item: Item) -> str:
    """Return the label of an input: as listed, as in its sidecar, or the directory in its key.

    Raises:
        StorageError: The sidecar cannot be read.
    """
    if item.label is not None:
        return item.label
    if item.sidecar is None:
        shown = storage.printable(item.key)
        return shown.rsplit("/", 2)[-2] if "/" in shown else ""
    text = storage.read_range(
        item.uri, item.sidecar.offset, min(item.sidecar.size_bytes, _MAX_LABEL_BYTES)
    ).decode("utf-8", "replace")
    if item.sidecar.kind == "cls":
        return text.strip()
    try:
        fields = json.loads(text)
    except json.JSONDecodeError:
        return ""
    return (
        next((str(fields[name]) for name in ("label", "cls") if name in fields), "")
        if isinstance(fields, dict)
        else ""
    )


def is_archive(name: str) -> bool:
    return name.lower().endswith(".tar")


def list_inputs(source: str) -> Iterator[Item | Archive]:
    """List the inputs of a source; tars are yielded unopened.

    Raises:
        StorageError: The source cannot be read.
        ValueError: It is a compressed archive, of which single members cannot be read.
    """
    if source.lower().endswith(COMPRESSED):
        raise ValueError(
            f"{source} is compressed, its pictures cannot be read one by one; unpack it to a tar or a folder"
        )
    if source.lower().endswith(".txt") and [entry.uri for entry in storage.list_entries(source)] == [source]:
        yield from _listed(source)
    else:
        yield from _below(source, None)


def _below(uri: str, stem: str | None) -> Iterator[Item | Archive]:
    """List what is below a URI; keys begin with `stem`, or (None) they are relative and a tar in its place
    adds nothing to them.
    """
    for entry in storage.list_entries(uri):
        is_root = entry.uri.rstrip("/") == uri.rstrip("/")
        key = entry.key if stem is None else stem if is_root else f"{stem}/{entry.key}"
        if is_archive(key) and entry.irregular is None:
            yield Archive(
                key,
                "" if is_root and stem is None else f"{key[:-4]}/",
                entry.uri,
                entry.etag,
                entry.size_bytes,
            )
        else:
            outcome = (
                None if entry.irregular is None else ("failed", StorageReason.IRREGULAR, entry.irregular)
            )
            yield Item(key, entry.uri, entry.etag, entry.size_bytes, outcome=outcome)


def _listed(source: str) -> Iterator[Item | Archive]:
    folder = posixpath.dirname(source)
    text = storage.read_bytes(source)
    lines = text.decode(*storage.list_encoding(text)).splitlines()
    rows = [line.partition("\t") for line in lines if line.strip() and not line.startswith("#")]
    with ThreadPoolExecutor(_READERS) as pool:
        for found in pool.map(lambda row: _line(folder, row[0].strip(), row[2].strip() or None), rows):
            yield from found


def _line(folder: str, name: str, label: str | None) -> list[Item | Archive]:
    is_absolute = name.startswith("/") or "://" in name
    uri = name if is_absolute or not folder else f"{folder}/{name}"
    key = (name.partition("://")[2] or name).strip("/")
    try:
        found = list(_below(uri, key))
        if not found:
            raise StorageError(uri, StorageReason.MISSING, "no such file, object or prefix")
    except StorageError as error:
        return [Item(key, uri, "", 0, label=label, outcome=("failed", str(error.reason), str(error)))]
    return [replace(item, label=label) if isinstance(item, Item) and label else item for item in found]
