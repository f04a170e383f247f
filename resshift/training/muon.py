"""Muon: gradient descent with orthogonalised momentum (kellerjordan.github.io/posts/muon, 2024).

A step is the momentum of a weight matrix with its singular values set to about one. Directions in which the
gradient is small move as far as the others. It is meant for matrices inside a network; AdamW trains the first
and the last layer and the biases.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

# An odd polynomial of degree five, applied five times: singular values from 0.01 to 1 end near 0.7 to 1.2.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return the (rows, columns) matrix with the same singular vectors and singular values near one.

    It is computed by Newton-Schulz iteration.
    """
    a, b, c = _COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (torch.linalg.matrix_norm(wide) + 1e-12)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide is matrix else x.T


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum. The matrix of a convolution has one row per output channel.

    As the fused optimisers of torch, it takes no step if the attribute `found_inf` is a tensor of 1.

    Args:
        parameters: weights of two or more dimensions.
        lr: singular values of a step; times sqrt(rows / columns) if there are more rows than columns.
        momentum: rate of the running mean of gradients.
        weight_decay: shrinkage of the weights per step, as a fraction of `lr`.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  # no closure
        """Take one step."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        taken = 1.0 if found_inf is None else 1.0 - found_inf
        for group in self.param_groups:
            lr, momentum = taken * group["lr"], group["momentum"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                gradient = parameter.grad
                if found_inf is not None:
                    gradient = torch.where(found_inf > 0, state["mean"], gradient)
                mean = state["mean"].lerp_(gradient, 1 - momentum)
                update = orthogonalised(gradient.lerp(mean, momentum).flatten(1))
                stretch = math.sqrt(max(1.0, update.shape[0] / update.shape[1]))
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.sub_(update.reshape(parameter.shape) * (lr * stretch))
