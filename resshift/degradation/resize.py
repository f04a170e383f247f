"""Resizing: area, bilinear and bicubic as `F.interpolate` without antialias, and MATLAB's bicubic `imresize`.

The first three modes equal `torch.nn.functional.interpolate(size=...)` up to float32 rounding: area is
adaptive average pooling; bilinear and bicubic (a = -0.75) read 2 x 2 and 4 x 4 pixels at half-pixel centres
and repeat the edge, so they alias when they shrink. The aliasing is an intended part of the degradation.

Deviation from the official code: it gives the *first* resize as `scale_factor`, for which `F.interpolate`
spaces the samples by 1/scale but rounds the size down. Up to 1/scale pixels at the right and bottom are never
read (6 at scale 0.15), and the low-quality picture is shifted against the clean one by as much at the far
edge. Here samples are spaced by in/out, so the two stay aligned.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from resshift.resize.area import area_resize

InterpolationMode = Literal["area", "bilinear", "bicubic"]

_MAX_DENOMINATOR = 1000

T = TypeVar("T", np.float32, np.float64)


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class Resize:
    """One operation of a degradation: resize to floor(factor * side) of the picture `of`, at least 1 pixel.

    Fields:
        of: Size to which the factor refers: that of the clean picture (hq) or the final low-quality size
            (lq). It is never the current size, so roundings do not accumulate.
        factor: Ratio of sides.
        mode: Interpolation; `matlab_bicubic` is `imresize`, and needs `of="lq"` with factor 1.
    """

    op: Literal["resize"] = "resize"
    of: Literal["hq", "lq"]
    factor: float
    mode: Literal["area", "bilinear", "bicubic", "matlab_bicubic"]

    def __post_init__(self) -> None:
        if self.factor <= 0:
            raise ValueError(f"resize factor {self.factor}: must be above 0")
        if self.mode == "matlab_bicubic" and (self.of != "lq" or self.factor != 1):
            raise ValueError(
                f"resize mode matlab_bicubic with of={self.of!r}, factor={self.factor}: must be of='lq', "
                "factor=1"
            )


def resize(
    image: NDArray[np.float32], height: int, width: int, mode: InterpolationMode
) -> NDArray[np.float32]:
    """Resize an (H, W, 3) picture to (height, width, 3) as `F.interpolate(size=(height, width), mode=mode)`,
    aligned at both ends.
    """
    if image.shape[:2] == (height, width):
        return image
    if mode == "area":
        return area_resize(image, height, width, "touched")
    # OpenCV equals F.interpolate within 1e-5 here and is 3 to 20 times faster on a CPU.
    interpolation = cv2.INTER_LINEAR if mode == "bilinear" else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, (width, height), interpolation=interpolation), dtype=np.float32)


def imresize(image: NDArray[T], scale: float) -> NDArray[T]:
    """Resize as MATLAB's `imresize(image, scale, "bicubic")`: antialiased when shrinking, with symmetric
    edges and a = -0.5.

    Args:
        image: Picture, (H, W, C) float32 or float64 of any range. The result is not clipped.
        scale: Ratio of sides; a fraction with a denominator up to 1000.

    Returns:
        (ceil(H * scale), ceil(W * scale), C) of the same dtype.
    """
    if image.ndim != 3 or str(image.dtype) not in ("float32", "float64"):
        raise ValueError(
            f"image of shape {image.shape} and dtype {image.dtype}: must be (H, W, C), float32 or float64"
        )
    ratio = Fraction(scale).limit_denominator(_MAX_DENOMINATOR)
    if ratio <= 0 or abs(float(ratio) - scale) > 1e-9:
        raise ValueError(
            f"scale {scale}: must be a positive fraction with a denominator up to {_MAX_DENOMINATOR}"
        )
    height, width = (math.ceil(side * ratio) for side in image.shape[:2])
    # The padding covers the kernel (2 pixels of the coarser grid) and is a whole number of output pixels, so
    # the grids stay aligned and the way in which interpolate treats edges has no effect.
    reach = math.ceil(2 * max(1, 1 / ratio)) + 1
    pad = math.ceil(reach / ratio.denominator) * ratio.denominator
    i_first = int(pad * ratio)
    padded = np.pad(image, ((pad, pad + reach), (pad, pad + reach), (0, 0)), mode="symmetric")
    nchw = torch.as_tensor(padded).permute(2, 0, 1)[None].contiguous()
    out = F.interpolate(nchw, scale_factor=float(ratio), mode="bicubic", antialias=True, align_corners=False)
    out = out[0, :, i_first : i_first + height, i_first : i_first + width]
    return np.ascontiguousarray(out.permute(1, 2, 0).numpy())
