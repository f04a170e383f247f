"""What the tasks that make training pairs may use of a cluster beside the workers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from pipelines.cluster.capacity import promised
from resshift.config import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """Room for the pairs of all ranks, beside the workers.

    Fields:
        cpus: Number of logical CPUs; see `cpus_of_a_task`.
        object_store_bytes: Room for pairs that wait to be consumed. Ray Data (2.60) starts no task beyond it,
            but lets those that run finish while a consumer waits for the first of them; see
            `pipelines.pairs.dataset.rows_per_task`.
        labels: Labels of the nodes that read and degrade, for example {"role": "data"}; None takes any node.
        may_grow: Whether an autoscaler would start more nodes.
    """

    cpus: float
    object_store_bytes: int
    labels: Mapping[str, str] | None = None
    may_grow: bool = False


def left_by_workers(held_cpus: float, *, waited: bool = False) -> Share:
    """Return what workers leave of the cluster: of its nodes with the label role=data where there are any,
    so that other nodes keep their cores for what runs there, else of all nodes.

    Nodes that an autoscaler would start are counted only as far as the run waits for data, because tasks that
    find no CPU are what makes it start them: none, twice the CPUs that there are after a wait, and one task
    where there is no CPU at all.

    Args:
        held_cpus: Logical CPUs that workers hold for their whole life; on other nodes than those for data as
            far as these have room.
        waited: Whether the run has waited for its data.

    Raises:
        ConfigError: No logical CPU would be left for data: the run would hang without an error.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    chosen = [node for node in alive if (node.get("Labels") or {}).get("role") == "data"]
    labels = {"role": "data"} if _total(chosen, "CPU") else None
    if labels is None:
        chosen = alive
    else:
        held_cpus = max(0.0, held_cpus - (_total(alive, "CPU") - _total(chosen, "CPU")))
    have = _total(chosen, "CPU") - held_cpus
    most = max(have, promised().get("CPU", 0.0) - held_cpus)
    cpus = min(most, max(1.0, 2 * have)) if waited else have
    if cpus < 0.1:
        cpus = min(1.0, most)
    if cpus < 0.1:
        raise ConfigError(
            f"{held_cpus:g} of {have + held_cpus:g} logical CPUs are held by workers, none is left to make "
            "training pairs"
        )
    # Ray Data itself keeps to half of the object store.
    return Share(
        cpus=cpus,
        object_store_bytes=int(_total(chosen, "object_store_memory") / 2),
        labels=labels,
        may_grow=most > cpus,
    )


def _total(nodes: Sequence[Mapping[str, Any]], name: str) -> float:
    return sum(node["Resources"].get(name, 0.0) for node in nodes)


def cpus_of_a_task(cpus: float) -> float:
    """Return how many logical CPUs a task asks for, so that as many tasks run as there are CPUs, a part of
    one counted as one.
    """
    return max(0.01, math.floor(100 * cpus / math.ceil(cpus)) / 100)
