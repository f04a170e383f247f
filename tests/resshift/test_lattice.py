"""What shows the lattice: zero for textures, known for textures with a known gain at every phase."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from resshift.lattice import lattice


def noise(side: int = 512, seed: int = 0, batch: int = 1) -> Tensor:
    return 0.2 * torch.randn((batch, 1, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_noise_shows_nothing_but_the_luck_of_the_sample() -> None:
    """log of a mean of n squares of normal values has the variance 2 / n; neighbouring differences share values, so a little more."""
    num_per_phase = (512 / 4) ** 2
    assert float(lattice(noise(), 4)) < 2 * 2 / num_per_phase


def test_blur_and_contrast_are_not_seen() -> None:
    x = noise(batch=2)
    smooth = torch.nn.functional.avg_pool2d(x, 5, stride=1)
    assert float(lattice(smooth, 4).max()) < 1e-3
    torch.testing.assert_close(lattice(x, 4), lattice(3 * x, 4), rtol=1e-3, atol=0)


def test_known_gain_of_one_phase() -> None:
    """Noise whose every fourth column is stronger by a: the energies of differences are sums of two gains squared, known for every lag."""
    gain = torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    x = noise(2048) * gain.repeat(512)

    def variance(weights: dict[int, float]) -> float:
        energies = torch.stack([sum((w * gain.roll(-k) ** 2 for k, w in weights.items()), torch.zeros(4, dtype=torch.float64))]).log()
        return float(energies.var(correction=0))

    across, across_2 = variance({0: 1, 1: 1}), variance({0: 1, 2: 1})
    down = variance({0: 2})  # both pixels are in the same column
    expected = [across, down, across, across_2, down, variance({0: 1, 1: 4, 2: 1}), down]
    assert float(lattice(x, 4)) == pytest.approx(sum(expected) / len(expected), rel=0.01)


def test_repeated_pixels_show_it_and_the_truth_does_not() -> None:
    x = noise(64)
    assert float(lattice(x.repeat_interleave(4, 2).repeat_interleave(4, 3), 4)) > 1
    assert float(lattice(noise(256), 4)) < 0.01


def test_rows_and_columns_count_the_same() -> None:
    x = noise(128).repeat_interleave(4, 3)
    torch.testing.assert_close(lattice(x, 4), lattice(x.mT, 4))


def test_pictures_of_a_batch_are_apart_and_channels_together() -> None:
    x = torch.cat([noise(64, seed).repeat_interleave(seed + 1, 3)[..., :64] for seed in range(3)])
    torch.testing.assert_close(lattice(x, 4), torch.cat([lattice(one, 4) for one in x[:, None]]))
    torch.testing.assert_close(lattice(x.repeat(1, 3, 1, 1) / math.sqrt(3), 4), lattice(x, 4))


def test_gradient_of_an_even_picture_is_finite_and_of_a_screen_removes_it() -> None:
    x = torch.zeros((1, 3, 32, 32), requires_grad=True)
    lattice(x, 4).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() == 0
    screen = torch.zeros(1, 1, 64, 64, dtype=torch.float64)
    screen[..., 1::4, 2::4] = 0.1
    x = (0.3 * noise(64) + screen).requires_grad_()
    before = lattice(x, 4).sum()
    before.backward()
    assert x.grad is not None
    assert float((x.grad * screen).sum()) > 0  # less of the screen is less of L
    assert float(lattice(x.detach() - 0.3 * screen, 4)) < before.item()


def test_what_is_smaller_than_two_positions_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at least 8 pixels, two positions, got \(1, 3, 7, 64\)"):
        lattice(torch.zeros(1, 3, 7, 64), 4)
