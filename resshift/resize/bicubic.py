"""Bicubic enlargement as the models expect it (`upsample`), and bicubic resizing of a picture that comes in
rows (`RowResampler`), antialiased when shrinking as in `torch.nn.functional.interpolate(antialias=True)`:

    out_i = sum_k w((k - c_i) / s) row_k / sum_k w((k - c_i) / s)

    c_i = (i + 1/2) in / out - 1/2        s = max(1, in / out)

w is the cubic kernel with a = -0.5 and support [-2, 2]. Samples outside the picture have weight zero. A row
is a sum in a fixed order, so bands of any height give the same bytes.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def upsample(lq: Tensor, scale: int) -> Tensor:
    """Enlarge (B, 3, h, w) to the output size as the released models expect: bicubic with a = -0.75, aligned
    by pixel areas, not clamped.
    """
    size = (lq.shape[2] * scale, lq.shape[3] * scale)
    return lq if scale == 1 else F.interpolate(lq, size=size, mode="bicubic")


class RowResampler:
    """Resize a picture given as rows from top to bottom; each output row is returned as soon as its input is
    complete.

    Args:
        height: Number of rows of the picture.
        width: Width of the picture.
        out_height: Number of rows of the result, at least 1.
        out_width: Width of the result, at least 1.
    """

    def __init__(self, height: int, width: int, out_height: int, out_width: int) -> None:
        self.height, self.width, self.out_height, self.out_width = height, width, out_height, out_width
        self._rows: deque[Tensor] = deque()
        self._first = self._end = self._i_out = 0

    def push(self, rows: Tensor) -> Tensor:
        """Add rows, (C, n, width) float32, and return the rows that are now complete, (C, m, out_width); m
        may be 0.
        """
        if not rows.shape[1]:
            return rows.new_empty((rows.shape[0], 0, self.out_width))
        if self.out_width != self.width:
            size = (rows.shape[1], self.out_width)
            rows = F.interpolate(rows[None], size=size, mode="bicubic", antialias=True, align_corners=False)[
                0
            ]
        if self.out_height == self.height:
            return rows
        self._rows.extend(rows.unbind(1))
        self._end += rows.shape[1]
        out: list[Tensor] = []
        while self._i_out < self.out_height:
            first, weights = vertical_taps(self._i_out, self.height, self.out_height)
            if first + len(weights) > self._end:
                break
            while self._first < first:
                self._rows.popleft()
                self._first += 1
            row = self._rows[first - self._first] * float(weights[0])
            for k, weight in enumerate(weights[1:], first - self._first + 1):
                row = row + self._rows[k] * float(weight)
            out.append(row)
            self._i_out += 1
        return torch.stack(out, 1) if out else rows.new_empty((rows.shape[0], 0, self.out_width))


def vertical_taps(i_out: int, height: int, out_height: int) -> tuple[int, np.ndarray]:
    """Return the first row that output row `i_out` reads, and the weights of this and the following rows,
    float64 with sum 1.
    """
    ratio = height / out_height
    stretch = max(1.0, ratio)
    centre = (i_out + 0.5) * ratio - 0.5
    first = max(0, math.ceil(centre - 2 * stretch))
    last = min(height - 1, math.floor(centre + 2 * stretch))
    weights = _cubic(np.abs((np.arange(first, last + 1) - centre) / stretch))
    return first, weights / weights.sum()


def _cubic(x: np.ndarray) -> np.ndarray:
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
