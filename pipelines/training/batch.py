"""How workers share the batch of a step: checked before a run begins, and told.

The batch is `train.batch_size` whatever the number of workers, so more GPUs have less to do for each step,
and below `train.micro_batch` samples they are not busy. More GPUs pay with a larger batch, in fewer steps and
with a learning rate for it.
"""

from __future__ import annotations

from resshift.config import ConfigError, RunConfig
from resshift.training.autoencoder import AnyRunConfig
from resshift.training.slots import Slots


def check_batch(config: AnyRunConfig, most: int, gpus: float) -> None:
    """Refuse a batch that the workers cannot share, or that leaves their GPUs idle.

    Args:
        config: Configuration of the run.
        most: Largest number of workers.
        gpus: GPUs of each.

    Raises:
        ConfigError: The message names the numbers, and settings that would do.
    """
    train, optim = config.train, config.optim
    batch, micro = train.batch_size, train.micro_batch
    if batch < most:
        raise ConfigError(f"train.batch_size ({batch}) must be at least the number of workers ({most})")
    share = batch // most
    if not gpus or most == 1 or share >= micro:
        return
    larger = micro * most
    settings = {
        "train.batch_size": larger,
        "optim.lr_batch": optim.lr_batch or batch,
        "train.steps": max(1, round(train.steps * batch / larger)),
        "optim.warmup_steps": round(optim.warmup_steps * batch / larger),
    }
    told = " ".join(f"--set {name}={value}" for name, value in settings.items())
    raise ConfigError(
        f"train.batch_size={batch} gives {most} GPUs {share} samples a step each, less than "
        f"train.micro_batch={micro}: use at most {max(1, batch // micro)} workers, or a larger batch for as "
        f"many samples in all ({told}), or say that so few are enough (--set train.micro_batch={share})"
    )


def sharing(config: AnyRunConfig, least: int, most: int) -> str:
    """Return a line that says what each worker does in a step, for the smallest and the largest number of
    workers.
    """
    train, optim = config.train, config.optim
    parts = [_share(train.batch_size, train.micro_batch, number) for number in sorted({least, most})]
    stages = config.stages if isinstance(config, RunConfig) else ()
    rates = [optim.lr if stage.lr is None else stage.lr for stage in stages if stage.steps != 0]
    told = [f"{rate * optim.lr_factor(train.batch_size):.3g}" for rate in rates or [optim.lr]]
    return f"a step of {train.batch_size}: {'; '.join(parts)}; learning rate {', '.join(told)}"


def _share(batch: int, micro: int, workers: int) -> str:
    slots = [Slots.of_rank(batch, rank, workers) for rank in range(workers)]
    shares = sorted({one.stop - one.start for one in slots})
    passes = max(len(one.micro_batches(micro)) for one in slots)
    samples = " or ".join(map(str, shares))
    count = "1 worker" if workers == 1 else f"{workers} workers"
    return f"{count} x {samples} samples in " + (f"{passes} micro-batches" if passes > 1 else "1 micro-batch")
