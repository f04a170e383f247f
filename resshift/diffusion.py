"""The chain that shifts the residual e0 = y0 - x0 between the clean x0 and the degraded y0.

    q(x_t | x0, y0)          = N(x0 + eta_t e0, kappa^2 eta_t I)
    q(x_{t-1} | x_t, x0, y0) = N((eta_{t-1} / eta_t) x_t + (alpha_t / eta_t) x0,
                                 kappa^2 (eta_{t-1} / eta_t) alpha_t I)
    x_T                      = y0 + kappa sqrt(eta_T) noise

(Yue, Wang and Loy, "ResShift", NeurIPS 2023.) Pure functions of tensors, without networks, random numbers or
a device of their own. B is the batch size, `...` stands for the other axes of the latent.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from resshift.schedule import ShiftSchedule, Target


class Posterior(NamedTuple):
    """A Gaussian q(x_{t-1} | x_t, x0): `mean` (B, ...) and `variance` (B, 1, ...)."""

    mean: Tensor
    variance: Tensor


@lru_cache(maxsize=256)
def _table(schedule: ShiftSchedule, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Cached: a copy from the host at every step would make a GPU wait.
    return torch.from_numpy(getattr(schedule, name).copy()).to(dtype).to(device)


def _array(schedule: ShiftSchedule, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    # While a graph is traced tensors have no values, and none may stay in the cache.
    table = _table.__wrapped__ if torch.compiler.is_compiling() else _table
    return table(schedule, name, dtype, device)


def trained_step(schedule: ShiftSchedule, t: Tensor) -> Tensor:
    """Return the step indices that the network was trained with for the steps `t`, int64 (B,): `t` itself
    unless the schedule was shortened.
    """
    return (
        t if schedule.trained_steps is None else _array(schedule, "trained_steps", torch.int64, t.device)[t]
    )


def at_step(schedule: ShiftSchedule, name: str, t: Tensor, like: Tensor) -> Tensor:
    """Pick one of the schedule's arrays at `t`, shaped (B, 1, ...) to broadcast against `like`.

    Args:
        schedule: Shifting sequence; its arrays are evaluated in float64 and cast to the dtype of `like` here.
        name: Name of an attribute of the schedule, for example "eta".
        t: Step indices in [0, T), int64 (B,). Index i is the paper's t = i + 1.
        like: Tensor that gives device, dtype and number of axes, (B, ...).
    """
    return _array(schedule, name, like.dtype, like.device)[t].reshape(-1, *(1,) * (like.ndim - 1))


def q_sample(x0: Tensor, y0: Tensor, t: Tensor, noise: Tensor, schedule: ShiftSchedule) -> Tensor:
    """Draw x_t ~ q(x_t | x0, y0).

        x_t = x0 + eta_t (y0 - x0) + kappa sqrt(eta_t) noise

    Args:
        x0: Clean latent, (B, ...).
        y0: Degraded latent, same shape.
        t: Step indices in [0, T), int64 (B,).
        noise: Standard normal noise, same shape. The caller draws it and so controls reproducibility.
        schedule: Shifting sequence.

    Returns:
        x_t, same shape, dtype and device as x0.
    """
    eta = at_step(schedule, "eta", t, x0)
    return x0 + eta * (y0 - x0) + at_step(schedule, "noise_std", t, x0) * noise


def q_posterior(x0: Tensor, x_t: Tensor, t: Tensor, schedule: ShiftSchedule) -> Posterior:
    """Return the Gaussian q(x_{t-1} | x_t, x0), which does not depend on y0.

    Args:
        x0: Clean latent (in sampling: its prediction), (B, ...).
        x_t: Noisy latent, same shape.
        t: Step indices in [0, T), int64 (B,). At index 0 the mean is x0 and the variance 0.
        schedule: Shifting sequence.
    """
    mean = (
        at_step(schedule, "posterior_coef_xt", t, x_t) * x_t
        + at_step(schedule, "posterior_coef_x0", t, x_t) * x0
    )
    return Posterior(mean, at_step(schedule, "posterior_variance", t, x_t))


def prior_sample(y0: Tensor, noise: Tensor, schedule: ShiftSchedule) -> Tensor:
    """Draw the start of the reverse chain, x_T = y0 + kappa sqrt(eta_T) noise, same shape as y0.

    The mean is y0 itself, not x0 + eta_T (y0 - x0): x0 is unknown, and eta_T is nearly 1.
    """
    return y0 + float(schedule.noise_std[-1]) * noise


def scale_input(x_t: Tensor, t: Tensor, schedule: ShiftSchedule, latent: bool = True) -> Tensor:
    """Scale x_t to about unit size for the network. The low-quality condition is not scaled.

        latent:  x_t / sqrt(1 + kappa^2 eta_t)     (standard deviation of a unit-variance latent and noise)
        pixels:  x_t / (1 + 3 kappa sqrt(eta_t))   ([-1, 1] and three standard deviations of the noise)

    Args:
        x_t: Noisy latent, (B, ...).
        t: Step indices in [0, T), int64 (B,).
        schedule: Shifting sequence.
        latent: Whether to use the rule for latents.
    """
    return x_t / at_step(schedule, "latent_input_std" if latent else "pixel_input_range", t, x_t)


def target_of(
    x0: Tensor, y0: Tensor, noise: Tensor, t: Tensor, schedule: ShiftSchedule, target: Target | str
) -> Tensor:
    """Return the output that the network should have for x_t = q_sample(x0, y0, t, noise); same shape as x0.

    x0: x0    residual: y0 - x0    epsilon: noise    epsilon_scale: kappa sqrt(eta_t) noise
    """
    match Target(target):
        case Target.X0:
            return x0
        case Target.RESIDUAL:
            return y0 - x0
        case Target.EPSILON:
            return noise
        case Target.EPSILON_SCALE:
            return at_step(schedule, "noise_std", t, x0) * noise


def predict_x0(
    output: Tensor, x_t: Tensor, y0: Tensor, t: Tensor, schedule: ShiftSchedule, target: Target | str
) -> Tensor:
    """Turn the network's output into a prediction of x0.

        x0:            output
        residual:      y0 - output
        epsilon:       (x_t - kappa sqrt(eta_t) output - eta_t y0) / (1 - eta_t)
        epsilon_scale: (x_t - output - eta_t y0) / (1 - eta_t)

    The two epsilon forms divide by 1 - eta_T, which is 0.02 for the released schedule: errors grow fifty
    times at the first step.

    Args:
        output: Output of the network, (B, ...).
        x_t: Noisy latent (not scaled), same shape.
        y0: Degraded latent, same shape.
        t: Step indices in [0, T), int64 (B,).
        schedule: Shifting sequence.
        target: Meaning of `output`.

    Raises:
        ValueError: `target` is unknown.
    """
    match Target(target):
        case Target.X0:
            return output
        case Target.RESIDUAL:
            return y0 - output
        case Target.EPSILON:
            noise_part = at_step(schedule, "noise_std", t, x_t) * output
        case Target.EPSILON_SCALE:
            noise_part = output
    eta = at_step(schedule, "eta", t, x_t)
    return (x_t - noise_part - eta * y0) / (1 - eta)
