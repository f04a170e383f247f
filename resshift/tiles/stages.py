"""The whole chain over a plane of any height, with a few rows of tiles in memory.

Latents are blended at every step, so a tile of step t needs its neighbours of step t + 1, those their
neighbours, and so on: no part of a picture can be made alone. It need not: a row of tiles of step t can run
as soon as step t + 1 has completed the rows under it.

    encode   ████████████░░      rows of tiles that are done, while the last step is at the second:
    step 3   █████████░░░░░      each stage is at most a row of tiles and its overlap ahead of the next,
    step 2   ██████░░░░░░░░      and what all stages have passed is given up
    step 1   ███░░░░░░░░░░░

Every tile is computed once, with the same neighbours and in the same order as if all were in memory: the
picture is the same up to rounding (2e-5 in [-1, 1]; blending adds in another order). Memory is (T + 2)
windows of about two rows of tiles; with windows in files (`resshift.tiles.window`), a tile.

Nothing here calls a network: a stage yields the calls it wants (`resshift.tiles.batching`), so that tiles of
several pictures can share them.
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


class Stage(Protocol):
    """A part of the pipeline that works down the picture, a row of tiles at a time."""

    def ready(self) -> bool:
        """Tell whether the rows that the next row of tiles reads are complete."""
        ...

    def run(self) -> Work[None]:
        """Work on the next row of tiles."""
        ...

    @property
    def needs_from(self) -> int:
        """First latent row that it still reads; the height of the plane when it is done."""
        ...


@dataclass
class TileStage:
    """Call a function on every tile and blend the results.

    Args:
        plan: of the latent plane.
        function: (n, C_i, tile_h s_i, tile_w s_i) an input, and the step's index (n,) where there is one ->
            (n, C, tile_h s, tile_w s).
        inputs: windows with their scales s_i, pixels a latent position.
        blended: window that results are added into, at scale s.
        scale: s.
        finish: called with the latent rows [top, bottom) once they are complete in `blended`.
        device: that the function runs on.
        batch: tiles in a call.
        i_step: index of the step; None: the function takes none.
    """

    plan: TilePlan
    function: Callable[..., Tensor]
    inputs: Sequence[tuple[RowBuffer, int]]
    blended: RowBuffer
    scale: int
    finish: Callable[[int, int], None]
    device: torch.device
    batch: int
    i_step: int | None = None
    i_row: int = field(default=0, init=False)

    @property
    def needs_from(self) -> int:
        return (
            self.plan.rows.starts[self.i_row]
            if self.i_row < len(self.plan.rows.starts)
            else self.plan.rows.length
        )

    def ready(self) -> bool:
        if self.i_row == len(self.plan.rows.starts):
            return False
        end = self.needs_from + self.plan.rows.tile
        return all(window.bottom >= end * scale for window, scale in self.inputs)

    def run(self) -> Work[None]:
        rows, columns = self.plan.rows, self.plan.columns
        top, scale = rows.starts[self.i_row], self.scale
        self.blended.extend((top + rows.tile) * scale)
        for first in range(0, len(columns.starts), self.batch):
            lefts = columns.starts[first : first + self.batch]
            results = yield self._call(top, lefts)
            for i_column, (left, result) in enumerate(zip(lefts, results, strict=True), first):
                self.blended.add(top * scale, left * scale, result * self._weight(i_column).to(result))
        first, end = rows.complete(self.i_row)
        self.finish(first, end)
        self.blended.discard(end * scale)
        self.i_row += 1

    def _call(self, top: int, lefts: Sequence[int]) -> TileCall:
        stacked = [
            torch.stack([self.tile(window, top, left, scale) for left in lefts])
            for window, scale in self.inputs
        ]
        inputs = [tiles.to(self.device, non_blocking=True) for tiles in stacked]
        if self.i_step is not None:
            inputs.append(torch.full((len(lefts),), self.i_step, dtype=torch.int64, device=self.device))
        return TileCall(self.function, tuple(inputs), self.batch)

    def tile(self, window: RowBuffer, top: int, left: int, scale: int) -> Tensor:
        """Return one input of the tile at a latent position."""
        bottom, right = top + self.plan.rows.tile, left + self.plan.columns.tile
        return window.read(top * scale, bottom * scale, left * scale, right * scale)

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


def drive(stages: Sequence[Stage], feed: Callable[[], bool], discard: Callable[[], None]) -> Work[None]:
    """Run stages to the end, the last that can first.

    Args:
        stages: in the order of the pipeline.
        feed: reads more input for the first stage; False when there is none left.
        discard: gives up what no stage reads any more; called after every run.
    """
    while True:
        stage = next((stage for stage in reversed(stages) if stage.ready()), None)
        if stage is not None:
            yield from stage.run()
            discard()
        elif not feed():
            return
