"""Compare the outputs of a bulk job with its ledger: missing, corrupt, extra."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pipelines.bulk.stages import verify_row
from pipelines.ledger import ledger
from pipelines.ledger.digests import DigestSet, digests
from resshift import storage
from resshift.storage import StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

_THREADS = 8
_BATCH = 1000


class Problem(NamedTuple):
    """What is not as recorded.

    Fields:
        line: "missing: OUTPUT: ...", "unreadable: OUTPUT: ...", "corrupt: OUTPUT: ..." (sha256, size, or it
            does not decode), or "extra: FILE: ..." (no row names it).
        key: of the input whose output it is; None for what no row names.
    """

    line: str
    key: str | None


def verify(root: str, scale: float, options: S3Options = s3.DEFAULT) -> Iterator[Problem]:
    """Re-read every output and yield what is not as recorded.

    Args:
        root: DST.
        scale: sides of an output over sides of its input.
        options: how DST is reached.
    """
    named = DigestSet()
    with ThreadPoolExecutor(_THREADS) as pool:
        for table in ledger.latest(root, options):
            rows = [
                row
                for row in table.to_pylist()
                if row["status"] == "ok" or (row["status"] == "skipped" and row["output"])
            ]
            named.add(digests([row["output"] for row in rows]))
            for row, problem in zip(
                rows, pool.map(lambda row: verify_row(row, root, options), rows), strict=True
            ):
                if problem is not None:
                    yield Problem(problem, row["key"])
                elif row["width_in"] is not None:
                    wanted = tuple(max(1, round(row[side] * scale)) for side in ("width_in", "height_in"))
                    if (row["width_out"], row["height_out"]) != wanted:
                        size = f"{row['width_out']}x{row['height_out']}"
                        yield Problem(
                            f"corrupt: {row['output']}: {size} is not {scale:g} times the input", row["key"]
                        )
    yield from _extra(root, named, options)


def _extra(root: str, named: DigestSet, options: S3Options) -> Iterator[Problem]:
    keys: list[str] = []
    try:
        for entry in storage.list_entries(root, options):
            if entry.key.split("/", 1)[0] != ledger.DIRECTORY:
                keys.append(storage.printable(entry.key))
            if len(keys) == _BATCH:
                yield from _unnamed(keys, named)
                keys = []
    except StorageError as error:
        if error.reason is not StorageReason.MISSING:
            raise
    yield from _unnamed(keys, named)


def _unnamed(keys: list[str], named: DigestSet) -> Iterator[Problem]:
    if keys:
        is_named = named.contains(digests(keys))
        yield from (
            Problem(f"extra: {key}: no row names it", None)
            for key, known in zip(keys, is_named, strict=True)
            if not known
        )
