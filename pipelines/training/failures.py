"""Whether a training run that failed is worth another attempt.

Ray Train asks after each failure, in its controller. Its own rule counts failures over the whole run: a run
of weeks on spot machines ends after some number of them, and a mistake that every attempt repeats is tried as
often. Here failures count within a window of time, lost nodes that were announced do not count, and an error
that another attempt would repeat ends the run at once.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ray.train import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError

from pipelines.cluster.granted import DeviceError
from resshift.config import ConfigError
from resshift.models import WeightsError
from resshift.training.step import TrainingDiverged

logger = logging.getLogger(__name__)
# Errors that another attempt would only repeat.
FATAL = (ConfigError, WeightsError, TrainingDiverged, DeviceError)
# Errors of machines and networks: the next attempt may find them mended.
_PASSING = (OSError, TimeoutError, MemoryError)
_SAME_ERROR = 3  # attempts that end with the same error before a step is saved
# The worker group could not be started with what is free at the moment, or lost a node while it started.
_WAITS = "WorkerGroupStartupTimeoutError"
_STARTS = "WorkerGroupStartupFailedError"


class TrainingStopped(RuntimeError):
    """A run that is not attempted again; the message is one line for the user."""


@dataclass(slots=True)
class Restarts:
    """Rule of one run; its state lives in Ray Train's controller.

    Fields:
        most: Largest number of failures within the window.
        window_s: Length of the window.
        saved_step: Function that returns the step of the newest checkpoint, 0 without one.
        clock: Clock in seconds.
    """

    most: int
    window_s: float
    saved_step: Callable[[], int]
    clock: Callable[[], float] = time.monotonic
    _failed_at: deque[float] = field(default_factory=deque[float])
    _last: tuple[str, int] = ("", -1)
    _repeated: int = 0

    def allow(self, error: TrainingFailedError) -> bool:
        """Return whether the workers are to be started again. If not, the error's `worker_failures` hold what
        the user is told, `told` finds it.
        """
        if is_preemption(error):
            logger.warning("restart: a node was taken away; it does not count as a failure")
            return True
        if isinstance(error, ControllerError):
            kind = type(error.controller_failure).__name__
            if kind == _WAITS:
                logger.warning("waiting: the cluster has no room for the workers of this run; asking again")
                return True
            if kind != _STARTS:
                return False
        failures = failures_of(error)
        if any(isinstance(one, FATAL) for one in failures.values()):
            return False
        stopped = self._stopped(failures)
        if stopped is None:
            return True
        if isinstance(error, WorkerGroupError):
            error.worker_failures = {**error.worker_failures, -1: TrainingStopped(stopped)}
        return False

    def _stopped(self, failures: Mapping[int, BaseException]) -> str | None:
        now, said = self.clock(), described(failures)
        self._failed_at.append(now)
        while now - self._failed_at[0] > self.window_s:
            self._failed_at.popleft()
        if len(self._failed_at) > self.most:
            return (
                f"{len(self._failed_at)} failures within {self.window_s:g} s, train.max_failures is "
                f"{self.most}; the last: {said}"
            )
        step = self._saved_step()
        this = (said, step)
        self._repeated = self._repeated + 1 if this == self._last and not _may_pass(failures) else 1
        self._last = this
        if self._repeated >= _SAME_ERROR:
            return f"{self._repeated} attempts after step {step} ended with the same error: {said}"
        logger.warning("restart: failure %d of %d: %s", len(self._failed_at), self.most, said)
        return None

    def _saved_step(self) -> int:
        try:
            return self.saved_step()
        except OSError as error:  # the store is away: no reason to end a run
            logger.warning("the newest checkpoint is not known: %s", error)
            return -1


def is_preemption(error: TrainingFailedError) -> bool:
    """Return whether workers were lost with a node whose end had been announced."""
    return isinstance(error, PreemptionError) or any(
        getattr(_cause(one), "preempted", False) for one in failures_of(error).values()
    )


def failures_of(error: TrainingFailedError) -> dict[int, BaseException]:
    """Return what each worker failed with, by rank."""
    if isinstance(error, WorkerGroupError):
        return dict(error.worker_failures)
    return {0: error.controller_failure} if isinstance(error, ControllerError) else {}


def told(error: TrainingFailedError) -> Exception:
    """Return the error of a run that ended, for the user: of the errors of all workers the one that says why,
    in one line.
    """
    failures = failures_of(error)
    for kinds in (FATAL, (TrainingStopped,)):
        for one in failures.values():
            if isinstance(one, kinds):
                return one
    return TrainingStopped(f"training failed: {described(failures) or _one_line(error)}")


def described(failures: Mapping[int, BaseException]) -> str:
    """Return one line: the error that most likely caused the others, and on which worker it was."""
    if not failures:
        return ""
    # A worker that ended breaks the connections of the others: what they say is a consequence.
    rank = min(failures, key=lambda rank: (not _is_cause(failures[rank]), rank))
    error = failures[rank]
    if _is_death(error):
        return f"the process of worker {rank} ended ({_one_line(_cause(error))})"
    return f"{type(error).__name__} on worker {rank}: {_one_line(error)}"


def _is_cause(error: BaseException) -> bool:
    text = str(error)
    collateral = ("Connection closed by peer", "Connection reset by peer", "NCCL", "gloo")
    return not (isinstance(error, RuntimeError) and any(part in text for part in collateral))


def _is_death(error: BaseException) -> bool:
    return hasattr(error, "health_check_failure")


def _cause(error: BaseException) -> BaseException:
    return getattr(error, "health_check_failure", error)


def _may_pass(failures: Mapping[int, BaseException]) -> bool:
    return any(_is_death(one) or isinstance(one, _PASSING) for one in failures.values())


def _one_line(error: Any) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
