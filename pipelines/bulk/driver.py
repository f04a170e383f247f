"""A driver: schedules the inputs of some ranges of keys and writes their rows. A job has one in its own
process, or several as actors, which share the replicas; `pipelines.bulk.crew` gives them ranges.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipelines.bulk.engine import Engine
from pipelines.bulk.progress import JobProgress
from pipelines.bulk.scheduler import BulkOptions, BulkRun, ReplicaTime
from pipelines.bulk.selection import Batch, ListingCounts
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.bulk.sweep import Inputs, RangeState, RangeWork, Share, sum_counts
from pipelines.cluster.capacity import reachable
from pipelines.ledger import ledger
from pipelines.ledger.ledger import LedgerWriter, Row

_LOOK_EVERY_S = 5.0  # seconds between two looks at the size of the cluster
_LISTED_AT_A_TIME = 4  # ranges: while a page of one is on its way, others are divided


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything about a run but its engine.

    Fields:
        source: SRC.
        stages: What is made, and where.
        bulk: How the work is cut.
    """

    source: str
    stages: StageOptions
    bulk: BulkOptions = field(default_factory=BulkOptions)

    @property
    def outputs(self) -> UpscaleOptions:
        """What is made."""
        return self.stages.outputs

    def record(self) -> dict[str, Any]:
        """Return what job.json says."""
        return self.outputs.record(self.source)


@dataclass(frozen=True, kw_only=True, slots=True)
class DriverState:
    """What a driver tells of itself.

    Fields:
        ranges: Its ranges; one that is finished is told once.
        num_waiting: Number of its ranges whose listing has not ended.
        counts: Number of finished inputs by status.
        megapixels: Megapixels of input upscaled.
        share: See `BulkRun.share`.
        listing: Counts of the listings of all its ranges so far.
        replica_times: Times of replicas, by process id.
    """

    ranges: tuple[RangeState, ...]
    num_waiting: int
    counts: Counter[str]
    megapixels: float
    share: float
    listing: ListingCounts
    replica_times: dict[int, ReplicaTime]


def capacity(num_drivers: int = 1) -> dict[str, int]:
    """Return `num_cpus` and `object_store_bytes` of a driver: its share of all CPUs that the cluster can have
    and of the memory that it has.
    """
    resources = reachable()
    return {
        "num_cpus": int(resources.get("CPU", 1)) // num_drivers,
        "object_store_bytes": int(resources.get("object_store_memory", 1 << 30)) // num_drivers,
    }


class Driver:
    """A driver of a job.

    Args:
        job: The job.
        inputs: Its inputs.
        run: Id of the run, for the rows.
        make_engine: Function that returns the engine.
        num_drivers: Number of drivers of the run.
        progress: Counts of what is finished; None: those of this driver alone.
    """

    def __init__(
        self,
        job: Job,
        inputs: Inputs,
        run: str,
        make_engine: Callable[[], Engine],
        num_drivers: int = 1,
        progress: JobProgress | None = None,
    ) -> None:
        self._job, self._inputs, self._run, self._num_drivers = job, inputs, run, num_drivers
        self._make_engine = make_engine
        self._bulk: BulkRun | None = None
        self.progress = progress or JobProgress(ListingCounts())
        self._works: dict[int, RangeWork] = {}
        self._to_list: deque[RangeWork] = deque()
        self._num_unlisted = 0
        self._work_of: dict[str, RangeWork] = {}  # of inputs that are under way
        self._ended_counts = ListingCounts()
        self._given = threading.Condition()
        self._is_complete = False
        self._task: asyncio.Task[Any] | None = None
        self._is_stopped = False

    def give(self, *ranges: Share | RangeWork) -> None:
        """Take ranges; one that was begun in this process may come as it is."""
        for one in ranges:
            work = one if isinstance(one, RangeWork) else RangeWork(one, self._inputs, self._job.stages)
            self._works[work.share.id] = work
            with self._given:
                self._num_unlisted += 1
                self._to_list.append(work)
                self._given.notify_all()

    def shrink(self, id: int, stop: str) -> bool:
        """Give away the end of a range; return False when it cannot be."""
        return id in self._works and self._works[id].shrink(stop)

    def complete(self) -> None:
        """Take note that no more ranges come."""
        with self._given:
            self._is_complete = True
            self._given.notify_all()

    def stop(self) -> None:
        """End `run` early; what is done is in the ledger then."""
        self._is_stopped = True
        if self._task is not None:
            self._task.cancel()

    def state(self) -> DriverState:
        """Return how far this driver is."""
        works = list(self._works.values())
        listing = sum_counts([self._ended_counts, *(work.worklist.counts for work in works if work.is_begun)])
        states = tuple(work.state() for work in works)
        for work, state in zip(works, states, strict=True):
            if state.is_finished:
                self._ended_counts = sum_counts([self._ended_counts, work.worklist.counts])
                del self._works[state.id]
        return DriverState(
            ranges=states,
            num_waiting=sum(not state.is_listed for state in states),
            counts=Counter(self.progress.counts),
            megapixels=self.progress.megapixels,
            share=0.0 if self._bulk is None else self._bulk.share,
            listing=listing,
            replica_times={} if self._bulk is None else dict(self._bulk.replica_times),
        )

    def batches(self) -> Iterator[Batch]:
        """Yield what is to be done in the ranges, some of them by turns; nothing while there is none."""
        batches: dict[int, Iterator[Batch]] = {}
        while True:
            with self._given:
                if not self._to_list and not self._is_complete:
                    self._given.wait(0.1)
                if not self._to_list and self._is_complete:
                    return
                work = self._to_list.popleft() if self._to_list else None
            if work is None:
                yield [], []  # the scheduler goes on with what is cut off meanwhile
                continue
            id = work.share.id
            batch = next(batches.setdefault(id, work.batches()), None)
            if batch is None:
                del batches[id]
                with self._given:
                    self._num_unlisted -= 1
                continue
            with self._given:
                self._to_list.insert(_LISTED_AT_A_TIME - 1, work)
            self._work_of.update((item.key, work) for item in batch[0])
            yield batch

    def _settle(self, row: Row) -> Batch:
        work = self._work_of.pop(row["key"])
        items, refused = work.worklist.settle(row)
        self._work_of.update((item.key, work) for item in items)
        return items, refused

    def write(self, rows: Sequence[Row]) -> None:
        """Write a part of the ledger, in the thread of its writer."""
        ledger.append(self._job.stages.target, rows, self._job.stages.target_s3)
        keys = [row["key"] for row in rows]
        for work in list(self._works.values()):
            if work.is_begun:
                work.worklist.written(keys)

    async def run(self) -> DriverState:
        """Work until `complete` was called and all ranges are finished.

        Raises:
            EngineError: No replica can be started.
            StorageError: The listing failed, or the destination or the ledger cannot be read or written.
        """
        self._task = asyncio.current_task()
        if self._is_stopped:
            return self.state()
        writer = LedgerWriter(self.write)

        def finished(rows: Sequence[Row]) -> None:
            self.progress.count(rows)
            writer.add([{**row, "run": self._run} for row in rows])

        engine = self._make_engine()
        bulk = self._bulk = BulkRun(
            self.batches(),
            self._job.stages,
            engine,
            self._job.bulk,
            finished,
            settle=self._settle,
            **capacity(self._num_drivers),
        )
        watching = asyncio.get_running_loop().create_task(self._watch(bulk, writer))
        working: asyncio.Task[None] | None = None
        try:
            await engine.start()
            working = asyncio.get_running_loop().create_task(bulk.run())
            for ended in (await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED))[0]:
                ended.result()
        except asyncio.CancelledError:
            if not self._is_stopped:
                raise
        finally:
            self.complete()
            tasks = [watching] if working is None else [watching, working]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.shield(asyncio.to_thread(writer.close))
            await engine.close()
        return self.state()

    async def _watch(self, bulk: BulkRun, writer: LedgerWriter) -> None:
        looked_at = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            if bulk.is_idle and not self._num_unlisted:
                writer.flush()  # somebody waits for the ranges to be finished
            writer.flush_if_due()
            if time.monotonic() - looked_at > _LOOK_EVERY_S:
                bulk.resize(**await asyncio.to_thread(capacity, self._num_drivers))  # asks the head
                looked_at = time.monotonic()
