"""Pictures of different sizes in one tensor.

A canvas is (B, C, S, S); picture b is its top left square of side `sides[b]`, an int64 tensor (B,). What lies
outside is finite and means nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def taken(canvas: Tensor, indices: Tensor) -> Tensor:
    """Return (B, C, N, N): the pixels at rows `indices[b]` and columns `indices[b]` of picture b, (B, N)."""
    batch, channels, side, _ = canvas.shape
    num = indices.shape[1]
    rows = canvas.gather(2, indices[:, None, :, None].expand(batch, channels, num, side))
    return rows.gather(3, indices[:, None, None, :].expand(batch, channels, num, num))


def steps(start: int, stop: int, like: Tensor) -> Tensor:
    """Return the integers [start, stop), (1, n), on the device of a tensor."""
    return torch.arange(start, stop, device=like.device)[None]


def inside(sides: Tensor, side: int) -> Tensor:
    """Tell which pixels of canvases of this side belong to the pictures, (B, 1, side, side) bool."""
    along = steps(0, side, sides) < sides[:, None]
    return (along[:, None, :, None]) & (along[:, None, None, :])


def chosen(condition: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Return for each sample `yes` or `no`, (B, ...); the condition is (B,)."""
    return torch.where(condition.view(-1, *(1,) * (yes.ndim - 1)), yes, no)


def to_levels(canvas: Tensor) -> Tensor:
    """Return values of [0, 1], clipped, as 8-bit levels: integers in the dtype of the canvas, rounded half to
    even.
    """
    return (canvas.clamp(0, 1) * 255).round()


def from_levels(levels: Tensor) -> Tensor:
    """Return 8-bit levels as float32 in [0, 1]."""
    return levels.float() * (1 / 255)
