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
from resshift.training.muon import Muon


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
    return _adamw([parameter for parameter in network.parameters() if parameter.requires_grad], optim)


def _adamw(parameters: Sequence[Tensor], optim: OptimConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, fused=True
    )


def muon_and_adamw(network: nn.Module, optim: OptimConfig) -> dict[str, torch.optim.Optimizer]:
    """Return the optimisers of a network of convolutions, by name: "model" is AdamW, and with `optim.muon`
    "muon" is that of all convolutions except the first and the last of the network and of its part
    `regression`.

    They have all parameters, frozen ones too, which they leave as they are while these have no gradient.
    """
    inner, outer = [], []
    for name, parameter in network.named_parameters():
        is_end = name.removeprefix("regression.").startswith(("stem", "head"))
        (inner if optim.muon and parameter.ndim == 4 and not is_end else outer).append(parameter)
    found: dict[str, torch.optim.Optimizer] = {"model": _adamw(outer, optim)}
    if optim.muon:
        found["muon"] = Muon(inner)
        found["muon"].param_groups[0]["lr_factor"] = optim.muon
    return found


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group of parameters, times its factor if it has one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def guarded_step(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    clip_norm: float | None,
    scaler: GradScaler,
) -> Outcome:
    """Clip the gradients, take the step if they are finite, and free them.

    Gradients are already averages over all workers, so every worker takes the same decision.

    Args:
        optimizer: Fused optimiser of parameters with gradients, or several that share the parameters of one
            network.
        clip_norm: Largest norm of the gradient; None does not clip.
        scaler: Scaler of the loss; it has no effect unless it is enabled.
    """
    optimizers = [optimizer] if isinstance(optimizer, torch.optim.Optimizer) else optimizer
    parameters: list[Tensor] = []
    for one in optimizers:
        scaler.unscale_(one)
        parameters += [p for group in one.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = _total_norm([p.grad for p in parameters if p.grad is not None])
    if clip_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip_norm, grad_norm)
    finite = grad_norm.isfinite()
    for one in optimizers:
        # torch's scaler passes `found_inf` to its fused optimisers in this attribute, which has no type.
        fused: Any = one
        fused.found_inf = (~finite).float()
        one.step()
    scaler.update()
    for one in optimizers:
        one.zero_grad(set_to_none=True)
    return Outcome(grad_norm, finite)


def _total_norm(gradients: Sequence[Tensor]) -> Tensor:
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
