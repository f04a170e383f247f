"""Transparency: visible pixels must not depend on the colours of invisible ones.

Editors leave black, white or any other colour under fully transparent pixels. A network, or any filter, would
mix it into the visible edge. Compositing avoids this with premultiplied colour; a network trained on plain
colour gets the same effect if the hidden pixels are given the premultiplied average of the visible pixels
around them:

    c_hidden = blur(alpha c) / blur(alpha)

What it does not do: change a pixel that is at all visible.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from resshift.images.types import Picture

_SIGMA_PX = 4.0  # reaches about 12 px from an edge, beyond which hidden pixels do not affect visible ones


def fill_transparent(picture: Picture) -> Picture:
    """Return the picture with the pixels under alpha 0 coloured by visible pixels nearby, or by the mean
    visible colour if there are none.

    A picture without fully transparent pixels is returned as it is.
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
    # A thousandth of the mean is added everywhere, and is all there is where no visible pixel is near.
    near = _blurred(np.concatenate([pixels * weight, weight], axis=2)) + 1e-3 * np.append(mean, 1.0).astype(
        np.float32
    )
    filled = (near[..., :-1] / near[..., -1:] + 0.5).clip(0, highest).astype(picture.pixels.dtype)
    return replace(picture, pixels=np.where(alpha[..., None] == 0, filled, picture.pixels))


def _blurred(planes: np.ndarray) -> np.ndarray:
    blurred: Any = cv2.GaussianBlur(planes, (0, 0), _SIGMA_PX, borderType=cv2.BORDER_REPLICATE)
    return blurred.reshape(planes.shape)
