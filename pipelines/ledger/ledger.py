"""The record of a bulk job: one row for every input, in append-only Parquet parts next to the outputs.

    DST/_resshift/job.json             options of the job
    DST/_resshift/ledger/part-*.parquet
    DST/_resshift/report.{html,json,csv}

A part is one atomic write, made after the outputs that it names: it exists whole or not at all, and what it
says is true. Work is done when the ledger says so; a restart takes the listing minus the ledger. A later row
for a key replaces an earlier one, so retrying failures only appends, and nothing is ever changed.

Tables are read part by part. What a run keeps in memory of a ledger is 28 bytes a row (`Known`); `latest`
keeps 16 bytes of a row that repeats a key, and a bit array of at most 256 MiB.
"""

from __future__ import annotations

import asyncio
import functools
import io
import json
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias, TypedDict, cast, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.command import UsageError
from pipelines.ledger.digests import DigestSet, OwnerMap, Repeats, digests
from resshift import storage
from resshift.output_names import RECORDS
from resshift.storage import Entry, StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

pc: Any = pyarrow.compute  # makes its functions when it is imported: type checkers know none of them
Status = Literal["ok", "failed", "skipped"]
DIRECTORY = RECORDS
_READERS = 8
_MAX_PART_ROWS = 50_000
_FOOTER_BYTES = 64 << 10  # a schema and the statistics of some row groups
_READ_WHOLE = 16  # parts of a ledger that is not looked into first
_Text = Annotated[str, pa.string()]
_Int32 = Annotated[int | None, pa.int32()]
_Int64 = Annotated[int | None, pa.int64()]
_Float64 = Annotated[float | None, pa.float64()]


class Row(TypedDict):
    """What became of one input. `SCHEMA` has the same columns in the same order.

    A text that is not known is "", a number that is not known is None. A row that is read from a part written
    before a column existed has None there.

    Fields:
        key: Name of the input relative to SRC, printable.
        etag: Version of the input, as its store names it.
        size: Bytes of the input according to the listing.
        status: Whether an output was written, could not be, or was left as it was.
        reason: One word of a closed vocabulary for a status other than "ok".
        message: What happened, for people.
        output: Name of the output relative to DST.
        frames: Number of frames or pages that were upscaled.
        width_in, height_in: Size of the input in pixels, after its orientation was applied.
        width_out, height_out: Size of the output in pixels.
        bytes_in, bytes_out: Bytes read and written.
        sha256_in, sha256_out: Hexadecimal digests of those bytes.
        notes: What was changed on the way (profile, orientation, frames), separated by "; ".
        seconds: Work on this input in all stages, without waiting between them.
        model_seconds: The part of it in the model.
        attempts: How often work on the input began in this run.
        model: Identity of the model.
        run: Id of the run that wrote the row.
        written_at: Unix time at which the part was written.
    """

    key: _Text
    etag: _Text
    size: _Int64
    status: Annotated[Status, pa.string()]
    reason: _Text
    message: _Text
    output: _Text
    frames: _Int32
    width_in: _Int32
    height_in: _Int32
    width_out: _Int32
    height_out: _Int32
    bytes_in: _Int64
    bytes_out: _Int64
    sha256_in: _Text
    sha256_out: _Text
    notes: _Text
    seconds: _Float64
    model_seconds: _Float64
    attempts: _Int32
    model: _Text
    run: _Text
    written_at: _Float64


SCHEMA = pa.schema(
    [(name, hint.__metadata__[0]) for name, hint in get_type_hints(Row, include_extras=True).items()]
)


_BLANK = cast(Row, {field.name: "" if pa.types.is_string(field.type) else None for field in SCHEMA})


class JobMismatch(UsageError):
    """The destination belongs to a job with other options; the message names them."""


def row(key: str, etag: str, status: Status, **values: Any) -> Row:
    """Return a row with every column.

    Raises:
        KeyError: A value belongs to no column of the ledger.
    """
    if unknown := values.keys() - _BLANK.keys():
        raise KeyError(f"not columns of the ledger: {sorted(unknown)}")
    return cast(Row, {**_BLANK, "key": key, "etag": etag, "status": status, **values})


def failed(row: Row, reason: str, message: str) -> Row:
    """Return the row of an input that has no output."""
    return {**row, "status": "failed", "reason": reason, "message": message}


def skipped(row: Row, reason: str, message: str) -> Row:
    """Return the row of an input that needs no output."""
    return {**row, "status": "skipped", "reason": reason, "message": message}


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
    """Return whether the destination has a job, which then has these options. A model may be given by another
    address if its identity is the same.

    Raises:
        JobMismatch: It belongs to another job; outputs of other options must not mix with earlier ones.
    """
    found = read_job(root, s3_options)
    if found is None:
        return False
    same_model = bool(found.get("identity")) and found.get("identity") == options.get("identity")
    differing = [
        f"{name}: {found.get(name)!r} -> {options.get(name)!r}"
        for name in sorted(found.keys() | options.keys())
        if found.get(name) != options.get(name) and not (same_model and name == "model")
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
        JobMismatch: See `check_job`.
    """
    if not check_job(root, options, s3_options):
        text = json.dumps(dict(options), indent=2, sort_keys=True) + "\n"
        storage.write_bytes(
            storage.join(root, f"{DIRECTORY}/job.json"), text.encode(), s3_options, "application/json"
        )


def append(root: str, rows: Sequence[Row], s3_options: S3Options = s3.DEFAULT) -> None:
    """Write one part. Call it after the outputs of its rows are in place."""
    if not rows:
        return
    now = time.time()
    stamped = [{**one, "written_at": now} for one in rows]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(stamped, schema=SCHEMA), sink, compression="zstd")
    # Time first: parts sort in the order of writing. The random part keeps two writers apart.
    name = f"part-{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.parquet"
    storage.write_bytes(storage.join(_parts_root(root), name), sink.getvalue(), s3_options)


class LedgerWriter:
    """Collects rows and writes them in parts, in a thread of its own: a slow store must not hold up the loop.

    A part is full with 100 rows or 1 % of what this run has written, at most 50,000, and is kept no longer
    than 10 s (2 minutes in a long run): little is repeated after a crash, ten million rows make about a
    thousand parts, and each covers few keys.

    Args:
        write: Function that writes a part and returns when it is in place.
    """

    def __init__(self, write: Callable[[Sequence[Row]], None]) -> None:
        self._write = write
        self._rows: list[Row] = []
        self._num_written = 0
        self._started = self._last = time.monotonic()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="ledger")
        self._parts: list[asyncio.Future[None]] = []

    def add(self, rows: Iterable[Row]) -> None:
        """Take rows whose outputs are in place; called in the loop."""
        self._rows.extend(rows)
        self.flush_if_due()

    def flush_if_due(self) -> None:
        """Write a part when it is full or old enough.

        Raises:
            StorageError: An earlier part could not be written.
        """
        now = time.monotonic()
        patience = min(120.0, max(10.0, (now - self._started) / 100))
        if len(self._rows) >= min(_MAX_PART_ROWS, max(100, self._num_written // 100)) or (
            self._rows and now - self._last > patience
        ):
            self.flush()

    def flush(self) -> None:
        """Write what there is, if there is anything.

        Raises:
            StorageError: An earlier part could not be written.
        """
        for part in self._parts:
            if part.done():
                part.result()  # before anything changes: who closes the writer is told as well
        if not self._rows:
            return
        rows, self._rows, self._last = self._rows, [], time.monotonic()
        self._num_written += len(rows)
        self._parts = [part for part in self._parts if not part.done()]
        self._parts.append(asyncio.get_running_loop().run_in_executor(self._pool, self._write, rows))

    def close(self) -> None:
        """Write what is left and wait for all parts; this blocks.

        Raises:
            StorageError: A part could not be written.
        """
        rows, self._rows = self._rows, []
        last = self._pool.submit(self._write, rows)
        self._pool.shutdown(wait=True)
        for part in self._parts:
            if part.done() and not part.cancelled():
                part.result()
        last.result()


def parts(
    root: str, columns: list[str] | None = None, s3_options: S3Options = s3.DEFAULT
) -> Iterator[pa.Table]:
    """Yield the parts in the order in which they were written, some read ahead; nothing when there is no
    ledger.

    Raises:
        StorageError: A part cannot be read.
    """
    yield from _tables(_part_entries(root, s3_options), columns, s3_options)


def _tables(entries: Sequence[Entry], columns: list[str] | None, s3_options: S3Options) -> Iterator[pa.Table]:
    def load(entry: Entry) -> pa.Table:
        data = storage.read_bytes(entry.uri, options=s3_options)
        return pq.read_table(io.BytesIO(data), columns=columns, schema=SCHEMA)

    with ThreadPoolExecutor(_READERS) as pool:
        ahead: deque[Future[pa.Table]] = deque()
        for entry in entries:
            ahead.append(pool.submit(load, entry))
            if len(ahead) == _READERS:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _part_entries(root: str, s3_options: S3Options) -> list[Entry]:
    try:
        entries = list(storage.list_entries(_parts_root(root), s3_options))
    except StorageError as error:
        if error.reason is StorageReason.MISSING:
            return []
        raise
    return [entry for entry in sorted(entries, key=lambda entry: entry.key) if entry.key.endswith(".parquet")]


# Keys from the first text to before the second; None: to the end.
Interval: TypeAlias = tuple[str, str | None]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a ledger, and what its statistics say of its keys.

    Fields:
        entry: Where it is.
        first, last: The smallest and the largest key in it; "" and None where that is not known.
        num_rows: Number of its rows; 0 where that is not known.
    """

    entry: Entry
    first: str = ""
    last: str | None = None
    num_rows: int = 0

    def overlaps(self, interval: Interval) -> bool:
        """Return whether it may have keys of an interval."""
        start, stop = interval
        return (self.last is None or start <= self.last) and (stop is None or self.first < stop)


def look_into_parts(root: str, s3_options: S3Options = s3.DEFAULT, seen: Iterable[Part] = ()) -> list[Part]:
    """Return the parts of a ledger in the order of writing. Of a ledger of many parts the ends are read: they
    say what keys are in them, and rows of a range of keys are then found without reading all others.

    Args:
        root: DST.
        s3_options: How DST is reached.
        seen: What an earlier call returned; these parts are not read again.
    """
    entries = _part_entries(root, s3_options)
    known = {part.entry.key: part for part in seen if part.num_rows}
    if len(entries) <= _READ_WHOLE:
        return [Part(entry) for entry in entries]

    def look(entry: Entry) -> Part:
        if entry.key in known:
            return known[entry.key]
        size = min(_FOOTER_BYTES, entry.size_bytes)
        end = storage.read_range(entry.uri, -size, size, s3_options)
        try:
            metadata = pq.read_metadata(pa.BufferReader(end))
        except pa.ArrowInvalid:  # the footer is longer
            return Part(entry)
        column = metadata.schema.to_arrow_schema().get_field_index("key")
        groups = [metadata.row_group(i).column(column).statistics for i in range(metadata.num_row_groups)]
        if not groups or not all(group is not None and group.has_min_max for group in groups):
            return Part(entry, num_rows=metadata.num_rows)
        first, last = min(group.min for group in groups), max(group.max for group in groups)
        return Part(entry, first, last, metadata.num_rows)

    with ThreadPoolExecutor(2 * _READERS) as pool:
        return list(pool.map(look, entries))


def latest(
    root: str, s3_options: S3Options = s3.DEFAULT, columns: list[str] | None = None
) -> Iterator[pa.Table]:
    """Yield the latest row of every key, part by part, in the order of writing.

    Every part is read twice. Memory does not grow with the number of keys, only with that of repeated ones.

    Args:
        root: DST.
        s3_options: How DST is reached.
        columns: Columns of `SCHEMA` that are read, "key" among them; all of them by default.
    """
    entries = _part_entries(root, s3_options)  # parts that come meanwhile are left out
    num_bytes = sum(entry.size_bytes for entry in entries)
    # A row takes some hundred bytes of a part: this makes a dozen bits a row or more, up to 256 MiB.
    log2_bits = min(31, max(16, (num_bytes // 8).bit_length()))
    keys = (_short_digests(table) for table in _tables(entries, ["key"], s3_options))
    repeats = Repeats.among(keys, log2_bits)
    start = 0
    for table in _tables(entries, columns, s3_options):
        yield table.filter(pa.array(repeats.is_last(_short_digests(table), start)))
        start += table.num_rows


def _short_digests(table: pa.Table) -> NDArray[np.uint64]:
    return digests(table["key"].to_pylist())[:, 0]


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
        done: Digests of (key, etag) of inputs that need no more work.
        owners: Map from the names of outputs that are in place to their keys.
        counts: Number of the latest rows that are done, and that failed.
    """

    done: DigestSet
    owners: OwnerMap
    counts: Counter[str]


def load_known(
    root: str,
    *,
    retry_failed: bool = False,
    again: Collection[str] = (),
    s3_options: S3Options = s3.DEFAULT,
    of_parts: Sequence[Part] | None = None,
    within: Sequence[Interval] = (("", None),),
) -> Known:
    """Read which inputs are done: all that have a row, or, with `retry_failed`, all that did not fail; never
    those in `again`.

    Args:
        root: DST.
        retry_failed, again: See above.
        s3_options: How DST is reached.
        of_parts: The parts that there are; None: they are listed.
        within: Keys that are asked for; of others nothing need be known.
    """
    redone = digests(sorted(again))[:, 0]
    columns = ["key", "etag", "status", "output"]
    known = Known(DigestSet(), OwnerMap(), Counter())
    tables: list[tuple[Any, ...]] = []
    found = [Part(entry) for entry in _part_entries(root, s3_options)] if of_parts is None else of_parts
    wanted = [part.entry for part in found if any(part.overlaps(interval) for interval in within)]
    for table in _tables(wanted, columns, s3_options):
        if not all(interval == ("", None) for interval in within):
            table = table.filter(_is_within(table["key"], within))
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


def _is_within(keys: pa.ChunkedArray, intervals: Sequence[Interval]) -> pa.ChunkedArray:
    """Return which keys lie in one of the intervals."""
    masks: list[Any] = []
    for start, stop in intervals:
        mask = pc.greater_equal(keys, start)
        masks.append(mask if stop is None else pc.and_(mask, pc.less(keys, stop)))
    return functools.reduce(pc.or_, masks)


def some_failures(root: str, s3_options: S3Options = s3.DEFAULT, most: int = 10) -> list[str]:
    """Return lines that name inputs that failed, at most `most`, and one that says if there are more."""
    lines: list[str] = []
    for table in latest(root, s3_options, ["key", "status", "reason", "message"]):
        for row in table.filter(pc.field("status") == "failed").to_pylist():
            if len(lines) == most:
                return [*lines, "more are in the report"]
            told = (row["message"] or "").splitlines()
            lines.append(f"failed: {row['key']}: {row['reason']}" + (f": {told[-1][:200]}" if told else ""))
    return lines


def total_counts(root: str, s3_options: S3Options = s3.DEFAULT) -> Counter[str]:
    """Count the latest rows of a ledger by status, and failures by reason ("failed: truncated")."""
    result: Counter[str] = Counter()
    for table in latest(root, s3_options, ["key", "status", "reason"]):
        groups = table.group_by(["status", "reason"], use_threads=False).aggregate([([], "count_all")])
        for group in groups.to_pylist():
            result[group["status"]] += group["count_all"]
            if group["status"] == "failed":
                result[f"failed: {group['reason']}"] += group["count_all"]
    return result
