"""What jobs wait for on a cluster that others use, too."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import pytest
import ray

from pipelines.bulk import engine
from pipelines.bulk.engine import EngineError, EngineOptions, admitted
from pipelines.cluster import admission
from pipelines.cluster.admission import Patience, free, wait_for_room


class Cluster:
    """A cluster whose free CPUs change with time; waiting for them takes none."""

    def __init__(self, *cpus: float, gpus: float = 0.0) -> None:
        self.now, self.cpus, self.gpus = 0.0, cpus, gpus

    def look(self) -> dict[str, float]:
        return {"CPU": self.cpus[min(int(self.now), len(self.cpus) - 1)], "GPU": self.gpus}

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def wait(self, cpus: float) -> dict[str, float]:
        return wait_for_room("training", {"CPU": cpus, "GPU": 0.0}, self.look, self.sleep, lambda: self.now)


def test_who_has_room_does_not_wait(caplog: pytest.LogCaptureFixture) -> None:
    cluster = Cluster(3.0)
    assert cluster.wait(2) == {"CPU": 3.0, "GPU": 0.0}
    assert cluster.now == 0.0
    assert caplog.text == ""


def test_tasks_that_come_and_go_hold_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """All CPUs are busy at first, two a second later."""
    assert Cluster(0.0, 2.0).wait(2)["CPU"] == 2.0
    assert caplog.text == ""


def test_it_says_every_half_minute_what_is_missing_and_goes_on_when_it_is_there(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cluster = Cluster(*[1.0] * 100, 4.0)
    assert cluster.wait(2)["CPU"] == 4.0
    assert 100 <= cluster.now < 104
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 4
    assert set(lines) == {"training waits for 2 CPUs (1 free): the rest of the cluster is held by others"}


def test_what_an_autoscaler_would_start_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 3.0})
    monkeypatch.setattr(admission, "reachable", lambda: {"CPU": 32.0, "GPU": 4.0})
    assert free() == {"CPU": 27.0, "GPU": 3.0}


def replicas(low: int, high: int, cpus: float = 1.0, gpus: float = 0.0) -> EngineOptions:
    return EngineOptions(model="m", identity="i", low=low, high=high, num_cpus=cpus, num_gpus=gpus)


@pytest.fixture
def has(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """Return what the cluster has, and what of it is free."""
    stated = {"all": {"CPU": 4.0}, "free": {"CPU": 4.0}}
    monkeypatch.setattr(engine, "reachable", lambda: stated["all"])
    monkeypatch.setattr(engine, "wait_for_room", lambda *_, **__: stated["free"])
    return stated


def test_replicas_leave_a_cpu_for_their_tasks(
    has: dict[str, dict[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    assert admitted(replicas(1, 3)) == replicas(1, 3)
    assert caplog.text == ""
    assert admitted(replicas(1, 8)) == replicas(1, 3)
    assert "replicas=1:3 instead of 8: no room for more" in caplog.text
    has["free"] = {"CPU": 3.0}
    assert admitted(replicas(2, 3)) == replicas(2, 2)
    with_drivers = replace(replicas(1, 3), reserved_cpus=2)
    assert admitted(with_drivers) == replace(with_drivers, high=1)


def test_replicas_that_no_time_will_bring_are_refused(has: dict[str, dict[str, float]]) -> None:
    """Two of them on two CPUs used to stand still without a word."""
    has["all"] = {"CPU": 2.0}
    with pytest.raises(
        EngineError, match=r"2 replicas need 2 CPUs and 0 GPUs, and drivers and tasks 1 more; .* room for 1"
    ):
        admitted(replicas(2, 2))
    has["all"] = {"CPU": 64.0, "GPU": 1.0}
    with pytest.raises(EngineError, match="room for 1"):
        admitted(replicas(2, 2, gpus=1.0))


def test_replicas_that_reserve_nothing_fit_always(has: dict[str, dict[str, float]]) -> None:
    assert admitted(replicas(1, 5, cpus=0.0)) == replicas(1, 5, cpus=0.0)


@pytest.mark.slow
def test_a_wait_says_what_is_free_meanwhile(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 0.0})
    caplog.set_level(logging.WARNING)
    patience = Patience("worker 0 has been waiting", after_s=0.3)
    for _ in range(10):  # something moves often enough
        patience.waits()
        time.sleep(0.05)
    assert caplog.text == ""
    time.sleep(0.6)
    patience.works()
    patience.close()
    assert "worker 0 has been waiting for 0 s; free are 0 of 4 CPUs and 0 of 0 GPUs" in caplog.text
