"""Cutting a plane into overlapping tiles of one shape, and blending what comes back.

Weights of neighbouring tiles ramp linearly over their overlap and sum to one at every position, so a function that looks at single
positions only (or an identity) gives exactly what it would give on the whole plane. Seams between tiles of a real network are kept away by
blending the *latent prediction at every step* and by noise that depends on the absolute position (`resshift.seeds.NoiseField`); both are
the caller's.

Units are positions of the plane that is cut ("latent"); an input or output at another resolution has an integer number of its pixels in
each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AxisTiles:
    """Tiles along one axis: all of length `tile`, starting at `starts`; together they cover [0, length)."""

    length: int
    tile: int
    starts: tuple[int, ...]

    def weights(self, i_tile: int) -> Tensor:
        """Return the blending weight of each position of a tile, float64 (tile,). Over all tiles they sum to one everywhere."""
        return self._normalised[i_tile]

    @property
    def _normalised(self) -> list[Tensor]:
        ramps = [self._ramp(i) for i in range(len(self.starts))]
        total = torch.zeros(self.length, dtype=torch.float64)
        for start, ramp in zip(self.starts, ramps, strict=True):
            total[start : start + self.tile] += ramp
        return [ramp / total[start : start + self.tile] for start, ramp in zip(self.starts, ramps, strict=True)]

    def _ramp(self, i_tile: int) -> Tensor:
        position = torch.arange(self.tile, dtype=torch.float64) + 0.5
        ramp = torch.ones(self.tile, dtype=torch.float64)
        if i_tile > 0:
            overlap = self.starts[i_tile - 1] + self.tile - self.starts[i_tile]
            ramp = torch.minimum(ramp, position / max(overlap, 1))
        if i_tile < len(self.starts) - 1:
            overlap = self.starts[i_tile] + self.tile - self.starts[i_tile + 1]
            ramp = torch.minimum(ramp, (self.tile - position) / max(overlap, 1))
        return ramp


def cut_axis(length: int, tile: int, overlap: int) -> AxisTiles:
    """Cover an axis with as few tiles as overlap by at least `overlap`, evenly spread.

    Args:
        length: of the axis, at least 1.
        tile: length of a tile; an axis that is not longer gets one tile of its own length.
        overlap: at least this many positions shared by neighbours, in [0, tile).

    Raises:
        ValueError: a size out of range.
    """
    if length < 1 or tile < 1 or not 0 <= overlap < tile:
        raise ValueError(f"tiles need length >= 1 and 0 <= overlap < tile, got length {length}, tile {tile}, overlap {overlap}")
    if length <= tile:
        return AxisTiles(length, length, (0,))
    count = -(-(length - overlap) // (tile - overlap))
    return AxisTiles(length, tile, tuple(round(i * (length - tile) / (count - 1)) for i in range(count)))


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Tiles of a plane: every pair of a vertical and a horizontal one."""

    rows: AxisTiles
    columns: AxisTiles

    @property
    def num_tiles(self) -> int:
        """How many tiles there are."""
        return len(self.rows.starts) * len(self.columns.starts)

    def crop(self, plane: Tensor, i_row: int, i_column: int, scale: int = 1) -> Tensor:
        """Return a view of one tile of a plane (..., H, W) that has `scale` pixels a position."""
        top, left = self.rows.starts[i_row] * scale, self.columns.starts[i_column] * scale
        return plane[..., top : top + self.rows.tile * scale, left : left + self.columns.tile * scale]


def plan_tiles(height: int, width: int, tile: int, overlap: int) -> TilePlan:
    """Return the tiles of an H x W plane; see `cut_axis`."""
    return TilePlan(cut_axis(height, tile, overlap), cut_axis(width, tile, overlap))


def map_tiles(
    function: Callable[..., Tensor],
    inputs: Sequence[tuple[Tensor, int]],
    plan: TilePlan,
    *,
    output_scale: int = 1,
    tile_batch: int = 8,
) -> Tensor:
    """Apply `function` to batches of tiles and blend the results.

    Args:
        function: takes one tensor (n, C_i, tile_h * s_i, tile_w * s_i) an input and returns (n, C, tile_h * s, tile_w * s).
        inputs: planes (1, C_i, H * s_i, W * s_i) with their scales s_i, pixels a position.
        plan: of the H x W positions.
        output_scale: s, pixels a position in the result.
        tile_batch: most tiles in one call.

    Returns:
        (1, C, H * s, W * s), blended in the dtype of the results.
    """
    places = list(product(range(len(plan.rows.starts)), range(len(plan.columns.starts))))
    out: Tensor | None = None
    for start in range(0, len(places), tile_batch):
        part = places[start : start + tile_batch]
        tiles = function(*(torch.cat([plan.crop(plane, *place, scale) for place in part]) for plane, scale in inputs))
        if len(places) == 1:
            return tiles
        if out is None:
            shape = (1, tiles.shape[1], plan.rows.length * output_scale, plan.columns.length * output_scale)
            out = torch.zeros(shape, dtype=tiles.dtype, device=tiles.device)
        for tile, (i_row, i_column) in zip(tiles, part, strict=True):
            weight = torch.outer(_stretched(plan.rows, i_row, output_scale), _stretched(plan.columns, i_column, output_scale))
            plan.crop(out, i_row, i_column, output_scale).add_(tile * weight.to(tile))
    if out is None:
        raise ValueError("a plan has at least one tile")
    return out


def _stretched(axis: AxisTiles, i_tile: int, scale: int) -> Tensor:
    """Weights at `scale` pixels a position. Cut at that resolution, so that the ramp is smooth there too."""
    fine = AxisTiles(axis.length * scale, axis.tile * scale, tuple(start * scale for start in axis.starts))
    return fine.weights(i_tile)


def reflect_to(plane: Tensor, height: int, width: int) -> Tensor:
    """Extend (..., H, W) on the right and the bottom by reflection without repeating the edge, as often as needed; a single row repeats."""
    rows = _reflected(plane.shape[-2], height, plane.device)
    columns = _reflected(plane.shape[-1], width, plane.device)
    return plane[..., rows[:, None], columns[None, :]]


def _reflected(length: int, size: int, device: torch.device) -> Tensor:
    position = torch.arange(max(size, length), device=device)
    if length == 1:
        return torch.zeros_like(position)
    folded = position % (2 * length - 2)
    return torch.minimum(folded, 2 * length - 2 - folded)
