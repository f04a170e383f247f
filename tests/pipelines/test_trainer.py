"""Who trains, and whether a run may be continued; the loop itself is tested end to end in tests/jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.trainer import Workers, begin_run, plan_workers
from resshift.checkpoint import ResumeRefused
from resshift.config import ConfigError, with_settings
from resshift.presets import test_x4 as toy_preset


@pytest.mark.parametrize(
    ("num", "gpus", "cluster", "expected"),
    [
        (1, None, {"CPU": 8.0}, Workers(num=1, gpus=0, cpus=1)),
        (4, None, {"CPU": 16.0, "GPU": 4.0}, Workers(num=4, gpus=1, cpus=1)),
        (4, None, {"CPU": 16.0, "GPU": 2.0}, Workers(num=4, gpus=0, cpus=1)),
        (4, 0.5, {"CPU": 16.0, "GPU": 2.0}, Workers(num=4, gpus=0.5, cpus=1)),
        (1, None, {"CPU": 2.0}, Workers(num=1, gpus=0, cpus=0.5)),
        (2, None, {"CPU": 2.0}, Workers(num=2, gpus=0, cpus=0.25)),
    ],
)
def test_workers_leave_cpus_for_the_data(num: int, gpus: float | None, cluster: dict[str, float], expected: Workers) -> None:
    workers = plan_workers(num, gpus, cluster)
    assert workers == expected
    assert cluster["CPU"] - workers.num * workers.cpus >= 1


@pytest.mark.parametrize(
    ("num", "gpus", "cluster", "message"),
    [
        (0, None, {"CPU": 8.0}, "at least 1, got 0"),
        (4, 1.0, {"CPU": 8.0, "GPU": 2.0}, "need 4, the cluster has 2"),
        (1, None, {"CPU": 1.0}, "at least 2 logical CPUs.*has 1"),
    ],
)
def test_what_cannot_work_is_refused(num: int, gpus: float | None, cluster: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_workers(num, gpus, cluster)


def test_run_directory_belongs_to_one_configuration(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    begin_run(toy_preset(), "shards", out)
    begin_run(with_settings(toy_preset(), ["train.steps=77"]), "shards", out)
    with pytest.raises(ResumeRefused, match=r"optim\.lr: 0\.0005 -> 0\.1"):
        begin_run(with_settings(toy_preset(), ["optim.lr=0.1"]), "shards", out)
