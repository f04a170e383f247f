"""Exports: what was written computes what the model computes, at other sizes than the traced one."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from resshift import Upscaler, weights
from resshift.config import ConfigError, ModelConfig
from resshift.export import Format
from resshift.export.card import model_card
from resshift.export.formats import export_model, model_graphs, onnx_runtime
from resshift.export.graphs import WholePicture, graphs_of
from resshift.export.parity import ParityError, check
from resshift.export.schedule import chain_description
from resshift.models import ModelFiles, locate_model
from resshift.networks.autoencoder import PixelUnshuffle, VQAutoencoder, build_first_stage
from resshift.networks.config import ConvUNetConfig, FirstStageConfig, RegressionConfig, VQConfig
from resshift.networks.conv_unet import build_unet
from resshift.presets import test_x4 as toy_preset
from resshift.sampler import reverse_step
from resshift.schedule import ShiftSchedule, Target

TOY = toy_preset().model
# The construction of tiny-x4: one step, shifted windows.
ONE_STEP = replace(
    TOY,
    schedule=replace(TOY.schedule, steps=1),
    unet=replace(TOY.unet, image_size=16, lq_size=16, attention_resolutions=(), swin_depth=2),
)
# The construction of realsr-x4-s4: an autoencoder, steps that predict x0.
VQ = replace(
    TOY,
    target=Target.X0,
    unet=replace(TOY.unet, in_channels=3, out_channels=3, pixel_head_channels=0),
    first_stage=FirstStageConfig(vq=VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=16)),
)


# The construction of a chain that starts from the estimate of a regression network.
AFTER_REGRESSION = replace(
    ONE_STEP,
    unet=ConvUNetConfig(
        channels=(8, 8),
        blocks_before=(1, 1),
        blocks_after=(1,),
        regression=RegressionConfig(
            channels=8, half_channels=8, blocks_before=1, half_blocks=1, blocks_after=1
        ),
    ),
)


@pytest.fixture(autouse=True)
def without_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest collects every record of torch's structured trace, which takes most of the time of a test."""
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)


def write(directory: Path, config: ModelConfig) -> ModelFiles:
    """Write a model with random weights that all matter."""
    torch.manual_seed(0)
    unet, stage = build_unet(config.unet), build_first_stage(config.first_stage)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.05)
    if isinstance(stage, VQAutoencoder):
        nn.init.normal_(stage.quantize.embedding.weight)
    weights.save_model(directory, "toy", config, unet, stage)
    return locate_model(directory)


@pytest.fixture
def one_step(tmp_path: Path) -> ModelFiles:
    return write(tmp_path / "model", ONE_STEP)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "to", "files"),
    [
        (ONE_STEP, "onnx", ["picture.onnx", "schedule.json", "step.onnx"]),
        (VQ, "onnx", ["decoder.onnx", "encoder.onnx", "schedule.json", "step.onnx"]),
        (ONE_STEP, "torch-export", ["picture.pt2", "schedule.json", "step.pt2"]),
        (
            AFTER_REGRESSION,
            "onnx",
            ["picture.onnx", "regression.onnx", "schedule.json", "step.onnx"],
        ),
    ],
)
def test_graphs_agree_with_the_model_at_sizes_that_were_not_traced(
    config: ModelConfig, to: Format, files: list[str], tmp_path: Path
) -> None:
    model = write(tmp_path / "model", config)
    found = list(export_model(model, to, tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert len({(one.graph, one.shape) for one in found}) >= 3 * (len(files) - 1)
    assert max(one.difference / one.largest for one in found) < 1e-5
    if "picture.onnx" not in files:
        return
    run = onnx_runtime(tmp_path / "out" / "picture.onnx", "hq")
    graph = model_graphs(model)[0]
    for batch, height, width in ((1, 5, 6), (2, 8, 8), (1, 31, 17)):
        inputs = graph.examples(batch, height, width)
        with torch.no_grad():
            torch.testing.assert_close(run(inputs), graph.module(**inputs), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["safetensors", "hf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_weight_files_load_as_the_same_model(to: Format, dtype: torch.dtype, tmp_path: Path) -> None:
    model = write(tmp_path / "model", ONE_STEP)
    state = {key: value.to(dtype) for key, value in weights.read_state_dict(model.unet).items()}
    weights.save_safetensors(state, model.unet)
    assert [one.difference for one in export_model(model, to, tmp_path / "out")] == [0, 0]
    stored = weights.read_state_dict(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {dtype}
    photo = np.random.default_rng(0).integers(0, 256, (20, 17, 3), np.uint8)
    before, after = (
        Upscaler.from_pretrained(path, device="cpu") for path in (tmp_path / "model", tmp_path / "out")
    )
    np.testing.assert_array_equal(after(photo), before(photo))


@pytest.mark.parametrize("config", [ONE_STEP, AFTER_REGRESSION], ids=["bicubic", "regression"])
@pytest.mark.parametrize("size", [(5, 7), (16, 16), (33, 20)])
def test_the_picture_graph_is_the_upscaler_without_noise_and_colour_fix(
    size: tuple[int, int], config: ModelConfig, tmp_path: Path
) -> None:
    found = write(tmp_path / "model", config)
    up = Upscaler.from_pretrained(found.unet.parent, device="cpu")
    graph = model_graphs(found)[0]
    assert isinstance(graph.module, WholePicture)
    lq = torch.rand((1, 3, *size), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hq = graph.module(lq)
    multiple = config.size_multiple_px
    rows, columns = (-(-side // multiple) * multiple for side in size)
    expected = up.upscale_tensor(2 * lq - 1, noise=lambda step: torch.zeros(1, 48, rows, columns))
    torch.testing.assert_close(2 * hq - 1, expected, rtol=0, atol=2e-5)


def test_the_description_runs_the_chain(tmp_path: Path) -> None:
    """A loop over the numbers of schedule.json and `step` alone ends where the library's own ends."""
    (step,) = graphs_of(TOY, build_unet(TOY.unet), PixelUnshuffle(4))
    plan = json.loads(json.dumps(chain_description("toy", TOY, (step,))))
    assert plan["graphs"]["step"]["inputs"] == {
        "x_t": ["B", 48, "h", "w"],
        "t": ["B"],
        "lq": ["B", 3, "h", "w"],
        "y0": ["B", 48, "h", "w"],
    }
    schedule = ShiftSchedule.from_config(TOY.schedule)
    inputs = step.examples(1, 8, 8)
    for draws in (True, False):
        theirs = ours = inputs["x_t"]
        for i in reversed(range(plan["steps"])):
            noise = torch.randn(ours.shape, generator=torch.Generator().manual_seed(i))
            t = torch.tensor([i])
            with torch.no_grad():
                x0_pred, x0_ours = (step.module(**{**inputs, "x_t": x_t, "t": t}) for x_t in (theirs, ours))
            ours = reverse_step(ours, x0_ours, t, noise if draws else None, schedule, inputs["y0"])
            if draws:
                theirs = plan["posterior_coef_xt"][i] * theirs + plan["posterior_coef_x0"][i] * x0_pred
                theirs = theirs + plan["posterior_variance"][i] ** 0.5 * noise
            else:
                theirs = plan["ddim_coef_xt"][i] * theirs + plan["ddim_coef_x0"][i] * x0_pred
                theirs = theirs + plan["ddim_coef_y0"][i] * inputs["y0"]
        torch.testing.assert_close(theirs, ours)


def test_an_export_that_computes_something_else_is_refused(one_step: ModelFiles) -> None:
    graph = graphs_of(ONE_STEP, build_unet(ONE_STEP.unet), PixelUnshuffle(4))[0]
    with pytest.raises(ParityError, match=r"picture 1x3x16x16: largest difference 0.01 of 1"):
        list(check(graph, lambda values: graph.module(**values) + 0.01))


def test_a_missing_package_is_named_with_its_extra(
    one_step: ModelFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"onnxruntime: pip install 'resshift\[export\]'"):
        list(export_model(one_step, "onnx", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_directory_with_files_is_refused(one_step: ModelFiles) -> None:
    with pytest.raises(ConfigError, match=r"new or empty directory, got .*/model"):
        list(export_model(one_step, "safetensors", one_step.unet.parent))


def test_the_card_of_a_model_that_ships_has_its_licence_and_no_links_into_the_repository() -> None:
    card = model_card(locate_model("tiny-x4"))
    top, body = card.removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(top) == {
        "license": "apache-2.0",
        "library_name": "resshift",
        "pipeline_tag": "image-to-image",
        "tags": ["super-resolution", "image-upscaling", "residual-shifting", "x4"],
    }
    assert body.startswith("# Model card: tiny-x4\n")
    assert "](../" not in body


def test_the_card_of_another_model_claims_no_licence(one_step: ModelFiles) -> None:
    assert model_card(one_step).startswith("---\nlicense: unknown\n")
    assert model_card(one_step, "mit").startswith("---\nlicense: mit\n")
