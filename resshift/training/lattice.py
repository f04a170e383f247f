"""Does a picture show the lattice of positions it was made from?

A network that makes f x f pixels from one position likes to treat them differently, and the same way
everywhere: a screen of dots, a weave. LPIPS and PSNR hardly see it, people do. Photographs do not know where
a position lies, and that can be asked of a picture in two ways:

    L = U + R / 2

U, unevenness: what a difference between neighbours is on average depends on their distance, not on where in a
position they are. With E_l(p) the mean of |x(q + l) - x(q)|^2 over all pixels q of phase p in (0 .. f-1)^2,
for lags l of one and two pixels, and the same for second differences: U = mean over l of var over p of
log(E_l(p) + eps). It has no opinion about contrast or sharpness, and counts a pattern as detail: one that
fills in where detail is missing passes.

R, lines: no frequency k / f has more power than those around it. With P the power spectrum of windows of 8 f
and 16 f pixels (Hann, half overlapping, mean over windows and channels): R = mean over sizes and k of max(0,
log P(k / f) - mean of log P around it), the first over 3 x 3 bins, the second over those at a distance of 3
and 4. Small windows see a pattern that changes with the content, large ones a fainter one that does not.

S, screen: the same of whole pictures, for what the pictures of a batch have in common. P is the spectrum of a
picture under one Hann window, and both means are of logarithms, over bins and pictures, so that chance
averages out: S = mean over k of max(0, mean log P near k / f - mean log P at a distance of 3 to 6 bins). It
sees the faintest pattern, if it is the same over a picture.

(In the words of signal processing: the cyclostationarity of period f, of first and of second order.) Trained
against one alone, a network moves its pattern to where the other looks. For f = 4 L of photographs of 256 x
256 is 0.07 to 0.08, of bicubic interpolation by four 0.24 to 0.27; of white noise 0.01, and 0.02 at 128 x
128, by the luck of the sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resshift.config import LATTICE_POSITIONS

_LAGS = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
# Of values in [-1, 1]. Squares of differences: less than half a level of 255 is not seen. Power: of noise of
# an eighth of a level.
_DIFFERENCE, _POWER = 1e-5, 1e-6
_NEAR, _FAR, _BEYOND = 3, 4, 6  # distances of the bins around a frequency, beyond the window's own blur


def lattice(x: Tensor, period: int) -> Tensor:
    """Return L of each picture; differentiable.

    Args:
        x: in [-1, 1], (B, C, H, W); a position begins at the corner. Energies add up over the channels,
            powers are their mean.
        period: f, pixels of a position along a side; at least 2.

    Returns:
        (B,), of the type of `x`; not negative.

    Raises:
        ValueError: a side has less than 16 positions, or the period is less than 2.
    """
    _check(x, period)
    return unevenness(x, period) + lines(x, period) / 2


def _check(x: Tensor, period: int) -> None:
    if period < 2 or min(x.shape[2:]) < LATTICE_POSITIONS * period:
        raise ValueError(
            f"a lattice needs a period of 2 and sides of {LATTICE_POSITIONS} periods at least, got period "
            f"{period} and {tuple(x.shape)}"
        )


def unevenness(x: Tensor, period: int) -> Tensor:
    """Return U of each picture, (B,)."""
    first = [_difference(x, *lag) for lag in _LAGS]
    second = [_difference(one, *lag) for one, lag in zip(first, _LAGS, strict=True) if sum(lag) == 1]
    return torch.stack([_variance(one, period) for one in (*first, *second)]).mean(0)


def lines(x: Tensor, period: int) -> Tensor:
    """Return R of each picture, (B,)."""
    # Three windows a side at least: of few, the logarithm of a mean is well above the mean of logarithms.
    # `LATTICE_POSITIONS` is enough for the smaller ones.
    sizes = [size for size in (8 * period, 16 * period) if 2 * size <= min(x.shape[2:])]
    return torch.stack([_lines(x, period, size) for size in sizes]).mean(0)


def screen(x: Tensor, period: int) -> Tensor:
    """Return S of a batch, (). Arguments and errors are those of `lattice`; what is more than whole positions
    is left out.
    """
    _check(x, period)
    height, width = (side // period * period for side in x.shape[2:])
    x = x[..., :height, :width]
    x = x - x.mean((2, 3), keepdim=True)
    across, down = (torch.hann_window(side, dtype=x.dtype, device=x.device) for side in (width, height))
    window = down[:, None] * across
    power = torch.fft.fft2(x * window).abs().square().mean(1) + _POWER * window.square().sum()
    near, far = _weights(_BEYOND, power)
    around = _around(power.log().mean(0), period, _BEYOND)
    return F.relu((around * (near - far)).sum((-2, -1))).mean()


def _difference(x: Tensor, down: int, across: int) -> Tensor:
    height, width = x.shape[2:]
    return x[..., down:, across:] - x[..., : height - down, : width - across]


def _variance(difference: Tensor, period: int) -> Tensor:
    height, width = (
        side // period * period for side in difference.shape[2:]
    )  # as many pixels of every phase
    energy = difference[..., :height, :width].square().sum(1, keepdim=True)
    return torch.log(F.pixel_unshuffle(energy, period).mean((2, 3)) + _DIFFERENCE).var(1, correction=0)


def _lines(x: Tensor, period: int, size: int) -> Tensor:
    window = torch.hann_window(size, dtype=x.dtype, device=x.device)
    window = window[:, None] * window
    patches = x.unfold(2, size, size // 2).unfold(3, size, size // 2)  # (B, C, n, m, size, size)
    patches = patches - patches.mean((-2, -1), keepdim=True)
    power = (
        torch.fft.fft2(patches * window).abs().square().mean((1, 2, 3)) + _POWER * window.square().sum()
    )  # (B, size, size)
    near, far = _weights(_FAR, power)
    around = _around(power, period, _FAR)
    return F.relu((around * near).sum((-2, -1)).log() - (around.log() * far).sum((-2, -1))).mean(0)


def _around(power: Tensor, period: int, reach: int) -> Tensor:
    """Return the bins around every frequency k / period but 0: (..., height, width) -> (period^2 - 1, ..., 2
    reach + 1, 2 reach + 1).
    """
    (height, width), size = power.shape[-2:], 2 * reach + 1
    shifts = [
        (reach - down * height // period, reach - across * width // period)
        for down, across in np.ndindex(period, period)
    ]
    return torch.stack([power.roll(shift, (-2, -1))[..., :size, :size] for shift in shifts[1:]])


def _weights(reach: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights of a mean over 3 x 3 bins and over those at a distance of `_NEAR` to `reach`, both
    (2 reach + 1, 2 reach + 1).
    """
    distance = (torch.arange(2 * reach + 1, device=like.device) - reach).abs()
    distance = torch.maximum(distance[:, None], distance)
    # Weights instead of masks as indices, which would wait for the device.
    near, far = ((distance <= 1).to(like.dtype), (distance >= _NEAR).to(like.dtype))
    return near / near.sum(), far / far.sum()
