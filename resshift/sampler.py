"""The reverse loop: from the degraded latent y0 to a clean one in T steps.

    x_T     = y0 + kappa sqrt(eta_T) noise(T)
    x0_pred = denoise(x_t, t)
    x_{t-1} = (eta_{t-1} / eta_t) x_t + (alpha_t / eta_t) x0_pred
              + sqrt(kappa^2 (eta_{t-1} / eta_t) alpha_t) noise(t - 1)

or without noise after x_T (`reverse_step`). The last step returns x0_pred either way. The caller provides the
denoiser and the noise. `trajectory` runs over a latent that is whole in memory, as validation does while
training; `resshift.tiles.chain` takes the same `reverse_step` row of tiles by row of tiles, for `Upscaler`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from resshift.diffusion import at_step, predict_x0, prior_sample, q_posterior, scale_input, trained_step
from resshift.schedule import Sampler, ShiftSchedule, Target


class Denoise(Protocol):
    """Predict x0 from x_t: both (B, Z, h, w), x_t not scaled; t is int64 (B,), index i = the paper's t = i +
    1.
    """

    def __call__(self, x_t: Tensor, t: Tensor, /) -> Tensor: ...


class SamplingStep(NamedTuple):
    """State after one reverse step: `t` is the index of the step, `x_prev` the input of the next step."""

    t: int
    x0_pred: Tensor
    x_prev: Tensor


def reverse_step(
    x_t: Tensor,
    x0_pred: Tensor,
    t: Tensor,
    noise: Tensor | None,
    schedule: ShiftSchedule,
    y0: Tensor | None = None,
) -> Tensor:
    """Go back one step of the chain, in one of two forms with the same marginals q(x_t | x0, y0).

    With `noise`, draw x_{t-1} from the posterior q(x_{t-1} | x_t, x0_pred):

        x_{t-1} = (eta_{t-1} / eta_t) x_t + (alpha_t / eta_t) x0_pred
                  + sqrt(kappa^2 (eta_{t-1} / eta_t) alpha_t) noise

    (Yue, Wang and Loy, "ResShift", NeurIPS 2023). Without, keep the noise that x_t has, as DDIM does (Song,
    Meng and Ermon, ICLR 2021; for this chain Wang et al., "SinSR", CVPR 2024):

        x_{t-1} = x0_pred + eta_{t-1} (y0 - x0_pred) + kappa sqrt(eta_{t-1}) noise_t
        noise_t = (x_t - x0_pred - eta_t (y0 - x0_pred)) / (kappa sqrt(eta_t))

    Args:
        x_t: Latent before the step, (B, ...).
        x0_pred: Prediction of the clean latent, same shape.
        t: Step indices in [0, T), int64 (B,). At index 0 the result is x0_pred.
        noise: Standard normal, same shape, drawn by the caller; None for the deterministic form.
        schedule: Shifting sequence.
        y0: Degraded latent, same shape; only the deterministic form depends on it, and needs it.

    Returns:
        x_{t-1}, same shape, dtype and device as x_t.

    Raises:
        ValueError: Neither `noise` nor `y0` is given.
    """
    if noise is None:
        if y0 is None:
            raise ValueError("a step without noise needs y0")
        return (
            at_step(schedule, "ddim_coef_x0", t, x_t) * x0_pred
            + at_step(schedule, "ddim_coef_xt", t, x_t) * x_t
            + at_step(schedule, "ddim_coef_y0", t, x_t) * y0
        )
    posterior = q_posterior(x0_pred, x_t, t, schedule)
    return posterior.mean + posterior.variance.sqrt() * noise


def trajectory(
    denoise: Denoise,
    y0: Tensor,
    schedule: ShiftSchedule,
    noise: Callable[[int], Tensor],
    sampler: Sampler = Sampler.POSTERIOR,
) -> Iterator[SamplingStep]:
    """Run the reverse chain and yield after every step, so that the caller can show progress or stop.

    Args:
        denoise: Function that predicts x0.
        y0: Degraded latent, (B, Z, h, w).
        schedule: Shifting sequence of T steps.
        noise: Function that returns standard normal noise of the shape of y0 for a step. It is called once
            for each of T (the prior), T - 1, ..., 0, in this order; the last draw has weight zero and makes a
            sequential generator advance as in the released code. DDIM asks for that of the prior alone.
        sampler: Form of `reverse_step`.
    """
    x_t = prior_sample(y0, noise(schedule.steps), schedule)
    for i in range(schedule.steps - 1, -1, -1):
        t = torch.full((y0.shape[0],), i, dtype=torch.int64, device=y0.device)
        x0_pred = denoise(x_t, t)
        x_t = reverse_step(x_t, x0_pred, t, noise(i) if sampler is Sampler.POSTERIOR else None, schedule, y0)
        yield SamplingStep(i, x0_pred, x_t)


def sample(
    denoise: Denoise,
    y0: Tensor,
    schedule: ShiftSchedule,
    noise: Callable[[int], Tensor],
    sampler: Sampler = Sampler.POSTERIOR,
) -> Tensor:
    """Run the whole reverse chain and return the clean latent, same shape as y0. Arguments as in
    `trajectory`.
    """
    x_prev = y0
    for step in trajectory(denoise, y0, schedule, noise, sampler):
        x_prev = step.x_prev
    return x_prev


def network_denoiser(
    network: Callable[..., Tensor],
    lq: Tensor,
    y0: Tensor,
    schedule: ShiftSchedule,
    target: Target | str = Target.X0,
    mask: Tensor | None = None,
    latent: bool = True,
    sees_y0: bool = False,
) -> Denoise:
    """Wrap a network that sees the scaled x_t and the low-quality picture into a `Denoise`.

    Args:
        network: Function `network(x_scaled, t, lq, mask)`, for example `resshift.networks.unet.UNetSwin`.
        lq: low-quality picture in [-1, 1], (B, 3, h_lq, w_lq), at the resolution that the network was built
            for.
        y0: Degraded latent, (B, Z, h, w).
        schedule: Shifting sequence.
        target: Meaning of the network's output.
        mask: Mask for inpainting, 1 in a hole and -1 where the picture is kept, (B, 1, h_lq, w_lq).
        latent: Whether `scale_input` uses the rule for latents.
        sees_y0: Whether the network sees y0 beside lq, which then has the size of the latent.
    """

    condition = torch.cat((lq, y0), dim=1) if sees_y0 else lq

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        output = network(scale_input(x_t, t, schedule, latent), trained_step(schedule, t), condition, mask)
        return predict_x0(output, x_t, y0, t, schedule, target)

    return denoise
