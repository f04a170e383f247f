"""Cutting a plane into overlapping tiles of one shape, and the weights that blend their results.

Weights of neighbouring tiles cross smoothly (a raised cosine) over their overlap and sum to one at every
position, so a function of single positions (the identity, for example) gives exactly what it would give on
the whole plane. Two things keep the seams of a real network invisible: the *prediction of x0 is blended at
every step*, and the noise depends on the absolute position (`resshift.tiles.noise.NoiseField`). Both are the
task of `resshift.tiles.chain`.

The unit is a position of the plane that is cut ("latent"); an input or output at another resolution has an
integer number of pixels in each position.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

# Longest side of a tile of a latent unless told otherwise: beyond, tiles save little work and cost memory.
_LONGEST = 256
# Neighbours share an eighth of a tile: the shared context hides the seam. Small tiles whose starts lie on a
# grid share four of its steps, up to three eighths: flat colour shows shorter blends.
_OVERLAP_SHARE, _SHARED_STEPS = 8, 4
# Larger tiles are worth this much more work than the cheapest plan: they hold more context.
_WORTH = 1.2


@dataclass(frozen=True, slots=True)
class AxisTiles:
    """Tiles along one axis: all of length `tile`, starting at `starts`; together they cover [0, length).

    The results of a tile within `margin` of an edge that has a neighbour are not used.
    """

    length: int
    tile: int
    starts: tuple[int, ...]
    margin: int = 0

    def weights(self, i_tile: int, scale: int = 1) -> Tensor:
        """Return the blending weight of each position of a tile, float64 (tile * scale,). Over all tiles they
        sum to one everywhere.

        Args:
            i_tile: Index of the tile.
            scale: Number of pixels along a side of one position; the ramp has this resolution.
        """
        return _normalised(self, scale)[i_tile]

    def first_from(self, i_tile: int) -> int:
        """Return the first position that this tile or one after it covers; the length when there is none."""
        return self.starts[i_tile] if i_tile < len(self.starts) else self.length

    def complete(self, i_tile: int) -> tuple[int, int]:
        """Return the positions [first, end) that tile `i_tile` completes: no later tile reaches them, and
        they were not complete before.
        """
        last = i_tile == len(self.starts) - 1
        return self.starts[i_tile], self.length if last else self.starts[i_tile + 1]


@lru_cache(maxsize=64)
def _normalised(axis: AxisTiles, scale: int) -> list[Tensor]:
    ramps = [_ramp(axis, i, scale) for i in range(len(axis.starts))]
    total = torch.zeros(axis.length * scale, dtype=torch.float64)
    spans = [slice(start * scale, (start + axis.tile) * scale) for start in axis.starts]
    for span, ramp in zip(spans, ramps, strict=True):
        total[span] += ramp
    return [ramp / total[span] for span, ramp in zip(spans, ramps, strict=True)]


def _ramp(axis: AxisTiles, i_tile: int, scale: int) -> Tensor:
    position = torch.arange(axis.tile * scale, dtype=torch.float64) + 0.5
    ramp, margin = torch.ones_like(position), axis.margin * scale
    if i_tile > 0:
        overlap = scale * (axis.starts[i_tile - 1] + axis.tile - axis.starts[i_tile])
        ramp = torch.minimum(ramp, (position - margin) / max(overlap - 2 * margin, 1))
    if i_tile < len(axis.starts) - 1:
        overlap = scale * (axis.starts[i_tile] + axis.tile - axis.starts[i_tile + 1])
        ramp = torch.minimum(ramp, (axis.tile * scale - position - margin) / max(overlap - 2 * margin, 1))
    return torch.sin(ramp.clamp(min=0) * (torch.pi / 2)) ** 2


def cut_axis(
    length: int, tile: int, overlap: int, multiple: int = 1, margin: int = 0, step: int = 1
) -> AxisTiles:
    """Cover an axis with as few tiles as overlap by at least `overlap`, as short as then possible, and evenly
    spread.

    Args:
        length: Length of the axis, at least 1. An axis that fits into one tile becomes one tile of its own
            length, rounded up to a multiple of `multiple`, another one is rounded up to a multiple of `step`
            (the caller then extends the plane).
        tile: Length of the longest tile, a multiple of `multiple`.
        overlap: Least number of positions that neighbours share, in [0, tile).
        multiple: Number that lengths of tiles are multiples of.
        margin: See `AxisTiles`; at most half of `overlap`.
        step: Starts of tiles are multiples of this, a divisor of `multiple`: a network with coarser levels
            then has their positions in the same places in all tiles. `overlap` is rounded up to it.

    Raises:
        ValueError: A size is out of range.
    """
    overlap = -(-overlap // step) * step
    if length < 1 or tile < 1 or not 2 * margin <= overlap < tile or multiple < 1 or tile % multiple:
        raise ValueError(
            f"tiles need length >= 1, {2 * margin} <= overlap < tile and a tile that is a multiple of "
            f"{multiple}, got length {length}, tile {tile}, overlap {overlap}"
        )
    if length <= tile:
        extended = -(-length // multiple) * multiple
        return AxisTiles(extended, extended, (0,), margin)
    length = -(-length // step) * step
    count = -(-(length - overlap) // (tile - overlap))
    shortest = -(-(length + (count - 1) * overlap) // count)
    side = -(-shortest // multiple) * multiple
    starts = tuple(step * round(i * (length - side) / (count - 1) / step) for i in range(count))
    return AxisTiles(length, side, starts, margin)


@dataclass(frozen=True, slots=True)
class TilePlan:
    """Tiles of a plane: every combination of a tile of the rows and a tile of the columns."""

    rows: AxisTiles
    columns: AxisTiles

    @property
    def num_tiles(self) -> int:
        """Number of tiles."""
        return len(self.rows.starts) * len(self.columns.starts)

    @property
    def tile_area(self) -> int:
        """Number of positions in one tile."""
        return self.rows.tile * self.columns.tile


def plan_tiles(
    height: int, width: int, tile: int, overlap: int, multiple: int = 1, margin: int = 0, step: int = 1
) -> TilePlan:
    """Return the tiles of an H x W plane; see `cut_axis`."""
    rows, columns = (cut_axis(length, tile, overlap, multiple, margin, step) for length in (height, width))
    return TilePlan(rows, columns)


def choose_tiles(
    height: int,
    width: int,
    multiple: int = 1,
    *,
    smallest: int | None = None,
    longest: int | None = None,
    limit: int = _LONGEST,
    reach: int | None = None,
    step: int = 1,
    attention_positions: float = float("inf"),
) -> TilePlan:
    """Choose the tiles of a plane.

    The cost of a plan is the positions that it computes, overlap and extension included, times 1 + area /
    attention_positions. Of all sides up to `limit` the largest is taken that costs at most a fifth more than
    the cheapest.

    Args:
        height: Height of the plane.
        width: Width of the plane.
        multiple: Sides of tiles are multiples of this.
        smallest: Side of the smallest tile, a multiple of `multiple`; None: `multiple`.
        longest: Longest side of a tile, at least `smallest`; None: what the cost says.
        limit: Longest side that the cost may choose; `smallest` if that is larger.
        reach: Distance beyond which nothing has an influence on a position. Neighbours share twice as much,
            and each position is taken from tiles that see all of its reach. None: not known; neighbours share
            an eighth of a tile, and with `step` up to half of small ones.
        step: See `cut_axis`.
        attention_positions: Area at which global attention costs as much as everything else.
    """
    first = multiple if smallest is None else smallest

    def plan_of(side: int) -> TilePlan:
        if reach is not None:
            return plan_tiles(height, width, side, 2 * reach, multiple, reach, step)
        least = 0 if step == 1 else min(side // 2, _SHARED_STEPS * step)
        return plan_tiles(height, width, side, max(side // _OVERLAP_SHARE, least), multiple, step=step)

    def cost_of(plan: TilePlan) -> float:
        return plan.num_tiles * plan.tile_area * (1 + plan.tile_area / attention_positions)

    if longest is not None:
        return plan_of(longest // multiple * multiple)
    plans = [plan_of(side) for side in range(first, max(limit, first) + 1, multiple)]
    allowed = _WORTH * min(map(cost_of, plans))
    return max((plan for plan in plans if cost_of(plan) <= allowed), key=lambda plan: plan.tile_area)


def reflected(length: int, size: int) -> Tensor:
    """Return the positions that extend an axis to `size` by reflection without repeating the edge, as often
    as needed; int64 (size,).
    """
    position = torch.arange(max(size, length))
    if length == 1:
        return torch.zeros_like(position)
    folded = position % (2 * length - 2)
    return torch.minimum(folded, 2 * length - 2 - folded)
