"""What Serve says of a model's application."""

from __future__ import annotations

from typing import Any

from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
    ReplicaState,  # pyright: ignore[reportPrivateImportUsage]
)

from serve.replica import num_running


def test_replicas_that_start_or_stop_do_not_run() -> None:
    unlooked: Any = None

    def deployment(**states: int) -> DeploymentStatusOverview:
        found = {ReplicaState(name.upper()): number for name, number in states.items()}
        return DeploymentStatusOverview(unlooked, unlooked, found, "")

    deployments = {"a": deployment(starting=1, running=3, stopping=2), "b": deployment(updating=1)}
    assert num_running(ApplicationStatusOverview(ApplicationStatus.RUNNING, "", 0, deployments)) == 3
