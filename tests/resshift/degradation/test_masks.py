"""Masks against statistics of 1000 official ones a kind, and what each shape paints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import ks_2samp

from resshift.degradation import DegradationParams, degrade, draw, hole_mask, inpainting
from resshift.degradation.masks import Border, Box, Mask, MaskRecipe, Segment, Stroke, draw_mask, render
from resshift.degradation.ranges import Draws
from resshift.seeds import philox

pytestmark = pytest.mark.usefixtures("one_thread")

Load = Callable[[str], dict[str, np.ndarray]]
KIND_PROBS = {
    "mixed": (1 / 3, 1 / 3, 1 / 3),
    "irregular": (1.0, 0.0, 0.0),
    "box": (0.0, 1.0, 0.0),
    "outpainting": (0.0, 0.0, 1.0),
}
NUM_MASKS = 1000


def drawn(kind: str) -> NDArray[np.bool_]:
    """Return masks of 256 x 256 with 1 in a hole."""
    recipe = MaskRecipe(kind_probs=KIND_PROBS[kind])
    masks = [
        render(draw_mask(Draws(philox("test", "masks", kind, i)), recipe), 256, 256) for i in range(NUM_MASKS)
    ]
    assert set(np.unique(masks)) == {0, 255}
    return np.array(masks) > 0


def standard_errors(ours: NDArray[np.float64], official_mean: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the difference of two means of NUM_MASKS masks each, in standard errors; the spread is the same
    for both.
    """
    error = np.sqrt(2 * ours.var(axis=0) / NUM_MASKS)
    return np.abs(ours.mean(axis=0) - official_mean) / np.maximum(error, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KIND_PROBS)
def test_masks_have_the_official_distribution(kind: str, parity: Load) -> None:
    official = parity("mask_statistics")
    masks = drawn(kind)
    area = masks.mean(axis=(1, 2))
    assert ks_2samp(area, official[f"{kind}_area"]).pvalue > 1e-3  # pyright: ignore[reportAttributeAccessIssue]
    assert standard_errors(area, official[f"{kind}_area"].mean()) < 3
    map_8x8 = masks.reshape(NUM_MASKS, 8, 32, 8, 32).mean(axis=(2, 4))
    assert standard_errors(map_8x8, official[f"{kind}_map"]).max() < 3
    edges = np.stack(
        [masks[:, 0].mean(1), masks[:, -1].mean(1), masks[:, :, 0].mean(1), masks[:, :, -1].mean(1)], axis=1
    )
    assert standard_errors(edges, official[f"{kind}_edges"]).max() < 3


def test_border_strips_are_where_they_say() -> None:
    mask = render(Mask(shapes=(Border(top=0.25, right=0.1),)), 40, 80)
    expected = np.zeros((40, 80), dtype=np.uint8)
    expected[:10] = 255
    expected[:, 72:] = 255
    np.testing.assert_array_equal(mask, expected)


def test_boxes_keep_their_margin_and_reach_it() -> None:
    def box(x: float, y: float, side_px: int = 30) -> NDArray[np.uint8]:
        return render(
            Mask(shapes=(Box(width_px=side_px, height_px=side_px, margin_px=10, x=x, y=y),)), 64, 96
        )

    last = np.nextafter(1, 0)
    assert np.argwhere(box(0, 0))[[0, -1]].tolist() == [[10, 10], [39, 39]]
    assert np.argwhere(box(last, last))[[0, -1]].tolist() == [[24, 56], [53, 85]]
    assert np.argwhere(box(0.3, 0.6, side_px=500))[[0, -1]].tolist() == [[10, 10], [53, 85]]
    assert not render(Mask(shapes=(Box(width_px=9, height_px=9, margin_px=10, x=0.5, y=0.5),)), 16, 16).any()


def test_a_stroke_follows_its_segments_and_stays_inside() -> None:
    down_then_right = (
        Segment(angle=0.0, length_px=20, width_px=5),
        Segment(angle=np.pi / 2, length_px=500, width_px=5),
    )
    mask = render(Mask(shapes=(Stroke(x=0.25, y=0.25, segments=down_then_right),)), 80, 80)
    assert (mask[20:41, 18:23] == 255).all()
    assert (mask[38:43, 20:] == 255).all()
    assert not mask[:17].any()
    assert not mask[44:].any()


def test_the_recipe_draws_the_official_numbers() -> None:
    masks = [draw_mask(Draws(philox("test", "numbers", i)), MaskRecipe()) for i in range(3000)]
    strokes = [[shape for shape in mask.shapes if isinstance(shape, Stroke)] for mask in masks]
    segments = [segment for group in strokes for stroke in group for segment in stroke.segments]
    boxes = [[shape for shape in mask.shapes if isinstance(shape, Box)] for mask in masks]
    sides = [side for group in boxes for box in group for side in (box.width_px, box.height_px)]
    assert {len(group) for group in strokes if group} == {1, 2, 3, 4, 5, 6}
    assert {len(stroke.segments) for group in strokes for stroke in group} == {1, 2, 3, 4, 5}
    assert (min(s.length_px for s in segments), max(s.length_px for s in segments)) == (10, 209)
    assert (min(s.width_px for s in segments), max(s.width_px for s in segments)) == (5, 104)
    assert {len(group) for group in boxes if group} == {1, 2, 3, 4}
    assert (min(sides), max(sides)) == (30, 150)
    borders = [shape for mask in masks for shape in mask.shapes if isinstance(shape, Border)]
    strips = np.array([(border.top, border.left, border.bottom, border.right) for border in borders])
    assert (strips > 0).any(axis=1).all()
    assert 0.04 <= strips[strips > 0].min() < strips.max() < 0.25
    for count in (len([s for s in strokes if s]), len([b for b in boxes if b]), len(borders)):
        assert count == pytest.approx(1000, abs=4 * np.sqrt(3000 * 2 / 9))


def test_holes_are_black_and_the_rest_is_untouched() -> None:
    hq_u8 = philox("test", "photo").integers(1, 256, (256, 256, 3), dtype=np.uint8)
    for i in range(20):
        params = draw(philox("test", "holes", i), inpainting())
        mask = hole_mask(params, 256, 256)
        assert mask is not None
        np.testing.assert_array_equal(degrade(hq_u8, params), hq_u8 * (mask == 0)[..., None])
        stored = DegradationParams.from_json(params.to_json())
        assert stored == params
        np.testing.assert_array_equal(hole_mask(stored, 256, 256), mask)


def test_impossible_masks_raise_and_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"scale = 4: must be 1"):
        replace(inpainting(), scale=4)
    with pytest.raises(ValueError, match=r"kind_probs = \(1\.0, 1\.0, 0\.0\)"):
        MaskRecipe(kind_probs=(1.0, 1.0, 0.0))
    with pytest.raises(ValueError, match=r"boxes = \(4, 1\)"):
        MaskRecipe(boxes=(4, 1))
    with pytest.raises(ValueError, match="border_prob = 0"):
        MaskRecipe(border_prob=0.0)
    with pytest.raises(ValueError, match="fraction"):
        Border(top=1.5)
