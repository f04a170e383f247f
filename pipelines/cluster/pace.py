"""The thread of Ray Data that schedules, kept from spinning, and from being a step late.

Ray Data (2.60) runs its scheduling in a thread of the process that consumes, and that thread waits only for
tasks that are not done yet. When the consumer is the slower side, which is how training should be, all tasks
are done or none may start, so nothing is waited for: the loop runs at full speed, with the interpreter's
lock, for as long as training takes. Measured on two cores, tiny-x4: 44 % of the core that trains, 0.52 steps
a second instead of 1.0.

By default the loop leaves it to another thread to ask for what a task says of its blocks, and takes note of a
task's end in the step after that. A step lasts 0.1 s where tasks run, so a worker waited 0.2 s from one task
to the next; asked for at once, 0.1 s.
"""

from __future__ import annotations

import time

from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.metadata_fetcher import InlineMetadataFetcher
from ray.data._internal.execution.streaming_executor import StreamingExecutor

STEP_S = 0.05  # half of what the loop itself waits for tasks (0.1 s)


class Paced(ExecutionCallback):
    """Makes a step of an execution's loop last `STEP_S` at least; steps that waited that long for tasks go on
    at once.

    Ends of tasks are seen in the step that sees their last block.
    """

    def __init__(self) -> None:
        self._due = 0.0

    def before_execution_starts(self, executor: StreamingExecutor) -> None:
        """Called by Ray Data before the loop starts."""
        # As with RAY_DATA_METADATA_PREFETCH_ON_THREAD=0, which is read when Ray Data is imported, and there
        # for all that a process runs.
        executor._metadata_fetcher = InlineMetadataFetcher()  # pyright: ignore[reportPrivateUsage]

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Called by Ray Data after each step."""
        del executor
        time.sleep(max(0.0, self._due - time.monotonic()))
        self._due = time.monotonic() + STEP_S
