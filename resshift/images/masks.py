"""Masks of holes: which pixels of a picture a model is to invent.

A mask is a picture of the size of its picture, after the orientation of both was applied. If it has
transparent pixels, they are the hole (alpha below half); else it is grey, and bright pixels are the hole
(from half on). There is nothing in between: a pixel is invented, or it comes back as it was.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from resshift.images.types import ImageError, ImageReason, Picture

# Lossy formats leave a trace of colour in a grey picture.
_COLOUR_LEVELS = 16 / 255


def hole_of(mask: Picture) -> NDArray[np.bool_]:
    """Return the hole that a mask shows, (H, W), True where pixels are to be invented.

    Raises:
        ImageError: bad_mask, for an opaque picture in colour.
    """
    highest = np.iinfo(mask.pixels.dtype).max
    if mask.alpha is not None and not (mask.alpha == highest).all():
        return mask.alpha <= highest // 2
    levels = mask.pixels.max(axis=2), mask.pixels.min(axis=2)
    if (levels[0] - levels[1] > _COLOUR_LEVELS * highest).any():
        raise ImageError(
            ImageReason.BAD_MASK,
            "the mask is in colour; it must be grey, bright in the hole, or transparent there",
        )
    return levels[0] > highest // 2


def with_mask(picture: Picture, mask: Picture | None) -> Picture:
    """Return a picture with the hole that `mask` shows, or without one that of its own transparency, which it
    loses.

    Raises:
        ImageError: no_mask, if there is neither; bad_mask, if the sizes differ, or if the hole is empty or
            the whole picture.
    """
    if mask is None and picture.alpha is None:
        raise ImageError(
            ImageReason.NO_MASK, "this model fills holes: the picture needs a mask, or transparent pixels"
        )
    shown = picture if mask is None else mask
    if (shown.width, shown.height) != (picture.width, picture.height):
        raise ImageError(
            ImageReason.BAD_MASK,
            f"the mask is {shown.width}x{shown.height}, and must be {picture.width}x{picture.height} as the "
            "picture",
        )
    hole = hole_of(shown)
    if hole.all() or not hole.any():
        what = "covers the whole picture" if hole.any() else "is empty"
        raise ImageError(
            ImageReason.BAD_MASK, f"the hole of the mask {what}; it must be a part of the picture"
        )
    alpha = picture.alpha
    if alpha is not None:
        alpha = np.where(hole, np.iinfo(alpha.dtype).max, alpha).astype(alpha.dtype)
        if (alpha == np.iinfo(alpha.dtype).max).all():
            alpha = None
    return replace(picture, mask=hole, alpha=alpha)
