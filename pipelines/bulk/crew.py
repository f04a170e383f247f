"""The drivers of a job and the ranges of keys that they work on.

    Sweep --shares--> Crew --give, shrink--> Driver 1 ... N --rows--> parts of the ledger
                           <-----state------

One driver works in the process of the job. Several are actors, each in a process of its own. A driver without
a range gets the next one that nobody has, else the half of what another one has not listed yet; so it is the
work that divides the listing. When a driver ends (its node is lost, say) its ranges go to others from their
cursors on, minus what it wrote to the ledger. Cursors are saved while the job runs.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipelines.bulk.driver import Driver, DriverState, Job
from pipelines.bulk.engine import Engine, EngineError
from pipelines.bulk.progress import JobProgress
from pipelines.bulk.scheduler import ReplicaTime
from pipelines.bulk.selection import ListingCounts
from pipelines.bulk.sweep import RangeState, Share, Sweep, sum_counts
from pipelines.ledger.ledger import Interval
from resshift.storage import Entry

_LOOK_S = 0.25
_SAVE_S = 10.0
_MOST_RANGES = 4  # of a driver that are listed at a time
_STOP_S = 20.0
_MOST_LOST = 20  # drivers of a run that end before they should

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Member:
    """A driver.

    Fields:
        driver: The driver or its actor.
        running: Its `run`.
        shares: Its ranges that are not finished, by id.
        state: What it told last.
    """

    driver: Any
    running: asyncio.Task[DriverState]
    shares: dict[int, Share] = field(default_factory=dict[int, Share])
    state: DriverState | None = None

    def state_of(self, id: int) -> RangeState | None:
        """Return what it told last of a range."""
        ranges = () if self.state is None else self.state.ranges
        return next((one for one in ranges if one.id == id), None)


class Crew:
    """The drivers of a run.

    Args:
        job: The job.
        sweep: The pass over its inputs.
        engine: The engine; that of the one driver, or what drivers share.
        run: Id of the run.
        progress: What is shown.
        num_drivers: Number of drivers.
        moved: Function that is called when inputs have been finished, or slow ones have got on.
    """

    def __init__(
        self,
        job: Job,
        sweep: Sweep,
        engine: Engine,
        run: str,
        progress: JobProgress,
        num_drivers: int,
        moved: Callable[[], None],
    ) -> None:
        self._job, self._sweep, self._engine, self._run = job, sweep, engine, run
        self._make_engine: Callable[[], Engine] = lambda: engine
        self._progress, self._num_drivers, self._moved = progress, num_drivers, moved
        self._members: list[_Member] = []
        self._ended: list[DriverState] = []
        self._aside: list[Entry] = []
        self._waiting: list[Interval] = []  # ranges that are finished but for what they put aside
        self._narrow: set[int] = set()  # ranges that cannot be divided
        self._dividing: asyncio.Task[None] | None = None
        self._num_lost = 0
        self._reached = (0, 0.0)  # number of finished inputs, and share of those under way

    @property
    def is_alone(self) -> bool:
        """Whether the one driver works in this process."""
        return self._num_drivers == 1

    @property
    def num_replicas(self) -> int:
        """Replicas that are ready."""
        return self._engine.num_replicas

    @property
    def is_listed(self) -> bool:
        """Whether the listing has come to its end."""
        waiting = (member.state is None or member.state.num_waiting for member in self._members)
        return not self._sweep.queue and not any(waiting)

    @property
    def replica_times(self) -> dict[int, ReplicaTime]:
        """Times of the replicas, by process id."""
        found: dict[int, ReplicaTime] = {}
        for state in self._states():
            for pid, times in state.replica_times.items():
                one = found.setdefault(pid, ReplicaTime(times.first))
                one.first, one.last = min(one.first, times.first), max(one.last, times.last)
                one.busy += times.busy
        return found

    def _states(self) -> list[DriverState]:
        return [*self._ended, *(member.state for member in self._members if member.state is not None)]

    async def work(self) -> None:
        """Work until every input has a row.

        Raises:
            EngineError: No replica can be started, or drivers keep ending.
            StorageError: The listing, the destination or the ledger cannot be read or written.
        """
        try:
            if self.is_alone:
                self._add()
                only = self._members[0]
                for work in self._sweep.begun:
                    only.shares[work.share.id] = work.share
                only.driver.give(*self._sweep.begun)
                if [(share.start, share.stop) for share in only.shares.values()] == [("", None)]:
                    only.driver.complete()  # nothing can be put aside
            else:
                self._sweep.unread()
                self._make_engine = await self._engine.start_shared(self._num_drivers)
                for _ in range(self._num_drivers):
                    self._add()
                await asyncio.to_thread(self._sweep.divide, self._num_drivers)
            await self._attend()
        finally:
            await asyncio.shield(self._end())

    def _add(self) -> None:
        arguments = (self._job, self._sweep.inputs, self._run, self._make_engine, self._num_drivers)
        loop = asyncio.get_running_loop()
        if self.is_alone:
            driver = Driver(*arguments, self._progress)
            self._members.append(_Member(driver, loop.create_task(driver.run())))
            return
        actor = start_actor(*arguments)
        self._members.append(_Member(actor, loop.create_task(_result(actor.run.remote()))))

    async def _ask(self, member: _Member, method: str, *arguments: Any) -> Any:
        call = getattr(member.driver, method)
        return call(*arguments) if self.is_alone else await _result(call.remote(*arguments))

    async def _tell(self, member: _Member, method: str, *arguments: Any) -> Any:
        """Ask a driver for something; None if it has ended, which the next look at it tells."""
        try:
            return await self._ask(member, method, *arguments)
        except RayActorError:
            return None

    async def _attend(self) -> None:
        """Give ranges to drivers until nothing is left."""
        saved_at = time.monotonic()
        while True:
            running = {member.running for member in self._members}
            await asyncio.wait(running, timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.gather(*(self._look(member) for member in tuple(self._members)))
            self._count()
            if not self._members:
                return
            is_dividing = self._dividing is not None and not self._dividing.done()
            if not (self._sweep.queue or is_dividing or any(member.shares for member in self._members)):
                if self._aside:
                    await asyncio.to_thread(self._sweep.look_into_ledger)
                    aside = sorted(self._aside, key=lambda entry: entry.key)
                    self._sweep.queue.append(self._sweep.share("", None, aside))
                    self._aside.clear()
                else:
                    await asyncio.gather(*(self._tell(member, "complete") for member in self._members))
            await self._deal()
            if time.monotonic() - saved_at > _SAVE_S:
                await asyncio.to_thread(self._sweep.save)
                saved_at = time.monotonic()

    async def _look(self, member: _Member) -> None:
        """Take note of what a driver tells, or that it has ended."""
        try:
            if member.running.done():
                self._note(member, member.running.result())
                self._ended.append(member.running.result())
                self._members.remove(member)
            else:
                self._note(member, await self._ask(member, "state"))
        except RayActorError as error:
            await self._lose(member, error)

    def _note(self, member: _Member, state: DriverState) -> None:
        member.state = state
        for one in state.ranges:
            share = member.shares.get(one.id)
            if share is None:
                continue
            if not share.aside:
                self._sweep.finished.add(share.start, one.cursor)
            if not one.is_finished:
                continue
            del member.shares[one.id]
            if share.aside:
                for start, stop in self._waiting:
                    self._sweep.finished.add(start, stop)
                self._waiting.clear()
            elif one.aside:
                self._aside += one.aside
                self._waiting.append((share.start, one.stop))

    def _count(self) -> None:
        states = self._states()
        total = sum_counts(state.listing for state in states)
        for name in ListingCounts.__dataclass_fields__:
            setattr(self._sweep.counts, name, getattr(total, name))
        counts = sum((state.counts for state in states), Counter[str]())
        if not self.is_alone:
            self._progress.take(counts, sum(state.megapixels for state in states))
        share = self._progress.share = sum(state.share for state in states)
        if (counts.total(), share) != self._reached:
            self._reached = counts.total(), share
            self._moved()

    async def _lose(self, member: _Member, error: RayActorError) -> None:
        """Put the ranges of a driver that has ended back, and start another one."""
        self._num_lost += 1
        logger.warning("driver lost, its %d ranges go to others: %s", len(member.shares), error)
        if self._num_lost > _MOST_LOST:
            raise EngineError(f"{self._num_lost} drivers of this run have ended: {error}")
        member.running.cancel()
        await asyncio.gather(member.running, return_exceptions=True)
        self._members.remove(member)
        if member.state is not None:
            # What it had listed and not finished is listed again.
            counts, listing = member.state.counts, member.state.listing
            again = listing.pending + listing.refused - counts.total()
            listing = replace(listing, listed=listing.listed - again, pending=listing.pending - again)
            self._ended.append(replace(member.state, listing=listing, ranges=(), share=0.0))
        await asyncio.to_thread(self._sweep.look_into_ledger)
        for share in member.shares.values():
            known = member.state_of(share.id)
            start = share.start if known is None or known.cursor is None else known.cursor
            self._sweep.queue.appendleft(self._sweep.share(start, share.stop, share.aside))
        self._add()

    async def _deal(self) -> None:
        """Give ranges to those who have none, then some more; divide a range for those who get none."""
        hungry = sorted(self._members, key=lambda member: self._num_unlisted(member))
        for most in range(1, _MOST_RANGES + 1):
            for member in hungry:
                if self._sweep.queue and self._num_unlisted(member) < most:
                    share = self._sweep.queue.popleft()
                    member.shares[share.id] = share
                    await self._tell(member, "give", share)
        if (
            self._sweep.is_divisible
            and not self.is_alone
            and not self._sweep.queue
            and any(not self._num_unlisted(member) for member in hungry)
            and (self._dividing is None or self._dividing.done())
        ):
            if self._dividing is not None:
                self._dividing.result()
            self._dividing = asyncio.get_running_loop().create_task(self._divide())

    def _num_unlisted(self, member: _Member) -> int:
        states = [member.state_of(id) for id in member.shares]
        return sum(state is None or not state.is_listed for state in states)

    async def _divide(self) -> None:
        """Take the end of what a driver has not listed yet."""
        for member in tuple(self._members):
            for share in tuple(member.shares.values()):
                state = member.state_of(share.id)
                if share.aside or share.id in self._narrow or state is None or state.is_listed:
                    continue
                limit = await asyncio.to_thread(self._sweep.limit_within, state.position, share.stop)
                if limit is None or limit <= state.position:
                    self._narrow.add(share.id)
                    continue
                # One that is lost meanwhile has its whole range put back.
                if not await self._tell(member, "shrink", share.id, limit) or member not in self._members:
                    continue
                if share.id in member.shares:
                    member.shares[share.id] = replace(share, stop=limit)
                self._sweep.queue.append(self._sweep.share(limit, share.stop))
                return

    async def _end(self) -> None:
        """End the drivers; what is done is in the ledger then."""
        if self._dividing is not None:
            self._dividing.cancel()
        running = [member.running for member in self._members]
        for member in self._members:
            if self.is_alone:
                member.driver.stop()
            else:
                member.driver.stop.remote()
        if running:
            done, _ = await asyncio.wait(running, timeout=None if self.is_alone else _STOP_S)
            for member in self._members:
                if (
                    member.running in done
                    and not member.running.cancelled()
                    and not member.running.exception()
                ):
                    self._note(member, member.running.result())
        if not self.is_alone:
            for member in self._members:
                kill_actor(member.driver)
        self._count()


def start_actor(*arguments: Any) -> Any:
    """Start a driver in a process of its own, which reserves a CPU."""
    decorate: Any = ray.remote
    return decorate(num_cpus=1, max_restarts=0, max_task_retries=0)(Driver).remote(*arguments)


def kill_actor(actor: Any) -> None:
    """End the process of a driver."""
    ray.kill(actor)


async def _result(ref: Any) -> Any:
    """Return what a call of an actor returns; an error in it is raised as it was there."""
    try:
        return await ref
    except RayTaskError as error:
        cause = error.cause
        raise (
            cause if isinstance(cause, Exception) and not isinstance(error, RayActorError) else error
        ) from None
