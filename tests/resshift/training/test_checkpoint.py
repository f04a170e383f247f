"""Checkpoints: what was saved comes back bit for bit, another run is refused, damage is found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resshift import __version__
from resshift.config import RunConfig, fingerprint, from_dict, with_settings
from resshift.models import WeightsError, read_model_config
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.presets import test_x4 as toy_preset
from resshift.training import checkpoint
from resshift.training.checkpoint import Snapshot
from resshift.training.losses import Objective
from resshift.training.step import DiffusionLearner, TrainState, build_network
from resshift.weights import read_state_dict

FILES = ["run.json", "config.json", "model.safetensors", "ema.safetensors", "state.pt", "files.json"]


def toy(*settings: str) -> RunConfig:
    return with_settings(toy_preset(), ["optim.warmup_steps=0", *settings])


def start(config: RunConfig) -> DiffusionLearner:
    return DiffusionLearner(
        config, build_network(config), Objective(config.model, config.loss, PixelUnshuffle(4))
    )


def moments(state: TrainState) -> dict[str, Tensor]:
    return {
        f"{i}.{name}": value
        for i, entry in state.optimizer.state_dict()["state"].items()
        for name, value in entry.items()
    }


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
    assert different == []


@pytest.fixture(scope="module")
def trained() -> TrainState:
    """Two steps on random pictures, with every counter away from its start."""
    learner = start(toy())
    for i in range(2):
        hq = torch.randint(
            0, 256, (8, 32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8
        )
        learner.state.means.add(*learner.step({"hq": hq, "lq": hq[:, ::4, ::4].contiguous()}))
    learner.state.means.skipped += torch.tensor([3, 1])
    return learner.state


@pytest.fixture(scope="module")
def taken(trained: TrainState) -> Snapshot:
    return checkpoint.take(trained)


@pytest.fixture
def saved(taken: Snapshot, tmp_path: Path) -> Path:
    checkpoint.write(tmp_path / "deep" / "c", taken, toy())
    return tmp_path / "deep" / "c"


def load(directory: Path, config: RunConfig) -> TrainState:
    state = start(config).state
    checkpoint.load(directory, state, config)
    return state


def test_everything_comes_back_bit_for_bit(trained: TrainState, saved: Path) -> None:
    fresh = load(saved, toy())
    assert_equal(dict(fresh.network.state_dict()), dict(trained.network.state_dict()))
    assert_equal(fresh.ema.module.state_dict(), trained.ema.module.state_dict())
    assert_equal(moments(fresh), moments(trained))
    assert (fresh.step, fresh.means.skips(), fresh.means.steps) == (2, (3, 1), 2)
    assert fresh.ema.updates == 2
    assert torch.equal(fresh.means.sums, trained.means.sums)
    assert fresh.optimizer.state_dict()["param_groups"] == trained.optimizer.state_dict()["param_groups"]


def test_average_is_not_the_network(trained: TrainState) -> None:
    """Otherwise the round trip above would not notice one file in place of the other."""
    network, average = trained.network.state_dict(), trained.ema.module.state_dict()
    assert any(not torch.equal(network[key], average[key]) for key in network)


def test_checkpoint_is_a_model_directory(trained: TrainState, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == sorted(FILES)  # and nothing temporary
    assert read_model_config(saved) == ("test-x4", toy().model)
    average = trained.ema.module.state_dict()
    stored = read_state_dict(saved / "ema.safetensors")
    assert all(torch.equal(stored[key], average[key]) for key in stored)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("optim.lr=0.001", r"optim\.lr: 0\.0005 -> 0\.001"),
        ("train.seed=5", r"train\.seed: 0 -> 5"),
        ("train.batch_size=6", r"train\.batch_size: 8 -> 6"),
        ("model.unet.dropout=0.1", r"model\.unet\.dropout: 0\.0 -> 0\.1"),
    ],
)
def test_another_run_is_refused_and_the_state_left_alone(setting: str, message: str, saved: Path) -> None:
    fresh = start(toy()).state
    before = {key: value.clone() for key, value in fresh.network.state_dict().items()}
    with pytest.raises(checkpoint.ResumeRefused, match=message) as error:
        checkpoint.load(saved, fresh, toy(setting))
    assert str(saved) in str(error.value)
    assert_equal(dict(fresh.network.state_dict()), before)
    assert fresh.step == 0


def test_refusal_names_every_field_that_differs(saved: Path) -> None:
    with pytest.raises(
        checkpoint.ResumeRefused, match=r"differing: data\.flip: True -> False; train\.seed: 0 -> 5\."
    ):
        load(saved, toy("train.seed=5", "data.flip=false"))


def test_length_reporting_and_ways_of_computing_may_change(saved: Path) -> None:
    changes = [
        "train.steps=999",
        "train.checkpoint_every=1",
        "train.log_every=1",
        "train.micro_batch=2",
        "train.parallel=fsdp",
    ]
    assert load(saved, toy(*changes, "validation.every=7", "log.tensorboard=false")).step == 2


def test_a_run_that_was_begun_with_settings_of_earlier_versions_goes_on() -> None:
    record = checkpoint.run_record(toy())
    record["config"]["log"] |= {"wandb_project": "p", "mlflow_experiment": None}
    checkpoint.check_same_run(toy(), record, "out")


@pytest.mark.parametrize("name", FILES)
def test_missing_file_is_named(name: str, saved: Path) -> None:
    (saved / name).unlink()
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        load(saved, toy())


@pytest.mark.parametrize("name", [name for name in FILES if name != "files.json"])
@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damage_is_found_and_nothing_is_half_loaded(name: str, damage: str, saved: Path) -> None:
    data = bytearray((saved / name).read_bytes())
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(bytes(data[:-1]) if damage == "cut" else bytes(data))
    fresh = start(toy()).state
    before = {key: value.clone() for key, value in fresh.network.state_dict().items()}
    with pytest.raises(WeightsError, match=rf"{name} is damaged".replace(".", r"\.")):
        checkpoint.load(saved, fresh, toy())
    assert_equal(dict(fresh.network.state_dict()), before)


@pytest.mark.parametrize("text", ['{"files": {"run', "{}", "[]", ""])
def test_cut_manifest_is_not_a_checkpoint(text: str, saved: Path) -> None:
    (saved / "files.json").write_text(text)
    with pytest.raises(WeightsError, match="is not a complete checkpoint"):
        load(saved, toy())


def test_record_says_what_ran(saved: Path) -> None:
    record: dict[str, Any] = json.loads((saved / "run.json").read_text())
    assert (record["preset"], record["step"], record["rows"], record["fingerprint"]) == (
        "test-x4",
        2,
        16,
        fingerprint(toy()),
    )
    assert from_dict(RunConfig, record["config"]) == toy()
    assert record["versions"].keys() == {"torch", "numpy", "opencv-python-headless", "resshift", "python"}
    assert (record["versions"]["resshift"], record["versions"]["numpy"]) == (__version__, np.__version__)
    assert (
        record["versions"]["torch"] == torch.__version__
    )  # with the build (+cpu, +cu132): numerics depend on it
    assert all(record["versions"].values())


def test_record_takes_what_the_caller_adds() -> None:
    record = checkpoint.run_record(toy(), rows=7)
    assert record["rows"] == 7
    assert record["fingerprint"] == fingerprint(toy())
