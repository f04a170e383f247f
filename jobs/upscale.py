"""Upscale every picture of a folder or bucket into another one.

    python jobs/upscale.py photos upscaled
    python jobs/upscale.py s3://in/photos s3://out/x4 --model tiny-x4 --replicas 1:8
    python jobs/upscale.py photos upscaled --plan              what would be done; writes nothing
    python jobs/upscale.py photos upscaled --status            counts so far
    python jobs/upscale.py photos upscaled --retry-failed      once more what failed
    python jobs/upscale.py photos upscaled --verify            re-read the outputs and compare them with the ledger
    ray job submit --working-dir . -- python jobs/upscale.py s3://in/photos s3://out/x4

Every input gets one row in DST/_resshift/ledger (Parquet: key, status, reason, sizes, sha256, seconds, ...). A broken picture is a row
with a reason, never a stopped job. Running the same command again continues; other options than before are refused.

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed items.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipelines.command import Exit, UsageError, connect_to_ray, parser, quiet_ray_data, run

if TYPE_CHECKING:
    from collections import Counter

    from pipelines.upscale import UpscaleOptions, Work


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("source", metavar="SRC", help="folder or s3:// prefix")
    options.add_argument("target", metavar="DST", help="where outputs and the ledger go; must not lie inside SRC")
    options.add_argument("--model", default="tiny-x4", help="name, model directory or weight file (default tiny-x4)")
    options.add_argument("--outscale", type=float, help="scale of the result (default: the model's)")
    options.add_argument("--format", default="png", choices=["png", "jpeg", "webp", "tiff"])
    options.add_argument("--quality", type=int, default=95, help="of jpeg and webp (default 95)")
    options.add_argument("--name", default="{dir}/{stem}_x{scale}.{ext}", help="template of output names")
    options.add_argument("--seed", type=int, default=0, help="same seed, same bytes")
    options.add_argument("--tile", type=int, metavar="PX", help="side of a tile in input pixels (default: chosen, up to 256)")
    options.add_argument("--max-megapixels", type=float, default=25.0, help="refuse larger inputs (default 25)")
    options.add_argument("--replicas", default="1:1", metavar="MIN:MAX", help="replicas of the model (default 1:1)")
    mode = options.add_mutually_exclusive_group()
    mode.add_argument("--plan", "--dry-run", action="store_true", help="count and check, write nothing")
    mode.add_argument("--status", action="store_true", help="print what the ledger says")
    mode.add_argument("--retry-failed", action="store_true", help="do what failed once more")
    mode.add_argument("--verify", action="store_true", help="compare outputs with the ledger")
    return options


def job_options(options: argparse.Namespace) -> UpscaleOptions:
    """Return the options of the job after checking them."""
    from pipelines.upscale import UpscaleOptions
    from resshift.upscaler import locate_model

    model = locate_model(options.model)
    if options.outscale is not None and not 0 < options.outscale <= 16:
        raise UsageError(f"--outscale must lie in (0, 16], got {options.outscale}")
    if not 1 <= options.quality <= 100:
        raise UsageError(f"--quality must lie in 1 to 100, got {options.quality}")
    if options.max_megapixels <= 0:
        raise UsageError(f"--max-megapixels must be positive, got {options.max_megapixels}")
    smallest = model.config.unet.size_multiple * model.config.unet.lq_ratio
    if options.tile is not None and options.tile < smallest:
        raise UsageError(f"--tile must be at least {smallest} for this model, got {options.tile}")
    job = UpscaleOptions(
        model=options.model,
        identity=model.identity(),
        scale=options.outscale or model.config.scale,
        outscale=options.outscale,
        format=options.format,
        quality=options.quality,
        name=options.name,
        seed=options.seed,
        tile_px=options.tile,
        max_pixels=int(options.max_megapixels * 1e6),
    )
    try:
        job.output_key("folder/picture.png")
    except ValueError as error:
        raise UsageError(str(error)) from None
    return job


def replica_range(text: str) -> tuple[int, int]:
    """Parse MIN:MAX."""
    try:
        low, high = (int(part) for part in text.split(":"))
    except ValueError:
        raise UsageError(f"--replicas must be MIN:MAX, for example 1:8, got {text!r}") from None
    if not 1 <= low <= high:
        raise UsageError(f"--replicas needs 1 <= MIN <= MAX, got {text!r}")
    return low, high


def upscale(options: argparse.Namespace) -> Exit:
    """Run the job, or answer a question about it."""
    from pipelines import ledger
    from pipelines.upscale import options_record, plan_work, verify
    from resshift import storage

    if storage.is_inside(options.target, options.source):
        raise UsageError(f"DST ({options.target}) lies inside SRC ({options.source}): outputs would become inputs of the next run")
    replicas = replica_range(options.replicas)
    known = ledger.read(options.target)
    if options.status or options.verify:
        rows = known.to_pylist()
        problems = list(verify(rows, options.target)) if options.verify else []
        for problem in problems:
            print(problem)
        if options.verify:
            print(f"{len(problems)} outputs differ from the ledger")
        summary = _summary(ledger.counts(rows))
        return Exit.FINISHED_WITH_FAILED_ITEMS if problems else summary

    job = job_options(options)
    done = ledger.done_keys(known, retry_failed=options.retry_failed)
    entries = list(storage.list_entries(options.source))
    if not entries:
        raise UsageError(f"no files under {options.source}")
    work = plan_work(entries, done, job, ledger.written_outputs(known))
    size_mb = sum(entry.size_bytes for entry in entries) / 1e6
    print(f"{len(entries)} inputs, {size_mb:.1f} MB: {len(work.pending)} to do, {work.num_done} done, {len(work.refused)} refused")
    if options.plan:
        for item in work.refused:
            print(f"  {item['key']}: {item['reason']}: {item['message']}")
        return Exit.COMPLETE
    try:
        ledger.begin_job(options.target, options_record(job, options.source))
    except ledger.JobMismatch as error:
        raise UsageError(str(error)) from None
    ledger.append(options.target, work.refused)
    _run(work, job, options.target, replicas)
    return _summary(ledger.counts(ledger.read(options.target).to_pylist()))


def _run(work: Work, job: UpscaleOptions, target: str, replicas: tuple[int, int]) -> None:
    """Do the pending work; rows go to the ledger every 100 inputs or 10 seconds, and whatever happens at the end."""
    if not work.pending:
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    from pipelines import ledger

    connect_to_ray(num_cpus=replicas[1] + 3)
    quiet_ray_data()
    from pipelines.upscale import run_work

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    part: list[dict[str, Any]] = []
    last_append = time.monotonic()
    with Progress(*columns) as progress:
        bar = progress.add_task("upscaling", total=len(work.pending))
        try:
            for record in run_work(work.pending, target, job, replicas):
                part.append(record)
                progress.advance(bar)
                if len(part) >= 100 or time.monotonic() - last_append > 10:
                    ledger.append(target, part)
                    part, last_append = [], time.monotonic()
        finally:
            ledger.append(target, part)


def _summary(counts: Counter[str]) -> Exit:
    for name, count in sorted(counts.items()):
        print(f"{name}: {count}")
    return Exit.FINISHED_WITH_FAILED_ITEMS if counts["failed"] else Exit.COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(upscale, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
