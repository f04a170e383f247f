"""Shards on disk: Parquet files of encoded pictures, one row for every input, and the manifest that names them.

Columns: key, label, bytes (null unless ok), width, height, mode, sha256, status (ok, failed), reason (empty when ok), message.

A row group is the unit of random access and is read with two requests, the end of the file and the columns that are wanted. A shard carries
the fingerprint of what went into it. `manifest.json`, written last, names the shards that belong to the data set; readers trust only what
stands there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resshift import storage

FORMAT = 1
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.string()),
        ("bytes", pa.binary()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("mode", pa.string()),
        ("sha256", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
    ]
)
_SUMMARY_KEY = b"resshift.shard"
_FOOTER_BYTES = 1 << 16  # holds the metadata of about 100 row groups


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What a shard holds. `row_groups` are (rows, rows that are ok) of each; `reasons` counts failures."""

    name: str
    fingerprint: str
    row_groups: tuple[tuple[int, int], ...]
    size_bytes: int
    reasons: dict[str, int]
    reused: bool = False

    @property
    def num_rows(self) -> int:
        """All rows."""
        return sum(rows for rows, _ in self.row_groups)

    @property
    def num_ok(self) -> int:
        """Rows that hold a picture."""
        return sum(ok for _, ok in self.row_groups)


def write_rows(uri: str, name: str, fingerprint: str, rows: Sequence[dict[str, Any]], row_group_rows: int) -> ShardSummary:
    """Write a shard in one piece."""
    groups = [rows[start : start + row_group_rows] for start in range(0, len(rows), row_group_rows)]
    reasons: dict[str, int] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    counts = tuple((len(group), sum(row["status"] == "ok" for row in group)) for group in groups)
    summary = {"name": name, "fingerprint": fingerprint, "row_groups": counts, "reasons": reasons}
    sink = io.BytesIO()
    schema = SCHEMA.with_metadata({_SUMMARY_KEY: json.dumps(summary)})
    # Encoded pictures do not compress again; statistics would make the footer half as long again.
    with pq.ParquetWriter(sink, schema, compression="NONE", use_dictionary=False, write_statistics=False) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(list(group), schema=schema))
    data = sink.getvalue()
    storage.write_bytes(uri, data)
    return ShardSummary(name, fingerprint, counts, len(data), reasons)


def existing_summary(uri: str, fingerprint: str) -> ShardSummary | None:
    """Return the summary of a whole shard with this fingerprint; None when there is none."""
    if not storage.exists(uri):
        return None
    data = storage.read_bytes(uri)
    try:
        metadata = pq.read_schema(io.BytesIO(data)).metadata or {}
        found = json.loads(metadata[_SUMMARY_KEY])
    except (pa.ArrowException, OSError, KeyError, json.JSONDecodeError):
        return None  # not one of ours: it is written again
    if found["fingerprint"] != fingerprint:
        return None
    groups = tuple((int(rows), int(ok)) for rows, ok in found["row_groups"])
    return ShardSummary(found["name"], fingerprint, groups, len(data), found["reasons"], reused=True)


def read_row_group(uri: str, index: int, columns: Sequence[str]) -> pa.Table:
    """Read columns of one row group; only its part of the file travels.

    Raises:
        StorageError: the shard cannot be read.
        pa.ArrowException: it is damaged.
    """
    footer = storage.read_range(uri, -_FOOTER_BYTES, _FOOTER_BYTES)
    length = int.from_bytes(footer[-8:-4], "little") + 8
    if length > len(footer):
        footer = storage.read_range(uri, -length, length)
    metadata = pq.read_metadata(io.BytesIO(footer))
    group = metadata.row_group(index)
    chunks = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema in columns]
    start = min(chunk.data_page_offset for chunk in chunks)  # there are no dictionary pages
    stop = max(chunk.data_page_offset + chunk.total_compressed_size for chunk in chunks)
    part: Any = _Part(storage.read_range(uri, start, stop - start), start)
    return pq.ParquetFile(part, metadata=metadata).read_row_group(index, columns=list(columns), use_threads=False)


class _Part(io.RawIOBase):
    """A file of which only the bytes from `start` on are at hand."""

    def __init__(self, data: bytes, start: int) -> None:
        super().__init__()
        self._data = memoryview(data)
        self._start = start
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._start + len(self._data)}[whence]
        self._position = origin + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        first = self._position - self._start
        if first < 0:
            raise ValueError(f"byte {self._position} lies before the part, which begins at {self._start}")
        data = bytes(self._data[first : first + size if size >= 0 else None])
        self._position += len(data)
        return data


def write_manifest(root: str, source: str, summaries: list[ShardSummary]) -> None:
    """Name the shards of the data set; readers trust only what stands here."""
    shards = [
        {"name": s.name, "fingerprint": s.fingerprint, "row_groups": s.row_groups, "size_bytes": s.size_bytes, "reasons": s.reasons}
        for s in sorted(summaries, key=lambda summary: summary.name)
    ]
    totals = {"rows": sum(s.num_rows for s in summaries), "ok": sum(s.num_ok for s in summaries)}
    manifest = {"format": FORMAT, "source": storage.printable(source), "totals": totals, "shards": shards}
    storage.write_bytes(storage.join(root, "manifest.json"), (json.dumps(manifest, indent=1) + "\n").encode())


def read_manifest(root: str) -> list[ShardSummary]:
    """Return the shards of a data set.

    Raises:
        StorageError: there is no manifest.
        ValueError: it is of a format that this version does not know.
    """
    manifest = json.loads(storage.read_bytes(storage.join(root, "manifest.json")))
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{root} holds shards of format {manifest.get('format')!r}; this version reads {FORMAT}")
    return [summary_from_json(json.dumps(shard)) for shard in manifest["shards"]]


def summary_to_json(summary: ShardSummary) -> str:
    """Return a summary as text, for the way from a worker."""
    return json.dumps({name: getattr(summary, name) for name in ShardSummary.__dataclass_fields__})


def summary_from_json(text: str) -> ShardSummary:
    """Read what `summary_to_json` wrote."""
    values = json.loads(text)
    groups = tuple((int(rows), int(ok)) for rows, ok in values.pop("row_groups"))
    return ShardSummary(row_groups=groups, **values)
