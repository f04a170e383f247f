"""The bulk job: listing -> fetch and decode (CPU) -> upscale (engine) -> encode and put (CPU) -> ledger, all
stages at the same time.

A pull scheduler over Ray tasks and an engine, in one asyncio loop of the driver. Only references and rows
pass through the driver; pictures stay in the object store, within a budget of bytes. Each stage takes what it
can work on: CPU tasks scale with the cluster, replicas with the engine, and the listing is read as fast as
work is done.

Tasks and units are cut by what they are expected to cost: by bytes in the listing before pictures are
decoded, by megapixels and the measured speed of the model then. Small pictures travel in hundreds
(`pipelines.bulk.parcels`), large or slow ones in eights at most.

Nothing is lost: every input gets exactly one row, in `_finish`; work that was interrupted is repeated and
gives the same bytes. When a worker or replica ends, the unfinished items of its unit go back to the queue: in
units of a few, if it was a large one. Of a few, the item that it was working on is a suspect: it is tried
alone at its replica, and after `max_deaths` workers that ended with it alone it becomes a row with reason
killed_worker. Its neighbours are never charged.
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

from pipelines.bulk.engine import UNITS_PER_REPLICA, Engine
from pipelines.bulk.parcels import FEW, MOST_PARCELS, Parcel, Underway, by_key, packed
from pipelines.bulk.selection import Batch, WorkItem
from pipelines.bulk.stages import StageOptions, prepare, store
from pipelines.bulk.worker import ReplicaOptions, Started, Upscaled
from pipelines.ledger.ledger import Row, failed
from resshift.storage import StorageError

_HAND_ON_S = 5.0  # results of a unit are stored that often, and at its end
_UNIT_S = 2.0  # time in the model that a unit of more than a few pictures is expected to take at most
# What a file takes in memory is known when it is decoded; until then, this many times its size is assumed.
_BYTES_A_BYTE = 12
_FETCH_BYTES = 2_000_000  # files of a fetch task, if they are more than a few
# Attempts at one item, whatever cut them off: on a cluster that keeps losing work it must not be retried
# forever.
_MAX_ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class BulkOptions:
    """How the work is cut and how much of it is under way; nothing of it changes an output.

    Fields:
        unit_pictures, unit_megapixels: Inputs, or megapixels of input, with which the unit of a replica is
            full.
        fetch_pictures: Inputs of one fetch task at most.
        in_flight_mb: Megabytes of pictures in the object store; None: 40 % of the cluster's store.
        max_deaths: Number of workers that may end while they have an input alone.
    """

    unit_pictures: int = 256
    unit_megapixels: float = 1.0
    fetch_pictures: int = 256
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
    """A decoded input that waits for a replica, in a parcel with others."""

    item: WorkItem
    row: Row
    parcel: ray.ObjectRef
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
    places = packed(frames)
    parcels: list[Parcel] = []
    for place in range(_num_parcels(items)):
        among = [i for i in range(len(rows)) if places[i] == place]
        parcels.append(Parcel(tuple(items[i].key for i in among), tuple(frames[i] for i in among)))
    sizes = ((one.num_pixels, one.num_bytes) for one in frames)
    return [(row, *size, place) for row, size, place in zip(rows, sizes, places, strict=True)], *parcels


def _num_parcels(items: Sequence[WorkItem]) -> int:
    return min(MOST_PARCELS, len(items))


@ray.remote(max_retries=0, num_cpus=1)
def _store(rows: Sequence[Row], options: StageOptions, *results: Parcel) -> list[Row]:
    frames = by_key(results)
    return store(rows, [frames[row["key"]] for row in rows], options)


class BulkRun:
    """One run of the job.

    Args:
        batches: What `Worklist.batches` yields.
        stages: Options of the CPU stages.
        engine: The GPU stage, started.
        options: How the work is cut.
        finished: Function that is called with ledger rows, once for every input, in the loop's thread.
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
        finished: Callable[[Sequence[Row]], None],
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
        self._ready_pixels = 0
        self._num_preparing = self._preparing_pixels = self._num_fetching = 0
        self._model_seconds = self._model_pixels = 0.0
        self._num_open = 0
        self._shares: dict[str, float] = {}  # of inputs that take long
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
    def share(self) -> float:
        """Sum over the inputs that take long of the shares of their work that are done."""
        return sum(self._shares.values())

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
            parts = (self._list(), self._fetch(), self._dispatch())
            await asyncio.gather(*(self._guarded(part) for part in parts))
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
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # it is in _failure: asyncio logs a traceback of what nobody asks for

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

    # Listing.

    async def _list(self) -> None:
        """Read ahead in the listing, by what two tasks take."""
        loop = asyncio.get_running_loop()
        while not self._is_listed:
            await self._wait_for(lambda: len(self._queue) < 2 * self.options.fetch_pictures)
            batch = await loop.run_in_executor(self._listing, next, self._batches, None)
            if batch is None:
                self._is_listed = True
            else:
                self._take(batch)
            await self._notify()

    def _take(self, batch: Batch) -> None:
        items, refused = batch
        self._num_open += len(items)
        self._queue.extend(items)
        if refused:
            self._finished(refused)

    # Fetch and decode.

    def _wants_inputs(self) -> bool:
        """Whether more should be decoded now, so that every replica finds its next units full."""
        units = UNITS_PER_REPLICA * (self.engine.num_replicas + 1)
        num = self._num_preparing + len(self._ready)
        num_pixels = self._preparing_pixels + self._ready_pixels
        return self._num_fetching < self.num_tasks and (
            num < (units + 1) * min(FEW, self.options.unit_pictures)
            or (
                num < units * self.options.unit_pictures
                and num_pixels < units * self.options.unit_megapixels * 1e6
            )
        )

    async def _fetch(self) -> None:
        while True:
            await self._wait_for(lambda: self._is_done() or bool(self._queue and self._wants_inputs()))
            if self._is_done():
                return
            items = self._take_items()
            num_pixels = sum(map(_expected_pixels, items))
            self._num_fetching += 1
            self._num_preparing += len(items)
            self._preparing_pixels += num_pixels
            reserved = int(sum(_BYTES_A_BYTE * item.size for item in items) * self._growth)
            reserved = min(reserved, self.budget.limit)
            await self.budget.reserve(reserved)
            self._spawn(self._prepare(items, num_pixels, reserved))

    def _take_items(self) -> list[WorkItem]:
        """Take the inputs of a task from the queue: many small ones, as long as there are enough for all."""
        share = max(FEW, -(-len(self._queue) // max(1, self.num_tasks - self._num_fetching)))
        most = min(self.options.fetch_pictures, share)
        items: list[WorkItem] = []
        num_bytes = 0
        while self._queue:
            following = self._queue[0]
            most, num_bytes = min(most, following.company), num_bytes + following.size
            if items and (len(items) >= most or (len(items) >= FEW and num_bytes > _FETCH_BYTES)):
                break
            items.append(self._queue.popleft())
        return items

    async def _prepare(self, items: list[WorkItem], num_pixels: int, reserved: int) -> None:
        # Ray's stubs know a single return value.
        refs: Any = _prepare.options(num_returns=1 + _num_parcels(items)).remote(items, self.stages)
        answers_ref, *parcels = refs
        try:
            answers: list[tuple[Row, int, int, int]] = await answers_ref
        except RayError as error:
            await self.budget.adjust(-reserved)
            self._cut_off(items, error, suspects=items, num_together=len(items))
        else:
            self._queue.extendleft(reversed(items[len(answers) :]))  # a task may leave some
            num_bytes = 0
            finished: list[Row] = []
            for item, (row, pixels, size, place) in zip(items, answers, strict=False):
                if row["status"] == "ok":
                    needed = int(size * self._growth)
                    num_bytes += needed
                    self._ready.append(_Ready(item, row, parcels[place], pixels, needed))
                    self._ready_pixels += pixels
                else:
                    finished.append(row)
            await self.budget.adjust(num_bytes - reserved)
            self._finish(finished)
        self._num_fetching -= 1
        self._num_preparing -= len(items)
        self._preparing_pixels -= num_pixels
        await self._notify()

    # Upscale.

    def _may_be_unit(self, num: int, num_pixels: int) -> bool:
        """Whether so many pictures may be one unit."""
        if num > self.options.unit_pictures or num_pixels > self.options.unit_megapixels * 1e6:
            return False
        seconds = self._model_seconds * num_pixels / self._model_pixels if self._model_pixels else _UNIT_S
        return num <= FEW or seconds < _UNIT_S

    def _has_unit(self) -> bool:
        """Whether a unit can be sent: a full one, or what there is when nothing more comes or a replica has
        nothing to do.
        """
        if not self._ready:
            return False
        return (
            not self._may_be_unit(len(self._ready) + 1, self._ready_pixels + 1)
            or not (self._num_preparing or self._queue)
            or self.engine.is_starving
            or self._ready[0].item.is_suspect
        )

    def _take_unit(self) -> list[_Ready]:
        unit: list[_Ready] = []
        num_pixels, most = 0, self.options.unit_pictures
        while self._ready:
            following = self._ready[0]
            most, num_pixels = min(most, following.item.company), num_pixels + following.num_pixels
            if unit and (len(unit) >= most or not self._may_be_unit(len(unit) + 1, num_pixels)):
                break
            unit.append(self._ready.popleft())
        self._ready_pixels -= sum(entry.num_pixels for entry in unit)
        # A replica answers in order: what is small does not wait for what is large.
        return sorted(unit, key=lambda entry: entry.num_pixels)

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
        parcels = list(dict.fromkeys(entry.parcel for entry in unit))
        stream = self.engine.upscale(self._replica_options, keys, parcels, alone=is_alone)
        try:
            async with contextlib.aclosing(stream):
                started = await (await anext(stream))
                assert started is not None
                times = self.replica_times.setdefault(started.replica, ReplicaTime(started.at))
                while len(answered) < len(unit):
                    result = await anext(stream)
                    try:
                        group: Sequence[Upscaled | Underway] = await (await anext(stream))
                    except StopAsyncIteration:
                        await result  # a stream ends with the error in place of a result
                        raise
                    for upscaled in group:
                        if isinstance(upscaled, Underway):
                            self._shares.update(upscaled.shares)
                            continue
                        entry = unit[len(answered)]
                        if entry.item.key in self._shares:
                            self._shares[entry.item.key] = 1.0  # until it is stored
                        times.busy, times.last = times.busy + upscaled.seconds, upscaled.at
                        self._model_seconds += upscaled.seconds
                        self._model_pixels += entry.num_pixels
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
                num_together=len(unit),
                alone=is_alone,
            )
        await self._hand_on(answered[num_handed_on:])
        await self._notify()

    async def _hand_on(self, answered: Sequence[tuple[_Ready, Upscaled, ray.ObjectRef]]) -> None:
        """Start storing results; finish the inputs that the model failed on."""
        bad = [(entry, upscaled) for entry, upscaled, _ in answered if upscaled.reason]
        if bad:
            await self.budget.adjust(-sum(entry.reserved for entry, _ in bad))
            self._finish([failed(entry.row, told.reason, told.message) for entry, told in bad])
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
            parcels = dict.fromkeys(result for _, result, _ in results)
            finished: list[Row] = await _store.remote(rows, self.stages, *parcels)
        except RayError as error:
            items = [entry.item for entry, _, _ in results]
            self._cut_off(items, error, suspects=items, num_together=len(items))
        else:
            self._finish(finished)
        await self.budget.adjust(-sum(entry.reserved for entry, _, _ in results))
        await self._notify()

    def _finish(self, rows: Sequence[Row]) -> None:
        self._num_open -= len(rows)
        self._finished(rows)
        for row in rows:
            self._shares.pop(row["key"], None)
            self._take(self._settle(row))

    def _cut_off(
        self,
        items: Sequence[WorkItem],
        error: BaseException,
        *,
        suspects: Sequence[WorkItem],
        num_together: int,
        alone: bool | None = None,
    ) -> None:
        """Put unfinished items back into the queue, and charge a death to the one that was alone.

        Args:
            items: The items.
            error: What ended their task or unit.
            suspects: Those that it may have been working on; of many, whether it was working on any.
            num_together: Number of all its items.
            alone: Whether nobody else was at the worker; None: if nobody else was in the task.

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
        is_large = num_together > FEW
        suspected = set[str]() if is_of_node or is_large else {item.key for item in suspects}
        for item in items:
            self._shares.pop(item.key, None)
            again = replace(item, attempts=item.attempts + 1)
            if is_large and suspects and not is_of_node:
                again = replace(again, company=FEW)
            elif item.key in suspected:
                again = replace(again, company=1, deaths=item.deaths + is_alone)
            if again.deaths >= self.options.max_deaths or again.attempts >= _MAX_ATTEMPTS:
                told = " ".join(str(cause).split())[:300]
                message = (
                    f"{again.deaths} workers ended while they had this input alone, {again.attempts} "
                    f"attempts in all: {told}"
                )
                self._finish([failed(item.row(self.stages.outputs.identity), "killed_worker", message)])
            else:
                self._queue.append(again)


def _expected_pixels(item: WorkItem) -> int:
    return _BYTES_A_BYTE * item.size // 3


def busy_share(times: Sequence[ReplicaTime]) -> float | None:
    """Return seconds in the model over wall clock, of all replicas together; None when nothing was done."""
    wall = sum(one.last - one.first for one in times if one.last > one.first)
    return sum(one.busy for one in times if one.last > one.first) / wall if wall > 0 else None
