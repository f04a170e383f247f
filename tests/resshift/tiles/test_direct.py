"""One network from picture to picture: tiles, memory, colours, and company, with answers that are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from resshift import weights
from resshift.config import OptionError, Sampling
from resshift.images import Picture, from_tensor, to_tensor
from resshift.networks.config import ForeignConfig, RegressionConfig
from resshift.networks.regression import RegressionNet
from resshift.tiles.batching import Batcher
from resshift.tiles.colour_fix import WaveletFix
from resshift.tiles.direct import Windows
from resshift.tiles.plan import reflected
from resshift.tiles.window import in_file, in_memory
from resshift.upscaler import Upscaler

SMALL = RegressionConfig(channels=8, half_channels=8, blocks_before=0, half_blocks=1, blocks_after=1)
CPU = torch.device("cpu")


def regression() -> Upscaler:
    """The regression network with a last layer that is not zero."""
    torch.manual_seed(0)
    network = RegressionNet(SMALL)
    nn.init.normal_(network.head.weight, std=0.1)
    return Upscaler(SMALL, network, device="cpu")


class Computed(nn.Module):
    """A network without weights."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, lq: Tensor) -> Tensor:
        return self.function(lq)


def nearest(scale: int) -> Callable[[Tensor], Tensor]:
    return lambda lq: F.interpolate(lq, scale_factor=scale, mode="nearest")


def foreign(function: Callable[[Tensor], Tensor], scale: int = 4, **fields: Any) -> Upscaler:
    config = ForeignConfig(architecture="Test", scale=scale, **fields)
    return Upscaler(config, Computed(function), device="cpu")


def pixels_of(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> NDArray[Any]:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def tensor_of(height: int, width: int) -> Tensor:
    return to_tensor(pixels_of(height, width))


def test_a_directory_of_the_regression_network_is_a_model(tmp_path: Path) -> None:
    up, pixels = regression(), pixels_of(30, 20)
    weights.save_model(tmp_path / "model", "ours", SMALL, up.renderer.network)  # type: ignore[attr-defined]
    loaded = Upscaler.from_pretrained(tmp_path / "model", device="cpu")
    assert (loaded.name, loaded.config) == ("ours", SMALL)
    assert np.array_equal(loaded(pixels), up(pixels))


@pytest.mark.parametrize("size", [(90, 66), (130, 45), (64, 200)])
@torch.inference_mode()
def test_tiles_of_the_regression_network_are_the_whole_picture(size: tuple[int, int]) -> None:
    up, lq = regression(), tensor_of(*size)
    plan = up.plan(*size, Sampling(tile_px=SMALL.smallest_tile_px))
    assert plan.num_tiles > 4
    tiled = up.upscale_tensor(lq, Sampling(tile_px=SMALL.smallest_tile_px))
    extended = lq[:, :, :, reflected(size[1], size[1] + size[1] % 2)]
    whole = up.renderer.predict(extended)[..., : 4 * size[1]].clamp(-1, 1)  # type: ignore[attr-defined]
    # Of the order of rounding; one row fewer of context shows as 1e-3 (the next test).
    torch.testing.assert_close(tiled, whole, atol=5e-6, rtol=0)
    # Kernels of AVX2 round by the place in a row: bits are equal where the plan has one tile.
    unasked = up.upscale_tensor(lq)
    torch.testing.assert_close(unasked, whole, atol=5e-6, rtol=0)
    assert torch.equal(unasked, whole) or up.plan(*size, Sampling()).num_tiles > 1


def test_results_near_the_edge_of_a_tile_are_not_used() -> None:
    """Where a network would see the edge it answers nonsense; only that of the picture itself is seen."""
    reach = SMALL.reach_px
    assert reach % 2

    def spoilt(lq: Tensor) -> Tensor:
        inside = lq[..., reach:-reach, reach:-reach]
        return nearest(4)(F.pad(inside, (reach,) * 4, value=1e6))

    up = Upscaler(SMALL, Computed(spoilt), device="cpu")
    lq = tensor_of(101, 140)
    sampling = Sampling(tile_px=SMALL.smallest_tile_px + 3)
    assert up.plan(101, 140, sampling).num_tiles > 4
    inside = (..., slice(4 * reach, -4 * (reach + 1)), slice(4 * reach, -4 * reach))
    torch.testing.assert_close(
        up.upscale_tensor(lq, sampling)[inside], nearest(4)(lq)[inside], atol=2e-7, rtol=0
    )


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("multiple", [1, 6])
@pytest.mark.parametrize("tile_px", [None, 24])
def test_a_network_of_single_pixels_gives_what_it_gives_for_the_whole(
    scale: int, multiple: int, tile_px: int | None
) -> None:
    shapes: set[tuple[int, ...]] = set()

    def network(lq: Tensor) -> Tensor:
        shapes.add(tuple(lq.shape[-2:]))
        return nearest(scale)(lq)

    up, lq = foreign(network, scale, size_multiple=multiple), tensor_of(61, 40)
    out = up.upscale_tensor(lq, Sampling(tile_px=tile_px))
    torch.testing.assert_close(out, nearest(scale)(lq), atol=2e-7, rtol=0)
    assert all(side % multiple == 0 and side <= (tile_px or 66) for shape in shapes for side in shape)
    assert len(shapes) == 1


def test_all_tiles_lie_on_the_grid_of_the_network() -> None:
    """A network that answers the place of a pixel in a cell of 4 x 4, as one that unshuffles may."""

    def places(lq: Tensor) -> Tensor:
        rows, columns = (torch.arange(side) % 4 / 8 for side in lq.shape[-2:])
        return (rows[:, None] + columns).expand(len(lq), 3, -1, -1)

    up = foreign(places, 1, size_multiple=4)
    out = up.upscale_tensor(tensor_of(83, 70), Sampling(tile_px=20))
    torch.testing.assert_close(out, places(torch.zeros(1, 3, 83, 70)), atol=2e-7, rtol=0)


@pytest.mark.parametrize(
    ("channels", "dtype"), [(3, np.uint8), (3, np.uint16), (1, np.uint16), (4, np.uint8)]
)
def test_pixels_keep_their_depth_channels_and_alpha(channels: int, dtype: type) -> None:
    pixels = pixels_of(20, 30, channels, dtype)
    if channels == 4:
        pixels[..., 3] = np.iinfo(dtype).max  # colours of hidden pixels are filled
    out = foreign(nearest(1), 1)(pixels)
    assert out.dtype == dtype
    assert np.array_equal(out, pixels)
    assert foreign(nearest(2), 2)(pixels, outscale=3).shape == (60, 90, channels)


def test_a_network_that_enlarges_gets_the_colours_of_the_input_and_one_that_restores_keeps_its_own() -> None:
    pixels = np.full((30, 20, 3), 100, np.uint8)
    brighter = 2 * 20 / 255
    assert np.all(foreign(lambda lq: nearest(2)(lq) + brighter, 2)(pixels) == 100)
    assert np.all(foreign(lambda lq: lq + brighter, 1)(pixels) == 120)


def test_the_colour_fix_is_that_of_every_model() -> None:
    pixels = pixels_of(50, 23)
    fixed = WaveletFix(50, 3).push(nearest(3)(to_tensor(pixels).sin())[0], to_tensor(pixels)[0]).clamp(-1, 1)
    out = foreign(lambda lq: nearest(3)(lq.sin()), 3).upscale(Picture(pixels=pixels), Sampling(tile_px=16))
    assert np.abs(out.pixels.astype(int) - from_tensor(fixed).astype(int)).max() <= 1


def test_seeds_do_nothing_and_steps_are_refused() -> None:
    up, pixels = regression(), pixels_of(20, 20)
    assert np.array_equal(up(pixels, seed=1), up(pixels, seed=2, steps=1))
    with pytest.raises(OptionError, match="steps must lie in 1 to 1"):
        up(pixels, steps=2)
    with pytest.raises(OptionError, match=f"tile_px must be at least {SMALL.smallest_tile_px}"):
        up(pixels, tile_px=SMALL.smallest_tile_px - 1)
    with pytest.raises(ValueError, match="custom has no chain"):
        _ = up.chain


@pytest.mark.parametrize("make", [regression, lambda: foreign(nearest(4))])
def test_a_picture_has_the_same_bytes_alone_and_beside_others(
    make: Callable[[], Upscaler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With calls of four tiles, as on a GPU."""
    monkeypatch.setattr(Upscaler, "shares_calls", True)
    up, sampling = make(), Sampling(tile_px=SMALL.smallest_tile_px, tile_batch=4)
    pictures = [Picture(pixels=pixels_of(60, 40 + 30 * i)) for i in range(3)]
    batcher = Batcher()
    futures = [batcher.submit(up.upscaling(picture, sampling)) for picture in pictures]
    while batcher.turn():
        pass
    for picture, future in zip(pictures, futures, strict=True):
        assert np.array_equal(future.result().value.pixels, make().upscale(picture, sampling).pixels)


def test_smaller_tiles_are_tried_when_memory_runs_out() -> None:
    def cramped(lq: Tensor) -> Tensor:
        if lq.shape[2] * lq.shape[3] > 24 * 24:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return nearest(2)(lq)

    up, pixels = foreign(cramped, 2), pixels_of(90, 70)
    result = up.upscale(Picture(pixels=pixels))
    assert result.notes == ("tiles of at most 16 px: memory ran out",)
    assert np.array_equal(result.pixels, foreign(nearest(2), 2)(pixels, tile_px=16))


def test_tiles_of_a_network_that_should_see_the_whole_picture_are_large_and_noted() -> None:
    up = foreign(nearest(1), 1, tiling="discouraged")
    assert up.upscale(Picture(pixels=pixels_of(400, 500))).notes == ()
    picture = Picture(pixels=pixels_of(700, 20))
    note = "this model should see a picture whole, and saw tiles of 382 px"
    assert up.upscale(picture).notes == (note,)
    assert up.upscale(picture, Sampling(tile_px=700)).notes == ()


def test_windows_do_not_grow_with_the_height_of_the_picture_and_may_live_in_files() -> None:
    up = regression()
    plans = [up.plan(height, 60, Sampling(tile_px=SMALL.smallest_tile_px)) for height in (400, 4000)]
    sizes = [Windows(SMALL, plan, in_memory(torch.device("meta"))).num_bytes for plan in plans]
    assert sizes[0] == sizes[1]

    lq = tensor_of(80, 60)
    in_ram = up.upscale_tensor(lq, Sampling(tile_px=SMALL.smallest_tile_px))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("resshift.tiles.direct.place_windows", lambda num_bytes, device: in_file)
        assert torch.equal(up.upscale_tensor(lq, Sampling(tile_px=SMALL.smallest_tile_px)), in_ram)
