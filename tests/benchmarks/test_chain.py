"""What seeds and steps do: the measures, on pictures whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from tests.scripts import load_script

chain = load_script("benchmarks/chain.py")


def test_the_spread_is_the_standard_deviation_over_seeds() -> None:
    pictures = [np.full((20, 30, 3), level, np.uint8) for level in (100, 104, 108)]
    assert chain.spread(pictures) == pytest.approx(4.0)
    assert chain.spread([pictures[0]] * 2) == 0
    with pytest.raises(ValueError, match="at least two pictures, got 1"):
        chain.spread(pictures[:1])


def test_detail_is_spread_without_shift_and_another_tone_is_both() -> None:
    rng = np.random.default_rng(0)
    flat = np.full((64, 70, 3), 128, np.uint8)
    noisy = [(flat + rng.normal(0, 10, flat.shape)).round().astype(np.uint8) for _ in range(2)]
    assert chain.spread(noisy) == pytest.approx(10 * (2 / np.pi) ** 0.5, rel=0.03)  # two samples: |x - y| / 2
    assert chain.shift(*noisy) < 1
    assert chain.shift(flat, flat + np.uint8(7)) == pytest.approx(7.0)
