"""The GPU stage of a bulk job as the scheduler sees it, and the options that its replicas are started with.

An engine takes a work unit (decoded inputs in the object store) and returns the stream of `Replica.upscale`:
references that the driver owns, so results outlive the replica that made them. `serve.engine` is the one
that there is, on replicas of a Serve deployment; this package, on which `serve` depends, knows it by its
interface.

Two units are in flight at a replica: while one is computed, the inputs of the next arrive and the results of
the previous one are stored.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import ray

from pipelines.bulk.nearest import nearest_model
from pipelines.bulk.wedged import DEFAULT_STEP_S
from pipelines.bulk.worker import ReplicaOptions
from pipelines.cluster.admission import wait_for_room
from pipelines.cluster.capacity import has_gpus, promised, reachable
from resshift.models import locate_model

UNITS_PER_REPLICA = 2

logger = logging.getLogger(__name__)


class EngineError(RuntimeError):
    """No replica can be started; the message says why."""


def cause(told: str) -> str:
    """Return what Ray or Serve tells of a process that did not start, without the traceback: the message of
    the last error in it, in one line.
    """
    errors = re.findall(r"^\s*[\w.]*(?:Error|Exception): (.+)", told, re.MULTILINE)
    return errors[-1].strip() if errors else " ".join(told.split())


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOptions:
    """Options that replicas are started with.

    Fields:
        model, identity: See `Replica`.
        low, high: Smallest and largest number of replicas.
        num_gpus, num_cpus: Logical GPUs and CPUs that a replica reserves.
        num_threads: Threads of the networks on a CPU.
        upscale_s: Seconds that work waits before another replica is started.
        downscale_s: Seconds that a replica is idle before it is stopped.
        step_s: Seconds after which a step of a replica counts as hung, see `pipelines.bulk.wedged`.
        ongoing: Number of requests at a time at a replica of a Serve deployment; pictures of all of them
            share the calls of a GPU.
        reserved_cpus: CPUs that replicas leave to tasks, one at least, and to drivers.
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
    reserved_cpus: float = 1
    step_s: float = DEFAULT_STEP_S


def replica_resources(num_gpus: float | None, most_replicas: int) -> tuple[float, int]:
    """Return (GPUs, threads of the networks on a CPU) of a replica on the connected cluster.

    Args:
        num_gpus: GPUs that were asked for; None: one where the cluster has any.
        most_replicas: Number of replicas that may share the cores of a machine.
    """
    gpus = float(has_gpus()) if num_gpus is None else num_gpus
    return gpus, 1 if gpus else max(1, (os.cpu_count() or 1) // most_replicas)


def most_replicas(num_gpus: float | None) -> int:
    """Return how many replicas the connected cluster can have: by its GPUs, or one for each machine with
    CPUs where there are none.

    Args:
        num_gpus: GPUs of a replica; None: one where the cluster has any.
    """
    gpus = float(has_gpus()) if num_gpus is None else num_gpus
    if gpus:
        return max(1, int(reachable().get("GPU", 0.0) / gpus + 1e-6))
    return max(1, sum(node["Alive"] and node["Resources"].get("CPU", 0) >= 1 for node in ray.nodes()))


def check_memory(model: str) -> None:
    """Refuse a model whose weights fit into no node of the connected cluster, before a replica is started for
    it. A cluster that grows may get larger nodes: there the replicas find out.

    Raises:
        WeightsError: No node has the memory.
    """
    if nearest_model(model) is not None or promised():
        return
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    # Of the memory that was free when Ray started, a part belongs to the object store.
    largest = max(sum(node.get(name, 0.0) for name in ("memory", "object_store_memory")) for node in alive)
    locate_model(model).check_memory(int(largest), "the largest node of the cluster")


def admitted(options: EngineOptions, sleep: Callable[[float], None] = time.sleep) -> EngineOptions:
    """Return the options with as many replicas as the connected cluster has room for beside
    `reserved_cpus`; waits until the smallest number has room, and says for what.

    Args:
        options: What was asked for.
        sleep: Function that waits; what it raises ends the wait.

    Raises:
        EngineError: The cluster can never have the smallest number.
    """
    held = {"CPU": options.num_cpus, "GPU": options.num_gpus}
    fits = _most_replicas(held, reachable(), options.reserved_cpus)
    if fits < options.low:
        raise EngineError(
            f"{options.low} replicas need {options.low * options.num_cpus:g} CPUs and "
            f"{options.low * options.num_gpus:g} GPUs, and drivers and tasks {options.reserved_cpus:g} more; "
            "the cluster has room for "
            f"{fits}: ask for fewer (--replicas)"
        )
    needed = {name: options.low * number for name, number in held.items()}
    needed["CPU"] += options.reserved_cpus
    has = wait_for_room("the bulk job", needed, sleep=sleep)
    most = min(options.high, _most_replicas(held, has, options.reserved_cpus))
    if most < options.high:
        logger.warning("replicas=%d:%d instead of %d: no room for more", options.low, most, options.high)
    return replace(options, high=max(most, options.low))


def _most_replicas(held: Mapping[str, float], has: Mapping[str, float], reserved_cpus: float) -> int:
    """Return how many replicas fit beside CPUs for tasks and drivers."""
    rooms = {"CPU": has.get("CPU", 0.0) - reserved_cpus, "GPU": has.get("GPU", 0.0)}
    fits = [int(max(0.0, rooms[name]) / number + 1e-6) for name, number in held.items() if number]
    return min(fits, default=1 << 30)


class Engine(Protocol):
    """The GPU stage as the bulk job uses it."""

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
        self, options: ReplicaOptions, keys: Sequence[str], inputs: Sequence[ray.ObjectRef], *, alone: bool
    ) -> AsyncGenerator[ray.ObjectRef]:
        """Upscale the pictures of these keys, which are in these parcels; yield references to what
        `Replica.upscale` yields.
        """
        ...

    async def close(self) -> None:
        """End what this engine started."""
        ...

    async def start_shared(self, num_drivers: int) -> Callable[[], Engine]:
        """Start replicas that several drivers share; return the function by which each makes its engine."""
        ...
