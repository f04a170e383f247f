"""Restore the faces of a whole photo with a model of aligned faces (face-s4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from resshift import seeds
from resshift.faces.align import SIDE_PX, TEMPLATE, aligned, pasted, similarity
from resshift.faces.detect import FaceDetector

Image = NDArray[np.uint8]


class Restored(NamedTuple):
    """A photo with restored faces.

    Fields:
        pixels: The photo, (H, W, 3) uint8.
        num_faces: Number of faces that were restored.
        note: What there is to say of it; empty if nothing.
    """

    pixels: Image
    num_faces: int
    note: str = ""


def restore_faces(
    photo_u8: Image, detector: FaceDetector, restore: Callable[..., Image], *, seed: int = 0
) -> Restored:
    """Find every face, bring it to a square of 512 px, restore it and put it back with a soft edge. Without a
    face the photo comes back as it was, with a note.

    Args:
        photo_u8: RGB photo, (H, W, 3) uint8.
        detector: Where faces are, for example `YuNet`.
        restore: Model of scale 1, called as `restore(square_u8, seed=...)`, for example an `Upscaler`.
        seed: Seed of the noise; every face has its own noise.

    Raises:
        ValueError: `photo_u8` is no RGB picture of 8 bits, or the model gives another size.
    """
    if photo_u8.dtype != np.uint8 or photo_u8.ndim != 3 or photo_u8.shape[2] != 3:
        raise ValueError(f"a photo must be (H, W, 3) uint8, got {photo_u8.shape} {photo_u8.dtype}")
    found = detector(photo_u8)
    if not len(found):
        return Restored(photo_u8, 0, "no face was found")
    pixels = photo_u8
    for i, landmarks in enumerate(found):
        to_square = similarity(landmarks, TEMPLATE)
        # Of the photo, not of what earlier faces made of it: the result of one does not enter another.
        square = restore(aligned(photo_u8, to_square), seed=seeds.derive(seed, "face", i))
        if square.shape != (SIDE_PX, SIDE_PX, 3):
            raise ValueError(
                f"a model of faces must have scale 1, got {square.shape} of a square of {SIDE_PX} px"
            )
        pixels = pasted(pixels, square, to_square)
    return Restored(pixels, len(found))
