"""What the workers of a run agree on between two steps: whether to save now.

A checkpoint is a step that all workers share, so its time is decided by one clock, that of the first worker.
Asking costs some milliseconds, and all workers wait for each other; the first worker therefore also says at
which step the next question is asked, so that it comes every two seconds however long a step takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

NOTICE = "a node is about to be taken away"
TIME = "train.checkpoint_every_s"
_ASK_EVERY_S = 2.0
_MOST_STEPS = 1000  # between two questions
_LEAST_LEAD_S = 10.0  # a checkpoint is begun so long before a node goes, at least


class Notice(Protocol):
    """Ray Train's `PreemptionInfo`."""

    @property
    def deadline_ms(self) -> int | None:
        """When the first node goes, in milliseconds since the epoch; None when it is not known."""
        ...

    @property
    def preempted_node_ids(self) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Decision:
    """What the first worker says: why to save now, `NOTICE` or `TIME` ("" for not), and at which step to ask
    again.
    """

    save: str
    ask_at: int


class SaveAgreement:
    """Decides when to save beside the regular steps: after so many seconds, at a notice that a node is about
    to go, and once more shortly before it goes.

    Args:
        step: Step that the run continues from.
        every_s: Seconds between checkpoints; None for no limit.
        notice: Function that returns the notice, the same on all workers.
        from_first: Function that returns what the first worker passed to it, on all workers.
        clock: Clock in seconds since the epoch.
    """

    def __init__(
        self,
        step: int,
        every_s: float | None,
        notice: Callable[[], Notice | None],
        from_first: Callable[[Decision], Decision],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._every_s = every_s
        self._notice, self._from_first, self._clock = notice, from_first, clock
        self._ask_at = step + 1
        self._asked_at, self._asked_step = clock(), step
        self._saved_at = clock()
        self._answered: set[str] = set()  # nodes whose notice has led to a checkpoint
        self._has_saved_last = False
        self._lead_s = _LEAST_LEAD_S

    def saved(self, seconds: float | None = None) -> None:
        """Count from now: a checkpoint has been begun or, with the `seconds` that it took, waited for."""
        self._saved_at = self._clock()
        if seconds is not None:
            self._lead_s = max(_LEAST_LEAD_S, 3 * seconds)

    def ask(self, step: int) -> str:
        """Return why the state after `step` has to be saved, "" if it has not; the same on all workers, all
        of which have to call this after every step.
        """
        if step < self._ask_at:
            return ""
        notice = self._notice()
        decision = self._from_first(self._decide(step, notice))
        self._ask_at = decision.ask_at
        return decision.save

    def _decide(self, step: int, notice: Notice | None) -> Decision:
        now = self._clock()
        step_s = (now - self._asked_at) / max(1, step - self._asked_step)
        self._asked_at, self._asked_step = now, step
        steps = min(_MOST_STEPS, max(1, int(_ASK_EVERY_S / max(step_s, 1e-6))))
        return Decision(self._reason(now, step_s, notice), step + steps)

    def _reason(self, now: float, step_s: float, notice: Notice | None) -> str:
        if notice is not None:
            nodes = set(notice.preempted_node_ids)
            lead_s = self._lead_s + _ASK_EVERY_S + step_s
            is_last = notice.deadline_ms is not None and now >= notice.deadline_ms / 1000 - lead_s
            if not nodes <= self._answered:
                self._answered |= nodes
                self._has_saved_last = is_last
                return NOTICE
            if is_last and not self._has_saved_last:
                self._has_saved_last = True
                return NOTICE
        if self._every_s is not None and now - self._saved_at >= self._every_s:
            return TIME
        return ""
