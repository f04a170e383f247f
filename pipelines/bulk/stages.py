"""The CPU ends of the bulk job as plain functions: bytes -> frames, frames -> object. Nothing here knows Ray,
and nothing imports torch.

`prepare` fetches, checks and decodes the inputs of a unit; `store` encodes and writes results. An error of an
input is caught where it occurs and becomes the status, reason and message of its row; it never stops the job
or affects a neighbour. Outputs are single atomic writes under a name that depends on the input's key alone,
so work that is repeated after a crash gives the same bytes in the same place.
"""

from __future__ import annotations

import functools
import hashlib
import math
import posixpath
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipelines.bulk.parcels import FEW
from pipelines.bulk.selection import WorkItem
from pipelines.ledger.ledger import DIRECTORY, Row, failed, skipped
from resshift import images, storage
from resshift.config import Sampling
from resshift.images import ImageError, ImageLimits, ImageReason, Picture
from resshift.images.animation import FrameChoice, Frames, encode_frames, fit_frames
from resshift.images.masks import with_mask
from resshift.images.sandbox import Decoder, DecoderDied, DecoderLimits, DecoderTimeout
from resshift.output_names import CONTENT_TYPES, OutputFormat, output_format, output_key
from resshift.storage import StorageError, StorageReason, s3
from resshift.storage.s3 import S3Options

IfExists = Literal["skip", "verify", "overwrite"]
_THREADS = 8
_MOST_PIXELS = 16_000_000
_MAX_RESULT_BYTES = 8 << 30
_MAX_OUTPUT_BYTES = 1 << 30  # of an output that was there, read whole by `--if-exists verify`


@dataclass(frozen=True, kw_only=True, slots=True)
class UpscaleOptions:
    """What decides the bytes of the outputs and their names; stored in job.json, and a resumed job must have
    the same.

    Fields:
        model, identity: Name and identity of the model.
        scale: Sides of an output over sides of its input.
        sampling: How the pixels are made.
        format: Format of the outputs; "keep" follows the extension of each input.
        quality: Quality of JPEG and WebP, 1 to 100.
        name: Template of output names, see `names.output_key`.
        frames: Which frames of files with several are upscaled.
        masks: Folder or s3:// prefix of the masks of a model that fills holes, see `mask_keys`.
        detector: sha256 of the face detector that `sampling` names, if any.
    """

    model: str
    identity: str
    scale: float
    sampling: Sampling = Sampling()
    format: OutputFormat = "png"
    quality: int = 95
    name: str = "{dir}/{stem}_x{scale}.{ext}"
    frames: FrameChoice = "first"
    masks: str | None = None
    detector: str | None = None

    def output_key(self, key: str) -> str:
        """Return the key of the output of an input, relative to DST; see `names.output_key`."""
        return output_key(key, self.name, self.format, self.scale)

    def record(self, source: str) -> dict[str, Any]:
        """Return what job.json says."""
        facts = asdict(self)
        sampling: dict[str, Any] = facts.pop("sampling")
        if facts.pop("masks") is not None:
            facts["masks"] = storage.printable(str(self.masks))
        if facts.pop("detector") is not None:
            facts["detector"] = self.detector
            sampling["faces"] = storage.printable(str(self.sampling.faces))
        # What a job did not ask for is left out, except what job.json has always had: jobs continue that were
        # begun before there was such an option.
        always = ("seed", "outscale", "tile_px")
        asked = {name: value for name, value in sampling.items() if name in always or value is not None}
        return facts | asked | {"source": storage.printable(source)}


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOptions:
    """How the CPU stages work; nothing of it changes the bytes of an output.

    Fields:
        outputs: What is made.
        target: DST.
        limits: Limits of the decoder.
        if_exists: What to do with an output that has no row: leave it, leave it when it decodes and has the
            right size, or write it again.
        source_s3, target_s3: How the buckets are reached.
    """

    outputs: UpscaleOptions
    target: str
    limits: DecoderLimits = field(default_factory=DecoderLimits)
    if_exists: IfExists = "overwrite"
    source_s3: S3Options = s3.DEFAULT
    target_s3: S3Options = s3.DEFAULT


@functools.lru_cache(maxsize=2)
def _decoder(limits: DecoderLimits) -> Decoder:
    """Return this process's decoder of inputs, or of outputs; it lives as long as the process."""
    return Decoder(limits)


def prepare(items: Sequence[WorkItem], options: StageOptions) -> tuple[list[Row], list[Frames]]:
    """Fetch and decode inputs.

    Returns:
        For each item its row so far, and its frames; a row that is not "ok" is final, and its frames are
        empty. Both end early, behind `FEW` items, where these took more than `_MOST_PIXELS`: small files may
        hold large pictures.
    """
    rows: list[Row] = []
    results: list[Frames] = []
    num_pixels = 0
    with ThreadPoolExecutor(min(_THREADS, len(items))) as pool:
        fetched = pool.map(lambda item: _fetch(item, options), items)
        for item, (row, data) in zip(items, fetched, strict=True):
            frames = Frames(())
            if row["status"] == "ok":
                row, frames = _decode(item, row, data, options)
            if frames.pictures and options.if_exists == "verify":
                row, frames = _verified(item, row, frames, options)
            rows.append(row)
            results.append(frames)
            num_pixels += frames.num_pixels
            if len(rows) >= FEW and num_pixels > _MOST_PIXELS:
                pool.shutdown(wait=False, cancel_futures=True)
                break
    return rows, results


def mask_keys(key: str) -> tuple[str, ...]:
    """Return the keys that the mask of a picture may have: its own, or that with .png as extension."""
    return tuple(dict.fromkeys((key, posixpath.splitext(key)[0] + ".png")))


def _mask(item: WorkItem, masks: str, options: StageOptions) -> Picture:
    """Fetch and decode the mask of an input.

    Raises:
        StorageError: It cannot be read.
        ImageError: no_mask, if there is none; bad_mask, if it cannot be decoded.
    """
    for key in mask_keys(item.key):
        try:
            data = storage.read_bytes(
                storage.join(masks, key), options.limits.images.max_bytes, options.source_s3
            )
        except StorageError as error:
            if error.reason is not StorageReason.MISSING:
                raise
            continue
        try:
            return _decoder(options.limits).decode(data, "first").pictures[0]
        except (ImageError, DecoderTimeout, DecoderDied) as error:
            raise ImageError(ImageReason.BAD_MASK, f"the mask {key}: {error}") from None
    tried = " or ".join(mask_keys(item.key))
    raise ImageError(ImageReason.NO_MASK, f"there is no mask {tried} in {storage.printable(masks)}")


def _fetch(item: WorkItem, options: StageOptions) -> tuple[Row, bytes]:
    started = time.monotonic()
    row = item.row(options.outputs.identity)
    try:
        if options.if_exists == "skip" and storage.exists(
            storage.join(options.target, item.output), options.target_s3
        ):
            return skipped(row, "exists", "the output was there; --if-exists skip"), b""
        data = storage.read_bytes(item.uri, options.limits.images.max_bytes, options.source_s3)
    except StorageError as error:
        return failed(row, str(error.reason), str(error)), b""
    return {
        **row,
        "bytes_in": len(data),
        "sha256_in": hashlib.sha256(data).hexdigest(),
        "seconds": time.monotonic() - started,
    }, data


def _verified(item: WorkItem, row: Row, frames: Frames, options: StageOptions) -> tuple[Row, Frames]:
    """Return the row of an output that is to be left as it is, without frames; else what was given.

    Anybody may have written it: it is decoded like an input, within the limits of what an input can grow to.
    """
    factor, limits = options.outputs.scale, options.limits
    growth = math.ceil(max(factor, 1) ** 2)
    sizes = ImageLimits(
        max_pixels=limits.images.max_pixels * growth,
        max_side_px=images.scaled(limits.images.max_side_px, max(factor, 1)),
        max_bytes=_MAX_OUTPUT_BYTES,
    )
    memory_mb = None if limits.memory_mb is None else limits.memory_mb * growth
    uri = storage.join(options.target, item.output)
    try:
        data = storage.read_bytes(uri, sizes.max_bytes, options.target_s3)
        written = _decoder(replace(limits, images=sizes, memory_mb=memory_mb)).decode(data)
    except (StorageError, ImageError, DecoderDied, DecoderTimeout):
        return row, frames  # what is missing or damaged is made
    if written.sizes() != frames.sizes(factor)[:1]:
        return row, frames
    first = written.pictures[0]
    message = "the output was there and has the right size; --if-exists verify"
    return {
        **skipped(item.row(options.outputs.identity), "exists", message),
        "width_out": first.width,
        "height_out": first.height,
        "bytes_out": len(data),
        "sha256_out": hashlib.sha256(data).hexdigest(),
    }, Frames(())


def _decode(item: WorkItem, row: Row, data: bytes, options: StageOptions) -> tuple[Row, Frames]:
    started = time.monotonic()
    decoder = _decoder(options.limits)
    for i_attempt in range(2):  # a crash may not be the picture's fault: it gets a second decoder
        try:
            frames = decoder.decode(data, options.outputs.frames)
            break
        except ImageError as error:
            return failed(row, str(error.reason), str(error)), Frames(())
        except DecoderTimeout as error:
            return failed(row, "timeout", str(error)), Frames(())
        except DecoderDied as error:
            if i_attempt:
                return failed(row, "killed_worker", f"{error}, twice"), Frames(())
    else:
        raise AssertionError("unreachable")
    try:
        check_frames(frames.sizes(options.outputs.scale), item.key, options.outputs)
        if (masks := options.outputs.masks) is not None:
            mask = _mask(item, masks, options)
            frames = frames.map(lambda picture: with_mask(picture, mask))
    except (ImageError, StorageError) as error:
        return failed(row, str(error.reason), str(error)), Frames(())
    first = frames.pictures[0]
    # Sizes are those after the EXIF orientation; seconds do not count waiting between stages.
    row = {**row, "width_in": first.width, "height_in": first.height, "frames": len(frames.pictures)}
    grown = frames.num_bytes * max(options.outputs.scale, 1) ** 2
    if grown > _MAX_RESULT_BYTES:
        message = (
            f"the result would take {grown / 1e9:.1f} GB, at most {_MAX_RESULT_BYTES / 1e9:.1f} GB are "
            "allowed"
        )
        return failed(row, "too_large", message), Frames(())
    return {**row, "seconds": (row["seconds"] or 0.0) + time.monotonic() - started}, frames


def check_frames(sizes: Sequence[tuple[int, int]], key: str, outputs: UpscaleOptions) -> None:
    """Refuse frames, given by (width, height) of their results, that the format of the output cannot hold.

    Raises:
        ImageError: See `images.check_sizes`.
    """
    images.check_sizes(sizes, output_format(key, outputs.format)[0])


def store(rows: Sequence[Row], results: Sequence[Frames], options: StageOptions) -> list[Row]:
    """Encode and write results; return the finished rows.

    Raises:
        StorageError: The destination is full or cannot be written, which is no fault of a picture.
    """
    with ThreadPoolExecutor(min(_THREADS, len(rows))) as pool:
        return list(pool.map(lambda row, frames: _store(row, frames, options), rows, results))


def _store(row: Row, frames: Frames, options: StageOptions) -> Row:
    started = time.monotonic()
    try:
        format, _ = output_format(row["key"], options.outputs.format)
        fitted = fit_frames(frames.map(images.in_own_profile), format)
        data = encode_frames(fitted, format, options.outputs.quality)
    except ImageError as error:
        return failed(row, str(error.reason), str(error))
    except Exception:
        # The boundary of the stage, as for the model: what an encoder raises is the row of its picture.
        return failed(row, "encode_error", traceback.format_exc(limit=-4))
    try:
        storage.write_bytes(
            storage.join(options.target, row["output"]), data, options.target_s3, CONTENT_TYPES[format]
        )
    except StorageError as error:
        _check_target(error, options)
        return failed(row, str(error.reason), str(error))
    first = fitted.pictures[0]
    return {
        **row,
        "width_out": first.width,
        "height_out": first.height,
        "bytes_out": len(data),
        "sha256_out": hashlib.sha256(data).hexdigest(),
        "notes": "; ".join(first.notes),
        "seconds": (row["seconds"] or 0.0) + time.monotonic() - started,
    }


def _check_target(error: StorageError, options: StageOptions) -> None:
    """Tell a name that cannot be written from a destination that cannot.

    Raises:
        StorageError: The destination is full, or nothing can be written there.
    """
    if error.reason is StorageReason.FULL:
        raise error
    if error.reason in (StorageReason.DENIED, StorageReason.UNAVAILABLE, StorageReason.MISSING):
        storage.write_bytes(storage.join(options.target, f"{DIRECTORY}/writable"), b"", options.target_s3)
