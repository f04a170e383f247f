"""How the workers of a run exchange gradients: NCCL where each has a GPU of its own, else gloo.

NCCL refuses two workers on one GPU, and a worker without CUDA. Such a worker is found before the process
group is made, because Ray would answer NCCL's error with one restart after the other: with gloo the workers
start, and end the run with one line (`pipelines.training.worker`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from ray.train.torch import TorchConfig

_RaysBackend: Any = TorchConfig().backend_cls


class _Backend(_RaysBackend):
    """Ray's backend, with a choice at every start of the workers."""

    def on_start(self, worker_group: Any, backend_config: Collectives) -> None:
        """Make the process group; called by Ray Train in its controller."""
        have_cuda: list[bool] = worker_group.execute(torch.cuda.is_available)
        chosen = backend_of(backend_config.gpus, have_cuda)
        super().on_start(worker_group, replace(backend_config, backend=chosen))


@dataclass
class Collectives(TorchConfig):
    """Configuration of the process group.

    Fields:
        gpus: GPUs that each worker reserves.
    """

    gpus: float = 0.0

    @property
    def backend_cls(self) -> Any:
        """Backend whose hooks Ray Train calls."""
        return _Backend


def backend_of(gpus: float, have_cuda: list[bool]) -> str:
    """Return the backend of workers that reserve `gpus` each and can or cannot use CUDA."""
    return "nccl" if gpus >= 1 and all(have_cuda) else "gloo"
