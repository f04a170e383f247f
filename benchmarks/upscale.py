"""Measure speed and memory of upscaling, compared with a plain loop.

    python benchmarks/upscale.py                   minutes on two cores; writes a file to benchmarks/results
    python benchmarks/upscale.py --quick           under a minute; nothing written
    python benchmarks/upscale.py --dtype bfloat16  for CPUs with AMX: gain in speed and change of the picture
    python benchmarks/upscale.py --model FILE      any model that Upscaler takes, alone; nothing written

The file is upscale-DATE-MACHINE.json. Models are tiny-x4 and realsr-x4-s4 (full width, random weights, whose
arithmetic costs the same as with trained ones). In each case the plain loop (`benchmarks/plain.py`) and the
fast one upscale the same picture with the same noise, in turn, and the medians are compared; the change of
the picture by the fast loop is given in levels of 255. Stage times are measured inside the fast loop. The
last line is a JSON object:

    ratio_to_plain   seconds of the plain loop over those of the fast one, for realsr-x4-s4
                     (tiny-x4 with --quick)
    mp_per_s         output megapixels per second of tiny-x4
    share_of_peak    (CUDA) arithmetic of realsr-x4-s4 over time and the matrix rate measured in the same run
    peak_mb          memory of a run of tiny-x4 (500 px, including the result) beyond the loaded model
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import plain
import record
import torch
from parity import randomise
from timing import stopwatch_for
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resshift import images
from resshift.config import Sampling
from resshift.images import Picture
from resshift.models import Dtype
from resshift.networks.autoencoder import build_first_stage
from resshift.presets import PRESETS, preset
from resshift.tiles.chain import Networks
from resshift.training.step import build_network
from resshift.upscaler import Upscaler

PLAIN_TILE_PX = 128


@dataclass
class Stages:
    """Seconds inside the stages of a run; the rest of the total time is blending, noise and the arithmetic of
    the steps.
    """

    clock: Callable[[], float]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def watch(self) -> Generator[None]:
        """Time the stages of every run inside."""
        with mock.patch.multiple(
            Networks,
            encode=self._timed("encode", Networks.encode),
            predict_x0=self._timed("step", Networks.predict_x0),
            decode=self._timed("decode", Networks.decode),
        ):
            yield

    def _timed(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(networks: Networks, *args: Any) -> Tensor:
            if networks.device.type == "cuda":
                torch.cuda.synchronize()
            start = self.clock()
            out = function(networks, *args)
            if networks.device.type == "cuda":
                torch.cuda.synchronize()
            self.seconds[name] = self.seconds.get(name, 0.0) + self.clock() - start
            return out

        return call


def load(name: str, device: torch.device, dtype: Dtype, *, optimise: bool = True) -> Upscaler:
    """Return a model: presets other than tiny-x4 with random weights, what is no preset as it is stored."""
    if name not in PRESETS or (name == "tiny-x4" and optimise):
        return Upscaler.from_pretrained(name, device=device, dtype=dtype)
    config = preset(name)
    unet: nn.Module = build_network(config)
    if name == "tiny-x4":
        unet = Upscaler.from_pretrained(name, device="cpu").chain.unet
        plain.make_plain(unet)
    else:
        randomise(unet)
    stage = build_first_stage(config.model.first_stage)
    return Upscaler(config.model, unet, randomise_stage(stage), device=device, dtype=dtype, optimise=optimise)


def randomise_stage(stage: Any) -> Any:
    """Fill an autoencoder with random weights; pixel-unshuffle has none."""
    randomise(stage)
    return stage


def picture_of(side: int) -> np.ndarray:
    """Return a picture with smooth parts, edges and noise, (side, side, 3) uint8."""
    rng = np.random.default_rng(side)
    y, x = np.mgrid[:side, :side] / side
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y * x * 5), np.sign(np.sin(40 * (x + y * y)))], 2)
    return (127.5 + 90 * waves + rng.normal(0, 12, (side, side, 3))).clip(0, 255).astype(np.uint8)


def cpu_stopwatch(call: Callable[[], object]) -> float:
    """Run `call` and return its CPU seconds; with one thread they equal the wall time on an idle machine."""
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(
    name: str, side: int, rounds: int, device: torch.device, dtype: Dtype, busy: bool = False
) -> dict[str, Any]:
    """Time both loops on one picture, in turn."""
    fast, slow = load(name, device, dtype), load(name, device, "float32", optimise=False)
    pixels = picture_of(side)
    lq = images.to_tensor(pixels).to(device)
    ratio = slow.chain.ratio
    plan = plain.fixed_plan(-(-side // ratio), -(-side // ratio), PLAIN_TILE_PX // ratio, slow.chain.smallest)
    stopwatch, stages = (
        cpu_stopwatch if busy else stopwatch_for(device),
        Stages(time.process_time if busy else time.perf_counter),
    )
    results: dict[str, Tensor] = {}

    def run_plain() -> None:
        results["plain"] = plain.upscale(slow.chain.networks(), lq, plan, 0)

    def run_fast() -> None:
        results["fast"] = fast.upscale_tensor(lq)

    seconds: dict[str, list[float]] = {"plain": [], "fast": []}
    warm = slice(0, min(side, slow.chain.smallest * ratio))
    fast.upscale_tensor(lq[..., warm, warm])
    for _ in range(rounds):
        seconds["plain"].append(stopwatch(run_plain))
        with stages.watch():
            seconds["fast"].append(stopwatch(run_fast))
    start = time.perf_counter()
    images.encode(images.decode(images.encode(Picture(pixels=images.from_tensor(results["fast"].cpu())))))
    codec_s = time.perf_counter() - start
    megapixels = (side * fast.scale) ** 2 / 1e6
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    difference = ((results["fast"] - results["plain"]) * 127.5).abs()
    inside = {key: value / rounds for key, value in stages.seconds.items()}
    return {
        "model": name,
        "dtype": str(fast.dtype).removeprefix("torch."),
        "input_px": side,
        "tile": f"{fast.plan(side, side).num_tiles} of {fast.plan(side, side).rows.tile}",
        "plain_tile": f"{plan.num_tiles} of {plan.rows.tile}",
        "plain_s": medians["plain"],
        "fast_s": medians["fast"],
        "clock": "CPU seconds, one thread" if busy else "wall",
        "ratio": medians["plain"] / medians["fast"],
        "s_per_mp": medians["fast"] / megapixels,
        "mp_per_s": megapixels / medians["fast"],
        **{f"{key}_s": inside.get(key, 0.0) for key in ("encode", "step", "decode")},
        "rest_s": medians["fast"] - sum(inside.values()),
        "codec_s": codec_s,
        "mean_levels": float(difference.mean()),
        "max_levels": float(difference.max()),
        "all_seconds": seconds,
    }


def measure_alone(
    name: str, side: int, rounds: int, device: torch.device, dtype: Dtype, busy: bool = False
) -> dict[str, Any]:
    """Time a model on one picture. There is no plain loop for a network of other people."""
    up = Upscaler.from_pretrained(name, device=device, dtype=dtype)
    lq = images.to_tensor(picture_of(side)).to(device)
    stopwatch = cpu_stopwatch if busy else stopwatch_for(device)
    warm = min(side, up.config.smallest_tile_px)
    up.upscale_tensor(lq[..., :warm, :warm])
    seconds = [stopwatch(lambda: up.upscale_tensor(lq)) for _ in range(rounds)]
    megapixels, plan = (side * up.scale) ** 2 / 1e6, up.plan(side, side)
    return {
        "model": up.name,
        "dtype": str(up.dtype).removeprefix("torch."),
        "input_px": side,
        "tile": f"{plan.num_tiles} of {plan.rows.tile * up.renderer.ratio}",
        "clock": "CPU seconds, one thread" if busy else "wall",
        "s_per_mp": statistics.median(seconds) / megapixels,
        "all_seconds": seconds,
    }


def same_tiles(
    name: str, side: int, rounds: int, device: torch.device, dtype: Dtype, busy: bool = False
) -> dict[str, Any]:
    """Time both loops with equal tiles (one tile), which isolates the gain of the layers and their change of
    the picture.
    """
    with mock.patch(f"{__name__}.PLAIN_TILE_PX", 4096):
        fast_plan = partial(Upscaler.plan, sampling=Sampling(tile_px=4096))
        with mock.patch.object(
            Upscaler, "plan", lambda self, height, width, _=None: fast_plan(self, height, width)
        ):
            return compare(name, side, rounds, device, dtype, busy)


class PeakMemory(threading.Thread):
    """Samples the resident memory of this process, anonymous and of mapped files, every 5 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self._ended = threading.Event()

    @staticmethod
    def resident() -> int:
        """Return the bytes resident now."""
        try:
            return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def run(self) -> None:
        while not self._ended.wait(0.005):
            self.peak = max(self.peak, self.resident())

    def stop(self) -> int:
        """Stop sampling and return the largest sample."""
        self._ended.set()
        self.join()
        return self.peak


def measure_memory(name: str, side: int) -> dict[str, Any]:
    """Upscale a picture and return the peak memory beyond the loaded model. Runs in a separate process."""
    up = load(name, torch.device("cpu"), "float32")
    up(picture_of(40))  # first use of the libraries
    picture = picture_of(side)
    before, watch = PeakMemory.resident(), PeakMemory()
    watch.start()
    start = time.perf_counter()
    up(picture)
    plan = up.plan(side, side)
    return {
        "model": name,
        "input_px": side,
        "tiles": f"{plan.num_tiles} of {plan.columns.tile}x{plan.rows.tile}",
        "peak_mb": (watch.stop() - before) / 2**20,
        "seconds": time.perf_counter() - start,
    }


def memory_in_child(name: str, side: int) -> dict[str, Any]:
    """Call `measure_memory` in a new process, so that no earlier peak is counted."""
    request = json.dumps([name, side])
    done = subprocess.run(
        [sys.executable, __file__, "--child", request], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"memory case {request} failed: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def matrix_tflops(device: torch.device) -> float:
    """Return the rate of one large bf16 matrix product in TFLOP/s, the best of five."""
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    stopwatch = stopwatch_for(device)
    return 2 * 8192**3 / min(stopwatch(lambda: a @ b) for _ in range(5)) / 1e12


def tera_operations(name: str, side: int, device: torch.device) -> float:
    """Return the arithmetic of one picture, cut into its tiles, in TFLOP."""
    up = load(name, device, "float32", optimise=False)
    with FlopCounterMode(display=False) as counter:
        up.upscale_tensor(images.to_tensor(picture_of(side)).to(device))
    return counter.get_total_flops() / 1e12


COLUMNS = (
    ("model", "model"),
    ("dtype", "dtype"),
    ("input px", "input_px"),
    ("tiles", "tile"),
    ("plain tiles", "plain_tile"),
    ("plain s", "plain_s"),
    ("fast s", "fast_s"),
    ("ratio", "ratio"),
    ("s/MP", "s_per_mp"),
    ("encode s", "encode_s"),
    ("steps s", "step_s"),
    ("decode s", "decode_s"),
    ("rest s", "rest_s"),
    ("codec s", "codec_s"),
    ("mean level", "mean_levels"),
    ("max level", "max_levels"),
)
ALONE_COLUMNS = ("model", "dtype", "input_px", "tile", "clock", "s_per_mp")
MEMORY_COLUMNS = ("model", "input_px", "tiles", "peak_mb", "seconds")


def show(rows: Sequence[dict[str, Any]]) -> None:
    print(
        record.table([title for title, _ in COLUMNS], [[row[key] for _, key in COLUMNS] for row in rows]),
        flush=True,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores; writes no file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="precision of the fast loop (default auto)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of both loops (default 3)")
    parser.add_argument(
        "--full-px", type=int, default=256, help="side of the larger picture of realsr-x4-s4 (default 256)"
    )
    parser.add_argument(
        "--busy", action="store_true", help="one thread and CPU seconds: for a shared machine"
    )
    parser.add_argument("--model", help="a model to measure alone, as Upscaler.from_pretrained takes it")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if options.child:
        print(json.dumps(measure_memory(*json.loads(options.child))))
        return 0
    where = record.machine(device)
    if options.busy:
        torch.set_num_threads(1)
    how = (device, options.dtype, options.busy)
    if options.model:
        sides, rounds = ((96,), 1) if options.quick else ((128, 300), options.rounds)
        rows = [measure_alone(options.model, side, rounds, *how) for side in sides]
        print(record.table(ALONE_COLUMNS, [[row[key] for key in ALONE_COLUMNS] for row in rows]))
        figures = {"s_per_mp": rows[-1]["s_per_mp"], "mp_per_s": 1 / rows[-1]["s_per_mp"]}
        if device.type == "cpu":
            figures["peak_mb"] = memory_in_child(options.model, sides[-1])["peak_mb"]
        print(record.json_line(figures))
        return 0
    if options.quick:
        rows = [compare("tiny-x4", 160, 1, *how)]
        memory = [memory_in_child("test-x4", 200)] if device.type == "cpu" else []
        headline = rows[0]
    else:
        tiny = [compare("tiny-x4", side, options.rounds, *how) for side in (128, 256)]
        full = [compare("realsr-x4-s4", side, options.rounds, *how) for side in (64, options.full_px)]
        alone = [
            same_tiles(name, side, options.rounds, *how)
            for name, side in (("tiny-x4", 256), ("realsr-x4-s4", 64))
        ]
        rows, headline = (
            [*tiny, *full, *[row | {"model": row["model"] + " (same tiles)"} for row in alone]],
            full[-1],
        )
        memory = [memory_in_child("tiny-x4", 500)] if device.type == "cpu" else []
    show(rows)
    if memory:
        print(record.table(MEMORY_COLUMNS, [[row[key] for key in MEMORY_COLUMNS] for row in memory]))
    figures: dict[str, Any] = {
        "ratio_to_plain": headline["ratio"],
        "mp_per_s": next(row["mp_per_s"] for row in reversed(rows) if row["model"] == "tiny-x4"),
        "peak_mb": memory[0]["peak_mb"] if memory else torch.cuda.max_memory_allocated(device) / 2**20,
        "headline": f"{headline['model']} {headline['input_px']} px {headline['dtype']}",
    }
    if device.type == "cuda":
        side = headline["input_px"]
        figures["share_of_peak"] = (
            tera_operations("realsr-x4-s4", side, device) / headline["fast_s"] / matrix_tflops(device)
        )
    if not options.quick:
        path = record.RESULTS / record.file_name(
            "upscale" if options.dtype == "auto" else f"upscale-{options.dtype}", where
        )
        record.write(path, {"machine": where, "figures": figures, "cases": rows, "memory": memory})
    print(record.json_line(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
