"""Restore the faces of a whole photo with a model of aligned faces (face-s4).

`Upscaler` does this with `Sampling.faces`; `restore_faces` with any detector and any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from resshift import seeds
from resshift.faces.align import TEMPLATE, Points, aligned, pasted, similarity
from resshift.faces.detect import FaceDetector, Landmarks

NO_FACE = "no face was found"


class Restored(NamedTuple):
    """A photo with restored faces.

    Fields:
        pixels: The photo, (H, W, 3) uint8.
        num_faces: Number of faces that were restored.
        note: What there is to say of it; empty if nothing.
    """

    pixels: NDArray[np.uint8]
    num_faces: int
    note: str = ""


def restore_faces(
    photo_u8: NDArray[np.uint8],
    detector: FaceDetector,
    restore: Callable[..., NDArray[np.uint8]],
    *,
    seed: int = 0,
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
        return Restored(photo_u8, 0, NO_FACE)
    pixels: NDArray[Any] = photo_u8
    for i, to_square in enumerate(similarities(found)):
        pixels = pasted(pixels, restore(aligned(photo_u8, to_square), seed=face_seed(seed, i)), to_square)
    return Restored(pixels, len(found))


def similarities(faces: Sequence[Landmarks]) -> list[Points]:
    """Return what brings each face to the square, (2, 3) each, in the order in which they are put back.

    Larger faces come after smaller ones, which as a rule are farther away, so the result does not depend on
    the order in which a detector names them. Each is cut from the photo, not from what earlier ones made of
    it: the result of one does not enter another.

    Args:
        faces: Landmarks, (5, 2) each.

    Raises:
        ValueError: The points of a face are one.
    """
    in_order = sorted(faces, key=lambda face: (np.ptp(face, axis=0).sum(), *face.ravel()))
    return [similarity(face, TEMPLATE) for face in in_order]


def face_seed(seed: int, i: int) -> int:
    """Return the seed of the i-th face of a photo."""
    return seeds.derive(seed, "face", i)
