"""Training of the regression network: samples by number, calls that add up to one, files that are left."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import squeezenet1_1

from resshift.networks.config import RegressionConfig
from resshift.networks.regression import RegressionNet
from resshift.seeds import philox
from tests.resshift.training.test_adversary import published

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_train.py"
CPU = torch.device("cpu")
SMALL = RegressionConfig(channels=8, half_channels=8, blocks_before=1, half_blocks=1, blocks_after=1)


@pytest.fixture(scope="module")
def gpu_train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # for the workers too, which import it by its name
        yield importlib.import_module(SCRIPT.stem)


def picture(number: int, side: int = 96) -> np.ndarray:
    """Smooth noise, (side, side, 3) uint8."""
    coarse = philox("gpu_train picture", number).integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        cv2.imwrite(str(folder / f"{i}.png"), picture(i))
    return folder


@pytest.fixture(scope="module")
def packed(gpu_train: ModuleType, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "photos.zip"
    assert gpu_train.pack([photos], file, 1.0, frozenset()) == 3
    return file


def test_pack_keeps_to_its_budget_and_leaves_out(gpu_train: ModuleType, photos: Path, tmp_path: Path) -> None:
    assert gpu_train.pack([photos], tmp_path / "two.zip", 1.0, frozenset({"1.png"})) == 2
    one = len(gpu_train._centre((photos / "0.png").read_bytes()))
    assert gpu_train.pack([photos], tmp_path / "one.zip", 1.5 * one / 1e6, frozenset()) == 1


@pytest.mark.slow
def test_a_sample_is_the_same_whoever_makes_it_and_a_pass_holds_every_photo(
    gpu_train: ModuleType, packed: Path
) -> None:
    stage = gpu_train.Stage(batch=2, crop_px=32, learning_rate=1e-3)
    made_here = [next(gpu_train.batches(packed, stage, 0, first, 0)) for first in (4, 6)]
    source = gpu_train.batches(packed, stage, 0, 4, 1)
    for expected, made in zip(made_here, source, strict=False):
        assert expected[0].shape == (2, 3, 32, 32)
        assert expected[1].shape == (2, 3, 8, 8)
        assert all(torch.equal(a, b) for a, b in zip(expected, made, strict=True))
    pairs = gpu_train.Pairs(packed, stage, 0)
    _ = pairs[3]
    assert sorted(pairs.order) == [0, 1, 2]


def test_two_calls_are_one(gpu_train: ModuleType, packed: Path, tmp_path: Path) -> None:
    """Weights, average, moments and position after a stop equal those without the stop, bit for bit."""
    stage = gpu_train.Stage(batch=2, crop_px=32, learning_rate=1e-3)

    def trainer(seed: int) -> Any:
        torch.manual_seed(seed)
        return gpu_train.Trainer(gpu_train.Regression(SMALL, CPU), CPU, seed)

    def steps(trainer: Any, count: int) -> None:
        source = gpu_train.batches(packed, stage, trainer.seed, trainer.samples, 0)
        for _ in range(count):
            trainer.train(next(source), 1e-3, stage)

    whole = trainer(5)
    steps(whole, 5)
    first = trainer(5)
    steps(first, 3)
    first.save(tmp_path)
    second = trainer(0)
    assert second.load(tmp_path)
    steps(second, 2)
    states: list[dict[str, torch.Tensor]] = []
    for one in (whole, second):
        one.save(tmp_path)
        states.append(load_file(tmp_path / "state.safetensors"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert (second.step, second.samples, second.updates, second.seed) == (5, 10, 5, 5)

    (tmp_path / "state.safetensors").unlink()
    third = trainer(0)
    assert third.load(tmp_path)
    assert (third.samples, third.updates) == (10, 0)
    for key, value in third.network.state_dict().items():
        torch.testing.assert_close(value, whole.average.state_dict()[key], rtol=1e-3, atol=1e-6)
    assert not trainer(0).load(tmp_path / "nothing")


def test_stages_follow_each_other(gpu_train: ModuleType) -> None:
    plan = gpu_train.PLANS["quick"]
    assert [gpu_train.stage_at(plan, step) for step in (0, 1, 2)] == [
        (plan[0], 2),
        (plan[0], 2),
        (plan[1], None),
    ]
    for plan in gpu_train.PLANS.values():
        assert plan[-1].steps is None


@pytest.mark.slow
def test_the_adversary_and_the_network_after_g_are_continued_exactly(
    gpu_train: ModuleType, packed: Path, tmp_path: Path
) -> None:
    """A stop between two steps changes nothing: the heads and their moments belong to the state."""
    torch.manual_seed(0)
    save_file(RegressionNet(RegressionConfig()).state_dict(), tmp_path / "g.safetensors")
    save_file(published(torch.Generator().manual_seed(0)), tmp_path / "trunk.safetensors")
    state = {
        f"features.{key}": value for key, value in squeezenet1_1(weights=None).features.state_dict().items()
    }
    torch.save(state, tmp_path / "squeeze.pth")
    stage = gpu_train.Stage(batch=2, crop_px=32, learning_rate=1e-3, lpips=0.2, features=0.1, adversary=0.5)

    def trainer() -> Any:
        torch.manual_seed(0)
        files = (tmp_path / name for name in ("g.safetensors", "squeeze.pth", "trunk.safetensors"))
        return gpu_train.Trainer(gpu_train.Detail(CPU, *files), CPU, 5)

    def steps(trainer: Any, count: int) -> dict[str, torch.Tensor]:
        source = gpu_train.batches(packed, stage, trainer.seed, trainer.samples, 0)
        terms: dict[str, torch.Tensor] = {}
        for _ in range(count):
            terms = trainer.train(next(source), 1e-3, stage)
        return terms

    whole = trainer()
    terms = steps(whole, 3)
    assert set(terms) == {"loss", "lpips", "features", "fooled", "seen"}
    first = trainer()
    before = copy.deepcopy(first.model.adversaries.state_dict())
    steps(first, 2)
    after = first.model.adversaries.state_dict()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    first.save(tmp_path)
    second = trainer()
    assert second.load(tmp_path)
    steps(second, 1)
    states: list[dict[str, torch.Tensor]] = []
    for one in (whole, second):
        one.save(tmp_path)
        states.append(load_file(tmp_path / "state.safetensors"))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.slow
def test_quick_run_and_its_continuation(packed: Path, tmp_path: Path) -> None:
    for folder, side in (("lq", 16), ("gt", 64)):
        (tmp_path / folder).mkdir()
        cv2.imwrite(str(tmp_path / folder / "a.png"), picture(9, side))
    command = [
        sys.executable,
        SCRIPT,
        "--data",
        packed,
        "--out",
        tmp_path,
        "--quick",
        "--val",
        f"made={tmp_path}/lq:{tmp_path}/gt",
    ]
    for _ in range(2):
        subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""}, timeout=200)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    events = [line for line in lines if "event" in line]
    assert [line["event"] for line in events] == [
        "started",
        "saved",
        "decayed",
        "resumed",
        "saved",
        "decayed",
    ]
    assert events[3]["samples"] == events[1]["samples"] > 0  # the branch was left behind
    assert events[5]["figures"]["made"]["psnr_y"] > 5
    assert sum(value.numel() for value in load_file(tmp_path / "model.safetensors").values()) == 890_064
