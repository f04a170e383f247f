"""Standard normal noise as a function of the absolute position in the latent, so that a tile sees the noise
of the whole picture.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from resshift.seeds import Part, philox


class LatentNoise(Protocol):
    """Standard normal noise of a rectangle of the latent at a step, (Z, height, width)."""

    def __call__(self, step: int, top: int, left: int, height: int, width: int, /) -> Tensor: ...


class NoiseField:
    """Standard normal noise over an unbounded latent plane, drawn block by block.

    The value at (step, channel, y, x) is a pure function of `parts` and of these four numbers, whatever
    rectangles are drawn in whatever order.

    Args:
        parts: Name of the stream of random numbers, for example `(seed, "picture", key)`.
        channels: Number of latent channels, Z.
        block_px: Side of a block in latent positions. Another side gives other noise.
    """

    def __init__(self, *parts: Part, channels: int, block_px: int = 64) -> None:
        self.parts = parts
        self.channels = channels
        self.block_px = block_px

    def _block(self, step: int, i_row: int, i_column: int) -> np.ndarray:
        rng = philox(*self.parts, "noise", step, i_row, i_column)
        return rng.standard_normal((self.channels, self.block_px, self.block_px), dtype=np.float32)

    def window(self, step: int, top: int, left: int, height: int, width: int) -> Tensor:
        """Return the noise of a rectangle, (Z, height, width) float32 on the CPU."""
        out = np.empty((self.channels, height, width), dtype=np.float32)
        side = self.block_px
        for i_row in range(top // side, -(-(top + height) // side)):
            for i_column in range(left // side, -(-(left + width) // side)):
                y0, x0 = max(top, i_row * side), max(left, i_column * side)
                y1, x1 = min(top + height, (i_row + 1) * side), min(left + width, (i_column + 1) * side)
                block = self._block(step, i_row, i_column)
                out[:, y0 - top : y1 - top, x0 - left : x1 - left] = block[
                    :, y0 - i_row * side : y1 - i_row * side, x0 - i_column * side : x1 - i_column * side
                ]
        return torch.from_numpy(out)

    def for_latent(
        self, height: int, width: int, device: torch.device | str = "cpu"
    ) -> Callable[[int], Tensor]:
        """Return `noise(step) -> (1, Z, height, width)` for `resshift.sampler.sample`."""
        return lambda step: self.window(step, 0, 0, height, width)[None].to(device)


def cut_from_whole(noise: Callable[[int], Tensor]) -> LatentNoise:
    """Return noise that is cut out of `noise(step)`, (1, Z, H, W) of the whole latent."""
    made: dict[int, Tensor] = {}

    def cut(step: int, top: int, left: int, height: int, width: int) -> Tensor:
        if step not in made:
            made[step] = noise(step)[0]
        return made[step][:, top : top + height, left : left + width]

    return cut
