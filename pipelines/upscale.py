"""Bulk upscaling: fetch and decode (CPU) -> upscale (GPU, or CPU) -> encode and put (CPU) -> ledger.

Every input gets exactly one row. Whatever is wrong with an input is caught at the stage where it shows and becomes status, reason and
message; it never stops the job or drops a neighbour. Outputs are single atomic writes under a name that depends on the input's key alone,
so work that is done twice after a crash gives the same bytes in the same place.

Rows travel between stages as two columns with fixed types: `record`, the ledger row so far as JSON, and `payload`, a pickled `Picture`.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import posixpath
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ray
import ray.data
import torch
from ray.data import ActorPoolStrategy

from pipelines import ledger
from resshift import images, seeds, storage
from resshift.images import Format, ImageError, ImageLimits
from resshift.storage import Entry, StorageError, StorageReason
from resshift.upscaler import Upscaler

Row = dict[str, Any]
_EXTENSIONS: dict[Format, str] = {"png": "png", "jpeg": "jpg", "webp": "webp", "tiff": "tif"}
# Arrow addresses a binary column of a block with 32 bits.
_MAX_PAYLOAD_BYTES = 2**31 - 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class UpscaleOptions:
    """What decides the bytes of the outputs; stored in job.json, and a resumed job must have the same.

    `name` may use {dir}, {stem}, {ext} and {scale}.
    """

    model: str
    identity: str
    scale: float
    outscale: float | None = None
    format: Format = "png"
    quality: int = 95
    name: str = "{dir}/{stem}_x{scale}.{ext}"
    seed: int = 0
    tile_px: int | None = None
    max_pixels: int = 25_000_000

    def output_key(self, key: str) -> str:
        """Return the key of the output of an input, relative to DST.

        Raises:
            ValueError: the template uses an unknown field, or leads out of DST or into the job's own records.
        """
        directory, base = posixpath.split(key)
        stem = posixpath.splitext(base)[0] or base
        fields = {"dir": directory or ".", "stem": stem, "ext": _EXTENSIONS[self.format], "scale": f"{self.scale:g}"}
        try:
            output = posixpath.normpath(self.name.format(**fields))
        except (KeyError, IndexError, AttributeError) as error:
            raise ValueError(f"the name {self.name!r} uses {error}; allowed: {{dir}}, {{stem}}, {{ext}}, {{scale}}") from None
        if output.split("/")[0] in ("", "..", ".", ledger.DIRECTORY):
            raise ValueError(f"the name {self.name!r} gives {output!r}: it must lie inside DST and outside {ledger.DIRECTORY}/")
        return output


@dataclass(frozen=True, slots=True)
class Work:
    """A listing, divided: what is to be done, and rows for inputs that cannot even be tried."""

    pending: list[Row]
    refused: list[Row]
    num_done: int


def plan_work(entries: Iterable[Entry], done: Mapping[str, str], options: UpscaleOptions, written: Mapping[str, str] | None = None) -> Work:
    """Divide a listing into work, refusals and what the ledger has already.

    An output name belongs to the input that has written it, else to the first in listing order; others that map to it are refused with
    reason name_collision.

    Args:
        entries: listing of SRC.
        done: key -> etag of inputs that the ledger has; an input whose etag changed is done again.
        options: of the job.
        written: output -> key of inputs whose output is there.
    """
    owner = dict(written or {})
    work = Work([], [], 0)
    num_done = 0
    for entry in entries:
        key = storage.printable(entry.key)
        output = options.output_key(key)
        if done.get(key) == entry.etag:
            num_done += 1
        elif entry.irregular is not None:
            work.refused.append(ledger.row(key, entry.etag, "failed", reason=str(StorageReason.IRREGULAR), message=entry.irregular))
        elif (first := owner.setdefault(output, key)) != key:
            message = f"{first} is written to {output} already; rename one, or choose another --name"
            work.refused.append(ledger.row(key, entry.etag, "failed", reason="name_collision", message=message))
        else:
            work.pending.append({"record": json.dumps(ledger.row(key, entry.etag, "ok", output=output) | {"uri": entry.uri})})
    return Work(work.pending, work.refused, num_done)


def _failed(record: Row, reason: str, message: str) -> Row:
    return {"record": json.dumps(record | {"status": "failed", "reason": reason, "message": message}), "payload": b""}


def fetch(row: Row, options: UpscaleOptions) -> Row:
    """Read, check and decode one input."""
    record = json.loads(row["record"])
    started = time.monotonic()
    limits = ImageLimits(max_pixels=options.max_pixels)
    try:
        data = storage.read_bytes(record["uri"], max_bytes=limits.max_bytes)
        record |= {"bytes_in": len(data), "sha256_in": hashlib.sha256(data).hexdigest()}
        header = images.probe(data, limits)
        record |= {"width_in": header.width, "height_in": header.height}
        picture = images.decode(data, limits)
    except (ImageError, StorageError) as error:
        return _failed(record, str(error.reason), str(error))
    grown = (picture.pixels.nbytes + (picture.alpha.nbytes if picture.alpha is not None else 0)) * max(options.scale, 1) ** 2
    if grown > _MAX_PAYLOAD_BYTES:
        message = f"the result would take {grown / 1e9:.1f} GB, at most {_MAX_PAYLOAD_BYTES / 1e9:.1f} GB are allowed"
        return _failed(record, "too_large", message)
    # Sizes after the EXIF orientation; seconds are those spent on this picture, without waiting between stages.
    record |= {"width_in": picture.width, "height_in": picture.height, "seconds": time.monotonic() - started}
    return {"record": json.dumps(record), "payload": pickle.dumps(picture)}


class UpscaleStage:
    """A replica: loads the model once, then upscales row after row."""

    def __init__(self, options: UpscaleOptions, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.options = options
        self.upscaler = Upscaler.from_pretrained(options.model)
        if self.upscaler.identity != options.identity:
            raise RuntimeError(f"this node has another {options.model}: {self.upscaler.identity} instead of {options.identity}")

    def __call__(self, row: Row) -> Row:
        return upscale(row, self.upscaler, self.options)


def upscale(row: Row, upscaler: Upscaler, options: UpscaleOptions) -> Row:
    """Upscale one decoded picture; rows that have failed pass through."""
    record = json.loads(row["record"])
    if record["status"] != "ok":
        return row
    started = time.monotonic()
    try:
        picture = upscaler.upscale(
            pickle.loads(row["payload"]),
            seed=seeds.derive(options.seed, "picture", record["key"]),
            outscale=options.outscale,
            tile_px=options.tile_px,
        )
    except torch.OutOfMemoryError as error:
        return _failed(record, "out_of_memory", f"{error}; a smaller --tile needs less")
    except Exception:
        # The boundary of the stage: one picture must not end the job. The traceback is kept in the row.
        return _failed(record, "upscale_error", traceback.format_exc(limit=-4))
    record["seconds"] += time.monotonic() - started
    return {"record": json.dumps(record), "payload": pickle.dumps(picture)}


def store(row: Row, root: str, options: UpscaleOptions) -> Row:
    """Encode and write one result; return its ledger row as JSON."""
    record = json.loads(row["record"])
    started = time.monotonic()
    if record["status"] == "ok":
        try:
            picture = images.fit_format(pickle.loads(row["payload"]), options.format)
            data = images.encode(picture, options.format, options.quality)
            storage.write_bytes(storage.join(root, record["output"]), data)
            record |= {
                "width_out": picture.width,
                "height_out": picture.height,
                "bytes_out": len(data),
                "sha256_out": hashlib.sha256(data).hexdigest(),
                "notes": "; ".join(picture.notes),
            }
        except (ImageError, StorageError) as error:
            record |= {"status": "failed", "reason": str(error.reason), "message": str(error)}
    record |= {"seconds": (record["seconds"] or 0.0) + time.monotonic() - started, "model": options.identity}
    del record["uri"]
    return {"record": json.dumps(record)}


def run_work(pending: list[Row], root: str, options: UpscaleOptions, replicas: tuple[int, int]) -> Iterator[Row]:
    """Run the stages with Ray Data and yield the ledger row of each input as it is done.

    Args:
        pending: of `plan_work`.
        root: DST.
        options: of the job.
        replicas: fewest and most replicas of the model.
    """
    if not pending:
        return
    gpus = 1 if ray.cluster_resources().get("GPU", 0) >= 1 else 0
    threads = 1 if gpus else max(1, (os.cpu_count() or 1) // replicas[1])
    settings = {"options": options}
    # Few rows a block: a picture is large, and the first results should come early.
    dataset = ray.data.from_items(pending, override_num_blocks=max(1, -(-len(pending) // 4)))
    # Ray's types know neither functions with keyword arguments nor classes.
    stages: tuple[Any, Any, Any] = (fetch, UpscaleStage, store)
    dataset = (
        dataset.map(stages[0], fn_kwargs=settings)
        .map(
            stages[1],
            fn_constructor_kwargs=settings | {"num_threads": threads},
            compute=ActorPoolStrategy(min_size=replicas[0], max_size=replicas[1]),
            num_gpus=gpus,
        )
        .map(stages[2], fn_kwargs=settings | {"root": root})
    )
    for row in dataset.iter_rows():
        yield json.loads(row["record"])


def verify(table: Iterable[Row], root: str) -> Iterator[str]:
    """Re-read every output that the ledger calls ok and yield one line for each that is not as recorded."""
    for item in table:
        if item["status"] != "ok":
            continue
        try:
            data = storage.read_bytes(storage.join(root, item["output"]))
            header = images.probe(data, ImageLimits(max_pixels=2**31))
        except (StorageError, ImageError) as error:
            yield f"{item['output']}: {error}"
            continue
        if hashlib.sha256(data).hexdigest() != item["sha256_out"]:
            yield f"{item['output']}: sha256 differs from the ledger"
        elif (header.width, header.height) != (item["width_out"], item["height_out"]):
            yield f"{item['output']}: {header.width}x{header.height}, the ledger says {item['width_out']}x{item['height_out']}"


def options_record(options: UpscaleOptions, source: str) -> dict[str, Any]:
    """Return what job.json says."""
    return asdict(options) | {"source": storage.printable(source)}
