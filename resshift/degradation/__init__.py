"""Synthetic degradations: `draw` the parameters of one sample, then `degrade` the clean picture with them."""

from resshift.degradation.apply import DegradationParams, degrade
from resshift.degradation.recipe import (
    DegradationRecipe,
    bicubic_x4,
    draw,
    imagenet_test_x4,
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
    "imagenet_test_x4",
    "imresize",
    "realesrgan_x2",
    "realesrgan_x4",
]
