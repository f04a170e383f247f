"""Who trains, and whether a run may be continued; the loop itself is tested end to end in
test_on_ray.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.training import checkpoints
from pipelines.training.trainer import Workers, begin_run, plan_workers, with_absolute_files
from pipelines.training.worker import Assignment
from resshift import storage
from resshift.config import ConfigError, with_settings
from resshift.presets import test_x4 as toy_preset
from resshift.training.autoencoder import vq_f4
from resshift.training.checkpoint import ResumeRefused


@pytest.mark.parametrize(
    ("num", "gpus", "cluster", "expected"),
    [
        (1, None, {"CPU": 8.0}, Workers(gpus=0, cpus=1)),
        (4, None, {"CPU": 16.0, "GPU": 4.0}, Workers(least=4, most=4, gpus=1, cpus=1)),
        (4, 0.0, {"CPU": 16.0, "GPU": 2.0}, Workers(least=4, most=4, gpus=0, cpus=1)),
        (4, 0.5, {"CPU": 16.0, "GPU": 2.0}, Workers(least=4, most=4, gpus=0.5, cpus=1)),
        (1, None, {"CPU": 2.0}, Workers(gpus=0, cpus=0.5)),
        (2, None, {"CPU": 2.0}, Workers(least=2, most=2, gpus=0, cpus=0.25)),
    ],
)
def test_workers_leave_cpus_for_the_data(
    num: int, gpus: float | None, cluster: dict[str, float], expected: Workers
) -> None:
    workers = plan_workers(num, num, gpus, cluster)
    assert workers == expected
    assert cluster["CPU"] - workers.most * workers.cpus >= 1


def test_elastic_run_needs_its_least_workers_only() -> None:
    assert plan_workers(2, 8, None, {"CPU": 16.0, "GPU": 2.0}) == Workers(least=2, most=8, gpus=1, cpus=1)
    assert plan_workers(1, 4, None, {"CPU": 4.0}).cpus * 4 <= 3


@pytest.mark.parametrize(
    ("num", "gpus", "cluster", "message"),
    [
        (4, 1.0, {"CPU": 8.0, "GPU": 2.0}, "need 4, the cluster has 2"),
        (8, None, {"CPU": 64.0, "GPU": 4.0}, "need 8, the cluster has 4.*--gpus-per-worker 0"),
        (1, 2.0, {"CPU": 8.0, "GPU": 2.0}, r"must lie in \[0, 1\].*got 2"),
        (1, float("nan"), {"CPU": 8.0}, r"must lie in \[0, 1\].*got nan"),
        (1, None, {"CPU": 1.0}, "at least 2 logical CPUs.*has 1"),
    ],
)
def test_what_cannot_work_is_refused(
    num: int, gpus: float | None, cluster: dict[str, float], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_workers(num, num, gpus, cluster)


def test_run_directory_belongs_to_one_configuration(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    begin_run(toy_preset(), "shards", out)
    begin_run(with_settings(toy_preset(), ["train.steps=77"]), "shards", out)
    storage.write_bytes(checkpoints.uri_of(out, 6, "files.json"), b"")
    with pytest.raises(ResumeRefused, match=r"optim\.lr: 0\.0005 -> 0\.1"):
        begin_run(with_settings(toy_preset(), ["optim.lr=0.1"]), "shards", out)


def test_a_run_that_failed_before_its_first_checkpoint_is_begun_anew(tmp_path: Path) -> None:
    """What a message advises, another setting, must not be refused as another run."""
    out = str(tmp_path / "run")
    begin_run(toy_preset(), "shards", out)
    storage.write_bytes(checkpoints.uri_of(out, 6, "model.safetensors"), b"")  # an upload that was cut off
    storage.write_bytes(f"{out}/skipped/step-00000003-rank-0.jsonl", b"{}")
    changed = with_settings(toy_preset(), ["optim.lr=0.1"])
    begin_run(changed, "shards", out)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["optim"]["lr"] == 0.1
    assert not (tmp_path / "run" / "skipped").exists()
    begin_run(changed, "shards", out)


def test_a_run_does_not_go_back(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    begin_run(toy_preset(), "shards", out)
    for step, names in (
        (6, ["model.safetensors", "files.json"]),
        (8, ["model.safetensors"]),
    ):  # the second was never finished
        for name in names:
            storage.write_bytes(checkpoints.uri_of(out, step, name), b"")
    begin_run(with_settings(toy_preset(), ["train.steps=6"]), "shards", out)
    with pytest.raises(ConfigError, match=r"run is at step 6 already, beyond train.steps=5"):
        begin_run(with_settings(toy_preset(), ["train.steps=5"]), "shards", out)


@pytest.mark.parametrize("config", [toy_preset(), vq_f4()])
def test_task_reaches_the_worker_as_it_was(config: object) -> None:
    assignment = Assignment(config=config, data="d", out="o", held_cpus=1.5, val="a:b")  # type: ignore[arg-type]
    assert Assignment.from_json(assignment.to_json()) == assignment


def test_files_of_a_configuration_mean_the_same_in_every_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Workers of Ray Train have another working directory than the command."""
    monkeypatch.chdir(tmp_path)
    config = with_settings(
        toy_preset(), ["loss.lpips_trunk=trunk.pth", "train.first_stage_weights=../vq.safetensors"]
    )
    found = with_absolute_files(config)
    assert found.loss.lpips_trunk == str(tmp_path / "trunk.pth")
    assert found.train.first_stage_weights == str(tmp_path.parent / "vq.safetensors")
    assert with_absolute_files(toy_preset()) == toy_preset()
