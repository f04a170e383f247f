"""Synthetic degradations: `draw` the parameters of one sample, then `degrade` the clean picture with them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from resshift.degradation.recipe import (
    DegradationRecipe,
    bicubic_x2,
    bicubic_x4,
    camera_x4,
    face,
    imagenet_test_x4,
    inpainting,
    realesrgan_x2,
    realesrgan_x4,
)

if TYPE_CHECKING:
    from resshift.degradation.apply import DegradationParams, degrade, hole_mask, target
    from resshift.degradation.drawing import draw
    from resshift.degradation.resize import imresize

__all__ = [
    "DegradationParams",
    "DegradationRecipe",
    "bicubic_x2",
    "bicubic_x4",
    "camera_x4",
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
_WHERE = {
    "DegradationParams": "apply",
    "degrade": "apply",
    "hole_mask": "apply",
    "target": "apply",
    "draw": "drawing",
    "imresize": "resize",
}


def __getattr__(name: str) -> object:
    # Imported on first use: a recipe is part of every configuration, and reading one should not import torch.
    if name in _WHERE:
        return getattr(import_module(f"resshift.degradation.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
