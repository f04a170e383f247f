"""The record of a bulk job: one row for every input, in append-only Parquet parts next to the outputs.

    DST/_resshift/job.json             options of the job
    DST/_resshift/ledger/part-*.parquet
    DST/_resshift/report.{html,json,csv}

A part is one atomic write, made after the outputs that it names: it is there whole or not at all, and what it
says is true. What is done is what the ledger says; a restart takes the listing minus the ledger. A later row
for a key replaces an earlier one, so retrying failures appends and nothing is ever changed.

Tables are read part by part; what is kept in memory of a ledger is 28 bytes a row (`Known`).
"""

from __future__ import annotations

import io
import json
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.command import UsageError
from pipelines.ledger.digests import DigestSet, OwnerMap, digests
from resshift import storage
from resshift.storage import StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

Status = Literal["ok", "failed", "skipped"]
DIRECTORY = "_resshift"
_READERS = 8
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("message", pa.string()),
        ("output", pa.string()),
        ("frames", pa.int32()),
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
        ("model_seconds", pa.float64()),
        ("attempts", pa.int32()),
        ("model", pa.string()),
        ("run", pa.string()),
        ("written_at", pa.float64()),
    ]
)


class JobMismatch(UsageError):
    """The destination belongs to a job with other options; the message names them."""


def row(key: str, etag: str, status: Status, **values: Any) -> dict[str, Any]:
    """Return a row with every column; unknown columns are an error."""
    unknown = values.keys() - set(SCHEMA.names)
    if unknown:
        raise KeyError(f"not columns of the ledger: {sorted(unknown)}")
    defaults = {field.name: "" if pa.types.is_string(field.type) else None for field in SCHEMA}
    return defaults | {"key": key, "etag": etag, "status": status} | values


def _parts_root(root: str) -> str:
    return storage.join(root, f"{DIRECTORY}/ledger")


def read_job(root: str, s3_options: S3Options = s3.DEFAULT) -> dict[str, Any] | None:
    """Return the options of the destination's job; None when it has none."""
    try:
        return json.loads(storage.read_bytes(storage.join(root, f"{DIRECTORY}/job.json"), options=s3_options))
    except StorageError as error:
        if error.reason is not StorageReason.MISSING:
            raise
        return None


def check_job(root: str, options: Mapping[str, Any], s3_options: S3Options = s3.DEFAULT) -> bool:
    """Return whether the destination has a job, which then has these options.

    Raises:
        JobMismatch: it belongs to another; a changed model or option must not mix with earlier outputs.
    """
    found = read_job(root, s3_options)
    if found is None:
        return False
    differing = [
        f"{name}: {found.get(name)!r} -> {options.get(name)!r}"
        for name in sorted(found.keys() | options.keys())
        if found.get(name) != options.get(name)
    ]
    if differing:
        raise JobMismatch(
            f"{root} holds the outputs of a job with other options: {'; '.join(differing)}. Use another DST, "
            "or the same options"
        )
    return True


def begin_job(root: str, options: Mapping[str, Any], s3_options: S3Options = s3.DEFAULT) -> None:
    """Write `job.json`, or check that the destination belongs to a job with the same options.

    Raises:
        JobMismatch: see `check_job`.
    """
    if not check_job(root, options, s3_options):
        text = json.dumps(dict(options), indent=2, sort_keys=True) + "\n"
        storage.write_bytes(
            storage.join(root, f"{DIRECTORY}/job.json"), text.encode(), s3_options, "application/json"
        )


def append(root: str, rows: Sequence[Mapping[str, Any]], s3_options: S3Options = s3.DEFAULT) -> None:
    """Write one part. Call it after the outputs of its rows are in place."""
    if not rows:
        return
    stamped = [dict(item) | {"written_at": time.time()} for item in rows]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(stamped, schema=SCHEMA), sink, compression="zstd")
    # Time first: parts sort in the order of writing. The random part keeps two writers apart.
    name = f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
    storage.write_bytes(storage.join(_parts_root(root), name), sink.getvalue(), s3_options)


def parts(
    root: str, columns: list[str] | None = None, s3_options: S3Options = s3.DEFAULT
) -> Iterator[pa.Table]:
    """Yield the parts in the order in which they were written, some read ahead; nothing when there is no
    ledger.

    Raises:
        StorageError: a part cannot be read.
    """

    def load(uri: str) -> pa.Table:
        return pq.read_table(
            io.BytesIO(storage.read_bytes(uri, options=s3_options)), columns=columns, schema=SCHEMA
        )

    uris = _part_uris(root, s3_options)
    with ThreadPoolExecutor(_READERS) as pool:
        for start in range(0, len(uris), 4 * _READERS):
            yield from pool.map(load, uris[start : start + 4 * _READERS])


def _part_uris(root: str, s3_options: S3Options) -> list[str]:
    try:
        entries = list(storage.list_entries(_parts_root(root), s3_options))
    except StorageError as error:
        if error.reason is StorageReason.MISSING:
            return []
        raise
    return [
        entry.uri for entry in sorted(entries, key=lambda entry: entry.key) if entry.key.endswith(".parquet")
    ]


def latest(root: str, s3_options: S3Options = s3.DEFAULT) -> Iterator[pa.Table]:
    """Yield the latest row of every key, part by part."""
    masks = _latest_masks(
        [digests(table["key"].to_pylist())[:, 0] for table in parts(root, ["key"], s3_options)]
    )
    for table, mask in zip(
        parts(root, None, s3_options), masks, strict=False
    ):  # parts that came meanwhile are left out
        yield table.filter(pa.array(mask))


def read(root: str, s3_options: S3Options = s3.DEFAULT) -> pa.Table:
    """Return the latest row of every key as one table, (rows, columns of SCHEMA); empty when there is no
    ledger.
    """
    return pa.concat_tables([SCHEMA.empty_table(), *latest(root, s3_options)])


def _latest_masks(keys: Sequence[NDArray[np.uint64]]) -> list[NDArray[np.bool_]]:
    """Return, for parts in order, which rows have no later row with the same key."""
    if not keys:
        return []
    backwards = np.concatenate(keys)[::-1]
    is_latest = np.zeros(len(backwards), dtype=bool)
    is_latest[np.unique(backwards, return_index=True)[1]] = True
    return np.split(is_latest[::-1], np.cumsum([len(part) for part in keys])[:-1])


@dataclass(frozen=True, slots=True)
class Known:
    """What a ledger says, as far as a restart needs it.

    Fields:
        done: digests of (key, etag) of inputs that need no more work.
        owners: output name -> key, of outputs that are in place.
        counts: of the latest rows by status.
    """

    done: DigestSet
    owners: OwnerMap
    counts: Counter[str]


def load_known(
    root: str, *, retry_failed: bool = False, again: Collection[str] = (), s3_options: S3Options = s3.DEFAULT
) -> Known:
    """Read what is done: everything that has a row, or, with `retry_failed`, everything that did not fail;
    without the keys in `again`.
    """
    redone = digests(sorted(again))[:, 0]
    columns = ["key", "etag", "status", "output"]
    known = Known(DigestSet(), OwnerMap(), Counter())
    tables: list[tuple[Any, ...]] = []
    for table in parts(root, columns, s3_options):
        keys, etags, statuses, outputs = (table[name].to_pylist() for name in columns)
        is_ok = np.array([status != "failed" for status in statuses], dtype=bool)
        tables.append(
            (
                digests(keys),
                digests(list(zip(keys, etags, strict=True))),
                is_ok,
                digests([output or "" for output in outputs]),
            )
        )
    masks = _latest_masks([part[0][:, 0] for part in tables])
    for mask, (keys, versions, is_ok, outputs) in zip(masks, tables, strict=True):
        known.owners.claim(outputs[mask & is_ok], keys[mask & is_ok])
        mask = mask & ~np.isin(keys[:, 0], redone)
        known.done.add(versions[mask & is_ok] if retry_failed else versions[mask])
        known.counts.update({"done": int((mask & is_ok).sum()), "failed": int((mask & ~is_ok).sum())})
    return known


def counts(rows: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """Count rows by status, and failures by reason ("failed: truncated")."""
    result: Counter[str] = Counter()
    for item in rows:
        result[item["status"]] += 1
        if item["status"] == "failed":
            result[f"failed: {item['reason']}"] += 1
    return result


def total_counts(root: str, s3_options: S3Options = s3.DEFAULT) -> Counter[str]:
    """Count the latest rows of a ledger as `counts` does."""
    return counts(
        row for table in latest(root, s3_options) for row in table.select(["status", "reason"]).to_pylist()
    )
