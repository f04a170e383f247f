"""Training runs on Ray Train: workers, whether a run may continue, and how it is restarted.

Ray restarts the workers after a failure; they go on from the latest checkpoint
(`pipelines.training.checkpoints`), whatever their number is then. Running the same command again does the
same from a new driver.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import ray
import ray.train
from ray.train import TrainingFailedError
from ray.train.torch import TorchTrainer

from pipelines.cluster import ray_internals
from pipelines.evaluation.evaluate import folders_of
from pipelines.training.batch import check_batch
from pipelines.training.checkpoints import newest_step, read_best
from pipelines.training.collectives import Collectives
from pipelines.training.failures import Restarts, told
from pipelines.training.log import read_lines
from pipelines.training.worker import Assignment, train_worker
from resshift import storage
from resshift.config import ConfigError, differing_fields, to_dict
from resshift.models import is_elsewhere, is_weight_file, local_path
from resshift.training import checkpoint
from resshift.training.autoencoder import AnyRunConfig

logger = logging.getLogger(__name__)
# Of an attempt that is begun anew; lines and pictures of metrics are removed by `TrainLog`.
_LEFT_BEHIND = ("seen/", "skipped/")


@dataclass(frozen=True, kw_only=True, slots=True)
class Workers:
    """The workers of a run: between `least` and `most`. `cpus` is the share of logical CPUs that each
    reserves; data tasks need some too.
    """

    least: int = 1
    most: int = 1
    gpus: float = 0.0
    cpus: float = 1.0


def plan_workers(
    least: int, most: int, gpus_per_worker: float | None, cluster: Mapping[str, float]
) -> Workers:
    """Choose what each worker reserves, and refuse what cannot work.

    Args:
        least: Smallest number of workers; with fewer the run waits.
        most: Largest number of workers, to which the run grows.
        gpus_per_worker: GPUs of each, in [0, 1]; None takes one each when the cluster has any, else the CPU.
        cluster: `pipelines.cluster.capacity.reachable()`.

    Raises:
        ConfigError: The cluster cannot hold the workers, or would have no CPU left for data.
    """
    have_gpus, have_cpus = cluster.get("GPU", 0.0), cluster.get("CPU", 0.0)
    gpus = gpus_per_worker if gpus_per_worker is not None else float(have_gpus > 0)
    if not 0 <= gpus <= 1:
        raise ConfigError(
            f"--gpus-per-worker must lie in [0, 1], because a worker computes on one GPU, got {gpus:g}"
        )
    if gpus * least > have_gpus:
        raise ConfigError(
            f"{least} workers with {gpus:g} GPUs each need {gpus * least:g}, the cluster has {have_gpus:g}: "
            "ask for fewer workers, or for CPUs with --gpus-per-worker 0"
        )
    if have_cpus < 2:
        raise ConfigError(
            f"training needs at least 2 logical CPUs for workers and data, the cluster has {have_cpus:g}"
        )
    # Reading, degrading and Ray Data's own actors need one CPU each; with none left the run hangs
    # without an error.
    cpus = min(1.0, (have_cpus - 1) / 2 / most) if have_cpus < most + 2 else 1.0
    return Workers(least=least, most=most, gpus=gpus, cpus=cpus)


def begin_run(config: AnyRunConfig, data: str, out: str) -> None:
    """Write `run.json` into a new run directory, or check that an existing one is this run. A run that ended
    before its first checkpoint has nothing to lose: its directory takes another configuration.

    Nobody else may be training there.

    Raises:
        ResumeRefused: The directory holds another run.
        ConfigError: It holds this run, and further than it is to go.
    """
    record_uri = storage.join(out, "run.json")
    if storage.exists(record_uri):
        reached = newest_step(out)
        record = json.loads(storage.read_bytes(record_uri))
        differing = differing_fields(to_dict(config), record["config"])
        if reached or not differing:
            checkpoint.check_same_run(config, record, out)
            if reached > config.train.steps:
                raise ConfigError(
                    f"{out} is at step {reached} already, beyond train.steps={config.train.steps}"
                )
            return
        logger.warning("%s has no checkpoint and is begun anew with %s", out, "; ".join(differing))
        _forget_attempt(out)
    record = checkpoint.run_record(config, data=storage.printable(data), ray=ray.__version__)
    storage.write_bytes(record_uri, (json.dumps(record, indent=2) + "\n").encode())


def _forget_attempt(out: str) -> None:
    """Remove what the attempt before has noted of its samples."""
    for entry in list(storage.list_entries(out)):
        if entry.key.startswith(_LEFT_BEHIND):
            storage.remove(entry.uri)


def absolute(uri: str) -> str:
    """Return a local path that is the same in every process; s3:// and hf:// unchanged."""
    return uri if is_elsewhere(uri) else os.path.abspath(local_path(uri))


def absolute_model(source: str) -> str:
    """Return the source of weights so that it means the same in every process: paths are made absolute, names
    stay.
    """
    return absolute(source) if is_weight_file(source) or local_path(source).exists() else source


def with_absolute_files(config: AnyRunConfig) -> AnyRunConfig:
    """Return the configuration with the files that it names: Ray Train's workers have another working
    directory than the command.
    """
    stage = config.train.first_stage_weights
    trunks = {name: getattr(config.loss, name, None) for name in ("lpips_trunk", "features_trunk")}
    given = {name: absolute_model(trunk) for name, trunk in trunks.items() if trunk}
    loss: Any = replace(config.loss, **given)
    return replace(
        config, loss=loss, train=replace(config.train, first_stage_weights=stage and absolute_model(stage))
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """The end of a run: the last step, its last log line, the last validation, and the best checkpoint (step,
    figure).
    """

    step: int
    line: dict[str, Any]
    validation: dict[str, Any]
    best: tuple[int, float] | None


def run_training(
    config: AnyRunConfig,
    data: str,
    out: str,
    workers: Workers,
    *,
    init: str | None = None,
    val: str | None = None,
    check_resize_s: float = 60.0,
) -> Summary:
    """Train until `config.train.steps`, from the latest checkpoint in `out` if there is one, and publish the
    model.

    Args:
        config: Configuration of the run.
        data: Shards that `jobs/prepare.py` wrote.
        out: Run directory, local path or s3://. Holds run.json, step-*/ checkpoints, metrics/, and at the end
            model/.
        workers: Number of workers and what each reserves.
        init: Weights to start from.
        val: Validation set, see `pipelines.training.validation`.
        check_resize_s: Seconds between two checks for more workers of an elastic run; growing costs a
            restart.

    Raises:
        ConfigError: The batch cannot be shared by the workers, or a worker found another mistake.
        ResumeRefused: `out` holds another run.
        WeightsError: Weights or a checkpoint cannot be used.
        TrainingDiverged: The gradients of too many steps were not finite.
        TrainingStopped: It failed too often, or in a way that another attempt would repeat.
    """
    check_batch(config, workers.most, workers.gpus)
    data, out = absolute(data), absolute(out)
    begin_run(config, data, out)
    assignment = Assignment(
        config=with_absolute_files(config),
        data=data,
        out=out,
        held_cpus=workers.most * workers.cpus,
        init=init and absolute_model(init),
        val=val and ":".join(map(absolute, folders_of(val))),
    )
    parent, _, name = out.rstrip("/").rpartition("/")
    elastic = workers.least < workers.most
    train = config.train
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"assignment": assignment.to_json()},
        # Workers that start wait for the one that reads the checkpoint.
        torch_config=Collectives(gpus=workers.gpus, timeout_s=max(60, round(4 * train.step_timeout_s))),
        scaling_config=ray.train.ScalingConfig(
            num_workers=(workers.least, workers.most) if elastic else workers.most,
            use_gpu=workers.gpus > 0,
            resources_per_worker={"CPU": workers.cpus} | ({"GPU": workers.gpus} if workers.gpus else {}),
            elastic_resize_monitor_interval_s=check_resize_s,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=parent or "/",
            worker_runtime_env={"env_vars": ray_internals.METADATA_INLINE},
        ),
    )
    restarts = Restarts(train.max_failures, train.failure_window_s, partial(newest_step, out))
    ray_internals.ask_before_restarts(trainer, restarts.allow)
    if workers.gpus:
        ray_internals.detect_nccl_hangs(train.step_timeout_s)
    try:
        with ray_internals.ray_train_asks_this_cluster():
            trainer.fit()
    except TrainingFailedError as error:
        raise told(error) from error
    lines, validations = read_lines(out), read_lines(out, "validation")
    return Summary(
        step=int(lines[-1]["step"]) if lines else config.train.steps,
        line=lines[-1] if lines else {},
        validation=validations[-1] if validations else {},
        best=read_best(out),
    )
