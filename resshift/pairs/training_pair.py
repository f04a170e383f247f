"""One training pair: decode a photo, cut the clean side, degrade it.

A pair depends only on (seed, epoch, key) and on the bytes of the photo, not on the batch, the worker, the
order of work or a restart.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        params: Degradation that was drawn; `degrade(hq_u8, params)` gives `lq_u8` again.
    """

    hq_u8: NDArray[np.uint8]
    lq_u8: NDArray[np.uint8]
    mask_u8: NDArray[np.uint8] | None
    params: DegradationParams


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
    rgb_u8 = decode_photo(data, None if crop.crop in ("random", "scaled") else crop.crop_px)
    rng = seeds.philox(seed, "pair", epoch, key)
    hq_u8 = training_crop(rgb_u8, rng, crop)
    params = draw(rng, recipe)
    hq_u8 = target(hq_u8, params)
    lq_u8 = degrade(hq_u8, params)
    return TrainingPair(hq_u8=hq_u8, lq_u8=lq_u8, mask_u8=hole_mask(params, *lq_u8.shape[:2]), params=params)
