"""Group normalisation in float32 whose result on a CPU does not depend on the number of threads.

PyTorch's kernel for channels-last maps divides the positions among the threads and adds up the parts, so one
thread and two threads round differently, and everything after it differs too. Without gradients, on a CPU,
the sums here are over fixed parts of the map, each channel from the first position to the last, and the parts
are combined in float64: the same picture has the same bytes in a worker with one thread and on a laptop with
eight.

    y = (x - mean_g) / sqrt(var_g + eps) * weight + bias = x * factor_c + summand_c

with mean and variance over a group g of channels. Squares are summed about the mean of their part, M2 = sum
over parts of M2_p + n_p (mean_p - mean)^2 (Chan, Golub, LeVeque, 1979), so the map is read once for both, and
a part stays in the cache. Half precision is converted to float32 part by part, so no float32 copy of the map
is made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_PART_VALUES = 2**18  # 1 MiB in float32: stays in the cache between the passes


class GroupNorm32(nn.GroupNorm):
    """GroupNorm whose statistics are at least float32; the result has the dtype of the input."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and dtype."""
        return _on_cpu(self, input, None, silu=False) if _applies(input) else _group_norm(self, input)


def norm_silu(norm: nn.GroupNorm, x: Tensor, modulation: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Return silu(norm(x) * (1 + scale) + shift); on a CPU without gradients, in one pass after the
    statistics.

    Args:
        norm: Normalisation over the channels of x.
        x: Feature map, (B, C, H, W).
        modulation: Scale and shift, (B, C, 1, 1) each; None is zero for both.

    Returns:
        A map of the shape and dtype of x.
    """
    if _applies(x):
        return _on_cpu(norm, x, modulation, silu=True)
    h = _group_norm(norm, x)
    if modulation is not None:
        h = h * (1 + modulation[0]) + modulation[1]
    return F.silu(h, inplace=not torch.is_grad_enabled())


def affine_of(
    norm: nn.GroupNorm, rows: Tensor, modulation: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the normalisation and modulation of one picture as a factor and a summand for each channel.

    Args:
        norm: Normalisation over C channels.
        rows: Map of the picture, (H, W, C), contiguous.
        modulation: Scale and shift, (C,) each: the result is normalised * (1 + scale) + shift.

    Returns:
        Factor and summand, float32 (C,) each.
    """
    counts, means, squares = [], [], []
    scratch = _scratch(rows)
    for part in _parts(rows):
        values = scratch[: len(part)].copy_(part)
        counts.append(len(part))
        means.append(values.mean(0))
        squares.append(values.sub_(means[-1]).square_().sum(0))
    groups, width = norm.num_groups, rows.shape[2] // norm.num_groups
    weights = torch.tensor(counts, dtype=torch.float64)[:, None] / sum(counts)
    part_means = torch.stack(means).double()
    mean = (part_means * weights).sum(0).reshape(groups, width).mean(1).repeat_interleave(width)
    within = torch.stack(squares).double().sum(0) / sum(counts)
    between = ((part_means - mean).square() * weights).sum(0)
    variance = (within + between).reshape(groups, width).mean(1)
    factor = norm.weight.double() * (variance + norm.eps).rsqrt().repeat_interleave(width)
    summand = norm.bias.double() - mean * factor
    if modulation is not None:
        factor, summand = factor * (1 + modulation[0]), summand * (1 + modulation[0]) + modulation[1]
    return factor.float(), summand.float()


def _applies(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps).to(
        x.dtype
    )


def _on_cpu(norm: nn.GroupNorm, x: Tensor, modulation: tuple[Tensor, Tensor] | None, *, silu: bool) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    out = torch.empty_like(x)
    scratch = _scratch(x[0].permute(1, 2, 0))
    for i, (rows, into) in enumerate(zip(x.permute(0, 2, 3, 1), out.permute(0, 2, 3, 1), strict=True)):
        of_picture = None if modulation is None else (modulation[0][i].flatten(), modulation[1][i].flatten())
        factor, summand = affine_of(norm, rows, of_picture)
        for part, place in zip(_parts(rows), _parts(into), strict=True):
            values = scratch[: len(part)].copy_(part)
            torch.addcmul(summand, values, factor, out=values)
            place.copy_(F.silu(values, inplace=True) if silu else values)
    return out


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    """(H, W, C), contiguous -> views (n, C)."""
    return rows.view(-1, rows.shape[2]).split(max(1, _PART_VALUES // rows.shape[2]))


def _scratch(rows: Tensor) -> Tensor:
    """Return a reusable buffer for one part in float32: fresh memory would not be in the cache."""
    return torch.empty_like(_parts(rows)[0], dtype=torch.float32)
