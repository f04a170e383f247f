"""One step from a chain: the student of a teacher, in the form of SinSR (Wang et al., "SinSR: Diffusion-Based
Image Super-Resolution in a Single Step", CVPR 2024).

    x_T    = y0 + kappa sqrt(eta_T) noise
    z0     = the teacher's chain from x_T without noise (DDIM), a function of x_T
    loss   = |f(x_T, T) - z0|^2 + inverse |f(z0, 0) - x_T|^2 + truth |f(stopgrad f(x0, 0), T) - x0|^2

f is the student. Its second use, asked at the time 0, goes the other way, from a clean latent to the start of
a chain that would end there; through it the truth x0 gets a start that belongs to it, and the student may be
better than its teacher. All inputs are scaled as x_T is (`diffusion.scale_input`). The student has the
network of its teacher, begins with its weights, and is asked once, at T. A step asks the student for four
latents of every sample, and the teacher for T.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from resshift.config import (
    ConfigError,
    DistillConfig,
    LossConfig,
    ModelConfig,
    RunConfig,
    differing_fields,
    to_dict,
)
from resshift.diffusion import predict_x0, prior_sample, scale_input
from resshift.metrics.lpips import Lpips
from resshift.networks.autoencoder import FirstStage
from resshift.sampler import network_denoiser, sample
from resshift.schedule import Sampler, ShiftSchedule
from resshift.training.losses import LossTerms, Objective


def teacher_config(student: ModelConfig) -> ModelConfig:
    """Return the configuration of the chain that a one-step student was made from."""
    steps = student.schedule.trained_steps
    return replace(student, schedule=replace(student.schedule, steps=steps, trained_steps=None))


def student_run(run: RunConfig, teacher: str, identity: str, config: object) -> RunConfig:
    """Return the run of a student, with data and optimiser of `run`; of stages and their terms it has none.

    Args:
        run: Run of the teacher's preset.
        teacher: Address of the teacher.
        identity: Its identity.
        config: Its configuration.

    Raises:
        ConfigError: The teacher is no chain, or another model than that of `run`.
    """
    if not isinstance(config, ModelConfig) or config.steps == 1:
        raise ConfigError(f"a teacher must be a chain of at least two steps, got {teacher}")
    if config != run.model:
        fields = differing_fields({"model": to_dict(config)}, {"model": to_dict(run.model)})
        raise ConfigError(f"{teacher} is no model of preset {run.preset}: {'; '.join(fields[:3])}")
    schedule = replace(config.schedule, steps=1, trained_steps=config.steps)
    if run.stages:
        loss = replace(run.loss, mse=1.0, charbonnier=0.0, fourier=0.0, features=0.0, adversary=0.0)
        run = replace(run, stages=(), loss=loss, optim=replace(run.optim, muon=None))
    return replace(
        run,
        model=replace(config, schedule=schedule),
        distill=DistillConfig(teacher=teacher, identity=identity),
    )


class Distillation(Objective):
    """The loss of a student, in the place of `Objective`; LPIPS and lattice are those of its picture.

    Args:
        model: Configuration of the student.
        loss: Coefficients; `loss.mse` is that of the three terms.
        distill: Weights of the terms.
        teacher: Frozen U-Net of the teacher, on the device of the batches.
        first_stage: Frozen first stage in evaluation mode.
        lpips: LPIPS network; required if `loss.lpips` is not zero.
    """

    def __init__(
        self,
        model: ModelConfig,
        loss: LossConfig,
        distill: DistillConfig,
        teacher: nn.Module,
        first_stage: FirstStage,
        lpips: Lpips | None = None,
    ) -> None:
        super().__init__(model, loss, first_stage, lpips)
        self.distill = distill
        self.teacher = teacher
        self.chain = ShiftSchedule.from_config(teacher_config(model).schedule)

    def __call__(
        self,
        network: nn.Module,
        hq: Tensor,
        lq: Tensor,
        t: Tensor,
        noise: Tensor,
        mask: Tensor | None = None,
        corner: tuple[int, int] = (0, 0),
    ) -> LossTerms:
        """Compute the loss; arguments as in `Objective`. `t` is 0, the only step of the student."""
        end, start = t + self.chain.steps - 1, torch.zeros_like(t)

        def ask(parts: list[tuple[Tensor, Tensor]], y0: Tensor) -> list[Tensor]:
            """Return f(x, time) for each (x, time), in one call."""
            xs, times = (torch.cat(values) for values in zip(*parts, strict=True))
            ends, repeat = end.repeat(len(parts)), (len(parts), 1, 1, 1)
            output = network(
                scale_input(xs, ends, self.chain, self.model.latent_scaling),
                times,
                self.condition(lq, y0).repeat(repeat),
                None if mask is None else mask.repeat(repeat),
            ).float()
            found = predict_x0(output, xs, y0.repeat(repeat), ends, self.chain, self.model.target)
            return list(found.chunk(len(parts)))

        with torch.no_grad():
            x0, y0 = self.latents(hq, self.start(network, lq))
            x_end = prior_sample(y0, noise, self.chain)
            z0 = self._taught(lq, y0, noise, mask)
            (x_end_of_truth,) = ask([(x0, start)], y0)
        student, inverse, truth = ask([(x_end, end), (z0, start), (x_end_of_truth, end)], y0)
        mse = (
            (student - z0).square().mean()
            + self.distill.inverse * (inverse - x_end).square().mean()
            + self.distill.truth * (truth - x0).square().mean()
        )
        return self.with_picture(mse, student, hq, corner)

    def _taught(self, lq: Tensor, y0: Tensor, noise: Tensor, mask: Tensor | None) -> Tensor:
        """Return the end of the teacher's chain."""
        model = self.model

        def network(*inputs: Tensor | None) -> Tensor:
            return self.teacher(*inputs).float()

        denoise = network_denoiser(
            network, lq, y0, self.chain, model.target, mask, model.latent_scaling, model.unet.sees_y0
        )
        return sample(denoise, y0, self.chain, lambda _: noise, Sampler.DDIM)
