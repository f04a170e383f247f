"""Rows in, rows out: what every kind of model does with a picture, and the two ends of its stages.

A model reads rows of the picture from the top to the bottom and emits rows of the result; neither is ever
held whole. `Renderer` is what `resshift.upscaler.Upscaler` needs of a model, `resshift.tiles.chain.Chain` and
`resshift.tiles.direct.Direct` are the two there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from resshift.config import Sampling
from resshift.tiles.batching import Work
from resshift.tiles.memory import Backoff
from resshift.tiles.noise import LatentNoise
from resshift.tiles.plan import TilePlan
from resshift.tiles.stages import TileCount
from resshift.tiles.window import RowBuffer

# Values of a band of the result that is handed on: 4 MiB in float32.
BAND_VALUES = 2**20

# Rows [top, bottom) of the input -> (3, bottom - top, width) in [-1, 1]; for a model that fills holes with a
# fourth channel, 1 in a hole and -1 elsewhere.
ReadRows = Callable[[int, int], Tensor]
Emit = Callable[[Tensor], None]  # takes the next rows of the result, (3, n, width scale)


class Renderer(Protocol):
    """A model as the maker of pixels. Its tiles are planned in positions of `ratio` x `ratio` input pixels.

    Fields:
        ratio: input pixels along a side of a position.
        smallest: side of the smallest tile, in positions.
        fixes_colour: whether the low band of the result is to be that of the input
            (`resshift.tiles.colour_fix`).
        backoff: what is known of the memory.
    """

    @property
    def ratio(self) -> int: ...

    @property
    def smallest(self) -> int: ...

    @property
    def fixes_colour(self) -> bool: ...

    @property
    def backoff(self) -> Backoff: ...

    def plan(self, height: int, width: int, longest: int | None) -> TilePlan:
        """Return the tiles of a picture of height x width pixels, none longer than `longest` positions."""
        ...

    def notes(self, plan: TilePlan) -> tuple[str, ...]:
        """Return what a user should know of a picture that was computed so."""
        ...

    def work(
        self,
        plan: TilePlan,
        size: tuple[int, int],
        sampling: Sampling,
        *,
        read: ReadRows,
        emit: Emit,
        noise: LatentNoise | None = None,
        batch: int | None = None,
        count: TileCount | None = None,
        shown: Sequence[Emit] = (),
    ) -> Work[None]:
        """Compute a picture, once.

        Args:
            plan: Tiles; they may reach beyond the picture, which is then extended by reflection.
            size: Height and width of the picture.
            sampling: How pixels are made.
            read: Function that returns rows of the picture. It is called with increasing rows, but at the end
                perhaps once more with the last ones.
            emit: Takes the result, extension included, from the top to the bottom; the result is not clamped.
            noise: Noise of the chain; None is that of the seed. A model without a chain uses none.
            batch: Number of tiles in a call; None is enough to keep a GPU busy.
            count: Count of the tiles that are done.
            shown: Take what each step before the last predicts, as `emit` takes that of the last; one for
                each of them, or none. A model without a chain has no such steps.
        """
        ...


@dataclass(kw_only=True)
class RowReader:
    """The first stage: read the rows of the picture that the next row of tiles needs.

    Args:
        plan: Tiles, in positions.
        lq: Window of the picture, extended to whole tiles.
        ratio: Rows and columns of `lq` for one position.
        halo: Further rows that the next stage reads.
        rows: Row of the picture for each row of `lq`.
        columns: Column of the picture for each column of `lq`.
        read: Function that returns rows of the picture.
    """

    plan: TilePlan
    lq: RowBuffer
    ratio: int
    rows: Tensor
    columns: Tensor
    read: ReadRows
    halo: int = 0
    i_row: int = field(default=0, init=False)

    def needs(self) -> list[tuple[RowBuffer, int]]:
        return []

    def is_ready(self) -> bool:
        return self.lq.bottom < self.lq.height

    def run(self) -> Work[None]:
        bottom = self.plan.rows.starts[self.i_row] + self.plan.rows.tile
        end = min(self.lq.height, bottom * self.ratio + self.halo)
        step = max(1, BAND_VALUES // (3 * self.lq.width))
        for first in range(self.lq.bottom, end, step):
            wanted = self.rows[first : min(end, first + step)]
            begin = int(wanted.min())
            rows = self.read(begin, int(wanted.max()) + 1)[:, wanted - begin][:, :, self.columns]
            self.lq.extend(first + len(wanted))
            self.lq.write(first, 0, rows)
        self.i_row += 1
        yield from ()  # reading needs no network


@dataclass(frozen=True, slots=True)
class RowEmitter:
    """The last output: emit rows of the result, `factor` for each row of positions."""

    factor: int
    emit: Emit

    def take(self, blended: RowBuffer, top: int, bottom: int) -> None:
        factor = self.factor
        step = max(1, BAND_VALUES // (3 * blended.width * factor)) * factor
        for first in range(top * factor, bottom * factor, step):
            # A copy: the window moves on while rows of the result wait for others below them.
            self.emit(blended.read(first, min(bottom * factor, first + step)).clone())
