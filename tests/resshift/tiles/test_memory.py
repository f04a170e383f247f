"""Tiles follow from the picture alone; running out of memory is survived and remembered."""

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
from resshift.tiles import memory
from resshift.tiles.memory import Backoff, free_bytes, is_out_of_memory, place_windows, tiles_per_call
from resshift.tiles.plan import choose_tiles
from resshift.tiles.window import in_file
from resshift.training.step import build_network
from resshift.upscaler import Upscaler


def toy() -> Upscaler:
    config = preset("test-x4")
    return Upscaler(config.model, build_network(config), device="cpu")


@pytest.mark.parametrize(("side", "count"), [(8, 4), (64, 4), (72, 3), (128, 1), (256, 1)])
def test_a_call_has_at_most_4_tiles_and_16384_positions(side: int, count: int) -> None:
    """16384 / 72^2 = 3.2; one tile is always allowed."""
    assert tiles_per_call(side**2) == count


def test_free_memory_decides_where_windows_live_and_not_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8)
    expected = toy()(image)
    for free in (1, None):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: free)
        assert place_windows(1, torch.device("cpu")) is in_file
        assert np.array_equal(toy()(image), expected)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 100)
    assert place_windows(51, torch.device("cpu")) is in_file
    assert place_windows(50, torch.device("cpu")) is not in_file


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


def test_only_the_first_of_pictures_that_run_out_together_makes_tiles_smaller() -> None:
    backoff, device = Backoff(), torch.device("cpu")
    plans = {side: choose_tiles(1000, 1000, 8, longest=side) for side in (8, 32, 64)}
    assert all(plan.rows.tile == side for side, plan in plans.items())
    assert backoff.shrink(plans[64], 8, device)
    assert backoff.longest == 32
    assert backoff.shrink(plans[64], 8, device)  # another picture with tiles of 64
    assert backoff.longest == 32
    assert backoff.shrink(plans[32], 8, device)
    assert backoff.longest == 16
    assert not Backoff().shrink(plans[8], 8, device)


class Cramped(torch.nn.Module):
    """Runs out of memory for tiles above 16x16, as a machine would."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[2] * x.shape[3] > 16 * 16:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return self.network(x, t, lq, mask)


@pytest.mark.slow
def test_smaller_tiles_are_tried_noted_and_remembered() -> None:
    image = np.random.default_rng(1).integers(0, 256, (50, 50, 3), np.uint8)
    up = toy()
    up.chain.unet = Cramped(up.chain.unet)
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
