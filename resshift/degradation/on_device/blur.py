"""Blur with another kernel for each sample: kernels from their formulas (`resshift.degradation.kernels`),
correlation in Fourier space.

Results equal those of the CPU within 1e-5 of the range.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from resshift.degradation.on_device.canvas import chosen, steps, taken
from resshift.degradation.on_device.plan import KERNELS, KernelPlan

_SINC = KERNELS.index("sinc")
_PLATEAUS = tuple(KERNELS.index(name) for name in ("plateau_iso", "plateau_aniso"))


def kernels(plans: Sequence[KernelPlan], side: int) -> tuple[Tensor, ...]:
    """Return the kernels of each plan, (B, side, side) float32 with sum 1, in the middle of the squares.
    `side` is odd and at least that of each kernel.
    """
    column = KernelPlan(*(torch.cat(values)[:, None, None] for values in zip(*plans, strict=True)))
    offsets = torch.arange(side, device=column.type.device, dtype=torch.float64) - side // 2
    x, y = offsets[None, None, :], offsets[None, :, None]
    is_sinc = column.type == _SINC
    # Values of other types may be 0 where this one divides by them.
    sigma_x, sigma_y = (
        torch.where(sigma > 0, sigma, torch.ones_like(sigma)) for sigma in (column.sigma_x, column.sigma_y)
    )
    cos, sin = column.theta.cos(), column.theta.sin()
    q = ((cos * x + sin * y) / sigma_x).square() + ((cos * y - sin * x) / sigma_y).square()
    power = q**column.beta
    is_plateau = (column.type == _PLATEAUS[0]) | (column.type == _PLATEAUS[1])
    k = torch.where(is_plateau, 1 / (1 + power), (-0.5 * power).exp())
    r = torch.hypot(x, y)
    away = r.clamp(min=0.5)
    j1 = cast(Tensor, torch.special.bessel_j1(column.omega * away))  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
    sinc = column.omega * j1 / (2 * math.pi * away)
    sinc = torch.where(r > 0, sinc, column.omega.square() / (4 * math.pi))
    k = torch.where(is_sinc, sinc, k)
    radius = column.size // 2
    k = torch.where((x.abs() <= radius) & (y.abs() <= radius), k, torch.zeros_like(k))
    return (k / k.sum(dim=(1, 2), keepdim=True)).float().chunk(len(plans))


def blur(canvas: Tensor, sides: Tensor, kernel: Tensor, is_pulse: Tensor) -> Tensor:
    """Correlate every channel of each picture with its kernel; borders are reflected (101).

    Args:
        canvas: Canvases, (B, C, S, S) float32.
        sides: Sides of the pictures.
        kernel: Kernels, (B, K, K) with K odd.
        is_pulse: Whether a picture stays as it is, (B,).
    """
    side, radius = canvas.shape[3], kernel.shape[2] // 2
    padded = taken(canvas, _reflected(steps(-radius, side + radius, sides), sides))
    length = _fast_length(side + 2 * radius)
    spectrum = torch.fft.rfft2(padded, s=(length, length))
    spectrum = spectrum * torch.fft.rfft2(kernel, s=(length, length)).conj()[:, None]
    out = torch.fft.irfft2(spectrum, s=(length, length))[..., :side, :side]
    return chosen(is_pulse, canvas, out)


def _reflected(positions: Tensor, sides: Tensor) -> Tensor:
    """Return where positions along a line lie in pictures that are reflected without repeating the edge."""
    period = (2 * (sides - 1)).clamp(min=1)[:, None]
    position = positions.remainder(period)
    return torch.minimum(position, period - position).minimum(sides[:, None] - 1)


def _fast_length(at_least: int) -> int:
    """Return the next length that has no prime factor above 5."""
    length = at_least
    while True:
        rest = length
        for prime in (2, 3, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return length
        length += 1
