"""Turn photos into Parquet shards for training, from a folder, a bucket prefix, a tar, tars of tars,
WebDataset shards or a list.

    python jobs/prepare.py ~/photos shards
    python jobs/prepare.py ILSVRC2012_img_train.tar shards --short-side 256
    python jobs/prepare.py photos.txt shards
    ray job submit --working-dir . -- python jobs/prepare.py s3://bucket/photos s3://bucket/shards

A .tar SRC is never unpacked; a .txt SRC names one file per line (optionally a tab and a label). Every input
gets one row, in the shards and in DST/status.parquet: `ok` with its original bytes (downscaled with
--short-side), `skipped` (too small, an exact duplicate) or `failed`, with a reason. Running the same command
again makes only missing shards and retries inputs that were unavailable.

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed items.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from pipelines.command import (
    Exit,
    UsageError,
    check_places,
    connect_to_ray,
    parser,
    quiet_ray_data,
    run,
)


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("source", metavar="SRC", help="folder, s3:// prefix, .tar, or .txt list of photos")
    options.add_argument("target", metavar="DST", help="where the shards go")
    options.add_argument(
        "--min-side", type=int, default=32, metavar="PX", help="skip smaller pictures (default 32)"
    )
    options.add_argument(
        "--short-side",
        type=int,
        default=None,
        metavar="PX",
        help="downscale larger pictures to this short side, as JPEG",
    )
    options.add_argument(
        "--shard-mb", type=int, default=128, metavar="MB", help="size of a shard (default 128)"
    )
    options.add_argument("--dry-run", action="store_true", help="list and plan; write nothing")
    return options


def prepare(options: argparse.Namespace) -> Exit:
    """Plan the shards, write the missing ones, then the manifest."""
    from rich.console import Console

    from pipelines.shards.build import ShardOptions, plan_shards
    from pipelines.shards.prepare import prepare as build
    from pipelines.shards.prepare import with_tars_opened
    from pipelines.shards.sources import Archive, list_inputs
    from pipelines.shards.status import report

    check_places(options.source, options.target, "the shards")
    try:
        shard_options = ShardOptions(
            min_side_px=options.min_side, short_side_px=options.short_side, shard_bytes=options.shard_mb << 20
        )
        found = list(list_inputs(options.source))
    except ValueError as error:
        raise UsageError(str(error)) from None
    if not found:
        raise UsageError(f"no files under {options.source}")
    if not options.dry_run or any(isinstance(one, Archive) for one in found):
        connect_to_ray()
        quiet_ray_data()
    items = with_tars_opened(found, None if options.dry_run else options.target)
    tasks = plan_shards(items, shard_options)
    size_mb = sum(item.size_bytes for item in items if item.outcome is None) / 1e6
    print(f"{len(items)} inputs, {size_mb:.1f} MB -> {len(tasks)} shards in {options.target}")
    if options.dry_run:
        return Exit.COMPLETE

    status, num_reused = build(tasks, options.source, options.target, shard_options)
    console = Console()
    for table in report(status):
        console.print(table, "", sep="\n")
    counts = Counter(status["status"].to_pylist())
    print(
        f"ok {counts['ok']}, skipped {counts['skipped']}, failed {counts['failed']}, shards reused "
        f"{num_reused}"
    )
    if not counts["ok"]:
        print(f"nothing usable came out: {options.target} cannot be trained on")
    return Exit.COMPLETE if counts["ok"] and not counts["failed"] else Exit.FINISHED_WITH_FAILED_ITEMS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(prepare, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
