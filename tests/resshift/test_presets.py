"""Presets: the numbers of the released runs, and the size of the models that ship."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from resshift import seeds
from resshift.config import ConfigError, RunConfig, from_dict, to_dict, with_settings
from resshift.degradation import draw, hole_mask
from resshift.models import locate_model
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.networks.config import UNetConfig
from resshift.networks.conv_unet import build_unet
from resshift.presets import PRESETS, preset
from resshift.schedule import ScheduleConfig, ShiftSchedule, Target
from resshift.training.losses import Objective
from resshift.training.staged import StagedLearner
from resshift.training.step import DiffusionLearner, build_network

VQ_PRESETS = ["realsr-x4-s15", "realsr-x4-s4", "realsr-x2-s4", "bicubic-x4-s4"]


def num_parameters(name: str) -> int:
    """Count without allocating: a released network is half a gigabyte."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_unet(preset(name).model.unet).parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_preset_carries_its_own_name_and_is_the_same_every_time(name: str) -> None:
    assert preset(name).preset == name
    assert preset(name) == preset(name)


def test_s15_is_the_released_v1() -> None:
    config = preset("realsr-x4-s15")
    expected = ScheduleConfig(
        form="released", steps=15, kappa=2.0, power=0.3, min_noise=0.04, sqrt_eta_end=0.99
    )
    assert config.model.schedule == expected
    assert (config.model.scale, config.model.target) == (4, Target.X0)
    assert (config.train.steps, config.train.batch_size) == (300_000, 64)
    assert (config.optim.lr, config.optim.lr_schedule, config.optim.warmup_steps) == (5e-5, "constant", 5000)
    assert (config.loss.mse, config.loss.lpips, config.loss.mse_weighting) == (1.0, 0.0, "plain")
    assert (config.optim.weight_decay, config.optim.clip_norm, config.train.ema_decay) == (0.0, None, 0.999)


def test_s4_is_the_released_v3() -> None:
    config = preset("realsr-x4-s4")
    expected = ScheduleConfig(
        form="released", steps=4, kappa=2.0, power=0.3, min_noise=0.2, sqrt_eta_end=0.99
    )
    assert config.model.schedule == expected
    assert (config.train.steps, config.train.batch_size) == (400_000, 96)
    assert (config.optim.lr, config.optim.lr_end, config.optim.lr_schedule, config.optim.warmup_steps) == (
        5e-5,
        2e-5,
        "cosine",
        5000,
    )
    assert (config.loss.mse, config.loss.lpips) == (1.0, 1.0)


def test_four_steps_shift_as_released() -> None:
    sqrt_eta = ShiftSchedule.from_config(preset("realsr-x4-s4").model.schedule).sqrt_eta
    assert sqrt_eta.tolist() == pytest.approx([0.1, 0.52009637, 0.76138199, 0.99], abs=1e-8)


def test_fifteen_steps_begin_and_end_as_released() -> None:
    sqrt_eta = ShiftSchedule.from_config(preset("realsr-x4-s15").model.schedule).sqrt_eta
    assert (len(sqrt_eta), sqrt_eta[0], sqrt_eta[-1]) == (15, pytest.approx(0.02), pytest.approx(0.99))


def test_x2_has_a_condition_twice_as_large() -> None:
    config = preset("realsr-x2-s4")
    unet = config.model.unet
    assert isinstance(unet, UNetConfig)
    assert (config.model.scale, unet.lq_size, unet.image_size) == (2, 128, 64)
    assert (config.degradation.kind, config.degradation.scale) == ("realesrgan", 2)
    assert config.model.schedule == preset("realsr-x4-s4").model.schedule


def test_bicubic_differs_from_realsr_in_its_pictures_alone() -> None:
    config, base = preset("bicubic-x4-s4"), preset("realsr-x4-s4")
    assert (config.degradation.kind, config.degradation.scale) == ("bicubic", 4)
    assert (config.data.crop, config.data.crop_px) == ("random", 256)
    assert (config.model, config.loss, config.optim, config.train) == (
        base.model,
        base.loss,
        base.optim,
        base.train,
    )


@pytest.mark.parametrize("name", VQ_PRESETS)
def test_released_presets_use_the_autoencoder(name: str) -> None:
    stage = preset(name).model.first_stage
    assert (stage.kind, stage.factor, stage.channels) == ("vq", 4, 3)


def test_released_network_has_its_published_number_of_parameters() -> None:
    assert num_parameters("realsr-x4-s15") == num_parameters("realsr-x4-s4") == 118_593_583


@pytest.mark.parametrize("name", ["tiny-x4", "tiny-x4-swin"])
def test_small_models_need_no_autoencoder(name: str) -> None:
    model = preset(name).model
    assert num_parameters(name) <= 8_000_000
    assert (model.scale, model.schedule.steps, model.target) == (4, 1, Target.RESIDUAL)
    assert (model.first_stage.kind, model.first_stage.factor, model.first_stage.channels) == (
        "pixel_unshuffle",
        4,
        48,
    )


def test_the_small_chain_has_the_released_form_of_schedule_and_fits_into_16_mb() -> None:
    model = preset("tiny-x4-s4").model
    assert 2 * num_parameters("tiny-x4-s4") <= 16e6  # float16
    assert model.schedule == replace(preset("realsr-x4-s4").model.schedule, kappa=1.0, min_noise=0.1)
    assert model.has_estimate
    assert model.unet.sees_y0
    # The last step still has noise to turn into detail, of a twentieth of the range of a picture.
    assert ShiftSchedule.from_config(model.schedule).noise_std[0] == pytest.approx(0.1)
    assert locate_model("tiny-x4-s4").config == model


def test_the_model_of_three_stages_is_a_small_file() -> None:
    """U-Net and regression network in float16: at most 16 MB, and no more than 5 M parameters."""
    assert num_parameters("tiny-x4") == 4_829_360
    assert preset("tiny-x4").model.has_estimate


def test_the_small_model_that_fills_holes_fits_into_10_mb_and_its_holes_are_a_sixth() -> None:
    config = preset("tiny-inpaint")
    model = config.model
    assert 2 * num_parameters("tiny-inpaint") <= 10e6  # float16
    assert model.fills_holes
    assert (model.scale, model.steps, model.smallest_tile_px, model.size_multiple_px) == (1, 1, 128, 16)
    side, rng = config.data.crop_px, seeds.philox(0, "masks")
    holes = [hole_mask(draw(rng, config.degradation), side, side) for _ in range(400)]
    shares = [float((hole > 0).mean()) for hole in holes if hole is not None]
    assert 0.12 < np.mean(shares) < 0.2


def test_known_pixels_are_not_in_its_objective() -> None:
    """An untrained network returns its input, black: the Charbonnier distance to white is 2 in the hole."""
    config = with_settings(preset("tiny-inpaint"), ["loss.lpips=0", "train.precision=fp32"])
    unet = replace(config.model.unet, channels=(8, 8, 8))
    config = replace(config, model=replace(config.model, unet=unet))
    objective = Objective(config.model, config.loss, PixelUnshuffle(4))
    learner = StagedLearner(config, build_network(config), objective)
    hq = torch.full((8, 96, 96, 3), 255, dtype=torch.uint8)
    mask = torch.zeros((8, 96, 96), dtype=torch.uint8)
    mask[:, 24:48] = 255
    term = learner.step({"hq": hq, "lq": 0 * hq, "mask": mask}).terms["charbonnier"]
    assert float(term) == pytest.approx(2 / 4 + 3 / 4 * 1e-3, rel=1e-5)


def test_its_chain_starts_from_the_surroundings_of_holes() -> None:
    """An untrained network returns y0, white in the hole as well: nothing is left but the epsilon."""
    config = with_settings(preset("tiny-inpaint"), ["loss.lpips=0", "train.precision=fp32"])
    config = replace(config, model=replace(config.model, unet=replace(config.model.unet, channels=(8, 8, 8))))
    objective = Objective(config.model, config.loss, PixelUnshuffle(4))
    learner = StagedLearner(config, build_network(config), objective)
    white = torch.full((8, 96, 96, 3), 255, dtype=torch.uint8)
    mask = torch.zeros((8, 96, 96), dtype=torch.uint8)
    mask[:, 24:48, 10:50] = 255
    lq = white * (mask == 0)[..., None]
    rendered = learner.render({"hq": white, "lq": lq, "mask": mask}, [str(i) for i in range(8)])
    torch.testing.assert_close(rendered, torch.ones_like(rendered), atol=1e-5, rtol=0)
    term = learner.step({"hq": white, "lq": lq, "mask": mask}).terms["charbonnier"]
    assert float(term) == pytest.approx(1e-3, rel=1e-3)


def test_unknown_preset_lists_every_name() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'tiny'") as error:
        preset("tiny")
    assert str(error.value).endswith("allowed: " + ", ".join(PRESETS) + ", or MODULE:FUNCTION of your own")


@pytest.fixture
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_the_example_of_the_document_is_a_preset_that_trains(own_modules: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    (own_modules / "film.py").write_text(text.split("```python\n")[1].split("```")[0])
    config = preset("film:film_x2")
    assert (config.preset, config.model.scale, config.degradation.noise1.gaussian_sigma[1]) == (
        "film-x2",
        2,
        40.0,
    )
    assert from_dict(RunConfig, to_dict(config)) == config
    objective = Objective(config.model, config.loss, PixelUnshuffle(2))
    learner = DiffusionLearner(config, build_network(config), objective)
    batch = {
        name: torch.zeros((8, side, side, 3), dtype=torch.uint8) for name, side in (("hq", 16), ("lq", 8))
    }
    assert torch.isfinite(learner.step(batch).terms["loss"])


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere_at_all:f", "'nowhere_at_all' cannot be imported"),
        ("empty:f", "empty has no function 'f'"),
        ("empty:number", "must return a RunConfig, got int"),
        (":f", "cannot be imported"),
    ],
)
def test_a_preset_of_ones_own_that_cannot_be_is_one_line(name: str, told: str, own_modules: Path) -> None:
    (own_modules / "empty.py").write_text("def number():\n    return 1\n")
    with pytest.raises(ConfigError, match=told) as error:
        preset(name)
    assert "\n" not in str(error.value)
