"""The clean side of a training pair: a square cut from a photo."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

from resshift.config import DataConfig
from resshift.pairs.augment import distorted_square, draw_distortion
from resshift.resize.area import area_resize

Image = NDArray[np.uint8]


def training_crop(rgb_u8: Image, rng: np.random.Generator, data: DataConfig) -> Image:
    """Cut a training square; with `data.flip` it is mirrored left to right with probability 1/2.

    `short_side`: a random square of side max(min(H, W), crop_px), reduced to crop_px by area averaging, as
    for the released models. `random`: a random square of side crop_px at native resolution. `scaled`: a
    random square of side crop_px (max(min(H, W), crop_px) / crop_px)^u with u uniform in [0, 1), reduced to
    crop_px by area averaging; scales lie between those of the other two, with a uniform logarithm.
    `distorted`: a random square of the photo at a shorter side of crop_px, distorted in geometry and colour
    (`resshift.pairs.augment`).

    A photo that is too small is extended by reflection first; `distorted` enlarges it.

    Args:
        rgb_u8: Photo, (H, W, 3) uint8, at least 1 x 1.
        rng: Generator of this sample; the number of draws depends on the rule, not on the photo.
        data: Rule and side of the crop.

    Returns:
        (crop_px, crop_px, 3) uint8, contiguous.
    """
    across, down, flip = rng.random(3)
    if data.crop == "distorted":
        crop = distorted_square(rgb_u8, draw_distortion(rng), data.crop_px, across, down)
    else:
        crop = _square(rgb_u8, _side(rgb_u8, rng, data), data.crop_px, across, down)
    if data.flip and flip < 0.5:
        crop = np.asarray(cv2.flip(crop, 1), dtype=np.uint8)
    return np.ascontiguousarray(crop)


def _side(rgb_u8: Image, rng: np.random.Generator, data: DataConfig) -> int:
    """Return the side of the square that becomes the crop, in pixels of the photo."""
    if data.crop == "random":
        return data.crop_px
    largest = max(min(rgb_u8.shape[:2]), data.crop_px)
    if data.crop == "short_side":
        return largest
    return int(data.crop_px * (largest / data.crop_px) ** rng.random())


def _square(rgb_u8: Image, side: int, crop_px: int, across: float, down: float) -> Image:
    rgb_u8 = _extended_to(rgb_u8, side)
    top = int(down * (rgb_u8.shape[0] - side + 1))
    left = int(across * (rgb_u8.shape[1] - side + 1))
    crop = rgb_u8[top : top + side, left : left + side]
    return crop if side == crop_px else _shrunk(crop, crop_px)


def _shrunk(image: Image, side: int) -> Image:
    """Average as cv2.INTER_AREA does, as for the released models. OpenCV itself is fast at integer ratios
    only.
    """
    if image.shape[0] % side == 0:
        return np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    return area_resize(image, side, side, "covered")


def _extended_to(image: Image, side: int) -> Image:
    missing = [max(0, side - length) for length in image.shape[:2]]
    if not any(missing):
        return image
    return np.pad(
        image,
        [(n // 2, n - n // 2) for n in missing] + [(0, 0)],
        mode="reflect" if min(image.shape[:2]) > 1 else "edge",
    )
