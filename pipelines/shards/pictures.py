"""The pictures of a row group, by one request to the store.

The manifest says where a row group lies in its shard, and how it is laid out follows from how shards are
written (`pipelines.shards.parquet`): the columns of the schema one after the other; each is a number of
pages, neither compressed nor with a dictionary; a page is a header in Thrift's compact protocol, the levels
that tell which rows are null, and the other values, each with its length before it. So the metadata at the
end of the file is not needed.

Format: https://parquet.apache.org/docs/file-format/,
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

from pipelines.shards.parquet import SCHEMA, TAUGHT_SCHEMA, RowGroup, footer, spans_of
from resshift import storage
from resshift.pairs.training_pair import StoredPair
from resshift.storage import StorageError, StorageReason

_WANTED = ("key", "status", "bytes", "lq", "taught")
_DATA_PAGE, _PLAIN = 0, 0  # of PageType and of Encoding


class Photo(NamedTuple):
    """An encoded picture; in shards of finished pairs it is the clean one, and the others are there."""

    key: str
    data: bytes
    pair: StoredPair | None = None


def read_pictures(root: str, group: RowGroup) -> list[Photo]:
    """Read the pictures to use of a row group. Where an older manifest does not say where it lies, a process
    reads the end of each shard once.

    Raises:
        StorageError: The shard cannot be read, or is damaged.
    """
    uri = storage.join(root, group.shard)
    start, stop = group.span or _kept_spans(uri)[group.index]
    data = storage.read_range(uri, start, stop - start)
    try:
        columns = _columns(data, group.num_rows)
        ok = [i for i, status in enumerate(columns["status"]) if status == b"ok"]  # the others have no bytes
        photos = columns["bytes"]
        pairs: Sequence[StoredPair | None] = [None] * len(photos)
        if "taught" in columns:
            pairs = [
                StoredPair(*three) for three in zip(photos, columns["lq"], columns["taught"], strict=True)
            ]
        return [
            Photo(columns["key"][i].decode(), photo, pair)
            for i, photo, pair in zip(ok, photos, pairs, strict=True)
            if i not in group.duplicates
        ]
    except (LookupError, ValueError, struct.error) as error:
        message = f"row group {group.index} is damaged: {error}"
        raise StorageError(uri, StorageReason.INVALID, message) from error


@functools.lru_cache(maxsize=4096)
def _kept_spans(uri: str) -> tuple[tuple[int, int], ...]:
    """Return the spans of a shard that is not written again while this process reads it."""
    return spans_of(footer(uri)[0])


def _columns(data: bytes, num_rows: int) -> dict[str, list[bytes]]:
    """Return the values of the wanted columns of a row group, without nulls."""
    found: dict[str, list[bytes]] = {}
    at = rest = 0
    for name in TAUGHT_SCHEMA.names:
        if at == len(data) and name not in SCHEMA.names:
            break  # photos
        values: list[bytes] = []
        rest = num_rows
        while rest > 0:
            header, at = _thrift_struct(data, at)
            page = header[5]
            if (header[1], page[2], header[2]) != (_DATA_PAGE, _PLAIN, header[3]):
                raise ValueError(f"unknown kind of page {header}")
            stop = at + header[3]
            if name in _WANTED:
                values += _values(data, at, stop)
            rest, at = rest - page[1], stop
        found[name] = values
    if rest or at != len(data):
        raise ValueError(f"it has not {num_rows} rows in {len(data)} bytes")
    return found


def _values(data: bytes, at: int, stop: int) -> list[bytes]:
    """Return the values of a page at [at, stop): byte strings that may be null."""
    values: list[bytes] = []
    at += 4 + _length(data, at)  # the levels
    while at < stop:
        first = at + 4
        at = first + _length(data, at)
        values.append(data[first:at])
    if at != stop:
        raise ValueError(f"a value ends at byte {at}, after its page, which ends at {stop}")
    return values


def _length(data: bytes, at: int) -> int:
    return struct.unpack_from("<I", data, at)[0]


def _thrift_struct(data: bytes, at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of a struct, by their numbers, and where it ends; as far as headers of pages need it:
    integers, truth values, and structs of these.
    """
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _thrift_integer(data, at)
        match head & 15:
            case 1 | 2:
                fields[number] = head & 15 == 1
            case 4 | 5 | 6:
                fields[number], at = _thrift_integer(data, at)
            case 12:
                fields[number], at = _thrift_struct(data, at)
            case kind:
                raise ValueError(f"unknown kind of field {kind}")
    return fields, at + 1


def _thrift_integer(data: bytes, at: int) -> tuple[int, int]:
    """Return a number in zigzag and base 128, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return (value >> 1) ^ -(value & 1), at
        shift += 7
