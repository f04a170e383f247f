"""The common part of both training commands: flags, and the way from a configuration to a summary.

Lines for the user go to standard output through `sys.stdout`: this is the body of a command.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from pipelines.command import (
    Exit,
    UsageError,
    add_settings,
    connect_to_ray,
    min_max,
    on_a_cluster,
    quiet_ray_data,
)

if TYPE_CHECKING:
    from pipelines.training.trainer import Summary
    from resshift.training.autoencoder import AnyRunConfig


def add_arguments(options: argparse.ArgumentParser, preset: str) -> argparse.ArgumentParser:
    """Add the flags of a training command; they are a contract, new knobs are fields of the configuration."""
    options.add_argument("--preset", required=True, help=f"named configuration, for example {preset}")
    options.add_argument("--data", help="shards written by jobs/prepare.py")
    options.add_argument("--out", help="run directory, local or s3://")
    add_settings(options)
    options.add_argument(
        "--workers",
        default="1",
        metavar="N|MIN:MAX",
        help="number of training processes, or a minimum and a maximum (default 1)",
    )
    options.add_argument(
        "--gpus-per-worker",
        type=float,
        default=None,
        help="0 trains on CPUs; below 1, workers share a GPU (default: 1 where the cluster has GPUs, else 0)",
    )
    options.add_argument(
        "--init", metavar="WEIGHTS", help="begin with these weights: ours (.safetensors) or a released .pth"
    )
    options.add_argument("--val", metavar="LQ:GT|SHARDS", help="held-out pictures to measure while training")
    options.add_argument(
        "--export",
        metavar="DIR",
        help="at the end, write model and card here; hf://OWNER/NAME pushes them to a hub",
    )
    options.add_argument(
        "--dry-run",
        action="store_true",
        help="check and print the configuration and what would be trained on; needs neither --data nor --out",
    )
    return options


def train_from(options: argparse.Namespace, config: AnyRunConfig) -> Exit:
    """Check the configuration against the data and the run directory, train, export, print the summary."""
    from pipelines.ledger.lease import held
    from pipelines.shards.parquet import read_manifest
    from pipelines.training.batch import sharing
    from pipelines.training.preflight import check_run, local_workers
    from resshift.config import to_dict

    least, most = min_max("--workers", options.workers)
    if not on_a_cluster():
        most = local_workers(least, most)
    for flag in ("data", "out"):
        if getattr(options, flag) is None and not options.dry_run:
            raise UsageError(f"--{flag} is required to train")
    length = f"{config.train.steps} steps of {config.train.batch_size}"
    num_pictures: int | None = None
    if options.data is None:
        _say(f"no --data, {length}")
    else:
        shards = read_manifest(options.data)
        num_pictures = sum(s.num_ok for s in shards)
        _say(f"{num_pictures} pictures in {len(shards)} shards, {length}")
    asked = options.gpus_per_worker or 0.0
    check_run(config, options.data, num_pictures, most=most, gpus=asked, init=options.init, val=options.val)
    if options.dry_run:
        _say(sharing(config, least, most))
        _say(json.dumps(to_dict(config), indent=2))
        return Exit.COMPLETE
    with held(options.out):
        return _train(options, config, least, most)


def _train(options: argparse.Namespace, config: AnyRunConfig, least: int, most: int) -> Exit:
    from pipelines.cluster.admission import wait_for_room
    from pipelines.cluster.capacity import reachable
    from pipelines.cluster.granted import DeviceError
    from pipelines.training.batch import check_batch, sharing
    from pipelines.training.export import export
    from pipelines.training.failures import TrainingStopped
    from pipelines.training.trainer import plan_workers, run_training
    from resshift.training.step import TrainingDiverged

    connect_to_ray(num_cpus=most + 3)
    quiet_ray_data()
    have = reachable()
    workers = plan_workers(least, most, options.gpus_per_worker, have)
    check_batch(config, most, workers.gpus)
    # What is free, not what there is: other jobs hold the rest for as long as they run.
    room = wait_for_room("training", {"CPU": 2.0, "GPU": least * workers.gpus})
    workers = plan_workers(least, most, workers.gpus, {**have, "CPU": room["CPU"]})
    _say(sharing(config, least, most))
    try:
        summary = run_training(config, options.data, options.out, workers, init=options.init, val=options.val)
    except (TrainingStopped, TrainingDiverged, DeviceError) as error:
        sys.stderr.write(f"error: {error}\n")
        return Exit.FAILED
    _say(_ended(summary, options.out.rstrip("/")))
    if options.export:
        _say(f"exported to {export(options.out, config, summary.step, options.export)}")
    return Exit.COMPLETE


def _ended(summary: Summary, out: str) -> str:
    """Return the last lines of a run: where it ended, what it measured, which checkpoint is best, where the
    model is.
    """
    loss, rate = summary.line.get("loss", float("nan")), summary.line.get("images_per_s", 0.0)
    lines = [f"done: step {summary.step}, loss {loss:.4f}, {rate:.3g} images/s"]
    if summary.line.get("skipped"):
        lines.append(
            f"skipped {summary.line['skipped']:.0f} steps whose gradient was not finite; pictures in "
            f"{out}/skipped"
        )
    if summary.validation:
        lines.append(
            "validation: "
            + ", ".join(f"{name} {value:.4f}" for name, value in summary.validation.items() if name != "step")
        )
    if summary.best:
        lines.append(f"best checkpoint: {out}/step-{summary.best[0]:08d} ({summary.best[1]:.4f})")
    return "\n".join([*lines, f"model in {out}/model"])


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
