"""Checkpoints: what was saved comes back bit for bit, and another run is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from resshift import __version__, checkpoint
from resshift.autoencoder import PixelUnshuffle
from resshift.config import RunConfig, fingerprint, from_dict, with_settings
from resshift.losses import Objective
from resshift.presets import test_x4 as toy_preset
from resshift.training import TrainState, build_network, build_state, train_step
from resshift.weights import WeightsError, read_model_config, read_state_dict

FILES = ["run.json", "config.json", "model.safetensors", "ema.safetensors", "state.pt"]


def toy(*settings: str) -> RunConfig:
    return with_settings(toy_preset(), ["optim.warmup_steps=0", *settings])


def start(config: RunConfig) -> TrainState:
    return build_state(config, build_network(config))


def moments(state: TrainState) -> dict[str, Tensor]:
    return {f"{i}.{name}": value for i, entry in state.optimizer.state_dict()["state"].items() for name, value in entry.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
    assert different == []


@pytest.fixture(scope="module")
def trained() -> TrainState:
    """Two steps on random pictures, with every counter away from its start."""
    config = toy()
    state, objective = start(config), Objective(config.model, config.loss, PixelUnshuffle(4))
    for i in range(2):
        generator = torch.Generator().manual_seed(i)
        hq = torch.randint(0, 256, (4, 32, 32, 3), generator=generator, dtype=torch.uint8)
        train_step(state, objective, {"hq": hq, "lq": hq[:, ::4, ::4].contiguous()}, config)
    state.rows, state.skipped, state.skipped_in_a_row = 8, 3, 1
    return state


def test_everything_comes_back_bit_for_bit(trained: TrainState, tmp_path: Path) -> None:
    config = toy()
    checkpoint.save(tmp_path / "deep" / "c", trained, config)
    fresh = start(config)
    assert moments(fresh) == {}
    checkpoint.load(tmp_path / "deep" / "c", fresh, config)
    assert_equal(dict(fresh.plain.state_dict()), dict(trained.plain.state_dict()))
    assert_equal(dict(fresh.ema.state_dict()), dict(trained.ema.state_dict()))
    assert_equal(moments(fresh), moments(trained))
    assert (fresh.step, fresh.rows, fresh.skipped, fresh.skipped_in_a_row) == (2, 8, 3, 1)
    assert int(fresh.ema.n_averaged) == 2
    assert fresh.optimizer.state_dict()["param_groups"] == trained.optimizer.state_dict()["param_groups"]


def test_average_is_not_the_network(trained: TrainState) -> None:
    """Otherwise the round trip above would not notice one file in place of the other."""
    network, average = trained.plain.state_dict(), trained.ema.module.state_dict()
    assert any(not torch.equal(network[key], average[key]) for key in network)


def test_checkpoint_is_a_model_directory(trained: TrainState, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained, toy())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)  # and nothing temporary
    assert read_model_config(tmp_path) == ("test-x4", toy().model)
    average = trained.ema.module.state_dict()
    stored = read_state_dict(tmp_path / "ema.safetensors")
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
def test_another_run_is_refused_and_the_state_left_alone(setting: str, message: str, trained: TrainState, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained, toy())
    fresh = start(toy())
    before = {key: value.clone() for key, value in fresh.plain.state_dict().items()}
    with pytest.raises(checkpoint.ResumeRefused, match=message) as error:
        checkpoint.load(tmp_path, fresh, toy(setting))
    assert str(tmp_path) in str(error.value)
    assert_equal(dict(fresh.plain.state_dict()), before)
    assert fresh.step == 0


def test_refusal_names_every_field_that_differs(trained: TrainState, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained, toy())
    with pytest.raises(checkpoint.ResumeRefused, match=r"differing: data\.flip: True -> False; train\.seed: 0 -> 5\."):
        checkpoint.load(tmp_path, start(toy()), toy("train.seed=5", "data.flip=false"))


def test_length_and_reporting_may_change(trained: TrainState, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained, toy())
    fresh = start(toy())
    checkpoint.load(tmp_path, fresh, toy("train.steps=999", "train.checkpoint_every=1", "train.log_every=1", "train.micro_batch=2"))
    assert fresh.step == 2


@pytest.mark.parametrize("name", ["run.json", "model.safetensors", "ema.safetensors", "state.pt"])
def test_missing_file_is_named(name: str, trained: TrainState, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained, toy())
    (tmp_path / name).unlink()
    with pytest.raises(WeightsError, match=name.replace(".", r"\.")):
        checkpoint.load(tmp_path, start(toy()), toy())


@pytest.mark.parametrize("data", [b"", b"garbage", b"PK\x03\x04 cut"])
def test_damaged_state_is_named_and_nothing_is_half_loaded(data: bytes, trained: TrainState, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained, toy())
    (tmp_path / "state.pt").write_bytes(data)
    fresh = start(toy())
    before = {key: value.clone() for key, value in fresh.plain.state_dict().items()}
    with pytest.raises(WeightsError, match=r"state\.pt cannot be read"):
        checkpoint.load(tmp_path, fresh, toy())
    assert_equal(dict(fresh.plain.state_dict()), before)


@pytest.mark.parametrize("text", ['{"preset": "te', "{}", "[]"])
def test_cut_record_is_not_a_checkpoint(text: str, trained: TrainState, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained, toy())
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(WeightsError, match="is not a checkpoint"):
        checkpoint.load(tmp_path, start(toy()), toy())


def test_record_says_what_ran(trained: TrainState, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained, toy())
    record = json.loads((tmp_path / "run.json").read_text())
    assert (record["preset"], record["step"], record["fingerprint"]) == ("test-x4", 2, fingerprint(toy()))
    assert from_dict(RunConfig, record["config"]) == toy()
    assert record["versions"].keys() == {"torch", "numpy", "opencv-python-headless", "resshift", "python"}
    assert (record["versions"]["resshift"], record["versions"]["numpy"]) == (__version__, np.__version__)
    assert record["versions"]["torch"] == torch.__version__  # with the build (+cpu, +cu132): numerics depend on it
    assert all(record["versions"].values())


def test_record_takes_what_the_caller_adds() -> None:
    record = checkpoint.run_record(toy(), rows=7)
    assert record["rows"] == 7
    assert record["fingerprint"] == fingerprint(toy())
