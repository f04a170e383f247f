"""Synthetic degradations: `draw` the parameters of one sample, then `degrade` the clean picture with them."""

from resshift.degradation.apply import DegradationParams, degrade, hole_mask, target
from resshift.degradation.drawing import draw
from resshift.degradation.recipe import (
    DegradationRecipe,
    bicubic_x4,
    face,
    imagenet_test_x4,
    inpainting,
    realesrgan_x2,
    realesrgan_x4,
)
from resshift.degradation.resize import imresize

__all__ = [
    "DegradationParams",
    "DegradationRecipe",
    "bicubic_x4",
    "degrade",
    "draw",
    "face",
    "hole_mask",
    "imagenet_test_x4",
    "imresize",
    "inpainting",
    "realesrgan_x2",
    "realesrgan_x4",
    "target",
]
