"""Tiles: with a function that looks at single positions, cutting and blending changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resshift.tiling import cut_axis, map_tiles, plan_tiles, reflect_to

SIZES = [(1, 1), (1, 37), (7, 5), (8, 8), (9, 8), (16, 33), (61, 53)]


def picture(height: int, width: int) -> Tensor:
    return torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(height * 100 + width))


def nearest_x4(x: Tensor) -> Tensor:
    return x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 2), (8, 7), (5, 1), (64, 8)])
@pytest.mark.parametrize("tile_batch", [1, 3])
def test_nearest_x4_is_exact(size: tuple[int, int], tile: int, overlap: int, tile_batch: int) -> None:
    x = picture(*size)
    out = map_tiles(nearest_x4, [(x, 1)], plan_tiles(*size, tile, overlap), output_scale=4, tile_batch=tile_batch)
    torch.testing.assert_close(out, nearest_x4(x), atol=2e-6, rtol=0)  # up to 64 float32 terms a position


@pytest.mark.parametrize("size", SIZES)
def test_planes_of_different_scales_stay_together(size: tuple[int, int]) -> None:
    x = picture(*size)
    plan = plan_tiles(*size, 8, 3)
    out = map_tiles(lambda a, b: b - nearest_x4(a), [(x, 1), (nearest_x4(x), 4)], plan, output_scale=4)
    assert out.abs().max() < 2e-6


@pytest.mark.parametrize("length", range(1, 60))
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 3), (8, 7), (1, 0)])
def test_axis_is_covered_and_weights_sum_to_one(length: int, tile: int, overlap: int) -> None:
    axis = cut_axis(length, tile, overlap)
    total = torch.zeros(length, dtype=torch.float64)
    for i, start in enumerate(axis.starts):
        assert 0 <= start <= length - axis.tile
        total[start : start + axis.tile] += axis.weights(i)
    torch.testing.assert_close(total, torch.ones_like(total))
    assert all(b - a <= tile - overlap for a, b in zip(axis.starts, axis.starts[1:], strict=False))


def test_weights_fade_towards_the_border_of_a_tile() -> None:
    """A tile's own border, where a network has seen the least, counts the least."""
    axis = cut_axis(20, 12, 4)
    assert axis.starts == (0, 8)
    left = axis.weights(0)
    assert torch.equal(left[:8], torch.ones(8, dtype=torch.float64))
    assert (left[8:].diff() < 0).all()
    assert left[-1] < 0.2


def test_a_small_plane_is_one_tile_of_its_own_size() -> None:
    plan = plan_tiles(3, 100, 64, 8)
    assert (plan.rows.tile, plan.rows.starts, plan.columns.tile) == (3, (0,), 64)


@pytest.mark.parametrize(("length", "tile", "overlap"), [(0, 8, 2), (8, 0, 0), (8, 8, 8), (8, 8, -1)])
def test_bad_sizes_are_named(length: int, tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"length {length}, tile {tile}, overlap {overlap}"):
        cut_axis(length, tile, overlap)


def test_reflection_equals_torch_where_torch_can() -> None:
    x = picture(9, 7)
    torch.testing.assert_close(reflect_to(x, 16, 12), torch.nn.functional.pad(x, (0, 5, 0, 7), mode="reflect"))


def test_reflection_goes_on_for_small_pictures() -> None:
    x = torch.tensor([[1.0, 2.0, 3.0]])
    assert reflect_to(x, 2, 8).tolist() == [[1, 2, 3, 2, 1, 2, 3, 2]] * 2
