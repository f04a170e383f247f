"""Configurations: typed settings, errors that name what is allowed, and what makes two runs the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from resshift.config import (
    MUTABLE_FIELDS,
    ConfigError,
    ModelConfig,
    RunConfig,
    Sampling,
    differing_fields,
    fingerprint,
    flatten,
    from_dict,
    to_dict,
    with_settings,
)
from resshift.networks.config import ForeignConfig, RegressionConfig, UNetConfig
from resshift.presets import PRESETS, preset
from resshift.schedule import ShiftSchedule
from resshift.stages import span_at
from resshift.training.distillation import student_run


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json(name: str) -> None:
    assert from_dict(RunConfig, to_dict(preset(name))) == preset(name)
    assert preset(name).preset == name


@pytest.mark.parametrize(
    ("setting", "section", "field", "value"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("optim.lr=1e-3", "optim", "lr", 1e-3),
        ("optim.clip_norm=null", "optim", "clip_norm", None),
        ("optim.betas=[0.8, 0.9]", "optim", "betas", (0.8, 0.9)),
        ("optim.betas=0.8,0.9", "optim", "betas", (0.8, 0.9)),
        ("loss.lpips_trunk=a,b.pth", "loss", "lpips_trunk", "a,b.pth"),
        ("loss.lpips_trunk=/weights/a=b.pth", "loss", "lpips_trunk", "/weights/a=b.pth"),
        ("data.flip=false", "data", "flip", False),
        ("data.crop=short_side", "data", "crop", "short_side"),
        ("optim.lr=1", "optim", "lr", 1.0),
    ],
)
def test_settings_take_the_type_of_their_field(setting: str, section: str, field: str, value: object) -> None:
    assert getattr(getattr(with_settings(preset("tiny-x4-swin"), [setting]), section), field) == value


def test_settings_reach_nested_sections_and_the_last_one_wins() -> None:
    config = with_settings(
        preset("tiny-x4-swin"), ["model.unet.dropout=0.1", "train.steps=1", "train.steps=2"]
    )
    assert isinstance(config.model.unet, UNetConfig)
    assert (config.model.unet.dropout, config.train.steps) == (0.1, 2)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (
            "train.stepz=1",
            "unknown setting 'train.stepz'; allowed here: activation_checkpointing, batch_size",
        ),
        ("model.unet.depth=1", "allowed here: attention_resolutions, channel_mult"),
        ("trian.steps=1", "no section 'trian'; allowed: data, degradation"),
        ("train=1", "'train' is a section"),
        ("train.steps", "looks like section.field=value"),
        ("train.steps=1.5", "train.steps: .*got 1.5"),
        ("train.precision=fp8", "train.precision: .*'fp32', 'bf16' or 'fp16'.*got 'fp8'"),
        ("train.ema_decay=1", "train.ema_decay must lie in"),
        ("loss.mse=-1", "loss.mse, loss.lpips and loss.charbonnier must not be negative"),
        ("loss.fourier=-1", "loss.fourier, loss.features, loss.artifacts and loss.adversary must not"),
        ("loss.charbonnier=1", "need stages, and the run has none: loss.charbonnier=1.0, loss.fourier=0.0"),
        ("optim.muon=10", "need stages"),
        ("stages=[{}]", "stages need loss.mse=0 and .*constant, got 1.0 and cosine"),
        ("degradation.scale=2", r"degradation.scale \(2\) must equal model.scale \(4\)"),
        ("data.crop_px=100", "data.crop_px must be a multiple of 32"),
        ("model.unet.in_channels=3", r"must equal the latent's 48"),
        ("model.unet.swin_embed_dim=33", "multiples of 32"),
        ("model.unet.dropout=1", r"model.dropout must lie in \[0, 1\), got 1"),
        ("degradation.kernel1.sise=3", "'degradation.kernel1.sise'; allowed here: .*sigma.*size"),
        ("model.first_stage.vq.chh=3", "'model.first_stage.vq.chh'; allowed here: ch, ch_mult"),
        ("optim.lr=NaN", "finite|must"),
        ("optim.lr=Infinity", "optim.lr: .*finite number, got inf"),
        ("loss.mse=NaN", "loss.mse: .*finite number, got nan"),
        ("optim.lr=0", "optim.lr"),
        ("optim.lr_end=1", r"optim.lr_end must lie in \(0, optim.lr = 0.0005\], got 1"),
        ("optim.betas=[0.9, 1]", r"optim.betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ("optim.betas=[0.9]", "optim.betas"),
        ("optim.clip_norm=0", "optim.clip_norm must be positive"),
        ("optim.weight_decay=-1", "weight_decay not negative"),
        ("optim.warmup_steps=-1", "warmup_steps not negative"),
        ("train.batch_size=0", "train.batch_size must be at least 1, got 0"),
        ("data.flip=maybe", "data.flip: .*got 'maybe'"),
        ("data.crop_px=4", "data.crop_px must be at least 8"),
        ("data.degrade_on=gpu", "data.degrade_on: .*'cpu' or 'device', got 'gpu'"),
        ("=1", "looks like section.field=value"),
    ],
)
def test_bad_settings_are_one_clear_error(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        with_settings(preset("tiny-x4-swin"), [setting])
    assert "\n" not in str(error.value)


STAGED = [
    ("stages.0.steps=24000", "train.steps must be more than 26000, .* got 24000; stages.0.steps, for ex"),
    ("train.steps=16000", "train.steps must be more than 16000, .* got 16000"),
    ("stages.2.steps=5", r"every stage but the last needs steps, .* \[14000, 2000, 5\]"),
    ("stages.0.steps=null", r"every stage but the last needs steps, .* \[None, 2000, None\]"),
    ("stages.0.steps=-1", "steps must not be negative, got -1"),
    ("stages.1.lr=0", "lr must be positive, got 0"),
    ("stages.1.lpips=-1", "loss.mse, loss.lpips and loss.charbonnier must not be negative"),
    ("stages.1.trains=g", "stages.1.trains: .*'regression' or 'chain', got 'g'"),
    ("stages.1.crop=3", "unknown setting 'stages.1.crop'; allowed here: adversary, artifacts, decay_steps"),
    ("stages.3.lr=1", "no section '3'; allowed: 0, 1, 2"),
    ("stages.3={}", "'stages.3' is a section, not a setting; it has: 0, 1, 2"),
    ("stages.0=1", "'stages.0' is a section, not a setting; it has: adversary, artifacts, decay_steps"),
    ("stages.0.trains=chain", None),
    ("stages.2.trains=regression", r"before the chain, got \['regression', 'chain', 'regression'\]"),
    ("stages.0.adversary=1", "stages.0 trains the regression network, which needs .* got adversary=1"),
    ("loss.mse=1", "stages need loss.mse=0"),
    ("optim.lr_schedule=cosine", "and cosine"),
    (
        "train.precision=fp16",
        "stages need train.parallel=ddp and train.precision fp32 or bf16, got ddp and fp16",
    ),
    ("train.parallel=hsdp", "got hsdp and fp32"),
]


@pytest.mark.parametrize(("setting", "message"), STAGED)
def test_stages_that_cannot_be_are_one_clear_error(setting: str, message: str | None) -> None:
    if message is None:
        assert with_settings(preset("tiny-x4"), [setting])
        return
    with pytest.raises(ConfigError, match=message) as error:
        with_settings(preset("tiny-x4"), [setting])
    assert "\n" not in str(error.value)


def test_stages_follow_each_other_and_the_last_one_has_the_rest() -> None:
    config = with_settings(
        preset("tiny-x4"), ["stages.0.steps=3", "stages.1.steps=2", "train.steps=9", "loss.lpips=0.5"]
    )
    spans = [span_at(config.stages, step, config.train.steps) for step in (0, 2, 3, 5, 8, 20)]
    assert [(span.i_stage, span.end, span.part_start) for span in spans] == [
        (0, 3, 0),
        (0, 3, 0),
        (1, 5, 3),
        (2, 9, 3),
        (2, 9, 3),
        (2, 9, 3),
    ]
    assert [loss.lpips for loss in config.losses] == [0.0, 0.5, 0.15]
    assert [loss.adversary for loss in config.losses] == [0.0, 0.0, 2.0]
    without_g = with_settings(config, ["stages.0.steps=0"])
    assert span_at(without_g.stages, 0, 9)[::2] == (1, 2)
    longer = with_settings(config, ["train.steps=30", "loss.features_trunk=/elsewhere"])
    assert fingerprint(longer) == fingerprint(config) != fingerprint(without_g)
    assert differing_fields(to_dict(without_g), to_dict(config)) == ["stages.0.steps: 3 -> 0"]


# Of runs that exist: a new field must not change them (`_ABSENT_WHEN`).
FINGERPRINTS = {
    "realsr-x4-s15": "db59fe9769057135",
    "realsr-x4-s4": "04dc9d8274dfe87c",
    "sinsr-x4-s1": "f8313005b48b1916",
    "realsr-x2-s4": "3452de837f9583b3",
    "bicubic-x4-s4": "02568a233f5b214e",
    "inpaint-imagenet-s4": "a26feb5aeec70c84",
    "inpaint-face-s4": "eafc53d21a05a7c2",
    "face-s4": "9a2678e452bdb027",
    "tiny-x4-swin": "921ea8fcdb89252c",
    "test-x4": "17f2357e3dbef84f",
}


@pytest.mark.parametrize(("name", "expected"), FINGERPRINTS.items())
def test_fingerprints_stay(name: str, expected: str) -> None:
    config = preset(name)
    if name == "tiny-x4-swin":  # such a run is continued with its former name
        config = with_settings(config, ["preset=tiny-x4"])
    assert fingerprint(config) == expected
    assert not {"stages", "loss.features_trunk", "optim.muon"} & flatten(to_dict(config)).keys()


def test_fingerprint_is_about_the_run_not_its_length() -> None:
    config = preset("tiny-x4-swin")
    longer = with_settings(
        config, ["train.steps=99", "train.checkpoint_every=3", "loss.lpips_trunk=/elsewhere"]
    )
    other = with_settings(config, ["optim.lr=1e-3"])
    assert fingerprint(longer) == fingerprint(config) != fingerprint(other)
    assert differing_fields(to_dict(longer), to_dict(config)) == []
    assert differing_fields(to_dict(other), to_dict(config)) == ["optim.lr: 0.0005 -> 0.001"]


def test_every_mutable_field_exists_and_leaves_the_fingerprint_alone() -> None:
    """A misspelt name in the list would make the field a defining one in silence."""
    config = student_run(preset("test-x4"), "runs/chain", "0", preset("test-x4").model)
    config = with_settings(config, ["loss.features_trunk=/there", "data.degrade_on=device"])
    values = flatten(to_dict(config))
    assert values.keys() >= MUTABLE_FIELDS
    choices = {
        "train.parallel": "fsdp",
        "train.gradient_dtype": "bf16",
        "train.compile": "default",
        "validation.best": "ssim_y",
        "train.milestone_every": "7",
        "data.degrade_on": "cpu",
    }
    for name in MUTABLE_FIELDS:
        value = values[name]
        other = (
            str(not value).lower()
            if isinstance(value, bool)
            else "7"
            if isinstance(value, int | float)
            else "/elsewhere"
        )
        changed = with_settings(config, [f"{name}={choices.get(name, other)}"])
        assert changed != config
        assert fingerprint(changed) == fingerprint(config)


@pytest.mark.parametrize(
    "setting",
    [
        "train.seed=1",
        "train.batch_size=16",
        "train.precision=fp32",
        "data.flip=false",
        "degradation.kernel1.sinc_prob=0.2",
        "model.schedule.steps=5",
    ],
)
def test_every_other_field_changes_the_fingerprint(setting: str) -> None:
    config = preset("tiny-x4-swin")
    changed = with_settings(config, [setting])
    assert fingerprint(changed) != fingerprint(config)
    (difference,) = differing_fields(to_dict(changed), to_dict(config))
    assert difference.startswith(setting.split("=")[0] + ": ")


def test_fields_that_one_side_does_not_have_are_named() -> None:
    """A run that an older version wrote."""
    ours = to_dict(preset("tiny-x4-swin"))
    theirs = to_dict(preset("tiny-x4-swin"))
    del theirs["optim"]["clip_norm"]
    theirs["old"] = {"field": 3}
    assert differing_fields(ours, theirs) == ["old.field: 3 -> None", "optim.clip_norm: None -> 1.0"]


def test_unknown_preset_lists_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"unknown preset 'x'; allowed: realsr-x4-s15, realsr-x4-s4"):
        preset("x")


def test_released_presets_have_the_released_numbers() -> None:
    v1, v3 = preset("realsr-x4-s15"), preset("realsr-x4-s4")
    assert (v1.train.batch_size, v1.train.steps, v1.optim.lr, v1.optim.lr_schedule, v1.loss.lpips) == (
        64,
        300_000,
        5e-5,
        "constant",
        0,
    )
    assert (v3.train.batch_size, v3.train.steps, v3.optim.lr_end, v3.optim.lr_schedule, v3.loss.lpips) == (
        96,
        400_000,
        2e-5,
        "cosine",
        1,
    )
    assert (v1.optim.warmup_steps, v1.train.ema_decay, v1.optim.weight_decay) == (5000, 0.999, 0)
    assert ShiftSchedule.from_config(v3.model.schedule).sqrt_eta.tolist() == pytest.approx(
        [0.1, 0.52009637, 0.76138199, 0.99], abs=1e-8
    )
    assert ShiftSchedule.from_config(v1.model.schedule).sqrt_eta[:3].tolist() == pytest.approx(
        [0.02, 0.117165, 0.176305], abs=1e-6
    )
    x2 = preset("realsr-x2-s4")
    assert isinstance(x2.model.unet, UNetConfig)
    assert (x2.model.scale, x2.model.unet.lq_size, x2.degradation.scale) == (2, 128, 2)
    assert preset("bicubic-x4-s4").degradation.kind == "bicubic"


def test_condition_must_have_the_size_that_the_scale_gives() -> None:
    base = preset("realsr-x4-s4").model
    with pytest.raises(ValueError, match=r"lq_size must be image_size x 4 / scale = 64, got 128"):
        ModelConfig(unet=replace(base.unet, lq_size=128))


def test_a_lattice_needs_room() -> None:
    with_settings(preset("tiny-x4-swin"), ["loss.lattice=0.03", "data.crop_px=64"])
    with pytest.raises(
        ConfigError,
        match=r"loss.lattice needs .* crops of at least 16 positions .*, 64 px, got 4 and data.crop_px=32",
    ):
        with_settings(preset("tiny-x4-swin"), ["loss.lattice=0.03", "data.crop_px=32"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "7"}, "seed must be an integer, got '7'"),
        ({"seed": None}, "seed must be an integer, got None"),
        ({"outscale": 0}, r"outscale must be a number in \(0, 16\], got 0"),
        ({"outscale": float("nan")}, r"outscale must be a number in \(0, 16\], got nan"),
        ({"outscale": "2"}, r"outscale must be a number in \(0, 16\], got '2'"),
        ({"steps": 2.0}, "steps must be an integer, got 2.0"),
        ({"tile_px": True}, "tile_px must be an integer, got True"),
        ({"tile_batch": 0}, "tile_batch must be at least 1, got 0"),
    ],
)
def test_sampling_refuses_what_no_model_can_use(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Sampling(**values)


def test_sampling_names_what_a_model_cannot_do() -> None:
    Sampling(steps=4, tile_px=8).check_for("tiny", steps=4, smallest_tile_px=8)
    with pytest.raises(ValueError, match=r"^steps must lie in 1 to 4 for tiny, got 0$"):
        Sampling(steps=0).check_for("tiny", steps=4, smallest_tile_px=8)
    with pytest.raises(ValueError, match=r"^tile_px must be at least 8 for tiny, got 7$"):
        Sampling(tile_px=7).check_for("tiny", steps=4, smallest_tile_px=8)


@pytest.mark.parametrize(
    ("config", "smallest", "longest"),
    [
        (RegressionConfig(), 4 * 31, 16 * 31),
        (ForeignConfig(architecture="ESRGAN", scale=4), 16, 256),
        (ForeignConfig(architecture="ESRGAN", scale=2, size_multiple=12), 24, 252),
        (ForeignConfig(architecture="SCUNet", scale=1, smallest_px=40, tiling="discouraged"), 40, 512),
        (ForeignConfig(architecture="IPT", scale=2, size_multiple=8, smallest_px=600), 600, 600),
    ],
)
def test_networks_without_a_chain_say_what_tiles_they_take(
    config: RegressionConfig | ForeignConfig, smallest: int, longest: int
) -> None:
    assert (config.smallest_tile_px, config.longest_tile_px, config.steps) == (smallest, longest, 1)
    assert (
        config.smallest_tile_px % config.size_multiple == config.longest_tile_px % config.size_multiple == 0
    )
    assert from_dict(type(config), to_dict(config)) == config


def test_the_steps_of_a_model_are_those_of_its_schedule() -> None:
    assert [preset(name).model.steps for name in ("tiny-x4", "realsr-x4-s15")] == [1, 15]
