"""The loop of a worker without Ray: a preemption notice leads to a checkpoint."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray.train
import torch
from ray.train import PreemptionInfo

from pipelines.pairs.parcels import Batch
from pipelines.training import agreement, checkpoints, worker
from pipelines.training.watchdog import Watchdog
from pipelines.training.worker import Assignment, TrainLoop
from resshift.config import with_settings
from resshift.presets import test_x4 as toy_preset


def notice() -> PreemptionInfo:
    return PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"node": [0]})


class Run:
    """A run of 16 steps of one sample, with a regular checkpoint after every 100.

    Fields:
        notices: Answers of Ray to the question for a notice, in their order; afterwards the last one again.
        saved: Steps of the checkpoints that were complete when a step began, by that step.
    """

    def __init__(self, out: Path, notices: Sequence[object | None]) -> None:
        self.out, self.notices = str(out), list(notices)
        self.saved: dict[int, list[int]] = {}
        self._step = 0

    def notice(self) -> object | None:
        return self.notices.pop(0) if len(self.notices) > 1 else self.notices[0]

    def batches(self, *_: Any, **__: Any) -> Iterator[Batch]:
        rng = np.random.default_rng(0)
        while True:
            self._step += 1
            self.saved[self._step] = self.steps_saved()
            yield {
                "hq": rng.integers(0, 256, (1, 32, 32, 3), np.uint8),
                "lq": rng.integers(0, 256, (1, 8, 8, 3), np.uint8),
                "row": np.array([self._step - 1]),
                "key": np.array([f"{self._step}.png"], object),
            }

    def steps_saved(self) -> list[int]:
        return sorted(found.step for found in checkpoints.stored(self.out) if found.complete)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """Return a function that trains with the notices it is given: `run(None, "notice")`."""

    def train(*notices: object | None, settings: Sequence[str] = ()) -> Run:
        made = Run(tmp_path, notices)
        monkeypatch.setattr(ray.train, "get_preemption_info", made.notice)
        monkeypatch.setattr(agreement, "_ASK_EVERY_S", 1e-9)  # after every step
        monkeypatch.setattr(worker, "left_by_workers", lambda *_: None)
        monkeypatch.setattr(worker, "rank_batches", made.batches)
        publish = checkpoints.publish

        def publish_slowly(*arguments: Any) -> None:
            time.sleep(0.2)  # longer than a step takes
            publish(*arguments)

        monkeypatch.setattr(checkpoints, "publish", publish_slowly)
        sizes = ("train.steps=16", "train.batch_size=1", "train.micro_batch=1", "train.checkpoint_every=100")
        config = with_settings(toy_preset(), [*sizes, "log.tensorboard=false", *settings])
        assignment = Assignment(config=config, data="", out=str(tmp_path), held_cpus=1)
        with (
            contextlib.closing(Watchdog(600)) as watchdog,
            contextlib.closing(TrainLoop(assignment, 0, 1, torch.device("cpu"), watchdog)) as loop,
        ):
            loop.run()
        return made

    return train


@pytest.mark.slow
def test_without_a_notice_only_regular_checkpoints_are_saved(run: Callable[..., Run]) -> None:
    trained = run(None, settings=["train.checkpoint_every=12"])
    assert trained.steps_saved() == [12, 16]


@pytest.mark.slow
def test_a_notice_leads_to_a_checkpoint_before_the_next_step(run: Callable[..., Run]) -> None:
    """Its upload is waited for: the node may be gone at any moment. A regular checkpoint makes the question
    needless.
    """
    trained = run(None, None, notice(), settings=["train.checkpoint_every=2"])
    assert trained.saved[6] == [2, 4, 5]


@pytest.mark.slow
def test_a_notice_that_stays_leads_to_one_checkpoint(run: Callable[..., Run]) -> None:
    trained = run(None, None, None, None, notice())
    assert trained.saved[5] == []
    assert trained.saved[6] == [5]
    assert trained.steps_saved() == [5, 16]


@pytest.mark.slow
def test_checkpoints_by_the_clock_come_beside_the_regular_ones(run: Callable[..., Run]) -> None:
    """A step here takes some milliseconds."""
    trained = run(None, settings=["train.checkpoint_every_s=0.001"])
    assert len(trained.steps_saved()) == 3  # the last three are kept
    assert any(trained.saved[step] for step in range(2, 16))
