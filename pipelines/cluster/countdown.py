"""Progress of work whose amount is known: done, rate and the time that is left; a live line on a terminal,
log lines elsewhere.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class Countdown:
    """Counts towards a total.

    Args:
        what: is counted, for example "pictures".
        total: of them; work that is done in no time (reused) counts too, but not in the rate.
        every_s: between two log lines.
    """

    def __init__(self, what: str, total: int, every_s: float = 10.0) -> None:
        self._what, self._total, self._every_s = what, total, every_s
        self._done = self._reused = 0
        self._started = self._last_line = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[rate]}"),
            )
            progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar = progress, progress.add_task(what, total=total, rate="")

    def __enter__(self) -> Countdown:
        if self._bar is not None:
            self._bar[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()
        elif error is None:
            logger.info("%s", self.line(time.monotonic()))

    def advance(self, num: int, *, reused: bool = False) -> None:
        """Count some more and show it when it is time to."""
        self._done += num
        self._reused += num if reused else 0
        now = time.monotonic()
        if self._bar is not None:
            self._bar[0].update(self._bar[1], advance=num, rate=f"{self.rate(now):.1f}/s")
        elif now - self._last_line >= self._every_s:
            self._last_line = now
            logger.info("%s", self.line(now))

    def rate(self, now: float) -> float:
        """Return how many are done in a second, reused ones not counted."""
        return (self._done - self._reused) / max(now - self._started, 1e-9)

    def line(self, now: float) -> str:
        """Return the state as key=value."""
        rate = self.rate(now)
        eta_s = f"{(self._total - self._done) / rate:.0f}" if rate else "unknown"
        return f"{self._what}={self._done}/{self._total} per_s={rate:.1f} eta_s={eta_s}"
