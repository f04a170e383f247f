"""Distorted crops: the augmentation of the ImageNet inpainting model, in geometry and colour.

In this order, each with probability 1/2, drawn for each sample:

    perspective   a quadrilateral is stretched to the frame; its corners lie inside the picture by
                  |N(0, sigma)| of the sides, sigma from U(0, 0.06)
    affine        about the centre: scale U(0.7, 1.3), rotation U(-40, 40) degrees, shear U(-0.1, 0.1) degrees
    lens          radial distortion x -> x (1 + k r^2 + k r^4), k from U(-0.05, 0.05), r in units of the sides
    crop, flip    a random square
    CLAHE         contrast-limited adaptive histogram equalisation of the lightness: limit U(1, 4),
                  8 x 8 tiles
    tone          contrast 1 + U(-0.2, 0.2), brightness U(-0.2, 0.2) of the range
    colour        hue U(-5, 5) of 180, saturation U(-30, 30) and value U(-5, 5) of 255

The photo is first resized so that its shorter side is the side of the crop. Beyond its borders the picture is
continued by reflection.

Reference: Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions" (LaMa), WACV
2022, whose training uses these ranges, as does the official ResShift configuration.

Deviation from the official code: there, each geometric step resamples the result of the previous step, and
shrinking is bilinear. Here, photos are shrunk by averages and then sampled once, at the composed position, so
pictures are sharper, and the rest of the photo is seen beyond the edge of a perspective. Numbers that
libraries round there (hue, limits) are not rounded before they are used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from resshift.degradation.ranges import Draws
from resshift.resize.area import area_resize

Image = NDArray[np.uint8]
Corners = tuple[float, float, float, float, float, float, float, float]

_NO_INSETS: Corners = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
_PERSPECTIVE_SIGMA = (0.0, 0.06)
_DEEPEST = 0.4  # corners with larger insets could cross; the probability is 1e-11
_SCALE, _ROTATION_DEG, _SHEAR_DEG = (0.7, 1.3), (-40.0, 40.0), (-0.1, 0.1)
_LENS = (-0.05, 0.05)
_CLAHE_LIMIT, _CLAHE_TILES = (1.0, 4.0), (8, 8)
_CONTRAST, _BRIGHTNESS = (-0.2, 0.2), (-0.2, 0.2)
_HUE, _SATURATION, _VALUE = (-5.0, 5.0), (-30.0, 30.0), (-5.0, 5.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Distortion:
    """Distortion that was drawn for one sample; the defaults change nothing.

    Fields:
        corners: Insets (x, y) of the top left, top right, bottom right and bottom left corner, as fractions
            of width and height.
        scale, rotation_deg, shear_deg: Parameters of the affine step; the rotation is clockwise.
        lens: Coefficient k of the radial distortion.
        clahe_limit: Clip limit; None does not change the lightness.
        contrast, brightness: Factor, and summand as a fraction of the range.
        hue, saturation, value: Summands in 8-bit HSV, where hue is in [0, 180).
    """

    corners: Corners = _NO_INSETS
    scale: float = 1.0
    rotation_deg: float = 0.0
    shear_deg: float = 0.0
    lens: float = 0.0
    clahe_limit: float | None = None
    contrast: float = 1.0
    brightness: float = 0.0
    hue: float = 0.0
    saturation: float = 0.0
    value: float = 0.0


def draw_distortion(rng: np.random.Generator) -> Distortion:
    """Draw a distortion, with each of its six steps with probability 1/2."""
    draws = Draws(rng)
    insets = np.minimum(np.abs(rng.standard_normal(8)) * draws.uniform(_PERSPECTIVE_SIGMA), _DEEPEST).tolist()
    steps: tuple[dict[str, Any], ...] = (
        {"corners": tuple(insets)},
        {
            "scale": draws.uniform(_SCALE),
            "rotation_deg": draws.uniform(_ROTATION_DEG),
            "shear_deg": draws.uniform(_SHEAR_DEG),
        },
        {"lens": draws.uniform(_LENS)},
        {"clahe_limit": draws.uniform(_CLAHE_LIMIT)},
        {"contrast": 1 + draws.uniform(_CONTRAST), "brightness": draws.uniform(_BRIGHTNESS)},
        {
            "hue": draws.uniform(_HUE),
            "saturation": draws.uniform(_SATURATION),
            "value": draws.uniform(_VALUE),
        },
    )
    taken = Distortion()
    for step in steps:
        if draws.chance(0.5):
            taken = replace(taken, **step)
    return taken


def distorted_square(rgb_u8: Image, distortion: Distortion, side: int, across: float, down: float) -> Image:
    """Distort a photo and cut a square.

    Args:
        rgb_u8: Photo, (H, W, 3) uint8.
        distortion: Distortion to apply.
        side: Side of the result, to which the shorter side of the photo is resized first.
        across, down: Position of the square along the longer side, in [0, 1).

    Returns:
        (side, side, 3) uint8, contiguous.
    """
    photo = _with_short_side(rgb_u8, side)
    height, width = photo.shape[:2]
    left, top = int(across * (width - side + 1)), int(down * (height - side + 1))
    x, y = _source_positions(distortion, height, width, left, top, side)
    square = cv2.remap(photo, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return _recoloured(np.asarray(square, dtype=np.uint8), distortion)


def _with_short_side(rgb_u8: Image, side: int) -> Image:
    height, width = rgb_u8.shape[:2]
    ratio = side / min(height, width)
    size = max(side, round(height * ratio)), max(side, round(width * ratio))
    if ratio > 1:
        return np.asarray(cv2.resize(rgb_u8, size[::-1], interpolation=cv2.INTER_LINEAR), dtype=np.uint8)
    return area_resize(rgb_u8, *size, "covered")


def _source_positions(
    distortion: Distortion, height: int, width: int, left: int, top: int, side: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the positions x and y in the photo of the pixels of the square, (side, side) each."""
    # Pixel i covers [i, i + 1) until the last line, where its centre is at i.
    x = (np.arange(side, dtype=np.float64) + left + 0.5)[None, :]
    y = (np.arange(side, dtype=np.float64) + top + 0.5)[:, None]
    u, v = (x - width / 2) / width, (y - height / 2) / height
    r2 = u * u + v * v
    stretch = 1 + distortion.lens * (r2 + r2 * r2)
    x, y = width / 2 + (x - width / 2) * stretch, height / 2 + (y - height / 2) * stretch
    back = _unperspective(distortion.corners, height, width) @ np.linalg.inv(
        _affine(distortion, height, width)
    )
    source_x, source_y, depth = (row[0] * x + row[1] * y + row[2] for row in back)
    return (source_x / depth - 0.5).astype(np.float32), (source_y / depth - 0.5).astype(np.float32)


def _affine(distortion: Distortion, height: int, width: int) -> NDArray[np.float64]:
    """Return the matrix that scales, shears and rotates about the centre, (3, 3)."""
    turn, shear = math.radians(distortion.rotation_deg), math.radians(distortion.shear_deg)
    cos, sin = math.cos(turn) * distortion.scale, math.sin(turn) * distortion.scale
    linear = np.array([[cos, -sin], [sin, cos]]) @ np.array([[1, -math.tan(shear)], [0, 1]])
    centre = np.array([width / 2, height / 2])
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = linear, centre - linear @ centre
    return matrix


def _unperspective(corners: Corners, height: int, width: int) -> NDArray[np.float64]:
    """Return the homography from the frame to the quadrilateral that is stretched to it, (3, 3)."""
    frame = np.array([[0, 0], [width, 0], [width, height], [0, height]], dtype=np.float32)
    inwards = np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]], dtype=np.float32)
    insets = np.array(corners, dtype=np.float32).reshape(4, 2) * (width, height)
    return np.asarray(
        cv2.getPerspectiveTransform(frame, (frame + inwards * insets).astype(np.float32)), dtype=np.float64
    )


def _recoloured(rgb_u8: Image, distortion: Distortion) -> Image:
    if distortion.clahe_limit is not None:
        lightness, a, b = cv2.split(cv2.cvtColor(rgb_u8, cv2.COLOR_RGB2LAB))
        lightness = cv2.createCLAHE(distortion.clahe_limit, _CLAHE_TILES).apply(lightness)
        rgb_u8 = np.asarray(cv2.cvtColor(cv2.merge((lightness, a, b)), cv2.COLOR_LAB2RGB), dtype=np.uint8)
    levels = np.arange(256, dtype=np.float64)
    if (distortion.contrast, distortion.brightness) != (1.0, 0.0):
        tone = np.rint(np.clip(levels * distortion.contrast + 255 * distortion.brightness, 0, 255)).astype(
            np.uint8
        )
        rgb_u8 = np.asarray(cv2.LUT(rgb_u8, tone), dtype=np.uint8)
    if (distortion.hue, distortion.saturation, distortion.value) != (0.0, 0.0, 0.0):
        table = np.stack(
            [
                np.rint(levels + distortion.hue) % 180,
                np.rint(np.clip(levels + distortion.saturation, 0, 255)),
                np.rint(np.clip(levels + distortion.value, 0, 255)),
            ],
            axis=-1,
        ).astype(np.uint8)
        shifted = cv2.LUT(cv2.cvtColor(rgb_u8, cv2.COLOR_RGB2HSV), table[None])
        rgb_u8 = np.asarray(cv2.cvtColor(shifted, cv2.COLOR_HSV2RGB), dtype=np.uint8)
    return rgb_u8
