"""Measures of visible lattices: periodic patterns in a picture with the period of the latent positions.

A network that computes f x f pixels from one position tends to treat them differently, and in the same way at
every position: the picture shows a screen of dots or a weave. LPIPS and PSNR hardly measure this, but people
see it. In photographs nothing depends on the phase of a pixel within a position, which gives two measures for
one picture:

    L = U + R / 2

U, unevenness: the mean difference between neighbours depends on their distance, not on their phase. With
E_l(p) the mean of |x(q + l) - x(q)|^2 over all pixels q of phase p in (0 .. f-1)^2, for lags l of one and two
pixels, and the same for second differences: U = mean over l of var over p of log(E_l(p) + eps). U does not
depend on contrast or sharpness. It cannot distinguish a pattern from detail, so a pattern that makes up for
missing detail is not found.

R, lines: no frequency k / f has more power than the frequencies around it. With P the power spectrum of
windows of 8 f and 16 f pixels (Hann, half overlapping, mean over windows and channels): R = mean over sizes
and k of max(0, log P(k / f) - mean of log P around it), the first over 3 x 3 bins, the second over bins at a
distance of 3 and 4. Small windows find a pattern that changes with the content, large windows find a fainter
one that does not.

A third measure is for a batch. S, screen: R of whole pictures, for a pattern that all pictures of a batch
share. P is the spectrum of a picture under one Hann window, and both means are of logarithms, over bins and
pictures, which averages out chance: S = mean over k of max(0, mean log P near k / f - mean log P at a
distance of 3 to 6 bins). S finds the faintest pattern, if it is the same over a picture.

A fourth measure is for the coarser levels of a U-Net, whose positions are f' x f' pixels, for example 8 x 8
and 16 x 16: a deterministic network that is asked for grain in an even area can only repeat it from position
to position, and it hatches stripes and edges. W, weave: R of windows of 4 f' pixels, whose lines are four
bins apart. With P the spectrum of a window and d = mean log P near k / f' - mean log P between the lines,

    W = mean over k of max(0, mean over windows of d) + 4 x mean over k and windows of max(0, d - 1)

Means are of logarithms, over all windows of a batch, so that an even area counts as much as a detailed one.
The second part is for a few windows, those along one stripe. Of 64 crops of 128 x 128 of photographs W is
0.09 for f' = 8 and 0.07 for f' = 16, by chance and from repeated patterns in them.

A fifth measure is for rows of beads along edges and stripes, which fill no window. B, beads: with P the power
spectrum of segments of 8 f pixels of a row or a column (Hann, half overlapping, mean over four lines side by
side and channels) and d = mean log P within one bin of k / f - mean log P two bins away, B is the mean of
max(0, d - 1) over k, segments, rows and columns. B of photographs is 0.006 to 0.007, by chance.

(In signal processing: cyclostationarity of period f, of first and of second order.) A network that is trained
against only one measure moves its pattern to where the other measures it. For f = 4, L of photographs of 256
x 256 is 0.07 to 0.08, and of bicubic interpolation by four 0.24 to 0.27; L of white noise is 0.01, and 0.02
at 128 x 128, by chance.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resshift.config import COARSE_POSITIONS, LATTICE_POSITIONS
from resshift.networks.config import HALVING

_LAGS = ((0, 1), (1, 0), (1, 1), (0, 2), (2, 0))
# Floors for values in [-1, 1]. Square of a difference: half a level of 255 is invisible. Power: that of noise
# of an eighth of a level.
_DIFFERENCE, _POWER = 1e-5, 1e-6
_RARE = 4.0  # weight of what only a few windows show
_BEADS = 10.0  # weight of B, whose mean is over all segments
_SEGMENT, _LINES = 8, 4  # periods of a segment, and lines side by side
_NEAR, _FAR, _BEYOND = 3, 4, 6  # distances of bins around a frequency, outside the main lobe of the window


def patterns(x: Tensor, period: int, coarsest: int) -> Tensor:
    """Return how visible the patterns of a network are in a batch, (): the mean of L, + S / 2, + 10 B, + W of
    the positions of every coarser level, up to `coarsest`.
    """
    shown = lattice(x, period).mean() + screen(x, period) / 2 + _BEADS * beads(x, period)
    while period < coarsest:
        period *= HALVING
        shown = shown + weave(x, period)
    return shown


def lattice(x: Tensor, period: int) -> Tensor:
    """Return L of each picture; differentiable.

    Args:
        x: Pictures in [-1, 1], (B, C, H, W), with a position that begins at the corner. Energies are summed
            over the channels, powers are averaged.
        period: Pixels of a position along a side, f; at least 2.

    Returns:
        (B,) of the dtype of `x`, not negative.

    Raises:
        ValueError: A side has fewer than 16 positions, or the period is less than 2.
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
    # At least three windows along a side: with fewer, the logarithm of the mean is well above the mean of
    # logarithms. `LATTICE_POSITIONS` is enough for the smaller windows.
    sizes = [size for size in (8 * period, 16 * period) if 2 * size <= min(x.shape[2:])]
    return torch.stack([_lines(x, period, size) for size in sizes]).mean(0)


def screen(x: Tensor, period: int) -> Tensor:
    """Return S of a batch, (). Arguments and errors are those of `lattice`; incomplete positions at the right
    and at the bottom are ignored.
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


def beads(x: Tensor, period: int) -> Tensor:
    """Return B of a batch, (). Arguments and errors are those of `lattice`."""
    _check(x, period)
    size = _SEGMENT * period
    window = torch.hann_window(size, dtype=x.dtype, device=x.device)
    bins = _SEGMENT * torch.arange(1, period, device=x.device)
    found = []
    for along in (x, x.mT):
        segments = along.unfold(3, size, size // 2)  # (B, C, lines, n, size)
        segments = segments - segments.mean(-1, keepdim=True)
        power = torch.fft.fft(segments * window).abs().square().mean(1) + _POWER * window.square().sum()
        power = F.avg_pool2d(power.transpose(1, 2), (_LINES, 1)).log()  # (B, n, lines / 4, size)
        near, far = (
            torch.stack([power[..., (bins + i) % size] for i in distances]).mean(0)
            for distances in ((-1, 0, 1), (-2, 2))
        )
        found.append(F.relu(near - far - 1).mean())
    return torch.stack(found).mean()


def weave(x: Tensor, period: int) -> Tensor:
    """Return W of a batch, (); differentiable. `x` is that of `lattice`; `period` is f'.

    Raises:
        ValueError: A side has fewer than 4 periods.
    """
    size = COARSE_POSITIONS * period
    if min(x.shape[2:]) < size:
        raise ValueError(
            f"a weave needs sides of {COARSE_POSITIONS} periods at least, got period {period} and "
            f"{tuple(x.shape)}"
        )
    around = _around(_window_powers(x, size).mean(1).log(), period, COARSE_POSITIONS // 2)
    near, far = _weights(COARSE_POSITIONS // 2, x, COARSE_POSITIONS // 2)
    excess = (around * (near - far)).sum((-2, -1))  # (period^2 - 1, B, n, m)
    return F.relu(excess.mean((1, 2, 3))).mean() + _RARE * F.relu(excess - 1).mean()


def _window_powers(x: Tensor, size: int) -> Tensor:
    """Return the power spectra of windows that overlap by half, (B, C, n, m, size, size)."""
    window = torch.hann_window(size, dtype=x.dtype, device=x.device)
    window = window[:, None] * window
    patches = x.unfold(2, size, size // 2).unfold(3, size, size // 2)
    patches = patches - patches.mean((-2, -1), keepdim=True)
    return torch.fft.fft2(patches * window).abs().square() + _POWER * window.square().sum()


def _difference(x: Tensor, down: int, across: int) -> Tensor:
    height, width = x.shape[2:]
    return x[..., down:, across:] - x[..., : height - down, : width - across]


def _variance(difference: Tensor, period: int) -> Tensor:
    height, width = (
        side // period * period for side in difference.shape[2:]
    )  # the same number of pixels for every phase
    energy = difference[..., :height, :width].square().sum(1, keepdim=True)
    return torch.log(F.pixel_unshuffle(energy, period).mean((2, 3)) + _DIFFERENCE).var(1, correction=0)


def _lines(x: Tensor, period: int, size: int) -> Tensor:
    power = _window_powers(x, size).mean((1, 2, 3))
    near, far = _weights(_FAR, power)
    around = _around(power, period, _FAR)
    return F.relu((around * near).sum((-2, -1)).log() - (around.log() * far).sum((-2, -1))).mean(0)


def _around(power: Tensor, period: int, reach: int) -> Tensor:
    """Return the bins around every frequency k / period except 0:
    (..., height, width) -> (period^2 - 1, ..., 2 reach + 1, 2 reach + 1).
    """
    (height, width), size = power.shape[-2:], 2 * reach + 1
    shifts = [
        (reach - down * height // period, reach - across * width // period)
        for down, across in np.ndindex(period, period)
    ]
    return torch.stack([power.roll(shift, (-2, -1))[..., :size, :size] for shift in shifts[1:]])


def _weights(reach: int, like: Tensor, beyond: int = _NEAR) -> tuple[Tensor, Tensor]:
    """Return the weights of the mean over 3 x 3 bins, and of the mean over bins at a distance of `beyond` to
    `reach`, (2 reach + 1, 2 reach + 1) each.
    """
    distance = (torch.arange(2 * reach + 1, device=like.device) - reach).abs()
    distance = torch.maximum(distance[:, None], distance)
    # Weights, because indexing by masks would wait for the device.
    near, far = ((distance <= 1).to(like.dtype), (distance >= beyond).to(like.dtype))
    return near / near.sum(), far / far.sum()
