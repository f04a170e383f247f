"""Training in stages: the regression network first, then the U-Net that starts from its estimate, with the
losses of `resshift.training.picture_loss` and an adversary.

When a stage is the first to train the chain, the regression network takes its averaged weights and keeps
them. Everything that changes during a run is a function of the step or a part of its state, so a run can stop
anywhere and continue with any number of workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from resshift import seeds
from resshift.config import RunConfig
from resshift.devices import PRECISIONS, autocast, on_device
from resshift.stages import Span, span_at
from resshift.training.adversary import Adversary, adversary_optimizer
from resshift.training.average import MovingAverage
from resshift.training.efficientnet import EfficientNetLite0
from resshift.training.losses import Objective
from resshift.training.optimizer import guarded_step, muon_and_adamw, set_learning_rate
from resshift.training.picture_loss import Judged, PictureLoss
from resshift.training.running_means import RunningMeans
from resshift.training.sharding import synchronise_gradients
from resshift.training.slots import Slots
from resshift.training.step import (
    Pictures,
    StepResult,
    TrainState,
    distributed,
    draw_noise,
    latent_shape,
    lpips_corner,
    render_chain,
    seeded,
    shares,
    unwrapped,
)

TERMS: tuple[str, ...] = (
    "loss",
    "charbonnier",
    "fourier",
    "lpips",
    "features",
    "lattice",
    "artifacts",
    "fooled",
    "seen",
)
DECAYING_AVERAGE = 0.99  # older weights come from a higher learning rate


class StagedLearner:
    """The U-Net of a run with stages, and its adversary if a stage has one.

    Args:
        config: Configuration of the run.
        network: U-Net on its device, not wrapped.
        objective: The chain: from pictures to the prediction of x0.
        trunk: EfficientNet-Lite0 on the same device; required if a stage has features or an adversary.
        slots: Slots of this worker; None if there is one worker.
    """

    def __init__(
        self,
        config: RunConfig,
        network: nn.Module,
        objective: Objective,
        trunk: EfficientNetLite0 | None = None,
        slots: Slots | None = None,
    ) -> None:
        self.config = config
        self.objective = objective
        self.pictures = Pictures(config)
        self.judge = PictureLoss(
            objective.lpips, trunk, (config.model.first_stage.factor, config.model.coarsest_px)
        )
        self.slots = slots or Slots.of_rank(config.train.batch_size)
        device = next(network.parameters()).device
        networks, optimizers = {"model": network}, muon_and_adamw(network, config.optim)
        self._of_model = tuple(optimizers)
        if any(loss.adversary for loss in config.losses):
            adversary = seeded(lambda _: Adversary(), None, config.train, "adversary")
            on_device(adversary, device, config.train.channels_last)
            optimizers["adversary"] = adversary_optimizer(adversary)
            networks["adversary"] = distributed(adversary, config.train, device, self.slots.num_ranks)
        self.state = TrainState(
            networks,
            MovingAverage(network, config.train.ema_decay),
            optimizers,
            GradScaler(device.type, enabled=False),
            RunningMeans(TERMS, device),
        )
        # What is trained, with its DDP wrapper: another one with each part, for it must reach all parameters.
        self._trained: nn.Module = network
        self._part = ""

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of AdamW in a step."""
        optim, (_, stage, end, part_start) = self.config.optim, self._span(step)
        lr = optim.lr if stage.lr is None else stage.lr
        warm = min(1.0, (step - part_start + 1) / max(1, optim.warmup_steps))
        left = min(1.0, (end - step) / max(1, stage.decay_steps))
        return lr * optim.lr_factor(self.config.train.batch_size) * warm * left

    def _span(self, step: int) -> Span:
        return span_at(self.config.stages, step, self.config.train.steps)

    def _average_decay(self, step: int) -> float:
        _, stage, end, part_start = self._span(step)
        decay = DECAYING_AVERAGE if end - step <= stage.decay_steps else self.config.train.ema_decay
        # The first weights of a part are far from those that it ends with.
        return min(decay, (1 + step - part_start) / (10 + step - part_start))

    def step(self, batch: Mapping[str, Tensor]) -> StepResult:
        """Run one optimiser step of the network that the stage trains, and of the adversary.

        Args:
            batch: As in `DiffusionLearner.step`.
        """
        state, config = self.state, self.config
        for name in self._of_model:
            set_learning_rate(state.optimizers[name], self.learning_rate(state.step))
        terms = self.backward(batch)
        own = [state.optimizers[name] for name in self._of_model]
        outcome = guarded_step(own, config.optim.clip_norm, state.scaler)
        if config.losses[self._span(state.step).i_stage].adversary:
            of_heads = guarded_step(state.optimizers["adversary"], None, state.scaler)
            outcome = outcome._replace(finite=outcome.finite & of_heads.finite)
        # Also after a skipped step, so that nothing needs to be read from the device.
        state.ema.update(state.network, self._average_decay(state.step))
        state.step += 1
        return StepResult(terms, outcome)

    def _enter(self, span: Span) -> None:
        """Freeze and wrap for a stage, and hand the regression network over at the start of the chain."""
        network, part = self.state.network, span.stage.trains
        regression = getattr(network, "regression", None)
        if part == "chain" and regression is not None and self.state.step == span.part_start:
            averaged = self.state.ema.module.get_submodule("regression")
            regression.load_state_dict(averaged.state_dict())
        if part == self._part:
            return
        self._part = part
        network.requires_grad_(part == "chain")
        if regression is not None:
            regression.requires_grad_(part == "regression")
        trained = network if part == "chain" else cast(nn.Module, regression)
        device = next(network.parameters()).device
        self._trained = distributed(trained, self.config.train, device, self.slots.num_ranks)

    def backward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Add the gradients of a batch to the network and the adversary, which is the first half of `step`,
        and return this worker's contribution to the terms.

        In a stage with an adversary the activations of the U-Net are kept for all samples of the worker: the
        factor of the adversary's gradient follows from the whole batch.
        """
        state, train, slots = self.state, self.config.train, self.slots
        span = self._span(state.step)
        self._enter(span)
        self._trained.train()
        loss = self.config.losses[span.i_stage]
        adversary = cast(Adversary, unwrapped(state.networks["adversary"])) if loss.adversary else None
        if adversary is not None:
            adversary.renew()
        device = batch["hq"].device
        held: list[tuple[Tensor, Tensor, Tensor]] = []
        squares = torch.zeros(2, device=device)
        sums = dict.fromkeys(TERMS, torch.zeros((), device=device))
        for part, factor in shares(self._trained, slots, train.micro_batch):
            share = factor / slots.num_ranks
            with autocast(device, PRECISIONS[train.precision]):
                estimate, judged = self._judged(batch, part, span, adversary)
            for name, term in judged.terms.items():
                sums[name] = sums[name] + term * share
            gradient = judged.gradient * factor
            if judged.pull is None or judged.seen is None:
                estimate.backward(gradient.to(estimate.dtype))
                continue
            (judged.seen * factor).backward()
            pull = judged.pull * factor
            held.append((estimate, gradient, pull))
            squares += torch.stack([gradient.square().sum(), pull.square().sum()]) / slots.num_ranks**2
        if adversary is not None:
            if slots.num_ranks > 1:
                dist.all_reduce(squares)
            ratio = loss.adversary * adversary.balance(squares)
            torch.autograd.backward(
                [estimate for estimate, _, _ in held],
                [(gradient + ratio * pull).to(estimate.dtype) for estimate, gradient, pull in held],
            )
        return sums

    def _judged(
        self, batch: Mapping[str, Tensor], part: slice, span: Span, adversary: Adversary | None
    ) -> tuple[Tensor, Judged]:
        """Return the estimate of a micro-batch, with a gradient, and what is said about it."""
        config, step, slots = self.config, self.state.step, self.slots
        # Dropout draws from torch's global generator.
        torch.manual_seed(seeds.derive(config.train.seed, "dropout", step, slots.start + part.start) % 2**63)
        hq, lq, mask = self.pictures(batch, part)
        if span.stage.trains == "regression":
            estimate = start = self._trained(lq)
        else:
            shape = latent_shape(config.model, batch["hq"])
            t, noise = (drawn[part] for drawn in draw_noise(config, step, slots, shape, hq.device))
            prediction = self.objective.predict(self._trained, hq, lq, t, noise, mask)
            estimate, start = self.objective.picture(prediction.x0_pred), prediction.start
        if mask is not None:  # known pixels are those of the picture, as in results
            estimate = torch.where(mask > 0, estimate, hq)
        heads = None
        if adversary is not None:
            heads = self.state.networks["adversary"]
            synchronise_gradients(heads, part.stop == slots.stop - slots.start)
        loss, corner = config.losses[span.i_stage], lpips_corner(config, step)
        return estimate, self.judge(estimate, hq, start.detach(), loss, corner, adversary, heads)

    def render(self, batch: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
        """Return what the averaged weights make of "lq", see `render_chain`."""
        return render_chain(self.config, self.objective, self.state.ema.module, batch, keys)
