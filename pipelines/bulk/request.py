"""A bulk job as it is asked for on the command line: everything checked before any work, one line for what is
wrong.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Iterable, Iterator

from pipelines.bulk.job import Job, entries
from pipelines.bulk.selection import Selection, Worklist
from pipelines.bulk.settings import BulkSettings
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.bulk.worker import describe_model
from pipelines.command import UsageError, as_flag
from pipelines.ledger import ledger
from resshift import storage
from resshift.config import Sampling, with_settings
from resshift.storage import Entry


def settings_of(options: argparse.Namespace) -> BulkSettings:
    """Return the settings of `--set`."""
    return with_settings(BulkSettings(), options.set)


def check_places(options: argparse.Namespace) -> None:
    """Refuse a DST inside SRC."""
    if storage.is_inside(options.target, options.source):
        raise UsageError(
            f"DST ({options.target}) lies inside SRC ({options.source}): outputs would become inputs of the "
            "next run"
        )


def job_options(options: argparse.Namespace, settings: BulkSettings) -> UpscaleOptions:
    """Return the options of the job after checking them."""
    model = describe_model(options.model)
    try:
        sampling = Sampling(
            seed=options.seed, outscale=options.outscale, steps=options.steps, tile_px=options.tile
        )
        model.check(sampling)
    except ValueError as error:
        raise UsageError(as_flag(str(error))) from None
    if not 1 <= options.quality <= 100:
        raise UsageError(f"--quality must lie in 1 to 100, got {options.quality}")
    if not 0 < options.max_megapixels <= 10_000:
        raise UsageError(f"--max-megapixels must be positive and at most 10000, got {options.max_megapixels}")
    if options.price_per_hour is not None and not options.price_per_hour >= 0:
        raise UsageError(f"--price-per-hour must be at least 0, got {options.price_per_hour}")
    job = UpscaleOptions(
        model=options.model,
        identity=model.identity,
        scale=options.outscale or model.scale,
        sampling=sampling,
        format=options.format,
        quality=options.quality,
        name=options.name,
        frames=settings.output.frames,
    )
    try:
        job.output_key("folder/picture.png")
    except ValueError as error:
        raise UsageError(str(error)) from None
    return job


def requested_job(options: argparse.Namespace, settings: BulkSettings) -> Job:
    """Return the job that the flags describe.

    Raises:
        UsageError: a flag cannot be what it is.
        JobMismatch: DST belongs to another job.
    """
    made = job_options(options, settings)
    ledger.check_job(options.target, made.record(options.source), settings.target)
    stages = StageOptions(
        job=made,
        target=options.target,
        limits=settings.decoder_limits(int(options.max_megapixels * 1e6)),
        if_exists=options.if_exists,
        source_s3=settings.source,
        target_s3=settings.target,
    )
    return Job(source=options.source, stages=stages, bulk=settings.work.bulk_options(settings.limits.deaths))


def requested_inputs(options: argparse.Namespace, settings: BulkSettings) -> Iterator[Entry]:
    """Return the selected inputs. The listing begins here, and streams.

    Raises:
        UsageError: there is nothing, or the list of keys cannot be read.
    """
    selection = Selection(
        include=tuple(options.include),
        exclude=tuple(options.exclude),
        min_bytes=settings.select.min_bytes,
        max_bytes=settings.select.max_bytes,
    )
    keys = None if options.keys is None else _lines(options.keys)
    found = entries(options.source, selection, keys, settings.source)
    first = next(found, None)
    if first is None:
        raise UsageError(
            f"no files under {options.source}"
            + (" that are selected" if selection != Selection() or keys else "")
        )
    return _chain(first, found)


def remaining_work(
    inputs: Iterator[Entry],
    options: argparse.Namespace,
    settings: BulkSettings,
    job: Job,
    again: Collection[str] = (),
) -> Worklist:
    """Return the inputs minus the ledger, which is read here; the keys in `again` are not done, whatever it
    says.
    """
    known = ledger.load_known(
        options.target, retry_failed=options.retry_failed, again=again, s3_options=settings.target
    )
    return Worklist(inputs, known, job.stages.job.output_key, job.stages.job.scale)


def _lines(path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            yield from file
    except OSError as error:
        raise UsageError(f"--keys {path}: {error.strerror}") from None


def _chain(first: Entry, rest: Iterable[Entry]) -> Iterator[Entry]:
    yield first
    yield from rest
