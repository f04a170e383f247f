"""Training in plain PyTorch: the state of a run, one step of it, and nothing about where batches or machines come from.

Everything random in a step is drawn from (seed, step, rank), the learning rate is a function of the step, and what a batch holds is decided
by the data pipeline from (seed, step): a state that is saved and loaded continues the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from resshift import seeds
from resshift.config import OptimConfig, RunConfig, TrainConfig
from resshift.losses import LossTerms, Objective
from resshift.unet import UNetSwin

Module = TypeVar("Module", bound=nn.Module)


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite; the message names the pictures of the last one."""


@dataclass
class TrainState:
    """What a run is made of. `network` may be wrapped by DDP; `ema` and `plain` never are.

    `rows` counts the rows of the data stream that all workers together have consumed: where the data goes on after a restart.
    """

    network: nn.Module
    ema: AveragedModel
    optimizer: torch.optim.Optimizer
    step: int = 0
    rows: int = 0
    skipped_in_a_row: int = 0
    skipped: int = 0

    @property
    def plain(self) -> nn.Module:
        """The network without its DDP wrapper."""
        return self.network.module if isinstance(self.network, DistributedDataParallel) else self.network

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the two sets of weights, which are stored as safetensors."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "rows": self.rows,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "ema_updates": int(self.ema.n_averaged),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.rows = state["rows"]
        self.skipped, self.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.ema.n_averaged.fill_(state["ema_updates"])


def build_network(config: RunConfig) -> UNetSwin:
    """Return the network with its initial weights, a function of the run's seed alone (on every worker the same)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(config.train.seed, "init") % 2**63)
        return UNetSwin(config.model.unet)


def on_device(module: Module, device: torch.device) -> Module:
    """Move a module, and store its convolutions channels-last: twice as fast on CPUs, and what tensor cores want."""
    return cast(Any, module).to(device=device, memory_format=torch.channels_last)


def build_state(config: RunConfig, network: nn.Module) -> TrainState:
    """Return the state at step 0 of a network that is already on its device (and already wrapped, if it is to be)."""
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.optim.lr, betas=config.optim.betas, weight_decay=config.optim.weight_decay
    )
    plain = network.module if isinstance(network, DistributedDataParallel) else network
    ema = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(config.train.ema_decay))
    return TrainState(network, ema.requires_grad_(False), optimizer)


def learning_rate(step: int, optim: OptimConfig, num_steps: int) -> float:
    """Return the learning rate of the step with index `step` (from 0).

    warm-up:  lr (step + 1) / warmup_steps
    cosine:   lr_end + (lr - lr_end) (1 + cos(pi p)) / 2,  p from 0 after the warm-up to 1 at the last step
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.lr_schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(1, num_steps - 1 - optim.warmup_steps)
    return optim.lr_end + 0.5 * (optim.lr - optim.lr_end) * (1 + math.cos(math.pi * min(1.0, progress)))


def to_unit_range(pictures_u8: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [-1, 1]. On the device: bytes travel four times lighter than floats."""
    return pictures_u8.permute(0, 3, 1, 2).float() / 127.5 - 1


def micro_batches(batch_rows: int, micro_batch: int) -> list[slice]:
    """Cut a worker's batch into slices of at most `micro_batch` rows, as equal as they can be."""
    count = -(-batch_rows // micro_batch)
    edges = [round(i * batch_rows / count) for i in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(edges)]


def train_step(
    state: TrainState, objective: Objective, batch: Mapping[str, Tensor], config: RunConfig, *, rank: int = 0, keys: Sequence[str] = ()
) -> dict[str, float]:
    """Do one optimiser step on a worker's share of the global batch.

    Args:
        state: changed in place; `state.step` grows by one even when the step is skipped.
        objective: the loss.
        batch: "hq" (B, H, W, 3) and "lq" (B, H / scale, W / scale, 3), uint8, on the device of the network.
        config: of the run.
        rank: of this worker; draws its own noise.
        keys: names of the samples, for the message when the loss is not finite.

    Returns:
        Metrics of the step: loss, mse, lpips (this worker's means), lr, grad_norm, and skipped (1 when the gradient was not finite).

    Raises:
        TrainingDiverged: `train.max_skipped_steps` steps in a row were skipped.
    """
    train = config.train
    device = batch["hq"].device
    # Dropout draws from torch's own stream: setting it from the step makes a resumed run draw the same.
    torch.manual_seed(seeds.derive(train.seed, "dropout", state.step, rank) % 2**63)
    generator = seeds.torch_generator(train.seed, "train", state.step, rank, device=device)
    lr = learning_rate(state.step, config.optim, train.steps)
    for group in state.optimizer.param_groups:
        group["lr"] = lr

    state.network.train()
    terms = _accumulate_gradients(state.network, objective, batch, train, generator)
    norm_limit = config.optim.clip_norm if config.optim.clip_norm is not None else math.inf
    grad_norm = float(torch.nn.utils.clip_grad_norm_(state.network.parameters(), norm_limit))
    # Gradients are already averaged over the workers, so every worker takes the same branch here.
    if math.isfinite(grad_norm):
        state.optimizer.step()
        state.ema.update_parameters(state.plain)
        state.skipped_in_a_row = 0
    else:
        state.skipped += 1
        state.skipped_in_a_row += 1
        if state.skipped_in_a_row >= train.max_skipped_steps:
            raise TrainingDiverged(
                f"the gradient was not finite for {state.skipped_in_a_row} steps in a row, last at step {state.step} with {list(keys)}"
            )
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    return {
        "loss": float(terms.total.detach()),
        "mse": float(terms.mse),
        "lpips": float(terms.lpips),
        "lr": lr,
        "grad_norm": grad_norm,
        "skipped": float(not math.isfinite(grad_norm)),
    }


def _accumulate_gradients(
    network: nn.Module, objective: Objective, batch: Mapping[str, Tensor], train: TrainConfig, generator: torch.Generator
) -> LossTerms:
    """Backward through the micro-batches; DDP averages over workers at the last one only."""
    rows = batch["hq"].shape[0]
    parts = micro_batches(rows, train.micro_batch)
    sums = [torch.zeros((), device=batch["hq"].device) for _ in range(3)]
    for i, part in enumerate(parts):
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = i == len(parts) - 1
        hq, lq = to_unit_range(batch["hq"][part]), to_unit_range(batch["lq"][part])
        with torch.autocast(hq.device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16"):
            terms = objective(network, hq, lq, generator)
        share = (part.stop - part.start) / rows
        (terms.total * share).backward()
        sums = [total + term.detach() * share for total, term in zip(sums, terms, strict=True)]
    return LossTerms(*sums)
