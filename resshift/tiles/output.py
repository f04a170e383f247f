"""From the chain's result to the pixels that a caller gets, row by row: crop, colour fix, resize, quantise.

`PixelRows` is what rows of the input are read from, `Sink` what rows of the output are given to; neither side
is ever held whole here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resshift import images
from resshift.images import scaled
from resshift.resize.bicubic import RowResampler
from resshift.tiles.colour_fix import ColourFix, WaveletFix, adain

Sink = Callable[[NDArray[Any]], object]  # takes the next rows, (n, width, channels)

# Alpha rows that are resized at a time.
_BAND_ROWS = 64


class PixelRows(Protocol):
    """Rows of a picture, read when needed: an array, a `numpy.memmap`, or a reader; (height, width, 1 or 3)
    uint8 or uint16.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> Any: ...

    def __getitem__(self, rows: slice, /) -> NDArray[Any]: ...


class RowOutput:
    """The way from the chain's result to rows of integers.

    Args:
        source: the input.
        sink: takes the rows.
        scale: of the model.
        factor: sides of the picture that the sink gets over sides of the input.
        colour_fix: which. "adain" holds the whole result in float32.
    """

    def __init__(
        self, source: PixelRows, sink: Sink, *, scale: int, factor: float, colour_fix: ColourFix
    ) -> None:
        self.source, self.sink, self.scale = source, sink, scale
        self.height, self.width, self.grey = source.shape[0], source.shape[1], source.shape[2] == 1
        self.row = 0  # rows of the result that have come, not more than belong to the picture
        self.wavelet = WaveletFix(self.height, self.scale) if colour_fix == "wavelet" else None
        self.whole: list[Tensor] | None = [] if colour_fix == "adain" else None
        full = (self.height * self.scale, self.width * self.scale)
        self.resampler = RowResampler(*full, scaled(self.height, factor), scaled(self.width, factor))

    def push(self, rows: Tensor) -> None:
        """Take the next rows of the chain's result, (3, n, padded width)."""
        rows = rows[:, : self.height * self.scale - self.row, : self.width * self.scale].float()
        if not rows.shape[1]:
            return
        first, self.row = self.row, self.row + rows.shape[1]
        if self.whole is not None:
            self.whole.append(rows.clone())
            return
        if self.wavelet is not None:
            rows = self.wavelet.push(
                rows, self._lq(first // self.scale, self.row // self.scale).to(rows.device)
            )
        self._deliver(rows)

    def finish(self) -> None:
        """Deliver what needed the whole picture."""
        if self.whole is not None:
            self._deliver(adain(torch.cat(self.whole, 1), self._lq(0, self.height), self.scale))

    def _lq(self, top: int, bottom: int) -> Tensor:
        return images.to_tensor(self.source[top:bottom])[0]

    def _deliver(self, rows: Tensor) -> None:
        rows = rows.clamp(-1, 1)
        rows = self.resampler.push((rows.mean(0, keepdim=True) if self.grey else rows).cpu())
        if rows.shape[1]:
            self.sink(images.from_tensor(rows, dtype=self.source.dtype.type))


class Filler:
    """A sink that fills an array from the top."""

    def __init__(self, pixels: NDArray[Any]) -> None:
        self.pixels = pixels
        self.row = 0

    def __call__(self, rows: NDArray[Any]) -> None:
        self.pixels[self.row : self.row + len(rows)] = rows
        self.row += len(rows)


def resize_alpha(alpha: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Bring (H, W) to another size as the colours are resized."""
    resampler = RowResampler(alpha.shape[0], alpha.shape[1], height, width)
    out = np.empty((height, width), alpha.dtype)
    filler, limit = Filler(out), np.iinfo(alpha.dtype).max
    for top in range(0, alpha.shape[0], _BAND_ROWS):
        rows = resampler.push(torch.from_numpy(alpha[top : top + _BAND_ROWS].astype(np.float32))[None])[
            0
        ].numpy()
        filler((rows.clip(0, limit) + 0.5).astype(alpha.dtype))
    return out
