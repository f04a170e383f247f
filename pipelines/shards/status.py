"""The status of every input of a data set: exact duplicates, the entry of each shard in the manifest, and the
table a user sees at the end.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.table import Table

from pipelines.shards.parquet import Reason, Shard, ShardSummary
from resshift import storage

STATUS_FILE = "status.parquet"
_SHORT_SIDES = (64, 128, 256, 512, 1024, 2048)


def status_of(shards: Sequence[Shard]) -> pa.Table:
    """Return one row for every input of the data set, in the order of the shards, with exact duplicates
    marked.

    Of pictures with the same sha256 the one with the first key (in byte order) is used; the others are
    `skipped`.
    """
    table = pa.concat_tables([shard.status for shard in sorted(shards, key=lambda shard: shard.name)])
    good = table.filter(pc.field("status") == "ok")
    hashes = (
        good.group_by("sha256")
        .aggregate([("key", "min"), ("key", "count")])
        .filter(pc.field("key_count") > 1)
    )
    first = dict(zip(hashes["sha256"].to_pylist(), hashes["key_min"].to_pylist(), strict=True))
    columns = {name: table[name].to_pylist() for name in ("status", "reason", "message", "key", "sha256")}
    for i, sha256 in enumerate(columns["sha256"]):
        if sha256 in first and columns["status"][i] == "ok" and columns["key"][i] != first[sha256]:
            columns["status"][i], columns["reason"][i] = "skipped", str(Reason.DUPLICATE)
            columns["message"][i] = f"same bytes as {first[sha256]}"
    for name in ("status", "reason", "message"):
        table = table.set_column(
            table.schema.get_field_index(name), name, pa.array(columns[name], pa.string())
        )
    return table


def summaries_of(shards: Sequence[Shard], status: pa.Table) -> list[ShardSummary]:
    """Return the entry of each shard in the manifest.

    Args:
        shards: Shards as they were built.
        status: `status_of` them.
    """
    summaries: list[ShardSummary] = []
    start = 0
    for shard in sorted(shards, key=lambda shard: shard.name):
        part = status.slice(start, len(shard.status))
        start += len(part)
        i_groups, is_ok = part["row_group"].to_numpy(), part["status"].to_numpy() == "ok"
        first_rows = np.searchsorted(i_groups, i_groups)
        is_duplicate = part["reason"].to_numpy() == str(Reason.DUPLICATE)
        summaries.append(
            ShardSummary(
                name=shard.name,
                fingerprint=shard.fingerprint,
                row_groups=tuple(
                    zip(
                        np.bincount(i_groups).tolist(),
                        np.bincount(i_groups, is_ok).astype(int).tolist(),
                        strict=True,
                    )
                ),
                size_bytes=shard.size_bytes,
                reasons=dict(Counter(reason for reason in part["reason"].to_pylist() if reason)),
                duplicates=tuple(
                    (int(i_groups[i]), int(i - first_rows[i])) for i in np.flatnonzero(is_duplicate)
                ),
                spans=shard.spans,
            )
        )
    return summaries


def write_status(root: str, status: pa.Table) -> None:
    """Write `status.parquet`."""
    sink = io.BytesIO()
    pq.write_table(status, sink, compression="zstd")
    storage.write_bytes(storage.join(root, STATUS_FILE), sink.getvalue())


def report(status: pa.Table) -> list[Table]:
    """Return the tables of a summary: outcomes; short sides and modes of the pictures to use; what was odd
    about them.
    """
    outcomes = _table("status", "reason", "inputs", "MB")
    counts = (
        status.group_by(["status", "reason"]).aggregate([("key", "count"), ("size_bytes", "sum")]).to_pylist()
    )
    rank = {"ok": 0, "skipped": 1, "failed": 2}
    for row in sorted(counts, key=lambda row: (rank[row["status"]], -row["key_count"], row["reason"])):
        outcomes.add_row(
            row["status"], row["reason"], str(row["key_count"]), f"{(row['size_bytes_sum'] or 0) / 1e6:.1f}"
        )

    good = status.filter(pc.field("status") == "ok")
    sides = np.minimum(good["width"].to_numpy(), good["height"].to_numpy())
    shapes = _table("short side", "pictures", "mode", "pictures")
    bins = np.digitize(sides, _SHORT_SIDES)
    names = [
        f"< {_SHORT_SIDES[0]}",
        *(f"{a} to {b - 1}" for a, b in pairwise(_SHORT_SIDES)),
        f">= {_SHORT_SIDES[-1]}",
    ]
    by_side = [
        (names[i], str(count)) for i, count in enumerate(np.bincount(bins, minlength=len(names))) if count
    ]
    by_mode = [(mode, str(count)) for mode, count in Counter(good["mode"].to_pylist()).most_common()]
    for i in range(max(len(by_side), len(by_mode))):
        left, right = (column[i] if i < len(column) else ("", "") for column in (by_side, by_mode))
        shapes.add_row(*left, *right)

    odd = _table("odd, but used", "pictures")
    notes = Counter(
        note
        for message in good["message"].to_pylist()
        for note in message.split("; ")
        if note and not note.startswith("was ")
    )
    for note, count in notes.most_common(20):
        odd.add_row(note, str(count))
    return [table for table in (outcomes, shapes, odd) if table.row_count]


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in ("inputs", "pictures", "MB") else "left")
    return table
