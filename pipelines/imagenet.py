"""Photos -> Parquet shards of their original bytes, with a status for every input.

A shard is the unit of work: its Parquet file carries the fingerprint of what went into it and is written in one piece, so that a re-run
does only what is missing. `manifest.json`, written last, names the shards that belong to the data set.

Columns: key, label, bytes (null unless ok), width, height, mode, sha256, status (ok, failed), reason (empty when ok), message.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from resshift import seeds, storage
from resshift.images import ImageError, ImageLimits, decode, probe
from resshift.storage import Entry, StorageError

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


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """How a data set is cut. `min_side_px` refuses smaller pictures; `row_group_rows` is the unit of random access."""

    shard_bytes: int = 128 << 20
    row_group_rows: int = 64
    min_side_px: int = 32
    max_pixels: int = 100_000_000


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The inputs of one shard, in order."""

    name: str
    keys: tuple[str, ...]
    uris: tuple[str, ...]
    fingerprint: str


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


def plan_shards(entries: list[Entry], options: ShardOptions) -> list[ShardTask]:
    """Cut a listing into shards of about `shard_bytes`.

    The order is a hash of the key: neighbours in a shard are then not of one class or one camera, and training needs no global shuffle.
    """
    ordered = sorted(entries, key=lambda entry: seeds.derive("shard order", storage.printable(entry.key)))
    tasks: list[ShardTask] = []
    part: list[Entry] = []
    size_bytes = 0
    for entry in ordered:
        if part and size_bytes + entry.size_bytes > options.shard_bytes:
            tasks.append(_task(len(tasks), part, options))
            part, size_bytes = [], 0
        part.append(entry)
        size_bytes += entry.size_bytes
    if part:
        tasks.append(_task(len(tasks), part, options))
    return tasks


def _task(i_shard: int, entries: list[Entry], options: ShardOptions) -> ShardTask:
    described = json.dumps([FORMAT, options.row_group_rows, options.min_side_px, options.max_pixels, [(e.key, e.etag) for e in entries]])
    digest = hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return ShardTask(f"shard-{i_shard:05d}.parquet", tuple(e.key for e in entries), tuple(e.uri for e in entries), digest)


def row_of(key: str, uri: str, options: ShardOptions) -> dict[str, Any]:
    """Read and check one picture and return its row; whatever is wrong with it becomes status, reason and message."""
    shown = storage.printable(key)
    label = shown.rsplit("/", 2)[-2] if "/" in shown else ""
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names) | {"key": shown, "label": label, "status": "failed", "reason": "", "message": ""}
    limits = ImageLimits(max_pixels=options.max_pixels)
    try:
        data = storage.read_bytes(uri, max_bytes=limits.max_bytes)
        row["sha256"] = hashlib.sha256(data).hexdigest()
        header = probe(data, limits)
        row |= {"width": header.width, "height": header.height, "mode": header.mode}
        if min(header.width, header.height) < options.min_side_px:
            message = f"{header.width}x{header.height}: both sides must have at least {options.min_side_px} pixels"
            return row | {"reason": "too_small", "message": message}
        decode(data, limits)  # what training would meet later
    except (ImageError, StorageError) as error:
        return row | {"reason": str(error.reason), "message": str(error)}
    return row | {"bytes": data, "status": "ok"}


def write_shard(task: ShardTask, root: str, options: ShardOptions) -> ShardSummary:
    """Build a shard and write it in one piece, unless it is there already with the same fingerprint."""
    uri = storage.join(root, task.name)
    existing = _existing_summary(uri, task.fingerprint)
    if existing is not None:
        return existing
    rows = [row_of(key, item, options) for key, item in zip(task.keys, task.uris, strict=True)]
    groups = [rows[start : start + options.row_group_rows] for start in range(0, len(rows), options.row_group_rows)]
    reasons: dict[str, int] = {}
    for row in rows:
        if row["status"] != "ok":
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    counts = tuple((len(group), sum(row["status"] == "ok" for row in group)) for group in groups)
    summary = {"name": task.name, "fingerprint": task.fingerprint, "row_groups": counts, "reasons": reasons}
    sink = io.BytesIO()
    schema = SCHEMA.with_metadata({_SUMMARY_KEY: json.dumps(summary)})
    # Encoded pictures do not compress again.
    with pq.ParquetWriter(sink, schema, compression="NONE", use_dictionary=False) as writer:
        for group in groups:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    data = sink.getvalue()
    storage.write_bytes(uri, data)
    return ShardSummary(task.name, task.fingerprint, counts, len(data), reasons)


def _existing_summary(uri: str, fingerprint: str) -> ShardSummary | None:
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


def write_shards(tasks: list[ShardTask], root: str, options: ShardOptions) -> Iterator[ShardSummary]:
    """Build all shards with Ray Data and yield the summary of each as it is done."""
    import ray.data

    items = [{"task": i} for i in range(len(tasks))]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        lambda row: {"i": row["task"], "summary": _summary_json(write_shard(tasks[row["task"]], root, options))}
    )
    for row in dataset.iter_rows():
        yield _summary_from_json(row["summary"])


def _summary_json(summary: ShardSummary) -> str:
    return json.dumps({name: getattr(summary, name) for name in ShardSummary.__dataclass_fields__})


def _summary_from_json(text: str) -> ShardSummary:
    values = json.loads(text)
    groups = tuple((int(rows), int(ok)) for rows, ok in values.pop("row_groups"))
    return ShardSummary(row_groups=groups, **values)


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
    return [_summary_from_json(json.dumps(shard)) for shard in manifest["shards"]]
