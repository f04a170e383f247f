"""Turn a tree or bucket of photos into Parquet shards for training.

    python jobs/prepare.py ~/photos shards
    python jobs/prepare.py s3://bucket/photos s3://bucket/shards
    ray job submit --working-dir . -- python jobs/prepare.py s3://bucket/photos s3://bucket/shards

Every input gets one row: `ok` with its original bytes, or `failed` with a reason. Running the same command again does only what is missing.

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed items.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from pipelines.command import Exit, UsageError, connect_to_ray, parser, quiet_ray_data, run


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("source", metavar="SRC", help="folder or s3:// prefix of photos")
    options.add_argument("target", metavar="DST", help="where the shards go")
    options.add_argument("--min-side", type=int, default=32, metavar="PX", help="refuse smaller pictures (default 32)")
    options.add_argument("--shard-mb", type=int, default=128, metavar="MB", help="size of a shard (default 128)")
    options.add_argument("--dry-run", action="store_true", help="list and plan, write nothing")
    return options


def prepare(options: argparse.Namespace) -> Exit:
    """Plan the shards, write those that are missing, then the manifest."""
    from rich.progress import track

    from pipelines.imagenet import ShardOptions, plan_shards, write_shards
    from pipelines.shards import write_manifest
    from resshift import storage

    if storage.is_inside(options.target, options.source):
        raise UsageError(f"DST ({options.target}) lies inside SRC ({options.source}): the shards would become inputs of the next run")
    shard_options = ShardOptions(min_side_px=options.min_side, shard_bytes=options.shard_mb << 20)
    entries = list(storage.list_entries(options.source))
    if not entries:
        raise UsageError(f"no files under {options.source}")
    tasks = plan_shards(entries, shard_options)
    print(f"{len(entries)} files, {sum(e.size_bytes for e in entries) / 1e6:.1f} MB -> {len(tasks)} shards in {options.target}")
    if options.dry_run:
        return Exit.COMPLETE

    connect_to_ray()
    quiet_ray_data()
    summaries = list(track(write_shards(tasks, options.target, shard_options), total=len(tasks), description="shards"))
    write_manifest(options.target, options.source, summaries)

    reasons: Counter[str] = Counter()
    for summary in summaries:
        reasons.update(summary.reasons)
    print(f"ok {sum(s.num_ok for s in summaries)}, failed {reasons.total()}, shards reused {sum(s.reused for s in summaries)}")
    for reason, count in reasons.most_common():
        print(f"  {reason}: {count}")
    return Exit.FINISHED_WITH_FAILED_ITEMS if reasons else Exit.COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(prepare, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
