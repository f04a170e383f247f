"""Weight files without a configuration are known by the shapes of their tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from resshift.models import WeightsError, locate_model, model_with
from resshift.networks.autoencoder import VQAutoencoder, build_first_stage
from resshift.networks.conv_unet import build_unet
from resshift.networks.recognition import first_stage_of, inspect, presets_of
from resshift.presets import preset
from resshift.presets import test_x4 as toy_preset
from resshift.training.step import build_network

Shapes = dict[str, tuple[int, ...]]


def shapes_of(network: torch.nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_keys", "first_convolution", "recognised"),
    [  # numbers of the released files
        ("realsr-x4-s4", 564, 6, ["realsr-x4-s15", "realsr-x4-s4", "sinsr-x4-s1", "bicubic-x4-s4"]),
        ("realsr-x2-s4", 568, 35, ["realsr-x2-s4"]),
        ("inpaint-imagenet-s4", 572, 67, ["inpaint-imagenet-s4", "inpaint-face-s4"]),
        ("face-s4", 576, 136, ["face-s4"]),
    ],
)
def test_released_networks(name: str, num_keys: int, first_convolution: int, recognised: list[str]) -> None:
    with torch.device("meta"):
        shapes = shapes_of(build_unet(preset(name).model.unet))
    assert len(shapes) == num_keys
    assert shapes["input_blocks.0.0.weight"] == (160, first_convolution, 3, 3)
    assert presets_of(shapes) == recognised
    plain = {key: shape for key, shape in shapes.items() if not key.endswith(("attn_mask", "position_index"))}
    assert presets_of(plain) == recognised  # files may lack the derived buffers
    assert presets_of(plain | {"input_blocks.0.0.weight": (160, 7, 3, 3)}) == []
    assert presets_of(plain | {"one.more": (1,)}) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_keys", "told"), [("realsr-x4-s4", 205, "VQ-f4"), ("face-s4", 285, "VQ-f8")]
)
def test_released_autoencoders(name: str, num_keys: int, told: str) -> None:
    with torch.device("meta"):
        stage = build_first_stage(preset(name).model.first_stage)
    assert isinstance(stage, VQAutoencoder)
    shapes = shapes_of(stage)
    assert len(shapes) == num_keys
    assert (first_stage_of(shapes) or "").startswith(told)
    assert first_stage_of(shapes | {"one.more": (1,)}) is None


@pytest.mark.slow
def test_a_bare_file_is_its_preset(tmp_path: Path) -> None:
    """In this process, in one without torch, and with the answer given."""
    path = tmp_path / "anything.pth"
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in build_network(toy_preset()).state_dict().items()}}, path
    )
    found = locate_model(path)
    assert (found.name, found.config, found.first_stage) == ("test-x4", toy_preset().model, None)
    program = (
        "import sys; from resshift.models import locate_model; print(locate_model(sys.argv[1]).identity()); "
    )
    program += "assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == found.identity()
    assert locate_model(model_with(str(path), "test-x4")) == found
    command = [sys.executable, "-m", "resshift.networks.recognition", str(tmp_path / "absent.pth")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == inspect(tmp_path / "absent.pth")


def test_shapes_that_several_presets_share_need_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {"presets": ["realsr-x4-s15", "realsr-x4-s4", "sinsr-x4-s1", "bicubic-x4-s4"]}
    monkeypatch.setattr("resshift.models.locate._inspected", lambda path, address: shared)
    monkeypatch.delenv("RESSHIFT_ACCEPT_LICENCE", raising=False)
    path, stage = tmp_path / "mine.pth", tmp_path / "autoencoder_vq_f4.pth"
    path.touch()
    with pytest.raises(WeightsError, match=r"mine.pth has the shapes of realsr-x4-s15, .*--preset"):
        locate_model(path)
    with pytest.raises(
        WeightsError, match=r"needs the weights of its autoencoder.*fetch https://\S+ and put it at"
    ):
        locate_model(path, preset_name="sinsr-x4-s1")
    stage.touch()
    found = locate_model(model_with(str(path), "sinsr-x4-s1"))
    assert (found.first_stage, found.config) == (stage, preset("sinsr-x4-s1").model)
    named = tmp_path / "resshift_realsrx4_s15_v1.pth"
    named.touch()
    assert locate_model(named).config == preset("realsr-x4-s15").model


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a.weight": torch.zeros(2)}, path)
    assert "no architecture that spandrel knows; its keys look like a.weight" in inspect(path)["error"]
    path.write_bytes(b"no weights")
    assert str(path) in inspect(path)["error"]
    with pytest.raises(WeightsError, match=r"w\.pth"):
        locate_model(path)
