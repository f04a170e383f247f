"""The engine that owns its replicas: Ray actors of one bulk job."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import ray
from ray.exceptions import RayActorError

from pipelines.bulk.engine import UNITS_PER_REPLICA, EngineError, EngineOptions, admitted, cause
from pipelines.bulk.worker import Replica, ReplicaOptions

_MAX_FAILED_STARTS = 5


@dataclass(slots=True, eq=False)
class _Member:
    """A replica of the pool."""

    actor: Any
    is_ready: bool = False
    in_flight: int = 0
    idle_since: float = field(default_factory=time.monotonic)


class ActorEngine:
    """A pool of actors that belongs to this job alone.

    Args:
        options: Options of the replicas.
        is_admitted: Whether there is room for them all.
    """

    def __init__(self, options: EngineOptions, *, is_admitted: bool = False) -> None:
        self.options, self._is_admitted = options, is_admitted
        self._members: list[_Member] = []
        self._changed = asyncio.Condition()
        self._starved_since: float | None = None
        self._failed_starts = 0
        self._error: EngineError | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = threading.Event()

    @property
    def num_replicas(self) -> int:
        return sum(member.is_ready for member in self._members)

    @property
    def is_starving(self) -> bool:
        return any(member.is_ready and not member.in_flight for member in self._members)

    async def start(self) -> None:
        await self._admit()
        for _ in range(self.options.low):
            self._add()
        self._spawn(self._scale())

    async def _admit(self) -> None:
        if not self._is_admitted:
            self.options = await asyncio.to_thread(admitted, self.options, self._pause)
            self._is_admitted = True

    async def divide(self, num_drivers: int) -> list[Callable[[], ActorEngine]]:
        """Give each driver its part of the replicas, one at least: a replica ends with the driver that has
        started it.
        """
        await self._admit()
        options = self.options
        return [
            partial(ActorEngine, replace(options, low=max(1, low), high=max(1, high)), is_admitted=True)
            for low, high in zip(
                parts(options.low, num_drivers), parts(options.high, num_drivers), strict=True
            )
        ]

    def _pause(self, seconds: float) -> None:
        """Wait for room; `close` ends it."""
        if self._ended.wait(seconds):
            raise EngineError("stopped before there was room for a replica")

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _add(self) -> None:
        options = self.options
        decorate: Any = ray.remote  # Ray's stubs do not accept fractions of a GPU
        actor_class = decorate(
            num_cpus=options.num_cpus,
            num_gpus=options.num_gpus,
            max_concurrency=UNITS_PER_REPLICA + 1,
            max_restarts=0,
            max_task_retries=0,
        )(Replica)
        member = _Member(
            actor_class.remote(options.model, options.identity, options.num_threads, options.step_s)
        )
        self._members.append(member)
        self._spawn(self._await_ready(member))

    async def _await_ready(self, member: _Member) -> None:
        try:
            await member.actor.pid.remote()
        except RayActorError as error:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._error = EngineError(
                    f"{self._failed_starts} replicas in a row could not start: {cause(str(error))}"
                )
            await self._remove(member)
            return
        self._failed_starts = 0
        member.is_ready, member.idle_since = True, time.monotonic()
        async with self._changed:
            self._changed.notify_all()

    async def _remove(self, member: _Member) -> None:
        """Forget a replica that is dead and start another in its place."""
        if member in self._members:
            self._members.remove(member)
            if len(self._members) < self.options.low and self._error is None:
                self._add()
        async with self._changed:
            self._changed.notify_all()

    def _free(self) -> _Member | None:
        free = [
            member for member in self._members if member.is_ready and member.in_flight < UNITS_PER_REPLICA
        ]
        return min(free, key=lambda member: member.in_flight, default=None)

    async def wait_for_slot(self) -> None:
        async with self._changed:
            while self._free() is None:
                if self._error is not None:
                    raise self._error
                if self._starved_since is None:
                    self._starved_since = time.monotonic()
                await self._changed.wait()
            # Work that waits for the second place at a busy replica could be done by another replica.
            if self.is_starving:
                self._starved_since = None

    async def upscale(
        self, options: ReplicaOptions, keys: Sequence[str], inputs: Sequence[ray.ObjectRef], *, alone: bool
    ) -> AsyncGenerator[ray.ObjectRef]:
        await self.wait_for_slot()
        member = self._free()
        assert member is not None  # nothing was awaited since
        member.in_flight += 1
        try:
            async for ref in member.actor.upscale.options(num_returns="streaming").remote(
                options, keys, *inputs, alone=alone
            ):
                yield ref
        finally:
            member.in_flight -= 1
            member.idle_since = time.monotonic()
            async with self._changed:
                self._changed.notify_all()
            self._spawn(self._check(member))

    async def _check(self, member: _Member) -> None:
        """Find out whether a replica still lives."""
        try:
            await member.actor.pid.remote()
        except RayActorError:
            await self._remove(member)

    async def _scale(self) -> None:
        """Add a replica when work has waited; end one that has been idle."""
        options = self.options
        while True:
            await asyncio.sleep(0.25)
            now = time.monotonic()
            are_ready = all(member.is_ready for member in self._members)
            if (
                self._starved_since is not None
                and now - self._starved_since > options.upscale_s
                and are_ready
            ):
                if len(self._members) < options.high:
                    self._add()
                self._starved_since = None
            idle = [
                m
                for m in self._members
                if m.is_ready and not m.in_flight and now - m.idle_since > options.downscale_s
            ]
            if idle and len(self._members) > options.low:
                self._members.remove(idle[0])
                ray.kill(idle[0].actor)

    async def close(self) -> None:
        self._ended.set()
        for task in tuple(self._tasks):
            task.cancel()
        for member in self._members:
            ray.kill(member.actor)
        self._members.clear()


def parts(number: int, num_parts: int) -> list[int]:
    """Return whole numbers that differ by one at most and add up to a number."""
    return [number // num_parts + (i < number % num_parts) for i in range(num_parts)]
