"""The bulk job: listing -> fetch and decode (CPU) -> upscale (engine) -> encode and put (CPU) -> ledger, all
stages at the same time.

A pull scheduler over Ray tasks and an engine, in one asyncio loop of the driver. Only references and rows
pass through the driver; pictures stay in the object store, within a budget of bytes. Each stage takes what it
can work on: CPU tasks scale with the cluster, replicas with the engine, and the listing is read as fast as
work is done.

Nothing is lost: every input gets exactly one row, in `_finish`; work that was interrupted is repeated and
gives the same bytes. When a worker or replica ends, the unfinished items of its unit go back to the queue.
The item that it was working on is a suspect: it is tried alone at its replica, and after `max_deaths` workers
that ended with it alone it becomes a row with reason killed_worker. Its neighbours are never charged.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import NodeDiedError, ObjectLostError, RayError, RayTaskError

from pipelines.bulk.engine import Engine
from pipelines.bulk.selection import Batch, WorkItem
from pipelines.bulk.stages import StageOptions, prepare, store
from pipelines.bulk.worker import ReplicaOptions, Started, Upscaled
from pipelines.ledger.ledger import Row, failed
from resshift.images.animation import Frames
from resshift.storage import StorageError

_HAND_ON_S = 5.0  # results of a unit are stored that often, and at its end
# Attempts at one item, whatever cut them off: on a cluster that keeps losing work it must not be retried
# forever.
_MAX_ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkOptions:
    """How the work is cut and how much of it is under way; nothing of it changes an output.

    Fields:
        unit_pictures, unit_megapixels: Inputs, or megapixels of input, with which the unit of a replica is
            full.
        fetch_pictures: Inputs of one fetch task.
        in_flight_mb: Megabytes of pictures in the object store; None: 40 % of the cluster's store.
        max_deaths: Number of workers that may end while they have an input alone.
    """

    unit_pictures: int = 8
    unit_megapixels: float = 1.0
    fetch_pictures: int = 8
    in_flight_mb: float | None = None
    max_deaths: int = 2

    def __post_init__(self) -> None:
        for name in ("unit_pictures", "fetch_pictures", "max_deaths"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.unit_megapixels <= 0 or (self.in_flight_mb is not None and self.in_flight_mb <= 0):
            raise ValueError(
                f"unit_megapixels and in_flight_mb must be positive, got {self.unit_megapixels} and "
                f"{self.in_flight_mb}"
            )


@dataclass(slots=True)
class _Ready:
    """A decoded input that waits for a replica."""

    item: WorkItem
    row: Row
    frames: ray.ObjectRef
    num_pixels: int
    reserved: int


@dataclass(slots=True)
class ReplicaTime:
    """How a replica spent its time: wall clock from its first unit to its last result, and seconds in the
    model.
    """

    first: float
    last: float = 0.0
    busy: float = 0.0


@dataclass(slots=True)
class Budget:
    """Bytes of pictures that may be in the object store."""

    limit: int
    used: int = 0
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def reserve(self, num_bytes: int) -> None:
        """Wait until there is room; one input always has, however large it is."""
        async with self.changed:
            await self.changed.wait_for(lambda: not self.used or self.used + num_bytes <= self.limit)
            self.used += num_bytes

    async def adjust(self, num_bytes: int) -> None:
        """Correct a reservation (positive: more), or give it back (negative)."""
        async with self.changed:
            self.used += num_bytes
            self.changed.notify_all()


@ray.remote(max_retries=0, num_cpus=1)
def _prepare(items: Sequence[WorkItem], options: StageOptions) -> tuple[Any, ...]:
    rows, frames = prepare(items, options)
    return [(row, one.num_pixels, one.num_bytes) for row, one in zip(rows, frames, strict=True)], *frames


@ray.remote(max_retries=0, num_cpus=1)
def _store(rows: Sequence[Row], options: StageOptions, *results: Frames) -> list[Row]:
    return store(rows, results, options)


class BulkRun:
    """One run of the job.

    Args:
        batches: What `Worklist.batches` yields.
        stages: Options of the CPU stages.
        engine: The GPU stage, started.
        options: How the work is cut.
        finished: Function that is called once for every input with its ledger row, in the loop's thread.
        settle: `Worklist.settle`: which inputs follow from the row of an item.
        num_cpus: CPUs of the cluster, the number of tasks that are submitted at a time.
        object_store_bytes: Size of the cluster's object store.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        stages: StageOptions,
        engine: Engine,
        options: BulkOptions,
        finished: Callable[[Row], None],
        *,
        num_cpus: int,
        object_store_bytes: int,
        settle: Callable[[Row], Batch] = lambda row: ([], []),
    ) -> None:
        self.stages, self.engine, self.options = stages, engine, options
        self.replica_times: dict[int, ReplicaTime] = {}
        self._batches, self._finished, self._settle = batches, finished, settle
        outputs = stages.outputs
        self._replica_options = ReplicaOptions(
            model=outputs.model, identity=outputs.identity, sampling=outputs.sampling
        )
        self._growth = 1 + max(outputs.scale, 1) ** 2
        self.budget = Budget(0)
        self.num_tasks = 1
        self.resize(num_cpus=num_cpus, object_store_bytes=object_store_bytes)
        self._queue: collections.deque[WorkItem] = collections.deque()
        self._ready: collections.deque[_Ready] = collections.deque()
        self._num_preparing = 0
        self._num_open = 0
        self._is_listed = False
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None
        self._listing = ThreadPoolExecutor(1, thread_name_prefix="listing")

    def resize(self, *, num_cpus: int, object_store_bytes: int) -> None:
        """Use what the cluster has now: nodes come and go while a job runs."""
        self.num_tasks = max(1, num_cpus)
        in_flight_mb = self.options.in_flight_mb
        self.budget.limit = int(in_flight_mb * 1e6 if in_flight_mb is not None else 0.4 * object_store_bytes)

    @property
    def is_listed(self) -> bool:
        """Whether the listing has come to its end."""
        return self._is_listed

    @property
    def is_idle(self) -> bool:
        """Whether every input that was listed so far has a row."""
        return not self._num_open

    async def run(self) -> None:
        """Run until every input has a row.

        Raises:
            EngineError: No replica can be started.
            StorageError: The listing failed, or the destination cannot be written.
        """
        ticking = asyncio.get_running_loop().create_task(self._tick())
        try:
            await asyncio.gather(self._guarded(self._fetch()), self._guarded(self._dispatch()))
        finally:
            ticking.cancel()
            for task in tuple(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._listing.shutdown(wait=False, cancel_futures=True)

    async def _tick(self) -> None:
        """Check the conditions regularly: this class is not told when replicas come and go."""
        while True:
            await asyncio.sleep(0.2)
            await self._notify()

    async def _guarded(self, work: Coroutine[Any, Any, None]) -> None:
        """End all parts with the error of one."""
        try:
            await work
        except BaseException as error:
            self._failure = self._failure or error
            async with self._changed:
                self._changed.notify_all()
            raise

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _wait_for(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure is not None or condition())
        if self._failure is not None:
            raise self._failure

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _is_done(self) -> bool:
        return self._is_listed and not self._num_open

    # Listing, fetch and decode.

    async def _more(self) -> None:
        """Take the next batch of the listing."""
        batch = await asyncio.get_running_loop().run_in_executor(self._listing, next, self._batches, None)
        if batch is None:
            self._is_listed = True
            await self._notify()
            return
        self._take(batch)

    def _take(self, batch: Batch) -> None:
        items, refused = batch
        self._num_open += len(items)
        self._queue.extend(items)
        for row in refused:
            self._finished(row)

    def _wants_inputs(self) -> bool:
        """Whether more should be decoded now, so that every replica finds its next units full."""
        ahead = self.options.unit_pictures * 2 * (self.engine.num_replicas + 1)
        tasks = -(-self._num_preparing // self.options.fetch_pictures)
        return (
            tasks < self.num_tasks
            and self._num_preparing + len(self._ready) < ahead + self.options.fetch_pictures
        )

    async def _fetch(self) -> None:
        while True:
            await self._wait_for(
                lambda: self._is_done() or (self._wants_inputs() and bool(self._queue or not self._is_listed))
            )
            if self._is_done():
                return
            if not self._queue:
                await self._more()
                continue
            items = [self._queue.popleft()]
            while (
                not items[0].is_suspect
                and len(items) < self.options.fetch_pictures
                and self._queue
                and not self._queue[0].is_suspect
            ):
                items.append(self._queue.popleft())
            self._num_preparing += len(items)
            # What a file takes in memory is known when it is decoded; until then, twelve times its size is
            # assumed.
            reserved = min(sum(int(12 * item.size * self._growth) for item in items), self.budget.limit)
            await self.budget.reserve(reserved)
            self._spawn(self._prepare(items, reserved))

    async def _prepare(self, items: list[WorkItem], reserved: int) -> None:
        # Ray's stubs know a single return value.
        refs: Any = _prepare.options(num_returns=1 + len(items)).remote(items, self.stages)
        rows_ref, *frame_refs = refs
        try:
            answers: list[tuple[Row, int, int]] = await rows_ref
        except RayError as error:
            await self.budget.adjust(-reserved)
            self._cut_off(items, error, suspects=items)
        else:
            await self.budget.adjust(-reserved)
            for item, (row, num_pixels, num_bytes), frames in zip(items, answers, frame_refs, strict=True):
                if row["status"] == "ok":
                    needed = int(num_bytes * self._growth)
                    await self.budget.adjust(needed)
                    self._ready.append(_Ready(item, row, frames, num_pixels, needed))
                else:
                    self._finish(row)
        self._num_preparing -= len(items)
        await self._notify()

    # Upscale.

    def _has_unit(self) -> bool:
        """Whether a unit can be sent: a full one, or what there is when nothing more comes or a replica has
        nothing to do.
        """
        if not self._ready:
            return False
        full = len(self._ready) >= self.options.unit_pictures
        full = full or sum(entry.num_pixels for entry in self._ready) >= self.options.unit_megapixels * 1e6
        return (
            full
            or not (self._num_preparing or self._queue)
            or self.engine.is_starving
            or self._ready[0].item.is_suspect
        )

    def _take_unit(self) -> list[_Ready]:
        unit = [self._ready.popleft()]
        num_pixels = unit[0].num_pixels
        while self._ready and len(unit) < self.options.unit_pictures and not unit[0].item.is_suspect:
            following = self._ready[0]
            if (
                following.item.is_suspect
                or num_pixels + following.num_pixels > self.options.unit_megapixels * 1e6
            ):
                break
            num_pixels += following.num_pixels
            unit.append(self._ready.popleft())
        return unit

    async def _dispatch(self) -> None:
        while True:
            await self._wait_for(lambda: self._is_done() or self._has_unit())
            if self._is_done():
                return
            await self.engine.wait_for_slot()
            if self._has_unit():
                unit = self._take_unit()
                self._spawn(self._upscale(unit))
                await self._notify()
                await asyncio.sleep(0)  # the unit takes its slot before the next one asks for one

    async def _upscale(self, unit: list[_Ready]) -> None:
        answered: list[tuple[_Ready, Upscaled, ray.ObjectRef]] = []
        num_handed_on, handed_on_at = 0, time.monotonic()
        started: Started | None = None
        keys = [entry.item.key for entry in unit]
        # A suspect is alone at its replica, so that its death says who it was. A unit that happens to have
        # one picture has neighbours there and is not charged.
        is_alone = unit[0].item.is_suspect
        inputs = [entry.frames for entry in unit]
        stream = self.engine.upscale(self._replica_options, keys, inputs, alone=is_alone)
        try:
            async with contextlib.aclosing(stream):
                started = await (await anext(stream))
                assert started is not None
                times = self.replica_times.setdefault(started.replica, ReplicaTime(started.at))
                for entry in unit:
                    result = await anext(stream)
                    try:
                        upscaled: Upscaled = await (await anext(stream))
                    except StopAsyncIteration:
                        await result  # a stream ends with the error in place of a result
                        raise
                    times.busy, times.last = times.busy + upscaled.seconds, upscaled.at
                    answered.append((entry, upscaled, result))
                    # Slow pictures do not wait for their unit: what is stored is not repeated after a kill,
                    # and progress shows.
                    if time.monotonic() - handed_on_at > _HAND_ON_S:
                        await self._hand_on(answered[num_handed_on:])
                        num_handed_on, handed_on_at = len(answered), time.monotonic()
        except (RayError, StopAsyncIteration) as error:
            left = unit[len(answered) :]
            await self.budget.adjust(-sum(entry.reserved for entry in left))
            self._cut_off(
                [entry.item for entry in left],
                error,
                suspects=[entry.item for entry in left[: 0 if started is None else started.ahead]],
                alone=is_alone,
            )
        await self._hand_on(answered[num_handed_on:])
        await self._notify()

    async def _hand_on(self, answered: Sequence[tuple[_Ready, Upscaled, ray.ObjectRef]]) -> None:
        """Start storing results; finish the inputs that the model failed on."""
        for entry, upscaled, _ in answered:
            if upscaled.reason:
                await self.budget.adjust(-entry.reserved)
                self._finish(failed(entry.row, upscaled.reason, upscaled.message))
        if good := [(entry, result, upscaled) for entry, upscaled, result in answered if not upscaled.reason]:
            self._spawn(self._store(good))

    # Encode and put.

    async def _store(self, results: list[tuple[_Ready, ray.ObjectRef, Upscaled]]) -> None:
        rows: list[Row] = [
            {
                **entry.row,
                "model_seconds": upscaled.seconds,
                "seconds": (entry.row["seconds"] or 0.0) + upscaled.seconds,
            }
            for entry, _, upscaled in results
        ]
        try:
            finished: list[Row] = await _store.remote(
                rows, self.stages, *(result for _, result, _ in results)
            )
        except RayError as error:
            items = [entry.item for entry, _, _ in results]
            self._cut_off(items, error, suspects=items)
        else:
            for row in finished:
                self._finish(row)
        await self.budget.adjust(-sum(entry.reserved for entry, _, _ in results))
        await self._notify()

    def _finish(self, row: Row) -> None:
        self._num_open -= 1
        self._finished(row)
        self._take(self._settle(row))

    def _cut_off(
        self,
        items: Sequence[WorkItem],
        error: BaseException,
        *,
        suspects: Sequence[WorkItem],
        alone: bool | None = None,
    ) -> None:
        """Put unfinished items back into the queue, and charge a death to the one that was alone.

        Raises:
            StorageError: The destination cannot be written.
            RayTaskError: The cause is no death but an error in this code; retrying cannot help.
        """
        cause = error.cause if isinstance(error, RayTaskError) else error
        if isinstance(error, RayTaskError) and not isinstance(cause, RayError):
            raise cause if isinstance(cause, StorageError) else error
        is_alone = len(items) == 1 if alone is None else alone
        # A lost node takes objects and CPU tasks with it, which says nothing about a picture. Nor does a
        # machine that was taken back. A replica that ends with its node is charged: a picture may bring a
        # node down.
        is_of_node = isinstance(cause, ObjectLostError | NodeDiedError) or getattr(cause, "preempted", False)
        suspected = set[str]() if is_of_node else {item.key for item in suspects}
        for item in items:
            again = replace(item, attempts=item.attempts + 1)
            if item.key in suspected:
                again = replace(again, is_suspect=True, deaths=item.deaths + (1 if is_alone else 0))
            if again.deaths >= self.options.max_deaths or again.attempts >= _MAX_ATTEMPTS:
                told = " ".join(str(cause).split())[:300]
                message = (
                    f"{again.deaths} workers ended while they had this input alone, {again.attempts} "
                    f"attempts in all: {told}"
                )
                self._finish(failed(item.row(self.stages.outputs.identity), "killed_worker", message))
            else:
                self._queue.append(again)


def busy_share(times: Sequence[ReplicaTime]) -> float | None:
    """Return seconds in the model over wall clock, of all replicas together; None when nothing was done."""
    wall = sum(one.last - one.first for one in times if one.last > one.first)
    return sum(one.busy for one in times if one.last > one.first) / wall if wall > 0 else None
