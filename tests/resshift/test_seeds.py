"""Random streams are named, and noise is a function of position."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from resshift.seeds import derive, philox, torch_generator
from resshift.tiles.noise import NoiseField


def test_parts_are_told_apart() -> None:
    streams = [(1,), ("1",), (1, 1), (11,), ("ab", "c"), ("a", "bc"), ("abc",), (-1,), (2**70,)]
    assert len({derive(*parts) for parts in streams}) == len(streams)


@pytest.mark.parametrize("part", [True, 1.0, None])
def test_other_types_are_refused(part: object) -> None:
    with pytest.raises(TypeError, match="must be an int or a str"):
        derive(part)  # pyright: ignore[reportArgumentType]


def test_the_hash_is_the_key_of_the_generator() -> None:
    expected = np.random.Generator(np.random.Philox(key=derive(7, "a")))
    assert philox(7, "a").random(5).tolist() == expected.random(5).tolist()


def test_streams_are_stable_across_versions() -> None:
    """A golden value: if it changes, every shipped degradation and every resumed run changes."""
    assert derive(7, "degrade", 3, "n01440764_10026") == 270066222766085891432718434766375339892
    assert philox(0, "golden").integers(0, 1000, 4).tolist() == [907, 684, 142, 429]


@pytest.mark.parametrize(
    "window", [(0, 0, 5, 5), (60, 3, 10, 80), (64, 64, 64, 64), (1, 127, 140, 2), (149, 149, 1, 1)]
)
def test_noise_depends_on_the_position_alone(window: tuple[int, int, int, int]) -> None:
    field = NoiseField(5, "picture", channels=2)
    top, left, height, width = window
    whole = field.window(3, 0, 0, 150, 150)
    assert torch.equal(field.window(3, *window), whole[:, top : top + height, left : left + width])


def test_noise_goes_on_above_and_left_of_the_origin() -> None:
    field = NoiseField(5, "picture", channels=1, block_px=8)
    around = field.window(0, -11, -20, 30, 30)
    assert torch.equal(field.window(0, 0, 0, 19, 10), around[:, 11:, 20:])
    assert torch.equal(field.window(0, -9, -17, 3, 4), around[:, 2:5, 3:7])
    assert around.unique().numel() == around.numel()  # no block stands for another


def test_latent_gets_the_noise_of_its_step() -> None:
    field = NoiseField(5, "picture", channels=2)
    assert torch.equal(field.for_latent(9, 70)(3)[0], field.window(3, 0, 0, 9, 70))


def test_torch_streams_follow_from_their_name() -> None:
    draws = [
        torch.rand(4, generator=torch_generator(*parts)).tolist()
        for parts in ((1, "a"), (1, "a"), (1, "b"), ("1", "a"))
    ]
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 3


def test_noise_is_standard_normal_and_differs_by_step_and_name() -> None:
    field = NoiseField(5, "picture", channels=3)
    a, b, c = (
        field.window(0, 0, 0, 200, 200),
        field.window(1, 0, 0, 200, 200),
        NoiseField(6, "picture", channels=3).window(0, 0, 0, 200, 200),
    )
    for noise in (a, b, c):
        assert abs(noise.mean().item()) < 0.02
        assert abs(noise.std().item() - 1) < 0.02
    for x, y in ((a, b), (a, c), (a[0:1], a[1:2])):
        assert abs((x * y).mean().item()) < 0.02  # uncorrelated
