"""Upscale every picture of a folder or bucket into another one, or one, as `resshift` does without Ray.

    python jobs/upscale.py photos upscaled
    python jobs/upscale.py s3://photos/in s3://out/x4 --replicas 1:8 --include '*.jpg' --exclude 'private/*'
    python jobs/upscale.py photos upscaled --plan --price-per-hour 1.9     estimate hours and cost
    python jobs/upscale.py photos upscaled --status                        counts so far
    python jobs/upscale.py photos upscaled --retry-failed                  process failed inputs once more
    python jobs/upscale.py photos upscaled --verify                        re-read the outputs, list problems
    python jobs/upscale.py photos upscaled --repair                        redo missing and corrupt outputs
    ray job submit --working-dir . -- python jobs/upscale.py s3://photos/in s3://out/x4

A glob without / is matched against the file name, any other against the whole key.
Every input gets one row in DST/_resshift/ledger (Parquet: key, status, reason, sizes, sha256, seconds ...), a
broken picture too, and the report is DST/_resshift/report.html, .json, .csv. Running the same command again
continues the job; changed options are refused. `--model nearest-x4` repeats pixels, to try out a set-up.

Exit codes: 0 complete, 1 failed, 2 usage, 3 failed items (more than --tolerate), 130 Ctrl-C.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines import command
from pipelines.command import Exit, UsageError, parser, run

if TYPE_CHECKING:
    from pipelines.bulk.job import Job
    from pipelines.bulk.request import BulkRequest
    from pipelines.bulk.selection import Worklist
    from pipelines.bulk.sweep import Sweep


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "", command.bulk_settings)
    add = options.add_argument
    add("source", metavar="SRC", help="folder or s3:// prefix")
    add("target", metavar="DST", help="folder or s3:// prefix for outputs and ledger, not inside SRC")
    command.add_model(options, default="tiny-x4")
    command.add_outscale(options)
    command.add_sampling(options)
    command.add_format(options, "png")
    add("--name", default="{dir}/{stem}_x{scale}.{ext}", help="template of output names")
    add("--max-megapixels", type=float, default=25.0, help="refuse larger inputs (default 25)")
    add("--include", action="append", default=[], metavar="GLOB", help="only these keys; * also matches /")
    add("--exclude", action="append", default=[], metavar="GLOB", help="not these; overrides --include")
    add("--masks", metavar="DIR", help="masks of the holes, under the same keys or as NAME.png")
    add("--keys", metavar="FILE", help="read the input keys from this file, one per line; SRC is not listed")
    add("--if-exists", default="overwrite", choices=["skip", "verify", "overwrite"], help="without a row")
    add("--engine", help=argparse.SUPPRESS)  # of earlier versions: refused with what to do
    add("--replicas", default="1:1", metavar="MIN:MAX", help="replicas of the model, or one number (1:1)")
    add("--drivers", type=command.positive, metavar="N", help="schedulers (default: one for 8 replicas)")
    add("--price-per-hour", type=float, metavar="PRICE", help="price of one replica, for plan and report")
    add("--tolerate", type=command.share, default=0.0, metavar="SHARE", help="share that may fail (0%%)")
    add("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="see below")
    mode = options.add_mutually_exclusive_group()
    mode.add_argument("--plan", "--dry-run", action="store_true", help="count and check; write nothing")
    mode.add_argument("--status", action="store_true", help="print the counts of the ledger")
    mode.add_argument("--retry-failed", action="store_true", help="process failed inputs once more")
    mode.add_argument("--verify", action="store_true", help="compare outputs with the ledger")
    mode.add_argument("--repair", action="store_true", help="redo the outputs that --verify reports")
    return options


def request_of(flags: argparse.Namespace) -> BulkRequest:
    """Return the request that the flags describe."""
    from pipelines.bulk.request import BulkRequest
    from pipelines.bulk.settings import BulkSettings
    from resshift.config import with_settings

    same = ("source", "target", "quality", "name", "masks", "keys", "max_megapixels", "retry_failed")
    return BulkRequest(
        **{name: getattr(flags, name) for name in same},
        model=command.model_of(flags.model, flags),
        sampling=command.sampling_of(flags),
        format=flags.format or BulkRequest.format,
        price_per_hour=flags.price_per_hour,
        include=tuple(flags.include),
        exclude=tuple(flags.exclude),
        if_exists="overwrite" if flags.repair else flags.if_exists,  # the existing outputs are the bad ones
        settings=with_settings(BulkSettings(), flags.set),
    )


def upscale(options: argparse.Namespace) -> Exit:
    """Run the job, or report on it; one picture needs no job."""
    from pipelines.ledger.lease import held
    from pipelines.ledger.ledger import read_job
    from resshift.command.upscale import is_one_picture, run_one

    if options.engine is not None:
        raise UsageError("--engine is gone, every job runs on Ray Serve: give the same command without it")
    if is_one_picture(options.source, options.target):
        return run_one(options)
    request, replicas = request_of(options), command.min_max("--replicas", options.replicas)
    if options.status or options.verify:
        recorded = read_job(request.target, request.settings.target)
        if recorded is None:
            raise UsageError(f"{request.target} holds no job: nothing has been upscaled into it")
        tolerated = options.tolerate
        return check(request, recorded["scale"], tolerated) if options.verify else summary(request, tolerated)
    job, entries = request.job(), request.entries()
    if options.plan:
        return plan(request, job, request.inputs().worklist(job.stages, entries), replicas[1])
    with held(request.target, request.settings.target):
        again = discrepancies(request, job.outputs.scale) if options.repair else ()
        sweep = request.sweep(job, entries, {key for key in again if key is not None})
        return work(request, job, sweep, options)


def summary(request: BulkRequest, tolerated: float) -> Exit:
    """Print the counts of the ledger; tell whether more than a share of the inputs failed."""
    from pipelines.ledger import ledger

    counts = ledger.total_counts(request.target, request.settings.target)
    failures = ledger.some_failures(request.target, request.settings.target) if counts["failed"] else []
    lines = [f"{name}: {count}" for name, count in sorted(counts.items())] or ["nothing is done yet"]
    print(*lines, *failures, sep="\n")
    total = sum(counts[status] for status in ("ok", "failed", "skipped"))
    return Exit.FINISHED_WITH_FAILED_ITEMS if counts["failed"] > tolerated * total else Exit.COMPLETE


def discrepancies(request: BulkRequest, scale: float) -> list[str | None]:
    """Print the differences from the ledger; return the input of each output, or None if unknown."""
    from pipelines.ledger.verify import verify

    keys: list[str | None] = []
    for line, key in verify(request.target, scale, request.settings.target):
        print(line)
        keys.append(key)
    return keys


def check(request: BulkRequest, scale: float, tolerated: float) -> Exit:
    """Print the differences, the remedy and the counts of the ledger."""
    keys = discrepancies(request, scale)
    inputs = {key for key in keys if key is not None}
    print(f"{len(keys)} outputs differ from the ledger" + f"; --repair redoes {len(inputs)}" * bool(inputs))
    return max(summary(request, tolerated), Exit.FINISHED_WITH_FAILED_ITEMS if keys else Exit.COMPLETE)


def plan(request: BulkRequest, job: Job, worklist: Worklist, most_replicas: int) -> Exit:
    """Print what would be done."""
    from pipelines.bulk.estimate import describe, estimate
    from pipelines.bulk.probe import replica_speed

    found = estimate(worklist, job.stages)
    speed = replica_speed(job.stages, request.settings.engine, most_replicas) if found.pending else None
    print(*describe(found, worklist, speed, most_replicas, request.price_per_hour), sep="\n")
    return Exit.COMPLETE


def work(request: BulkRequest, job: Job, sweep: Sweep, options: argparse.Namespace) -> Exit:
    """Do the work and write the report."""
    from pipelines.bulk import job as bulk
    from pipelines.bulk.engine import EngineError
    from pipelines.bulk.progress import JobProgress
    from pipelines.ledger import ledger
    from resshift.progress import shown
    from serve.engine import ServeEngine

    replicas = command.min_max("--replicas", options.replicas)
    ledger.begin_job(request.target, job.record(), request.settings.target)
    if sweep.has_work():
        drivers = options.drivers or bulk.default_drivers(replicas[1])
        command.connect_to_ray(num_cpus=replicas[1] + 4 + (drivers if drivers > 1 else 0))
        drivers = bulk.admitted_drivers(drivers, sweep, replicas, request.settings.engine)
        how = bulk.engine_options(job.outputs, replicas, request.settings.engine, drivers)
        try:
            with shown(JobProgress(sweep.counts)) as progress:
                bulk.run_job(job, sweep, ServeEngine(how), progress, drivers)
        except EngineError as error:
            print(f"error: {error}", file=sys.stderr)
            return Exit.FAILED
        except (KeyboardInterrupt, asyncio.CancelledError) as error:
            print("stopped; the ledger has the finished inputs: run again to continue", file=sys.stderr)
            return Exit.INTERRUPTED if isinstance(error, KeyboardInterrupt) else Exit.FAILED
    bulk.close_job(job, sweep, request.price_per_hour)
    print(*sweep.told(), sep="\n")
    print(f"pictures: {request.target}\nreport: {request.target.rstrip('/')}/{ledger.DIRECTORY}/report.html")
    return summary(request, options.tolerate)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(upscale, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
