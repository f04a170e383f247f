"""The record of a bulk job: one row for every input, in append-only Parquet parts next to the outputs.

    DST/_resshift/job.json             options of the job and their fingerprint
    DST/_resshift/ledger/part-*.parquet

A part is written in one piece, after the outputs that it names. What is done is what the ledger says: a restart takes the listing minus the
ledger. A later row for a key replaces an earlier one, so retrying failures appends.
"""

from __future__ import annotations

import io
import json
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from resshift import storage
from resshift.storage import StorageError, StorageReason

Status = Literal["ok", "failed", "skipped"]
DIRECTORY = "_resshift"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("etag", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("output", pa.string()),
        ("width_in", pa.int32()),
        ("height_in", pa.int32()),
        ("width_out", pa.int32()),
        ("height_out", pa.int32()),
        ("bytes_in", pa.int64()),
        ("bytes_out", pa.int64()),
        ("sha256_in", pa.string()),
        ("sha256_out", pa.string()),
        ("notes", pa.string()),
        ("seconds", pa.float64()),
        ("model", pa.string()),
        ("written_at", pa.float64()),
    ]
)


class JobMismatch(ValueError):
    """The destination belongs to a job with other options; the message names them."""


def row(key: str, etag: str, status: Status, **values: Any) -> dict[str, Any]:  # noqa: ANN401 - column values
    """Return a row with every column; unknown columns are an error."""
    unknown = values.keys() - set(SCHEMA.names)
    if unknown:
        raise KeyError(f"not columns of the ledger: {sorted(unknown)}")
    defaults = {field.name: "" if pa.types.is_string(field.type) else None for field in SCHEMA}
    return defaults | {"key": key, "etag": etag, "status": status} | values


def _parts_root(root: str) -> str:
    return storage.join(root, f"{DIRECTORY}/ledger")


def begin_job(root: str, options: Mapping[str, Any]) -> None:
    """Write `job.json`, or check that the destination belongs to a job with the same options.

    Raises:
        JobMismatch: it belongs to another; a changed model or option must not mix with earlier outputs.
    """
    uri = storage.join(root, f"{DIRECTORY}/job.json")
    try:
        found = json.loads(storage.read_bytes(uri))
    except StorageError as error:
        if error.reason is not StorageReason.MISSING:
            raise
        storage.write_bytes(uri, (json.dumps(dict(options), indent=2, sort_keys=True) + "\n").encode())
        return
    differing = [
        f"{name}: {found.get(name)!r} -> {options.get(name)!r}"
        for name in sorted(found.keys() | options.keys())
        if found.get(name) != options.get(name)
    ]
    if differing:
        raise JobMismatch(
            f"{root} holds the outputs of a job with other options: {'; '.join(differing)}. Use another DST, or the same options"
        )


def append(root: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one part. Call it after the outputs of its rows are in place."""
    if not rows:
        return
    stamped = [dict(item) | {"written_at": time.time()} for item in rows]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(stamped, schema=SCHEMA), sink, compression="zstd")
    # Time first: parts sort in the order of writing. The random part keeps two writers apart.
    name = f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
    storage.write_bytes(storage.join(_parts_root(root), name), sink.getvalue())


def read(root: str) -> pa.Table:
    """Return the latest row of every key, (rows, columns of SCHEMA); empty when there is no ledger.

    Raises:
        StorageError: a part cannot be read.
    """
    latest: dict[str, dict[str, Any]] = {}
    for part in _part_uris(root):
        for item in pq.read_table(io.BytesIO(storage.read_bytes(part)), schema=SCHEMA).to_pylist():
            latest[item["key"]] = item
    return pa.Table.from_pylist(list(latest.values()), schema=SCHEMA)


def _part_uris(root: str) -> list[str]:
    try:
        entries = list(storage.list_entries(_parts_root(root)))
    except StorageError as error:
        if error.reason is StorageReason.MISSING:
            return []
        raise
    return [entry.uri for entry in sorted(entries, key=lambda entry: entry.key) if entry.key.endswith(".parquet")]


def done_keys(table: pa.Table, *, retry_failed: bool) -> dict[str, str]:
    """Return {key: etag} of inputs that need no more work: all that have a row, or without the failed ones when these are to be retried."""
    columns = (table[name].to_pylist() for name in ("key", "etag", "status"))
    return {key: etag for key, etag, status in zip(*columns, strict=True) if status == "ok" or not retry_failed}


def written_outputs(table: pa.Table) -> dict[str, str]:
    """Return {output: key} of the inputs whose output is in place."""
    columns = (table[name].to_pylist() for name in ("key", "output", "status"))
    return {output: key for key, output, status in zip(*columns, strict=True) if status == "ok"}


def counts(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Count rows by status, and failures by reason ("failed: truncated")."""
    result: Counter[str] = Counter()
    for item in rows:
        result[item["status"]] += 1
        if item["status"] == "failed":
            result[f"failed: {item['reason']}"] += 1
    return result
