"""Residual shifting distillation: the losses and their gradients written out, what the fake network makes of
them, and runs that stop anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from resshift.config import ConfigError, LossConfig, RunConfig, fingerprint, from_dict, to_dict, with_settings
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.networks.config import ConvUNetConfig, RegressionConfig
from resshift.networks.conv_unet import ConvUNet, build_unet
from resshift.presets import preset
from resshift.resize.bicubic import upsample
from resshift.schedule import ShiftSchedule, Target
from resshift.training.distillation import student_run
from resshift.training.losses import Objective
from resshift.training.rsd import FakeNetwork, RsdLearner, asked_times, disagreement
from resshift.training.slots import Slots
from resshift.training.step import unwrapped
from tests.stops import check_stops, tensors

UNET = ConvUNetConfig(channels=(8, 8), blocks_before=(1, 1), blocks_after=(1,), steps=4)


def run_of(*settings: str, unet: ConvUNetConfig = UNET, target: Target = Target.X0) -> RunConfig:
    base = preset("test-x4")
    model = replace(base.model, unet=unet, target=target)
    train = replace(base.train, batch_size=4, micro_batch=4)
    run = student_run(replace(base, model=model, train=train), "runs/chain", "0123", model)
    return with_settings(run, ["distill.form=rsd", "distill.fake_steps=2", "optim.warmup_steps=0", *settings])


def teacher_of(run: RunConfig, seed: int = 0) -> ConvUNet:
    torch.manual_seed(seed)
    unet = build_unet(run.model.unet)
    assert isinstance(unet, ConvUNet)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.1)
    return unet.eval().requires_grad_(False)


def learner(run: RunConfig, slots: Slots | None = None) -> RsdLearner:
    teacher = teacher_of(run)
    student = build_unet(run.model.unet)
    student.load_state_dict(teacher.state_dict())
    return RsdLearner(run, student, Objective(run.model, run.loss, PixelUnshuffle(4)), teacher, slots)


def batch(i: int = 0) -> dict[str, Tensor]:
    hq = torch.randint(0, 256, (4, 32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
    return {"hq": hq, "lq": hq[:, ::4, ::4].contiguous()}


class Linear(nn.Module):
    """a x + b t + c mean(lq): a network whose every answer can be written down."""

    def __init__(self, *abc: float) -> None:
        super().__init__()
        self.abc = nn.Parameter(torch.tensor(abc))

    def forward(self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None = None) -> Tensor:
        a, b, c = self.abc
        return a * x + b * t[:, None, None, None] + c * lq[:, :3].mean(1, keepdim=True)


class LinearFake(Linear):
    """The same in the place of the fake network; without a head."""

    def forward(  # type: ignore[override]
        self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None, num_judged: int
    ) -> tuple[Tensor, Tensor]:
        return super().forward(x, t, lq, mask), x.new_empty(0)


@pytest.mark.parametrize("target", [Target.X0, Target.RESIDUAL])
def test_losses_and_gradients_are_those_of_the_formulas(target: Target) -> None:
    """Both losses in NumPy, from the definitions; gradients by differences."""
    run = run_of("distill.adversary=0", target=target)
    networks = {"model": Linear(0.6, -0.05, 0.2), "fake": LinearFake(0.5, 0.02, 0.3)}
    ours = learner(run)
    teacher = Linear(0.4, 0.1, 0.5).requires_grad_(False)
    ours.teacher = teacher  # type: ignore[assignment]
    ours.state.networks.update(networks)
    pictures = batch()
    samples = ours.samples(pictures)
    schedule = ours.chain
    eta, kappa = schedule.eta, schedule.kappa
    hq, lq = (pictures[name].permute(0, 3, 1, 2).double() / 127.5 - 1 for name in ("hq", "lq"))
    stage = PixelUnshuffle(4)
    x0, y0 = stage.encode(hq).numpy(), stage.encode(upsample(lq.float(), 4)).double().numpy()
    mean = lq.mean(1, keepdim=True).numpy()

    def ask(abc: NDArray[np.float64], x: NDArray[np.float64], t: NDArray[np.int64]) -> NDArray[np.float64]:
        a, b, c = abc
        scale, time = (v[:, None, None, None] for v in (np.sqrt(1 + kappa**2 * eta[t]), t))
        output = a * x / scale + b * time + c * mean
        return output if target is Target.X0 else y0 - output

    def shifted(x: NDArray[np.float64], t: NDArray[np.int64], noise: Tensor) -> NDArray[np.float64]:
        at = eta[t][:, None, None, None]
        return x + at * (y0 - x) + kappa * np.sqrt(at) * noise.double().numpy()

    def of_student(i_round: int, abc: NDArray[np.float64]) -> tuple[Any, Any, Any]:
        draw = ours.draw(i_round, samples)
        asked, t = draw.asked.numpy(), draw.t.numpy()
        begin = y0 + kappa * np.sqrt(eta[-1]) * draw.asked_noise.double().numpy()
        x = np.where((asked == 3)[:, None, None, None], begin, shifted(x0, asked, draw.asked_noise))
        made = ask(abc, x, asked)
        return made, shifted(made, t, draw.noise), t

    def student_loss(abc: NDArray[np.float64]) -> float:
        made, x_t, t = of_student(2, abc)
        taught, fake = (ask(net.abc.detach().double().numpy(), x_t, t) for net in (teacher, networks["fake"]))
        return float((((taught - made) ** 2 - (fake - made) ** 2).mean((1, 2, 3)) / size).mean())

    def fake_loss(abc: NDArray[np.float64]) -> float:
        made, x_t, t = of_student(1, networks["model"].abc.detach().double().numpy())
        return float(np.mean((ask(abc, x_t, t) - made) ** 2))

    # The divisor of a sample has no gradient: it stays as it is while differences are taken.
    made, x_t, t = of_student(2, networks["model"].abc.detach().double().numpy())
    size = np.abs(ask(teacher.abc.double().numpy(), x_t, t) - made).mean((1, 2, 3))
    told = ours.backward_fake(samples, 1) | ours.backward_student(samples, pictures["hq"])
    at = {name: net.abc.detach().double().numpy() for name, net in networks.items()}
    assert float(told["fake"]) == pytest.approx(fake_loss(at["fake"]), rel=1e-5)
    assert float(told["mse"]) == pytest.approx(student_loss(at["model"]), rel=1e-4)
    assert float(told["loss"]) == pytest.approx(float(told["mse"]))
    for name, loss in (("model", student_loss), ("fake", fake_loss)):
        steps = 1e-6 * np.eye(3)
        wanted = [(loss(at[name] + one) - loss(at[name] - one)) / 2e-6 for one in steps]
        found = networks[name].abc.grad
        assert found is not None
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-5)


def test_its_expectation_is_the_distance_of_the_chains_when_the_fake_network_is_right() -> None:
    """x0 ~ N(0, s^2) and y0 = 0: the mean of x0 given x_t is c x_t. With f* = a x_t the loss of the student
    is (a - c)^2 Var(x_t), although it is a difference of two distances to x0.
    """
    chain = ShiftSchedule.released(4, 2.0)
    draw = torch.Generator().manual_seed(0)
    s, a, number = 0.7, 0.4, 100_000
    for eta in chain.eta:
        x0 = s * torch.randn((number, 1, 1, 1), generator=draw, dtype=torch.float64)
        noise = torch.randn(x0.shape, generator=draw, dtype=torch.float64)
        x_t = (1 - eta) * x0 + 2.0 * np.sqrt(eta) * noise
        variance = (1 - eta) ** 2 * s**2 + 4 * eta
        c = (1 - eta) * s**2 / variance
        found = disagreement(x0, a * x_t, c * x_t)
        deviation = float(found.std()) / number**0.5
        assert abs(float(found.mean()) - (a - c) ** 2 * variance) < 4 * deviation


def test_a_fake_network_that_is_the_teacher_asks_for_no_change() -> None:
    run = run_of("distill.adversary=0")
    ours = learner(run)
    samples = ours.samples(batch())
    told = ours.backward_student(samples, batch()["hq"])
    gradients = [p.grad for p in ours.state.network.parameters() if p.grad is not None]
    assert len(gradients) > 10
    assert float(told["mse"]) == 0
    assert all(not one.any() for one in gradients)
    other = learner(run)
    for parameter in unwrapped(other.state.networks["fake"]).parameters():
        parameter.data.mul_(1.1)
    other.backward_student(other.samples(batch()), batch()["hq"])
    assert any(p.grad is not None and p.grad.any() for p in other.state.network.parameters())
    # The step of the student leaves no gradient in the fake network, which can be trained again.
    assert all(p.grad is None and p.requires_grad for p in other.state.networks["fake"].parameters())


def test_the_head_judges_clean_latents_by_the_deepest_features() -> None:
    run = run_of("distill.adversary=0.5")
    ours = learner(run)
    fake = ours.state.networks["fake"]
    assert isinstance(fake, FakeNetwork)
    sample = ours.samples(batch())[0]
    t = torch.tensor([3, 2, 1, 0])
    x0 = sample.x0
    found, logits = ours.fake(fake, x0, t, sample, (x0, sample.y0))
    alone, of_x0 = ours.fake(fake, x0, t, sample, (x0,))
    torch.testing.assert_close(found, alone)
    assert logits.shape == (8, 1, 4, 4)  # the deepest level has half the sides of the latent
    torch.testing.assert_close(logits[:4], of_x0)
    told = ours.backward_student([sample], batch()["hq"])
    softplus = torch.nn.functional.softplus
    draw = ours.draw(2, [sample])
    made = ours.student(ours.state.network, sample, draw)
    _, judged = ours.fake(fake, x0, t, sample, (made,))
    torch.testing.assert_close(told["fooled"], softplus(-judged).mean().detach())
    torch.testing.assert_close(told["loss"], told["mse"] + 0.5 * told["fooled"])
    seen = ours.backward_fake([sample], 2)["seen"]
    _, of_truth = ours.fake(fake, x0, t, sample, (sample.x0,))
    torch.testing.assert_close(seen, (softplus(judged).mean() + softplus(-of_truth).mean()).detach())


def test_students_are_asked_at_times_through_the_chain_and_always_at_its_end() -> None:
    chain = ShiftSchedule.released(15, 2.0)
    assert asked_times(chain, 4).tolist() == [3, 7, 11, 14]
    assert asked_times(chain, 1).tolist() == [14]
    assert asked_times(chain, 15).tolist() == list(range(15))


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(tmp_path: Path) -> None:
    regression = RegressionConfig(channels=8, half_channels=8, blocks_before=1, half_blocks=1, blocks_after=1)
    run = run_of("distill.adversary=0.1", unet=replace(UNET, regression=regression))
    whole = check_stops(
        run, lambda: learner(run), lambda at: [batch(i) for i in range(at, 3)], (1,), tmp_path
    )
    theirs, begun = tensors(whole.state), tensors(learner(run).state)
    kept = {key for key in theirs if key in begun and torch.equal(begun[key], theirs[key])}
    assert kept == {key for key in begun if ".regression." in key}  # g is frozen, all else has moved
    assert whole.render(batch(), list("abcd")).shape == (4, 3, 32, 32)


def test_micro_batches_change_rounding_only() -> None:
    whole, parts = learner(run_of()), learner(run_of("train.micro_batch=1"))
    terms, of_parts = whole.step(batch()).terms, parts.step(batch()).terms
    for name, term in terms.items():
        torch.testing.assert_close(term, of_parts[name], rtol=1e-4, atol=1e-6)
    assert float(terms["fake"]) > 0
    assert float(terms["seen"]) > 0


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    """A process group of one, so that networks are wrapped as on several workers."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(ours: RsdLearner) -> dict[str, Tensor]:
    own = {name: pictures[ours.slots.start : ours.slots.stop] for name, pictures in batch().items()}
    samples = ours.samples(own)
    ours.backward_fake(samples, 0)
    ours.backward_student(samples, own["hq"])
    return {
        f"{name}.{key}": p.grad
        for name, network in ours.state.networks.items()
        for key, p in unwrapped(network).named_parameters()
        if p.grad is not None
    }


@pytest.mark.usefixtures("group")
def test_gradients_of_two_workers_average_to_those_of_one() -> None:
    run = run_of("distill.adversary=0.1", "train.micro_batch=1")
    whole = gradients(learner(run))
    workers = [learner(run, Slots.of_rank(4, rank, 2)) for rank in range(2)]
    assert all(isinstance(n, DistributedDataParallel) for n in workers[0].state.networks.values())
    first, second = map(gradients, workers)
    assert any(key.startswith("fake.head") for key in whole)
    assert whole.keys() == first.keys() == second.keys()
    for key, gradient in whole.items():
        torch.testing.assert_close((first[key] + second[key]) / 2, gradient, rtol=1e-3, atol=1e-6)


def test_configurations_of_the_form() -> None:
    run = run_of()
    assert from_dict(RunConfig, to_dict(run)) == run
    sinsr = with_settings(run, ["distill.form=sinsr", "distill.fake_steps=5"])
    assert "form" not in to_dict(sinsr)["distill"]
    assert fingerprint(sinsr) != fingerprint(run)
    for setting, message in (
        ("distill.times=5", "distill.times must lie in 1 to 4 for this teacher, got 5"),
        ("distill.fake_steps=0", "distill.fake_steps must be at least 1"),
        ("distill.adversary=-1", "distill.adversary not negative, got 2 and -1"),
        ("distill.form=dmd", "distill.form: .*'sinsr' or 'rsd', got 'dmd'"),
        ("train.precision=fp16", r"distill.form=rsd needs train.parallel=ddp and .*, got ddp and fp16"),
    ):
        with pytest.raises(ConfigError, match=message):
            with_settings(run, [setting])
    assert LossConfig().mse == 1
