"""What seeds and steps do: is there a chain at work in what a model makes?

    python benchmarks/chain.py --model runs/mine --data bicubicx4=LQ:GT --lpips-trunk squeezenet1_1.pth
    python benchmarks/chain.py --model runs/mine --model tiny-x4 --data LQ:GT --seeds 5 --num 8

For each model and test set:

    spread      standard deviation over the seeds, averaged over pixels and pictures, in levels of 255; a
                model that ignores its noise has almost none
    shift       distance of the means over 16 x 16 pixels of two seeds, averaged likewise: other seeds should
                give other detail (spread) and the same content (little shift)
    psnr_y, lpips   of the first seed, for each number of steps and each form of the sampler, with the same
                weights; what a chain is for is that more steps look better (lpips)

The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import record
import torch
from numpy.typing import NDArray
from study import Truth, load_truths

from pipelines.evaluation.figures import Judge
from resshift import seeds
from resshift.config import Sampling
from resshift.images import Picture
from resshift.schedule import Sampler
from resshift.upscaler import Upscaler

Image = NDArray[np.uint8]
BLOCK_PX = 16


def spread(pictures: Sequence[Image]) -> float:
    """Return the standard deviation over pictures of one size, averaged over pixels and channels, in levels.

    Raises:
        ValueError: There are fewer than two.
    """
    if len(pictures) < 2:
        raise ValueError(f"a spread needs at least two pictures, got {len(pictures)}")
    return float(np.stack(pictures).std(axis=0, ddof=1, dtype=np.float64).mean())


def shift(first: Image, second: Image) -> float:
    """Return the mean distance of the means of whole blocks of two pictures of one size, in levels."""
    return float(np.abs(_block_means(first) - _block_means(second)).mean())


def _block_means(picture: Image) -> NDArray[np.float64]:
    height, width = (side // BLOCK_PX for side in picture.shape[:2])
    whole = picture[: height * BLOCK_PX, : width * BLOCK_PX].astype(np.float64)
    return whole.reshape(height, BLOCK_PX, width, BLOCK_PX, 3).mean(axis=(1, 3))


def figures_of(
    up: Upscaler, truths: Sequence[Truth], judge: Judge, num_seeds: int, steps: Sequence[int]
) -> dict[str, Any]:
    """Return the figures of a model on a test set: means over its pictures."""
    rows: dict[str, list[dict[str, float]]] = {}
    spreads: list[tuple[float, float]] = []
    for truth in truths:

        def made(sampling: Sampling, truth: Truth = truth) -> Image:
            seed = seeds.derive(sampling.seed, "picture", truth.key)
            return up.upscale(Picture(pixels=truth.lq), replace(sampling, seed=seed)).pixels

        results = [made(Sampling(seed=seed)) for seed in range(num_seeds)]
        spreads.append((spread(results), shift(*results[:2])))
        for number in steps:
            for sampler in Sampler if number > 1 else [Sampler.POSTERIOR]:
                is_known = number == up.config.steps and sampler is Sampler.POSTERIOR
                result = results[0] if is_known else made(Sampling(steps=number, sampler=sampler))
                rows.setdefault(f"{number} {sampler}", []).append(judge(result, truth.gt))
    mean = {
        name: {figure: float(np.mean([one[figure] for one in found])) for figure in found[0]}
        for name, found in rows.items()
    }
    levels = dict(zip(("spread", "shift"), np.mean(spreads, axis=0).tolist(), strict=True))
    return {**levels, "steps": mean, "pictures": len(truths)}


def main() -> int:
    """Measure every model on every set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--data", action="append", required=True, metavar="[NAME=]LQ:GT")
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds for the spread (5)")
    parser.add_argument("--num", type=int, default=None, help="pictures of each set (all)")
    parser.add_argument("--lpips-trunk", metavar="FILE", help="SqueezeNet 1.1; without it LPIPS is left out")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    judge = Judge(0, "squeeze" if chosen.lpips_trunk else None, chosen.lpips_trunk)
    truths: dict[str, list[Truth]] = {}
    for truth in load_truths(chosen.data):
        truths.setdefault(truth.set, []).append(truth)
    found: dict[str, dict[str, Any]] = {}
    for name in chosen.model:
        up = Upscaler.from_pretrained(name)
        steps = sorted({number for number in (1, 2, up.config.steps) if number <= up.config.steps})[::-1]
        found[name] = {
            data: figures_of(up, ones[: chosen.num], judge, chosen.seeds, steps)
            for data, ones in truths.items()
        }
    header = ["model", "set", "spread", "shift", "steps", "psnr_y", "lpips"]
    rows = [
        [name, data, one["spread"], one["shift"], steps, figures["psnr_y"], figures.get("lpips")]
        for name, sets in found.items()
        for data, one in sets.items()
        for steps, figures in one["steps"].items()
    ]
    print(record.table(header, rows))
    print(record.json_line(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
