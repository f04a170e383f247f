"""JPEG with another quality for each sample, with the integer arithmetic of libjpeg: baseline tables of Annex
K scaled by the quality, chroma 4:2:0, the accurate integer transform, smoothed chroma when decoding.

Levels are those of OpenCV's codec, number for number: integers in float64, in which all sums are exact.

References: ITU-T T.81 (JPEG), Annex K; Loeffler, Ligtenberg and Moschytz, "Practical fast 1-D DCT algorithms
with 11 multiplications", ICASSP 1989, whose products libjpeg rounds to 13 bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from resshift.degradation.on_device.canvas import chosen, from_levels, steps, taken, to_levels

_LUMA_TABLE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMA_TABLE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *((99,) * 8,) * 4,
)
# sqrt(8) x the orthonormal cosine transform x 2^13, with the roundings of the fast algorithm: rows are
# frequencies. The other half of a row mirrors this one, with the opposite sign in odd rows.
_HALF = (
    (8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260),
    (10703, 4433, -4433, -10703),
    (9633, -2259, -11362, -6436),
    (8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633),
    (4433, -10704, 10704, -4433),
    (2260, -6436, 9633, -11363),
)
_FIX = 1 << 16


class JpegTables(NamedTuple):
    """Constants on a device, float64: `dct` (8, 8), `quantisation` (2, 8, 8) of luma and chroma."""

    dct: Tensor
    quantisation: Tensor

    @classmethod
    def on(cls, device: torch.device) -> JpegTables:
        half = np.array(_HALF, np.float64)
        sign = np.where(np.arange(8) % 2, -1, 1)[:, None]
        dct = np.concatenate([half, sign * half[:, ::-1]], axis=1)
        tables = np.array((_LUMA_TABLE, _CHROMA_TABLE), np.float64)
        return cls(torch.from_numpy(dct).to(device), torch.from_numpy(tables).to(device))


def compress(canvas: Tensor, sides: Tensor, quality: Tensor, tables: JpegTables) -> Tensor:
    """Return the pictures after JPEG, (B, 3, S, S) float32 in [0, 1].

    Args:
        canvas: Canvases, (B, 3, S, S) float32; rounded to 8 bits first.
        sides: Sides of the pictures.
        quality: Qualities, 1 to 100, (B,).
        tables: Constants.
    """
    side = canvas.shape[3]
    whole = -(-side // 16) * 16
    edge = steps(0, whole, sides).minimum(sides[:, None] - 1)
    luma, chroma = _from_rgb(taken(to_levels(canvas), edge).double())
    chroma_sides = (sides + 1) // 2
    # Edges are repeated: along the lines before the chroma is halved, across them afterwards.
    edge = steps(0, whole // 2, sides).minimum(chroma_sides[:, None] - 1)
    chroma = _halved(chroma)
    chroma = chroma.gather(2, edge[:, None, :, None].expand(chroma.shape))
    scale = torch.where(quality < 50, 5000 // quality, 200 - 2 * quality).view(-1, 1, 1, 1)
    steps_of = ((tables.quantisation * scale + 50) / 100).floor().clamp(1, 255)[:, :, None, None]
    luma = _through_blocks(luma, steps_of[:, :1], tables.dct)
    chroma = _doubled(_through_blocks(chroma, steps_of[:, 1:], tables.dct), chroma_sides)
    return from_levels(_to_rgb(luma, chroma)[..., :side, :side])


def _from_rgb(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """Return the luma (B, 1, H, W) and chroma (B, 2, H, W) of levels, in levels."""
    r, g, b = rgb.unbind(1)
    luma = (19595 * r + 38470 * g + 7471 * b + _FIX / 2) / _FIX
    offset = 128 * _FIX + _FIX / 2 - 1
    blue = (-11059 * r - 21709 * g + 32768 * b + offset) / _FIX
    red = (32768 * r - 27439 * g - 5329 * b + offset) / _FIX
    return luma.floor()[:, None], torch.stack((blue, red), dim=1).floor()


def _to_rgb(luma: Tensor, chroma: Tensor) -> Tensor:
    blue, red = (chroma - 128).unbind(1)
    y = luma[:, 0]
    r = y + ((91881 * red + _FIX / 2) / _FIX).floor()
    g = y + ((-22554 * blue - 46802 * red + _FIX / 2) / _FIX).floor()
    b = y + ((116130 * blue + _FIX / 2) / _FIX).floor()
    return torch.stack((r, g, b), dim=1).clamp(0, 255)


def _halved(plane: Tensor) -> Tensor:
    """Return means of 2 x 2 pixels; halves are rounded down and up in turn."""
    sums = plane[..., ::2, ::2] + plane[..., ::2, 1::2] + plane[..., 1::2, ::2] + plane[..., 1::2, 1::2]
    bias = 1 + torch.arange(sums.shape[3], device=plane.device) % 2
    return ((sums + bias) / 4).floor()


def _through_blocks(plane: Tensor, step: Tensor, dct: Tensor) -> Tensor:
    """Return what quantisation leaves of planes, (B, C, H, W) levels; `step` is (B, 1, 1, 1, 8, 8)."""
    blocks = (plane - 128).unflatten(3, (-1, 8)).unflatten(2, (-1, 8)).transpose(3, 4)
    found = _descaled(dct @ _descaled(blocks @ dct.mT, 11), 15)  # eight times the coefficients
    number = ((found.abs() + 4 * step) / (8 * step)).floor() * found.sign()
    blocks = _descaled(_descaled(dct.mT @ (number * step), 11) @ dct, 18)
    return (blocks + 128).clamp(0, 255).transpose(3, 4).flatten(4, 5).flatten(2, 3)


def _descaled(x: Tensor, bits: int) -> Tensor:
    return (x / (1 << bits) + 0.5).floor()


def _doubled(chroma: Tensor, sides: Tensor) -> Tensor:
    """Return chroma at twice its size: 3/4 of the nearer pixel and 1/4 of the next one along each axis; where
    a picture has one or two, pixels are repeated.
    """
    side = chroma.shape[3]
    around = taken(chroma, steps(-1, side + 1, sides).clamp(min=0).minimum(sides[:, None] - 1))
    here = 3 * around[:, :, 1:-1]
    rows = torch.stack((here + around[:, :, :-2], here + around[:, :, 2:]), dim=3).flatten(2, 3)
    here = 3 * rows[..., 1:-1]
    smooth = torch.stack((here + rows[..., :-2] + 8, here + rows[..., 2:] + 7), dim=4).flatten(3, 4)
    plain = chroma.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return chosen(sides > 2, (smooth / 16).floor(), plain)
