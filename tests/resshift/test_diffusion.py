"""The chain: what follows from its definition, and the released operations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from resshift.diffusion import predict_x0, prior_sample, q_posterior, q_sample, scale_input, target_of
from resshift.sampler import reverse_step
from resshift.schedule import ShiftSchedule, Target

Load = Callable[[str], dict[str, np.ndarray]]
SCHEDULES = {
    "realsr_v1v2_T15": ShiftSchedule.released(15, 2.0, 0.04),
    "journal_T4": ShiftSchedule.released(4, 2.0, 0.2),
}
T_INDEX = {"realsr_v1v2_T15": (0, 1, 7, 14), "journal_T4": (0, 1, 2, 3)}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_composed_single_steps_equal_the_marginal(schedule: ShiftSchedule) -> None:
    """q(x_t | x_{t-1}) applied t times has mean x0 + eta_t e0 and variance kappa^2 eta_t."""
    mean, variance, x0, e0 = 0.3, 0.0, 0.3, -1.7
    for i in range(schedule.steps):
        mean, variance = mean + schedule.alpha[i] * e0, variance + schedule.kappa**2 * schedule.alpha[i]
        t = torch.tensor([i])
        zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
        marginal_mean = q_sample(zero + x0, zero + x0 + e0, t, zero, schedule)
        marginal_std = q_sample(zero + x0, zero + x0 + e0, t, one, schedule) - marginal_mean
        assert marginal_mean.item() == pytest.approx(mean, abs=1e-12)
        assert marginal_std.item() ** 2 == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=list(SCHEDULES))
def test_posterior_equals_bayes_rule(schedule: ShiftSchedule) -> None:
    """Multiply the two Gaussians q(x_t | x_{t-1}) and q(x_{t-1} | x0) by hand."""
    x0, e0, x_t = 0.4, -0.9, 0.8
    for i in range(1, schedule.steps):
        alpha, eta_prev, kappa2 = schedule.alpha[i], schedule.eta[i - 1], schedule.kappa**2
        likelihood_mean, likelihood_variance = x_t - alpha * e0, kappa2 * alpha
        prior_mean, prior_variance = x0 + eta_prev * e0, kappa2 * eta_prev
        variance = 1 / (1 / likelihood_variance + 1 / prior_variance)
        mean = variance * (likelihood_mean / likelihood_variance + prior_mean / prior_variance)
        one = torch.ones(1, 1, dtype=torch.float64)
        posterior = q_posterior(one * x0, one * x_t, torch.tensor([i]), schedule)
        assert posterior.mean.item() == pytest.approx(mean, abs=1e-12)
        assert posterior.variance.item() == pytest.approx(variance, abs=1e-12)


@pytest.mark.parametrize("target", [*Target, "xstart"])
def test_predicting_the_target_recovers_x0(target: Target | str) -> None:
    schedule = SCHEDULES["journal_T4"]
    x0, y0, noise = (normal(4, 3, 5, 6, seed=seed) for seed in range(3))
    t = torch.arange(4)
    x_t = q_sample(x0, y0, t, noise, schedule)
    wanted = target_of(x0, y0, noise, t, schedule, target)
    torch.testing.assert_close(predict_x0(wanted, x_t, y0, t, schedule, target), x0, atol=1e-10, rtol=0)


def test_unknown_target_is_named() -> None:
    x = normal(1, 1, seed=0)
    with pytest.raises(ValueError, match="velocity"):
        predict_x0(x, x, x, torch.zeros(1, dtype=torch.int64), SCHEDULES["journal_T4"], "velocity")


@pytest.mark.parametrize("name", SCHEDULES)
def test_operations_against_official(name: str, parity: Load) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in parity("diffusion_ops").items()}
    schedule = SCHEDULES[name]
    x0, y0, noise, output = (arrays[key] for key in ("x0", "y", "noise", "model_out"))

    def close(actual: Tensor, key: str, i: int | None = None) -> None:
        expected = arrays[f"{name}/{key}"] if i is None else arrays[f"{name}/{key}"][i]
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5, msg=lambda text: f"{key}: {text}")

    for i, index in enumerate(T_INDEX[name]):
        t = torch.full((4,), index)
        x_t = q_sample(x0, y0, t, noise, schedule)
        close(x_t, "q_sample", i)
        # The fixture calls the posterior, the scaling and the x0 predictions on `noise` in the place of x_t.
        posterior = q_posterior(x0, noise, t, schedule)
        close(posterior.mean, "post_mean", i)
        if index > 0:
            close(posterior.variance.log(), "post_logvar", i)
        close(scale_input(noise, t, schedule), "scale_latent", i)
        close(scale_input(noise, t, schedule, latent=False), "scale_pixel", i)
        close(predict_x0(output, noise, y0, t, schedule, "epsilon"), "x0_from_eps", i)
        close(predict_x0(output, noise, y0, t, schedule, "epsilon_scale"), "x0_from_eps_scale", i)
        # The noise in x_t as the official code derives it, put into the definition of the deterministic step.
        eta_prev = float(schedule.eta_prev[index])
        step = x0 + eta_prev * (y0 - x0) + schedule.kappa * eta_prev**0.5 * arrays[f"{name}/eps_from_x0"][i]
        torch.testing.assert_close(reverse_step(noise, x0, t, None, schedule, y0), step, atol=1e-5, rtol=1e-5)
    close(prior_sample(y0, noise, schedule), "prior_sample")
    torch.testing.assert_close(
        predict_x0(output, noise, y0, torch.zeros(4, dtype=torch.int64), schedule, "residual"),
        arrays["x0_from_residual"],
    )
