"""Give a result the colours of its input, where "colour" is the low band, after a wide blur.

    hq + enlarge(blur(lq - shrink(hq)))       the low band of the result is replaced by that of the input

`shrink` is the mean over the area of an input pixel. The blur is a Gaussian of 4.6 input pixels, about the
low band of a five-level "à trous" transform at four times the size, which others use for this (StableSR,
InvSR).

Measured with the first tiny-x4 on Set5: the mean difference of the low band to the true picture is 0.82 in
CIE76 without the fix and 0.24 with it, and PSNR is 0.05 dB higher.

`WaveletFix` works on rows and needs a few dozen of them at a time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

_SIGMA, _REACH = 4.6, 12
_GAUSS = np.exp(-0.5 * (np.arange(-_REACH, _REACH + 1) / _SIGMA) ** 2)
_WEIGHTS = _GAUSS / _GAUSS.sum()


class WaveletFix:
    """Correct rows of the result from the top to the bottom.

    Args:
        height: Height of the input.
        scale: Sides of the result over sides of the input.
    """

    def __init__(self, height: int, scale: int) -> None:
        self.height, self.scale = height, scale
        self._pending: list[
            Tensor
        ] = []  # rows of the result that have not been returned, (3, n scale, W scale) each
        self._across: Tensor | None = (
            None  # differences of input rows from _first on, blurred along the row: (3, n, W)
        )
        self._first = 0
        self._done = 0  # input rows that have been returned

    def push(self, hq: Tensor, lq: Tensor) -> Tensor:
        """Add rows of the result, (3, n scale, W scale), and of the input, (3, n, W), and return the rows
        that can be corrected now, (3, m scale, W scale); m may be 0.
        """
        across = _blurred(lq - F.avg_pool2d(hq[None], self.scale)[0])
        self._across = across if self._across is None else torch.cat([self._across, across], 1)
        self._pending.append(hq)
        known = self._first + self._across.shape[1]
        # A row of the correction reads one row of the blur beyond it, that one _REACH rows of differences.
        ready = self.height if known == self.height else max(self._done, known - _REACH - 1)
        if ready == self._done:
            return hq[:, :0]
        low = _enlarged(self._blur_down(self._done - 1, ready + 1), self.scale)
        low = _enlarged(
            torch.cat([low[:, :, :1], low, low[:, :, -1:]], 2).transpose(1, 2), self.scale
        ).transpose(1, 2)
        whole = torch.cat(self._pending, 1)
        count = (ready - self._done) * self.scale
        self._pending = [whole[:, count:]]
        self._done = ready
        drop = max(0, self._done - 1 - _REACH - self._first)
        self._across = self._across[:, drop:]
        self._first += drop
        return whole[:, :count] + low

    def _blur_down(self, top: int, bottom: int) -> Tensor:
        """Return the blurred difference at input rows [top, bottom); beyond the picture that of the nearest
        row.
        """
        assert self._across is not None
        rows = torch.arange(top, bottom, device=self._across.device).clamp(0, self.height - 1)
        total: Tensor | None = None
        for k, weight in zip(range(-_REACH, _REACH + 1), _WEIGHTS, strict=True):
            part = self._across.index_select(1, (rows + k).clamp(0, self.height - 1) - self._first) * float(
                weight
            )
            total = part if total is None else total + part
        assert total is not None
        return total


def _blurred(rows: Tensor) -> Tensor:
    """Blur along the rows, with the edge repeated. The order of summation is fixed, so bands of any height
    give the same bytes.
    """
    length = rows.shape[2]
    positions = torch.arange(length, device=rows.device)
    total = torch.zeros_like(rows)
    for k, weight in zip(range(-_REACH, _REACH + 1), _WEIGHTS, strict=True):
        total = total + rows.index_select(2, (positions + k).clamp(0, length - 1)) * float(weight)
    return total


def _enlarged(rows: Tensor, scale: int) -> Tensor:
    """Interpolate bilinearly along axis 1 between the rows 1 ... n of n + 2, as plain sums for the same
    reason.
    """
    above, here, below = rows[:, :-2], rows[:, 1:-1], rows[:, 2:]
    phases: list[Tensor] = []
    for i in range(scale):
        offset = (i + 0.5) / scale - 0.5
        other, share = (below, offset) if offset >= 0 else (above, -offset)
        phases.append(here * (1 - share) + other * share)
    return torch.stack(phases, 2).flatten(1, 2)
