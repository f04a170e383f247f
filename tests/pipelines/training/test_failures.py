"""Which failures of a run are worth another attempt, and what the user is told of the one that is not."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any, cast

import pytest
from ray.exceptions import RayActorError
from ray.train import ControllerError, PreemptionError, PreemptionInfo, WorkerGroupError
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)

from pipelines.training.failures import Restarts, TrainingStopped, told
from resshift.config import ConfigError
from resshift.storage import StorageError, StorageReason


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Step:
    """The newest checkpoint."""

    def __init__(self) -> None:
        self.step = 0

    def __call__(self) -> int:
        return self.step


def failed(**by_rank: Exception) -> WorkerGroupError:
    """Return what Ray Train reports: `failed(r0=..., r3=...)`."""
    return WorkerGroupError("text of pages", {int(rank[1:]): error for rank, error in by_rank.items()})


def died(preempted: bool = False) -> Exception:
    gone = cast(Any, RayActorError)("a0", "worker died\nwith more lines", False, preempted)
    return WorkerHealthCheckFailedError("A worker health check failed.", gone)


def restarts(most: int = 3, window_s: float = 100.0) -> tuple[Restarts, Clock, Step]:
    clock, step = Clock(), Step()
    return Restarts(most, window_s, step, clock), clock, step


def test_failures_count_within_the_window() -> None:
    rule, clock, _ = restarts(most=3, window_s=100)
    for at in (0.0, 30.0, 60.0, 101.0, 131.0):  # never more than three within 100 s
        clock.now = at
        assert rule.allow(failed(r0=died()))
    clock.now = 140.0
    error = failed(r0=died())
    assert not rule.allow(error)
    assert str(told(error)) == (
        "4 failures within 100 s, train.max_failures is 3; the last: the process of worker 0 ended "
        "(worker died)"
    )


def test_nodes_that_were_taken_away_with_notice_do_not_count() -> None:
    rule, _, _ = restarts(most=0)
    notice = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1]})
    for error in (PreemptionError(notice), failed(r0=died(preempted=True), r1=RuntimeError("gloo reset"))):
        for _ in range(50):
            assert rule.allow(error)
    assert not rule.allow(failed(r0=died()))


@pytest.mark.parametrize("error", [TypeError("got an unexpected keyword"), KeyError("hq")])
def test_a_mistake_that_every_attempt_repeats_is_tried_three_times(error: Exception) -> None:
    rule, _, _ = restarts(most=30)
    assert rule.allow(failed(r1=error))
    assert rule.allow(failed(r1=error))
    last = failed(r1=error)
    assert not rule.allow(last)
    assert str(told(last)).startswith(
        f"3 attempts after step 0 ended with the same error: {type(error).__name__} on worker 1: {error}"
    )


def test_an_error_after_progress_is_another_one() -> None:
    rule, _, step = restarts(most=30)
    for step.step in range(20):
        assert rule.allow(failed(r0=ValueError("a bad batch")))


def test_a_store_that_is_away_is_waited_for() -> None:
    rule, _, _ = restarts(most=10)
    away = StorageError("s3://b/k", StorageReason.UNAVAILABLE, "try later")
    assert all(rule.allow(failed(r0=away)) for _ in range(10))
    assert not rule.allow(failed(r0=away))


def test_a_mistake_of_the_user_ends_the_run_at_once_and_is_told_as_it_is() -> None:
    """The other workers only say that they have lost a connection."""
    rule, _, _ = restarts(most=30)
    error = failed(r0=RuntimeError("gloo: Connection closed by peer"), r5=ConfigError("no trunk at x.pth"))
    assert not rule.allow(error)
    assert isinstance(told(error), ConfigError)
    assert str(told(error)) == "no trunk at x.pth"


def test_the_cause_is_told_and_not_its_consequences() -> None:
    error = failed(r0=RuntimeError("[gloo] Connection closed by peer"), r2=ValueError("three\nlines\nof it"))
    assert str(told(error)) == "training failed: ValueError on worker 2: three"


def test_a_full_cluster_is_waited_for_without_end_and_other_errors_of_ray_end_the_run() -> None:
    rule, _, _ = restarts(most=0)
    for _ in range(100):
        assert rule.allow(ControllerError(WorkerGroupStartupTimeoutError(4)))
    assert not rule.allow(ControllerError(ValueError("no such storage")))


def test_what_is_told_survives_the_way_from_the_controller() -> None:
    """Ray pickles the error, and rebuilds it from its text and its failures."""
    rule, _, _ = restarts(most=0)
    error = failed(r0=died())
    assert not rule.allow(error)
    found = told(pickle.loads(pickle.dumps(error)))
    assert isinstance(found, TrainingStopped)
    assert str(found).startswith("1 failures within 100 s")


def test_the_rule_can_be_sent_to_the_controller() -> None:
    rule = Restarts(3, 100.0, partial(int, "7"))
    assert pickle.loads(pickle.dumps(rule.allow))(failed(r0=died()))
