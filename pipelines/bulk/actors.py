"""The GPU stage: a small interface, and the engine that owns its replicas.

An engine takes a work unit (decoded inputs in the object store) and returns the stream of `Replica.upscale`:
references that the driver owns, so results outlive the replica that made them. The other engine, replicas of
a Serve deployment, is in `serve.engine`.

Two units are in flight at a replica: while one is computed, the inputs of the next arrive and the results of
the previous one are stored.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
from ray.exceptions import RayActorError

from pipelines.bulk.worker import Replica, ReplicaOptions
from pipelines.cluster.capacity import has_gpus

UNITS_PER_REPLICA = 2
_MAX_FAILED_STARTS = 5


class EngineError(RuntimeError):
    """No replica can be started; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """What replicas are started with.

    Fields:
        model, identity: See `Replica`.
        low, high: Fewest and most replicas.
        num_gpus, num_cpus: What a replica reserves, as Ray counts.
        num_threads: Threads of the networks on a CPU.
        upscale_s: Seconds that work waits before another replica is started.
        downscale_s: Seconds that a replica is idle before it is ended.
        ongoing: Requests at a time at a replica of a Serve deployment; pictures of all of them share the
            calls of a GPU.
    """

    model: str
    identity: str
    low: int = 1
    high: int = 1
    num_gpus: float = 0
    num_cpus: float = 1
    num_threads: int = 1
    upscale_s: float = 5.0
    downscale_s: float = 60.0
    ongoing: int = UNITS_PER_REPLICA


def replica_resources(num_gpus: float | None, most_replicas: int) -> tuple[float, int]:
    """Return (GPUs, threads of the networks on a CPU) of a replica on the connected cluster.

    Args:
        num_gpus: GPUs that were asked for; None: one where the cluster has any.
        most_replicas: Number of replicas that may share the cores of a machine.
    """
    gpus = float(has_gpus()) if num_gpus is None else num_gpus
    return gpus, 1 if gpus else max(1, (os.cpu_count() or 1) // most_replicas)


class Engine(Protocol):
    """What the bulk job needs of the GPU stage."""

    @property
    def num_replicas(self) -> int:
        """Replicas that are ready."""
        ...

    @property
    def is_starving(self) -> bool:
        """Whether a replica that is ready has nothing to do."""
        ...

    async def start(self) -> None:
        """Start the replicas; some may become ready later."""
        ...

    async def wait_for_slot(self) -> None:
        """Return when a unit can be taken.

        Raises:
            EngineError: No replica can be started.
        """
        ...

    def upscale(
        self, options: ReplicaOptions, keys: Sequence[str], inputs: Sequence[ray.ObjectRef]
    ) -> AsyncGenerator[ray.ObjectRef]:
        """Upscale a unit; yield references to what `Replica.upscale` yields."""
        ...

    async def close(self) -> None:
        """End what this engine started."""
        ...


@dataclass(slots=True, eq=False)
class _Member:
    """A replica of the pool."""

    actor: Any
    is_ready: bool = False
    in_flight: int = 0
    idle_since: float = field(default_factory=time.monotonic)


class ActorEngine:
    """A pool of actors that belongs to this job alone."""

    def __init__(self, options: EngineOptions) -> None:
        self.options = options
        self._members: list[_Member] = []
        self._changed = asyncio.Condition()
        self._starved_since: float | None = None
        self._failed_starts = 0
        self._error: EngineError | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def num_replicas(self) -> int:
        return sum(member.is_ready for member in self._members)

    @property
    def is_starving(self) -> bool:
        return any(member.is_ready and not member.in_flight for member in self._members)

    async def start(self) -> None:
        for _ in range(self.options.low):
            self._add()
        self._spawn(self._scale())

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
        member = _Member(actor_class.remote(options.model, options.identity, options.num_threads))
        self._members.append(member)
        self._spawn(self._await_ready(member))

    async def _await_ready(self, member: _Member) -> None:
        try:
            await member.actor.pid.remote()
        except RayActorError as error:
            self._failed_starts += 1
            if self._failed_starts >= _MAX_FAILED_STARTS:
                self._error = EngineError(
                    f"{self._failed_starts} replicas in a row could not start: {str(error).strip()}"
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
        self, options: ReplicaOptions, keys: Sequence[str], inputs: Sequence[ray.ObjectRef]
    ) -> AsyncGenerator[ray.ObjectRef]:
        await self.wait_for_slot()
        member = self._free()
        assert member is not None  # nothing was awaited since
        member.in_flight += 1
        try:
            async for ref in member.actor.upscale.options(num_returns="streaming").remote(
                options, keys, *inputs
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
        for task in tuple(self._tasks):
            task.cancel()
        for member in self._members:
            ray.kill(member.actor)
        self._members.clear()
