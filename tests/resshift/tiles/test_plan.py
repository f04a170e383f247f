"""Tiles: with a function that looks at single positions, cutting and blending changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from resshift.tiles.plan import TilePlan, choose_tiles, cut_axis, plan_tiles, reflected

SIZES = [(1, 1), (1, 37), (7, 5), (8, 8), (9, 8), (16, 33), (61, 53)]


def picture(height: int, width: int) -> Tensor:
    return torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(height * 100 + width))


def nearest_x4(x: Tensor) -> Tensor:
    return x.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)


def blended(x: Tensor, plan: TilePlan, scale: int) -> Tensor:
    """Enlarge tile by tile and blend."""
    out = torch.zeros(1, 3, plan.rows.length * scale, plan.columns.length * scale)
    for i_row, top in enumerate(plan.rows.starts):
        for i_column, left in enumerate(plan.columns.starts):
            weight = torch.outer(
                plan.rows.weights(i_row, scale), plan.columns.weights(i_column, scale)
            ).float()
            tile = nearest_x4(x[..., top : top + plan.rows.tile, left : left + plan.columns.tile])
            bottom, right = (top + plan.rows.tile) * scale, (left + plan.columns.tile) * scale
            out[..., top * scale : bottom, left * scale : right] += tile * weight
    return out


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 2), (8, 7), (5, 1), (64, 8)])
def test_nearest_x4_is_exact(size: tuple[int, int], tile: int, overlap: int) -> None:
    x = picture(*size)
    torch.testing.assert_close(
        blended(x, plan_tiles(*size, tile, overlap), 4), nearest_x4(x), atol=2e-6, rtol=0
    )


@pytest.mark.parametrize(("tile", "overlap"), [(8, 0), (8, 3), (8, 7), (1, 0)])
def test_axis_is_covered_and_weights_sum_to_one(tile: int, overlap: int) -> None:
    for length in range(1, 60):
        axis = cut_axis(length, tile, overlap)
        total = torch.zeros(length, dtype=torch.float64)
        for i, start in enumerate(axis.starts):
            assert 0 <= start <= length - axis.tile
            total[start : start + axis.tile] += axis.weights(i)
        torch.testing.assert_close(total, torch.ones_like(total), msg=f"length {length}")
        assert all(b - a <= tile - overlap for a, b in zip(axis.starts, axis.starts[1:], strict=False))


def test_tiles_are_as_few_and_as_short_as_the_overlap_allows() -> None:
    for length in range(1, 300, 7):
        axis = cut_axis(length, 64, 8, 16)
        count = len(axis.starts)
        assert axis.tile % 16 == 0
        assert axis.tile <= 64
        assert count == 1 or (count - 1) * 56 + 8 < length  # one fewer would not reach
        assert count == 1 or (axis.tile - 16) * count - 8 * (count - 1) < length  # nor would shorter ones
        assert axis.length == (length if count > 1 else -(-length // 16) * 16)


def test_tiles_on_a_grid_start_on_it_and_share_what_they_should() -> None:
    for length in range(1, 300, 7):
        axis = cut_axis(length, 64, 9, 8, step=4)
        assert all(start % 4 == 0 for start in axis.starts)
        assert axis.length == max(-(-length // 4) * 4, axis.tile if len(axis.starts) == 1 else 0)
        assert axis.starts[-1] + axis.tile == axis.length
        assert all(b - a <= axis.tile - 12 for a, b in zip(axis.starts, axis.starts[1:], strict=False))


def test_small_tiles_on_a_grid_share_more_than_an_eighth() -> None:
    for longest, shared in ((32, 16), (64, 16), (128, 16), (256, 32)):
        rows = choose_tiles(5000, 10, 4, longest=longest, step=4).rows
        assert min(a + rows.tile - b for a, b in zip(rows.starts, rows.starts[1:], strict=False)) == shared


def test_complete_rows_partition_the_axis() -> None:
    axis = cut_axis(61, 16, 4)
    spans = [axis.complete(i) for i in range(len(axis.starts))]
    assert [row for first, end in spans for row in range(first, end)] == list(range(61))


def test_weights_fade_towards_the_border_of_a_tile() -> None:
    """A tile's own border, where a network has seen the least, counts the least."""
    axis = cut_axis(20, 12, 4)
    assert axis.starts == (0, 8)
    left = axis.weights(0)
    assert torch.equal(left[:8], torch.ones(8, dtype=torch.float64))
    assert (left[8:].diff() < 0).all()
    assert left[-1] < 0.2


def test_weights_cross_without_a_corner() -> None:
    """Value and slope are continuous: the largest second difference of a raised cosine over n positions is
    about (pi / n)^2 / 2.
    """
    axis = cut_axis(112, 64, 16)
    left = axis.weights(0)
    assert left.diff().diff().abs().max() < (torch.pi / 16) ** 2 / 2 * 1.05
    torch.testing.assert_close(left[48:] + axis.weights(1)[:16], torch.ones(16, dtype=torch.float64))


def test_a_small_plane_is_one_tile_of_its_own_size() -> None:
    plan = plan_tiles(3, 100, 64, 8)
    assert (plan.rows.tile, plan.rows.starts, plan.columns.tile) == (3, (0,), 54)


@pytest.mark.parametrize(("length", "tile", "overlap"), [(0, 8, 2), (8, 0, 0), (8, 8, 8), (8, 8, -1)])
def test_bad_sizes_are_named(length: int, tile: int, overlap: int) -> None:
    with pytest.raises(ValueError, match=f"length {length}, tile {tile}, overlap {overlap}"):
        cut_axis(length, tile, overlap)


def test_reflection_equals_torch_where_torch_can() -> None:
    x = picture(9, 7)
    extended = x[..., reflected(9, 16)[:, None], reflected(7, 12)]
    torch.testing.assert_close(extended, torch.nn.functional.pad(x, (0, 5, 0, 7), mode="reflect"))


def test_reflection_goes_on_for_small_pictures() -> None:
    assert reflected(3, 8).tolist() == [0, 1, 2, 1, 0, 1, 2, 1]
    assert reflected(1, 3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (100, 250), (256, 256)])
def test_a_picture_that_fits_is_one_tile(size: tuple[int, int]) -> None:
    assert choose_tiles(*size, 32).num_tiles == 1


def test_the_plan_is_the_largest_that_costs_little_more_than_the_cheapest() -> None:
    """A 256x256 latent costs 65536 (1 + 65536 / a) whole and 102400 (1 + 4096 / a) in 25 tiles of 64: for a =
    60000 1.25 times as much.
    """
    whole, cut = (choose_tiles(256, 256, 64, attention_positions=area) for area in (80_000, 60_000))
    assert (whole.num_tiles, cut.num_tiles, cut.rows.tile) == (1, 25, 64)


def test_no_tile_is_longer_than_asked() -> None:
    plan = choose_tiles(300, 20, 8, longest=47)
    assert (plan.rows.tile, plan.columns.tile) == (40, 24)
