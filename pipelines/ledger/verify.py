"""Compare the outputs of a bulk job with its ledger: missing, corrupt, extra."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from pipelines.ledger import ledger
from pipelines.ledger.digests import DigestSet, digests
from pipelines.ledger.ledger import Row
from resshift import images, storage
from resshift.images import ImageError, ImageLimits
from resshift.images.animation import decode_frames
from resshift.storage import StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

_THREADS = 8
_BATCH = 1000


class Discrepancy(NamedTuple):
    """What is not as recorded.

    Fields:
        line: "missing: OUTPUT: ...", "unreadable: OUTPUT: ...", "corrupt: OUTPUT: ..." (sha256, size, or it
            does not decode), or "extra: FILE: ..." (no row names it).
        key: Name of the input whose output it is; None for a file that no row names.
    """

    line: str
    key: str | None


def verify(root: str, scale: float, options: S3Options = s3.DEFAULT) -> Iterator[Discrepancy]:
    """Re-read every output and yield what is not as recorded.

    Args:
        root: DST.
        scale: Sides of an output over sides of its input.
        options: How DST is reached.
    """
    named = DigestSet()
    with ThreadPoolExecutor(_THREADS) as pool:
        for table in ledger.latest(root, options):
            rows: list[Row] = [
                row
                for row in table.to_pylist()
                if row["status"] == "ok" or (row["status"] == "skipped" and row["output"])
            ]
            named.add(digests([row["output"] for row in rows]))
            for row, line in zip(
                rows, pool.map(lambda row: verify_row(row, root, scale, options), rows), strict=True
            ):
                if line is not None:
                    yield Discrepancy(line, row["key"])
    yield from _extra(root, named, options)


def verify_row(row: Row, root: str, scale: float, options: S3Options = s3.DEFAULT) -> str | None:
    """Re-read the output of a row: it decodes, and has the recorded sha256 and size, which is `scale` times
    the input's. Return what is wrong, None when nothing is.
    """
    output = row["output"]
    try:
        data = storage.read_bytes(storage.join(root, output), options=options)
        if row["sha256_out"] and hashlib.sha256(data).hexdigest() != row["sha256_out"]:
            return f"corrupt: {output}: sha256 differs from the ledger"
        picture = decode_frames(data, ImageLimits(max_pixels=2**31, max_side_px=2**31), "first").pictures[0]
    except StorageError as error:
        kind = "missing" if error.reason is StorageReason.MISSING else "unreadable"
        return f"{kind}: {output}: {error.detail}"
    except ImageError as error:
        return f"corrupt: {output}: {error}"
    found, recorded = (picture.width, picture.height), (row["width_out"], row["height_out"])
    if recorded[0] is not None and found != recorded:
        return f"corrupt: {output}: {found[0]}x{found[1]}, the ledger says {recorded[0]}x{recorded[1]}"
    if row["width_in"] is not None and row["height_in"] is not None:
        wanted = tuple(images.scaled(side, scale) for side in (row["width_in"], row["height_in"]))
        if recorded != wanted:
            return f"corrupt: {output}: {recorded[0]}x{recorded[1]} is not {scale:g} times the input"
    return None


def _extra(root: str, named: DigestSet, options: S3Options) -> Iterator[Discrepancy]:
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


def _unnamed(keys: list[str], named: DigestSet) -> Iterator[Discrepancy]:
    if keys:
        is_named = named.contains(digests(keys))
        yield from (
            Discrepancy(f"extra: {key}: no row names it", None)
            for key, known in zip(keys, is_named, strict=True)
            if not known
        )
