"""Let a teacher, any model, make its picture of every training pair, once; then train with these pictures.

    python jobs/teach.py shards taught --preset tiny-x4-s4 --teacher RealESRGAN_x4plus.pth
    python jobs/teach.py s3://b/shards s3://b/taught --preset realsr-x4-s4 --teacher runs/large --passes 4
    python jobs/train.py --preset tiny-x4-s4 --data taught --out runs/student --set data.taught=0.5

SRC holds shards of photos written by jobs/prepare.py. DST gets shards of finished pairs: the clean and the
degraded picture as a run of the preset would make them in its first --passes epochs, and the teacher's.
`--set data.taught=0.5` then takes its picture instead of the truth in half of the samples. A run on DST uses
these pairs, cut to its data.crop_px and mirrored, so make them large: --set data.crop_px=256.

Running the same command again makes only missing shards. A task has one GPU where the cluster has any.

Exit codes: 0 complete, 1 failed, 2 usage, 3 finished with failed items.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence

from pipelines.command import (
    Exit,
    add_settings,
    check_places,
    connect_to_ray,
    parser,
    positive,
    quiet_ray_data,
    run,
)


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("source", metavar="SRC", help="shards written by jobs/prepare.py")
    options.add_argument("target", metavar="DST", help="where the shards of pairs go")
    options.add_argument("--preset", required=True, help="named configuration, for example tiny-x4-s4")
    options.add_argument("--teacher", required=True, metavar="MODEL", help="the model to learn from")
    add_settings(options)
    options.add_argument(
        "--passes", type=positive, default=1, metavar="N", help="pairs of each photo (default 1)"
    )
    options.add_argument(
        "--keep-bicubic",
        action="store_true",
        help="of pairs degraded by bicubic alone the truth stays: teachers of bad photos make good ones soft",
    )
    options.add_argument("--dry-run", action="store_true", help="check and plan; write nothing")
    return options


def teach(options: argparse.Namespace) -> Exit:
    """Plan the shards, make the missing ones, then the manifest."""
    import ray

    from pipelines.shards.parquet import read_manifest
    from pipelines.shards.taught import plan, teacher_identity
    from pipelines.shards.taught import teach as make
    from resshift.config import with_settings
    from resshift.presets import preset

    check_places(options.source, options.target, "the pairs")
    config = with_settings(preset(options.preset), options.set)
    tasks = plan(
        read_manifest(options.source),
        config,
        teacher_identity(options.teacher, config),
        options.passes,
        keep_bicubic=options.keep_bicubic,
    )
    num_pairs = sum(group.num_ok for task in tasks for group in task.groups)
    print(f"{num_pairs} pairs of {config.data.crop_px} px -> {len(tasks)} shards in {options.target}")
    if options.dry_run:
        return Exit.COMPLETE
    connect_to_ray()
    quiet_ray_data()
    num_gpus = 1.0 if ray.cluster_resources().get("GPU") else 0.0
    status, num_reused = make(
        options.source,
        options.target,
        config,
        options.teacher,
        passes=options.passes,
        keep_bicubic=options.keep_bicubic,
        num_gpus=num_gpus,
    )
    counts = Counter(status["status"].to_pylist())
    print(
        f"ok {counts['ok']}, skipped {counts['skipped']}, failed {counts['failed']}, shards reused "
        f"{num_reused}"
    )
    return Exit.COMPLETE if counts["ok"] and not counts["failed"] else Exit.FINISHED_WITH_FAILED_ITEMS


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(teach, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
