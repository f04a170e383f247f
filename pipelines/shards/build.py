"""Photos -> Parquet shards of their bytes, with a status for every input.

A shard is the unit of work: its file carries the fingerprint of what went into it and is written in one
piece, so that a re-run does only what is missing; rows that failed because a store was away are tried again.
The format is that of `pipelines.shards.parquet`.

Pictures are judged by their content, never by their name. What ImageNet is known for (CMYK, PNG in a .JPEG,
damaged EXIF, grey) is decoded as training will decode it, kept, and named in the row.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import cv2

from pipelines.cluster.map_tasks import results
from pipelines.shards import parquet, sources
from pipelines.shards.parquet import SCHEMA, Reason, Shard
from pipelines.shards.sources import Item
from resshift import seeds, storage
from resshift.devices import use_one_thread
from resshift.images import ImageError, ImageLimits, Picture, decode, encode, fit_format, probe
from resshift.images.icc import to_srgb
from resshift.storage import StorageError, StorageReason

_READERS = 8  # requests to a bucket at a time
_NAMES = {
    "JPEG": ("jpg", "jpeg", "jpe"),
    "PNG": ("png",),
    "WEBP": ("webp",),
    "TIFF": ("tif", "tiff"),
    "GIF": ("gif",),
    "BMP": ("bmp",),
    "HEIF": ("heic", "heif", "hif"),
    "AVIF": ("avif",),
    "JXL": ("jxl",),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """How a data set is cut and which pictures it takes.

    Fields:
        shard_bytes: Number of bytes of inputs in a shard.
        row_group_rows, row_group_bytes: Limits of a row group, the unit of random access; it ends at the
            first of the two.
        min_side_px: Shortest side; smaller pictures are skipped.
        short_side_px: Short side to which larger pictures are shrunk: to this short side and encoded again
            (JPEG, quality 95, 4:4:4); None keeps all bytes.
        max_pixels: Largest number of pixels; larger pictures are refused.
    """

    shard_bytes: int = 128 << 20
    row_group_rows: int = 16
    row_group_bytes: int = 4 << 20
    min_side_px: int = 32
    short_side_px: int | None = None
    max_pixels: int = 100_000_000

    def __post_init__(self) -> None:
        for name in ("shard_bytes", "row_group_rows", "row_group_bytes", "min_side_px", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.short_side_px is not None and self.short_side_px < self.min_side_px:
            raise ValueError(
                f"short_side_px must be at least min_side_px ({self.min_side_px}), got {self.short_side_px}"
            )


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The inputs of one shard, in order."""

    name: str
    items: tuple[Item, ...]
    fingerprint: str


def plan_shards(items: Iterable[Item], options: ShardOptions) -> list[ShardTask]:
    """Cut the inputs into shards of about `shard_bytes`.

    The order is a hash of the key: neighbours in a shard are then not of one class or one camera, and
    training needs no global shuffle. Inputs without a picture come last, so that the others stand as they
    would without them. Of equal keys the first is taken.
    """
    ordered = sorted(
        _named_once(items),
        key=lambda item: (item.outcome is not None, seeds.derive("shard order", storage.printable(item.key))),
    )
    tasks: list[ShardTask] = []
    part: list[Item] = []
    size_bytes = 0
    for item in ordered:
        size = item.size_bytes if item.outcome is None else 0
        if part and size_bytes + size > options.shard_bytes:
            tasks.append(_task(len(tasks), part, options))
            part, size_bytes = [], 0
        part.append(item)
        size_bytes += size
    if part:
        tasks.append(_task(len(tasks), part, options))
    return tasks


def _named_once(items: Iterable[Item]) -> Iterator[Item]:
    seen: set[str] = set()
    for item in items:
        if storage.printable(item.key) in seen:
            yield replace(item, outcome=("failed", str(Reason.DUPLICATE_KEY), "another input has this key"))
        else:
            seen.add(storage.printable(item.key))
            yield item


def _task(i_shard: int, items: list[Item], options: ShardOptions) -> ShardTask:
    described = json.dumps(
        [parquet.FORMAT, asdict(options), [asdict(replace(item, uri="")) for item in items]]
    )
    digest = hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return ShardTask(f"shard-{i_shard:05d}.parquet", tuple(items), digest)


def row_of(item: Item, data: bytes | StorageError, label: str, options: ShardOptions) -> dict[str, Any]:
    """Check one picture and return its row; any fault becomes its status, reason and message.

    Args:
        item: Input.
        data: Its bytes, or the reason why they could not be read.
        label: Label of the picture.
        options: Options of the data set.
    """
    row: dict[str, Any] = dict.fromkeys(SCHEMA.names) | {
        "key": storage.printable(item.key),
        "label": label,
        "reason": "",
        "message": "",
    }
    if item.outcome is not None:
        return row | dict(zip(("status", "reason", "message"), item.outcome, strict=True))
    limits = ImageLimits(max_pixels=options.max_pixels)
    try:
        if isinstance(data, StorageError):
            raise data
        row |= {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        with warnings.catch_warnings(record=True) as caught:  # Pillow warns of damaged EXIF and the like
            warnings.simplefilter("always")
            header = probe(data, limits)
            row |= {"width": header.width, "height": header.height, "mode": header.mode}
            if min(header.width, header.height) < options.min_side_px:
                message = (
                    f"{header.width}x{header.height}: both sides must have at least {options.min_side_px} "
                    "pixels"
                )
                return row | {"status": "skipped", "reason": str(Reason.TOO_SMALL), "message": message}
            picture = decode(data, limits)  # what training would meet later
        notes = [*_misnamed(item.key, picture.format), *picture.notes]
        notes += dict.fromkeys(" ".join(str(warning.message).split()) for warning in caught)
        if options.short_side_px is not None and min(picture.width, picture.height) > options.short_side_px:
            notes.append(f"was {header.width}x{header.height} {header.mode} {header.format}")
            data, picture = shrunk(picture, options.short_side_px)
            mode = "L" if picture.pixels.shape[2] == 1 else "RGB"
            row |= {"width": picture.width, "height": picture.height, "mode": mode, "size_bytes": len(data)}
    except (ImageError, StorageError) as error:
        return row | {"status": "failed", "reason": str(error.reason), "message": str(error)}
    return row | {"bytes": data, "status": "ok", "message": "; ".join(notes)}


def _misnamed(key: str, format: str) -> Iterator[str]:
    extension = posixpath.splitext(key)[1].lstrip(".").lower()
    if extension not in _NAMES[format] and any(extension in names for names in _NAMES.values()):
        yield f"{format} in a file named .{extension}"


def shrunk(picture: Picture, short_side_px: int) -> tuple[bytes, Picture]:
    """Shrink a picture by area averaging to a short side, and encode it as JPEG (quality 95, 4:4:4, no
    metadata); 8 bit, on white.
    """
    flat = fit_format(picture, "jpeg")
    ratio = short_side_px / min(flat.width, flat.height)
    size = (max(short_side_px, round(flat.width * ratio)), max(short_side_px, round(flat.height * ratio)))
    pixels = cv2.resize(to_srgb(flat.pixels, flat.icc), size, interpolation=cv2.INTER_AREA).reshape(
        size[1], size[0], -1
    )
    small = Picture(pixels=pixels, format="JPEG")
    return encode(small, "jpeg", 95), small


def build_shard(task: ShardTask, root: str, options: ShardOptions) -> Shard:
    """Build a shard and write it in one piece; of one that is there already, only what was unavailable is
    tried again.
    """
    use_one_thread()  # Ray gives a task one CPU
    existing = parquet.existing_shard(root, task.name, task.fingerprint)
    if existing is not None and str(StorageReason.UNAVAILABLE) not in existing.status["reason"].to_pylist():
        return existing
    max_bytes = ImageLimits().max_bytes
    if existing is None:
        rows = (row_of(*read, options) for read in _read_ahead(task.items, max_bytes))
    else:
        rows = (
            row_of(*_read(item, max_bytes), options) if row["reason"] == StorageReason.UNAVAILABLE else row
            for item, row in zip(task.items, parquet.read_rows(root, existing), strict=True)
        )
    return parquet.write_shard_file(
        root, task.name, task.fingerprint, rows, options.row_group_rows, options.row_group_bytes
    )


def _read_ahead(items: Sequence[Item], max_bytes: int) -> Iterator[tuple[Item, bytes | StorageError, str]]:
    """Yield the inputs in order with their bytes and labels; a few requests to a bucket are under way while
    one picture is looked at.
    """
    read = partial(_read, max_bytes=max_bytes)
    if not any(storage.is_s3(item.uri) for item in items):
        yield from map(read, items)
        return
    with ThreadPoolExecutor(_READERS) as pool:
        waiting: deque[Future[tuple[Item, bytes | StorageError, str]]] = deque()
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > 2 * _READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read(item: Item, max_bytes: int) -> tuple[Item, bytes | StorageError, str]:
    if item.outcome is not None:
        return item, b"", sources.label_of(item)
    try:
        return item, sources.read(item, max_bytes), sources.label_of(item)
    except StorageError as error:
        return item, error, item.label or ""


def build_shards(tasks: Sequence[ShardTask], root: str, options: ShardOptions) -> Iterator[Shard]:
    """Build all shards on the cluster and yield each as it is done."""
    yield from results(partial(build_shard, root=root, options=options), tasks)
