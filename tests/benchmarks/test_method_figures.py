"""The figures of docs/method.md are those that the code draws."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from resshift.schedule import ShiftSchedule
from tests.scripts import load_script

figures = load_script("benchmarks/method_figures.py")


def test_the_figures_in_the_document_are_drawn_by_this_code() -> None:
    assert figures.SCHEDULE.read_text() == figures.schedule_svg()
    stored = np.asarray(Image.open(figures.CHAIN))
    drawn = figures.chain_pictures()
    assert stored.shape == drawn.shape
    assert np.abs(stored.astype(int) - drawn).max() <= 2  # CPUs round the made picture differently


def test_curves_are_those_of_the_schedule() -> None:
    (_, by_power), (_, by_kappa) = figures.curves()
    times, values = by_power["p = 0.3, T = 4"]
    assert times == [0.25, 0.5, 0.75, 1.0]
    assert values == pytest.approx((ShiftSchedule.released(4).sqrt_eta ** 2).tolist())
    assert by_kappa["kappa = 2.0"][1][-1] == pytest.approx(2 * 0.99)
