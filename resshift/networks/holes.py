"""Holes of a picture, filled from their surroundings by a membrane: what a model of holes may start from.

With the known pixels k as boundary, the membrane is the picture x that is smoothest in the hole,

    x = k where the picture is known,    Laplacian(x) = 0 in the hole,

so that every pixel of the hole is the mean of its four neighbours, and the border of the picture reflects. It
has the colours of the surroundings and no detail. `fill_holes` solves this by successive halving (pull and
push) with a few sweeps of Jacobi's method at each size, which leaves a smooth error of some levels of 255 in
wide holes.

References: Gortler et al., "The Lumigraph", SIGGRAPH 1996 (pull and push); Briggs et al., "A Multigrid
Tutorial", 2000.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SWEEPS = 8  # at each size; what is wrong after them is smooth, and the size before has mended that


def fill_holes(pictures: Tensor, mask: Tensor) -> Tensor:
    """Return pictures with their holes filled; known pixels are the same to the bit.

    Args:
        pictures: (B, C, H, W), of any range; what is in a hole does not matter, if it is finite.
        mask: Above 0 in a hole, (B, 1, H, W).

    Returns:
        A tensor of the shape and dtype of `pictures`; zeros for a picture without known pixels.
    """
    hole = mask > 0
    known = (~hole).to(pictures.dtype)
    return torch.where(hole, _membrane(pictures * known, known), pictures)


def _membrane(sums: Tensor, known: Tensor) -> Tensor:
    """Return the fill of one size, of pictures that are 0 in their holes and the shares that are known."""
    height, width = sums.shape[2:]
    means = sums / known.clamp_min(1e-6)
    if height == width == 1:
        return means
    coarse = _membrane(*(F.avg_pool2d(one, 2, ceil_mode=True) for one in (sums, known)))
    filled = F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)
    filled = filled[..., :height, :width]
    free = known == 0
    filled = torch.where(free, filled, means)
    for _ in range(_SWEEPS):
        rows = F.pad(filled, (0, 0, 1, 1), mode="replicate")
        columns = F.pad(filled, (1, 1, 0, 0), mode="replicate")
        around = rows[..., :-2, :] + rows[..., 2:, :] + columns[..., :-2] + columns[..., 2:]
        filled = torch.where(free, around / 4, filled)
    return filled
