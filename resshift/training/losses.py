"""The training objective: MSE on the target of the network; LPIPS and lattice measures on the decoded
prediction of x0.

    mse_b  = mean over (Z, h, w) of (target - output)^2
    loss_b = c_mse w_t mse_b + c_lpips LPIPS(clamp(D(x0_pred)), hq) + c_lattice (L + S / 2 + 10 B + W)

mse_b is divided by kappa^2 eta_t if the target is epsilon_scale. L, S, B and W measure how visible the
positions of the latent and of the coarser levels are in D(x0_pred), in each picture and in the batch
(`resshift.training.lattice`).

w_t is 1 ("plain") or the weight of the variational bound ("weighted"):

    x0, residual:            w_t = (alpha_t / eta_t)^2 / (2 var_t)
    epsilon, epsilon_scale:  w_t = (kappa alpha_t / ((1 - eta_t) sqrt(eta_t)))^2 / (2 var_t)

with var_t the posterior variance; at t = 1 it is zero and replaced by that of t = 2. LPIPS is
`resshift.metrics.lpips`.

The trunks of LPIPS sample at strides of 2 and 4, so with a fixed corner they do not see patterns of these
periods. `corner` moves the corner (one of the transformations of E-LPIPS, Kettunen et al. 2019).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resshift.config import LossConfig, ModelConfig
from resshift.diffusion import at_step, predict_x0, q_sample, scale_input, target_of
from resshift.metrics.lpips import Lpips
from resshift.networks.autoencoder import FirstStage
from resshift.resize.bicubic import upsample
from resshift.schedule import Float64Array, ShiftSchedule, Target
from resshift.training.lattice import patterns


def step_weights(schedule: ShiftSchedule, target: Target | str) -> Float64Array:
    """Return w_t of the variational bound, float64 (T,).

    Raises:
        ValueError: The schedule has one step, whose bound has no variance.
    """
    if schedule.steps < 2:
        raise ValueError(f"loss.mse_weighting=weighted needs at least 2 steps, got {schedule.steps}")
    variance = schedule.posterior_variance
    variance[0] = variance[1]
    if Target(target) in (Target.X0, Target.RESIDUAL):
        return 0.5 / variance * schedule.posterior_coef_x0**2
    return 0.5 / variance * (schedule.kappa * schedule.alpha / ((1 - schedule.eta) * schedule.sqrt_eta)) ** 2


def mse_per_sample(
    output: Tensor, wanted: Tensor, t: Tensor, schedule: ShiftSchedule, target: Target | str, weighted: bool
) -> Tensor:
    """Return the MSE term of each sample, (B,).

    Args:
        output: Output of the network, (B, ...).
        wanted: Target from `diffusion.target_of`, of the same shape.
        t: Step indices in [0, T), int64 (B,).
        schedule: Shifting sequence.
        target: Quantity that the network predicts.
        weighted: Whether to multiply by w_t.
    """
    mse = (wanted - output).float().square().flatten(1).mean(1)
    if Target(target) is Target.EPSILON_SCALE:
        mse = mse / at_step(schedule, "noise_std", t, mse).square()
    if weighted:
        mse = mse * step_weights_on(schedule, Target(target), mse.dtype, mse.device)[t]
    return mse


@lru_cache(maxsize=64)
def step_weights_on(
    schedule: ShiftSchedule, target: Target, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return w_t on a device, (T,). Kept there: a copy from the host at every step would make a GPU wait."""
    return torch.from_numpy(step_weights(schedule, target)).to(device, dtype)


class LossTerms(NamedTuple):
    """Means over the batch. `total` has a gradient; the others, without their coefficients, are for the
    log.
    """

    total: Tensor
    mse: Tensor
    lpips: Tensor
    lattice: Tensor


class Prediction(NamedTuple):
    """What a network says about a batch.

    Fields:
        start: Picture that the chain starts from, (B, 3, H, W).
        output: Output of the network.
        wanted: Output that it should have.
        x0_pred: Prediction of x0 that follows from the output.
    """

    start: Tensor
    output: Tensor
    wanted: Tensor
    x0_pred: Tensor


class Objective:
    """The loss of a batch of pictures, from bicubic upsampling to LPIPS.

    Args:
        model: Configuration of the model.
        loss: Coefficients of the terms.
        first_stage: Frozen first stage in evaluation mode, on the device of the batches.
        lpips: LPIPS network on the same device; required if `loss.lpips` is not zero.
    """

    def __init__(
        self, model: ModelConfig, loss: LossConfig, first_stage: FirstStage, lpips: Lpips | None = None
    ) -> None:
        if loss.lpips and lpips is None:
            raise ValueError(f"loss.lpips is {loss.lpips} but no LPIPS network was given")
        self.model = model
        self.loss = loss
        self.first_stage = first_stage
        self.lpips = lpips
        self.schedule = ShiftSchedule.from_config(model.schedule)
        self._encode, self._decode = first_stage.encode, first_stage.decode

    def compile(self, mode: str) -> None:
        """Compile the first stage with torch.compile."""
        self._encode, self._decode = (torch.compile(call, mode=mode) for call in (self._encode, self._decode))

    def start(self, network: nn.Module, lq: Tensor) -> Tensor:
        """Return the picture that the chain starts from, (B, 3, H, W): the estimate of the regression network
        that is a part of the U-Net, or bicubic interpolation.
        """
        regression = getattr(getattr(network, "module", network), "regression", None)
        return upsample(lq, self.model.scale) if regression is None else regression(lq).float()

    def latents(self, hq: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        """Return x0 and y0 of the clean pictures and of those that the chain starts from, (B, Z, h, w)."""
        # One pass for both. With autocast the encoder gives half precision; the chain is float32.
        x0, y0 = self._encode(torch.cat([hq, start])).float().chunk(2)
        return x0, y0

    def condition(self, lq: Tensor, y0: Tensor) -> Tensor:
        """Return what the network sees beside x_t: the low-quality picture, and y0 if it takes that."""
        return torch.cat((lq, y0), dim=1) if self.model.unet.sees_y0 else lq

    def predict(
        self,
        network: nn.Module,
        hq: Tensor,
        lq: Tensor,
        t: Tensor,
        noise: Tensor,
        mask: Tensor | None = None,
    ) -> Prediction:
        """Run the network at step t.

        Args:
            network: Network that predicts the target, called as `network(x_scaled, t, lq, mask)`.
            hq: Clean pictures in [-1, 1], (B, 3, H, W).
            lq: Degraded pictures in [-1, 1], (B, 3, H / scale, W / scale).
            t: Step indices in [0, T), int64 (B,).
            noise: Standard normal noise, (B, Z, H / f, W / f). The caller draws t and noise, and so is
                responsible for reproducibility.
            mask: 1 in a hole and -1 where the picture is kept, (B, 1, H / scale, W / scale), for networks
                with `cond_mask`.
        """
        with torch.no_grad():
            start = self.start(network, lq)
            x0, y0 = self.latents(hq, start)
            x_t = q_sample(x0, y0, t, noise, self.schedule)
            wanted = target_of(x0, y0, noise, t, self.schedule, self.model.target)
        x_scaled = scale_input(x_t, t, self.schedule, self.model.latent_scaling)
        output = network(x_scaled, t, self.condition(lq, y0), mask).float()
        x0_pred = predict_x0(output, x_t, y0, t, self.schedule, self.model.target)
        return Prediction(start, output, wanted, x0_pred)

    def picture(self, x0_pred: Tensor) -> Tensor:
        """Return the picture that a predicted latent decodes to, (B, 3, H, W) float32."""
        return self._decode(x0_pred).float()

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
        """Compute the loss.

        Args:
            network, hq, lq, t, noise, mask: See `predict`.
            corner: Row and column of the first pixel that LPIPS sees.
        """
        _, output, wanted, x0_pred = self.predict(network, hq, lq, t, noise, mask)
        mse = mse_per_sample(
            output, wanted, t, self.schedule, self.model.target, self.loss.mse_weighting == "weighted"
        ).mean()
        return self.with_picture(mse, x0_pred, hq, corner)

    def with_picture(self, mse: Tensor, x0_pred: Tensor, hq: Tensor, corner: tuple[int, int]) -> LossTerms:
        """Return the terms: `mse`, and those of the picture that a predicted latent decodes to."""
        perceptual = shown = torch.zeros_like(mse)
        if self.loss.lpips or self.loss.lattice:
            decoded = self.picture(x0_pred)
            if self.lpips is not None and self.loss.lpips:
                seen = (..., slice(corner[0], None), slice(corner[1], None))
                perceptual = self.lpips(decoded.clamp(-1, 1)[seen], hq[seen]).mean()
            if self.loss.lattice:
                shown = patterns(decoded, self.model.first_stage.factor, self.model.coarsest_px)
        total = self.loss.mse * mse + self.loss.lpips * perceptual + self.loss.lattice * shown
        return LossTerms(total, mse.detach(), perceptual.detach(), shown.detach())
