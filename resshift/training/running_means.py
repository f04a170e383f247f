"""Means of the loss terms between two log lines, and the number of skipped steps; kept on the device, so that
no step waits for it.

The means belong to the run and not to the process: they are part of the checkpoint, and a log line whose
window holds a restart is the same as without the restart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from resshift.training.optimizer import Outcome


class RunningMeans:
    """Means over the steps since the last log line, kept as sums.

    Args:
        names: Names of the loss terms.
        device: Device of the network.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names = tuple(names)
        self.steps = 0
        # Sums of the terms and of the gradient's norm, and the number of steps taken. A skipped step adds
        # nothing.
        self.sums = torch.zeros(len(self.names) + 2, dtype=torch.float64, device=device)
        self.skipped = torch.zeros(2, dtype=torch.int64, device=device)  # in total, and since the last taken
        self._total_only = torch.tensor([1, 0], device=device)

    def add(self, terms: Mapping[str, Tensor], outcome: Outcome) -> None:
        """Add one step.

        Args:
            terms: Contribution of this worker to the mean of each term over the global batch.
            outcome: Outcome of the step.
        """
        one = torch.ones((), device=self.sums.device)
        row = torch.stack(
            [*(terms[name].float() for name in self.names), outcome.grad_norm.float(), one]
        ).double()
        self.sums += torch.where(outcome.finite, row, 0.0)
        self.skipped = torch.where(outcome.finite, self.skipped * self._total_only, self.skipped + 1)
        self.steps += 1

    def _over_workers(self) -> Tensor:
        """Sum the terms over the workers; norm and count are equal on all. A collective operation."""
        sums = self.sums.clone()
        if dist.is_initialized() and dist.get_world_size() > 1:
            terms = sums[:-2].contiguous()
            dist.all_reduce(terms)
            sums[:-2] = terms
        return sums

    def pop(self) -> dict[str, float]:
        """Return the mean of each term and of "grad_norm" over the steps taken since the last call, and reset
        the sums.

        A collective operation, and the only one that waits for the device. NaN if every step was skipped.
        """
        *sums, count = self._over_workers().tolist()
        self.sums.zero_()
        self.steps = 0
        return {
            name: total / count if count else math.nan
            for name, total in zip([*self.names, "grad_norm"], sums, strict=True)
        }

    def skips(self) -> tuple[int, int]:
        """Return the numbers of steps skipped in total and since the last one taken. Waits for the device."""
        total, in_a_row = self.skipped.tolist()
        return int(total), int(in_a_row)

    def state_dict(self) -> dict[str, Any]:
        """Return the state, with sums over all workers. A collective operation."""
        return {
            "names": list(self.names),
            "steps": self.steps,
            "sums": self._over_workers().cpu(),
            "skipped": self.skipped.cpu(),
        }

    def load_state_dict(self, state: Mapping[str, Any], rank: int = 0) -> None:
        """Restore a state; the first worker carries the sums of all.

        Raises:
            ValueError: The state has other loss terms.
        """
        if state["names"] != list(self.names):
            raise ValueError(
                f"the checkpoint has the loss terms {state['names']}, this run {list(self.names)}"
            )
        self.steps = state["steps"]
        sums = state["sums"].to(self.sums.device, copy=True)
        if rank:
            sums[:-2] = 0
        self.sums.copy_(sums)
        self.skipped.copy_(state["skipped"])
