"""Ends a worker that hangs.

A worker that waits for ever, for a GPU, a collective operation or a store, holds its machines and says
nothing: its actor still answers, so Ray Train takes it for healthy. Here the process prints the stacks of its
threads and ends when a part of its work takes longer than it may; Ray Train then starts all workers again
from the last checkpoint.

The timer is that of `faulthandler`, a thread without Python code: it also runs out where a call into a
library holds the interpreter's lock. A process has one.
"""

from __future__ import annotations

import faulthandler

_STDERR = 2  # Ray copies it to the driver; `sys.stderr` of a worker may be something else


class Watchdog:
    """Time limits of a worker.

    Args:
        limit_s: Seconds that a step may take.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s

    def step(self) -> None:
        """Begin a step, or a round of a validation."""
        faulthandler.dump_traceback_later(self.limit_s, file=_STDERR, exit=True)

    def long(self) -> None:
        """Begin what may take four times as long: starting, saving, publishing."""
        faulthandler.dump_traceback_later(4 * self.limit_s, file=_STDERR, exit=True)

    def close(self) -> None:
        """End the watch."""
        faulthandler.cancel_dump_traceback_later()
