"""What a driver may ask for on a cluster that grows: what runs, or what a label promises."""

from __future__ import annotations

from typing import Any

import pytest
import ray

from pipelines.cluster.capacity import has_gpus, reachable


def cluster(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], *labels: dict[str, str], alive: bool = True
) -> None:
    nodes: list[dict[str, Any]] = [
        {"NodeID": f"{i:040d}", "Alive": alive, "Labels": found} for i, found in enumerate(labels)
    ]
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    monkeypatch.setattr(ray, "nodes", lambda: nodes)


@pytest.mark.parametrize(
    ("resources", "labels", "expected"),
    [
        ({"CPU": 8.0, "GPU": 1.0}, [{}], {"CPU": 8.0, "GPU": 1.0}),
        (
            {"memory": 5.0},
            [{"role": "head", "max-cpus": "480", "max-gpus": "12"}],
            {"memory": 5.0, "CPU": 480.0, "GPU": 12.0},
        ),
        ({"CPU": 8.0}, [{"max-gpus": "0"}], {"CPU": 8.0, "GPU": 0.0}),
        # More runs than was promised: somebody added nodes by hand.
        ({"CPU": 16.0}, [{"max-cpus": "4"}, {}], {"CPU": 16.0}),
        ({"CPU": 1.0}, [{"max-cpus": "4"}, {"max-cpus": "6"}], {"CPU": 6.0}),
    ],
)
def test_the_larger_of_what_runs_and_what_is_promised(
    monkeypatch: pytest.MonkeyPatch,
    resources: dict[str, float],
    labels: list[dict[str, str]],
    expected: dict[str, float],
) -> None:
    cluster(monkeypatch, resources, *labels)
    assert reachable() == expected
    assert has_gpus() == (expected.get("GPU", 0.0) >= 1)


def test_a_head_that_is_gone_promises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {"CPU": 2.0}, {"max-gpus": "3"}, alive=False)
    assert not has_gpus()


def test_a_promise_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster(monkeypatch, {}, {"max-gpus": "many"})
    with pytest.raises(
        ValueError, match=r"label max-gpus of node 00000000 must be a whole number, got 'many'"
    ):
        reachable()
