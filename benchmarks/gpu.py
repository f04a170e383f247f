"""Measure correctness and speed of the networks on one device: parity, ceilings, inference, training.

Start it with `benchmarks/gpu.sh`, which finds Python and the package. Sections, in this order:

    parity     outputs of small networks compared with the arrays in tests/parity (official classes)
    ceilings   matrix rate and copy bandwidth of this device: the reference of "share of peak"
    inference  realsr-x4-s4, full width, random weights: encode, one U-Net step, decode, and the whole chain
               (64x64 in, 256x256 out)
    training   the optimiser step of realsr-x4-s4, with and without the LPIPS term
    tiny       inference and training of tiny-x4
    feeding    training steps on batches from the host (`pipelines.training.feeding`), and the same steps on
               a batch that is on the device: what copies cost, and how long the loop waits for them
    degrading  pairs a second that `data.degrade_on=device` makes of drawn ones on the device, and how many of
               its low-quality pictures are those of the CPU
    upscale    whole pictures through `Upscaler`, tiles, noise and colour fix included: seconds a megapixel
    together   small pictures alone and with shared calls (`together.py`): speed ratio and identical bytes
    compile    the best of the above under torch.compile

Weights are random and not zero, so that arithmetic costs the same as with trained weights. Operations are
counted once per stage with `torch.utils.flop_counter`; the share of peak divides them by the time and by the
matrix rate measured at that precision in the same run. Running out of memory or time ends a series and is
recorded. The last line is a JSON object with the main figures; the file has all figures.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import parity
import record
import torch
from parity import in_precision, randomise, set_precision
from synthetic_photos import synthetic_photo
from timing import Timing, measure, stopwatch_for
from together import compare
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipelines.training.feeding import Batch, feed
from resshift.config import LossConfig, RunConfig
from resshift.degradation import degrade
from resshift.degradation.on_device.chain import DeviceDegradation
from resshift.degradation.on_device.plan import encode
from resshift.metrics.lpips import Lpips
from resshift.networks.autoencoder import FirstStage, build_first_stage
from resshift.pairs.training_pair import draw_pair
from resshift.presets import preset
from resshift.resize.bicubic import upsample
from resshift.sampler import network_denoiser, sample
from resshift.schedule import ShiftSchedule
from resshift.training.losses import Objective
from resshift.training.step import DiffusionLearner, build_network
from resshift.upscaler import Upscaler

Terms = tuple[str, LossConfig, Lpips | None]
STAGES = ("encode", "unet", "decode", "chain")
# A section or series does not start with less than this time left; compiling the first stage and the U-Net
# takes minutes.
RESERVE_S, COMPILE_RESERVE_S = 10, 150


@dataclass
class Run:
    """One run of this script: its device, its deadline and its results."""

    device: torch.device
    quick: bool
    deadline: float
    parity: list[dict[str, Any]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    ceilings: dict[str, float] = field(default_factory=dict)
    inference: list[dict[str, Any]] = field(default_factory=list)
    training: list[dict[str, Any]] = field(default_factory=list)
    feeding: list[dict[str, Any]] = field(default_factory=list)
    degrading: list[dict[str, Any]] = field(default_factory=list)
    upscale: list[dict[str, Any]] = field(default_factory=list)
    together: list[dict[str, Any]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def short(self) -> bool:
        """Whether only small sizes are measured: on request, or because there is no GPU."""
        return self.quick or self.device.type != "cuda"

    def has_time(self, what: str, reserve_s: float = RESERVE_S) -> bool:
        """Return whether enough time is left to start `what`; record it as dropped otherwise."""
        if time.monotonic() + reserve_s < self.deadline:
            return True
        self.dropped.append(f"{what}: no time left")
        return False

    def time(self, call: Callable[[], object]) -> Timing:
        """Time one call, with as many repetitions as this run allows."""
        stopwatch = stopwatch_for(self.device)
        if self.short:
            return measure(call, stopwatch, warmup=1, max_calls=5, limit_s=0.3)
        return measure(call, stopwatch, warmup=2, max_calls=30, limit_s=0.8)

    def figures(self, precision: str, batch: int, timing: Timing, flops_per_image: float) -> dict[str, Any]:
        """Return the figures of a case timed inside `attempt`; its peak memory includes the weights."""
        tflops = flops_per_image * batch / timing.median_s / 1e12
        peak = self.ceilings.get(f"{precision}_tflops")
        return {
            "status": "ok",
            "ms": timing.median_s * 1e3,
            "spread": timing.spread,
            "num_calls": timing.num_calls,
            "images_per_s": batch / timing.median_s,
            "gflop_per_image": flops_per_image / 1e9,
            "tflops": tflops,
            "share_of_peak": tflops / peak if peak else None,
            "peak_memory_gib": torch.cuda.max_memory_allocated(self.device) / 2**30
            if self.device.type == "cuda"
            else None,
        }

    def attempt(self, case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Run a case; an error becomes its row, so that one size or compiler cannot end the benchmark."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            return case()
        except torch.OutOfMemoryError:
            return {"status": "out of memory"}
        except Exception as error:  # the compiler, cuDNN and the driver raise exceptions of different types
            return {
                "status": f"{type(error).__name__}: "
                f"{str(error).strip().splitlines()[0][:200] if str(error).strip() else ''}"
            }


def measure_ceilings(run: Run) -> dict[str, float]:
    """Return the largest matrix rate of each precision in TFLOP/s, and the copy bandwidth (read plus
    written) in GB/s, measured on random data.
    """
    if run.device.type != "cuda":
        sizes = {"bf16": (1024,), "fp32": (1024,)}
    else:
        sizes = {"bf16": (8192,) if run.quick else (4096, 8192, 16384), "tf32": (8192,), "fp32": (8192,)}
    ceilings: dict[str, float] = {}
    for precision, sides in sizes.items():
        set_precision(precision)
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for side in sides:
            a, b = (torch.randn(side, side, device=run.device).to(dtype) for _ in range(2))
            rate = 2 * side**3 / run.time(lambda a=a, b=b: a @ b).median_s / 1e12
            ceilings[f"{precision}_tflops"] = max(rate, ceilings.get(f"{precision}_tflops", 0.0))
    size_bytes = 2**31 if run.device.type == "cuda" else 2**26
    source = torch.randn(size_bytes // 4, device=run.device)
    target = torch.empty_like(source)
    ceilings["copy_gb_per_s"] = 2 * size_bytes / run.time(lambda: target.copy_(source)).median_s / 1e9
    return ceilings


@dataclass(frozen=True)
class Model:
    """The networks of a preset on the device, in one precision and memory layout."""

    config: RunConfig
    precision: str
    layout: str
    encode: Callable[..., Tensor]
    unet: Callable[..., Tensor]
    decode: Callable[..., Tensor]


def layout_of(name: str) -> torch.memory_format:
    return torch.channels_last if name == "channels_last" else torch.contiguous_format


@lru_cache
def random_networks(name: str) -> tuple[nn.Module, nn.Module]:
    """Return U-Net and first stage of a preset with random weights, on the CPU; copy them before use."""
    config = preset(name)
    return randomise(build_network(config)), randomise(build_first_stage(config.model.first_stage))


def build_networks(name: str, device: torch.device, layout: str) -> tuple[nn.Module, nn.Module]:
    """Return frozen U-Net and first stage with random weights, in evaluation mode on the device."""
    networks = [deepcopy(network).to(device).requires_grad_(False) for network in random_networks(name)]
    unet, first_stage = (network.to(memory_format=layout_of(layout)) for network in networks)
    return unet, first_stage


def model_of(
    config: RunConfig, device: torch.device, precision: str, layout: str, compile_mode: str | None = None
) -> Model:
    """Build the networks of a preset so that each call runs in `precision`, returns float32 and, on request,
    is compiled.
    """
    unet, module = build_networks(config.preset, device, layout)
    first_stage = cast(FirstStage, module)
    calls: list[Callable[..., Tensor]] = [first_stage.encode, unet, first_stage.decode]
    if compile_mode:
        calls = [torch.compile(call, mode=compile_mode, dynamic=False) for call in calls]
    return Model(config, precision, layout, *(in_precision(call, precision, device) for call in calls))


def stage_calls(
    model: Model, batch: int, lq_px: int, device: torch.device
) -> dict[str, Callable[[], Tensor]]:
    """Return a call for each stage on a batch of random pictures whose low-quality side is `lq_px`."""
    config = model.config.model
    generator = torch.Generator(device=device).manual_seed(batch)
    schedule = ShiftSchedule.from_config(config.schedule)
    side = lq_px * config.scale // config.first_stage.factor

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator, device=device).to(
            memory_format=layout_of(model.layout)
        )

    lq, upsampled = (
        normal(3, lq_px, lq_px).clamp(-1, 1),
        normal(3, lq_px * config.scale, lq_px * config.scale).clamp(-1, 1),
    )
    noise = [normal(config.first_stage.channels, side, side) for _ in range(schedule.steps + 1)]
    t = torch.full((batch,), schedule.steps - 1, device=device)

    def chain() -> Tensor:
        y0 = model.encode(upsample(lq, config.scale))
        denoise = network_denoiser(model.unet, lq, y0, schedule, config.target, latent=config.latent_scaling)
        return model.decode(sample(denoise, y0, schedule, noise.__getitem__)).clamp(-1, 1)

    return {
        "encode": lambda: model.encode(upsampled),
        "unet": lambda: model.unet(noise[0], t, lq),
        "decode": lambda: model.decode(noise[1]),
        "chain": chain,
    }


@torch.no_grad()
def count_flops(model: Model, lq_px: int, device: torch.device) -> dict[str, float]:
    """Count the operations of each stage for one picture (a multiply-add counts as two)."""
    counts: dict[str, float] = {}
    for stage, call in stage_calls(model, 1, lq_px, device).items():
        with FlopCounterMode(display=False) as counter:
            call()
        counts[stage] = float(counter.get_total_flops())
    return counts


@torch.no_grad()
def time_inference(
    run: Run, model: Model, batches: Sequence[int], lq_px: int, flops: dict[str, float], mode: str = "eager"
) -> None:
    """Time every stage for each batch size until memory or time runs out; append one row for each stage
    and batch size.
    """
    set_precision(model.precision)
    series = {
        "preset": model.config.preset,
        "mode": mode,
        "precision": model.precision,
        "layout": model.layout,
    }
    megapixels = (lq_px * model.config.model.scale) ** 2 / 1e6

    def case(stage: str, batch: int) -> dict[str, Any]:
        call = stage_calls(model, batch, lq_px, run.device)[stage]
        figures = run.figures(model.precision, batch, run.time(call), flops[stage])
        return figures | {"mp_per_s": figures["images_per_s"] * megapixels}

    for batch in batches:
        if not run.has_time(f"inference {' '.join(series.values())}, from batch {batch} on"):
            return
        rows = [
            series | {"batch": batch, "stage": stage} | run.attempt(partial(case, stage, batch))
            for stage in STAGES
        ]
        run.inference += rows
        if all(row["status"] != "ok" for row in rows):
            return


def train_config(name: str, loss: LossConfig, micro_batch: int, device: torch.device) -> RunConfig:
    """Return a preset whose optimiser step is one micro-batch, in bf16 (fp32 on a CPU). A skipped step is an
    error, because it costs less.
    """
    config = preset(name)
    precision = "bf16" if device.type == "cuda" else "fp32"
    train = replace(
        config.train,
        batch_size=micro_batch,
        micro_batch=micro_batch,
        precision=precision,
        max_skipped_steps=1,
    )
    return replace(config, loss=loss, train=train)


def random_pairs(config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    """Return a batch of uint8 noise with the shapes of training batches."""
    rows, hq_px = config.train.batch_size, config.data.crop_px
    sides = {"hq": hq_px, "lq": hq_px // config.model.scale}
    return {
        name: torch.randint(256, (rows, side, side, 3), dtype=torch.uint8, device=device)
        for name, side in sides.items()
    }


def lpips_for_timing(loss: LossConfig, device: torch.device) -> Lpips | str:
    """Return LPIPS with its trunk, or the reason why there is none. Nothing is downloaded: the trunk must be
    a file or in torch's cache.
    """
    names = {
        "vgg": "vgg16-397923af.pth",
        "alex": "alexnet-owt-7be5be79.pth",
        "squeeze": "squeezenet1_1-b8a52dc0.pth",
    }
    trunk = (
        Path(loss.lpips_trunk)
        if loss.lpips_trunk
        else Path(torch.hub.get_dir()) / "checkpoints" / names[loss.lpips_net]
    )
    try:
        return Lpips(loss.lpips_net, trunk).to(device)
    except (FileNotFoundError, ImportError) as error:
        return str(error)


def objectives(run: Run, name: str, trunk: str | None) -> Iterator[Terms]:
    """Yield the plain MSE objective, then the preset's own if its LPIPS trunk is available; otherwise note
    the reason.
    """
    loss = preset(name).loss
    yield "mse", replace(loss, mse=1.0, lpips=0.0, lattice=0.0), None
    if loss.lpips:
        lpips = lpips_for_timing(replace(loss, lpips_trunk=trunk), run.device)
        if isinstance(lpips, str):
            run.notes.append(f"{name}: training step timed without its LPIPS term ({lpips})")
        else:
            yield f"mse+lpips-{loss.lpips_net}", loss, lpips


def time_training(
    run: Run, name: str, batches: Sequence[int], layout: str, terms: Terms, mode: str = "eager"
) -> None:
    """Time the optimiser step for each micro-batch size until memory or time runs out; append one row for
    each.

    `layout` is the memory layout of the weights. Pictures arrive as (B, H, W, 3) bytes, so the first
    convolution sees channels_last in any case.
    """
    label, loss, lpips = terms
    config = train_config(name, loss, 1, run.device)
    set_precision(config.train.precision)
    unet, first_stage = build_networks(name, run.device, layout)
    objective = Objective(config.model, loss, cast(FirstStage, first_stage), lpips)
    unet.requires_grad_(True)
    flops = step_flops(DiffusionLearner(config, unet, objective), run.device)
    if mode != "eager":
        unet.compile()
    series = {
        "preset": name,
        "mode": mode,
        "objective": label,
        "precision": config.train.precision,
        "layout": layout,
    }

    def case(batch: int) -> dict[str, Any]:
        config = train_config(name, loss, batch, run.device)
        pairs = random_pairs(config, run.device)
        learner = DiffusionLearner(config, unet, objective)
        return run.figures(config.train.precision, batch, run.time(lambda: learner.step(pairs)), flops)

    for batch in batches:
        if not run.has_time(f"training {' '.join(series.values())}, from micro-batch {batch} on"):
            return
        row = series | {"micro_batch": batch} | run.attempt(partial(case, batch))
        run.training.append(row)
        unet.zero_grad(set_to_none=True)
        if row["status"] != "ok":
            return


def step_flops(learner: DiffusionLearner, device: torch.device) -> float:
    """Count the operations of one optimiser step on one pair, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        learner.step(random_pairs(learner.config, device))
    return float(counter.get_total_flops())


def run_parity(run: Run, options: argparse.Namespace) -> None:
    for row in parity.compare(
        run.device, ("fp32", "tf32", "bf16") if run.device.type == "cuda" else ("fp32",)
    ):
        run.parity.append(row)  # one at a time: comparisons made before a crash are kept


def run_ceilings(run: Run, options: argparse.Namespace) -> None:
    run.ceilings = measure_ceilings(run)


def run_inference(run: Run, options: argparse.Namespace) -> None:
    if run.device.type != "cuda":
        run.dropped.append("realsr-x4-s4 inference: no GPU")
        return
    series = [
        ("bf16", "contiguous", (1, 4, 16, 32, 64, 128)),
        ("bf16", "channels_last", (1, 4, 16, 32, 64, 128)),
        ("tf32", "channels_last", (1, 16, 64)),
        ("tf32", "contiguous", (1, 16)),
        ("fp32", "contiguous", (1, 16)),
    ]
    _inference_series(run, "realsr-x4-s4", [("bf16", "contiguous", (1, 4))] if run.quick else series, 64)


def _inference_series(
    run: Run, name: str, series: Sequence[tuple[str, str, Sequence[int]]], lq_px: int
) -> None:
    config = preset(name)
    flops: dict[str, float] = {}
    for precision, layout, batches in series:
        model = model_of(config, run.device, precision, layout)
        flops = flops or count_flops(model, lq_px, run.device)
        time_inference(run, model, batches, lq_px, flops)


def run_training(run: Run, options: argparse.Namespace) -> None:
    if run.device.type != "cuda":
        run.dropped.append("realsr-x4-s4 training: no GPU")
        return
    batches = (4,) if run.quick else (4, 12, 16, 32, 64)
    for objective in objectives(run, "realsr-x4-s4", options.lpips_vgg):
        for layout in ("contiguous",) if run.quick else ("contiguous", "channels_last"):
            time_training(run, "realsr-x4-s4", batches, layout, objective)


def run_tiny(run: Run, options: argparse.Namespace) -> None:
    if run.short:
        batches, lq_px = (1, 4), 32
        series = [("bf16" if run.device.type == "cuda" else "fp32", "contiguous", batches)]
    else:
        batches, lq_px = (1, 16, 64, 256), 64
        series = [
            ("bf16", "contiguous", batches),
            ("bf16", "channels_last", batches),
            ("tf32", "contiguous", batches),
        ]
    _inference_series(run, "tiny-x4", series, lq_px)
    for objective in objectives(run, "tiny-x4-swin", options.lpips_squeeze):
        time_training(run, "tiny-x4-swin", (2,) if run.short else (16, 64, 256), "contiguous", objective)


def run_feeding(run: Run, options: argparse.Namespace) -> None:
    sizes = (
        [("tiny-x4-swin", 2)]
        if run.short
        else [("tiny-x4-swin", 64), ("tiny-x4-swin", 256), ("realsr-x4-s4", 12)]
    )
    for name, micro_batch in sizes:
        if run.has_time(f"feeding {name}"):
            row = {"preset": name, "micro_batch": micro_batch}
            run.feeding.append(row | run.attempt(partial(time_feeding, run, name, micro_batch)))


def time_feeding(run: Run, name: str, micro_batch: int) -> dict[str, Any]:
    """Time the steps of a preset (MSE alone) on one batch that stays on the device, and on batches from the
    host.
    """
    loss = replace(preset(name).loss, mse=1.0, lpips=0.0, lattice=0.0)
    config = train_config(name, loss, micro_batch, run.device)
    set_precision(config.train.precision)
    unet, first_stage = build_networks(name, run.device, "channels_last")
    learner = DiffusionLearner(
        config, unet.requires_grad_(True), Objective(config.model, loss, cast(FirstStage, first_stage))
    )
    pairs = random_pairs(config, run.device)
    resident_s = run.time(lambda: learner.step(pairs)).median_s
    num_steps = max(4, min(200, int((1 if run.short else 4) / resident_s)))

    def batches() -> Iterator[Batch]:
        made = {column: value.cpu().numpy() for column, value in pairs.items()}
        while True:
            yield made

    source: Any = (batch for batch in batches())
    waited_s, started = 0.0, time.perf_counter()
    for fed in feed(source, run.device, num_steps):
        learner.step(fed.pictures)
        waited_s += fed.waited_s
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    elapsed_s = time.perf_counter() - started
    return {
        "status": "ok",
        "steps": num_steps,
        "ms_on_device": resident_s * 1e3,
        "ms_fed": elapsed_s / num_steps * 1e3,
        "data_wait": waited_s / elapsed_s,
        "samples_per_s": num_steps * micro_batch / elapsed_s,
    }


def run_degrading(run: Run, options: argparse.Namespace) -> None:
    for batch in (4,) if run.short else (16, 64, 256):
        if run.has_time(f"degrading {batch}"):
            row = {"preset": "tiny-x4-s4", "batch": batch}
            run.degrading.append(row | run.attempt(partial(time_degrading, run, "tiny-x4-s4", batch)))


def time_degrading(run: Run, name: str, batch: int) -> dict[str, Any]:
    """Time the degradation of a batch on the device, and compare the first pictures with the CPU's."""
    config = preset(name)
    side_px, photos = config.data.crop_px, [synthetic_photo(i) for i in range(16)]
    set_precision("fp32")
    drawn = [
        draw_pair(photos[i % len(photos)], "photo", i, 0, config.data, config.degradation)
        for i in range(batch)
    ]
    hq, records = (
        torch.from_numpy(np.stack(column)).to(run.device)
        for column in zip(*((hq, encode(params, side_px)) for hq, params in drawn), strict=True)
    )
    degradation = DeviceDegradation(config.degradation, side_px)
    timing = run.time(lambda: degradation(hq, records))
    compared = drawn[:32]
    found = degradation(hq, records)[: len(compared)].cpu().numpy().astype(int)
    difference = np.abs(found - np.stack([degrade(*one) for one in compared])).reshape(len(compared), -1)
    return {
        "status": "ok",
        "ms": timing.median_s * 1e3,
        "pairs_per_s": batch / timing.median_s,
        "equal_pictures": float(np.mean(~difference.any(axis=1))),
        "mean_levels": float(difference.mean()),
        "peak_memory_gib": torch.cuda.max_memory_allocated(run.device) / 2**30
        if run.device.type == "cuda"
        else None,
    }


def run_upscale(run: Run, options: argparse.Namespace) -> None:
    cases = [("tiny-x4", 64)] if run.short else [("tiny-x4", 1024), ("realsr-x4-s4", 512)]
    for name, side_px in cases:
        if run.has_time(f"upscale {name}", 3 * RESERVE_S):
            row = {"preset": name, "side_px": side_px}
            run.upscale.append(row | run.attempt(partial(time_upscale, run, name, side_px)))


def time_upscale(run: Run, name: str, side_px: int) -> dict[str, Any]:
    """Time a picture of noise through an `Upscaler` with random weights."""
    config = preset(name)
    unet, first_stage = (deepcopy(network) for network in random_networks(name))
    up = Upscaler(config.model, unet, cast(Any, first_stage), device=run.device)
    picture = np.random.default_rng(0).integers(0, 256, (side_px, side_px, 3), np.uint8)
    seconds = run.time(lambda: up(picture)).median_s
    megapixels = (side_px * config.model.scale) ** 2 / 1e6
    on_gpu = run.device.type == "cuda"
    return {
        "status": "ok",
        "precision": str(up.dtype).removeprefix("torch."),
        "s_per_mp": seconds / megapixels,
        "peak_memory_gib": torch.cuda.max_memory_allocated(run.device) / 2**30 if on_gpu else None,
    }


def run_together(run: Run, options: argparse.Namespace) -> None:
    """Compare small pictures alone and together.

    Raises:
        ValueError: Sharing calls changed a picture.
    """
    cases = (
        [("tiny-x4", (64, 128, 256), 64), ("realsr-x4-s4", (64, 128), 32)]
        if not run.short
        else [("tiny-x4", (8,), 2)]
    )
    for name, sides, count in cases:
        if run.has_time(f"together {name}", 3 * RESERVE_S):
            run.together += compare(
                name, run.device, sides, count=count, ongoing=16, rounds=1 if run.short else 3
            )
    if changed := [f"{row['model']} {row['side_px']} px" for row in run.together if not row["same_bytes"]]:
        raise ValueError(f"pictures that share calls differ from those alone: {', '.join(changed)}")


def run_compile(run: Run, options: argparse.Namespace) -> None:
    if run.short:
        run.dropped.append("compile: not part of the short form")
        return
    config = preset("realsr-x4-s4")
    flops = count_flops(model_of(config, run.device, "bf16", "channels_last"), 64, run.device)
    for mode, batch in (("default", 16), ("reduce-overhead", 1)):
        if not run.has_time(f"compile {mode}, batch {batch}", COMPILE_RESERVE_S):
            return
        torch.compiler.reset()
        model = model_of(config, run.device, "bf16", "channels_last", mode)
        time_inference(run, model, (batch,), 64, flops, f"compile {mode}")
    if run.has_time("compile training", COMPILE_RESERVE_S):
        torch.compiler.reset()
        mse = next(objectives(run, "realsr-x4-s4", None))
        time_training(run, "realsr-x4-s4", (16,), "channels_last", mse, "compile")


SECTIONS: dict[str, Callable[[Run, argparse.Namespace], None]] = {
    "parity": run_parity,
    "ceilings": run_ceilings,
    "inference": run_inference,
    "training": run_training,
    "tiny": run_tiny,
    "feeding": run_feeding,
    "degrading": run_degrading,
    "upscale": run_upscale,
    "together": run_together,
    "compile": run_compile,
}


def parity_table(run: Run) -> str:
    verdicts = {True: "pass", False: "FAIL", None: "not judged"}
    header = ("fixture", "output", "precision", "max error", "relative", "equal codes", "tolerance", "")
    keys = ("fixture", "output", "precision", "max_error", "relative_error", "equal_share", "tolerance")
    return record.table(header, [[*map(row.get, keys), verdicts[row["passed"]]] for row in run.parity])


def inference_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return a table with one line per batch size: milliseconds of each stage, and figures of the whole
    chain.
    """
    start, end = (
        ("preset", "mode", "precision", "layout", "batch"),
        ("images_per_s", "mp_per_s", "share_of_peak", "peak_memory_gib"),
    )
    header = (*start, *(f"{stage} ms" for stage in STAGES), "img/s", "MP/s", "of peak", "peak GiB")
    lines: list[list[object]] = []
    for i in range(0, len(rows), len(STAGES)):
        group, chain = rows[i : i + len(STAGES)], rows[i + len(STAGES) - 1]
        lines.append(
            [
                *map(chain.get, start),
                *(row.get("ms", row["status"][:24]) for row in group),
                *map(chain.get, end),
            ]
        )
    return record.table(header, lines)


def training_table(rows: Sequence[dict[str, Any]]) -> str:
    header = (
        "preset",
        "mode",
        "objective",
        "layout",
        "micro-batch",
        "ms",
        "samples/s",
        "of peak",
        "peak GiB",
    )
    keys = ("images_per_s", "share_of_peak", "peak_memory_gib")
    start = ("preset", "mode", "objective", "layout", "micro_batch")
    return record.table(
        header,
        [[*map(row.get, start), row.get("ms", row["status"][:24]), *map(row.get, keys)] for row in rows],
    )


def print_new(run: Run, section: str, before: tuple[int, int]) -> None:
    """Print the rows that a section added."""
    print(f"\n== {section} ==", flush=True)
    if section == "parity":
        print(parity_table(run))
    if section == "ceilings":
        print(record.table(("ceiling", "measured"), list(run.ceilings.items())))
    tables = {"feeding": run.feeding, "degrading": run.degrading}
    tables |= {"upscale": run.upscale, "together": run.together}
    if found := tables.get(section):
        columns = list(dict.fromkeys(key for row in found for key in row))
        print(record.table(columns, [[row.get(column) for column in columns] for row in found]))
    if rows := run.inference[before[0] :]:
        print(inference_table(rows))
    if rows := run.training[before[1] :]:
        print(training_table(rows), flush=True)


def best(rows: Sequence[dict[str, Any]], **wanted: object) -> dict[str, Any] | None:
    """Return the row with the most images per second among those that match."""
    fitting = [
        row
        for row in rows
        if row["status"] == "ok" and all(row[key] == value for key, value in wanted.items())
    ]
    row = max(fitting, key=lambda row: row["images_per_s"], default=None)
    return row and rounded(row)


def rounded(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row whose numbers have four decimals."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def summary(run: Run) -> dict[str, Any]:
    """Return the main figures, for the last line."""
    judged = [row for row in run.parity if row["passed"] is not None]
    presets = sorted({row["preset"] for row in run.inference + run.training})
    return {
        "parity_passed": all(row["passed"] for row in judged)
        if judged and "parity" not in run.failed
        else None,
        "parity_failed": [f"{row['fixture']} {row['output']}" for row in judged if not row["passed"]],
        "ceilings": {key: round(value, 2) for key, value in run.ceilings.items()},
        "best_inference": {name: best(run.inference, preset=name, stage="chain") for name in presets},
        "best_training": {name: best(run.training, preset=name) for name in presets},
        "feeding": [rounded(row) for row in run.feeding],
        "degrading": [rounded(row) for row in run.degrading],
        "upscale": [rounded(row) for row in run.upscale],
        "failed": run.failed,
        "dropped": run.dropped,
        "notes": run.notes,
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", 1)[0], epilog="example: benchmarks/gpu.sh --minutes 8"
    )
    parser.add_argument(
        "--sections", default=",".join(SECTIONS), help="comma-separated sections (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, help="start nothing after this time (8; with --quick 0.75)")
    parser.add_argument("--quick", action="store_true", help="small sizes, under a minute")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parser.add_argument(
        "--out",
        type=Path,
        default=record.RESULTS,
        metavar="DIR",
        help="directory of the JSON file (benchmarks/results)",
    )
    parser.add_argument("--write", action="store_true", help="write the file also on a CPU or with --quick")
    parser.add_argument("--commit", help="commit to record if the tree has no git directory")
    parser.add_argument(
        "--cudnn-benchmark", action="store_true", help="let cuDNN benchmark its algorithms for every shape"
    )
    parser.add_argument(
        "--lpips-vgg",
        metavar="FILE",
        help="torchvision state dict of VGG-16, for realsr-x4-s4 (default: torch's cache)",
    )
    parser.add_argument(
        "--lpips-squeeze",
        metavar="FILE",
        help="torchvision state dict of SqueezeNet 1.1, for tiny-x4 (default: torch's cache)",
    )
    options = parser.parse_args(argv)
    options.sections = options.sections.split(",")
    if unknown := set(options.sections) - SECTIONS.keys():
        parser.error(f"unknown section {', '.join(sorted(unknown))}; allowed: {', '.join(SECTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device on this machine")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; return 0, or 1 when parity does not hold or a section failed."""
    options = parse(argv)
    started = time.monotonic()
    use_cuda = options.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if use_cuda else "cpu")
    minutes = options.minutes or (0.75 if options.quick else 8)
    run = Run(device, options.quick, started + 60 * minutes)
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    where = record.machine(device, options.commit)
    print(" ".join(f"{key}={value}" for key, value in where.items()))
    if not use_cuda:
        print("No GPU is used: this is the short form. Its times do not apply to a GPU.")
    path = options.out / record.file_name("gpu" if use_cuda else "cpu", where)
    writes = options.write or (use_cuda and not options.quick)
    head = {"benchmark": "gpu", "machine": where}
    for section in (name for name in SECTIONS if name in options.sections):
        if not run.has_time(section):
            continue
        before = len(run.inference), len(run.training)
        try:
            SECTIONS[section](run, options)
        except Exception as error:  # an error in one section must not lose the figures of the others
            traceback.print_exc()
            run.failed.append(section)
            run.notes.append(f"{section} failed: {type(error).__name__}: {error}")
        print_new(run, section, before)
        if writes:  # after every section: a run that is interrupted keeps its results so far
            rows = {
                "parity": run.parity,
                "inference": run.inference,
                "training": run.training,
                "together": run.together,
                "feeding": run.feeding,
                "degrading": run.degrading,
                "upscale": run.upscale,
            }
            record.write(path, head | {"seconds": time.monotonic() - started} | summary(run) | rows)
    for line in (*run.notes, *(f"dropped: {what}" for what in run.dropped)):
        print(line)
    last = (
        head
        | {"seconds": round(time.monotonic() - started, 1), "file": str(path) if writes else None}
        | summary(run)
    )
    print(record.json_line(last), flush=True)
    return 1 if run.failed or last["parity_passed"] is False else 0


if __name__ == "__main__":
    sys.exit(main())
