"""Tiles follow from the picture and the budget; running out of memory is survived and remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from resshift.config import Sampling
from resshift.images import Picture
from resshift.presets import preset
from resshift.tiles.memory import (
    Backoff,
    MemoryBudgetError,
    bytes_alive,
    free_bytes,
    is_out_of_memory,
    plan_for,
    tiles_per_call,
)
from resshift.training.step import build_network
from resshift.upscaler import Upscaler


def toy(budget: int | None = None) -> Upscaler:
    config = preset("test-x4")
    return Upscaler(config.model, build_network(config), device="cpu", memory_budget_bytes=budget)


def test_bytes_alive_counts_what_lives_at_one_time() -> None:
    def call() -> Tensor:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = b.view(10, 100) * 2  # a view is no memory: 8000
        del b
        return c.double()  # 12000

    assert bytes_alive(call) == 12_000


def test_bytes_alive_ignores_what_was_there_before() -> None:
    x = torch.zeros(1000)
    assert bytes_alive(lambda: x.add_(1)) == 0


@pytest.mark.parametrize("size", [(1, 1), (100, 250), (256, 256)])
def test_a_picture_that_fits_is_one_tile(size: tuple[int, int]) -> None:
    plan = plan_for(size, 32)
    assert plan is not None
    assert plan.num_tiles == 1


def test_the_plan_is_the_largest_that_costs_little_more_than_the_cheapest() -> None:
    """A 256x256 latent costs 65536 (1 + 65536 / a) whole and 102400 (1 + 4096 / a) in 25 tiles of 64: for a =
    60000 1.25 times as much.
    """
    whole, cut = (
        plan_for((256, 256), 64, attention_positions=80_000),
        plan_for((256, 256), 64, attention_positions=60_000),
    )
    assert whole is not None
    assert cut is not None
    assert (whole.num_tiles, cut.num_tiles, cut.rows.tile) == (1, 25, 64)


@pytest.mark.parametrize(
    ("side", "most", "count"),
    [
        (8, 4**9, 4),
        (64, 4**9, 4),
        (72, 4**9, 3),
        (128, 4**9, 1),
        (256, 4**9, 1),
        (64, 3 * 4096, 3),
        (64, 1, 1),
    ],
)
def test_a_call_has_at_most_4_tiles_and_16384_positions_and_fits(side: int, most: int, count: int) -> None:
    """16384 / 72^2 = 3.2; one tile is always allowed: whether it fits is the plan's business."""
    assert tiles_per_call(side**2, lambda positions: positions <= most) == count


def test_only_what_fits_is_taken() -> None:
    plan = plan_for((300, 300), 32, fits=lambda area: area <= 64 * 64)
    assert plan is not None
    assert plan.tile_area <= 64 * 64
    assert plan_for((300, 300), 32, fits=lambda _: False) is None


def test_a_budget_below_one_tile_is_an_error_that_says_what_is_needed() -> None:
    least = toy(1)
    with pytest.raises(MemoryBudgetError, match=r"must be at least \d+ for this model, got 1"):
        least(np.zeros((8, 8, 3), np.uint8))
    needed = least.footprint().tile_bytes(8 * 8)
    assert toy(needed)(np.zeros((8, 8, 3), np.uint8)).shape == (32, 32, 3)
    with pytest.raises(MemoryBudgetError, match="with tile_px 64"):
        toy(needed)(np.zeros((80, 80, 3), np.uint8), tile_px=64)


def test_the_budget_decides_the_tiles_and_the_free_memory_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8)
    expected = toy()(image)
    monkeypatch.setattr("resshift.upscaler.free_bytes", lambda _: 1)  # windows go to files
    assert np.array_equal(toy()(image), expected)
    small = toy(toy().footprint().tile_bytes(16 * 16))
    assert small.plan(60, 40).tile_area <= 16 * 16


def test_free_memory_is_found() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is None or free > 2**20


@dataclass
class Crowded:
    """Doubles its input, and runs out of memory for more than `most` tiles."""

    most: int
    sizes: list[int] = field(default_factory=list)

    def __call__(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 2 * x


def test_running_out_halves_the_batch_and_is_remembered() -> None:
    backoff, function, x = Backoff(), Crowded(2), torch.arange(16.0).view(8, 1, 1, 2)
    assert torch.equal(backoff.call(function, x), 2 * x)
    assert function.sizes == [8, 4, 2, 2, 2, 2]
    function.sizes.clear()
    assert torch.equal(backoff.call(function, x), 2 * x)
    assert function.sizes == [2, 2, 2, 2]


def test_one_tile_that_does_not_fit_and_other_errors_are_raised() -> None:
    with pytest.raises(torch.OutOfMemoryError):
        Backoff().call(Crowded(0), torch.zeros(4, 1, 1, 1))

    def wrong(_: Tensor) -> Tensor:
        raise ValueError("not memory")

    with pytest.raises(ValueError, match="not memory"):
        Backoff().call(wrong, torch.zeros(4, 1, 1, 1))
    assert is_out_of_memory(
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    )
    assert not is_out_of_memory(RuntimeError("shapes differ"))


class Cramped(torch.nn.Module):
    """Runs out of memory for tiles above 16x16, as a machine would."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[2] * x.shape[3] > 16 * 16:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return self.network(x, t, lq, mask)


def test_smaller_tiles_are_tried_noted_and_remembered() -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 50, 3), np.uint8)
    up = toy()
    up.unet = Cramped(up.unet)
    result = up.upscale(Picture(pixels=image))
    assert result.notes == ("tiles of at most 8 px: memory ran out",)
    assert np.array_equal(result.pixels, toy()(image, tile_px=8))
    assert up.plan(50, 50).rows.tile == 8


def test_enlargement_beyond_the_model_is_noted() -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    assert toy().upscale(Picture(pixels=pixels), Sampling(outscale=8)).notes == (
        "x8 is the model's x4 enlarged by bicubic interpolation",
    )
    assert toy().upscale(Picture(pixels=pixels), Sampling(outscale=3)).notes == ()
