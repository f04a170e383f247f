"""The reverse loop with denoisers that know the answer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resshift.diffusion import q_sample
from resshift.sampler import network_denoiser, reverse_step, sample, trajectory
from resshift.schedule import Sampler, ShiftSchedule


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kappa", [0.1, 1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 15])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sampler", Sampler)
def test_oracle_denoiser_gives_x0_exactly(kappa: float, steps: int, seed: int, sampler: Sampler) -> None:
    x0, y0 = normal(2, 3, 8, 6, seed=10), normal(2, 3, 8, 6, seed=11)
    schedule = ShiftSchedule.released(steps, kappa)

    def noise(step: int) -> Tensor:
        return normal(2, 3, 8, 6, seed=100 * seed + step)

    out = sample(lambda x_t, t: x0, y0, schedule, noise, sampler)
    assert torch.equal(out, x0)


def test_a_reverse_step_is_a_draw_from_the_posterior_of_the_paper() -> None:
    schedule = ShiftSchedule.released(4, kappa=2.0)
    x_t, x0, noise = (normal(3, 2, 4, 4, seed=seed) for seed in (0, 1, 2))
    x_prev = reverse_step(x_t, x0, torch.tensor([0, 1, 3]), noise, schedule)
    assert torch.equal(x_prev[0], x0[0])
    for i_sample, t in ((1, 1), (2, 3)):
        eta, eta_prev = float(schedule.eta[t]), float(schedule.eta[t - 1])
        spread = 2.0 * (eta_prev / eta * (eta - eta_prev)) ** 0.5
        expected = eta_prev / eta * x_t + (eta - eta_prev) / eta * x0 + spread * noise
        torch.testing.assert_close(x_prev[i_sample], expected[i_sample], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("schedule", [ShiftSchedule.released(4), ShiftSchedule.paper(15, kappa=1.0)])
def test_a_step_without_noise_stays_on_the_marginals_with_the_same_noise(schedule: ShiftSchedule) -> None:
    """With the true x0, the x_t of q_sample goes to its x_{t-1} of the same noise, from every t."""
    x0, y0, noise = (normal(1, 2, 4, 4, seed=seed) for seed in range(3))
    for i in range(1, schedule.steps):
        t = torch.tensor([i])
        x_t = q_sample(x0, y0, t, noise, schedule)
        expected = q_sample(x0, y0, t - 1, noise, schedule)
        torch.testing.assert_close(reverse_step(x_t, x0, t, None, schedule, y0), expected)


def test_both_forms_of_a_step_are_one_family() -> None:
    """DDIM with a spread s: x0 + eta' (y0 - x0) + sqrt(kappa^2 eta' - s^2) noise_t + s noise. s = 0 is the
    deterministic form, and the spread of the posterior gives the posterior, which y0 leaves.
    """
    schedule = ShiftSchedule.released(4, kappa=1.5)
    x_t, x0, y0, noise = (normal(3, 2, 4, 4, seed=seed) for seed in range(4))
    for i in range(1, 4):
        eta, eta_prev, kappa = float(schedule.eta[i]), float(schedule.eta[i - 1]), schedule.kappa
        kept = (x_t - x0 - eta * (y0 - x0)) / (kappa * eta**0.5)
        for spread, drawn in ((0.0, None), (kappa * (eta_prev / eta * (eta - eta_prev)) ** 0.5, noise)):
            expected = x0 + eta_prev * (y0 - x0) + (kappa**2 * eta_prev - spread**2) ** 0.5 * kept
            found = reverse_step(x_t, x0, torch.full((3,), i), drawn, schedule, y0)
            torch.testing.assert_close(found, expected + spread * noise)


def test_a_step_without_noise_needs_y0() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match="a step without noise needs y0"):
        reverse_step(x, x, torch.tensor([1]), None, ShiftSchedule.released(4))


def test_ddim_asks_for_the_noise_of_the_prior_alone() -> None:
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(1, 1, 2, 2)

    sample(lambda x_t, t: x_t, torch.zeros(1, 1, 2, 2), ShiftSchedule.released(4), noise, Sampler.DDIM)
    assert asked == [4]


def test_noise_is_asked_for_in_the_order_of_the_released_code() -> None:
    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros(1, 1, 2, 2)

    y0 = torch.zeros(1, 1, 2, 2)
    sample(lambda x_t, t: x_t, y0, ShiftSchedule.released(4), noise)
    assert asked == [4, 3, 2, 1, 0]


def test_chain_has_the_marginals_of_the_forward_process() -> None:
    """With the true x0 as prediction, x_{t-1} is distributed as q(x_{t-1} | x0, y0) when x_T is; checked by
    mean and variance.
    """
    schedule = ShiftSchedule.released(4, kappa=1.0, min_noise=0.1)
    x0, y0 = (
        torch.full((1, 1, 200, 200), 0.5, dtype=torch.float64),
        torch.full((1, 1, 200, 200), -0.5, dtype=torch.float64),
    )
    # Starting from the exact marginal instead of the prior's approximation: the mean of x_T is x0 + eta_T (y0
    # - x0).
    start = x0 + float(schedule.eta[-1]) * (y0 - x0)
    for step in trajectory(lambda x_t, t: x0, start, schedule, lambda i: normal(1, 1, 200, 200, seed=i)):
        if step.t == 0:
            continue
        eta = float(schedule.eta[step.t - 1])
        assert step.x_prev.mean().item() == pytest.approx(0.5 - eta, abs=0.02)
        assert step.x_prev.var().item() == pytest.approx(schedule.kappa**2 * eta, rel=0.05)


def test_network_sees_scaled_input_and_unscaled_condition() -> None:
    schedule = ShiftSchedule.released(4)
    lq, y0, x_t = normal(1, 3, 4, 4, seed=0), normal(1, 3, 4, 4, seed=1), normal(1, 3, 4, 4, seed=2)
    seen: dict[str, Tensor | None] = {}

    def network(x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None) -> Tensor:
        seen.update(x=x, lq=lq, mask=mask)
        return torch.ones_like(x)

    denoise = network_denoiser(network, lq, y0, schedule, "residual")
    out = denoise(x_t, torch.tensor([3]))
    expected = x_t / (1 + schedule.kappa**2 * schedule.eta[3]) ** 0.5
    assert seen["x"] is not None
    torch.testing.assert_close(seen["x"], expected)
    assert seen["lq"] is lq
    torch.testing.assert_close(out, y0 - 1)


def test_a_shortened_chain_asks_the_network_at_the_steps_it_was_trained_on() -> None:
    schedule = ShiftSchedule.released(15).shortened(4)
    lq, y0 = normal(1, 3, 4, 4, seed=0), normal(1, 3, 4, 4, seed=1)
    seen: list[tuple[int, float]] = []

    def network(x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None) -> Tensor:
        seen.append((int(t[0]), float(x.abs().max())))
        return torch.full_like(x, 0.25)

    asked: list[int] = []

    def noise(step: int) -> Tensor:
        asked.append(step)
        return torch.zeros_like(y0)

    out = sample(network_denoiser(network, lq, y0, schedule), y0, schedule, noise)
    assert [t for t, _ in seen] == [14, 11, 7, 3]
    assert asked == [4, 3, 2, 1, 0]
    assert torch.equal(out, torch.full_like(y0, 0.25))
    # The first input is the prior, scaled as the network was trained: by sqrt(1 + kappa^2 eta_T) of the whole
    # chain.
    whole = ShiftSchedule.released(15)
    assert seen[0][1] == pytest.approx(float(y0.abs().max()) / float(whole.latent_input_std[-1]), rel=1e-12)
