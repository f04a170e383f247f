"""Pictures inside tars, found by their headers alone, so that each member is read later by one ranged
request.

Nothing is unpacked. A header pass costs one small read a member; tars inside a tar (ILSVRC2012_img_train.tar
holds one for every class) are yielded with their place in the outer file, so that they are passed over in
parallel. Formats are those of Python's tarfile, uncompressed: ustar, GNU, pax.

WebDataset: files whose names agree up to the first dot belong together. The .cls, .json and .txt beside a
picture are no inputs of their own; .cls or else .json gives its label.
"""

from __future__ import annotations

import io
import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.shards.parquet import Reason
from pipelines.shards.sources import Archive, Item, Sidecar, is_archive
from pipelines.shards.window import Window
from resshift import storage
from resshift.storage import StorageReason

_BLOCK_BYTES = 1 << 14  # holds a header with long names; pictures between two headers are larger
_PICTURES = ("jpg", "jpeg", "jpe", "png", "webp", "tif", "tiff", "gif", "bmp", "heic", "avif", "jxl")
_LABELS = ("cls", "json")
_SIDECARS = (*_LABELS, "txt")


def members(archive: Archive) -> Iterator[Item | Archive]:
    """Yield the inputs in a tar and the tars in it, then a row for the tar itself: skipped, or failed when it
    is damaged.

    What stands before the damage is yielded.

    Raises:
        StorageError: The file cannot be read.
    """
    found: list[Item | Archive] = []
    damage = ""

    def read_range(position: int, num_bytes: int) -> bytes:
        return storage.read_range(archive.uri, archive.offset + position, num_bytes)

    file: Any = io.BufferedReader(Window(archive.size_bytes, read_range), _BLOCK_BYTES)
    try:
        with tarfile.open(fileobj=file, mode="r:") as opened:
            tar: Any = opened
            while (member := tar.next()) is not None:
                tar.members.clear()  # not needed again: a tar of a million members stays small
                if not member.isdir():
                    found.append(_found(archive, member))
            # tarfile takes a damaged header for the end; the end is a block of zeros.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
            if tar.offset >= archive.size_bytes:
                raise tarfile.ReadError(f"cut off at byte {archive.size_bytes}: the end mark is missing")
    except tarfile.TarError as error:
        damage = str(error)
    yield from (one for one in found if isinstance(one, Archive))
    yield from _with_labels([one for one in found if isinstance(one, Item)])
    outcome = ("skipped", Reason.ARCHIVE, f"{len(found)} members")
    if damage:
        outcome = ("failed", Reason.DAMAGED_ARCHIVE, f"{damage}; {len(found)} members stand before")
    yield Item(archive.key, archive.uri, archive.etag, archive.size_bytes, outcome=outcome)


def _found(archive: Archive, member: tarfile.TarInfo) -> Item | Archive:
    name = archive.prefix + member.name.removeprefix("./").lstrip("/")
    offset, etag = (
        archive.offset + member.offset_data,
        f"{archive.etag}+{archive.offset + member.offset_data:x}",
    )
    if not member.isreg() or member.issparse():
        return Item(
            name,
            archive.uri,
            etag,
            0,
            offset,
            outcome=("failed", StorageReason.IRREGULAR, "a link, device or sparse file in a tar"),
        )
    if member.offset_data + member.size > archive.size_bytes:
        message = f"the tar ends {member.offset_data + member.size - archive.size_bytes} bytes before it does"
        return Item(name, archive.uri, etag, 0, offset, outcome=("failed", Reason.DAMAGED_ARCHIVE, message))
    if is_archive(name):
        return Archive(name, f"{name[:-4]}/", archive.uri, etag, member.size, offset)
    return Item(name, archive.uri, etag, member.size, offset)


def _with_labels(items: list[Item]) -> Iterator[Item]:
    """Join the files of a WebDataset sample."""
    samples: dict[str, list[Item]] = {}
    for item in items:
        samples.setdefault(_sample(item.key), []).append(item)
    for sample in samples.values():
        has_picture = any(_extension(item.key) in _PICTURES for item in sample)
        beside = {
            _extension(item.key): item for item in sample if has_picture and _extension(item.key) in _SIDECARS
        }
        label = next(
            (beside[kind] for kind in _LABELS if kind in beside and beside[kind].outcome is None), None
        )
        sidecar = (
            None if label is None else Sidecar(label.offset or 0, label.size_bytes, _extension(label.key))
        )
        yield from (replace(item, sidecar=sidecar) for item in sample if item not in beside.values())


def _sample(key: str) -> str:
    folder, name = posixpath.split(key)
    return f"{folder}/{name.split('.', 1)[0]}"


def _extension(key: str) -> str:
    return posixpath.splitext(key)[1].lstrip(".").lower()
