"""What can be known to be wrong with a training run before Ray starts and before anything is written."""

from __future__ import annotations

import os

import torch

from pipelines.command import UsageError
from pipelines.shards.taught import check_pairs
from pipelines.training.batch import check_batch
from pipelines.training.build_learner import build_objective, features_of, lpips_of, needs_lpips, teacher_of
from pipelines.training.validation import held_out
from resshift import storage
from resshift.config import ConfigError, RunConfig
from resshift.models import unet_file
from resshift.training.autoencoder import AnyRunConfig, build_autoencoder
from resshift.training.step import build_network, part_for
from resshift.weights import load_into, read_state_dict


def check_run(
    config: AnyRunConfig,
    data: str | None,
    num_pictures: int | None,
    *,
    most: int,
    gpus: float = 0.0,
    init: str | None,
    val: str | None,
) -> None:
    """Check a run against its data and against the files that it names.

    Args:
        config: Configuration of the run.
        data: Shards, for messages.
        num_pictures: Number of pictures in them that can be used; None if that is not known yet.
        most: Largest number of workers.
        gpus: GPUs of each, if they were asked for.
        init: Weights to start from.
        val: Validation set.

    Raises:
        UsageError: There is nothing to train on.
        ConfigError: The run cannot be trained like that; the message is one line.
        WeightsError: Weights are missing or do not fit.
        StorageError: A file cannot be read.
    """
    batch_size = config.train.batch_size
    where = storage.printable(str(data))
    if num_pictures == 0:
        raise UsageError(
            f"{where} holds no usable picture: {where.rstrip('/')}/status.parquet says why, and what "
            "jobs/prepare.py printed"
        )
    if num_pictures is not None and batch_size > num_pictures:
        raise ConfigError(
            f"train.batch_size must be at most {num_pictures}, the number of pictures in {where}, got "
            f"{batch_size}"
        )
    if data is not None and isinstance(config, RunConfig):
        check_pairs(data, config)
    check_batch(config, most, gpus)
    if config.validation.best == "lpips" and val is not None and not needs_lpips(config):
        raise ConfigError("validation.best=lpips needs an LPIPS network: loss.lpips must not be 0")
    check_weights(config, init)
    if val is not None:
        held_out(val, 1, config.train.seed, config.data, config.degradation)


def check_weights(config: AnyRunConfig, init: str | None) -> None:
    """Load what every worker will load: the trunks of LPIPS and of the features, the first stage, the
    teacher and the weights to start from. A few seconds, instead of the minutes until a cluster has started.

    Raises:
        ConfigError: A trunk or the first stage is missing.
        WeightsError: Weights are missing or do not fit.
    """
    cpu = torch.device("cpu")
    lpips = lpips_of(config, cpu)
    if isinstance(config, RunConfig):
        build_objective(config, lpips, cpu)
        if config.distill is not None and config.distill.form == "rsd":
            teacher_of(config, config.distill)
        features_of(config, cpu)
    if init is not None:
        is_chain = isinstance(config, RunConfig)
        network = build_network(config) if is_chain else build_autoencoder(config, cpu)
        weights = read_state_dict(unet_file(init))
        load_into(*part_for(network, weights))


def local_workers(least: int, most: int) -> int:
    """Return the largest number of workers of a run on this machine alone, which has no other nodes to grow
    to.

    Raises:
        ConfigError: It cannot have the smallest number.
    """
    num_cores = max(os.cpu_count() or 1, 4)  # of small machines more: processes of tests share them
    if least > num_cores:
        raise ConfigError(
            f"--workers must be at most {num_cores} on this machine, which has {os.cpu_count()} cores, got "
            f"{least}; on a cluster submit the command as a job (docs/operate.md)"
        )
    return min(most, num_cores)
