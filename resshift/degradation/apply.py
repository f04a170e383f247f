"""Apply a drawn degradation to a picture: a pure function of (pixels, parameters).

`DegradationParams` is a list of operations, applied in order to a float32 picture in [0, 1]. Only noise and
JPEG clip; after blur and bicubic, values may lie outside [0, 1], as in the official chain. The last step
rounds to 8 bits. Nothing here is random: `drawing.draw` draws the parameters.

Two operations change more than the low-quality picture of a pair: `Gray` makes the clean picture grey too
(`target`), and `Mask` adds a mask (`hole_mask`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from resshift.degradation.jpeg import Jpeg, compress, from_u8, to_u8
from resshift.degradation.kernels import Blur, blur
from resshift.degradation.masks import Mask, render
from resshift.degradation.noise import Noise, add_noise
from resshift.degradation.resize import Resize, imresize, resize

BICUBIC = Resize(of="lq", factor=1.0, mode="matlab_bicubic")


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class Gray:
    """One operation of a degradation: convert to three equal channels, the luma of Rec. 601. The clean
    picture of the pair becomes grey as well.
    """

    op: Literal["gray"] = "gray"


Operation = Annotated[Blur | Resize | Noise | Jpeg | Gray | Mask, Field(discriminator="op")]


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class DegradationParams:
    """All parameters that were drawn for one sample. They reproduce the low-quality picture byte for byte."""

    scale: int
    ops: tuple[Operation, ...]

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"scale {self.scale}: must be at least 1")

    @property
    def is_bicubic(self) -> bool:
        """Whether MATLAB's bicubic interpolation is all there is."""
        return self.ops == (BICUBIC,)

    def to_json(self) -> str:
        """Return the parameters as one line of JSON, from which floats are read back exactly."""
        return TypeAdapter(type(self)).dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read the output of `to_json`; unknown fields and invalid values are errors."""
        return TypeAdapter(cls).validate_json(text)


def _grey(image: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))


def target(hq_u8: NDArray[np.uint8], params: DegradationParams) -> NDArray[np.uint8]:
    """Return the picture to be restored: the clean one, in grey if the degradation removes colour."""
    return _grey(hq_u8) if any(isinstance(op, Gray) for op in params.ops) else hq_u8


def hole_mask(params: DegradationParams, height: int, width: int) -> NDArray[np.uint8] | None:
    """Return the mask of the low-quality picture, (height, width) uint8 with 255 in a hole; None if the
    degradation cuts no holes.
    """
    masks = [render(op, height, width) for op in params.ops if isinstance(op, Mask)]
    return np.maximum.reduce(masks) if masks else None


def _resized(
    image: NDArray[np.float32], op: Resize, hq_shape: tuple[int, int], scale: int
) -> NDArray[np.float32]:
    if op.mode == "matlab_bicubic":
        return imresize(image, 1 / scale)
    height, width = (resized_to(op, side, scale) for side in hq_shape)
    return resize(image, height, width, op.mode)


def resized_to(op: Resize, hq_side: int, scale: int) -> int:
    """Return the side that a resize gives, for that of the clean picture."""
    return max(1, int(hq_side // (scale if op.of == "lq" else 1) * op.factor))


def apply_operation(
    image: NDArray[np.float32], op: Operation, hq_shape: tuple[int, int], scale: int
) -> NDArray[np.float32]:
    """Return the picture after one operation.

    Args:
        image: Picture, (H, W, 3) float32, nominally in [0, 1]; it is not modified.
        op: Operation to apply.
        hq_shape: Height and width of the clean picture, to which sizes of resizes refer.
        scale: Scale of the whole degradation.
    """
    match op:
        case Blur():
            return blur(image, op.kernel)
        case Resize():
            return _resized(image, op, hq_shape, scale)
        case Noise():
            return add_noise(image, op)
        case Jpeg():
            return compress(image, op.quality)
        case Gray():
            return _grey(image)
        case Mask():
            return np.where(render(op, *image.shape[:2])[..., None] > 0, np.float32(0), image)


def degrade(hq_u8: NDArray[np.uint8], params: DegradationParams) -> NDArray[np.uint8]:
    """Return the low-quality picture of a clean one.

    Args:
        hq_u8: Clean picture, (H, W, 3) uint8 RGB; H and W are multiples of `params.scale`. It is not
            modified.
        params: Parameters from `draw` or `DegradationParams.from_json`.

    Returns:
        (H / scale, W / scale, 3) uint8 RGB. Equal arguments give equal bytes.
    """
    if hq_u8.dtype != np.uint8 or hq_u8.ndim != 3 or hq_u8.shape[2] != 3:
        raise ValueError(f"hq_u8 of shape {hq_u8.shape} and dtype {hq_u8.dtype}: must be (H, W, 3) uint8")
    height, width = hq_u8.shape[:2]
    scale = params.scale
    if height % scale or width % scale or min(height, width) == 0:
        raise ValueError(
            f"hq_u8 of {height}x{width} pixels (height x width): both sides must be multiples of the scale "
            f"{scale}"
        )
    image = from_u8(hq_u8)
    for op in params.ops:
        image = apply_operation(image, op, (height, width), scale)
    target = (height // scale, width // scale)
    if image.shape[:2] != target:
        raise ValueError(
            f"params.ops end at {image.shape[0]}x{image.shape[1]} pixels: must end at {target[0]}x{target[1]}"
        )
    return to_u8(image)
