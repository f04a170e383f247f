"""Photos -> Parquet shards of their original bytes, with a status for every input.

A shard is the unit of work: its file carries the fingerprint of what went into it and is written in one piece, so that a re-run does only
what is missing. The format is that of `pipelines.shards`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines import shards
from pipelines.shards import SCHEMA, ShardSummary
from resshift import seeds, storage
from resshift.images import ImageError, ImageLimits, decode, probe
from resshift.storage import Entry, StorageError


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """How a data set is cut. `min_side_px` refuses smaller pictures; `row_group_rows` is the unit of random access."""

    shard_bytes: int = 128 << 20
    row_group_rows: int = 16
    min_side_px: int = 32
    max_pixels: int = 100_000_000


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The inputs of one shard, in order."""

    name: str
    keys: tuple[str, ...]
    uris: tuple[str, ...]
    fingerprint: str


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
    inputs = [(e.key, e.etag) for e in entries]
    described = json.dumps([shards.FORMAT, options.row_group_rows, options.min_side_px, options.max_pixels, inputs])
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
    existing = shards.existing_summary(uri, task.fingerprint)
    if existing is not None:
        return existing
    rows = [row_of(key, item, options) for key, item in zip(task.keys, task.uris, strict=True)]
    return shards.write_rows(uri, task.name, task.fingerprint, rows, options.row_group_rows)


def write_shards(tasks: list[ShardTask], root: str, options: ShardOptions) -> Iterator[ShardSummary]:
    """Build all shards with Ray Data and yield the summary of each as it is done."""
    import ray.data

    items = [{"task": i} for i in range(len(tasks))]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        lambda row: {"i": row["task"], "summary": shards.summary_to_json(write_shard(tasks[row["task"]], root, options))}
    )
    for row in dataset.iter_rows():
        yield shards.summary_from_json(row["summary"])
