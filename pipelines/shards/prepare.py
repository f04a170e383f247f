"""From a source to a data set: list, open the tars, plan, build what is missing, mark duplicates, write the
status and the manifest.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict

import pyarrow as pa

from pipelines.cluster.map_tasks import results
from pipelines.shards import archives
from pipelines.shards.build import ShardOptions, ShardTask, build_shard, build_shards, plan_shards
from pipelines.shards.parquet import Reason, Shard, write_manifest
from pipelines.shards.sources import Archive, Item, Sidecar, list_inputs
from pipelines.shards.status import status_of, summaries_of, write_status
from resshift import storage
from resshift.progress import Progress, shown

_MAX_DEPTH = 4  # tars in tars
_ARCHIVES_PER_TASK = 16


def with_tars_opened(found: Sequence[Item | Archive], root: str | None) -> list[Item]:
    """Return all single inputs of a listing; those in tars after the others.

    Args:
        found: Inputs that `list_inputs` yields.
        root: Root of the shards, where the index of the tars is kept for the next run; None keeps nothing.

    Raises:
        StorageError: A tar cannot be read.
    """
    items = [one for one in found if isinstance(one, Item)]
    tars = [one for one in found if isinstance(one, Archive)]
    if not tars:
        return items
    described = json.dumps([asdict(tar) for tar in tars])
    name = f"_index/{hashlib.sha256(described.encode()).hexdigest()[:16]}.jsonl.gz"
    if root is not None and storage.exists(storage.join(root, name)):
        return items + _read_index(storage.join(root, name))
    inside = _open(tars)
    if root is not None:
        lines = "".join(json.dumps(asdict(item)) + "\n" for item in inside)
        storage.write_bytes(storage.join(root, name), gzip.compress(lines.encode(), mtime=0))
    return items + inside


def _open(tars: Sequence[Archive]) -> list[Item]:
    items: list[Item] = []
    for _ in range(_MAX_DEPTH):
        if not tars:
            break
        parts = [tars[i : i + _ARCHIVES_PER_TASK] for i in range(0, len(tars), _ARCHIVES_PER_TASK)]
        tars = []
        with shown(Progress("tars", sum(map(len, parts)))) as progress:
            for part, found in zip(parts, results(_members, parts, in_order=True), strict=True):
                items += [one for one in found if isinstance(one, Item)]
                tars += [one for one in found if isinstance(one, Archive)]
                progress.add("ok", len(part))
    message = f"a tar in {_MAX_DEPTH} tars is not opened"
    return items + [
        Item(tar.key, tar.uri, tar.etag, tar.size_bytes, outcome=("failed", Reason.DAMAGED_ARCHIVE, message))
        for tar in tars
    ]


def _members(tars: Sequence[Archive]) -> list[Item | Archive]:
    return [one for tar in tars for one in archives.members(tar)]


def _read_index(uri: str) -> list[Item]:
    items: list[Item] = []
    for line in gzip.decompress(storage.read_bytes(uri)).splitlines():
        values = json.loads(line)
        sidecar = None if values["sidecar"] is None else Sidecar(**values["sidecar"])
        outcome = None if values["outcome"] is None else tuple(values["outcome"])
        items.append(Item(**values | {"sidecar": sidecar, "outcome": outcome}))
    return items


def prepare(
    tasks: Sequence[ShardTask], source: str, root: str, options: ShardOptions
) -> tuple[pa.Table, int]:
    """Build the planned shards that are missing, then write status and manifest.

    Returns:
        The status of every input, and how many shards were there already.
    """
    shards: list[Shard] = []
    with shown(Progress("pictures", sum(len(task.items) for task in tasks))) as progress:
        for shard in build_shards(tasks, root, options):
            shards.append(shard)
            if shard.reused:
                progress.before += shard.status.num_rows
            else:
                for status in shard.status["status"].to_pylist():
                    progress.add(status)
    return finish(shards, source, root), sum(shard.reused for shard in shards)


def prepare_here(source: str, root: str, options: ShardOptions | None = None) -> pa.Table:
    """Prepare a folder or prefix without tars in this process, without a cluster; for a few pictures.

    Returns:
        The status of every input.
    """
    options = options or ShardOptions()
    items = [one for one in list_inputs(source) if isinstance(one, Item)]
    return finish([build_shard(task, root, options) for task in plan_shards(items, options)], source, root)


def finish(shards: Sequence[Shard], source: str, root: str) -> pa.Table:
    """Mark duplicates, write the status of every input and then the manifest; return the status."""
    status = status_of(shards)
    write_status(root, status)
    write_manifest(root, source, summaries_of(shards, status))
    return status
