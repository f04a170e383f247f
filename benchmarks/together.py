"""Compare small pictures one after the other and together: gain and cost of sharing calls of the network
(`resshift.tiles.batching`).

    python benchmarks/together.py --model tiny-x4 --side 64 --pictures 64

Run it on a GPU: on a CPU tiles are computed one by one, and all ratios are 1.

    single     one picture after the other, one tile per call, as a program without batching does
    alone      one picture after the other in calls of the usual size: the cost of a shape that no other
               picture shares
    together   `--ongoing` pictures at a time, as in a replica

Pictures have equal sizes, or are "mixed": all of different sizes around it, the worst case. Each picture made
together is compared with the same one made alone: all bytes must be equal, otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import record
import torch
from timing import fastest
from upscale import load

from resshift.config import Sampling
from resshift.devices import resolve_device
from resshift.images import Picture
from resshift.tiles.batching import Batcher
from resshift.upscaler import Upscaler


def noisy_pictures(side: int, count: int, *, mixed: bool) -> list[Picture]:
    """Return different pictures of waves with noise: squares, or rectangles with sides of 3/4 to 5/4 of
    `side`.
    """
    rng = np.random.default_rng(side)
    pictures: list[Picture] = []
    for i in range(count):
        height, width = rng.integers(3 * side // 4, 5 * side // 4, 2) if mixed else (side, side)
        x = np.linspace(0, 9, width)[None, :, None] + np.array([0, 1, 2]) + i
        pixels = 127.5 + 90 * np.sin(x) + rng.normal(0, 12, (height, width, 3))
        pictures.append(Picture(pixels=pixels.clip(0, 255).astype(np.uint8)))
    return pictures


def one_by_one(up: Upscaler, pictures: Sequence[Picture], tile_batch: int | None = None) -> list[Picture]:
    """Upscale every picture with separate calls."""
    return [
        up.upscale(picture, Sampling(seed=i, tile_batch=tile_batch)) for i, picture in enumerate(pictures)
    ]


def together(up: Upscaler, pictures: Sequence[Picture], ongoing: int) -> list[Picture]:
    """Upscale with calls that pictures share, `ongoing` pictures at a time."""
    batcher = Batcher(most_open=ongoing)
    futures = [batcher.submit(up.upscaling(picture, Sampling(seed=i))) for i, picture in enumerate(pictures)]
    while batcher.turn():
        pass
    return [future.result().value for future in futures]


def compare(
    name: str, device: str | torch.device, sides: Sequence[int], *, count: int, ongoing: int, rounds: int
) -> list[dict[str, Any]]:
    """Return a row for each side, with equal and with mixed sizes: pictures per second in the three ways, and
    whether all bytes are equal.
    """
    up = load(name, resolve_device(device), "auto")
    rows: list[dict[str, Any]] = []
    for side, mixed in ((side, mixed) for side in sides for mixed in (False, True)):
        pictures = noisy_pictures(side, count, mixed=mixed)
        pairs = zip(
            one_by_one(up, pictures), together(up, pictures, ongoing), strict=True
        )  # also the warm-up
        same_bytes = all(np.array_equal(alone.pixels, shared.pixels) for alone, shared in pairs)
        works = [
            lambda p=pictures: one_by_one(up, p, 1),
            lambda p=pictures: one_by_one(up, p),
            lambda p=pictures: together(up, p, ongoing),
        ]
        per_s = [count / seconds for seconds in fastest(works, rounds)]
        speeds = dict(zip(("single_per_s", "alone_per_s", "together_per_s"), per_s, strict=True))
        ratio = per_s[2] / per_s[0]
        rows.append(
            {
                "model": name,
                "side_px": side,
                "mixed": mixed,
                **speeds,
                "ratio": ratio,
                "same_bytes": same_bytes,
            }
        )
    return rows


def main() -> int:
    """Compare for each side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="tiny-x4", help="tiny-x4, or a preset with random weights (default tiny-x4)"
    )
    parser.add_argument(
        "--side",
        type=int,
        action="append",
        metavar="PX",
        help="side of the pictures (default 64, 128 and 256)",
    )
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--ongoing", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    chosen = parser.parse_args()
    sides = chosen.side or [64, 128, 256]
    rows = compare(
        chosen.model,
        chosen.device,
        sides,
        count=chosen.pictures,
        ongoing=chosen.ongoing,
        rounds=chosen.rounds,
    )
    print(record.table(list(rows[0]), [list(row.values()) for row in rows]))
    print(
        record.json_line(
            {
                "machine": record.machine(resolve_device(chosen.device)),
                "ongoing": chosen.ongoing,
                "rows": rows,
            }
        )
    )
    return 0 if all(row["same_bytes"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
