"""Give a result the colours of its input, where "colour" is what is left after a wide blur.

    wavelet:  hq + enlarge(blur(lq - shrink(hq)))       the low band of the result is replaced by that of the input
    adain:    (hq - mean(shrink(hq))) std(lq) / std(shrink(hq)) + mean(lq), each channel, over the whole picture

`shrink` is the mean over the area of an input pixel. The blur is a Gaussian of 4.6 input pixels, about the low band of a five-level "à
trous" transform at four times the size, which others use for this (StableSR, InvSR).

`WaveletFix` works on rows and needs a few dozen of them at a time. The statistics of `adain` need the whole picture first.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

ColourFix = Literal["none", "wavelet", "adain"]
COLOUR_FIXES: tuple[ColourFix, ...] = ("none", "wavelet", "adain")

_SIGMA, _REACH = 4.6, 12
_GAUSS = np.exp(-0.5 * (np.arange(-_REACH, _REACH + 1) / _SIGMA) ** 2)
_WEIGHTS = _GAUSS / _GAUSS.sum()


class WaveletFix:
    """Correct rows of the result from the top to the bottom.

    Args:
        height: of the input.
        scale: sides of the result over sides of the input.
    """

    def __init__(self, height: int, scale: int) -> None:
        self.height, self.scale = height, scale
        self._pending: list[Tensor] = []  # one entry an input row: (3, scale, W scale)
        self._across: list[Tensor] = []  # differences of input rows, blurred along the row: (3, W)
        self._first = 0  # the input row of _across[0]
        self._done = 0  # input rows that have been returned

    def push(self, hq: Tensor, lq: Tensor) -> Tensor:
        """Add rows of the result (3, n scale, W scale) and of the input (3, n, W) -> corrected rows (3, m scale, W scale); m may be 0."""
        difference = lq - F.avg_pool2d(hq[None], self.scale)[0]
        self._across += _blurred(difference, dim=2).unbind(1)
        self._pending += hq.split(self.scale, dim=1)
        known = self._first + len(self._across)
        # A row of the correction reads one row of the blur beyond it, that one _REACH rows of differences.
        ready = self.height if known == self.height else max(self._done, known - _REACH - 1)
        if ready == self._done:
            return hq[:, :0]
        low = torch.stack([self._blur_at(i) for i in range(self._done - 1, ready + 1)], 1)
        low = _enlarged(low, self.scale)  # the rows; low has one more above and below
        enlarged = _enlarged(torch.cat([low[:, :, :1], low, low[:, :, -1:]], 2).transpose(1, 2), self.scale).transpose(1, 2)
        out = torch.cat(self._pending[: ready - self._done], 1) + enlarged
        del self._pending[: ready - self._done]
        self._done = ready
        drop = max(0, self._done - 1 - _REACH - self._first)
        del self._across[:drop]
        self._first += drop
        return out

    def _blur_at(self, row: int) -> Tensor:
        """The blurred difference of an input row; outside the picture the nearest one."""
        row = min(max(row, 0), self.height - 1)
        indices = [min(max(row + k, 0), self.height - 1) - self._first for k in range(-_REACH, _REACH + 1)]
        total = self._across[indices[0]] * float(_WEIGHTS[0])
        for i, weight in zip(indices[1:], _WEIGHTS[1:], strict=True):
            total = total + self._across[i] * float(weight)
        return total


def _blurred(rows: Tensor, dim: int) -> Tensor:
    """Blur along one axis, the edge repeated. A sum in a fixed order: the same bytes for bands of any height."""
    length = rows.shape[dim]
    positions = torch.arange(length, device=rows.device)
    total = torch.zeros_like(rows)
    for k, weight in zip(range(-_REACH, _REACH + 1), _WEIGHTS, strict=True):
        total = total + rows.index_select(dim, (positions + k).clamp(0, length - 1)) * float(weight)
    return total


def _enlarged(rows: Tensor, scale: int) -> Tensor:
    """Bilinear interpolation along axis 1 between the rows 1 ... n of n + 2, as plain sums for the same reason."""
    above, here, below = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
    phases: list[Tensor] = []
    for i in range(scale):
        offset = (i + 0.5) / scale - 0.5
        other, share = (below, offset) if offset >= 0 else (above, -offset)
        phases.append(here * (1 - share) + other * share)
    return torch.stack(phases, 2).flatten(1, 2)


def adain(hq: Tensor, lq: Tensor, scale: int) -> Tensor:
    """Return the whole result (3, H scale, W scale) with mean and spread of each channel of the input (3, H, W)."""
    shrunk = F.avg_pool2d(hq[None], scale)[0]
    ours, wanted = ((x.mean((1, 2), keepdim=True), x.std((1, 2), correction=0, keepdim=True)) for x in (shrunk, lq))
    return (hq - ours[0]) * (wanted[1] / ours[1].clamp(min=1e-6)) + wanted[0]
