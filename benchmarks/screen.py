"""Measure whether the positions from which a picture was made are visible in it, as a screen of dots or a
weave of period `scale`.

    python benchmarks/screen.py --model tiny-x4 --model runs/mine/model --data bicubic=lq:gt

A network that makes scale x scale pixels from one position can leave the same small pattern everywhere. LPIPS
and PSNR hardly measure it, but people see it. Two measures:

    screen     for each picture the spectrum of its luma (BT.601) under a Hann window; at every frequency of
               whole periods of `scale` pixels, the mean power of 5 x 5 bins over the median of the 17 x 17
               bins around them, in dB; the mean over these frequencies. Photographs have about 1 dB. It
               detects a pattern that is the same over the whole picture.
    weave      W of `resshift.training.lattice`, for the positions of the coarsest level of the first model:
               a pattern that is repeated in even areas.
    lattice    `resshift.training.lattice`, which also detects a pattern that changes with the content, and
               may be part of the training objective.
"""

from __future__ import annotations

import argparse
import sys

import numpy as np
import record
from study import load_truths

from pipelines.evaluation.evaluate import bicubic_resized
from resshift import images, seeds
from resshift.images import Array
from resshift.metrics import psnr_ssim
from resshift.training.lattice import lattice, weave
from resshift.upscaler import Upscaler

MEASURES = ("screen_db", "weave", "lattice")
_NEAR, _AROUND = 2, 8


def screen_db(rgb_u8: Array, period: int) -> float:
    """Return the mean excess of power in dB; about 1 for photographs, 0 for noise.

    Args:
        rgb_u8: Picture, (H, W, 3) uint8.
        period: Period of the pattern in pixels.

    Raises:
        ValueError: A side is shorter than 8 * period, so the frequencies are too close together.
    """
    height, width = (side // period * period for side in rgb_u8.shape[:2])
    if min(height, width) < 8 * period:
        raise ValueError(
            f"the picture is {rgb_u8.shape[1]}x{rgb_u8.shape[0]}, both sides must be at least {8 * period}"
        )
    y = psnr_ssim.luma(rgb_u8[:height, :width]).astype(np.float64)
    window = np.hanning(height)[:, None] * np.hanning(width)
    power = np.abs(np.fft.fft2((y - y.mean()) * window)) ** 2
    found: list[float] = []
    for down, across in np.ndindex(period, period):
        if (down, across) != (0, 0):
            rows = (down * height // period + np.arange(-_AROUND, _AROUND + 1)) % height
            columns = (across * width // period + np.arange(-_AROUND, _AROUND + 1)) % width
            patch = power[np.ix_(rows, columns)]
            inner = (slice(_AROUND - _NEAR, _AROUND + _NEAR + 1),) * 2
            outside = np.ones(patch.shape, bool)
            outside[inner] = False
            found.append(
                10 * float(np.log10((patch[inner].mean() + 1e-9) / (np.median(patch[outside]) + 1e-9)))
            )
    return float(np.mean(found))


def measured(picture: Array, scale: int, coarsest: int) -> tuple[float, ...]:
    """Return `MEASURES` of a picture, (H, W, 3) uint8."""
    x = images.to_tensor(picture)
    return screen_db(picture, scale), float(weave(x, coarsest)), float(lattice(x, scale))


def main() -> int:
    """Measure ground truth, bicubic and models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--data", action="append", required=True, metavar="[NAME=]LQ:GT")
    chosen = parser.parse_args()
    models = {name: Upscaler.from_pretrained(name) for name in chosen.model}
    first = next(iter(models.values()))
    scale, coarsest = first.scale, getattr(first.config, "coarsest_px", first.scale)
    found: dict[str, dict[str, list[tuple[float, ...]]]] = {}
    for truth in load_truths(chosen.data):
        seed = seeds.derive(0, "picture", truth.key)
        made = {"truth": truth.gt, "bicubic": bicubic_resized(truth.lq, scale)}
        made |= {name: up(truth.lq, seed=seed) for name, up in models.items()}
        for name, picture in made.items():
            found.setdefault(name, {}).setdefault(truth.set, []).append(measured(picture, scale, coarsest))
    result = {
        name: {
            data: dict(zip(MEASURES, np.mean(values, axis=0).round(3).tolist(), strict=True))
            for data, values in columns.items()
        }
        for name, columns in found.items()
    }
    sets = list(result["truth"])
    header = ["", *(f"{data}: {measure}" for data in sets for measure in MEASURES)]
    print(
        record.table(
            header,
            [
                [name, *(value for data in sets for value in columns[data].values())]
                for name, columns in result.items()
            ],
        )
    )
    print(record.json_line({"period_px": scale, "coarsest_px": coarsest, "sets": result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
