"""Holes for inpainting: brush strokes, boxes and outer borders.

A mask is uint8, 255 in a hole; the low-quality picture is the clean one with black holes, which are -1 in
[-1, 1]: gt (1 - m) - m.

    irregular     1-6 strokes of a brush. A stroke starts anywhere and has 1-5 segments, each with one of four
                  directions, a length of 10-209 px and a width of 5-104 px, kept inside the picture
    box           1-4 rectangles with sides of 30-150 px, at least 10 px from the edge
    outpainting   each border with probability 1/2, at least one, 4-25 % of the side

The kinds have equal probabilities. Sizes of strokes and boxes are in pixels and do not depend on the size of
the picture, as in the source: the numbers are for 256 x 256.

References: Yu et al., "Free-Form Image Inpainting with Gated Convolution", ICCV 2019 (strokes); Suvorov et
al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions" (LaMa), WACV 2022; the numbers are
those of the official ResShift inpainting configurations, whose generators draw one stroke more than their
`max_times` says.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, get_args

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from resshift.degradation.ranges import Draws, IntRange, Range, check_probs, check_range

_RECORD = ConfigDict(extra="forbid", allow_inf_nan=False)

MaskKind = Literal["irregular", "box", "outpainting"]
_KINDS: tuple[MaskKind, ...] = get_args(MaskKind)
_HOLE = 255
# The source draws an integer below 4 and adds 0.01 rad; the first, third and fifth stroke take 2 pi minus
# that angle.
_ANGLES = (0.01, 1.01, 2.01, 3.01)


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class Segment:
    """One straight piece of a stroke. The angle is measured from the downward direction to the right, in
    radians.
    """

    angle: float
    length_px: int
    width_px: int


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class Stroke:
    """A polyline of thick segments that starts at (x, y), as fractions of width and height."""

    shape: Literal["stroke"] = "stroke"
    x: float
    y: float
    segments: tuple[Segment, ...]


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class Box:
    """A rectangle at least `margin_px` from every edge. (x, y) in [0, 1) is its position within the possible
    positions; a rectangle that is too large is made smaller.
    """

    shape: Literal["box"] = "box"
    width_px: int
    height_px: int
    margin_px: int
    x: float
    y: float


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class Border:
    """Strips along the edges, as fractions of height (top, bottom) or width (left, right); 0 is no strip."""

    shape: Literal["border"] = "border"
    top: float = 0.0
    left: float = 0.0
    bottom: float = 0.0
    right: float = 0.0

    def __post_init__(self) -> None:
        if not all(0 <= fraction <= 1 for fraction in (self.top, self.left, self.bottom, self.right)):
            raise ValueError(f"border {self}: every strip must be a fraction in [0, 1]")


Shape = Annotated[Stroke | Box | Border, Field(discriminator="shape")]


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class Mask:
    """One operation of a degradation: the area of the shapes becomes a hole."""

    op: Literal["mask"] = "mask"
    shapes: tuple[Shape, ...]


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class MaskRecipe:
    """Distribution of masks. The defaults are those of the official inpainting configurations; pairs are
    (lowest, highest), both included.

    Fields:
        kind_probs: Probabilities of irregular, box and outpainting masks.
        strokes, stroke_segments, stroke_length_px, stroke_width_px: Ranges of an irregular mask.
        boxes, box_side_px, box_margin_px: Ranges of a box mask, and its distance from the edge.
        border: Range of the width of a strip, as a fraction of the side.
        border_prob: Probability of each of the four strips; if none is drawn, one of them is chosen.
    """

    kind_probs: tuple[float, float, float] = (1 / 3, 1 / 3, 1 / 3)
    strokes: IntRange = (1, 6)
    stroke_segments: IntRange = (1, 5)
    stroke_length_px: IntRange = (10, 209)
    stroke_width_px: IntRange = (5, 104)
    boxes: IntRange = (1, 4)
    box_side_px: IntRange = (30, 150)
    box_margin_px: int = 10
    border: Range = (0.04, 0.25)
    border_prob: float = 0.5

    def __post_init__(self) -> None:
        check_probs("kind_probs", self.kind_probs)
        for name in (
            "strokes",
            "stroke_segments",
            "stroke_length_px",
            "stroke_width_px",
            "boxes",
            "box_side_px",
        ):
            check_range(name, getattr(self, name), 1)
        if self.box_margin_px < 0:
            raise ValueError(f"box_margin_px = {self.box_margin_px}: must be at least 0")
        check_range("border", self.border, 0, 0.5)
        if not 0 < self.border_prob <= 1:
            raise ValueError(f"border_prob = {self.border_prob}: must be in (0, 1]")


def draw_mask(draws: Draws, recipe: MaskRecipe) -> Mask:
    """Draw the shapes of one mask."""
    kind = _KINDS[draws.index(recipe.kind_probs)]
    if kind == "irregular":
        return Mask(
            shapes=tuple(_draw_stroke(draws, recipe, i) for i in range(draws.integer(recipe.strokes)))
        )
    if kind == "box":
        return Mask(shapes=tuple(_draw_box(draws, recipe) for _ in range(draws.integer(recipe.boxes))))
    return Mask(shapes=(_draw_border(draws, recipe),))


def _draw_stroke(draws: Draws, recipe: MaskRecipe, i_stroke: int) -> Stroke:
    def segment() -> Segment:
        angle = _ANGLES[draws.integer((0, len(_ANGLES) - 1))]
        return Segment(
            angle=angle if i_stroke % 2 else 2 * math.pi - angle,
            length_px=draws.integer(recipe.stroke_length_px),
            width_px=draws.integer(recipe.stroke_width_px),
        )

    x, y = draws.unit(), draws.unit()
    return Stroke(x=x, y=y, segments=tuple(segment() for _ in range(draws.integer(recipe.stroke_segments))))


def _draw_box(draws: Draws, recipe: MaskRecipe) -> Box:
    width_px, height_px = draws.integer(recipe.box_side_px), draws.integer(recipe.box_side_px)
    return Box(
        width_px=width_px, height_px=height_px, margin_px=recipe.box_margin_px, x=draws.unit(), y=draws.unit()
    )


def _draw_border(draws: Draws, recipe: MaskRecipe) -> Border:
    taken = [draws.chance(recipe.border_prob) for _ in range(4)]
    if not any(taken):
        taken[draws.integer((0, 3))] = True
    top, left, bottom, right = (draws.uniform(recipe.border) if hit else 0.0 for hit in taken)
    return Border(top=top, left=left, bottom=bottom, right=right)


def render(mask: Mask, height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask of a picture, (height, width) uint8, 255 in a hole and 0 elsewhere."""
    canvas = np.zeros((height, width), dtype=np.uint8)
    for shape in mask.shapes:
        match shape:
            case Stroke():
                _paint_stroke(canvas, shape)
            case Box():
                _paint_box(canvas, shape)
            case Border():
                canvas[: int(shape.top * height)] = _HOLE
                canvas[:, : int(shape.left * width)] = _HOLE
                canvas[height - int(shape.bottom * height) :] = _HOLE
                canvas[:, width - int(shape.right * width) :] = _HOLE
    return canvas


def _paint_stroke(canvas: NDArray[np.uint8], stroke: Stroke) -> None:
    height, width = canvas.shape
    x, y = int(stroke.x * width), int(stroke.y * height)
    for segment in stroke.segments:
        to_x = min(max(int(x + segment.length_px * math.sin(segment.angle)), 0), width)
        to_y = min(max(int(y + segment.length_px * math.cos(segment.angle)), 0), height)
        cv2.line(canvas, (x, y), (to_x, to_y), _HOLE, segment.width_px)
        x, y = to_x, to_y


def _paint_box(canvas: NDArray[np.uint8], box: Box) -> None:
    height, width = canvas.shape
    room_x, room_y = max(width - 2 * box.margin_px, 0), max(height - 2 * box.margin_px, 0)
    across, down = min(box.width_px, room_x), min(box.height_px, room_y)
    left = box.margin_px + int(box.x * (room_x - across + 1))
    top = box.margin_px + int(box.y * (room_y - down + 1))
    canvas[top : top + down, left : left + across] = _HOLE
