"""What is left of a cluster for data."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from pipelines.pairs.share import Share, cpus_of_a_task, left_by_workers
from resshift.config import ConfigError


def node(cpus: float, role: str, alive: bool = True) -> dict[str, Any]:
    return {
        "Alive": alive,
        "Labels": {"role": role},
        "Resources": {"CPU": cpus, "object_store_memory": 1000.0},
    }


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    found = [node(4, "gpu"), node(16, "gpu"), node(16, "gpu", alive=False)]
    monkeypatch.setattr(ray, "nodes", lambda: found)
    return found


def test_what_workers_leave_is_counted(nodes: list[dict[str, Any]]) -> None:
    assert left_by_workers(2) == Share(cpus=18, object_store_bytes=1000)
    with pytest.raises(ConfigError, match="20 of 20 logical CPUs are held by workers, none is left"):
        left_by_workers(20)


def test_data_goes_to_its_own_nodes_where_there_are_any(nodes: list[dict[str, Any]]) -> None:
    """Workers are on the others as far as these have room."""
    nodes.append(node(8, "data"))
    data = {"role": "data"}
    assert left_by_workers(2) == Share(cpus=8, object_store_bytes=500, labels=data)
    assert left_by_workers(23).cpus == 5
    nodes[-1]["Alive"] = False
    assert left_by_workers(2).labels is None


def test_nodes_are_asked_for_only_as_far_as_the_run_waits(nodes: list[dict[str, Any]]) -> None:
    nodes.append(node(0, "head"))
    nodes[-1]["Labels"]["max-cpus"] = "100"
    assert left_by_workers(2) == Share(cpus=18, object_store_bytes=1500, may_grow=True)
    assert left_by_workers(2, waited=True).cpus == 36
    nodes.append(node(40, "gpu"))
    assert [left_by_workers(2, waited=waited).cpus for waited in (False, True)] == [58, 98]
    del nodes[-1]
    assert left_by_workers(20).cpus == 1, "one task that waits brings the first node"
    assert left_by_workers(20, waited=True).cpus == 1
    del nodes[-1]
    assert left_by_workers(2, waited=True) == Share(cpus=18, object_store_bytes=1000), "nothing to ask for"


@pytest.mark.parametrize(
    ("cpus", "tasks"), [(0.25, 1), (1, 1), (1.9, 2), (2, 2), (2.5, 3), (16, 16), (30.01, 31)]
)
def test_as_many_tasks_as_cpus(cpus: float, tasks: int) -> None:
    asked = cpus_of_a_task(cpus)
    assert 0 < asked <= 1
    assert int(cpus / asked + 1e-9) == tasks


def test_a_share_of_next_to_nothing_asks_for_something() -> None:
    assert cpus_of_a_task(0.004) == 0.01
