"""NCCL is for workers with a GPU each; everything else exchanges gradients over gloo."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.training.collectives import Collectives, backend_of


@pytest.mark.parametrize(
    ("gpus", "have_cuda", "expected"),
    [
        (1.0, [True, True], "nccl"),
        (1.0, [True, False], "gloo"),  # the run ends with a line of the second worker
        (0.5, [True, True], "gloo"),  # NCCL refuses two workers on one GPU
        (0.0, [True, True], "gloo"),  # the machine has GPUs, the workers reserve none
    ],
)
def test_nccl_needs_a_gpu_of_its_own_for_each_worker(
    gpus: float, have_cuda: list[bool], expected: str
) -> None:
    assert backend_of(gpus, have_cuda) == expected


def test_the_choice_reaches_rays_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when Ray renames the hook or stops reading `backend`."""
    config = Collectives(gpus=1.0, timeout_s=77)
    given: list[Any] = []
    rays = config.backend_cls.__mro__[1]
    monkeypatch.setattr(rays, "on_start", lambda self, group, config: given.append(config))

    class Group:
        def execute(self, call: Any) -> list[bool]:
            return [True, True]

    config.backend_cls().on_start(Group(), config)
    assert (given[0].backend, given[0].timeout_s) == ("nccl", 77)
    assert config.backend_cls.share_cuda_visible_devices
