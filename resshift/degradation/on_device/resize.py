"""Resizing with another ratio and mode for each sample, as products with matrices: out = R picture R^T.

A row of R holds the weights of an output pixel (`resshift.degradation.resize`). Results equal those of the
CPU within 1e-5 of the range.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from resshift.degradation.on_device.canvas import steps
from resshift.degradation.on_device.plan import MODES

_AREA, _BILINEAR = MODES.index("area"), MODES.index("bilinear")
_A = -0.75  # of F.interpolate and OpenCV
_A_MATLAB = -0.5

Distances = TypeVar("Distances", Tensor, NDArray[np.float64])


def resize(canvas: Tensor, sides: Tensor, to_sides: Tensor, mode: Tensor, side: int) -> Tensor:
    """Resize each picture.

    Args:
        canvas: Canvases, (B, C, S, S) float32.
        sides, to_sides: Sides of the pictures before and after, int64 (B,).
        mode: Indices of `MODES`, (B,).
        side: Side of the canvases of the result, at least that of each picture.
    """
    weights = _weights(sides, to_sides, mode, canvas.shape[3], side)
    return weights[:, None] @ canvas @ weights.mT[:, None]


def _weights(sides: Tensor, to_sides: Tensor, mode: Tensor, side_in: int, side_out: int) -> Tensor:
    """Return R for each sample, (B, side_out, side_in) float32."""
    num_in, num_out = sides[:, None, None], to_sides[:, None, None]
    # Rows beyond the picture repeat its last one.
    i_out = steps(0, side_out, sides)[..., None].minimum(num_out - 1)
    i_in = steps(0, side_in, sides)[:, None]
    first, end = i_out * num_in // num_out, -(-(i_out + 1) * num_in // num_out)
    area = ((i_in >= first) & (i_in < end)) / (end - first)
    centre = (i_out + 0.5) * (num_in.double() / num_out) - 0.5
    bilinear = (1 - (centre.maximum(centre.new_zeros(())).minimum(num_in - 1) - i_in).abs()).clamp(min=0)
    # Two pixels beyond each edge, whose weights are added to that of the edge.
    taps = steps(-2, side_in + 2, sides)[:, None]
    weights = _cubic((centre - taps).abs(), _A)
    beyond = (weights * (taps >= num_in)).sum(dim=2, keepdim=True)
    bicubic = weights[..., 2:-2] * (i_in < num_in) + beyond * (i_in == num_in - 1)
    bicubic = bicubic + weights[..., :2].sum(dim=2, keepdim=True) * (i_in == 0)
    of = mode[:, None, None]
    return torch.where(of == _AREA, area, torch.where(of == _BILINEAR, bilinear, bicubic)).float()


def _cubic(x: Distances, a: float) -> Distances:
    """Return the cubic convolution kernel at distances x of at least 0."""
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return (x <= 1) * near + ((x > 1) & (x < 2)) * far


def matlab_weights(side: int, scale: int) -> NDArray[np.float32]:
    """Return R of `imresize(picture, 1 / scale)`, (side / scale, side) float32."""
    centres = (np.arange(side // scale) + 0.5) * scale - 0.5
    taps = np.arange(-2 * scale, side + 2 * scale)  # beyond the edges the picture is mirrored
    weights = _cubic(np.abs(centres[:, None] - taps) / scale, _A_MATLAB)
    weights /= weights.sum(axis=1, keepdims=True)
    folded = taps % (2 * side)
    return (weights @ np.eye(side)[np.minimum(folded, 2 * side - 1 - folded)]).astype(np.float32)
