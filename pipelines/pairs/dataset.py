"""Shards -> training pairs on CPUs, in the order of the plan: read, decode, crop, degrade; uint8 columns.

What a pair is depends on (seed, epoch, key) alone; where it stands in the stream on (seed, batch size, row
number) alone (`pipelines.pairs.order`). Every rank runs a dataset of its own over its slots of the batches,
so the assignment does not depend on timing: a worker calls `rank_batches` in its own process. Reading and
degrading are one task, which hands over a block at a time.

Columns of a batch: hq (H, W, 3) and lq (H / scale, W / scale, 3) uint8; mask (H, W) uint8, 255 in a hole,
with inpainting only; key; epoch; row, its number in the stream; substituted, 1 when the picture could not be
decoded any more. It is replaced by the next decodable picture of its row group, with the crop and degradation
of the broken one: no other pair moves, and the replacement does not depend on the reader.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from ray.data import ExecutionResources
from ray.data.block import BlockAccessor, BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipelines.cluster import ray_internals
from pipelines.cluster.capacity import promised
from pipelines.cluster.retry import retried
from pipelines.pairs.order import Piece, stream
from pipelines.shards.parquet import RowGroup, read_manifest, read_pictures, row_groups
from resshift import degradation, storage
from resshift.allocator import keep_freed_pages
from resshift.config import ConfigError, DataConfig, TrainConfig
from resshift.devices import use_one_thread
from resshift.images import ImageError
from resshift.pairs.training_pair import TrainingPair, make_pair
from resshift.training.slots import Slots

logger = logging.getLogger(__name__)
Batch = dict[str, NDArray[Any]]
_BLOCK_BYTES = 32 << 20  # of pairs that a task hands over at once: 160 of 256 px
# About 10 s. Between tasks a worker waits 0.1 to 0.2 s until Ray Data (2.60) has seen that the first has
# ended, which asks for long ones.
_BLOCKS_PER_TASK = 16
_OTHER_BYTES = 64  # of a row, about: the key and three numbers
_READERS = 8  # requests to a bucket at a time


class PairRun(Protocol):
    """The part of a run's configuration that the stream needs."""

    @property
    def data(self) -> DataConfig: ...

    @property
    def degradation(self) -> degradation.DegradationRecipe: ...

    @property
    def train(self) -> TrainConfig: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What the dataset of one rank may use, so that those of all ranks fit beside each other and beside the
    workers.

    Fields:
        cpus: Number of logical CPUs; see `cpus_of_a_task`.
        object_store_bytes: Room for pairs that wait to be consumed. Ray Data (2.60) starts no task beyond it,
            but lets those that run finish while the consumer waits for the first of them; see
            `rows_per_task`.
        labels: Labels of the nodes that read and degrade, for example {"role": "data"}; None takes any node.
    """

    cpus: float
    object_store_bytes: int
    labels: Mapping[str, str] | None = None


def fair_share(num_ranks: int, held_cpus: float, labels: Mapping[str, str] | None = None) -> Share:
    """Divide what the cluster has by the number of ranks.

    Args:
        num_ranks: Number of datasets that run at the same time.
        held_cpus: Logical CPUs on these nodes that workers hold for their whole life.
        labels: Labels of the nodes to count and to use; None counts all nodes.

    Raises:
        ConfigError: No node has the labels, or no logical CPU would be left for data: the run would hang
            without an error.
    """
    wanted = dict(labels or {})
    nodes = [
        node
        for node in ray.nodes()
        if node["Alive"] and wanted.items() <= dict(node.get("Labels") or {}).items()
    ]
    if not nodes:
        raise ConfigError(f"no node of the cluster has the labels {wanted}")
    have: dict[str, float] = {
        name: sum(node["Resources"].get(name, 0.0) for node in nodes)
        for name in ("CPU", "object_store_memory")
    }
    if labels is None:
        # Tasks that wait for a CPU are what makes an autoscaler start nodes for them.
        have["CPU"] = max(have["CPU"], promised().get("CPU", 0.0))
    if have["CPU"] - held_cpus < 0.1:
        raise ConfigError(
            f"{held_cpus:g} of {have['CPU']:g} logical CPUs are held by workers, none is left to make "
            "training pairs"
        )
    # Ray Data itself keeps to half of the object store.
    return Share(
        cpus=(have["CPU"] - held_cpus) / num_ranks,
        object_store_bytes=int(have["object_store_memory"] / 2 / num_ranks),
        labels=labels,
    )


class _Made(NamedTuple):
    """A pair in its place; `substituted` tells whether another picture stands in."""

    row: int
    epoch: int
    key: str
    pair: TrainingPair
    substituted: bool


def _batch_of(pairs: Iterable[_Made], num_rows: int) -> Batch:
    """Write each pair into its place as it comes: joined at the end, all pairs would be held twice."""
    batch: Batch = {
        "key": np.empty(num_rows, object),
        "epoch": np.empty(num_rows, np.int64),
        "row": np.empty(num_rows, np.int64),
    }
    batch["substituted"] = np.zeros(num_rows, np.uint8)
    for i, (row, epoch, key, pair, substituted) in enumerate(pairs):
        batch["row"][i], batch["epoch"][i], batch["key"][i], batch["substituted"][i] = (
            row,
            epoch,
            key,
            substituted,
        )
        for name, picture in {"hq": pair.hq_u8, "lq": pair.lq_u8, "mask": pair.mask_u8}.items():
            if picture is not None:
                if name not in batch:
                    batch[name] = np.empty((num_rows, *picture.shape), picture.dtype)
                batch[name][i] = picture
    return batch


@dataclass(frozen=True, slots=True)
class PairMaker:
    """Everything that a task needs besides the rows: where the shards are, and what a pair is."""

    root: str
    seed: int
    crop: DataConfig
    recipe: degradation.DegradationRecipe

    def batches(self, pieces: Sequence[Piece], num_rows: int) -> Iterator[Batch]:
        """Read the rows of some pieces and yield their pairs in stream order, `num_rows` at a time; columns:
        the module docstring.

        Raises:
            ImageError: Not one picture of a whole row group can be decoded any more.
            StorageError: A shard cannot be read.
        """
        pairs = (made for piece in pieces for made in self._pairs(piece))
        rest = sum(len(piece.rows) for piece in pieces)
        while rest:
            yield _batch_of(itertools.islice(pairs, num_rows), min(num_rows, rest))
            rest -= min(num_rows, rest)

    def _pairs(self, piece: Piece) -> Iterator[_Made]:
        photos = read_groups(self.root, piece.groups)
        members = [(i_group, i) for i_group, group in enumerate(piece.groups) for i in range(group.num_ok)]
        for source, row in zip(piece.sources.tolist(), piece.rows.tolist(), strict=True):
            i_group, i = members[source]
            yield _Made(row, piece.epoch, *self._pair(photos[i_group], i, piece.epoch))

    def _pair(self, group: pa.Table, i: int, epoch: int) -> tuple[str, TrainingPair, bool]:
        key = str(group["key"][i])
        failure: ImageError | None = None
        for step in range(len(group)):
            try:
                pair = make_pair(
                    group["bytes"][(i + step) % len(group)].as_py(),
                    key,
                    epoch,
                    self.seed,
                    self.crop,
                    self.recipe,
                )
            except ImageError as error:
                failure = failure or error
            else:
                return key, pair, step > 0
        raise failure or ValueError("an empty row group has no pairs")


def read_groups(root: str, groups: Sequence[RowGroup]) -> list[pa.Table]:
    """Read the pictures (key, bytes) of some row groups; a store that fails for a moment is asked again."""

    def read(group: RowGroup) -> pa.Table:
        return retried(lambda: read_pictures(root, group))

    if not storage.is_s3(root):
        return [read(group) for group in groups]
    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(read, groups))


class PairSource(Datasource):
    """Pieces of the stream as a Ray Data source: tasks make so many consecutive pairs each (`task_sizes`),
    the last what is left.
    """

    def __init__(
        self, maker: PairMaker, pieces: Iterable[Piece], task_sizes: Iterable[int], rows_per_block: int
    ) -> None:
        super().__init__()
        self.tasks = [_read_task(maker, part, rows_per_block) for part in _filled(pieces, task_sizes)]

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


def _filled(pieces: Iterable[Piece], sizes: Iterable[int]) -> Iterator[list[Piece]]:
    """Divide pieces into lists of so many rows each; the last list has what is left. There are more sizes
    than lists.
    """
    part: list[Piece] = []
    rest = iter(sizes)
    missing = next(rest)
    for piece in pieces:
        taken = 0
        while taken < len(piece.rows):
            part.append(piece.cut(taken, taken + missing))
            taken += len(part[-1].rows)
            missing -= len(part[-1].rows)
            if not missing:
                yield part
                part, missing = [], next(rest)
    if part:
        yield part


def _read_task(maker: PairMaker, pieces: list[Piece], rows_per_block: int) -> ReadTask:
    def read() -> Iterable[pa.Table]:
        use_one_thread()  # Ray gives a task one CPU
        keep_freed_pages()  # of images: 30 to 70 page faults a pair without, one with
        yield from map(BlockAccessor.batch_to_block, maker.batches(pieces, rows_per_block))

    num_rows = sum(len(piece.rows) for piece in pieces)
    return ReadTask(
        read, BlockMetadata(num_rows=num_rows, size_bytes=None, exec_stats=None, input_files=None)
    )


def pair_dataset(
    root: str,
    config: PairRun,
    start_row: int,
    stop_row: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    share: Share | None = None,
) -> ray.data.Dataset:
    """Return the dataset of one rank's pairs of stream rows [start_row, stop_row), in stream order.

    Args:
        root: Directory or prefix that `jobs/prepare.py` wrote.
        config: Configuration of the run; `train.seed` and `train.batch_size` make the order.
        start_row: Number of rows that the run has already consumed.
        stop_row: Row at which the dataset ends.
        rank: Rank of the reader.
        num_ranks: Number of readers that share each batch.
        share: Resources that the dataset may use; None leaves them to Ray Data.
    """
    train = config.train
    maker = PairMaker(root, train.seed, config.data, config.degradation)
    pieces = stream(
        row_groups(read_manifest(root)),
        train.seed,
        train.batch_size,
        start_row,
        stop_row,
        rank=rank,
        num_ranks=num_ranks,
    )
    num_rows = rows_per_block(config, num_ranks)
    source = PairSource(maker, pieces, task_sizes(config, share, num_ranks), num_rows)
    num_cpus = 1.0 if share is None else cpus_of_a_task(share.cpus)
    # Asking for more blocks than there are tasks would cut each (Ray 2.60).
    dataset = ray.data.read_datasource(
        source, override_num_blocks=max(1, len(source.tasks)), num_cpus=num_cpus
    )
    context = dataset.context
    context.enable_progress_bars = False  # workers have no terminal: bars would fill the log
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # A block goes as it is: larger than this, so it is not kept for the next one, and smaller than 1.5 of it,
    # so it is not cut (2.60).
    context.target_max_block_size = int(0.8 * num_rows * _pair_bytes(config))
    ray_internals.pace(context)
    if share is not None:
        context.execution_options.resource_limits = ExecutionResources.for_limits(
            cpu=max(share.cpus, num_cpus), object_store_memory=share.object_store_bytes
        )
        context.execution_options.label_selector = dict(share.labels) if share.labels else None
    return dataset


def cpus_of_a_task(cpus: float) -> float:
    """Return how many logical CPUs a task asks for, so that as many tasks run as there are CPUs, a part of
    one counted as one.
    """
    return max(0.01, math.floor(100 * cpus / math.ceil(cpus)) / 100)


def rows_per_block(config: PairRun, num_ranks: int = 1) -> int:
    """Return how many pairs a task hands over at once: 32 MiB of them, 16 to 256, and whole batches of a rank
    where one fits.

    A batch that lies in one block is a view of it; the consumer copies one that lies in two.
    """
    num_rows = max(16, min(256, _BLOCK_BYTES // _pair_bytes(config)))
    batch = config.train.batch_size // num_ranks
    return num_rows - num_rows % batch if batch <= num_rows else num_rows


def rows_per_task(config: PairRun, share: Share | None, num_ranks: int = 1) -> int:
    """Return how many pairs a task makes at most: sixteen blocks, or fewer so that what all tasks make fits
    the share of the object store.

    Pairs are consumed in order, so those of the later tasks wait there for the first.
    """
    block = rows_per_block(config, num_ranks)
    if share is None:
        return _BLOCKS_PER_TASK * block
    fitting = share.object_store_bytes / (math.ceil(share.cpus) * block * _pair_bytes(config))
    return block * max(1, min(_BLOCKS_PER_TASK, int(fitting)))


def task_sizes(config: PairRun, share: Share | None, num_ranks: int = 1) -> Iterator[int]:
    """Yield how many pairs each task of an execution makes, without end: the first a block, and twice as many
    from turn to turn.

    Pairs are consumed in order, so of the tasks that start together a consumer lives on the first alone until
    it ends. Were all long, that would be ten seconds of one worker's pairs at the start of each execution.
    """
    at_a_time = 1 if share is None else math.ceil(share.cpus)
    size, most = rows_per_block(config, num_ranks), rows_per_task(config, share, num_ranks)
    while size < most:
        yield from itertools.repeat(size, at_a_time)
        size *= 2
    yield from itertools.repeat(most)


def _pair_bytes(config: PairRun) -> int:
    recipe = config.degradation
    lq_px = config.data.crop_px**2 // recipe.scale**2
    return 3 * (config.data.crop_px**2 + lq_px) + (lq_px if recipe.kind == "inpainting" else 0) + _OTHER_BYTES


def rank_batches(
    root: str,
    config: PairRun,
    start_row: int,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    share: Share | None = None,
    rows_per_execution: int | None = None,
    prefetch_batches: int = 2,
) -> Generator[Batch]:
    """Yield the batches of one rank without end, `train.batch_size / num_ranks` rows each (ranks whose share
    is not whole differ by one row).

    Called in the process that consumes them.

    The batch of step s holds the rank's slots of stream rows [s B, (s + 1) B): the sequence does not depend
    on the cluster, on `share`, or on where the run was interrupted. Executions of Ray Data follow one another
    behind it, each over many batches, because starting one costs seconds; the next starts while the last
    pairs of the one before are consumed, so that nobody waits for it. Arrays lie in Ray's shared memory and
    are read-only. Close the iterator to stop the tasks behind it.

    Args:
        root: Directory or prefix that `jobs/prepare.py` wrote.
        config: Configuration of the run.
        start_row: Number of rows that all ranks together have consumed, a multiple of the batch size.
        rank: Rank of this process.
        num_ranks: Number of processes that share each batch.
        share: Resources that this rank's tasks may use, see `fair_share`; None only where one rank runs
            alone.
        rows_per_execution: Rows of the stream in one execution; default 262,144 for every rank.
        prefetch_batches: Number of batches made ahead of the consumer, besides what the object store holds.

    Raises:
        ValueError: `start_row` is not where a batch begins, or the ranks cannot share a batch.
        ImageError: A whole row group is broken; single pictures are only counted (`substituted`) and logged.
        StorageError: The shards cannot be read; outages of less than half a minute are waited for.
    """
    batch_size = config.train.batch_size
    if start_row % batch_size or batch_size < num_ranks:
        raise ValueError(
            f"start_row ({start_row}) must be a multiple of batch_size ({batch_size}), which must be at "
            f"least the {num_ranks} ranks"
        )
    step = max(1, (rows_per_execution or 262_144 * num_ranks) // batch_size) * batch_size
    own = Slots.of_rank(batch_size, rank, num_ranks)
    slots = np.arange(own.start, own.stop)
    # Half of what the last tasks make: the next execution fills the store beside what this one still has
    # there.
    lead = (
        rows_per_task(config, share, num_ranks)
        * math.ceil(1 if share is None else share.cpus)
        * num_ranks
        // 2
    )

    def started(first: int) -> Iterator[Batch]:
        dataset = pair_dataset(root, config, first, first + step, rank=rank, num_ranks=num_ranks, share=share)
        batches: Any = iter(
            dataset.iter_batches(
                batch_size=len(slots), batch_format="numpy", prefetch_batches=prefetch_batches
            )
        )
        return itertools.chain([next(batches)], batches)

    expected = start_row
    with ThreadPoolExecutor(1, thread_name_prefix="next-pairs") as thread:
        execution = thread.submit(started, expected)
        while True:
            stop = expected + step
            following: Future[Iterator[Batch]] | None = None
            for batch in execution.result():
                if not np.array_equal(batch["row"], expected + slots):
                    raise RuntimeError(
                        f"rank {rank} was given rows {batch['row']} instead of {expected + slots}: Ray Data "
                        "changed their order"
                    )
                if batch["substituted"].any():
                    keys = batch["key"][batch["substituted"] > 0]
                    logger.warning(
                        "substituted=%d keys=%s: cannot be decoded any more",
                        len(keys),
                        ", ".join(map(str, keys)),
                    )
                yield batch
                expected += batch_size
                if following is None and stop - expected <= lead:
                    following = thread.submit(started, stop)
            if expected != stop or following is None:
                raise RuntimeError(
                    f"the training data of rank {rank} ended at row {expected} instead of {stop}"
                )
            execution = following
