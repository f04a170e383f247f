"""Students of one step: the loss written out, and a student that comes nearer to its teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resshift.config import (
    ConfigError,
    DistillConfig,
    LossConfig,
    RunConfig,
    fingerprint,
    from_dict,
    to_dict,
    with_settings,
)
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.networks.config import ConvUNetConfig
from resshift.networks.conv_unet import build_unet
from resshift.presets import preset
from resshift.resize.bicubic import upsample
from resshift.sampler import network_denoiser, sample
from resshift.schedule import Sampler, ShiftSchedule, Target
from resshift.training.distillation import Distillation, student_run, teacher_config
from resshift.training.step import DiffusionLearner
from tests.stops import check_stops


def teacher_run() -> RunConfig:
    base = preset("test-x4")
    unet = ConvUNetConfig(channels=(8, 8), blocks_before=(1, 1), blocks_after=(1,), steps=4)
    return replace(base, model=replace(base.model, unet=unet), train=replace(base.train, micro_batch=8))


def student(**changes: float) -> RunConfig:
    run = student_run(teacher_run(), "runs/chain", "0123", teacher_run().model)
    assert run.distill is not None
    return replace(run, distill=replace(run.distill, **changes))


def pictures(draw: torch.Generator) -> dict[str, Tensor]:
    return {
        name: torch.randint(0, 256, (8, side, side, 3), dtype=torch.uint8, generator=draw)
        for name, side in (("hq", 32), ("lq", 8))
    }


class Linear(nn.Module):
    """a x + b t + c mean(lq): a network whose every answer can be written down."""

    def __init__(self, a: float, b: float, c: float) -> None:
        super().__init__()
        self.abc = nn.Parameter(torch.tensor([a, b, c]))

    def forward(self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None = None) -> Tensor:
        a, b, c = self.abc
        return a * x + b * t[:, None, None, None] + c * lq[:, :3].mean(1, keepdim=True)


@pytest.mark.parametrize("target", [Target.X0, Target.RESIDUAL])
def test_the_loss_is_that_of_sinsr(target: Target) -> None:
    """Three terms in NumPy, from the definitions."""
    model = replace(teacher_run().model, target=target)
    run = student_run(replace(teacher_run(), model=model), "t", "0", model)
    assert run.distill is not None
    distill = replace(run.distill, inverse=0.3, truth=0.7)
    teacher, network = Linear(0.4, 0.1, 0.5), Linear(0.6, -0.05, 0.2)
    loss = Distillation(run.model, LossConfig(), distill, teacher, PixelUnshuffle(4))
    draw = torch.Generator().manual_seed(0)
    hq, lq = (torch.rand((2, 3, side, side), generator=draw) * 2 - 1 for side in (32, 8))
    noise = torch.randn((2, 48, 8, 8), generator=draw)
    found = loss(network, hq, lq, torch.zeros(2, dtype=torch.int64), noise)

    schedule = ShiftSchedule.from_config(model.schedule)
    eta, kappa = schedule.eta, schedule.kappa
    stage = PixelUnshuffle(4)
    x0, y0 = (stage.encode(p).double().numpy() for p in (hq, upsample(lq, 4)))
    mean = lq.mean(1, keepdim=True).double().numpy()

    def ask(abc: Tensor, x: np.ndarray, t: int, scaled_at: int) -> np.ndarray:
        a, b, c = abc.double().tolist()
        output = a * x / np.sqrt(1 + kappa**2 * eta[scaled_at]) + b * t + c * mean
        return output if target is Target.X0 else y0 - output

    x_end = y0 + kappa * np.sqrt(eta[-1]) * noise.double().numpy()
    z = x_end
    for i in (3, 2, 1, 0):
        z0 = ask(teacher.abc.detach(), z, i, i)
        before = eta[i - 1] if i else 0.0
        z = z0 + before * (y0 - z0) + np.sqrt(before / eta[i]) * (z - z0 - eta[i] * (y0 - z0))
    abc = network.abc.detach()
    terms = [
        np.mean((ask(abc, x_end, 3, 3) - z) ** 2),
        np.mean((ask(abc, z, 0, 3) - x_end) ** 2),
        np.mean((ask(abc, ask(abc, x0, 0, 3), 3, 3) - x0) ** 2),
    ]
    assert float(found.total.detach()) == pytest.approx(terms[0] + 0.3 * terms[1] + 0.7 * terms[2], rel=1e-5)


def test_no_gradient_reaches_the_teacher_or_the_start_of_the_truth() -> None:
    run = student(inverse=0.0)
    assert run.distill is not None
    teacher, network = Linear(0.4, 0.1, 0.5), Linear(0.6, 0.0, 0.2)
    loss = Distillation(run.model, LossConfig(), run.distill, teacher, PixelUnshuffle(4))
    hq, lq = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 8, 8)
    loss(network, hq, lq, torch.zeros(1, dtype=torch.int64), torch.randn(1, 48, 8, 8)).total.backward()
    assert teacher.abc.grad is None
    assert network.abc.grad is not None
    assert network.abc.grad[1] != 0  # of the term of the truth, asked at T; the time 0 has none


def test_a_stopped_run_continues_bit_for_bit(tmp_path: Path) -> None:
    run = with_settings(student(), ["optim.warmup_steps=2"])
    assert run.distill is not None
    torch.manual_seed(0)
    teacher = build_unet(run.model.unet).requires_grad_(False)
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.1)
    loss = Distillation(run.model, LossConfig(), run.distill, teacher, PixelUnshuffle(4))

    def learner() -> DiffusionLearner:
        network = build_unet(run.model.unet)
        network.load_state_dict(teacher.state_dict())
        return DiffusionLearner(run, network, loss)

    def batches(start: int) -> list[dict[str, Tensor]]:
        return [pictures(torch.Generator().manual_seed(i)) for i in range(start, 4)]

    whole = check_stops(run, learner, batches, (1, 3), tmp_path)
    begun = teacher.state_dict()
    assert all(not torch.equal(begun[key], value) for key, value in whole.state.network.state_dict().items())


@pytest.mark.slow
def test_a_student_comes_nearer_to_its_teacher_than_the_teacher_in_one_step() -> None:
    run = with_settings(student(inverse=0.1, truth=0.0), ["optim.lr=0.005", "optim.warmup_steps=1"])
    assert run.distill is not None
    torch.manual_seed(0)
    teacher, network = (build_unet(run.model.unet) for _ in range(2))
    for parameter in teacher.parameters():
        nn.init.normal_(parameter, std=0.06)
    network.load_state_dict(teacher.state_dict())
    objective = Distillation(
        run.model, LossConfig(), run.distill, teacher.requires_grad_(False), PixelUnshuffle(4)
    )
    learner = DiffusionLearner(run, network, objective)
    draw = torch.Generator().manual_seed(1)
    batch = pictures(draw)
    lq = batch["lq"].permute(0, 3, 1, 2) / 127.5 - 1
    y0 = PixelUnshuffle(4).encode(upsample(lq, 4))
    noise = torch.randn(y0.shape, generator=draw)

    @torch.no_grad()
    def end(unet: nn.Module, schedule: ShiftSchedule) -> Tensor:
        denoise = network_denoiser(unet, lq, y0, schedule, run.model.target, sees_y0=True)
        return sample(denoise, y0, schedule, lambda _: noise, Sampler.DDIM)

    chain = ShiftSchedule.from_config(teacher_config(run.model).schedule)
    one_step = ShiftSchedule.from_config(run.model.schedule)
    taught, before = end(teacher, chain), end(teacher, one_step)
    for _ in range(60):
        learner.step(batch)
    after = end(learner.state.network, one_step)
    assert (after - taught).square().mean() < 0.5 * (before - taught).square().mean()


def test_a_student_has_the_network_of_its_teacher_and_one_step_of_it() -> None:
    run = student()
    assert (run.model.schedule.steps, run.model.schedule.trained_steps) == (1, 4)
    assert run.model.unet == teacher_run().model.unet
    assert teacher_config(run.model) == teacher_run().model
    assert from_dict(RunConfig, to_dict(run)) == run
    assert "distill" not in to_dict(teacher_run())
    assert run.distill == DistillConfig(teacher="runs/chain", identity="0123")
    moved = with_settings(run, ["distill.teacher=s3://b/chain"])
    assert fingerprint(moved) == fingerprint(run) != fingerprint(with_settings(run, ["distill.identity=x"]))


def test_teachers_that_cannot_be_are_refused_in_one_line() -> None:
    run = teacher_run()
    with pytest.raises(ConfigError, match="a teacher must be a chain of at least two steps, got tiny-x4"):
        student_run(run, "tiny-x4", "", preset("tiny-x4").model)
    other = replace(run.model, schedule=replace(run.model.schedule, kappa=1.5))
    with pytest.raises(ConfigError, match=r"t is no model of preset test-x4: model.schedule.kappa: "):
        student_run(run, "t", "", other)
    with pytest.raises(ConfigError, match=r"distill.inverse and distill.truth must not be negative, got -1"):
        with_settings(student(), ["distill.inverse=-1"])
    with pytest.raises(ConfigError, match=r"distill needs a student of model\.schedule\.steps=1"):
        with_settings(student(), ["model.schedule.steps=4"])
