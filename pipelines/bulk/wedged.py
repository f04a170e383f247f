"""Ends a replica that hangs.

A replica that waits for ever, for a GPU or in a library, keeps its units: its process lives and its event
loop answers. Here the process prints the stacks of its threads and ends when a step of its work takes much
longer than any did before. Whoever sent a unit then finds a dead replica, as after any other crash: another
one is started, the unit is tried there, and a picture is blamed only when it was alone at every replica that
ended.

A step is a call of a network on a batch of tiles, of one size whatever the pictures are. What it may take is
therefore known from the longest one so far, and nothing has to be predicted for a unit.

The timer is that of `faulthandler`, a thread without Python code: it also runs out where a call into a
library holds the interpreter's lock. A process has one.
"""

from __future__ import annotations

import faulthandler
import time
from collections.abc import Callable

_STDERR = 2  # Ray copies it to the driver; `sys.stderr` of a worker may be something else
DEFAULT_STEP_S = 600.0
_NUM_FIRST = 20  # steps that may compile and choose kernels
_LEAST_S = 60.0  # of later steps, however short they are: other work on the machine comes and goes
_TIMES_LONGEST = 10.0
_START_S = 1800.0  # fetching and loading a model, and the first use of a GPU
_SLACK_S = 1.0  # the timer is a thread, which is not started anew for every step of a millisecond


class Wedged:
    """The deadline of a replica's steps; it begins with the start of the replica.

    Args:
        step_s: Seconds that each of the first steps may take; later ones may take ten times the longest so
            far, and at least a minute, or `step_s` if that is less.
        clock: Clock in seconds.
    """

    def __init__(self, step_s: float = DEFAULT_STEP_S, clock: Callable[[], float] = time.monotonic) -> None:
        self.step_s, self._clock = step_s, clock
        self._longest_s, self._num_steps = 0.0, 0
        self._began: float | None = None
        self._due = 0.0
        self._arm(max(_START_S, step_s))

    @property
    def limit_s(self) -> float:
        """Seconds that a step may take now."""
        least = self.step_s if self._num_steps < _NUM_FIRST else min(self.step_s, _LEAST_S)
        return max(least, _TIMES_LONGEST * self._longest_s)

    def watch(self, has_work: bool) -> None:
        """Note that a step begins, or that there is nothing to do; the step before has ended."""
        now = self._clock()
        if self._began is not None:
            self._longest_s, self._num_steps = max(self._longest_s, now - self._began), self._num_steps + 1
        self._began = now if has_work else None
        if not has_work:
            faulthandler.cancel_dump_traceback_later()
            self._due = 0.0
        elif self._due < now + self.limit_s or self._due > now + self.limit_s + 2 * _SLACK_S:
            self._arm(self.limit_s + _SLACK_S)

    def _arm(self, seconds: float) -> None:
        self._due = self._clock() + seconds
        faulthandler.dump_traceback_later(seconds, file=_STDERR, exit=True)
