"""One training pair: decode a photo, cut the clean side, degrade it; or one that was made before, with what a
teacher made of its degraded side.

A pair depends only on (seed, epoch, key) and on the bytes of the photo, not on the batch, the worker, the
order of work or a restart.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from resshift import seeds
from resshift.config import DataConfig
from resshift.degradation import DegradationParams, DegradationRecipe, degrade, draw, hole_mask, target
from resshift.pairs.crops import training_crop
from resshift.pairs.jpeg import decode_photo


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TrainingPair:
    """One training sample.

    Fields:
        hq_u8: Clean picture, (crop_px, crop_px, 3) uint8 RGB.
        lq_u8: Degraded picture, (crop_px / scale, crop_px / scale, 3) uint8 RGB.
        mask_u8: Mask, (crop_px / scale, crop_px / scale) uint8, 255 in a hole; None unless the recipe cuts
            holes.
        params: Degradation that was drawn; `degrade(hq_u8, params)` gives `lq_u8` again. None of a stored
            pair.
    """

    hq_u8: NDArray[np.uint8]
    lq_u8: NDArray[np.uint8]
    mask_u8: NDArray[np.uint8] | None
    params: DegradationParams | None


def draw_pair(
    data: bytes, key: str, epoch: int, seed: int, crop: DataConfig, recipe: DegradationRecipe
) -> tuple[NDArray[np.uint8], DegradationParams]:
    """Return the clean picture of `make_pair` and its degradation, which is not applied."""
    rgb_u8 = decode_photo(data, None if crop.crop in ("random", "scaled") else crop.crop_px)
    rng = seeds.philox(seed, "pair", epoch, key)
    hq_u8 = training_crop(rgb_u8, rng, crop)
    params = draw(rng, recipe)
    return target(hq_u8, params), params


def make_pair(
    data: bytes, key: str, epoch: int, seed: int, crop: DataConfig, recipe: DegradationRecipe
) -> TrainingPair:
    """Decode a photo, cut a crop and degrade it; a pure function of its arguments.

    Args:
        data: Encoded photo.
        key: Name of the photo, unique in the data set.
        epoch: Number of times that the photo was seen before.
        seed: Seed of the run.
        crop: Rule by which the clean side is cut.
        recipe: Recipe by which it is degraded.

    Raises:
        ImageError: The photo cannot be decoded.
    """
    hq_u8, params = draw_pair(data, key, epoch, seed, crop, recipe)
    lq_u8 = degrade(hq_u8, params)
    return TrainingPair(hq_u8=hq_u8, lq_u8=lq_u8, mask_u8=hole_mask(params, *lq_u8.shape[:2]), params=params)


class StoredPair(NamedTuple):
    """Encoded pictures of a pair that was made before: clean, degraded, and what a teacher made of the
    degraded one, of the size of the clean one.
    """

    hq: bytes
    lq: bytes
    taught: bytes


def stored_pair(
    stored: StoredPair, key: str, epoch: int, seed: int, crop: DataConfig, scale: int
) -> TrainingPair:
    """Decode a stored pair, and cut and mirror it; a pure function of its arguments.

    The clean side is the teacher's picture with probability `crop.taught`, else the truth: the expectation of
    a loss is then `crop.taught` times that of the one and 1 - `crop.taught` times that of the other.

    Args:
        stored: Encoded pictures.
        key: Name of the pair, unique in the data set.
        epoch: Number of times that the pair was seen before.
        seed: Seed of the run.
        crop: Side of the crop, at most that of the stored one; share of taught samples; whether to mirror.
        scale: Side of the clean picture divided by that of the degraded one.

    Raises:
        ImageError: A picture cannot be decoded.
    """
    across, down, flip, which = seeds.philox(seed, "pair", epoch, key).random(4)
    hq, lq = (decode_photo(data) for data in (stored.taught if which < crop.taught else stored.hq, stored.lq))
    side = crop.crop_px // scale
    top, left = (
        int(share * (length - side + 1)) for share, length in zip((down, across), lq.shape, strict=False)
    )
    lq = lq[top : top + side, left : left + side]
    hq = hq[scale * top : scale * (top + side), scale * left : scale * (left + side)]
    if crop.flip and flip < 0.5:
        hq, lq = (np.asarray(cv2.flip(picture, 1), np.uint8) for picture in (hq, lq))
    return TrainingPair(
        hq_u8=np.ascontiguousarray(hq), lq_u8=np.ascontiguousarray(lq), mask_u8=None, params=None
    )
