"""Drawn training pictures follow from seed and number, and have letters that can be read on their paper."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scripts import load_script

drawings = load_script("benchmarks/drawings.py")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawings, "SIDE_PX", 96)


@pytest.mark.parametrize("number", range(4))
def test_a_picture_follows_from_seed_and_number(number: int) -> None:
    picture = drawings.drawing(7, number)
    assert picture.shape == (drawings.SIDE_PX, drawings.SIDE_PX, 3)
    assert (picture == drawings.drawing(7, number)).all()
    assert (picture != drawings.drawing(8, number)).any()
    assert np.ptp(picture.sum(-1, dtype=np.int64)) > 200


def test_ink_is_readable_on_any_paper() -> None:
    for number in range(400):
        canvas = drawings.Drawing(0, number)
        assert abs(sum(canvas.paper) - sum(canvas.ink)) > 200
