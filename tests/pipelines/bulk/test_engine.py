"""A model that fits into no node is refused before replicas are started for it; a start that fails is told in
one line.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from pipelines.bulk.engine import cause, check_memory
from resshift.models import WeightsError
from resshift.presets import test_x4 as toy_preset
from resshift.training.step import build_network
from resshift.weights import save_model


def nodes(*memory: float, labels: dict[str, str] | None = None) -> list[dict[str, object]]:
    return [
        {"NodeID": "0" * 40, "Alive": True, "Labels": labels or {}, "Resources": {"memory": one}}
        for one in memory
    ]


def test_the_largest_node_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, "toy", toy_preset().model, build_network(toy_preset()))
    monkeypatch.setattr(ray, "nodes", lambda: nodes(10.0, 1e9))
    check_memory(str(tmp_path))
    monkeypatch.setattr(ray, "nodes", lambda: nodes(10.0, 20.0))
    with pytest.raises(
        WeightsError, match=r"the weights of toy need .* and the largest node of the cluster has"
    ):
        check_memory(str(tmp_path))
    check_memory("nearest-x4")  # has no weights
    monkeypatch.setattr(ray, "nodes", lambda: nodes(10.0, labels={"max-gpus": "4"}))
    check_memory(str(tmp_path))  # a larger node may come


def test_the_cause_of_a_failed_start_is_one_line() -> None:
    told = """The actor died because of an error raised in its creation task, ray::Replica.__init__() (pid=7)
  File "worker.py", line 3, in __init__
    raise DeviceError(told)
pipelines.cluster.granted.DeviceError: Ray granted GPU 0 of node-1, but torch finds no CUDA: no NVIDIA driver
"""
    assert cause(told) == "Ray granted GPU 0 of node-1, but torch finds no CUDA: no NVIDIA driver"
    assert cause("The actor died unexpectedly.\n\tpid: 7\n") == "The actor died unexpectedly. pid: 7"
