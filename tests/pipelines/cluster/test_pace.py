"""The thread of Ray Data that schedules: how often it turns while nobody takes the pairs."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from ray.data._internal.execution.streaming_executor import StreamingExecutor

from pipelines.cluster.pace import STEP_S, Paced
from pipelines.pairs import dataset
from pipelines.shards.build import ShardOptions
from pipelines.shards.prepare import prepare_here
from resshift.presets import test_x4 as toy_preset


def test_a_step_lasts_and_one_that_waited_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now, slept = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    paced, executor = Paced(), None
    for took in (0.0, 0.001, 0.02, 0.1, 0.0):
        now[0] += took
        paced.on_execution_step(executor)  # type: ignore[arg-type]  # not looked at
    assert slept == pytest.approx([0.0, STEP_S - 0.001, STEP_S - 0.02, 0.0, STEP_S])


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_the_loop_behind_the_pairs_is_paced(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a consumer thinks; Ray Data alone turns some hundred times a second."""
    prepare_here(str(tree), str(tmp_path / "s"), ShardOptions(row_group_rows=3))
    ends: list[float] = []

    class Recorded(Paced):
        def on_execution_step(self, executor: StreamingExecutor) -> None:
            super().on_execution_step(executor)
            ends.append(time.monotonic())

    monkeypatch.setattr(dataset, "Paced", Recorded)
    batches = dataset.rank_batches(str(tmp_path / "s"), toy_preset(), 0)
    next(batches)
    turns = len(ends)
    time.sleep(20 * STEP_S)
    names = [thread.name for thread in threading.enumerate()]
    batches.close()
    gaps = np.diff(ends)
    assert len(ends) > turns  # it still turns
    assert gaps.min() > 0.99 * STEP_S
    assert any(name.startswith("StreamingExecutor") for name in names)
    assert "ray-data-metadata-prefetch" not in names  # it would tell of a task's end a step later
