"""`nearest-x4`: a model with a known result and a known time, for testing and measuring the pipeline.

    python jobs/upscale.py SRC DST --model nearest-x4          every pixel four times in each direction
    python jobs/upscale.py SRC DST --model nearest-x4@0.5      and half a second of sleep a megapixel of input

The output is known pixel by pixel, so no lost, mixed-up or damaged picture goes unnoticed. The time is slept
on purpose: it stands for an accelerator that is busy while the CPUs are free.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from resshift.config import Sampling
from resshift.images import Picture
from resshift.models import WeightsError

if TYPE_CHECKING:
    from resshift.tiles.batching import Work

_NAME = re.compile(r"nearest-x4(?:@(\d+(?:\.\d+)?))?")


class Nearest:
    """Repeats pixels; stands in for `resshift.Upscaler`.

    Args:
        seconds_per_megapixel: Seconds that a megapixel of input takes at least.
    """

    scale = 4
    smallest_tile_px = 1
    shares_calls = False

    def __init__(self, seconds_per_megapixel: float = 0.0) -> None:
        self.seconds_per_megapixel = seconds_per_megapixel
        self.identity = "nearest-x4"

    def upscale(self, picture: Picture, sampling: Sampling = Sampling()) -> Picture:
        """Return the picture with every pixel 4 x 4 times; nothing of `sampling` changes that.

        Raises:
            ValueError: The `outscale` is not 4.
        """
        if sampling.outscale not in (None, self.scale):
            raise ValueError(f"nearest-x4 has the scale 4, got outscale {sampling.outscale}")
        ends = time.monotonic() + self.seconds_per_megapixel * picture.width * picture.height / 1e6
        pixels = picture.pixels.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
        alpha = (
            None
            if picture.alpha is None
            else picture.alpha.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
        )
        time.sleep(max(0.0, ends - time.monotonic()))
        return replace(picture, pixels=pixels, alpha=alpha)

    def upscaling(
        self,
        picture: Picture,
        sampling: Sampling = Sampling(),
        progress: Callable[[float], None] | None = None,
    ) -> Work[Picture]:
        """Return `upscale` as a `Work`, which calls no network and has one part."""
        del progress
        yield from ()
        return self.upscale(picture, sampling)

    def predictions(self, picture: Picture, sampling: Sampling = Sampling()) -> Work[tuple[Picture, ...]]:
        """Return what `Upscaler.predictions` has of a model without a chain."""
        return ((yield from self.upscaling(picture, sampling)),)


def nearest_model(name: str) -> Nearest | None:
    """Return the model that `name` asks for; None for the name of another model.

    Raises:
        WeightsError: The name begins like this one's and is not one.
    """
    match = _NAME.fullmatch(name)
    if match:
        return Nearest(float(match[1] or 0))
    if name.startswith("nearest-"):
        raise WeightsError(
            f"no model {name!r}: the stand-in is nearest-x4 or nearest-x4@SECONDS_PER_MEGAPIXEL"
        )
    return None
