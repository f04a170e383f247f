"""Records hold what was drawn, and only what a device can apply."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from resshift import degradation, seeds
from resshift.degradation import DegradationParams, draw
from resshift.degradation.apply import resized_to
from resshift.degradation.jpeg import Jpeg
from resshift.degradation.kernels import Blur, GaussianKernel
from resshift.degradation.noise import Noise
from resshift.degradation.on_device.plan import KERNELS, NOISES, PLAN_BYTES, Bounds, decode, encode
from resshift.degradation.resize import Resize

SIDE = 64
RECIPE = replace(
    degradation.realesrgan_x4(), bicubic_share=0.2, mild_share=0.2, camera_share=0.2, noise3_prob=0.5
)


def drawn(num: int, recipe: degradation.DegradationRecipe = RECIPE) -> list[DegradationParams]:
    return [draw(seeds.philox(0, "plan", i), recipe) for i in range(num)]


def test_records_hold_the_numbers_of_the_operations() -> None:
    params = drawn(50)
    records = np.stack([encode(one, SIDE) for one in params])
    assert records.shape == (50, PLAN_BYTES)
    plan = decode(torch.from_numpy(records))
    for i, one in enumerate(params):
        blurs = [op for op in one.ops if isinstance(op, Blur)]
        resizes = [op for op in one.ops if isinstance(op, Resize)]
        noises = [op for op in one.ops if isinstance(op, Noise)]
        jpegs = [op for op in one.ops if isinstance(op, Jpeg)]
        has_noise3 = isinstance(one.ops[-2 if isinstance(one.ops[-1], Jpeg) else -1], Noise)
        noise3 = noises.pop() if has_noise3 else None
        assert NOISES[int(plan.noise3.kind[i])] == (noise3.kind if noise3 else "none")
        if noise3:
            assert (plan.noise3.level[i], plan.noise3.correlated[i]) == (noise3.level, noise3.correlated)
        is_bicubic = isinstance(one.ops[0], Resize)
        assert plan.chain[i] == (not is_bicubic)
        if is_bicubic:
            continue
        assert plan.size1[i] == resized_to(resizes[0], SIDE, 4)
        assert plan.size2[i] == resized_to(resizes[-2], SIDE, 4)
        assert (plan.quality1[i], plan.quality2[i]) == tuple(op.quality for op in jpegs)
        assert plan.jpeg_last[i] == isinstance(one.ops[-1], Jpeg)
        assert NOISES[int(plan.noise2.kind[i])] == (noises[1].kind if len(noises) > 1 else "none")
        assert plan.noise1.level[i] == noises[0].level
        assert KERNELS[int(plan.kernel1.type[i])] == blurs[0].kernel.type
        if isinstance(blurs[0].kernel, GaussianKernel):
            assert plan.kernel1.sigma_y[i] == blurs[0].kernel.sigma_y


@pytest.mark.parametrize("recipe", [degradation.face(), degradation.inpainting()])
def test_other_recipes_are_refused(recipe: degradation.DegradationRecipe) -> None:
    with pytest.raises(ValueError, match=r"operations \(.*\): a device applies those of .* or bicubic"):
        encode(drawn(1, recipe)[0], SIDE)


def test_bounds_hold_for_what_is_drawn() -> None:
    """The mild chain enlarges by up to 1.5, however little the recipe does."""
    small = replace(RECIPE, resize1=replace(RECIPE.resize1, factor=(0.5, 1.2)))
    assert Bounds.of(small, SIDE).side_px == 96
    assert Bounds.of(replace(small, mild_share=0.0), SIDE).side_px == 76
    plan = decode(torch.from_numpy(np.stack([encode(one, SIDE) for one in drawn(200)])))
    bounds = Bounds.of(RECIPE, SIDE)
    assert max(plan.size1.max(), plan.size2.max()) <= bounds.side_px
    assert plan.kernel1.size.max() == bounds.kernels[0]
