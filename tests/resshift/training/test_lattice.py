"""What shows the lattice: nothing in textures, a known amount in textures with a known gain at every phase or
with a known sine.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from resshift.training.lattice import beads, lattice, lines, patterns, screen, unevenness, weave


def noise(side: int = 512, seed: int = 0, batch: int = 1) -> Tensor:
    return 0.2 * torch.randn(
        (batch, 1, side, side), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def sine(amplitude: float, period: float, side: int = 512) -> Tensor:
    wave = torch.sin(2 * math.pi * torch.arange(side, dtype=torch.float64) / period)
    return amplitude * wave.expand(1, 1, side, side)


def test_noise_shows_nothing_but_the_luck_of_the_sample() -> None:
    """log of a mean of n squares of normal values has the variance 2 / n; neighbouring differences share
    values, so a little more.
    """
    num_per_phase = (512 / 4) ** 2
    assert float(unevenness(noise(), 4)) < 2 * 2 / num_per_phase
    assert float(lines(noise(), 4)) < 0.03


def test_blur_and_contrast_are_not_seen() -> None:
    x = noise(batch=2)
    smooth = torch.nn.functional.avg_pool2d(x, 5, stride=1)
    assert float(unevenness(smooth, 4).max()) < 1e-3
    torch.testing.assert_close(lattice(x, 4), lattice(3 * x, 4), rtol=1e-3, atol=1e-4)


def test_known_line() -> None:
    """A wave of amplitude a adds a^2 / 4 (sum of w w')^2 to the s^2 (sum of w^2 w'^2) that noise of sigma s
    has at its frequency.

    The bins beside it in each axis have half the amplitude, so the nine bins hold 2.25 times that.
    """
    amplitude, sigma = 0.4, 0.2
    expected: list[float] = []
    for size in (32, 64):
        window = torch.hann_window(size, dtype=torch.float64)
        line = amplitude**2 / 4 * float(window.sum()) ** 4
        expected.append(math.log(1 + 2.25 / 9 * line / (sigma**2 * float(window.square().sum()) ** 2)))
    # Two of the fifteen frequencies have it, 1/4 and 3/4 across.
    assert float(lines(noise() + sine(amplitude, 4), 4)) == pytest.approx(
        2 / 15 * sum(expected) / 2, abs=0.03
    )
    assert sum(expected) / 2 > 2


def test_screen_of_a_known_line() -> None:
    """The bins around a wave have 1, 1/4 and 1/16 of its power; a logarithm of noise is Euler's constant
    below that of its mean.
    """
    amplitude, sigma, side = 0.4, 0.2, 512
    window = torch.hann_window(side, dtype=torch.float64)
    line = amplitude**2 / 4 * float(window.sum()) ** 4 / (sigma**2 * float(window.square().sum()) ** 2)
    excess = math.log(line) - (4 * math.log(4) + 4 * math.log(16)) / 9 + 0.5772
    # Two of the fifteen frequencies have it; the others have what luck there is in means over nine bins of
    # four pictures.
    assert float(screen(noise(batch=4) + sine(amplitude, 4), 4)) == pytest.approx(2 / 15 * excess, abs=0.15)
    assert excess > 8


def test_screen_of_noise_goes_away_with_the_number_of_pictures() -> None:
    few, many = (float(screen(noise(128, batch=batch), 4)) for batch in (4, 64))
    assert few < 0.3
    assert many < 0.08


def test_screen_does_not_depend_on_contrast_and_takes_any_size() -> None:
    x = noise(batch=2) + sine(0.02, 4)
    torch.testing.assert_close(screen(x, 4), screen(3 * x, 4), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(screen(x[..., :-4, :-8], 4), screen(x[..., :-3, :-5], 4))


def test_weave_of_a_known_line() -> None:
    """Windows of four periods: the line has 1, 1/4 and 1/16 of its power in the bins around it and none two
    bins away.
    """
    amplitude, sigma, period = 0.4, 0.2, 16
    window = torch.hann_window(4 * period, dtype=torch.float64)
    line = amplitude**2 / 4 * float(window.sum()) ** 4 / (sigma**2 * float(window.square().sum()) ** 2)
    excess = math.log(line) - (4 * math.log(4) + 4 * math.log(16)) / 9 + 0.5772
    found, chance = (
        float(weave(noise(batch=2) + one, period)) for one in (sine(amplitude, period), torch.zeros(1))
    )
    assert found - chance == pytest.approx(2 / 255 * (excess + 4 * (excess - 1)), rel=0.1)
    assert excess > 3


def test_weave_finds_a_tile_that_is_repeated_in_even_areas_only() -> None:
    """Detail elsewhere, twenty times as strong, does not hide it."""
    tile = 0.05 * noise(16, seed=5)  # 1.3 levels of 255
    x = noise(128, batch=8)
    faint = x.clone()
    faint[:4] = 1e-3 * x[:4] + tile.repeat(1, 1, 8, 8)
    assert float(weave(faint, 16)) == pytest.approx(float(weave(faint[:4], 16)) / 2, rel=0.05)
    assert float(weave(faint, 16)) > 10 * float(weave(x, 16))


def test_weave_of_noise_goes_away_with_the_number_of_windows() -> None:
    few, many = (float(weave(noise(128, batch=batch), 16)) for batch in (2, 64))
    assert many < 0.1 < few < 0.3


def test_weave_does_not_depend_on_where_a_picture_begins() -> None:
    x = noise(256) + noise(16, seed=1).repeat(1, 1, 16, 16)
    torch.testing.assert_close(
        weave(x[..., 5:197, 3:195], 16), weave(x[..., :192, :192], 16), rtol=0.1, atol=0
    )


def test_patterns_have_the_coarse_level_where_there_is_one() -> None:
    x = noise(128) + 0.1 * noise(16, seed=1).repeat(1, 1, 8, 8)
    fine = lattice(x, 4).mean() + screen(x, 4) / 2 + 10 * beads(x, 4)
    torch.testing.assert_close(patterns(x, 4, 4), fine)
    torch.testing.assert_close(patterns(x, 4, 8), fine + weave(x, 8))
    torch.testing.assert_close(patterns(x, 4, 16), fine + weave(x, 8) + weave(x, 16))


@pytest.mark.parametrize("is_across", [False, True])
def test_beads_of_a_known_row(is_across: bool) -> None:
    """Four lines of a picture of noise have a wave of four pixels: k = 1 and 3 of their segments. The bins
    next to a line have 1/4 of its power, those two away none.
    """
    amplitude, sigma, side = 0.4, 0.02, 128
    x = sigma / 0.2 * noise(side)
    window = torch.hann_window(32, dtype=torch.float64)
    line = amplitude**2 / 4 * float(window.sum()) ** 2 / (sigma**2 * float(window.square().sum()))
    excess = math.log(line) - 2 * math.log(4) / 3 + 1 / 8  # the log of a mean of four is about 1/8 below
    beaded = x.clone()
    beaded[..., 32:36, :] += sine(amplitude, 4, side)[..., 32:36, :]
    beaded = beaded.mT if is_across else beaded
    expected = 2 / 3 * 4 / side / 2 * (excess - 1)
    assert float(beads(beaded, 4)) - float(beads(x, 4)) == pytest.approx(expected, rel=0.05)


def test_edges_and_noise_have_hardly_any_beads() -> None:
    x = noise(256)
    stripes = torch.zeros_like(x)
    stripes[..., 40:45] = stripes[..., 100:101] = 1.0
    assert float(beads(x, 4)) < 0.01
    assert float(beads(0.01 * x + stripes, 4)) < 0.02


def test_a_hatched_stripe_is_seen_among_many_windows() -> None:
    """One stripe of sixteen pixels, hatched every eight, in one of eight pictures of detail."""
    x = noise(128, batch=8)
    hatched = x.clone()
    rows = torch.arange(128, dtype=torch.float64)[:, None]
    hatched[0, :, :, 32:48] = 0.01 * x[0, :, :, 32:48] + 0.1 * torch.sin(2 * math.pi * rows / 8)
    even = x.clone()
    even[0, :, :, 32:48] = 0.01 * x[0, :, :, 32:48]
    assert float(weave(hatched, 8)) > float(weave(even, 8)) + 0.005


def test_texture_that_is_stronger_at_a_phase_has_no_lines() -> None:
    gain = torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64).repeat(128)
    assert float(unevenness(noise() * gain, 4)) > 0.1
    assert float(lines(noise() * gain, 4)) < 0.03


@pytest.mark.parametrize("period", [3, 6, 7])
def test_waves_of_another_period_are_not_meant(period: int) -> None:
    assert float(lines(noise() + sine(0.2, period), 4)) < 0.05


@pytest.mark.slow
def test_known_gain_of_one_phase() -> None:
    """Noise whose every fourth column is stronger by a: the energies of differences are sums of two gains
    squared, known for every lag.
    """
    gain = torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    x = noise(2048) * gain.repeat(512)

    def variance(weights: dict[int, float]) -> float:
        energies = torch.stack(
            [sum((w * gain.roll(-k) ** 2 for k, w in weights.items()), torch.zeros(4, dtype=torch.float64))]
        ).log()
        return float(energies.var(correction=0))

    across, across_2 = variance({0: 1, 1: 1}), variance({0: 1, 2: 1})
    down = variance({0: 2})  # both pixels are in the same column
    expected = [across, down, across, across_2, down, variance({0: 1, 1: 4, 2: 1}), down]
    assert float(unevenness(x, 4)) == pytest.approx(sum(expected) / len(expected), rel=0.01)


def test_repeated_pixels_show_it_and_the_truth_does_not() -> None:
    x = noise(64)
    assert float(lattice(x.repeat_interleave(4, 2).repeat_interleave(4, 3), 4)) > 1
    assert float(lattice(noise(256), 4)) < 0.05


def test_rows_and_columns_count_the_same() -> None:
    x = noise(128).repeat_interleave(4, 3)
    torch.testing.assert_close(lattice(x, 4), lattice(x.mT, 4))


def test_pictures_of_a_batch_are_apart_and_channels_together() -> None:
    x = torch.cat([noise(64, seed).repeat_interleave(seed + 1, 3)[..., :64] for seed in range(3)])
    torch.testing.assert_close(lattice(x, 4), torch.cat([lattice(one, 4) for one in x[:, None]]))
    torch.testing.assert_close(
        lattice(x.repeat(1, 3, 1, 1) / math.sqrt(3), 4), lattice(x, 4), rtol=0.01, atol=0
    )


def test_gradient_of_an_even_picture_is_finite_and_of_a_screen_removes_it() -> None:
    x = torch.zeros((1, 3, 64, 64), requires_grad=True)
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


def test_a_wave_is_seen_in_a_small_picture() -> None:
    """Where only the small windows fit often enough."""
    assert float(lines(noise(64) + sine(0.4, 4, 64), 4)) > 2 * float(lines(noise(64), 4)) > 0


@pytest.mark.parametrize(("side", "period"), [(63, 4), (64, 1)])
def test_what_is_too_small_is_refused(side: int, period: int) -> None:
    with pytest.raises(
        ValueError, match=rf"sides of 16 periods at least, got period {period} and \(1, 3, {side}, 64\)"
    ):
        lattice(torch.zeros(1, 3, side, 64), period)
    with pytest.raises(ValueError, match="sides of 16 periods"):
        screen(torch.zeros(1, 3, side, 64), period)


def test_a_weave_needs_four_periods() -> None:
    with pytest.raises(ValueError, match=r"4 periods at least, got period 16 and \(1, 3, 64, 63\)"):
        weave(torch.zeros(1, 3, 64, 63), 16)
