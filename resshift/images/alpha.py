"""Transparency: what a picture shows must not depend on colours that nobody sees.

Editors leave black, white or anything under fully transparent pixels. A network, or any filter, would mix
that into the visible edge. The remedy of compositing is premultiplied colour; a network trained on plain
colour gets the same effect when the hidden pixels are given the premultiplied average of the visible ones
around them:

    c_hidden = blur(alpha c) / blur(alpha)

What it does not do: change a pixel that is visible at all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from resshift.images.types import Picture

_SIGMA_PX = 4.0  # reaches about 12 px from an edge, more than a tile's context makes visible


def fill_transparent(picture: Picture) -> Picture:
    """Return the picture with the colours under alpha 0 taken from what is visible nearby; far from it, the
    mean visible colour.

    The same object when nothing is fully transparent.
    """
    alpha = picture.alpha
    if alpha is None or alpha.all():
        return picture
    highest = np.iinfo(alpha.dtype).max
    weight = alpha.astype(np.float32)[..., None] / highest
    pixels = picture.pixels.astype(np.float32)
    total = float(weight.sum(dtype=np.float64))
    mean = (
        (pixels * weight).sum(axis=(0, 1), dtype=np.float64) / total if total else np.zeros(pixels.shape[2])
    )
    # A thousandth of the mean everywhere: it is what is left where no visible pixel is near.
    near = _blurred(np.concatenate([pixels * weight, weight], axis=2)) + 1e-3 * np.append(mean, 1.0).astype(
        np.float32
    )
    filled = (near[..., :-1] / near[..., -1:] + 0.5).clip(0, highest).astype(picture.pixels.dtype)
    return replace(picture, pixels=np.where(alpha[..., None] == 0, filled, picture.pixels))


def _blurred(planes: np.ndarray) -> np.ndarray:
    blurred: Any = cv2.GaussianBlur(planes, (0, 0), _SIGMA_PX, borderType=cv2.BORDER_REPLICATE)
    return blurred.reshape(planes.shape)
