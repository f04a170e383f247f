"""Shards on disk: Parquet files of encoded pictures, one row for every input, and the manifest that names
them.

Columns of a shard:

    key         POSIX path of the input, unique in the data set
    label       the directory in the key, or what a list or a WebDataset file says
    width, height, mode, size_bytes
                of the stored picture; when nothing is stored, those of the input as far as they are known
    sha256      of the input
    status      ok, skipped (fine, but left out) or failed
    reason      empty when ok; else one word of `resshift.images.ImageReason`,
                `resshift.storage.StorageReason` or `Reason` here
    message     one line; of an ok row what is odd about it ("PNG in a file named .JPEG")
    bytes       the encoded picture, null unless ok

Shards of `pipelines.shards.taught` hold finished pairs instead of photos, and have two more columns of
encoded pictures, null unless ok: lq, and taught, what a teacher made of it.

A row group is the unit of random access: the manifest says where it lies in the file, and one request reads
it (`pipelines.shards.pictures`). A shard carries the fingerprint of what went into it and depends on nothing
else. Exact duplicates, which need the whole data set, are in `manifest.json` (the rows not to use) and in
`status.parquet` (all columns but the bytes, of all shards). The manifest is written last; readers trust only
what it names.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shards.window import Window
from resshift import storage
from resshift.storage import StorageError, StorageReason

FORMAT = 2
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mode", pa.string()),
        ("size_bytes", pa.int64()),
        ("sha256", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("bytes", pa.binary()),  # last: the others of a row group are then one small piece of the file
    ]
)
TAUGHT_SCHEMA = pa.schema([*SCHEMA, ("lq", pa.binary()), ("taught", pa.binary())])
STATUS_SCHEMA = pa.schema(
    [*(field for field in SCHEMA if field.name != "bytes"), ("shard", pa.string()), ("row_group", pa.int32())]
)
_FINGERPRINT = b"resshift.fingerprint"
_FOOTER_BYTES = 1 << 16  # holds the metadata of about 100 row groups


class Reason(StrEnum):
    """Why an input has no picture in the data set, besides what is wrong with its bytes or its file."""

    TOO_SMALL = "too_small"
    DUPLICATE = "duplicate"
    DUPLICATE_KEY = "duplicate_key"
    ARCHIVE = "archive"
    DAMAGED_ARCHIVE = "damaged_archive"


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group that holds `num_ok` pictures to use.

    Fields:
        shard, index: Name of its file, and its place there.
        num_ok: Number of pictures to use.
        duplicates: Its rows, of all, that are ok but not to be used.
        num_rows: Number of all rows.
        span: First byte in the file and the one after the last; None when the manifest does not say it.
    """

    shard: str
    index: int
    num_ok: int
    duplicates: tuple[int, ...] = ()
    num_rows: int = 0
    span: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What the manifest says of a shard.

    Fields:
        name: Of the file.
        fingerprint: Of its inputs.
        row_groups: (rows, rows to use) of each.
        size_bytes: Of the file.
        reasons: How many rows have which reason.
        duplicates: (row group, row in it) of rows that are ok in the file and a duplicate in the data set.
        spans: (first byte, the one after the last) of each row group; none in older manifests.
    """

    name: str
    fingerprint: str
    row_groups: tuple[tuple[int, int], ...]
    size_bytes: int
    reasons: dict[str, int]
    duplicates: tuple[tuple[int, int], ...] = ()
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def num_rows(self) -> int:
        """All rows."""
        return sum(rows for rows, _ in self.row_groups)

    @property
    def num_ok(self) -> int:
        """Rows that hold a picture to use."""
        return sum(ok for _, ok in self.row_groups)


@dataclass(frozen=True, slots=True)
class Shard:
    """A shard as it is in its file: `status` has a row of `STATUS_SCHEMA` for every input, `spans` are as in
    `ShardSummary`.
    """

    name: str
    fingerprint: str
    size_bytes: int
    status: pa.Table = field(repr=False)
    spans: tuple[tuple[int, int], ...] = field(repr=False)
    reused: bool = False


def write_shard_file(
    root: str,
    name: str,
    fingerprint: str,
    rows: Iterable[dict[str, Any]],
    max_rows: int,
    max_bytes: int,
    columns: pa.Schema = SCHEMA,
) -> Shard:
    """Write a shard in one piece; a row group ends after `max_rows` rows or `max_bytes` bytes of pictures.
    `columns` is `SCHEMA` or `TAUGHT_SCHEMA`.
    """
    sink = io.BytesIO()
    status: list[dict[str, Any]] = []
    schema = columns.with_metadata({_FINGERPRINT: fingerprint})
    # Encoded pictures do not compress again; statistics would make the footer half as long again.
    # `pipelines.shards.pictures` reads pages of just this kind.
    with pq.ParquetWriter(
        sink,
        schema,
        compression="NONE",
        use_dictionary=False,
        write_statistics=False,
        data_page_version="1.0",
    ) as writer:
        for i_group, group in enumerate(_cut(rows, max_rows, max_bytes)):
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            status += [{**row, "shard": name, "row_group": i_group} for row in group]
    data = sink.getvalue()
    storage.write_bytes(storage.join(root, name), data)
    spans = spans_of(pq.read_metadata(io.BytesIO(data)))
    return Shard(name, fingerprint, len(data), pa.Table.from_pylist(status, schema=STATUS_SCHEMA), spans)


def _cut(rows: Iterable[dict[str, Any]], max_rows: int, max_bytes: int) -> Iterator[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    size_bytes = 0
    for row in rows:
        group.append(row)
        size_bytes += len(row.get("bytes") or b"")
        if len(group) >= max_rows or size_bytes >= max_bytes:
            yield group
            group, size_bytes = [], 0
    if group:
        yield group


def existing_shard(root: str, name: str, fingerprint: str) -> Shard | None:
    """Return a whole shard with this fingerprint, without reading its pictures; None when there is none."""
    uri = storage.join(root, name)
    if not storage.exists(uri):
        return None
    try:
        metadata, size_bytes = footer(uri)
        if (metadata.metadata or {}).get(_FINGERPRINT) != fingerprint.encode():
            return None
        columns = [name for name in SCHEMA.names if name != "bytes"]
        groups = [_read_group(uri, metadata, i, columns) for i in range(metadata.num_row_groups)]
    except StorageError as error:
        if error.reason is StorageReason.INVALID:
            return None
        raise
    except (pa.ArrowException, OSError):
        return None  # not one of ours, or damaged: it is written again
    status = pa.concat_tables(groups)
    shard = pa.array([name] * len(status), pa.string())
    i_group = pa.array(np.repeat(np.arange(len(groups)), [len(group) for group in groups]), pa.int32())
    status = status.append_column("shard", shard).append_column("row_group", i_group)
    return Shard(name, fingerprint, size_bytes, status.cast(STATUS_SCHEMA), spans_of(metadata), reused=True)


def read_rows(root: str, shard: Shard) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard as they were written, pictures included."""
    uri = storage.join(root, shard.name)
    metadata, _ = footer(uri)
    for i in range(metadata.num_row_groups):
        yield from _read_group(uri, metadata, i, SCHEMA.names).to_pylist()


def footer(uri: str) -> tuple[pq.FileMetaData, int]:
    """Return the metadata of a shard and the size of its file."""
    footer = storage.read_range(uri, -_FOOTER_BYTES, _FOOTER_BYTES)
    length = int.from_bytes(footer[-8:-4], "little") + 8
    if length > len(footer):
        footer = storage.read_range(uri, -length, length)
    metadata = pq.read_metadata(io.BytesIO(footer))
    return metadata, max((stop for _, stop in spans_of(metadata)), default=4) + length


def spans_of(metadata: pq.FileMetaData) -> tuple[tuple[int, int], ...]:
    """Return the first byte of each row group and the one after its last."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return tuple((_span(group, 0)[0], _span(group, group.num_columns - 1)[1]) for group in groups)


def _span(group: pq.RowGroupMetaData, i_column: int) -> tuple[int, int]:
    chunk = group.column(i_column)
    return (
        chunk.data_page_offset,
        chunk.data_page_offset + chunk.total_compressed_size,
    )  # there are no dictionary pages


def _read_group(uri: str, metadata: pq.FileMetaData, index: int, columns: Sequence[str]) -> pa.Table:
    group = metadata.row_group(index)
    spans = [_span(group, i) for i in range(group.num_columns) if group.column(i).path_in_schema in columns]
    start, stop = min(start for start, _ in spans), max(stop for _, stop in spans)
    data = memoryview(storage.read_range(uri, start, stop - start))

    def at_hand(position: int, num_bytes: int) -> memoryview:
        if position < start:
            raise ValueError(f"byte {position} is before the row group, which begins at {start}")
        return data[position - start : position - start + num_bytes]

    part: Any = Window(stop, at_hand)
    return pq.ParquetFile(part, metadata=metadata).read_row_group(
        index, columns=list(columns), use_threads=False
    )


def write_manifest(root: str, source: str, summaries: Sequence[ShardSummary]) -> None:
    """Name the shards of the data set; readers trust only what stands here."""
    ordered = sorted(summaries, key=lambda summary: summary.name)
    totals = {"rows": sum(s.num_rows for s in ordered), "ok": sum(s.num_ok for s in ordered)}
    manifest = {
        "format": FORMAT,
        "source": storage.printable(source),
        "totals": totals,
        "shards": [asdict(s) for s in ordered],
    }
    storage.write_bytes(storage.join(root, "manifest.json"), (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(root: str) -> list[ShardSummary]:
    """Return the shards of a data set.

    Raises:
        StorageError: There is no manifest.
        ValueError: It is of a format that this version does not know.
    """
    uri = storage.join(root, "manifest.json")
    try:
        manifest = json.loads(storage.read_bytes(uri))
    except StorageError as error:
        if error.reason is StorageReason.MISSING:
            detail = (
                "no shards here; photos become shards with python jobs/prepare.py PHOTOS SHARDS "
                f"({error.detail})"
            )
            raise StorageError(uri, error.reason, detail) from None
        raise
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{root} holds shards of format {manifest.get('format')!r}; this version reads {FORMAT}: prepare "
            "them again"
        )
    pairs = ("row_groups", "duplicates", "spans")
    return [
        ShardSummary(
            **shard | {name: tuple((int(a), int(b)) for a, b in shard.get(name, ())) for name in pairs}
        )
        for shard in manifest["shards"]
    ]


def row_groups(shards: Sequence[ShardSummary]) -> list[RowGroup]:
    """Return the row groups that hold at least one picture to use, in the order of the shards' names."""
    found: list[RowGroup] = []
    for shard in sorted(shards, key=lambda shard: shard.name):
        left_out: dict[int, list[int]] = {}
        for i_group, i_row in shard.duplicates:
            left_out.setdefault(i_group, []).append(i_row)
        found += [
            RowGroup(
                shard.name,
                i,
                ok,
                tuple(left_out.get(i, ())),
                num_rows,
                shard.spans[i] if shard.spans else None,
            )
            for i, (num_rows, ok) in enumerate(shard.row_groups)
            if ok
        ]
    return found
