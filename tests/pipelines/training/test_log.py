"""What a run says: the line, the files, and that a restart leaves each step in them once."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.training import log
from pipelines.training.log import Clock, TensorBoard, TrainLog, forget_after, log_line, read_lines
from resshift import storage
from resshift.config import LogConfig

LINE = {
    "step": 100, "loss": 0.5, "mse": 0.25, "lpips": 0.125, "grad_norm": 1.5, "skipped": 0, "lr": 5e-5,
    "it_per_s": 2.0,
    "images_per_s": 32.0, "images_per_s_worker": 16.0, "data_wait": 0.03, "memory_gib": 1.25,
    "workers": 2, "window": 100,
}  # fmt: skip


def test_line_says_it_all() -> None:
    assert log_line(LINE, 4000) == (
        "step=100/4000 loss=0.5 mse=0.25 lpips=0.125 lr=5.00e-05 grad_norm=1.5 it/s=2 img/s/worker=16 "
        "data_wait=3% mem=1.2GiB eta=0:32:30"
    )
    assert log_line(LINE | {"skipped": 3}, 4000).endswith("skipped=3")


def test_clock_measures_rates_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(log.time, "perf_counter", lambda: now)
    clock = Clock()
    for _ in range(4):
        now += 0.5
        clock.step(waited_s=0.1)
    rates = clock.read(batch_size=16, num_ranks=2)
    assert rates == pytest.approx(
        {"it_per_s": 2.0, "images_per_s": 32.0, "images_per_s_worker": 16.0, "data_wait": 0.2}
    )


def open_log(out: str, step: int = 0) -> TrainLog:
    return TrainLog(out, LogConfig(tensorboard=False), step, 100)


@pytest.fixture(params=["local", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("bucket") + "/run"


def test_lines_are_stored_with_the_checkpoint_and_not_before(out: str) -> None:
    log = open_log(out)
    for step in (5, 10):
        log.steps(LINE | {"step": step})
    assert read_lines(out) == []
    log.commit(10)()
    log.steps(LINE | {"step": 15})
    assert [line["step"] for line in read_lines(out)] == [5, 10]
    assert read_lines(out)[0] == LINE | {"step": 5}


def test_restart_leaves_every_step_once(out: str) -> None:
    """The lines to step 20 were stored, its checkpoint was not: the run goes on from 10, and checkpoints at
    other steps.
    """
    log = open_log(out)
    for first in (0, 10):
        for step in range(first + 5, first + 11, 5):
            log.steps(LINE | {"step": step})
        log.commit(first + 10)()
    again = open_log(out, step=10)
    assert [line["step"] for line in read_lines(out)] == [5, 10]
    for step in (15, 20, 25):
        again.steps(LINE | {"step": step})
    again.commit(25)()
    assert [line["step"] for line in read_lines(out)] == [5, 10, 15, 20, 25]


def test_validation_is_stored_with_its_grid(out: str) -> None:
    log = open_log(out)
    log.validation(10, {"psnr_y": 25.0}, np.zeros((4, 4, 3), np.uint8), b"png")
    log.commit(10)()
    assert read_lines(out, "validation") == [{"step": 10, "psnr_y": 25.0}]
    assert storage.read_bytes(storage.join(out, "samples/step-00000010.png")) == b"png"
    forget_after(out, 9)
    assert read_lines(out, "validation") == []


def events(directory: str) -> Any:
    reader = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator(directory)
    reader.Reload()
    return reader


def test_tensorboard_shows_figures_and_pictures_and_forgets_what_is_done_again(tmp_path: Path) -> None:
    first = TensorBoard(str(tmp_path), 0)
    for step in (5, 10, 15):
        first.scalars(step, {"train/loss": float(step)})
    first.picture(10, "validation/grid", np.full((4, 6, 3), 7, np.uint8))
    first.close()
    second = TensorBoard(str(tmp_path), 10)  # a restart from the checkpoint of step 10
    second.scalars(15, {"train/loss": 99.0})
    second.close()
    found = events(str(tmp_path / "tensorboard"))
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [
        (5, 5.0),
        (10, 10.0),
        (15, 99.0),
    ]
    (picture,) = found.Images("validation/grid")
    assert (picture.width, picture.height) == (6, 4)


def test_figures_of_steps_and_of_validations_are_in_tensorboard(tmp_path: Path) -> None:
    log = TrainLog(str(tmp_path), LogConfig(), 0, 200)
    log.steps(LINE)
    log.validation(100, {"psnr_y": 25.0}, np.zeros((4, 6, 3), np.uint8), None)
    log.close()
    found = events(str(tmp_path / "tensorboard"))
    shown = {name: found.Scalars(name)[0].value for name in found.Tags()["scalars"]}
    assert shown == pytest.approx(
        {f"train/{name}": value for name, value in LINE.items() if name != "step"}
        | {"validation/psnr_y": 25.0}
    )
    assert len(found.Images("validation/lq, result, truth")) == 1


def test_tensorboard_reaches_a_bucket(bucket: str, tmp_path: Path) -> None:
    board = TensorBoard(f"{bucket}/run", 0)
    board.scalars(5, {"train/loss": 1.0})
    board.flush()
    (entry,) = storage.list_entries(f"{bucket}/run/tensorboard")
    (tmp_path / entry.key).write_bytes(storage.read_bytes(entry.uri))
    assert [event.value for event in events(str(tmp_path)).Scalars("train/loss")] == [1.0]
    board.close()
    assert not board.directory.exists()
