"""`resshift.training` on Ray Train: where workers, shards, checkpoints and restarts meet the plain loop.

Ray restarts the workers after a failure; they start from the last committed checkpoint. Running the same command again does the same from a
new driver. `ray.train.report` blocks for up to two seconds, so it is called for checkpoints only.

Every worker runs a Ray Data pipeline of its own over its slots of each batch (`pipelines.pairs.rank_batches`): what a step holds depends on
the seed and the step alone, so resuming is exact with any number of workers.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer, prepare_model
from torch import Tensor

from pipelines.command import quiet_ray_data
from pipelines.pairs import Batch as PairBatch
from pipelines.pairs import fair_share, rank_batches
from resshift import checkpoint, storage, weights
from resshift.autoencoder import build_first_stage
from resshift.config import ConfigError, RunConfig, from_dict, to_dict
from resshift.losses import Lpips, Objective
from resshift.training import TrainState, build_network, build_state, on_device, train_step

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """Who trains. `cpus` is the share of logical CPUs that a worker reserves; data tasks need some to be left."""

    num: int = 1
    gpus: float = 0.0
    cpus: float = 1.0


def plan_workers(num: int, gpus_per_worker: float | None, cluster: Mapping[str, float]) -> Workers:
    """Choose what each worker reserves, and refuse what cannot work.

    Args:
        num: of workers.
        gpus_per_worker: None takes one GPU each when the cluster has enough, else the CPU.
        cluster: `ray.cluster_resources()`.

    Raises:
        ConfigError: the cluster cannot hold the workers, or would have no CPU left for data.
    """
    if num < 1:
        raise ConfigError(f"--workers must be at least 1, got {num}")
    have_gpus, have_cpus = cluster.get("GPU", 0.0), cluster.get("CPU", 0.0)
    gpus = gpus_per_worker if gpus_per_worker is not None else (1.0 if have_gpus >= num else 0.0)
    if gpus * num > have_gpus:
        raise ConfigError(f"{num} workers with {gpus:g} GPUs each need {gpus * num:g}, the cluster has {have_gpus:g}")
    if have_cpus < 2:
        raise ConfigError(f"training needs at least 2 logical CPUs for workers and data, the cluster has {have_cpus:g}")
    # Reading, degrading and Ray Data's own actors need one CPU each; with none left everything waits for ever, silently.
    cpus = min(1.0, (have_cpus - 1) / 2 / num) if have_cpus < num + 2 else 1.0
    return Workers(num=num, gpus=gpus, cpus=cpus)


def begin_run(config: RunConfig, data: str, out: str) -> None:
    """Write `run.json` into a new run directory, or check that an existing one is this run.

    Raises:
        ResumeRefused: the directory holds another run.
    """
    record_uri = storage.join(out, "run.json")
    if storage.exists(record_uri):
        checkpoint.check_same_run(config, json.loads(storage.read_bytes(record_uri)), out)
        return
    record = checkpoint.run_record(config, data=storage.printable(data), versions_of_ray=ray.__version__)
    storage.write_bytes(record_uri, (json.dumps(record, indent=2) + "\n").encode())


def run_training(config: RunConfig, data: str, out: str, workers: Workers) -> dict[str, Any]:
    """Train until `config.train.steps`, from the latest checkpoint in `out` if there is one, and publish the model.

    Args:
        config: of the run.
        data: shards of `jobs/prepare.py`.
        out: run directory, local path or s3://. Holds run.json, step-*/ checkpoints, metrics/ and at the end model/.
        workers: who trains.

    Returns:
        Metrics of the last checkpoint.

    Raises:
        ConfigError: the batch cannot be shared by the workers.
        ResumeRefused: `out` holds another run.
        TrainingFailedError: Ray gave up restarting.
    """
    if config.train.batch_size % workers.num:
        raise ConfigError(f"train.batch_size ({config.train.batch_size}) must be a multiple of --workers ({workers.num})")
    data, out = (uri if storage.is_s3(uri) else os.path.abspath(uri.removeprefix("file://")) for uri in (data, out))
    begin_run(config, data, out)
    parent, _, name = out.rstrip("/").rpartition("/")
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"config": to_dict(config), "data": data, "out": out, "held_cpus": workers.num * workers.cpus},
        torch_config=TorchConfig(backend="nccl" if workers.gpus and torch.cuda.is_available() else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.num,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent or "/",
            failure_config=ray.train.FailureConfig(max_failures=3),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=config.train.keep_last),
        ),
    )
    result = trainer.fit()
    if result.checkpoint is None:
        raise RuntimeError(f"the run ended without a checkpoint; see {out}")
    with result.checkpoint.as_directory() as directory:
        publish_model(Path(directory), out)
    return dict(result.metrics or {})


def publish_model(checkpoint_directory: Path, out: str) -> None:
    """Copy the averaged weights of a checkpoint to `out`/model, a directory that `Upscaler.from_pretrained` takes; config.json is last."""
    for source, target in (("ema.safetensors", "model.safetensors"), ("config.json", "config.json")):
        storage.write_bytes(storage.join(out, f"model/{target}"), (checkpoint_directory / source).read_bytes())


def train_worker(settings: dict[str, Any]) -> None:
    """Run the loop on one worker; Ray Train calls this in every worker process."""
    quiet_ray_data()
    config = from_dict(RunConfig, settings["config"])
    context = ray.train.get_context()
    rank, num_ranks = context.get_world_rank(), context.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // context.get_local_world_size()))

    network = on_device(build_network(config), device)
    state = build_state(config, prepare_model(network, move_to_device=device))
    latest = ray.train.get_checkpoint()
    if latest is not None:
        with latest.as_directory() as directory:
            checkpoint.load(directory, state, config)
        if rank == 0:
            logger.info("resumed step=%d rows=%d", state.step, state.rows)
    objective = build_objective(config, device)

    log: list[dict[str, float]] = []
    started, first_step = time.monotonic(), state.step
    share = fair_share(num_ranks, settings["held_cpus"])
    batches = rank_batches(settings["data"], config, state.rows, rank=rank, num_ranks=num_ranks, share=share)
    for batch in _on_device(batches, config, state, device):
        metrics = train_step(state, objective, batch.tensors, config, rank=rank, keys=batch.keys)
        state.rows += config.train.batch_size
        if state.step % config.train.log_every == 0 or state.step == config.train.steps:
            per_second = (state.step - first_step) * config.train.batch_size / (time.monotonic() - started)
            log.append({"step": state.step, **metrics, "substituted": batch.substituted, "samples_per_s": per_second})
            if rank == 0:
                _log_line(config, log[-1])
        if state.step % config.train.checkpoint_every == 0 or state.step == config.train.steps:
            _report(config, state, rank, log, str(settings["out"]))
            log = []


def build_objective(config: RunConfig, device: torch.device) -> Objective:
    """Return the loss with its frozen networks on `device`.

    Raises:
        ConfigError: the preset needs weights of a first stage and none were given.
        WeightsError: they do not fit.
    """
    first_stage = build_first_stage(config.model.first_stage)
    if config.model.first_stage.kind == "vq":
        if config.train.first_stage_weights is None:
            raise ConfigError(f"preset {config.preset} needs the weights of its VQ autoencoder: --set train.first_stage_weights=FILE")
        weights.load_into(first_stage, weights.read_state_dict(config.train.first_stage_weights))
    first_stage = on_device(first_stage.eval().requires_grad_(False), device)
    lpips = Lpips(config.loss.lpips_net, config.loss.lpips_trunk).to(device) if config.loss.lpips else None
    return Objective(config.model, config.loss, first_stage, lpips)


@dataclass(frozen=True, slots=True)
class _Batch:
    tensors: dict[str, Tensor]
    keys: list[str]
    substituted: float


def _on_device(batches: Iterator[PairBatch], config: RunConfig, state: TrainState, device: torch.device) -> Iterator[_Batch]:
    """Yield this worker's batches until the run has all its steps."""
    while state.step < config.train.steps:
        batch = next(batches)
        # Copied: the arrays lie in Ray's shared memory, which is read-only.
        tensors = {name: torch.from_numpy(batch[name].copy()).to(device) for name in ("hq", "lq")}
        yield _Batch(tensors, [str(key) for key in batch["key"]], float(batch["substituted"].sum()))


def _report(config: RunConfig, state: TrainState, rank: int, log: list[dict[str, float]], out: str) -> None:
    """Hand a checkpoint to Ray Train; every worker calls this at the same step."""
    is_last = state.step == config.train.steps
    saved = None
    if rank == 0:
        directory = tempfile.mkdtemp(prefix="resshift-checkpoint-")
        checkpoint.save(directory, state, config)
        saved = ray.train.Checkpoint.from_directory(directory)
        lines = "".join(json.dumps(line) + "\n" for line in log)
        storage.write_bytes(storage.join(out, f"metrics/step-{state.step:08d}.jsonl"), lines.encode())
    last = log[-1] if log else {}
    ray.train.report(
        {"step": state.step, "rows": state.rows, "loss": last.get("loss", float("nan")), "skipped": state.skipped},
        checkpoint=saved,
        # Named by step: a restart that comes here again overwrites what a killed worker left behind.
        checkpoint_dir_name=f"step-{state.step:08d}",
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.SYNC if is_last else ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _log_line(config: RunConfig, metrics: dict[str, float]) -> None:
    remaining_s = (config.train.steps - metrics["step"]) * config.train.batch_size / metrics["samples_per_s"]
    logger.info(
        "step=%d/%d loss=%.4f mse=%.5f lpips=%.4f lr=%.2e grad_norm=%.3f samples_per_s=%.1f eta_min=%.1f",
        metrics["step"],
        config.train.steps,
        metrics["loss"],
        metrics["mse"],
        metrics["lpips"],
        metrics["lr"],
        metrics["grad_norm"],
        metrics["samples_per_s"],
        remaining_s / 60,
    )
