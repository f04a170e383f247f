"""The shifting sequence: closed forms, and the released arrays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from resshift.schedule import ScheduleConfig, ShiftSchedule

Load = Callable[[str], dict[str, np.ndarray]]

RELEASED = {
    "realsr_v1v2_T15": ShiftSchedule.released(15, 2.0, 0.04),
    "journal_T4": ShiftSchedule.released(4, 2.0, 0.2),
    "master_bicubic_T15_kappa1": ShiftSchedule.released(15, 1.0, 0.04),
    "T4_power1": ShiftSchedule.released(4, 2.0, 0.2, power=1.0),
    "T1000_kappa1": ShiftSchedule.released(1000, 1.0, 0.01),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_form_against_official(name: str, parity: Load) -> None:
    arrays, schedule = parity("diffusion_schedules"), RELEASED[name]
    for ours, theirs in {
        "sqrt_eta": "sqrt_etas",
        "eta": "etas",
        "eta_prev": "etas_prev",
        "alpha": "alpha",
        "posterior_variance": "posterior_variance",
        "posterior_coef_xt": "posterior_mean_coef1",
        "posterior_coef_x0": "posterior_mean_coef2",
    }.items():
        np.testing.assert_allclose(
            getattr(schedule, ours), arrays[f"{name}/{theirs}"], atol=1e-12, rtol=0, err_msg=ours
        )


def test_paper_form_has_the_ends_of_the_paper() -> None:
    schedule = ShiftSchedule.paper(15, kappa=2.0, power=0.3)
    assert schedule.eta[0] == pytest.approx(min((0.04 / 2.0) ** 2, 0.001), rel=1e-12)
    assert schedule.eta[-1] == pytest.approx(0.999, rel=1e-12)


def test_paper_form_equals_the_formula_with_b0() -> None:
    steps, power = 7, 0.5
    schedule = ShiftSchedule.paper(steps, kappa=1.0, power=power)
    eta_1, eta_end = 0.001, 0.999
    b0 = np.exp(np.log(eta_end / eta_1) / (2 * (steps - 1)))
    for t in range(1, steps + 1):
        beta = ((t - 1) / (steps - 1)) ** power * (steps - 1)
        assert schedule.sqrt_eta[t - 1] == pytest.approx(np.sqrt(eta_1) * b0**beta, rel=1e-12)


def test_single_steps_add_up() -> None:
    for schedule in RELEASED.values():
        np.testing.assert_allclose(np.cumsum(schedule.alpha), schedule.eta, rtol=1e-12)
        np.testing.assert_allclose(schedule.posterior_coef_xt + schedule.posterior_coef_x0, 1, rtol=1e-12)
        assert schedule.posterior_variance[0] == 0


def test_one_step_is_the_end_of_the_curve() -> None:
    assert ShiftSchedule.released(1).sqrt_eta.tolist() == [0.99]
    assert ShiftSchedule.paper(1).eta.tolist() == pytest.approx([0.999])


def test_arrays_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        RELEASED["journal_T4"].sqrt_eta[0] = 0.5


@pytest.mark.parametrize("sqrt_eta", [[0.5, 0.5], [0.0, 0.5], [0.5, 1.1], []])
def test_bad_sequences_are_refused(sqrt_eta: list[float]) -> None:
    with pytest.raises(ValueError, match="sqrt_eta"):
        ShiftSchedule(np.array(sqrt_eta, dtype=np.float64), kappa=1.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [("steps", 0), ("kappa", -1.0), ("power", 0.0), ("min_noise", 0.0), ("sqrt_eta_end", 1.5)],
)
def test_bad_settings_name_field_and_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"schedule\.{field}.*{value}"):
        ScheduleConfig(**{field: value})  # pyright: ignore[reportArgumentType]


def test_one_step_may_have_no_noise() -> None:
    without = ShiftSchedule.from_config(ScheduleConfig(steps=1, kappa=0.0, sqrt_eta_end=1.0))
    assert (without.sqrt_eta.tolist(), without.noise_std.tolist()) == ([1.0], [0.0])
    for other in ({"steps": 2}, {"steps": 1, "form": "paper"}, {"steps": 1, "trained_steps": 15}):
        with pytest.raises(ValueError, match=r"schedule.kappa must be positive, or 0 with .* got 0.0"):
            ScheduleConfig(kappa=0.0, **other)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("trained", "steps", "kept"),
    [(4, 1, [3]), (4, 2, [1, 3]), (4, 3, [1, 2, 3]), (15, 4, [3, 7, 11, 14]), (15, 5, [2, 5, 8, 11, 14])],
)
def test_a_shortened_chain_goes_through_some_of_the_same_etas_and_begins_where_the_prior_is(
    trained: int, steps: int, kept: list[int]
) -> None:
    whole = ShiftSchedule.released(trained)
    short = whole.shortened(steps)
    assert short.sqrt_eta.tolist() == whole.sqrt_eta[kept].tolist()
    assert short.trained_steps is not None
    assert short.trained_steps.tolist() == kept
    assert short.noise_std[-1] == whole.noise_std[-1]
    assert short.posterior_variance[0] == 0
    assert np.allclose(short.posterior_coef_xt + short.posterior_coef_x0, 1, rtol=0, atol=1e-15)


def test_shortening_twice_keeps_the_indices_of_the_network() -> None:
    twice = ShiftSchedule.released(15).shortened(5).shortened(2)
    assert twice.trained_steps is not None
    assert twice.trained_steps.tolist() == [8, 14]  # the third and the last of 2, 5, 8, 11, 14


def test_all_steps_are_the_chain_itself_and_others_are_refused() -> None:
    whole = ShiftSchedule.released(4)
    assert whole.shortened(4) is whole
    for steps in (0, 5):
        with pytest.raises(ValueError, match=f"steps must lie in 1 to 4 for this model, got {steps}"):
            whole.shortened(steps)
