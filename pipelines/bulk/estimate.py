"""What a bulk job would do, hours and cost included: counts, bytes, and megapixels estimated from a sample of
headers. Nothing is written.

The sample is drawn evenly from the whole listing (reservoir sampling, the same for the same listing), and 64
KB of each file are read: that holds the header of nearly everything; a file whose header lies further back is
read whole.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from pipelines.bulk.selection import Batch, WorkItem, Worklist
from pipelines.bulk.stages import StageOptions, check_frames
from pipelines.ledger.ledger import Row, failed
from resshift import images, seeds, storage
from resshift.images import ImageError, ImageReason
from resshift.storage import StorageError

_FIRST_BYTES = 64 << 10
_MAX_SHOWN = 20
_READERS = 16


@dataclass(slots=True)
class Estimate:
    """What a listing holds, and what the sampled headers say.

    Fields:
        pending, pending_bytes: Number and bytes of all inputs to do.
        num_refused: Number of inputs that will not be tried.
        refused: Rows of the first of them.
        sampled: Number of headers that were read.
        sampled_pixels: Pixels of the readable ones together.
        readable: Number of the readable ones.
        unreadable: (key, reason, message) of the others.
    """

    pending: int = 0
    pending_bytes: int = 0
    num_refused: int = 0
    refused: list[Row] = field(default_factory=list[Row])
    sampled: int = 0
    sampled_pixels: int = 0
    readable: int = 0
    unreadable: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def megapixels(self) -> float | None:
        """Expected megapixels of input of the whole job; None without a readable header."""
        return self.pending * self.sampled_pixels / self.sampled / 1e6 if self.readable else None

    @property
    def megapixels_error(self) -> float:
        """Relative standard error of a sample of this size, roughly; 0 when all were read."""
        return 0.0 if self.sampled >= self.pending else 1 / math.sqrt(max(1, self.readable))


def estimate(worklist: Worklist, options: StageOptions, num_samples: int = 200) -> Estimate:
    """Walk along the whole listing and read a sample of headers."""
    found = Estimate()
    sample: list[WorkItem] = []
    rng = seeds.philox("plan")
    for items, refused in itertools.chain(worklist.batches(), _contested(worklist, options)):
        found.num_refused += len(refused)
        found.refused += refused[: max(0, _MAX_SHOWN - len(found.refused))]
        for item in items:
            found.pending += 1
            found.pending_bytes += item.size
            if len(sample) < num_samples:
                sample.append(item)
            elif (place := int(rng.integers(found.pending))) < num_samples:
                sample[place] = item
    with ThreadPoolExecutor(_READERS) as pool:
        for item, (num_pixels, reason, message) in zip(
            sample, pool.map(lambda item: _probe(item, options), sample), strict=True
        ):
            found.sampled += 1
            if reason:
                found.unreadable.append((item.key, reason, message))
            else:
                found.readable += 1
                found.sampled_pixels += num_pixels
    return found


def _contested(worklist: Worklist, options: StageOptions) -> Iterator[Batch]:
    """Yield what becomes of inputs that wait for a name, as far as the headers of those that have it tell."""
    with ThreadPoolExecutor(_READERS) as pool:
        while items := worklist.contested():
            for item, (_, reason, message) in zip(
                items, pool.map(lambda item: _probe(item, options), items), strict=True
            ):
                row = item.row(options.outputs.identity)
                yield worklist.settle(failed(row, reason, message) if reason else row)


def _probe(item: WorkItem, options: StageOptions) -> tuple[int, str, str]:
    """Return (pixels, reason, message) of one header."""
    limits = options.limits.images
    try:
        data = storage.read_first_bytes(item.uri, _FIRST_BYTES, options.source_s3)
        try:
            header = images.probe(data, limits)
        except ImageError as error:
            if len(data) == item.size or error.reason in (
                ImageReason.TOO_LARGE,
                ImageReason.NOT_AN_IMAGE,
                ImageReason.UNSUPPORTED_FORMAT,
                ImageReason.EMPTY,
            ):
                raise
            header = images.probe(storage.read_bytes(item.uri, limits.max_bytes, options.source_s3), limits)
        num_frames = header.num_frames if options.outputs.frames == "all" else 1
        scale = options.outputs.scale
        size = (images.scaled(header.width, scale), images.scaled(header.height, scale))
        check_frames([size] * min(num_frames, 2), item.key, options.outputs)
    except (ImageError, StorageError) as error:
        return 0, str(error.reason), str(error)
    return header.width * header.height * num_frames, "", ""


def describe(
    found: Estimate,
    worklist: Worklist,
    speed: tuple[float | None, str] | None,
    replicas: int,
    price_per_hour: float | None = None,
) -> Iterable[str]:
    """Yield the lines of the estimate.

    Args:
        found: The estimate.
        worklist: The worklist, read to its end.
        speed: What `probe.replica_speed` returned; None without anything to do.
        replicas: Largest number of replicas.
        price_per_hour: Price of one replica.
    """
    counts = worklist.counts
    yield (
        f"{counts.listed} inputs, {counts.listed_bytes / 1e6:.1f} MB: {counts.pending} to do "
        f"({found.pending_bytes / 1e6:.1f} MB), "
        f"{counts.done} done before, {counts.refused} left out"
    )
    for item in found.refused:
        yield f"  {item['key']}: {item['reason']}: {item['message']}"
    if found.num_refused > len(found.refused):
        yield f"  ... and {found.num_refused - len(found.refused)} more"
    if found.sampled:
        whole = found.sampled >= found.pending
        share = len(found.unreadable) / found.sampled
        about = "" if whole else f", about {round(share * found.pending)} of all"
        yield (
            f"headers read: {found.sampled}{' (all)' if whole else ''}, unreadable: "
            f"{len(found.unreadable)}{about}"
        )
        for key, reason, message in found.unreadable[:_MAX_SHOWN]:
            yield f"  {key}: {reason}: {message[:160]}"
    if found.megapixels is None or speed is None:
        return
    spread = f" (± {100 * found.megapixels_error:.0f} %)" if found.megapixels_error else ""
    yield (
        f"megapixels: {found.megapixels:.1f} of input{spread}, {found.megapixels * worklist.scale**2:.1f} of "
        "output"
    )
    mp_per_s, told = speed
    if mp_per_s is None:
        yield f"time: unknown, {told}; when some pictures are done, --plan tells it from the ledger"
        return
    hours = found.megapixels / mp_per_s / replicas / 3600
    yield (
        f"time: {hours:.2f} h with {replicas} replica{'s' * (replicas != 1)} at {mp_per_s:.3g} MP/s each "
        f"({told}), {hours * replicas:.2f} replica hours"
    )
    if price_per_hour is not None:
        yield f"cost: {hours * replicas * price_per_hour:.2f} at {price_per_hour:g} per replica and hour"
