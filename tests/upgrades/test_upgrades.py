"""What an old version left is continued by this one: a ledger and a run of 689bd0d (28 November 2026), made
as README.md says.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelines.bulk.request import BulkRequest
from pipelines.ledger import ledger
from pipelines.ledger.report import write_report
from pipelines.ledger.verify import verify
from pipelines.training import checkpoints
from pipelines.training.log import read_lines
from pipelines.training.trainer import begin_run
from resshift.config import with_settings
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.presets import test_x4 as toy_preset
from resshift.training import checkpoint
from resshift.training.checkpoint import ResumeRefused
from resshift.training.losses import Objective
from resshift.training.step import DiffusionLearner, build_network

CONFIG = with_settings(toy_preset(), ["optim.warmup_steps=0"])


@pytest.fixture(autouse=True)
def left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unpack photos/, out/ and run/ into the working directory: the job was given relative paths."""
    with tarfile.open(Path(__file__).with_name("689bd0d.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_inputs(request: BulkRequest) -> tuple[list[str], dict[str, str], int]:
    """Return the keys that are to be done, the reasons of those that are refused, and how many are done."""
    worklist = request.inputs().worklist(request.job().stages, request.entries())
    batches = list(worklist.batches())
    items = [item.key for items, _ in batches for item in items]
    refused = {row["key"]: row["reason"] for _, rows in batches for row in rows}
    return items, refused, worklist.counts.done


def test_a_job_of_before_does_what_is_left() -> None:
    cv2.imwrite("photos/new.png", np.zeros((4, 4, 3), np.uint8))
    request = BulkRequest(source="photos", target="out", model="nearest-x4")
    ledger.begin_job("out", request.job().record())  # not refused: what the job makes is the same
    assert open_inputs(request) == (["new.png"], {}, 5)
    again = BulkRequest(source="photos", target="out", model="nearest-x4", retry_failed=True)
    items, refused, num_done = open_inputs(again)
    assert items == ["broken.png", "new.png"]
    assert refused == {"a.webp": "name_collision", "notes.txt": "not_an_image"}
    assert num_done == 2
    with pytest.raises(ledger.JobMismatch, match="quality: 95 -> 90"):
        BulkRequest(source="photos", target="out", model="nearest-x4", quality=90).job()


@pytest.mark.parametrize("engine", ["serve", "actors"])  # that a run of before had
def test_rows_and_runs_of_before_are_read(engine: str, left: Path) -> None:
    (run,) = (left / "out" / "_resshift" / "runs").glob("*.json")
    run.write_text(run.read_text().replace('"serve"', f'"{engine}"'))
    assert list(verify("out", 4.0)) == []  # the outputs are as the ledger says
    summary = write_report(
        "out", BulkRequest(source="photos", target="out", model="nearest-x4").job().record(), None
    )
    assert (summary.counts["ok"], summary.counts["failed"], summary.megapixels_in) == (2, 3, 96e-6)
    assert summary.replica_hours == pytest.approx(30 / 3600)
    assert f"engine {engine}" in (left / "out" / "_resshift" / "report.html").read_text()
    ledger.append("out", [ledger.row("new.png", "e", "ok", output="new_x4.png")])  # beside the old parts
    rows = {row["key"]: row["status"] for row in ledger.read("out").to_pylist()}
    assert (len(rows), rows["new.png"], rows["sub/b.png"]) == (6, "ok", "ok")


def batch(seed: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    hq = torch.randint(0, 256, (8, 32, 32, 3), generator=random, dtype=torch.uint8)
    return {"hq": hq, "lq": hq[:, ::4, ::4].contiguous()}


def sums(network: nn.Module) -> Mapping[str, float]:
    return {name: float(value.detach().double().abs().sum()) for name, value in network.named_parameters()}


@pytest.mark.slow
def test_a_run_of_before_takes_the_step_that_it_would_have_taken(left: Path) -> None:
    begin_run(CONFIG, "shards", "run")  # not refused: no field that defines it differs
    assert checkpoints.newest_step("run") == 2
    assert [line["step"] for line in read_lines("run")] == [2]
    assert checkpoints.fetch_latest("run", left / "fetched") == 2
    objective = Objective(CONFIG.model, CONFIG.loss, PixelUnshuffle(4))
    learner = DiffusionLearner(CONFIG, build_network(CONFIG), objective)
    checkpoint.load(left / "fetched", learner.state, CONFIG)
    assert learner.state.step == 2
    for value in learner.state.network.parameters():  # every weight is the one that was written
        expected = 0.01 * (torch.arange(value.numel(), dtype=torch.float32) % 7 - 3)
        assert torch.equal(value.detach(), expected.view_as(value))

    terms, outcome = learner.step(batch(2))
    after: dict[str, Any] = json.loads((left / "run" / "after.json").read_text())
    # A step in float32 on another processor, or in another order, is not the same to the last digit.
    found = {name: float(value) for name, value in terms.items()}
    assert {name: found[name] for name in after["terms"]} == pytest.approx(after["terms"], rel=1e-4)
    assert float(outcome.grad_norm) == pytest.approx(after["grad_norm"], rel=1e-3)
    assert sums(learner.state.network) == pytest.approx(after["weights"], rel=1e-4)
    assert sums(learner.state.ema.module) == pytest.approx(after["average"], rel=1e-4)


def test_a_run_of_before_with_other_settings_is_refused() -> None:
    with pytest.raises(ResumeRefused, match=r"optim\.lr: 0\.0005 -> 0\.1"):
        begin_run(with_settings(CONFIG, ["optim.lr=0.1"]), "shards", "run")
