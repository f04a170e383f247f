"""Mistakes that are told in one line before Ray starts and before anything is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from pipelines.shards.prepare import prepare_here
from pipelines.training import preflight
from resshift.config import with_settings
from resshift.models import WeightsError
from resshift.networks.conv_unet import ConvUNet, build_unet
from resshift.presets import preset
from resshift.presets import test_x4 as toy_preset
from resshift.weights import save_safetensors, state_to_store

pytestmark = pytest.mark.usefixtures("no_ray")


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Nine pictures."""
    root = tmp_path_factory.mktemp("data")
    (root / "photos").mkdir()
    for i in range(9):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{i}.png")
    prepare_here(str(root / "photos"), str(root / "shards"))
    return str(root / "shards")


@pytest.fixture
def empty(tmp_path: Path) -> str:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no picture")
    prepare_here(str(tmp_path / "photos"), str(tmp_path / "shards"))
    return str(tmp_path / "shards")


@pytest.fixture
def told(job: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs the command, checks that it was refused in one line and wrote nothing, and
    returns the line.
    """

    def refused(data: str, *arguments: str, name: str = "train", preset: str = "test-x4") -> str:
        out = tmp_path / "run"
        code = job(name, "--preset", preset, "--data", data, "--out", str(out), *arguments)
        error = capsys.readouterr().err
        assert code == 2, error
        assert not out.exists()
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        return error.removeprefix("error: ").strip()

    return refused


def test_shards_without_a_picture(empty: str, told: Callable[..., str]) -> None:
    assert "holds no usable picture: " in told(empty)


def test_a_batch_larger_than_the_data(shards: str, told: Callable[..., str]) -> None:
    line = told(shards, "--set", "train.batch_size=10")
    assert "train.batch_size must be at most 9, the number of pictures in" in line
    assert line.endswith("got 10")


def test_a_batch_that_the_workers_cannot_share(shards: str, told: Callable[..., str]) -> None:
    line = told(shards, "--set", "train.batch_size=3", "--workers", "1:4")
    assert line == "train.batch_size (3) must be at least the number of workers (4)"


def test_more_workers_than_this_machine_has(
    shards: str, told: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert "--workers must be at most 6 on this machine, which has 6 cores, got 7" in told(
        shards, "--workers", "7:8"
    )
    assert preflight.local_workers(2, 64) == 6


def test_a_range_that_is_none(shards: str, told: Callable[..., str]) -> None:
    assert "--workers must be N or MIN:MAX" in told(shards, "--workers", "4:2")


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_a_trunk_that_is_missing(shards: str, dry: tuple[str, ...], told: Callable[..., str]) -> None:
    line = told(shards, "--set", "loss.lpips=1", "--set", "loss.lpips_trunk=nowhere.pth", *dry)
    assert line.startswith("no LPIPS trunk at ")


def test_a_trunk_of_features_that_is_missing(shards: str, tmp_path: Path, told: Callable[..., str]) -> None:
    few = ("--set", "train.batch_size=8", "--set", "stages.1.lpips=0", "--set", "stages.2.lpips=0")
    line = told(shards, *few, preset="tiny-x4")
    assert line.startswith("preset tiny-x4 needs the weights of EfficientNet-Lite0: --set loss.features_tr")
    line = told(shards, *few, "--set", "loss.features_trunk=gone.pth", preset="tiny-x4")
    assert line.startswith("no weight file at ")
    save_safetensors({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    given = f"loss.features_trunk={tmp_path / 'other.safetensors'}"
    assert "other.safetensors holds no EfficientNet-Lite0" in told(
        shards, *few, "--set", given, preset="tiny-x4"
    )


def test_stages_longer_than_the_run(shards: str, told: Callable[..., str]) -> None:
    line = told(shards, "--set", "train.steps=100", preset="tiny-x4")
    assert line.startswith(
        "train.steps must be more than 16000, the steps of the stages before the last, got 100"
    )


def test_an_autoencoder_that_is_missing(shards: str, told: Callable[..., str]) -> None:
    settings = ("--set", "train.batch_size=8", "--set", "loss.lpips=0")
    line = told(shards, *settings, preset="realsr-x4-s4")
    assert line.startswith("preset realsr-x4-s4 needs the weights of its VQ autoencoder")
    line = told(shards, *settings, "--set", "train.first_stage_weights=gone.pth", preset="realsr-x4-s4")
    assert "gone.pth" in line


def test_weights_to_begin_with_that_do_not_fit(shards: str, tmp_path: Path, told: Callable[..., str]) -> None:
    state = state_to_store(build_unet(toy_preset().model.unet))
    state.pop(next(iter(state)))
    save_safetensors(state, tmp_path / "other.safetensors")
    line = told(shards, "--init", str(tmp_path / "other.safetensors"))
    assert "the weights do not fit the network: 1 missing" in line
    no_trunks = [f"--set=stages.{i}.{name}=0" for i in (1, 2) for name in ("lpips", "features", "adversary")]
    few = ("--set", "train.batch_size=8", *no_trunks)
    line = told(shards, "--init", str(tmp_path / "other.safetensors"), *few, preset="tiny-x4")
    assert "the weights do not fit the network" in line


def test_a_validation_set_that_is_missing(shards: str, told: Callable[..., str]) -> None:
    settings = ("--set", "validation.best=lpips")
    assert "validation.best=lpips needs an LPIPS network" in told(shards, "--val", shards, *settings)


def test_the_chain_after_g_is_checked_as_it_is_built(tmp_path: Path) -> None:
    """Its U-Net is one of convolutions, and weights of g alone are enough to begin with."""
    no_trunks = ["loss.lpips=0", "loss.features=0", "stages.0.lpips=0", "stages.0.adversary=0"]
    config = with_settings(preset("tiny-x4-s4"), no_trunks)
    network = build_unet(config.model.unet)
    assert isinstance(network, ConvUNet)
    assert network.regression is not None
    for name, part in (("whole", network), ("g", network.regression)):
        save_safetensors(state_to_store(part), tmp_path / f"{name}.safetensors")
        preflight.check_weights(config, str(tmp_path / f"{name}.safetensors"))
    save_safetensors(state_to_store(build_unet(toy_preset().model.unet)), tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="missing"):
        preflight.check_weights(config, str(tmp_path / "other.safetensors"))
