"""A face in a photo and as a square: the similarity between them, and the two ways along it.

    x' = s R x + b,    the s, R, b with the least sum of |x'_i - (s R x_i + b)|^2

(Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 1991,
Eqs. 34 to 42.) Points are (x, y) in pixels, with the centre of the first pixel at (0, 0).
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8] | NDArray[np.uint16]
Points = NDArray[np.float64]
SIDE_PX = 512
# Mean places in FFHQ's aligned faces of 512 px: the eyes and, last, the corners of the mouth from left to
# right in the picture, the tip of the nose between them.
TEMPLATE: Points = np.array(
    [
        [192.98138, 239.94708],
        [318.90277, 240.1936],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ]
)
_EDGE_PX = 64  # of the square, over which a restored face fades into the photo


def similarity(source: Points, target: Points) -> Points:
    """Return the (2, 3) matrix [s R | b] that takes `source` nearest to `target`; it does not mirror.

    Args:
        source, target: Points, (n, 2), n at least 2.

    Raises:
        ValueError: All points of `source` are one.
    """
    of_source, of_target = source.mean(0), target.mean(0)
    centred = source - of_source
    variance = centred.var(0).sum()
    if not variance > 0:
        raise ValueError(f"landmarks must be different points, got {len(source)} at {of_source.tolist()}")
    covariance = (target - of_target).T @ centred / len(source)
    left, singular, right = np.linalg.svd(covariance)
    signs = np.array([1.0, np.sign(np.linalg.det(left) * np.linalg.det(right)) or 1.0])
    rotation = left @ np.diag(signs) @ right
    scaled = (singular * signs).sum() / variance * rotation
    return np.concatenate([scaled, (of_target - scaled @ of_source)[:, None]], axis=1)


def aligned(photo: Image, to_square: Points) -> Image:
    """Return the face as a square, (512, 512, C); where it leaves the photo, the photo goes on mirrored.

    Args:
        photo: Photo, (H, W, C) uint8 or uint16.
        to_square: Similarity from the photo to the square, (2, 3).
    """
    size = (SIDE_PX, SIDE_PX)
    mirrored = cv2.BORDER_REFLECT_101
    square: Any = cv2.warpAffine(photo, to_square, size, flags=cv2.INTER_LINEAR, borderMode=mirrored)
    return square.reshape(SIDE_PX, SIDE_PX, photo.shape[2])


def soft_mask() -> NDArray[np.float32]:
    """Return the share of a restored face at each position of the square: 0 at its edge, 1 from 64 px on."""
    inside = np.minimum(np.arange(SIDE_PX), np.arange(SIDE_PX)[::-1]) / _EDGE_PX
    shares = np.clip(inside, 0, 1)
    smooth = (shares**2 * (3 - 2 * shares)).astype(np.float32)
    return smooth[:, None] * smooth


def pasted(photo: Image, square: Image, to_square: Points) -> Image:
    """Return the photo with a square put back into it; pixels outside the square stay as they are.

    Args:
        photo: Photo, (H, W, C) uint8 or uint16.
        square: Restored face, (512, 512, C) of the same type.
        to_square: Similarity from the photo to the square, (2, 3).

    Raises:
        ValueError: The square has another size, as from a model that enlarges.
    """
    if square.shape[:2] != (SIDE_PX, SIDE_PX):
        raise ValueError(
            f"a model of faces must have scale 1, got {square.shape} of a square of {SIDE_PX} px"
        )
    place = _place(photo.shape[:2], to_square)
    part = photo[place]
    moved = to_square.copy()
    moved[:, 2] += to_square[:, :2] @ (place[1].start, place[0].start)

    def warped(values: NDArray[Any], border: int) -> NDArray[np.float32]:
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        size = (part.shape[1], part.shape[0])
        found = np.asarray(cv2.warpAffine(values, moved, size, flags=flags, borderMode=border), np.float32)
        return found.reshape(*part.shape[:2], -1)

    result = photo.copy()
    if part.size:
        share = warped(soft_mask(), cv2.BORDER_CONSTANT)
        result[place] = np.rint(share * warped(square, cv2.BORDER_REPLICATE) + (1 - share) * part)
    return result


def _place(size: tuple[int, ...], to_square: Points) -> tuple[slice, slice]:
    """Return the rows and columns of a photo, (height, width), that a square reaches."""
    reach = np.array([[0, 0], [0, 1], [1, 0], [1, 1]]) * (SIDE_PX - 1)
    corners = np.linalg.solve(to_square[:, :2], (reach - to_square[:, 2]).T)
    down, across = (
        slice(*np.clip([math.floor(places.min()), math.ceil(places.max()) + 1], 0, length).tolist())
        for places, length in zip(corners[::-1], size, strict=True)
    )
    return down, across
