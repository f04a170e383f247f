"""The whole chain over a plane of any height, with a few rows of tiles in memory.

Latents are blended at every step, so a tile of step t needs its neighbours of step t + 1, those their
neighbours, and so on: no band of a picture can be computed independently, and none has to be: a row of tiles
of step t can run as soon as step t + 1 has completed the rows that it covers.

    encode   ████████████░░      rows of tiles that are done, while the last step is at the second:
    step 3   █████████░░░░░      each stage is at most a row of tiles and its overlap ahead of the next,
    step 2   ██████░░░░░░░░      and what all stages have passed is given up
    step 1   ███░░░░░░░░░░░

Every tile is computed once, with the same neighbours and in the same order as if all were in memory: the
picture is the same up to rounding (2e-5 in [-1, 1]; blending adds in another order). Memory is (T + 2)
windows of about two rows of tiles; where windows are kept in files (`resshift.tiles.window`), about one tile.

A stage knows the windows that it reads and where its results go, and no other stage. Nothing here calls a
network: a stage yields the calls that it wants (`resshift.tiles.batching`), so that tiles of several pictures
can share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from resshift.tiles.batching import TileCall, Work
from resshift.tiles.plan import AxisTiles, TilePlan
from resshift.tiles.window import RowBuffer

# Columns that are finished at a time, so that temporaries of a wide picture stay small. The side of a noise
# block.
_COLUMNS = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Input:
    """The rows of a window that a stage reads, by latent positions.

    Fields:
        window: Window that is read.
        scale: Rows and columns of the window for one latent position.
        halo: Further rows and columns that are read on each side, as far as there are any.
    """

    window: RowBuffer
    scale: int = 1
    halo: int = 0

    def is_complete(self, bottom: int) -> bool:
        """Tell whether all rows for latent positions above `bottom` are there."""
        return self.window.bottom >= min(self.window.height, bottom * self.scale + self.halo)

    def first_row(self, top: int) -> int:
        """Return the first row of the window that is read for latent positions from `top` on."""
        return top * self.scale - self.halo

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Return what the stage sees of a rectangle of latent positions, (C, height, width)."""
        scale = self.scale
        return self.window.read(top * scale, bottom * scale, left * scale, right * scale)


@dataclass(eq=False, slots=True)
class TileCount:
    """How many tiles of a picture are done, over all stages.

    Fields:
        report: Function that is called after every tile with the share of the work that is done, in (0, 1].
    """

    report: Callable[[float], None]
    total: int = field(default=0, init=False)
    done: int = field(default=0, init=False)

    def add(self, num: int) -> None:
        """Count tiles that are done. All stages exist by then, so `total` is complete."""
        self.done += num
        self.report(self.done / self.total)


class Output(Protocol):
    """Where a stage hands its results on."""

    def take(self, blended: RowBuffer, top: int, bottom: int) -> None:
        """Take latent rows [top, bottom), which are complete in `blended`; called with increasing rows."""
        ...


class Stage(Protocol):
    """A part of the pipeline that works down the picture, a row of tiles at a time."""

    def needs(self) -> list[tuple[RowBuffer, int]]:
        """Return the windows that it reads, each with the first row that it still needs."""
        ...

    def is_ready(self) -> bool:
        """Tell whether the rows that the next row of tiles reads are complete."""
        ...

    def run(self) -> Work[None]:
        """Work on the next row of tiles."""
        ...


@dataclass(kw_only=True)
class TileStage:
    """Call a function on every tile and blend the results.

    Args:
        plan: Tiles of the latent plane.
        function: (n, C_i, tile_h s_i, tile_w s_i) for each input, and the step's index (n,) where there is
            one -> (n, C, tile_h s, tile_w s).
        inputs: What the function sees; s_i is the scale of an input.
        blended: Window that results are added into, at scale s.
        scale: s.
        output: Takes the rows that are complete.
        device: Device that the function runs on.
        batch: Number of tiles in a call.
        i_step: Index of the step; None: the function takes none.
        count: Count of the tiles of all stages.
    """

    plan: TilePlan
    function: Callable[..., Tensor]
    inputs: Sequence[Input]
    blended: RowBuffer
    output: Output
    device: torch.device
    batch: int
    scale: int = 1
    i_step: int | None = None
    count: TileCount | None = None
    i_row: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.count is not None:
            self.count.total += self.plan.num_tiles

    def needs(self) -> list[tuple[RowBuffer, int]]:
        top = self.plan.rows.first_from(self.i_row)
        return [(one.window, one.first_row(top)) for one in self.inputs]

    def is_ready(self) -> bool:
        rows = self.plan.rows
        if self.i_row == len(rows.starts):
            return False
        return all(one.is_complete(rows.starts[self.i_row] + rows.tile) for one in self.inputs)

    def run(self) -> Work[None]:
        rows, columns = self.plan.rows, self.plan.columns
        top, scale = rows.starts[self.i_row], self.scale
        self.blended.extend((top + rows.tile) * scale)
        for first in range(0, len(columns.starts), self.batch):
            lefts = columns.starts[first : first + self.batch]
            results = yield self._call(top, lefts)
            for i_column, (left, result) in enumerate(zip(lefts, results, strict=True), first):
                self.blended.add(top * scale, left * scale, result * self._weight(i_column).to(result))
            if self.count is not None:
                self.count.add(len(lefts))
        first, end = rows.complete(self.i_row)
        self.output.take(self.blended, first, end)
        self.blended.discard(end * scale)
        self.i_row += 1

    def _call(self, top: int, lefts: Sequence[int]) -> TileCall:
        bottom, width = top + self.plan.rows.tile, self.plan.columns.tile
        stacked = [
            torch.stack([one.read(top, bottom, left, left + width) for left in lefts]) for one in self.inputs
        ]
        inputs = [tiles.to(self.device, non_blocking=True) for tiles in stacked]
        if self.i_step is not None:
            inputs.append(torch.full((len(lefts),), self.i_step, dtype=torch.int64, device=self.device))
        return TileCall(self.function, tuple(inputs), self.batch)

    def _weight(self, i_column: int) -> Tensor:
        return torch.outer(
            self.plan.rows.weights(self.i_row, self.scale), self.plan.columns.weights(i_column, self.scale)
        )


def column_parts(width: int) -> Iterator[slice]:
    """Cut the columns of a plane into parts that are finished one after the other."""
    for left in range(0, width, _COLUMNS):
        yield slice(left, min(width, left + _COLUMNS))


def capacity(rows: AxisTiles, num_consumers: int) -> int:
    """Rows that a window holds at most when its reader, or the last of a chain of readers, is `num_consumers`
    stages behind its writer.

    A writer completes at most a tile at once, and runs only when no stage after it can; each reader waits for
    at most a tile.
    """
    return min(rows.length, (num_consumers + 1) * rows.tile)


def drive(stages: Sequence[Stage]) -> Work[None]:
    """Run stages to the end, always the last that can, and give up the rows that no stage reads any more.

    Args:
        stages: Stages in the order of the pipeline.
    """
    while stage := next((stage for stage in reversed(stages) if stage.is_ready()), None):
        yield from stage.run()
        first_needed: dict[RowBuffer, int] = {}
        for window, first in (need for reader in stages for need in reader.needs()):
            first_needed[window] = min(first, first_needed.get(window, first))
        for window, first in first_needed.items():
            window.discard(first)
