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
        np.testing.assert_allclose(getattr(schedule, ours), arrays[f"{name}/{theirs}"], atol=1e-12, rtol=0, err_msg=ours)


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


@pytest.mark.parametrize(("field", "value"), [("steps", 0), ("kappa", -1.0), ("power", 0.0), ("min_noise", 0.0), ("sqrt_eta_end", 1.5)])
def test_bad_settings_name_field_and_value(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"schedule\.{field}.*{value}"):
        ScheduleConfig(**{field: value})  # pyright: ignore[reportArgumentType]
