"""Measure training pairs per second on one core (decode, crop, each step of the degradation, total), compared
with a plain implementation of the same pairs.

Both process the same blocks of photos in turn, so that a busy moment of the machine affects both. Time is the
CPU time of the one working thread, which equals wall time on an idle machine. What `data.degrade_on=device`
leaves of a pair on the CPU is measured in the same way. Then the Ray Data pipeline on two cores is compared
with bare processes by wall time (pairs_on_ray.py). The last line is a JSON object with the main figures; the
file has all figures.

    python benchmarks/pairs.py                      photos made by the script, about ten minutes
    python benchmarks/pairs.py --photos DIR         JPEG photos under DIR
    python benchmarks/pairs.py --quick              about a minute
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import cv2
import numpy as np
import pairs_on_ray
import plain_pair
import record
import torch
from synthetic_photos import synthetic_photo
from timing import Timing, cpu_stopwatch

from resshift import seeds
from resshift.config import DataConfig
from resshift.degradation import DegradationRecipe, draw, realesrgan_x4
from resshift.degradation.apply import apply_operation
from resshift.degradation.jpeg import from_u8, to_u8
from resshift.degradation.on_device.plan import encode
from resshift.devices import use_one_thread
from resshift.pairs.crops import training_crop
from resshift.pairs.jpeg import decode_photo
from resshift.pairs.training_pair import draw_pair, make_pair
from resshift.presets import preset

CROP = DataConfig(crop="short_side", crop_px=256)
STAGES = ("decode", "crop", "draw", "blur", "resize", "noise", "jpeg", "rounding")
T = TypeVar("T")
Photos = Sequence[tuple[str, bytes]]


def load_photos(folder: Path | None, count: int) -> Photos:
    """Return (key, encoded photo) of the first `count` JPEG files under `folder` by name, or of as many
    synthetic photos.
    """
    if folder is None:
        return [(f"synthetic {i}", synthetic_photo(i)) for i in range(count)]
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))[:count]
    if not paths:
        raise SystemExit(f"--photos {folder}: no .jpg or .jpeg file found there")
    return [(str(path.relative_to(folder)), path.read_bytes()) for path in paths]


def ours(photos: Photos, recipe: DegradationRecipe) -> None:
    for key, data in photos:
        make_pair(data, key, 0, 0, CROP, recipe)


def plain(photos: Photos, recipe: DegradationRecipe, rng: np.random.Generator) -> None:
    for _, data in photos:
        plain_pair.plain_pair(data, CROP.crop_px, recipe, rng)


def plain_crops(photos: Photos, rng: np.random.Generator) -> None:
    for _, data in photos:
        plain_pair.crop(data, CROP.crop_px, rng)


def stages(photos: Photos, recipe: DegradationRecipe) -> dict[str, float]:
    """Make the pairs of `make_pair` step by step; return the CPU seconds per pair of each stage."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(stage: str, call: Callable[[], T]) -> T:
        start = time.thread_time()
        made = call()
        seconds[stage] += (time.thread_time() - start) / len(photos)
        return made

    for key, data in photos:
        rgb_u8 = timed("decode", lambda data=data: decode_photo(data, CROP.crop_px))
        rng = timed("draw", lambda key=key: seeds.philox(0, "pair", 0, key))
        hq_u8 = timed("crop", lambda rgb_u8=rgb_u8, rng=rng: training_crop(rgb_u8, rng, CROP))
        params = timed("draw", lambda rng=rng: draw(rng, recipe))
        image = timed("rounding", lambda hq_u8=hq_u8: from_u8(hq_u8))
        for op in params.ops:
            image = timed(
                op.op,
                lambda image=image, op=op: apply_operation(
                    image, op, (CROP.crop_px, CROP.crop_px), recipe.scale
                ),
            )
        timed("rounding", lambda image=image: to_u8(image))
    return dict(seconds)


def blocks(photos: Photos, size: int) -> Iterator[Photos]:
    """Yield blocks of photos without end, starting over when all are used."""
    start = 0
    while True:
        yield [photos[(start + i) % len(photos)] for i in range(size)]
        start += size


def measure_function(photos: Photos, seconds: float, block_size: int) -> dict[str, Any]:
    """Time `make_pair`, its stages and the plain pair on the same blocks in turn; return the figures."""
    recipe, rng = realesrgan_x4(), np.random.default_rng(0)
    cases: dict[str, Callable[[Photos], None]] = {
        "ours": lambda block: ours(block, recipe),
        "plain": lambda block: plain(block, recipe, rng),
        "plain crop": lambda block: plain_crops(block, rng),
    }
    ours(photos, recipe)  # fills tables, plans and caches, as a worker does once
    plain(photos[:8], recipe, rng)
    taken: dict[str, list[float]] = {name: [] for name in (*cases, *STAGES)}
    deadline = time.monotonic() + seconds
    for block in blocks(photos, block_size):
        for name, case in cases.items():
            taken[name].append(cpu_stopwatch(lambda case=case, block=block: case(block)) / len(block))
        for stage, stage_seconds in stages(block, recipe).items():
            taken[stage].append(stage_seconds)
        if time.monotonic() > deadline and len(taken["ours"]) >= 3:
            break
    timings = {name: Timing.of(values) for name, values in taken.items()}
    ms = {name: timing.median_s * 1e3 for name, timing in timings.items()}
    return {
        "pairs_per_s_core": 1e3 / ms["ours"],
        "ratio_to_plain": ms["plain"] / ms["ours"],
        "plain_pairs_per_s_core": 1e3 / ms["plain"],
        "ms": ms,
        "spread": {name: timings[name].spread for name in ("ours", "plain")},
        "num_pairs": len(taken["ours"]) * block_size,
    }


def measure_drawn(photos: Photos, seconds: float, block_size: int, name: str) -> dict[str, Any]:
    """Time whole pairs of a preset and what is left of them with `data.degrade_on=device`, on the same blocks
    in turn; return CPU milliseconds a pair.
    """
    config = preset(name)
    made = config.data, config.degradation

    def whole(block: Photos) -> None:
        for key, data in block:
            make_pair(data, key, 0, 0, *made)

    def drawn(block: Photos) -> None:
        for key, data in block:
            _, params = draw_pair(data, key, 0, 0, *made)
            encode(params, config.data.crop_px)

    whole(photos)
    taken: dict[str, list[float]] = {"whole": [], "drawn": []}
    deadline = time.monotonic() + seconds
    for block in blocks(photos, block_size):
        for case in (whole, drawn):
            one = cpu_stopwatch(lambda case=case, block=block: case(block)) / len(block)
            taken[case.__name__].append(one)
        if time.monotonic() > deadline and len(taken["whole"]) >= 3:
            break
    whole_s, drawn_s = (Timing.of(values).median_s for values in taken.values())
    return {
        "preset": name,
        "ms_whole": whole_s * 1e3,
        "ms_drawn": drawn_s * 1e3,
        "times_fewer": whole_s / drawn_s,
        "num_pairs": len(taken["whole"]) * block_size,
    }


def drawn_table(rows: Sequence[dict[str, Any]]) -> str:
    header = ("preset", "whole pair, ms", "degraded on the device, ms", "times fewer", "pairs")
    return record.table(header, [list(row.values()) for row in rows])


def function_table(figures: dict[str, Any]) -> str:
    ms = figures["ms"]
    rows: list[list[object]] = [[stage, ms[stage], 100 * ms[stage] / ms["ours"], None] for stage in STAGES]
    rows.append(
        [
            "decode + crop",
            ms["decode"] + ms["crop"],
            100 * (ms["decode"] + ms["crop"]) / ms["ours"],
            ms["plain crop"],
        ]
    )
    degradation = ms["ours"] - ms["decode"] - ms["crop"]
    rows.append(
        [
            "degradation, with its draw",
            degradation,
            100 * degradation / ms["ours"],
            ms["plain"] - ms["plain crop"],
        ]
    )
    rows.append(["whole pair", ms["ours"], 100, ms["plain"]])
    rows.append(["pairs/s/core", figures["pairs_per_s_core"], None, figures["plain_pairs_per_s_core"]])
    return record.table(("stage", "ms", "%", "plain ms"), rows)


def pipeline_table(figures: dict[str, Any]) -> str:
    row: list[object] = [
        "2 cores",
        figures["ray_pairs_per_s_2"],
        figures["bare_pairs_per_s_2"],
        100 * figures["ray_overhead"],
        " ".join(f"{100 * overhead:.1f}" for overhead in figures["ray_overheads_2"]),
        100 * figures["ray_cpu_overhead_2"],
        figures["store_peak_mb_2"],
    ]
    return record.table(
        (
            "Ray Data pipeline on",
            "pairs/s",
            "bare pairs/s",
            "overhead %",
            "of each round",
            "CPU overhead %",
            "store peak MB",
        ),
        [row],
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", 1)[0],
        epilog="example: benchmarks/pairs.py --photos imagenet/train --write",
    )
    parser.add_argument(
        "--photos",
        type=Path,
        metavar="DIR",
        help="folder of JPEG photos (default: synthetic photos, 500 x 375)",
    )
    parser.add_argument("--count", type=int, help="number of photos (400; with --quick 64)")
    parser.add_argument("--seconds", type=float, help="duration of the measurement (90; with --quick 12)")
    parser.add_argument(
        "--rounds",
        type=int,
        help="rounds of the pipeline on two cores (5; with --quick 1)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer photos, about a minute")
    parser.add_argument("--no-ray", action="store_true", help="skip the Ray Data pipeline")
    parser.add_argument(
        "--out",
        type=Path,
        default=record.RESULTS,
        metavar="DIR",
        help="directory of the JSON file (benchmarks/results)",
    )
    parser.add_argument("--write", action="store_true", help="write the file")
    parser.add_argument("--commit", help="commit to record if the tree has no git directory")
    options = parser.parse_args(argv)
    options.count = options.count or (64 if options.quick else 400)
    options.seconds = options.seconds or (12 if options.quick else 90)
    options.rounds = options.rounds or (1 if options.quick else 5)
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, write the file on request; return 0."""
    options = parse(argv)
    where = record.machine(torch.device("cpu"), options.commit)
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    print(" ".join(f"{key}={value}" for key, value in (where | {"load_average": load}).items()))
    photos = load_photos(options.photos, options.count)
    size_kb = sum(len(data) for _, data in photos) / len(photos) / 1e3
    print(
        f"{len(photos)} photos{'' if options.photos else ' made by this script'}, {size_kb:.0f} kB each; "
        "real-world x4, crop 256\n"
    )
    use_one_thread()
    figures = measure_function(photos, options.seconds, block_size=16 if options.quick else 32)
    print(function_table(figures))
    print(f"ratio to plain: {figures['ratio_to_plain']:.2f}")
    size = 16 if options.quick else 32
    drawn = [
        measure_drawn(photos, options.seconds / 4, size, name) for name in ("realsr-x4-s4", "tiny-x4-s4")
    ]
    print(drawn_table(drawn))
    figures["drawn"] = drawn
    if not options.no_ray:
        figures |= pairs_on_ray.measure_pipeline(photos, CROP, options.seconds / 4.5, options.rounds)
        print(pipeline_table(figures))
    source = "given" if options.photos else "synthetic"
    head = {
        "benchmark": "pairs",
        "machine": where,
        "load_average": load,
        "photos": source,
        "opencv": cv2.__version__,
    }
    path = options.out / record.file_name("pairs", where)
    if options.write:
        record.write(path, head | figures)
    main_figures = {key: round(value, 3) for key, value in figures.items() if isinstance(value, float)}
    main_figures |= {f"times_fewer_{row['preset']}": round(row["times_fewer"], 2) for row in drawn}
    print(record.json_line(head | {"file": str(path) if options.write else None} | main_figures), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
