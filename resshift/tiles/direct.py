"""A network from picture to picture, without chain and noise, on a picture of any size.

    read -> lq -> network -> emit

The network sees the picture in tiles; neighbours share `reach_px` on each side where the reach of the network
is known, and then tiles change nothing but rounding, or else an eighth of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resshift.config import Sampling
from resshift.devices import autocast
from resshift.networks.config import ForeignConfig, RegressionConfig
from resshift.tiles.batching import Work
from resshift.tiles.memory import Backoff, place_windows, tiles_per_call
from resshift.tiles.noise import LatentNoise
from resshift.tiles.plan import TilePlan, choose_tiles, reflected
from resshift.tiles.rows import Emit, ReadRows, RowEmitter, RowReader
from resshift.tiles.stages import Input, TileCount, TileStage, capacity, drive
from resshift.tiles.window import Allocate, RowBuffer, in_memory


@dataclass(eq=False)
class Direct:
    """A model that is one call of one network; see `resshift.tiles.rows.Renderer`.

    A position of its plans is the square of pixels that the network's own grid has, so the grid lies alike in
    all tiles.

    Fields:
        network: Function (n, 3, h, w) in [-1, 1] -> (n, 3, h scale, w scale).
    """

    config: RegressionConfig | ForeignConfig
    network: Callable[[Tensor], Tensor]
    device: torch.device
    dtype: torch.dtype = torch.float32
    backoff: Backoff = field(default_factory=Backoff)

    @property
    def ratio(self) -> int:
        return self.config.size_multiple

    @property
    def smallest(self) -> int:
        return self.config.smallest_tile_px // self.ratio

    @property
    def fixes_colour(self) -> bool:
        """A network that does not enlarge restores colour and tone at the size of the input: they are its
        result.
        """
        return self.config.scale > 1

    def plan(self, height: int, width: int, longest: int | None) -> TilePlan:
        """Return the tiles of a picture of height x width pixels."""
        reach_px = self.config.reach_px
        return choose_tiles(
            -(-height // self.ratio),
            -(-width // self.ratio),
            smallest=self.smallest,
            longest=longest,
            limit=self.config.longest_tile_px // self.ratio,
            reach=None if reach_px is None else -(-reach_px // self.ratio),
        )

    def notes(self, plan: TilePlan) -> tuple[str, ...]:
        """Name tiles of a network that should see the whole picture."""
        if plan.num_tiles == 1 or not self.config.wants_whole:
            return ()
        side = max(plan.rows.tile, plan.columns.tile) * self.ratio
        return (f"this model should see a picture whole, and saw tiles of {side} px",)

    def predict(self, lq: Tensor) -> Tensor:
        """(n, 3, h, w) -> (n, 3, h scale, w scale), float32."""
        with autocast(self.device, self.dtype):
            return self.backoff.call(self.network, lq).float()

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
        """Compute a picture, once; of `sampling` nothing remains to be done, and there is no noise."""
        needed = Windows(self.config, plan, in_memory(torch.device("meta"))).num_bytes
        windows = Windows(self.config, plan, place_windows(needed, self.device))
        factor = self.ratio * self.config.scale
        reader = RowReader(
            plan=plan,
            lq=windows.lq,
            ratio=self.ratio,
            rows=reflected(size[0], windows.lq.height),
            columns=reflected(size[1], windows.lq.width),
            read=read,
        )
        tiles = TileStage(
            plan=plan,
            function=self.predict,
            inputs=[Input(window=windows.lq, scale=self.ratio)],
            blended=windows.result,
            output=RowEmitter(factor, emit),
            device=self.device,
            batch=batch or tiles_per_call(plan.tile_area * self.ratio**2),
            scale=factor,
            count=count,
        )
        yield from drive([reader, tiles])


class Windows:
    """The two windows of a run: rows of the picture, and rows of the result that tiles are added into."""

    def __init__(self, config: RegressionConfig | ForeignConfig, plan: TilePlan, allocate: Allocate) -> None:
        def window(scale: int, num_consumers: int) -> RowBuffer:
            height, width = plan.rows.length * scale, plan.columns.length * scale
            return RowBuffer(3, height, width, capacity(plan.rows, num_consumers) * scale, allocate)

        self.lq = window(config.size_multiple, 0)  # its reader asks for each row of tiles
        self.result = window(config.size_multiple * config.scale, 0)

    @property
    def num_bytes(self) -> int:
        """Bytes of both."""
        return self.lq.num_bytes + self.result.num_bytes
