"""The autoencoder's objective: closed forms of its parts, and what changes when the discriminator begins."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from resshift.config import ConfigError, from_dict, to_dict, with_settings
from resshift.networks.autoencoder import VQAutoencoder
from resshift.networks.discriminator import DiscriminatorConfig, PatchDiscriminator, hinge_loss
from resshift.training import checkpoint
from resshift.training.autoencoder import (
    AUTOENCODER_PRESETS,
    AutoencoderLearner,
    AutoencoderRunConfig,
    adaptive_weight,
    autoencoder_preset,
    build_autoencoder,
)
from resshift.training.autoencoder import test_vq as toy_preset

CPU = torch.device("cpu")


def toy(*settings: str) -> AutoencoderRunConfig:
    return with_settings(toy_preset(), list(settings))


def start(config: AutoencoderRunConfig) -> AutoencoderLearner:
    return AutoencoderLearner(config, build_autoencoder(config, CPU))


def smooth(i: int = 0) -> dict[str, Tensor]:
    small = torch.rand((8, 3, 4, 4), generator=torch.Generator().manual_seed(i))
    pictures = nn.functional.interpolate(small, 32, mode="bicubic").clamp(0, 1)
    return {"hq": (pictures * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()}


@pytest.mark.parametrize(
    ("real", "fake", "expected"),
    [(1.0, -1.0, 0.0), (0.0, 0.0, 1.0), (5.0, -5.0, 0.0), (-1.0, 1.0, 2.0), (0.5, -1.0, 0.25)],
)
def test_hinge_loss_has_its_closed_form(real: float, fake: float, expected: float) -> None:
    assert float(hinge_loss(torch.full((2, 1, 3, 3), real), torch.full((2, 1, 3, 3), fake))) == expected


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    assert float(adaptive_weight(10 * w.sum(), w.sum(), w)) == pytest.approx(10, rel=1e-3)
    assert float(adaptive_weight(w.sum(), 0 * w.sum(), w)) == 1e4  # at most
    assert not adaptive_weight(w.sum(), w.sum(), w).requires_grad


def test_discriminator_sees_patches_of_seventy_pixels() -> None:
    """A pixel changes the logits of the patches that hold it and no others (without normalisation, which sees
    the whole picture).
    """
    network = PatchDiscriminator(DiscriminatorConfig(channels=16, layers=3))
    for i, module in enumerate(network.main):
        if isinstance(module, nn.GroupNorm):
            network.main[i] = nn.Identity()
    x = torch.zeros(1, 3, 256, 256, requires_grad=True)
    logits = network(x)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    assert x.grad is not None
    seen = x.grad.abs().sum((0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_judgement_does_not_depend_on_the_batch() -> None:
    network = PatchDiscriminator(DiscriminatorConfig(channels=16, layers=2))
    x = torch.rand((3, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]))


def test_terms_are_those_of_the_formula() -> None:
    config = toy("train.micro_batch=8", "loss.adversarial_start=0")
    learner = start(config)
    autoencoder, judge = learner.state.networks["model"], learner.state.networks["discriminator"]
    pictures = smooth()
    x = pictures["hq"].permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        x_rec, z, z_q = autoencoder(x)
        expected = {
            "l1": (x_rec - x).abs().mean(),
            "codebook": 1.25 * (z - z_q).square().mean(),
            "adversarial": -judge(x_rec).mean(),
            "discriminator": hinge_loss(judge(x), judge(x_rec)),
        }
    terms = learner.step(pictures).terms
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-6)
    total = terms["l1"] + terms["codebook"] + 0.75 * terms["adaptive"] * terms["adversarial"]
    torch.testing.assert_close(terms["loss"], total, rtol=1e-4, atol=1e-6)
    assert terms["adaptive"] > 0


def test_discriminator_rests_until_its_step() -> None:
    learner = start(toy("loss.adversarial_start=2"))
    before = [
        parameter.detach().clone() for parameter in learner.state.networks["discriminator"].parameters()
    ]
    for i in range(2):
        assert float(learner.step(smooth(i)).terms["discriminator"]) == 0
    assert all(
        torch.equal(a, b)
        for a, b in zip(before, learner.state.networks["discriminator"].parameters(), strict=True)
    )
    assert float(learner.step(smooth(2)).terms["discriminator"]) > 0
    assert any(
        not torch.equal(a, b)
        for a, b in zip(before, learner.state.networks["discriminator"].parameters(), strict=True)
    )


def test_cut_into_micro_batches_does_not_matter_before_the_discriminator() -> None:
    steps = [
        start(toy(f"train.micro_batch={limit}", "loss.adversarial=0")).step(smooth()) for limit in (8, 3)
    ]
    torch.testing.assert_close(steps[1].outcome.grad_norm, steps[0].outcome.grad_norm, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(steps[1].terms["loss"], steps[0].terms["loss"], rtol=1e-5, atol=1e-6)


def test_codes_begin_among_the_latents() -> None:
    """Pictures have most of the 64 codes; fewer than half of them if these lie between -1/64 and 1/64."""
    autoencoder = build_autoencoder(toy(), CPU)
    pictures = smooth(3)["hq"].permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        assert len(autoencoder.quantize.nearest(autoencoder.encode(pictures)).unique()) > 48
        narrow = torch.Generator().manual_seed(0)
        nn.init.uniform_(autoencoder.quantize.embedding.weight, -1 / 64, 1 / 64, narrow)
        assert len(autoencoder.quantize.nearest(autoencoder.encode(pictures)).unique()) < 32


def test_codebook_learns() -> None:
    learner = start(toy("loss.adversarial=0"))
    before = learner.state.network.quantize.embedding.weight.detach().clone()  # type: ignore[operator, union-attr]
    learner.step(smooth())
    assert not torch.equal(before, learner.state.network.quantize.embedding.weight)  # type: ignore[union-attr]


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    config = toy("loss.adversarial_start=1")
    whole, first, second = start(config), start(config), start(config)
    for i in range(4):
        whole.step(smooth(i))
    for i in range(2):
        first.step(smooth(i))
    checkpoint.write(tmp_path, checkpoint.take(first.state), config)
    checkpoint.load(tmp_path, second.state, config)
    for i in range(2, 4):
        second.step(smooth(i))
    ours, theirs = checkpoint.take(second.state), checkpoint.take(whole.state)
    assert ours.weights.keys() == {"model", "discriminator", "ema"}
    for name, weights in theirs.weights.items():
        assert all(torch.equal(ours.weights[name][key], value) for key, value in weights.items())


@pytest.mark.slow
def test_loss_falls() -> None:
    learner = start(toy("loss.adversarial_start=30"))
    losses = [float(learner.step(smooth()).terms["l1"]) for _ in range(40)]
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize(
    ("name", "num_keys", "num_parameters"), [("vq-f4", 205, 55_322_782), ("vq-f8-face", 285, 77_009_115)]
)
def test_presets_have_the_released_shape(name: str, num_keys: int, num_parameters: int) -> None:
    with torch.device("meta"):
        network = VQAutoencoder(autoencoder_preset(name).first_stage.vq)
    assert (len(network.state_dict()), sum(parameter.numel() for parameter in network.parameters())) == (
        num_keys,
        num_parameters,
    )


@pytest.mark.parametrize("name", AUTOENCODER_PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = autoencoder_preset(name)
    assert config.preset == name
    assert from_dict(AutoencoderRunConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("first_stage.kind=pixel_unshuffle", "has nothing to learn"),
        ("data.crop_px=34", "must be a multiple of 4, got 34"),
        ("train.parallel=fsdp", "trains with train.parallel=ddp"),
        ("train.precision=fp16", "precision fp32 or bf16"),
        ("loss.l1=-1", "must not be negative"),
        ("loss.discriminator.channels=20", "multiple of 16"),
    ],
)
def test_what_cannot_work_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        toy(setting)
