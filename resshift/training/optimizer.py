"""One optimiser step on the device: learning rate, gradient norm, and a step that is skipped when the
gradient is not finite.

Nothing here waits for the device. The fused AdamW reads `found_inf` on the device and, if it is 1, does not
change weights, moments or its step count, as with torch's own gradient scaler. The host learns of a skipped
step when it reads the running means.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.distributed.tensor import DTensor

from resshift.config import OptimConfig, TrainConfig


class Outcome(NamedTuple):
    """Outcome of a step, on the device.

    Fields:
        grad_norm: Norm of the gradient before clipping.
        finite: Whether it was finite, so that the step was taken.
    """

    grad_norm: Tensor
    finite: Tensor


def run_learning_rate(step: int, optim: OptimConfig, train: TrainConfig) -> float:
    """Return `learning_rate` of a run, with the factor of its batch size (`OptimConfig.lr_factor`)."""
    return optim.lr_factor(train.batch_size) * learning_rate(step, optim, train.steps)


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


def adamw(network: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """Return the optimiser of a network that is already on its device and, if it is to be, sharded."""
    return torch.optim.AdamW(
        [parameter for parameter in network.parameters() if parameter.requires_grad],
        lr=optim.lr,
        betas=optim.betas,
        weight_decay=optim.weight_decay,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def guarded_step(optimizer: torch.optim.Optimizer, clip_norm: float | None, scaler: GradScaler) -> Outcome:
    """Clip the gradients, take the step if they are finite, and free them.

    Gradients are already averages over all workers, so every worker takes the same decision.

    Args:
        optimizer: Fused optimiser of parameters with gradients.
        clip_norm: Largest norm of the gradient; None does not clip.
        scaler: Scaler of the loss; it has no effect unless it is enabled.
    """
    scaler.unscale_(optimizer)
    gradients: list[Tensor] = [
        p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None
    ]
    grad_norm = _total_norm(gradients)
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(
            (p for group in optimizer.param_groups for p in group["params"]), clip_norm, grad_norm
        )
    finite = grad_norm.isfinite()
    # torch's scaler passes `found_inf` to its fused optimisers in this attribute, which has no type.
    fused: Any = optimizer
    fused.found_inf = (~finite).float()
    optimizer.step()
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return Outcome(grad_norm, finite)


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
