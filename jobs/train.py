"""Train a model on shards of photos, on any number of workers.

    python jobs/train.py --preset tiny-x4 --data shards --out runs/tiny --set train.steps=10000
    ray job submit --working-dir . -- python jobs/train.py --preset realsr-x4-s4 --data s3://bucket/shards \\
        --out s3://bucket/runs/realsr --workers 8 --set train.first_stage_weights=/weights/autoencoder_vq_f4.pth

To resume, run the same command again. OUT then holds run.json, the last checkpoints (step-*), metrics and, at the end, model/, which
`jobs/upscale.py --model OUT/model` and `Upscaler.from_pretrained` take.

Exit codes: 0 complete, 1 failed, 2 usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from pipelines.command import Exit, connect_to_ray, parser, quiet_ray_data, run


def arguments() -> argparse.ArgumentParser:
    """Return the command line."""
    options = parser(__doc__ or "")
    options.add_argument("--preset", required=True, help="named configuration, for example tiny-x4")
    options.add_argument("--data", required=True, help="shards written by jobs/prepare.py")
    options.add_argument("--out", required=True, help="run directory, local or s3://")
    options.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="change one setting; may be repeated")
    options.add_argument("--workers", type=int, default=1, help="training processes (default 1)")
    options.add_argument(
        "--gpus-per-worker", type=float, default=None, help="default: 1 when the cluster has a GPU for each worker, else 0"
    )
    options.add_argument("--dry-run", action="store_true", help="print the configuration and what would be trained on, then stop")
    return options


def train(options: argparse.Namespace) -> Exit:
    """Build the configuration, check it against the data and the run directory, train."""
    from pipelines.shards import read_manifest
    from resshift.config import to_dict, with_settings
    from resshift.presets import preset

    config = with_settings(preset(options.preset), options.set)
    shards = read_manifest(options.data)
    print(f"{sum(s.num_ok for s in shards)} pictures in {len(shards)} shards, {config.train.steps} steps of {config.train.batch_size}")
    if options.dry_run:
        print(json.dumps(to_dict(config), indent=2))
        return Exit.COMPLETE

    connect_to_ray(num_cpus=options.workers + 3)
    import ray

    from pipelines.trainer import plan_workers, run_training

    quiet_ray_data()
    workers = plan_workers(options.workers, options.gpus_per_worker, dict(ray.cluster_resources()))
    metrics = run_training(config, options.data, options.out, workers)
    print(f"done: step {metrics.get('step')}, loss {metrics.get('loss'):.4f}; model in {options.out.rstrip('/')}/model")
    return Exit.COMPLETE


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    return run(train, arguments(), argv)


if __name__ == "__main__":
    sys.exit(main())
