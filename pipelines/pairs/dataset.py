"""Shards -> training pairs on CPUs, in the order of the plan, as one Ray Data execution for all ranks.

A task reads whole windows of the stream, so that each row group is read once however many ranks there are,
and hands its pairs over as parcels, for one rank after the other (`pipelines.pairs.parcels`).
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Iterator
from typing import Protocol

import pyarrow as pa
import ray
import ray.data
from ray.data import ExecutionResources
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipelines.cluster import ray_internals
from pipelines.pairs.maker import PairMaker
from pipelines.pairs.order import Span, spans
from pipelines.pairs.parcels import Turns
from pipelines.pairs.share import Share, cpus_of_a_task
from pipelines.shards.parquet import read_manifest, row_groups
from resshift import degradation
from resshift.allocator import keep_freed_pages
from resshift.config import DataConfig, TrainConfig
from resshift.degradation.on_device.plan import PLAN_BYTES
from resshift.devices import use_one_thread

_BLOCK_BYTES = 32 << 20  # of pairs that one rank gets at once: 160 of 256 px, 16 to 256 in any case
# Of a parcel, when there are many ranks. Every parcel passes through one process, the coordinator.
_PARCEL_BYTES = 8 << 20
# About 10 s. Between tasks a worker waits 0.1 to 0.2 s until Ray Data (2.60) has seen that the first has
# ended, which asks for long ones.
_BLOCKS_PER_TASK = 16
_WINDOW_ROWS = 256  # with the default row groups, of pictures of a quarter of a megabyte or less
_OTHER_BYTES = 64  # of a row, about: the key and three numbers


class PairRun(Protocol):
    """The part of a run's configuration that the stream needs."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def degradation(self) -> degradation.DegradationRecipe: ...

    @property
    def train(self) -> TrainConfig: ...


class PairSource(Datasource):
    """Spans of the stream as a Ray Data source: a task for each list of spans."""

    def __init__(self, maker: PairMaker, tasks: Iterable[list[Span]], turns: Turns) -> None:
        super().__init__()
        self.tasks = [_read_task(maker, task, turns) for task in tasks]

    def estimate_inmemory_data_size(self) -> int | None:
        """Not needed: the number of tasks is given."""
        return None

    def get_read_tasks(
        self,
        parallelism: int,
        per_task_row_limit: int | None = None,
        data_context: ray.data.DataContext | None = None,
    ) -> list[ReadTask]:
        """Return the tasks in stream order."""
        return self.tasks


def filled(parts: Iterable[Span], sizes: Iterator[int], most: int) -> Iterator[list[Span]]:
    """Divide spans into tasks of about so many rows each.

    A span stays whole, so that its row groups are read once, unless it has more rows than `most`.
    """
    task: list[Span] = []
    size, num_rows = next(sizes), 0
    for span in parts:
        rest: Span | None = span
        while rest is not None:
            if task and num_rows + rest.num_rows > size:
                yield task
                task, size, num_rows = [], next(sizes), 0
            part, rest = rest.cut(most) if rest.num_rows > most else (rest, None)
            task.append(part)
            num_rows += part.num_rows
    if task:
        yield task


def _read_task(maker: PairMaker, task: list[Span], turns: Turns) -> ReadTask:
    def read() -> Iterable[pa.Table]:
        use_one_thread()  # Ray gives a task one CPU
        keep_freed_pages()  # of images: 30 to 70 page faults a pair without, one with
        yield from maker.blocks(task, turns)

    return ReadTask(read, BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None))


def pair_dataset(
    root: str,
    config: PairRun,
    start_row: int,
    stop_row: int,
    *,
    num_ranks: int = 1,
    share: Share | None = None,
) -> ray.data.Dataset:
    """Return the dataset of the pairs of stream rows [start_row, stop_row): a parcel in each row, for one
    rank after the other.

    Args:
        root: Directory or prefix that `jobs/prepare.py` wrote.
        config: Configuration of the run; `train.seed` and `train.batch_size` make the order.
        start_row: Number of rows that the run has already consumed.
        stop_row: Row at which the dataset ends.
        num_ranks: Number of ranks that share each batch.
        share: Resources that the dataset may use; None leaves them to Ray Data.
    """
    train = config.train
    maker = PairMaker(root, train.seed, config.data, config.degradation)
    windows = spans(row_groups(read_manifest(root)), train.seed, start_row, stop_row)
    tasks = filled(windows, task_sizes(config, share), rows_per_task(config, share))
    source = PairSource(
        maker, tasks, Turns(train.batch_size, num_ranks, rows_per_turn(config, share, num_ranks))
    )
    num_cpus = 1.0 if share is None else cpus_of_a_task(share.cpus)
    # Asking for more blocks than there are tasks would cut each (Ray 2.60).
    dataset = ray.data.read_datasource(
        source, override_num_blocks=max(1, len(source.tasks)), num_cpus=num_cpus
    )
    context = dataset.context
    context.enable_progress_bars = False  # workers have no terminal: bars would fill the log
    logging.getLogger(ray_internals.PROGRESS_LOGGER).setLevel(logging.ERROR)
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # A parcel goes as it is: more bytes than this, so it is not kept for the next one, and a single row, so
    # it is not cut (2.60).
    context.target_max_block_size = 1
    ray_internals.pace(context)
    if share is not None:
        context.execution_options.resource_limits = ExecutionResources.for_limits(
            cpu=max(share.cpus, num_cpus), object_store_memory=share.object_store_bytes
        )
        context.execution_options.label_selector = dict(share.labels) if share.labels else None
    return dataset


def rows_per_turn(config: PairRun, share: Share | None, num_ranks: int) -> int:
    """Return how many rows of the stream, of all ranks, a task hands over until a rank's turn comes again:
    8 MiB for each, 32 for one that is alone, no more than a task makes, and whole batches where one fits.

    A batch that lies in one parcel is a view of it; the consumer copies one that lies in two.
    """
    rows = max(_rows_per_block(config), num_ranks * max(1, _PARCEL_BYTES // _pair_bytes(config)))
    rows, batch = min(rows, rows_per_task(config, share)), config.train.batch_size
    return rows - rows % batch if batch <= rows else rows


def rows_per_task(config: PairRun, share: Share | None) -> int:
    """Return how many pairs a task makes at most: sixteen blocks, or fewer so that what all tasks make fits
    the share of the object store.

    Pairs are consumed in order, so those of the later tasks wait there for the first.
    """
    block = _rows_per_block(config)
    if share is None:
        return _BLOCKS_PER_TASK * block
    fitting = share.object_store_bytes / (math.ceil(share.cpus) * block * _pair_bytes(config))
    return block * max(1, min(_BLOCKS_PER_TASK, int(fitting)))


def task_sizes(config: PairRun, share: Share | None) -> Iterator[int]:
    """Yield how many pairs each task of an execution makes, without end: the first a window, and twice as
    many from turn to turn.

    Pairs are consumed in order, so of the tasks that start together consumers live on the first alone until
    it ends. Were all long, that would be ten seconds of one worker's pairs at the start of each execution.
    """
    at_a_time = 1 if share is None else math.ceil(share.cpus)
    size, most = max(_WINDOW_ROWS, _rows_per_block(config)), rows_per_task(config, share)
    while size < most:
        yield from itertools.repeat(size, at_a_time)
        size *= 2
    yield from itertools.repeat(most)


def _rows_per_block(config: PairRun) -> int:
    return max(16, min(256, _BLOCK_BYTES // _pair_bytes(config)))


def _pair_bytes(config: PairRun) -> int:
    recipe = config.degradation
    lq_px = config.data.crop_px**2 // recipe.scale**2
    made = PLAN_BYTES if config.data.degrade_on == "device" else 3 * lq_px
    return 3 * config.data.crop_px**2 + made + (lq_px if recipe.kind == "inpainting" else 0) + _OTHER_BYTES
