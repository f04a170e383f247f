"""The command `resshift`: what it prints, and one line with exit code 2 for bad input."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from spandrel.architectures.Compact import Compact

from resshift import Upscaler
from resshift.command.main import main
from resshift.models import locate_model
from resshift.presets import test_x4 as toy_preset
from resshift.training.step import build_network


def test_export_prints_the_comparison_and_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", "tiny-x4", "--to", "hf", "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "picture 1x3x8x8: largest difference 0 of 0.97"
    assert printed[1].startswith("step 1x48x8x8: largest difference 0 of ")
    assert printed[2] == "regression 1x3x8x8: largest difference 0 of 1.5"
    assert [line.split(":")[0] for line in printed[3:]] == [
        str(out / name) for name in ("README.md", "config.json", "model.safetensors")
    ]
    assert Upscaler.from_pretrained(out, device="cpu").name == "tiny-x4"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["no-such-model", "--to", "hf"], "no model 'no-such-model': give one of "),
        (
            ["tiny-x4", "--to", "onnx", "--out", "hf://a/b"],
            "--out hf://OWNER/NAME needs --to hf, got",
        ),
        (
            ["tiny-x4", "--to", "hf", "--out", "hf://a"],
            "hf://OWNER/NAME names a repository of a hub, got 'hf://a'",
        ),
        (["tiny-x4", "--to", "hf", "--out", "."], "an export needs a new or empty directory, got ."),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1


@pytest.mark.slow
def test_convert_makes_a_directory_that_says_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = build_network(toy_preset())
    torch.save({"state_dict": network.state_dict()}, tmp_path / "bare.pth")
    assert main(["convert", str(tmp_path / "bare.pth"), "--to", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "test-x4: x4, 4 steps"
    photo = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    bare, converted = (
        Upscaler.from_pretrained(tmp_path / name, device="cpu") for name in ("bare.pth", "out")
    )
    assert (converted(photo) == bare(photo)).all()
    shutil.copy(tmp_path / "out" / "model.safetensors", tmp_path / "alone.safetensors")
    assert locate_model(tmp_path / "alone.safetensors").config == toy_preset().model


def test_convert_takes_networks_of_spandrel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    network = Compact(num_feat=8, num_conv=2, upscale=2)
    torch.save({"params_ema": network.state_dict()}, tmp_path / "general.pth")
    assert main(["convert", str(tmp_path / "general.pth"), "--to", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "general: x2, 1 steps"
    photo = np.random.default_rng(0).integers(0, 256, (9, 8, 3), np.uint8)
    bare, converted = (
        Upscaler.from_pretrained(tmp_path / name, device="cpu") for name in ("general.pth", "out")
    )
    assert (converted(photo) == bare(photo)).all()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["absent.pth", "--to", "out"], "no model 'absent.pth': give one of "),
        (["tiny-x4", "--to", "."], "an export needs a new or empty directory, got ."),
        (["tiny-x4", "--to", "out", "--preset", "no"], "unknown preset 'no'; allowed: "),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {line}")
    assert not Path("out").exists()


def test_weights_that_do_not_fit_are_not_converted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(build_network(toy_preset()).state_dict(), tmp_path / "bare.pth")
    told = ["convert", str(tmp_path / "bare.pth"), "--to", str(tmp_path / "out"), "--preset", "tiny-x4"]
    assert main(told) == 2
    assert "the weights do not fit the network" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
