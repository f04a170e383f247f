"""From a model's result to a caller's pixels, row by row: crop, colour fix, resize, quantise."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resshift import images
from resshift.resize.bicubic import RowResampler
from resshift.tiles.colour_fix import WaveletFix

# Alpha rows that are resized at a time.
_BAND_ROWS = 64


class RowOutput:
    """The way from a model's result to rows of integers; neither is ever held whole in float32.

    Args:
        source: Input, (h, w, 1 or 3) uint8 or uint16.
        pixels: Array that the result is written to, (H, W, 1 or 3) of the same dtype.
        scale: Scale of the model.
        fixes_colour: Whether the low band becomes that of the input.
        hole: (h, w) bool, True where the result is wanted: elsewhere it is the source. Only at scale 1; None
            for everywhere.
    """

    def __init__(
        self,
        source: NDArray[Any],
        pixels: NDArray[Any],
        scale: int,
        fixes_colour: bool = True,
        hole: NDArray[np.bool_] | None = None,
    ) -> None:
        self.hole = hole
        self.source, self.pixels, self.scale = source, pixels, scale
        self.height, self.width, channels = source.shape
        self.is_grey = channels == 1
        self.row = 0  # rows of the result that have come, not more than belong to the picture
        self.filled = 0  # rows of `pixels`
        self.wavelet = WaveletFix(self.height, scale) if fixes_colour else None
        self.resampler = RowResampler(
            self.height * scale, self.width * scale, pixels.shape[0], pixels.shape[1]
        )

    def push(self, rows: Tensor) -> None:
        """Take the next rows of the model's result, (3, n, padded width)."""
        rows = rows[:, : self.height * self.scale - self.row, : self.width * self.scale].float()
        if not rows.shape[1]:
            return
        first, self.row = self.row, self.row + rows.shape[1]
        if self.wavelet is not None:
            source = self.source[first // self.scale : self.row // self.scale]
            rows = self.wavelet.push(rows, images.to_tensor(source)[0].to(rows.device))
        rows = rows.clamp(-1, 1)
        if self.hole is not None:
            known = images.to_tensor(self.source[first : self.row])[0].to(rows.device)
            rows = torch.where(torch.from_numpy(self.hole[first : self.row]).to(rows.device), rows, known)
        rows = self.resampler.push((rows.mean(0, keepdim=True) if self.is_grey else rows).cpu())
        if rows.shape[1]:
            done, self.filled = self.filled, self.filled + rows.shape[1]
            self.pixels[done : self.filled] = images.from_tensor(rows, dtype=self.pixels.dtype.type)


def resize_alpha(alpha: NDArray[Any], height: int, width: int) -> NDArray[Any]:
    """Bring (H, W) to another size as the colours are resized."""
    resampler = RowResampler(alpha.shape[0], alpha.shape[1], height, width)
    limit, bands = np.iinfo(alpha.dtype).max, list[NDArray[Any]]()
    for top in range(0, alpha.shape[0], _BAND_ROWS):
        rows = torch.from_numpy(alpha[top : top + _BAND_ROWS].astype(np.float32))[None]
        rows = resampler.push(rows)[0].numpy()
        bands.append((rows.clip(0, limit) + 0.5).astype(alpha.dtype))
    return np.concatenate(bands)
