"""One step from a chain by residual shifting distillation (RSD; Selikhanovych et al., "One-Step Residual
Shifting Diffusion for Image Super-Resolution via Distillation", arXiv 2503.13358).

The student G makes pictures such that a chain which is trained on them is the teacher. That chain is the fake
network f; the teacher is f*. With x0 = G(x_n, y0, n) and x_t ~ q(x_t | x0, y0), t uniform,

    f     minimises  |f(x_t, y0, t) - x0|^2,                           the loss of a chain on the student's x0
    G     minimises  |f*(x_t, y0, t) - x0|^2 - |f(x_t, y0, t) - x0|^2,

with gradients through x_t and x0. The first makes f the mean of x0 given x_t, and then the expectation of the
second is |f* - f|^2 at x_t, which is zero if and only if the two chains agree. Each sample of it is divided
by the mean of |f* - x0| (Zhou et al., "Score identity Distillation", ICML 2024). The student also has LPIPS
and an adversary, a head on the deepest features of f that tells x0 from the truth, without noise at the first
time (Yin et al., "Improved Distribution Matching Distillation", NeurIPS 2024):

    head  minimises  softplus(-D(truth)) + softplus(D(x0)),     G  minimises  softplus(-D(x0)).

G is asked at N times n of the chain, from q(x_n | x0_true, y0), and at the last one from where inference
begins, x_T = y0 + kappa sqrt(eta_T) noise. After training it is asked there alone. All three networks have
the shape of the teacher and begin with its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from resshift import seeds
from resshift.config import DistillConfig, RunConfig
from resshift.devices import PRECISIONS, autocast, on_device
from resshift.diffusion import predict_x0, prior_sample, q_sample, scale_input
from resshift.networks.conv_unet import ConvUNet
from resshift.networks.unet import UNetSwin
from resshift.schedule import ShiftSchedule
from resshift.training.distillation import teacher_config
from resshift.training.losses import Objective
from resshift.training.optimizer import Outcome, guarded_step, run_learning_rate, set_learning_rate
from resshift.training.slots import Slots
from resshift.training.step import (
    StepResult,
    build_state,
    lpips_corner,
    mask_to_unit_range,
    render_chain,
    seeded,
    shares,
    to_unit_range,
    unwrapped,
)

TERMS = ("loss", "mse", "lpips", "lattice", "fake", "fooled", "seen")
_HEAD_CHANNELS = 64
_LEAST = 1e-5  # mean distance of x0 and f* that a sample is divided by


def disagreement(x0: Tensor, of_teacher: Tensor, of_fake: Tensor) -> Tensor:
    """Return |f* - x0|^2 - |f - x0|^2 of each sample, (B,): means over (Z, h, w).

    Args:
        x0: The student's x0, (B, Z, h, w).
        of_teacher, of_fake: x0 as f* and f predict it from x_t, of the same shape.
    """
    return ((of_teacher - x0).square() - (of_fake - x0).square()).flatten(1).mean(1)


def asked_times(chain: ShiftSchedule, number: int) -> NDArray[np.int64]:
    """Return the times of the chain at which a student is asked, (number,): those that a chain of so many
    steps has. The last is T - 1.
    """
    kept = chain.shortened(number).trained_steps
    return np.arange(chain.steps) if kept is None else kept


class FakeNetwork(nn.Module):
    """The fake network, and its head if there is an adversary.

    Args:
        unet: U-Net with the weights of the teacher.
        head: From the features of the deepest level, (B, C, h', w'), to the logit of "true" at each position.
    """

    def __init__(self, unet: UNetSwin | ConvUNet, head: nn.Module | None) -> None:
        super().__init__()
        self.unet = unet
        self.head = head
        self._deepest = torch.empty(0)
        level = unet.middle_block if isinstance(unet, UNetSwin) else unet.before[-1]
        level.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._deepest = output

    def forward(
        self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None, num_judged: int
    ) -> tuple[Tensor, Tensor]:
        """Return the output of the U-Net, and the logits of the last `num_judged` samples, (num_judged, 1,
        h', w'); empty without a head. Other arguments are those of the U-Net.
        """
        output = self.unet(x, t, lq, mask)
        deepest, self._deepest = self._deepest, torch.empty(0)
        if self.head is None or not num_judged:
            return output, output.new_empty(0)
        return output, self.head(deepest[-num_judged:]).float()


def trainable(fake: nn.Module) -> nn.Module:
    """Ask for all gradients but those of the regression network, and return the module."""
    for name, parameter in fake.named_parameters():
        parameter.requires_grad_(not name.startswith("unet.regression."))
    return fake


def deepest_channels(unet: UNetSwin | ConvUNet) -> int:
    """Return the number of channels of a U-Net's deepest level."""
    if isinstance(unet, ConvUNet):
        return unet.config.channels[-1]
    return unet.config.model_channels * unet.config.channel_mult[-1]


def _head(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, _HEAD_CHANNELS, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(_HEAD_CHANNELS, 1, 1)
    )


def _zeros(device: torch.device, *names: str) -> dict[str, Tensor]:
    return {name: torch.zeros((), device=device) for name in names}


class Sample(NamedTuple):
    """A micro-batch: what networks see of it, and the latents of the truth and of what the chain starts
    from.
    """

    part: slice
    lq: Tensor
    mask: Tensor | None
    x0: Tensor
    y0: Tensor


class Draw(NamedTuple):
    """Random numbers of a worker's slots: the time at which the student is asked, its noise, and those of
    x_t.
    """

    asked: Tensor
    asked_noise: Tensor
    t: Tensor
    noise: Tensor


class RsdLearner:
    """The student of a run, and the fake network.

    Args:
        config: Configuration of the run, with `distill`.
        network: U-Net of the student on its device, not wrapped.
        objective: First stage, LPIPS and weights of the terms.
        teacher: Frozen U-Net of the teacher, on the same device.
        slots: Slots of this worker; None if there is one worker.
    """

    def __init__(
        self,
        config: RunConfig,
        network: nn.Module,
        objective: Objective,
        teacher: UNetSwin | ConvUNet,
        slots: Slots | None = None,
    ) -> None:
        self.config = config
        self.distill = cast(DistillConfig, config.distill)
        self.objective = objective
        self.teacher = teacher
        self.chain = ShiftSchedule.from_config(teacher_config(config.model).schedule)
        self.slots = slots or Slots.of_rank(config.train.batch_size)
        device = next(network.parameters()).device
        self.times = torch.from_numpy(asked_times(self.chain, self.distill.times)).to(device)
        unet = copy.deepcopy(teacher)
        unet.checkpoint_activations = config.train.activation_checkpointing
        head = None
        if self.distill.adversary:
            head = seeded(_head, deepest_channels(teacher), config.train, "head")
        fake = on_device(trainable(FakeNetwork(unet, head)), device, config.train.channels_last)
        self.state = build_state(
            config.train,
            {"model": (network, config.optim), "fake": (fake, config.optim)},
            TERMS,
            self.slots.num_ranks,
        )

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of both networks in a step."""
        return run_learning_rate(step, self.config.optim, self.config.train)

    def step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """Run `distill.fake_steps` optimiser steps of the fake network and one of the student, all on the
        pictures of one batch; times and noise are others in each.

        Args:
            batch: As in `DiffusionLearner.step`.
        """
        state, clip = self.state, self.config.optim.clip_norm
        for name, network in state.networks.items():
            set_learning_rate(state.optimizers[name], self.learning_rate(state.step))
            network.train()
        samples = self.samples(batch)
        outcomes: list[Outcome] = []
        sums = _zeros(batch["hq"].device, *TERMS)
        rounds = self.distill.fake_steps
        for i in range(rounds):
            for name, term in self.backward_fake(samples, i).items():
                sums[name] = sums[name] + term / rounds
            outcomes.append(guarded_step(state.optimizers["fake"], clip, state.scaler))
        for name, term in self.backward_student(samples, batch["hq"]).items():
            sums[name] = sums[name] + term
        outcomes.append(guarded_step(state.optimizers["model"], clip, state.scaler))
        # Also after a skipped step, so that nothing needs to be read from the device.
        state.ema.update(unwrapped(state.network))
        state.step += 1
        finite = torch.stack([outcome.finite for outcome in outcomes]).all()
        return StepResult(sums, Outcome(outcomes[-1].grad_norm, finite))

    @torch.no_grad()
    def samples(self, batch: Mapping[str, Tensor]) -> list[Sample]:
        """Return the micro-batches of a batch, whose latents all passes of a step share."""
        config, objective = self.config, self.objective
        found: list[Sample] = []
        for part in self.slots.micro_batches(config.train.micro_batch):
            hq, lq = to_unit_range(batch["hq"][part]), to_unit_range(batch["lq"][part])
            mask = mask_to_unit_range(batch["mask"][part]) if config.model.unet.cond_mask else None
            with autocast(hq.device, PRECISIONS[config.train.precision]):
                x0, y0 = objective.latents(hq, objective.start(self.state.network, lq))
            found.append(Sample(part, objective.condition(lq, y0), mask, x0, y0))
        return found

    def draw(self, i_round: int, samples: Sequence[Sample]) -> Draw:
        """Draw for the whole batch, and return the slots of this worker (see `step.draw_noise`)."""
        like, slots = samples[0].x0, self.slots
        generator = seeds.torch_generator(
            self.config.train.seed, "rsd", self.state.step, i_round, device=like.device
        )
        many, own = slots.batch_size, slice(slots.start, slots.stop)
        places = torch.randint(len(self.times), (many,), generator=generator, device=like.device)
        t = torch.randint(self.chain.steps, (many,), generator=generator, device=like.device)
        first, second = (
            torch.randn((many, *like.shape[1:]), generator=generator, device=like.device) for _ in range(2)
        )
        return Draw(self.times[places[own]], first[own], t[own], second[own])

    def _predict(self, network: nn.Module, x: Tensor, t: Tensor, sample: Sample) -> Tensor:
        """Return the x0 that a network predicts from x at the time t of the chain."""
        model = self.config.model
        output = network(scale_input(x, t, self.chain, model.latent_scaling), t, sample.lq, sample.mask)
        return predict_x0(output.float(), x, sample.y0, t, self.chain, model.target)

    def student(self, network: nn.Module, sample: Sample, draw: Draw) -> Tensor:
        """Return the student's x0."""
        t, noise = draw.asked[sample.part], draw.asked_noise[sample.part]
        at_end = (t == self.chain.steps - 1)[:, None, None, None]
        x = q_sample(sample.x0, sample.y0, t, noise, self.chain)
        x = torch.where(at_end, prior_sample(sample.y0, noise, self.chain), x)
        return self._predict(network, x, t, sample)

    def fake(
        self, network: nn.Module, x_t: Tensor, t: Tensor, sample: Sample, judged: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the x0 that the fake network predicts from x_t, and the logits of some clean latents."""
        model, number = self.config.model, 1 + len(judged)
        xs = torch.cat([x_t, *judged])
        times = torch.cat([t, torch.zeros_like(t).repeat(len(judged))])
        lq, mask = (None if one is None else one.repeat(number, 1, 1, 1) for one in (sample.lq, sample.mask))
        output, logits = network(
            scale_input(xs, times, self.chain, model.latent_scaling), times, lq, mask, len(xs) - len(t)
        )
        output = output[: len(t)].float()
        return predict_x0(output, x_t, sample.y0, t, self.chain, model.target), logits

    def _begin(self, i_round: int, sample: Sample) -> None:
        # Dropout draws from torch's global generator.
        step, first = self.state.step, self.slots.start + sample.part.start
        torch.manual_seed(seeds.derive(self.config.train.seed, "dropout", step, i_round, first) % 2**63)

    def backward_fake(self, samples: Sequence[Sample], i_round: int) -> dict[str, Tensor]:
        """Add the gradients of the fake network and its head, and return this worker's contribution to their
        terms.
        """
        train, network = self.config.train, self.state.networks["fake"]
        student = unwrapped(self.state.network)
        draw = self.draw(i_round, samples)
        sums = _zeros(draw.t.device, "fake", "seen")
        for sample, (_, factor) in zip(samples, shares(network, self.slots, train.micro_batch), strict=True):
            self._begin(i_round, sample)
            t, noise = draw.t[sample.part], draw.noise[sample.part]
            with autocast(t.device, PRECISIONS[train.precision]):
                with torch.no_grad():
                    x0 = self.student(student, sample, draw)
                x_t = q_sample(x0, sample.y0, t, noise, self.chain)
                judged = (x0, sample.x0) if self.distill.adversary else ()
                found, logits = self.fake(network, x_t, t, sample, judged)
                terms = {"fake": (found - x0).square().mean()}
                if judged:
                    of_student, of_truth = logits.chunk(2)
                    terms["seen"] = F.softplus(of_student).mean() + F.softplus(-of_truth).mean()
            (torch.stack(list(terms.values())).sum() * factor).backward()
            for name, term in terms.items():
                sums[name] = sums[name] + term.detach() * (factor / self.slots.num_ranks)
        return sums

    def backward_student(self, samples: Sequence[Sample], hq_u8: Tensor) -> dict[str, Tensor]:
        """Add the gradients of the student, and return this worker's contribution to its terms."""
        config, train, state = self.config, self.config.train, self.state
        fake = unwrapped(state.networks["fake"]).requires_grad_(False)
        draw = self.draw(self.distill.fake_steps, samples)
        corner = lpips_corner(config, state.step)
        sums = _zeros(hq_u8.device, "loss", "mse", "lpips", "lattice", "fooled")
        for sample, (part, factor) in zip(
            samples, shares(state.network, self.slots, train.micro_batch), strict=True
        ):
            self._begin(self.distill.fake_steps, sample)
            t, noise = draw.t[part], draw.noise[part]
            with autocast(t.device, PRECISIONS[train.precision]):
                x0 = self.student(state.network, sample, draw)
                x_t = q_sample(x0, sample.y0, t, noise, self.chain)
                of_teacher = self._predict(self.teacher, x_t, t, sample)
                of_fake, logits = self.fake(fake, x_t, t, sample, (x0,) if self.distill.adversary else ())
                size = (of_teacher - x0).detach().abs().flatten(1).mean(1).clamp(min=_LEAST)
                mse = (disagreement(x0, of_teacher, of_fake) / size).mean()
                terms = self.objective.with_picture(mse, x0, to_unit_range(hq_u8[part]), corner)
                fooled = F.softplus(-logits).mean() if self.distill.adversary else torch.zeros_like(mse)
                total = terms.total + self.distill.adversary * fooled
            (total * factor).backward()
            told = terms._asdict() | {"loss": total, "fooled": fooled}
            for name in sums:
                sums[name] = sums[name] + told[name].detach() * (factor / self.slots.num_ranks)
        trainable(fake)
        return sums

    def render(self, batch: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
        """Return what the averaged weights make of "lq", see `render_chain`."""
        return render_chain(self.config, self.objective, self.state.ema.module, batch, keys)
