"""Measure whether the borders of tiles are visible: steps at the edges of tiles compared with steps inside,
and the difference to the picture computed without tiles.

    python benchmarks/seams.py                   writes benchmarks/results/seams-DATE-MACHINE.json
    python benchmarks/seams.py --photos DIR      also photographs: the first ones of a directory, by name
    python benchmarks/seams.py --quick           under a minute on two cores; nothing written

For a flat colour, gradients, noise and photos, cut into 1 to 64 tiles, the mean absolute difference between
neighbouring rows (columns) of the result is taken at the rows where a tile begins or ends, and at all other
rows between two positions of the latent:

    edge ratio = mean step at edges / mean step elsewhere,
                 both divided by the same step in the untiled picture (at least `FLOOR` levels)

The untiled picture has the same content but no edges, so the ratio shows what a border adds and not what
happens to be in the picture there. Edges are always between positions, whose pixels have a pattern of their
own (docs/tiny-x4.md); compared with rows inside positions, that pattern would count as a seam where there is
none. Delta E is the CIE76 difference in L*a*b* between the tiled and the untiled picture. The last line is a
JSON object: worst_edge_ratio over all cases, mean_delta_e_photos.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import record
import torch

from resshift import images
from resshift.config import Sampling
from resshift.tiles.plan import AxisTiles
from resshift.upscaler import Upscaler

# Steps of a flat picture are a fraction of a level. Multiples of steps below this value are not visible, so
# they must not determine a ratio.
FLOOR = 0.5


def synthetic(side: int) -> dict[str, np.ndarray]:
    """Return pictures in which seams are most visible, (side, side, 3) uint8."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, side)
    horizontal = np.broadcast_to(ramp[None, :, None], (side, side, 3))
    diagonal = (ramp[:, None, None] + ramp[None, :, None]) / 2 * np.array([1.0, 0.8, 0.6])
    return {
        "flat": np.full((side, side, 3), (40, 90, 180), np.uint8),
        "gradient": horizontal.astype(np.uint8),
        "diagonal": diagonal.astype(np.uint8),
        "noise": rng.integers(0, 256, (side, side, 3), np.uint8),
    }


def photos_of(directory: Path, count: int, side: int) -> dict[str, np.ndarray]:
    """Return the first photographs of a directory, each cropped at its centre to at most `side` pixels."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(
        path for path in directory.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg")
    )[:count]:
        pixels = images.decode(path.read_bytes()).pixels
        top, left = (max(0, (length - side) // 2) for length in pixels.shape[:2])
        found[path.name] = np.repeat(pixels, 3 // pixels.shape[2], 2)[top : top + side, left : left + side]
    return found


def edges_of(axis: AxisTiles, scale: int, length: int) -> np.ndarray:
    """Return the rows of the result at whose upper side a tile begins or ends."""
    rows = {at for start in axis.starts for at in (start, start + axis.tile)}
    return np.array(sorted(row * scale for row in rows if 0 < row * scale < length), dtype=np.int64)


def edge_ratio(tiled: np.ndarray, whole: np.ndarray, edges: np.ndarray, axis: int, scale: int) -> float:
    """Return the mean step at the edges over that between other positions, each in units of the untiled
    picture's step there; 1 without edges.
    """
    if not len(edges):
        return 1.0
    steps = [
        np.abs(np.diff(picture.astype(np.float64), axis=axis)).mean(axis=(1 - axis, 2))
        for picture in (tiled, whole)
    ]
    at = np.zeros(len(steps[0]), bool)
    at[edges - 1] = True
    elsewhere = ~at & (np.arange(1, len(at) + 1) % scale == 0)
    ours, theirs = (np.maximum(np.array([step[at].mean(), step[elsewhere].mean()]), FLOOR) for step in steps)
    relative = ours / theirs
    return float(relative[0] / relative[1])


def delta_e(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean CIE76 difference of two sRGB pictures."""
    first, second = (cv2.cvtColor(picture.astype(np.float32) / 255, cv2.COLOR_RGB2LAB) for picture in (a, b))
    return float(np.sqrt(((first - second) ** 2).sum(2)).mean())


def measure(up: Upscaler, name: str, pixels: np.ndarray, tile_px: int, whole: np.ndarray) -> dict[str, Any]:
    """Upscale in tiles and compare."""
    tiled, plan = (
        up(pixels, tile_px=tile_px),
        up.plan(pixels.shape[0], pixels.shape[1], Sampling(tile_px=tile_px)),
    )
    scale = up.scale * up.renderer.ratio
    axes = enumerate((plan.rows, plan.columns))
    ratios = [edge_ratio(tiled, whole, edges_of(lines, scale, tiled.shape[i]), i, scale) for i, lines in axes]
    return {
        "case": name,
        "tile_px": tile_px,
        "tiles": plan.num_tiles,
        "edge_ratio": max(ratios),
        "delta_e": delta_e(tiled, whole),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores; writes no file")
    parser.add_argument("--model", default="tiny-x4")
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="directory of photographs; without it delta E is that of synthetic pictures",
    )
    parser.add_argument("--count", type=int, default=4, help="number of photographs (default 4)")
    parser.add_argument(
        "--side", type=int, default=232, help="side of the pictures (default 232: 64 tiles of 32)"
    )
    options = parser.parse_args(argv)
    up = Upscaler.from_pretrained(options.model, device="cpu")
    side, tile_sides = (92, (32, 64)) if options.quick else (options.side, (32, 64, 128))
    cases = synthetic(side)
    if options.quick:
        cases = {name: cases[name] for name in ("flat", "diagonal", "noise")}
    photographs = photos_of(options.photos, options.count, side) if options.photos else {}
    rows: list[dict[str, Any]] = []
    for name, pixels in (cases | photographs).items():
        whole = up(pixels, tile_px=4096)
        rows += [measure(up, name, pixels, tile_px, whole) for tile_px in tile_sides]
    columns = ("case", "tile_px", "tiles", "edge_ratio", "delta_e")
    print(record.table(columns, [[row[key] for key in columns] for row in rows]))
    judged = [row for row in rows if row["tiles"] > 1 and (row["case"] in photographs or not photographs)]
    figures = {
        "worst_edge_ratio": max(row["edge_ratio"] for row in rows),
        "mean_delta_e_photos": sum(row["delta_e"] for row in judged) / len(judged),
        "num_photos": len(photographs),
    }
    if not options.quick:
        where = record.machine(torch.device("cpu"))
        # File names of photographs may be private, so photographs are numbered.
        numbered = {name: f"photo {i}" for i, name in enumerate(photographs, 1)}
        stored = [row | {"case": numbered.get(row["case"], row["case"])} for row in rows]
        path = record.RESULTS / record.file_name("seams", where)
        record.write(path, {"machine": where, "figures": figures, "cases": stored})
    print(record.json_line(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
