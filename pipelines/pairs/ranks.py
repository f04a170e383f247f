"""The stream of training pairs as each rank consumes it: its slots of one global batch after the other.

All ranks share one execution of Ray Data. Were there one for each, Ray's coordinator (2.60) would grant every
one of them the free CPUs of a node divided by the number of executions and rounded down: none, with as many
ranks as nodes. An actor, the dealer, plans executions and tells ranks where to take their parcels; pairs do
not pass through it. Where one rank is alone, it runs the execution itself.
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipelines.pairs.dataset import PairRun, pair_dataset, rows_per_task
from pipelines.pairs.deal import Deal
from pipelines.pairs.parcels import Batch, from_block, joined
from pipelines.pairs.share import left_by_workers
from resshift.training.slots import Slots

logger = logging.getLogger(__name__)
# Starting an execution costs seconds, planning one of 4 million rows a few more.
_ROWS_PER_RANK, _MOST_ROWS = 1 << 18, 1 << 22
# While nodes may come, an execution takes a minute or two: only the next one can ask for them.
_LEADS_WHILE_GROWING = 8
_WAITED = 0.1  # share of the time from which on a run counts as waiting for its data
T = TypeVar("T")


class Execution(NamedTuple):
    """An execution of Ray Data.

    Fields:
        dataset: What is executed; None where the dealer has it.
        stop: Row of the stream at which it ends.
        lead: Rows before its end at which the next one starts: what its last tasks make.
    """

    dataset: Any
    stop: int
    lead: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PairStream:
    """What the ranks of a run consume together.

    Fields:
        root: Directory or prefix that `jobs/prepare.py` wrote.
        config: Configuration of the run.
        num_ranks: Number of processes that share each batch.
        held_cpus: Logical CPUs that workers hold; the tasks use what `left_by_workers` says. None leaves
            resources to Ray Data.
        rows_per_execution: Rows of the stream in one execution of Ray Data; None takes a number at which its
            start costs next to nothing.
    """

    root: str
    config: PairRun
    num_ranks: int = 1
    held_cpus: float | None = None
    rows_per_execution: int | None = None

    def __post_init__(self) -> None:
        if self.config.train.batch_size < self.num_ranks:
            raise ValueError(
                f"batch_size ({self.config.train.batch_size}) must be at least the number of ranks "
                f"({self.num_ranks})"
            )

    def execution(self, first: int, waited: bool = False) -> Execution:
        """Return the execution that begins at a row.

        Args:
            first: The row.
            waited: Whether the ranks have waited for the one before.
        """
        share = None if self.held_cpus is None else left_by_workers(self.held_cpus, waited=waited)
        lead = rows_per_task(self.config, share) * (1 if share is None else math.ceil(share.cpus))
        num_rows = min(_MOST_ROWS, _ROWS_PER_RANK * self.num_ranks)
        if share is not None and share.may_grow:
            num_rows = min(num_rows, _LEADS_WHILE_GROWING * lead)
        batch_size = self.config.train.batch_size
        num_batches = max(1, (self.rows_per_execution or num_rows) // batch_size)
        stop = first + num_batches * batch_size
        dataset = pair_dataset(self.root, self.config, first, stop, num_ranks=self.num_ranks, share=share)
        return Execution(dataset, stop, lead)


class Dealer:
    """Runs each execution once for all ranks. A rank calls it in two threads at most, those of the execution
    that it consumes and of the next one.
    """

    def __init__(self, stream: PairStream) -> None:
        self._stream = stream
        self._planning = threading.Lock()
        self._planned: dict[int, tuple[Execution, Deal[Any]]] = {}

    def execution(self, first: int, waited: bool) -> Execution:
        """Return the execution that begins at a row; the first rank that asks says whether it has waited."""
        with self._planning:
            if first not in self._planned:
                # A rank may be whole executions ahead of another: each is kept until all have seen its end.
                for old in [old for old, (_, deal) in self._planned.items() if deal.is_over]:
                    del self._planned[old]
                planned = self._stream.execution(first, waited)
                deal = Deal(_block_refs(planned.dataset), self._stream.num_ranks)
                self._planned[first] = planned._replace(dataset=None), deal
            return self._planned[first][0]

    def parcel(self, first: int, rank: int) -> list[Any]:
        """Return a reference to the next parcel of a rank, of the execution that begins at a row; none when
        there are no more. It is in a list, because Ray would replace it by the parcel.
        """
        planned = self._planned.get(first)
        if planned is None:  # all ranks have seen its end, and this one asked ahead of it
            return []
        try:
            found = planned[1].next(rank)
        except RayTaskError as error:
            raise error.cause from None  # as the task raised it
        return [] if found is None else [found]


def _block_refs(dataset: ray.data.Dataset) -> Iterator[Any]:
    for bundle in dataset.iter_internal_ref_bundles():
        yield from bundle.block_refs


def start_dealer(stream: PairStream) -> tuple[str, Any]:
    """Start the dealer of a run on this node; return its name, by which other processes find it, and its
    handle, with which it ends.
    """
    name = f"pairs-{uuid.uuid4()}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(Dealer)
    return name, actor.options(
        name=name, num_cpus=0, max_concurrency=2 * stream.num_ranks, scheduling_strategy=here
    ).remote(stream)


def rank_batches(
    stream: PairStream, start_row: int, *, rank: int = 0, dealer: str | None = None, prefetch_parcels: int = 2
) -> Generator[Batch]:
    """Yield the batches of one rank without end, `train.batch_size / num_ranks` rows each (ranks whose share
    is not whole differ by one row). Columns: `pipelines.pairs.maker`.

    Called in the process that consumes them; all ranks consume at the same time.

    The batch of step s holds the rank's slots of stream rows [s B, (s + 1) B): the sequence does not depend
    on the cluster, or on where the run was interrupted. Executions of Ray Data follow one another
    behind it, each over many batches, because starting one costs seconds; the next starts while the last
    pairs of the one before are consumed, so that nobody waits for it. Arrays lie in Ray's shared memory and
    are read-only. Close the iterator to stop the tasks behind it.

    Args:
        stream: What all ranks consume.
        start_row: Number of rows that all ranks together have consumed, a multiple of the batch size.
        rank: Rank of this process.
        dealer: Name of the dealer of all ranks (`start_dealer`); None where one rank runs alone.
        prefetch_parcels: Number of parcels fetched ahead of the consumer, besides what the object store
            holds.

    Raises:
        ValueError: `start_row` is not where a batch begins, or several ranks have no dealer.
        ImageError: A whole row group is broken; single pictures are only counted (`substituted`) and logged.
        StorageError: The shards cannot be read; outages of less than half a minute are waited for.
        RuntimeError: Ray Data gave the pairs in another order than the plan says.
    """
    batch_size = stream.config.train.batch_size
    if start_row % batch_size:
        raise ValueError(f"start_row ({start_row}) must be a multiple of batch_size ({batch_size})")
    if dealer is None and stream.num_ranks > 1:
        raise ValueError(f"{stream.num_ranks} ranks need a dealer")
    own = Slots.of_rank(batch_size, rank, stream.num_ranks)
    slots = np.arange(own.start, own.stop)

    def started(first: int, waited: bool = False) -> tuple[Execution, Iterator[pa.Table]]:
        if dealer is None:
            execution = stream.execution(first, waited)
            blocks = iter(
                execution.dataset.iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=prefetch_parcels
                )
            )
        else:
            actor: Any = ray.get_actor(dealer)
            execution = _answer(actor.execution.remote(first, waited))
            blocks = _dealt(actor, first, rank, prefetch_parcels)
        return execution, itertools.chain([next(blocks)], blocks)

    expected = start_row
    with ThreadPoolExecutor(1, thread_name_prefix="next-pairs") as thread:
        coming = thread.submit(started, expected)
        while True:
            execution, blocks = coming.result()
            following: Future[tuple[Execution, Iterator[pa.Table]]] | None = None
            waits = Waits()
            for batch in waits.counted(batches(blocks, rank, len(slots))):
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
                if following is None and execution.stop - expected <= execution.lead:
                    following = thread.submit(started, execution.stop, waits.share > _WAITED)
            if expected != execution.stop or following is None:
                raise RuntimeError(
                    f"the training data of rank {rank} ended at row {expected} instead of {execution.stop}"
                )
            coming = following


class Waits:
    """The share of the time that a consumer waits for what it iterates over, from the first item on."""

    def __init__(self) -> None:
        self._began: float | None = None
        self._waited_s = 0.0

    def counted(self, items: Iterator[T]) -> Iterator[T]:
        """Yield the items."""
        asked = time.monotonic()
        for item in items:
            now = time.monotonic()
            if self._began is None:
                self._began = now
            else:
                self._waited_s += now - asked
            yield item
            asked = time.monotonic()

    @property
    def share(self) -> float:
        """Waiting over all time so far."""
        now = time.monotonic()
        return self._waited_s / max(1e-9, now - (self._began or now))


def _dealt(dealer: Any, first: int, rank: int, num_ahead: int) -> Generator[pa.Table]:
    """Yield the parcels that a rank is dealt of one execution; so many are fetched ahead."""

    def fetch() -> pa.Table | None:
        found = _answer(dealer.parcel.remote(first, rank))
        return ray.get(found[0]) if found else None

    pool = ThreadPoolExecutor(1, thread_name_prefix="parcels")
    try:
        coming = deque(pool.submit(fetch) for _ in range(num_ahead + 1))
        while (parcel := coming.popleft().result()) is not None:
            coming.append(pool.submit(fetch))
            yield parcel
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _answer(called: Any) -> Any:
    try:
        return ray.get(called)
    except RayTaskError as error:
        raise error.cause from None  # as it was raised there: callers tell errors by their types


def batches(blocks: Iterator[pa.Table], rank: int, num_rows: int) -> Iterator[Batch]:
    """Yield a rank's batches of so many rows, made of its parcels.

    Raises:
        RuntimeError: A parcel is another rank's, or the parcels end in the middle of a batch.
    """
    parts: list[Batch] = []
    missing = num_rows
    for block in blocks:
        parcel, taken = from_block(block, rank), 0
        while (rest := len(parcel["row"]) - taken) > 0:
            stop = taken + min(missing, rest)
            parts.append({name: column[taken:stop] for name, column in parcel.items()})
            missing -= stop - taken
            taken = stop
            if not missing:
                yield joined(parts)
                parts, missing = [], num_rows
    if parts:
        raise RuntimeError(f"the parcels of rank {rank} ended in the middle of a batch")
