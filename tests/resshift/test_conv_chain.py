"""Chains that start from the estimate of a regression network, with a U-Net of convolutions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from resshift import weights
from resshift.config import ConfigError, LossConfig, ModelConfig, RunConfig, Sampling, from_dict, to_dict
from resshift.images import Picture
from resshift.models import WeightsError
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.networks.config import ConvUNetConfig, FirstStageConfig, RegressionConfig, UNetConfig
from resshift.networks.conv_unet import ConvUNet, build_unet, from_one_step
from resshift.networks.regression import RegressionNet
from resshift.presets import preset
from resshift.presets import test_x4 as toy_preset
from resshift.schedule import ScheduleConfig, Target
from resshift.training.losses import Objective
from resshift.training.step import DiffusionLearner, build_network, start_from
from resshift.upscaler import Upscaler

REGRESSION = RegressionConfig(channels=8, half_channels=8, blocks_before=1, half_blocks=1, blocks_after=1)
UNET = ConvUNetConfig(channels=(8, 8, 8), blocks_before=(1, 1, 1), blocks_after=(1, 1), regression=REGRESSION)


def model(steps: int = 1, regression: RegressionConfig | None = REGRESSION) -> ModelConfig:
    return ModelConfig(
        target=Target.RESIDUAL,
        unet=replace(UNET, steps=steps, regression=regression),
        first_stage=FirstStageConfig(kind="pixel_unshuffle"),
        schedule=ScheduleConfig(steps=steps, kappa=0.1 if steps > 1 else 0.0, sqrt_eta_end=1.0),
    )


def trained(config: ModelConfig) -> ConvUNet:
    """Return a network without layers of zeros."""
    torch.manual_seed(0)
    network = build_unet(config.unet)
    assert isinstance(network, ConvUNet)
    for name, value in network.named_parameters():
        if name.endswith("head.weight") or name.startswith("times"):
            torch.nn.init.normal_(value, std=0.02)
    return network.eval()


def picture(height: int, width: int) -> Picture:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Picture(pixels=coarse.repeat(4, 0).repeat(4, 1)[:height, :width])


@torch.no_grad()
def test_one_step_is_g_plus_the_residual() -> None:
    """x0 = y0 - U(y0, lq), y0 = unshuffle(g(lq)), written out for a picture of one tile."""
    config = model()
    network = trained(config)
    source = picture(32, 40)
    up = Upscaler(config, network, device="cpu", optimise=False)
    lq = torch.from_numpy(source.pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert network.regression is not None
    stage = PixelUnshuffle(4)
    y0 = stage.encode(network.regression(lq))
    x0 = stage.decode(y0 - network(y0, torch.zeros(1, dtype=torch.int64), lq))
    networks = up.chain.networks()
    assert torch.equal(networks.estimate(lq), y0)
    found = stage.decode(networks.predict_x0(y0, y0, lq, torch.zeros(1, dtype=torch.int64)))
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=1e-5)
    seen: list[torch.Tensor] = []
    plan = up.chain.plan(32, 40, None)
    assert plan.num_tiles == 1
    work = up.chain.work(
        plan, (32, 40), Sampling(), read=lambda top, bottom: lq[0, :, top:bottom], emit=seen.append, batch=1
    )
    _drive(work)
    torch.testing.assert_close(torch.cat(seen, dim=1)[:, :128, :160], x0[0], atol=1e-4, rtol=1e-4)


def _drive(work: Any) -> None:
    answer = None
    while True:
        try:
            call = work.send(answer)
        except StopIteration:
            return
        answer = call.function(*call.inputs)


@pytest.mark.parametrize("steps", [1, 2])
def test_tiles_give_nearly_the_whole_picture(steps: int) -> None:
    """No statistic of the whole: what is further from a seam than the networks reach is that of the picture,
    within rounding, and the rest differs by what neighbours beyond the overlap bring.
    """
    config = model(steps)
    up = Upscaler(config, trained(config), device="cpu")
    source = picture(96, 80)
    whole = up.upscale(source).pixels.astype(int)
    tiled = up.upscale(source, Sampling(tile_px=64)).pixels.astype(int)
    difference = np.abs(whole - tiled)
    assert difference[:80, :80].max() <= 1
    assert difference.mean() < 0.5
    assert up.upscale(source, Sampling(tile_px=64)).pixels.tobytes() == tiled.astype(np.uint8).tobytes()


@pytest.mark.parametrize("steps", [1, 2])
def test_fidelity_mixes_the_model_with_g(steps: int) -> None:
    """0 is the model and 1 is encode(g(lq)), byte for byte; halfway, the latent is their mean."""
    config = model(steps)
    up = Upscaler(config, trained(config), device="cpu")
    source = picture(40, 32)
    plain, zero, half, one = (
        up.upscale(source, Sampling(fidelity=fidelity)).pixels for fidelity in (None, 0, 0.5, 1)
    )
    assert zero.tobytes() == plain.tobytes()
    assert one.tobytes() != plain.tobytes()
    lq = torch.from_numpy(source.pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    networks = up.chain.networks()
    y0 = networks.estimate(lq)
    t = torch.zeros(1, dtype=torch.int64)
    x_t = y0 + 0.05
    x0 = networks.predict_x0(x_t, y0, lq, t)
    mixed = up.chain.networks(fidelity=0.25)
    torch.testing.assert_close(mixed.predict_x0(x_t, y0, lq, t), 0.75 * x0 + 0.25 * y0)
    if steps > 1:
        assert torch.equal(mixed.predict_x0(x_t, y0, lq, t + 1), networks.predict_x0(x_t, y0, lq, t + 1))
    assert torch.equal(up.chain.networks(fidelity=1).predict_x0(x_t, y0, lq, t), y0)
    # Away from clipping and rounding the pictures are mixed as the latents are.
    mean = (plain.astype(float) + one.astype(float)) / 2
    unclipped = (np.minimum(plain, one) > 20) & (np.maximum(plain, one) < 235)
    assert np.abs(half - mean)[unclipped].max() <= 2


def test_a_fidelity_that_a_model_cannot_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fidelity must be a number in \[0, 1\], got 1.5"):
        Sampling(fidelity=1.5)
    toy = toy_preset()
    up = Upscaler(toy.model, build_network(toy), device="cpu")
    with pytest.raises(
        ValueError, match="fidelity must be 0 for this model, which has no regression network"
    ):
        up.upscale(picture(8, 8), Sampling(fidelity=0.5))
    assert up.upscale(picture(8, 8), Sampling(fidelity=0)).pixels.shape == (32, 32, 3)


def test_without_noise_the_seed_changes_nothing() -> None:
    config = model(1)
    up = Upscaler(config, trained(config), device="cpu")
    first, second = (up.upscale(picture(16, 16), Sampling(seed=seed)).pixels for seed in (0, 1))
    assert first.tobytes() == second.tobytes()
    with pytest.raises(ValueError, match=r"model\.target must be x0 or residual without noise, got epsilon"):
        replace(config, target=Target.EPSILON)


def test_another_seed_changes_a_chain_of_two_steps() -> None:
    config = model(2)
    up = Upscaler(config, trained(config), device="cpu")
    first, second = (up.upscale(picture(32, 32), Sampling(seed=seed)).pixels.astype(int) for seed in (0, 1))
    assert 0.2 < np.abs(first - second).mean() < 30


def test_a_model_directory_and_its_configuration_come_back(tmp_path: Path) -> None:
    config = model(2)
    values = to_dict(config)
    assert values["unet"]["regression"]["channels"] == 8
    assert from_dict(ModelConfig, values) == config
    network = trained(config)
    weights.save_safetensors(network.state_dict(), tmp_path / "model.safetensors", {})
    (tmp_path / "config.json").write_text(json.dumps({"name": "two", "model": values}))
    source = picture(32, 32)
    expected = Upscaler(config, network, device="cpu").upscale(source).pixels
    loaded = Upscaler.from_pretrained(tmp_path, device="cpu")
    assert loaded.upscale(source).pixels.tobytes() == expected.tobytes()


def run(steps: int) -> RunConfig:
    base = preset("tiny-x4-swin")
    return replace(base, model=model(steps), loss=LossConfig(), train=replace(base.train, precision="fp32"))


def test_training_starts_at_g_and_leaves_it_as_it_is() -> None:
    """With a residual of zero x0 is y0: the loss is the mean square of encode(g(lq)) - encode(hq)."""
    config = run(1)
    network = build_network(config)
    assert isinstance(network, ConvUNet)
    assert network.regression is not None
    torch.nn.init.normal_(network.regression.head.weight, std=0.02)
    before = {key: value.clone() for key, value in network.regression.state_dict().items()}
    objective = Objective(config.model, config.loss, PixelUnshuffle(4))
    learner = DiffusionLearner(config, network, objective)
    generator = torch.Generator().manual_seed(0)
    batch = {
        "hq": torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator),
        "lq": torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8, generator=generator),
    }
    hq, lq = (batch[name].permute(0, 3, 1, 2).float() / 127.5 - 1 for name in ("hq", "lq"))
    expected = float((network.regression(lq) - hq).square().mean().detach())
    result = learner.step(batch)
    assert float(result.terms["mse"]) == pytest.approx(expected, rel=1e-5)
    for _ in range(2):
        learner.step(batch)
    assert network.head.weight.any()
    assert all(torch.equal(before[key], value) for key, value in network.regression.state_dict().items())
    assert len(learner.state.optimizer.param_groups[0]["params"]) < len(list(network.parameters()))
    assert torch.isfinite(learner.render(batch, [str(i) for i in range(8)])).all()


def test_a_run_may_begin_with_the_weights_of_g_alone() -> None:
    """In the network and its average; the rest keeps its initial weights. Others must fit the whole."""
    config, given = run(2), RegressionNet(REGRESSION)
    for value in given.parameters():
        torch.nn.init.normal_(value, std=0.1)
    state = given.state_dict()
    learner = DiffusionLearner(
        config, build_network(config), Objective(config.model, config.loss, PixelUnshuffle(4))
    )
    start_from(learner, state)
    fresh = build_network(config).state_dict()
    for module in (learner.state.network, learner.state.ema.module):
        for key, value in module.state_dict().items():
            name = key.removeprefix("regression.")
            assert torch.equal(value, state[name] if name != key else fresh[key]), key
    with pytest.raises(WeightsError, match="missing"):
        start_from(learner, {**state, "head.colour": torch.zeros(1)})


def test_a_chain_may_begin_as_the_network_of_one_step() -> None:
    """Then it predicts at every step, and from any x_t, what that one predicts from y0."""
    torch.manual_seed(1)
    one = ConvUNet(replace(UNET, steps=1))
    for value in one.parameters():
        torch.nn.init.normal_(value, std=0.1)
    chain = ConvUNet(replace(UNET, steps=4))
    chain.load_state_dict(from_one_step(chain, one.state_dict()))
    x, y0, lq = (torch.randn(3, channels, 8, 8) for channels in (48, 48, 3))
    with torch.no_grad():
        expected = one(y0, torch.zeros(3, dtype=torch.int64), lq)
        found = chain(x, torch.tensor([0, 2, 3]), torch.cat((lq, y0), dim=1))
    torch.testing.assert_close(found, expected)
    own = chain.state_dict()
    assert from_one_step(chain, own) is own


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            {"unet": {"channels": [8], "colour": 1}},
            "unknown setting 'unet.colour'; allowed here: blocks_after",
        ),
        ({"unet": {"model_channels": 64, "colour": 1}}, "unknown setting 'unet.colour'; allowed here: att"),
        ({"unet": {"channels": [8, 8, 8], "regression": {"scale": 2}}}, r"model\.unet\.regression\.scale"),
        ({"unet": {"channels": [8, 8, 8], "steps": 3}}, "3 with 4 steps"),
        ({"unet": {"channels": [8, 8, 8]}, "scale": 2}, "positions of model.scale x lq_ratio pixels"),
        (
            {"unet": {"channels": [8, 8, 8], "lq_ratio": 4, "steps": 4}, "scale": 1},
            r"model\.unet\.lq_ratio must be 1 for a network of 4 steps, got 4",
        ),
    ],
)
def test_configurations_that_cannot_be_are_refused(change: dict[str, Any], told: str) -> None:
    values = {"first_stage": {"kind": "pixel_unshuffle"}, **change}
    with pytest.raises(ConfigError, match=told):
        from_dict(ModelConfig, values)


def test_a_swin_unet_is_what_it_was() -> None:
    """Stored configurations have no field of the other shape, and none was added to this one."""
    values = to_dict(ModelConfig())
    assert isinstance(from_dict(ModelConfig, values).unet, UNetConfig)
    assert "regression" not in values["unet"]


def test_sharding_is_refused() -> None:
    config = run(1)
    train = replace(config.train, parallel="fsdp")
    with pytest.raises(ValueError, match="needs ddp"):
        replace(config, train=train)


def test_a_bare_file_is_no_preset_unless_its_shapes_are(tmp_path: Path) -> None:
    from resshift.networks.recognition import inspect

    save_file(trained(model()).state_dict(), tmp_path / "net.safetensors")
    assert "presets" not in inspect(tmp_path / "net.safetensors")
