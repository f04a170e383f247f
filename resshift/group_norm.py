"""Group normalisation in float32 whose result on a CPU does not depend on the number of threads.

PyTorch's kernel for channels-last maps gives every thread a part of the positions and adds up the parts, so one thread and two round
differently; everything after it then differs too. Without gradients, on a CPU, the sums here are over fixed parts of the map, each channel
from the first position to the last, and the parts are added in float64: the same picture has the same bytes in a worker with one thread and
on a laptop with eight.

    y = (x - mean_g) / sqrt(var_g + eps) * weight + bias = x * factor_c + summand_c        mean and variance over a group g of channels
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PART_VALUES = 2**18  # 1 MiB: stays in the cache between the two passes


class GroupNorm32(nn.GroupNorm):
    """GroupNorm whose statistics are always float32 or better, cast back to the input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> same."""
        if input.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return F.group_norm(input.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(input.dtype)
        x = input.float().permute(0, 2, 3, 1)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for i, rows in enumerate(x):
            factor, summand = affine_of(self, rows)
            torch.addcmul(summand, rows, factor, out=out[i])
        return out.permute(0, 3, 1, 2).to(input.dtype)


def affine_of(norm: nn.GroupNorm, rows: Tensor, modulation: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Return normalisation and modulation of one picture as a factor and a summand a channel, float32.

    Args:
        norm: over C channels.
        rows: the map, (H, W, C) float32.
        modulation: scale and shift, (C,) each: the result is normalised * (1 + scale) + shift.

    Returns:
        factor and summand, (C,) each. Statistics are taken in two passes.
    """
    values = rows.reshape(-1, rows.shape[2])
    parts = values.split(max(1, _PART_VALUES // values.shape[1]))
    groups, width = norm.num_groups, values.shape[1] // norm.num_groups
    count = values.shape[0] * width
    total = torch.stack([part.sum(0) for part in parts]).double().sum(0)
    mean = (total.reshape(groups, width).sum(1) / count).repeat_interleave(width)
    centre = mean.float()
    squares = torch.stack([(part - centre).square_().sum(0) for part in parts]).double().sum(0)
    variance = squares.reshape(groups, width).sum(1) / count
    factor = norm.weight.double() * (variance + norm.eps).rsqrt().repeat_interleave(width)
    summand = norm.bias.double() - mean * factor
    if modulation is not None:
        factor, summand = factor * (1 + modulation[0]), summand * (1 + modulation[0]) + modulation[1]
    return factor.float(), summand.float()
