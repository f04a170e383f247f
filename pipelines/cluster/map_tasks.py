"""Independent pieces of work on a cluster: one Ray Data task for each, results as they come."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import pyarrow as pa
import ray
import ray.data
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

T = TypeVar("T")
R = TypeVar("R")


class _Work(Datasource):
    """One read task for each piece of work. The pieces travel with their task and not, all together, with
    every task.
    """

    def __init__(self, tasks: Sequence[ReadTask]) -> None:
        super().__init__()
        self.tasks = list(tasks)

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: ray.data.DataContext | None = None,
    ) -> list[ReadTask]:
        """Return the tasks in order."""
        return self.tasks


def results(
    function: Callable[[T], R], inputs: Sequence[T], *, in_order: bool = False, num_gpus: float = 0.0
) -> Iterator[R]:
    """Call `function` with every input, each in a task of one CPU, and yield what it returns; results are
    small.

    Args:
        function: Importable; what it raises ends the run.
        inputs: Pickled, each with its own task only.
        in_order: Yield in the order of the inputs; else in that of completion.
        num_gpus: GPUs of each task.
    """
    if not inputs:
        return
    # Asking for another number of blocks than there are tasks would cut or join them (Ray 2.60).
    dataset = ray.data.read_datasource(
        _Work([_task(function, item) for item in inputs]),
        override_num_blocks=len(inputs),
        num_gpus=num_gpus or None,
    )
    dataset.context.enable_progress_bars = False
    dataset.context.execution_options.preserve_order = in_order
    for row in dataset.iter_rows():
        yield pickle.loads(row["result"])


def _task(function: Callable[[T], R], item: T) -> ReadTask:
    def work() -> Iterable[pa.Table]:
        return [pa.table({"result": [pickle.dumps(function(item))]})]

    return ReadTask(work, BlockMetadata(num_rows=1, size_bytes=None, exec_stats=None, input_files=None))
