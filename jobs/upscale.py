"""Upscale every picture of a folder or bucket into another one.

    python jobs/upscale.py photos upscaled
    python jobs/upscale.py s3://in/photos s3://out/x4 --replicas 1:8 --include '*.jpg' --exclude 'private/*'
    python jobs/upscale.py photos upscaled --plan --price-per-hour 1.9     what would be done, hours, cost; writes nothing
    python jobs/upscale.py photos upscaled --status                        counts so far
    python jobs/upscale.py photos upscaled --retry-failed                  once more what failed
    python jobs/upscale.py photos upscaled --verify                        re-read the outputs: missing, corrupt, extra
    python jobs/upscale.py photos upscaled --repair                        do once more what is missing or corrupt
    ray job submit --working-dir . -- python jobs/upscale.py s3://in/photos s3://out/x4

Every input gets one row in DST/_resshift/ledger (Parquet: key, status, reason, sizes, sha256, seconds, ...).
A broken picture is a row with a reason, never a stopped job. Running the same command again continues; other
options than before are refused. At the end there is a report: DST/_resshift/report.html, .json, .csv.
`--model nearest-x4` repeats pixels: for trying out a set-up without a network.

Rarer settings are `--set section.field=value` (pipelines/bulk/settings.py): source.* and target.* (endpoint,
region, profile, anonymous, requester_pays, sse, storage_class, attempts, ...), limits.* , select.*,
output.frames=first|all|fail, work.*, engine.*.

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed items.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipelines.command import Exit, UsageError, connect_to_ray, min_max, parser, run

if TYPE_CHECKING:
    from pipelines.bulk.job import Job
    from pipelines.bulk.selection import Worklist
    from pipelines.bulk.settings import BulkSettings


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("source", metavar="SRC", help="folder or s3:// prefix")
    options.add_argument(
        "target", metavar="DST", help="where outputs and the ledger go; must not lie inside SRC"
    )
    options.add_argument(
        "--model",
        default="tiny-x4",
        help="name, directory or weight file, @bfloat16 may follow (default tiny-x4)",
    )
    options.add_argument("--outscale", type=float, help="scale of the result (default: the model's)")
    options.add_argument("--steps", type=int, help="of the chain: fewer cost less (default: the model's)")
    options.add_argument(
        "--format",
        default="png",
        choices=["keep", "png", "jpeg", "webp", "tiff"],
        help="keep: as the input's extension",
    )
    options.add_argument("--quality", type=int, default=95, help="of jpeg and webp (default 95)")
    options.add_argument("--name", default="{dir}/{stem}_x{scale}.{ext}", help="template of output names")
    options.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    options.add_argument(
        "--tile", type=int, metavar="PX", help="side of a tile in input pixels (default: chosen, up to 256)"
    )
    options.add_argument(
        "--max-megapixels", type=float, default=25.0, help="refuse larger inputs (default 25)"
    )
    options.add_argument(
        "--include",
        action="append",
        default=[],
        metavar="GLOB",
        help="only these; * spans /; without / the file name",
    )
    options.add_argument(
        "--exclude", action="append", default=[], metavar="GLOB", help="not these; wins over --include"
    )
    options.add_argument(
        "--keys", metavar="FILE", help="inputs are the keys of this list, one a line, instead of a listing"
    )
    options.add_argument(
        "--if-exists",
        default="overwrite",
        choices=["skip", "verify", "overwrite"],
        help="outputs without a row",
    )
    options.add_argument(
        "--engine",
        default="serve",
        choices=["serve", "actors"],
        help="replicas of Ray Serve, or of this job alone",
    )
    options.add_argument(
        "--replicas",
        default="1:1",
        metavar="MIN:MAX",
        help="or one number: replicas of the model (default 1:1)",
    )
    options.add_argument(
        "--price-per-hour", type=float, metavar="PRICE", help="of one replica, for plan and report"
    )
    options.add_argument(
        "--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="see above"
    )
    mode = options.add_mutually_exclusive_group()
    mode.add_argument("--plan", "--dry-run", action="store_true", help="count and check, write nothing")
    mode.add_argument("--status", action="store_true", help="print what the ledger says")
    mode.add_argument("--retry-failed", action="store_true", help="do what failed once more")
    mode.add_argument("--verify", action="store_true", help="compare outputs with the ledger")
    mode.add_argument(
        "--repair", action="store_true", help="do once more what --verify finds missing or corrupt"
    )
    return options


def upscale(options: argparse.Namespace) -> Exit:
    """Run the job, or answer a question about it."""
    from pipelines.bulk.request import (
        check_places,
        remaining_work,
        requested_inputs,
        requested_job,
        settings_of,
    )
    from pipelines.ledger.lease import held

    check_places(options)
    replicas, settings = min_max("--replicas", options.replicas), settings_of(options)
    if options.repair:
        options.if_exists = "overwrite"  # what lies there is what is wrong
    if options.status or options.verify:
        from pipelines.ledger.ledger import read_job

        recorded = read_job(options.target, settings.target)
        if recorded is None:
            raise UsageError(f"{options.target} holds no job: nothing has been upscaled into it")
        return check(options, settings, recorded["scale"]) if options.verify else summary(options, settings)
    job = requested_job(options, settings)
    inputs = requested_inputs(options, settings)
    if options.plan:
        return plan(options, settings, job, remaining_work(inputs, options, settings, job), replicas)
    with held(options.target, settings.target):
        again = problems(options.target, settings, job.stages.job.scale)[1] if options.repair else ()
        return work(options, settings, job, remaining_work(inputs, options, settings, job, again), replicas)


def summary(options: argparse.Namespace, settings: BulkSettings) -> Exit:
    """Print the counts of the ledger."""
    from pipelines.ledger.ledger import total_counts

    counts = total_counts(options.target, settings.target)
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")
    return Exit.FINISHED_WITH_FAILED_ITEMS if counts["failed"] else Exit.COMPLETE


def problems(target: str, settings: BulkSettings, scale: float) -> tuple[int, set[str]]:
    """Print what differs from the ledger of a job of that scale; return how much, and the inputs whose
    outputs it is.
    """
    from pipelines.ledger.verify import verify

    count, keys = 0, set[str]()
    for line, key in verify(target, scale, settings.target):
        print(line)
        count += 1
        if key is not None:
            keys.add(key)
    return count, keys


def check(options: argparse.Namespace, settings: BulkSettings, scale: float) -> Exit:
    """Print what differs, the remedy, and the counts of the ledger."""
    count, keys = problems(options.target, settings, scale)
    print(
        f"{count} outputs differ from the ledger" + (f"; --repair does {len(keys)} once more" if keys else "")
    )
    code = summary(options, settings)
    return Exit.FINISHED_WITH_FAILED_ITEMS if count else code


def plan(
    options: argparse.Namespace,
    settings: BulkSettings,
    job: Job,
    worklist: Worklist,
    replicas: tuple[int, int],
) -> Exit:
    """Print what would be done."""
    from pipelines.bulk.estimate import describe, estimate
    from pipelines.ledger.report import summarise

    found = estimate(worklist, job.stages)
    speed = summarise(options.target, options=settings.target)[0].replica_megapixels_per_s
    for line in describe(
        found, worklist, mp_per_s=speed, replicas=replicas[1], price_per_hour=options.price_per_hour
    ):
        print(line)
    return Exit.COMPLETE


def work(
    options: argparse.Namespace,
    settings: BulkSettings,
    job: Job,
    worklist: Worklist,
    replicas: tuple[int, int],
) -> Exit:
    """Do what is to be done and write the report."""
    from pipelines.bulk.actors import ActorEngine, EngineError
    from pipelines.bulk.job import close_job, engine_options, run_job
    from pipelines.bulk.progress import Progress
    from pipelines.ledger import ledger
    from serve.engine import ServeEngine

    ledger.begin_job(options.target, job.stages.job.record(options.source), settings.target)
    if worklist.has_work():
        connect_to_ray(num_cpus=replicas[1] + 4)
        engines = {"serve": ServeEngine, "actors": ActorEngine}
        engine = engines[options.engine](engine_options(job.stages.job, replicas, settings.engine))
        try:
            with Progress(worklist.counts) as progress:
                run_job(job, worklist, engine, progress)
        except EngineError as error:
            print(f"error: {error}", file=sys.stderr)
            return Exit.FAILED
        except (KeyboardInterrupt, asyncio.CancelledError):
            print("stopped; what is done is in the ledger, and the same command continues", file=sys.stderr)
            return Exit.FAILED
    close_job(job, worklist, options.price_per_hour)
    counts = worklist.counts
    print(
        f"{counts.listed} inputs: {counts.pending} to do, {counts.done} done before, {counts.refused} refused"
    )
    print(f"report: {options.target.rstrip('/')}/{ledger.DIRECTORY}/report.html")
    return summary(options, settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(upscale, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
