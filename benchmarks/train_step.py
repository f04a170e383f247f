"""Time one optimiser step (ours, ours compiled, and a plain loop, interleaved in one run) and its parts.

    python benchmarks/train_step.py                     realsr-x4-s4 on CUDA, tiny-x4-swin on a CPU
    python benchmarks/train_step.py --quick             under a minute
    python benchmarks/train_step.py --write             also write a dated file to benchmarks/results

The plain loop (`PlainLoop`) does the same arithmetic in the way of a first version of a training script: the
two pictures encoded one after the other, the default AdamW, an average updated tensor by tensor, and the loss
and the gradient norm read by the host at every step. Both train the same network on the same bytes, in bf16
on CUDA and float32 on a CPU. First stage and LPIPS trunk have random weights: arithmetic costs the same, and
nothing is downloaded.

The split times parts of a step separately, forward and backward if the step has both; they overlap in a real
step, so their sum is not its time. `data_wait` is the share of time in which a learner fed by
`pipelines.pairs.ranks.rank_batches` on this machine waits for its batch, over the steps after the first
four. `share_of_peak` is the step's arithmetic over the matrix rate measured in the same run (CUDA only). The
last line is a JSON object; its `ratio_to_plain` is the rate of our eager step over that of the plain loop.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import record
import torch
from parity import set_precision
from timing import stopwatch_for
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from resshift.config import RunConfig
from resshift.devices import PRECISIONS, autocast, on_device
from resshift.diffusion import predict_x0, q_sample, scale_input, target_of
from resshift.metrics.lpips import Lpips
from resshift.networks.autoencoder import build_first_stage
from resshift.presets import preset
from resshift.resize.bicubic import upsample
from resshift.training.losses import Objective
from resshift.training.optimizer import guarded_step
from resshift.training.step import (
    DiffusionLearner,
    build_network,
    to_unit_range,
    unwrapped,
)

TRUNKS = {"vgg": "vgg16", "alex": "alexnet", "squeeze": "squeezenet1_1"}


def config_of(device: torch.device, name: str | None, micro_batch: int | None) -> RunConfig:
    """Return the preset with one micro-batch per step."""
    on_gpu = device.type == "cuda"
    config = preset(name or ("realsr-x4-s4" if on_gpu else "tiny-x4-swin"))
    size = micro_batch or (config.train.micro_batch if on_gpu else 4)
    train = replace(config.train, batch_size=size, micro_batch=size, precision="bf16" if on_gpu else "fp32")
    return replace(config, train=train)


def random_lpips(config: RunConfig, device: torch.device) -> Lpips | None:
    """Return LPIPS with a trunk of random weights, or None if the objective has no LPIPS term."""
    if not config.loss.lpips:
        return None
    import torchvision

    trunk = getattr(torchvision.models, TRUNKS[config.loss.lpips_net])(weights=None)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trunk.pth"
        torch.save(trunk.state_dict(), path)
        return Lpips(config.loss.lpips_net, path).to(device)


def random_batch(config: RunConfig, device: torch.device) -> dict[str, Tensor]:
    sides = {"hq": config.data.crop_px, "lq": config.data.crop_px // config.model.scale}
    shape = {name: (config.train.batch_size, side, side, 3) for name, side in sides.items()}
    return {name: torch.randint(256, size, dtype=torch.uint8, device=device) for name, size in shape.items()}


class PlainLoop:
    """The optimiser step in its simplest correct form, not optimised for the device."""

    def __init__(self, config: RunConfig, network: nn.Module, objective: Objective) -> None:
        self.config, self.network, self.objective = config, network, objective
        optim = config.optim
        self.optimizer = torch.optim.AdamW(
            network.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay
        )
        self.ema = {key: value.detach().clone() for key, value in network.state_dict().items()}
        self.losses: list[float] = []

    def step(self, batch: Mapping[str, Tensor]) -> None:
        model, loss, stage = self.config.model, self.config.loss, self.objective.first_stage
        schedule = self.objective.schedule
        hq, lq = to_unit_range(batch["hq"]).contiguous(), to_unit_range(batch["lq"]).contiguous()
        with autocast(hq.device, PRECISIONS[self.config.train.precision]):
            with torch.no_grad():
                x0 = stage.encode(hq).float()
                y0 = stage.encode(upsample(lq, model.scale)).float()
            t = torch.randint(schedule.steps, (len(hq),)).to(hq.device)
            noise = torch.randn_like(x0)
            x_t = q_sample(x0, y0, t, noise, schedule)
            output = self.network(scale_input(x_t, t, schedule, model.latent_scaling), t, lq).float()
            total = loss.mse * (output - target_of(x0, y0, noise, t, schedule, model.target)).square().mean()
            if self.objective.lpips is not None:
                decoded = stage.decode(predict_x0(output, x_t, y0, t, schedule, model.target))
                total = total + loss.lpips * self.objective.lpips(decoded.clamp(-1, 1), hq).mean()
        self.optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(
            self.network.parameters(), self.config.optim.clip_norm or float("inf")
        )
        if np.isfinite(norm.item()):
            self.optimizer.step()
        decay = self.config.train.ema_decay
        with torch.no_grad():
            for key, value in self.network.state_dict().items():
                if value.is_floating_point():
                    self.ema[key].mul_(decay).add_(value, alpha=1 - decay)
        self.losses.append(total.item())


def build(config: RunConfig, device: torch.device) -> tuple[nn.Module, Objective]:
    """Return a network on the device and the objective with its frozen networks."""
    stage = build_first_stage(config.model.first_stage).eval().requires_grad_(False)
    objective = Objective(config.model, config.loss, on_device(stage, device), random_lpips(config, device))
    return on_device(build_network(config), device), objective


def interleaved(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int, warmup: int
) -> dict[str, list[float]]:
    """Time calls in turn, so that a slow phase of the machine affects all of them."""
    stopwatch = stopwatch_for(device)
    for call in calls.values():
        for _ in range(warmup):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i_round in range(rounds):
        names = list(calls)[:: 1 if i_round % 2 == 0 else -1]
        for name in names:
            seconds[name].append(stopwatch(calls[name]))
    return seconds


def parts_of(learner: DiffusionLearner, batch: Mapping[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Return a call for each part of a step."""
    config, objective, device = learner.config, learner.objective, batch["hq"].device
    model, schedule, dtype = config.model, objective.schedule, PRECISIONS[config.train.precision]
    hq, lq = to_unit_range(batch["hq"]), to_unit_range(batch["lq"])
    with torch.no_grad(), autocast(device, dtype):
        x0, y0 = objective.first_stage.encode(torch.cat([hq, upsample(lq, model.scale)])).float().chunk(2)
    t = torch.full((len(hq),), schedule.steps - 1, device=device)
    network = learner.state.network
    gradients = [torch.randn_like(parameter) for parameter in network.parameters()]

    def first_stage() -> None:
        with torch.no_grad(), autocast(device, dtype):
            objective.first_stage.encode(torch.cat([hq, upsample(lq, model.scale)]))

    def unet() -> None:
        with autocast(device, dtype):
            output = network(scale_input(x0, t, schedule), t, lq, None).float()
        (output - x0).square().mean().backward()
        network.zero_grad(set_to_none=True)

    def perceptual() -> None:
        latent = y0.detach().requires_grad_(True)
        with autocast(device, dtype):
            decoded = objective.first_stage.decode(latent).clamp(-1, 1)
            cast(Lpips, objective.lpips)(decoded, hq).mean().backward()

    def optimiser() -> None:
        for parameter, gradient in zip(network.parameters(), gradients, strict=True):
            parameter.grad = gradient.clone()
        guarded_step(learner.state.optimizer, config.optim.clip_norm, learner.state.scaler)
        learner.state.ema.update(unwrapped(network))

    parts: dict[str, Callable[[], object]] = {"first_stage": first_stage, "unet": unet}
    if objective.lpips is not None:
        parts["lpips"] = perceptual
    return parts | {"optimizer": optimiser}


def matrix_rate(device: torch.device) -> float:
    """Return the largest rate of bf16 matrix products, in operations per second."""
    best = 0.0
    for side in (4096, 8192):
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        seconds = interleaved({"matmul": lambda a=a, b=b: a @ b}, device, rounds=20, warmup=5)["matmul"]
        best = max(best, 2 * side**3 / statistics.median(seconds))
    return best


def measured_data_wait(learner: DiffusionLearner, device: torch.device, steps: int) -> dict[str, float]:
    """Feed the learner from a Ray Data pipeline on this machine; return its share of waiting and its rate."""
    from PIL import Image

    from pipelines.cluster import ray_internals
    from pipelines.command import connect_to_ray, quiet_ray_data
    from pipelines.pairs.ranks import PairStream, rank_batches
    from pipelines.shards.prepare import prepare_here
    from pipelines.training.feeding import feed

    os.environ.update(ray_internals.METADATA_INLINE)
    connect_to_ray()
    quiet_ray_data()
    with tempfile.TemporaryDirectory() as directory:
        photos, shards = Path(directory) / "photos", f"{directory}/shards"
        photos.mkdir()
        for i in range(64):
            small = np.random.default_rng(i).integers(0, 256, (24, 32, 3), np.uint8)
            Image.fromarray(small).resize((384, 288), Image.Resampling.BICUBIC).save(
                photos / f"{i}.jpg", quality=90
            )
        prepare_here(str(photos), shards)
        waited_s, total_s = 0.0, 0.0
        source = rank_batches(PairStream(root=shards, config=learner.config), 0)
        with closing(feed(source, device, steps + 4)) as batches:
            started = time.perf_counter()
            for i, fed in enumerate(batches):
                learner.step(fed.pictures)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                ended = time.perf_counter()
                if i >= 4:  # exclude the start of the pipeline
                    waited_s, total_s = waited_s + fed.waited_s, total_s + ended - started
                started = ended
    return {
        "data_wait": waited_s / total_s,
        "fed_samples_per_s": steps * learner.config.train.batch_size / total_s,
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure everything and return the figures."""
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    config = config_of(device, options.preset, options.micro_batch)
    set_precision(config.train.precision)
    network, objective = build(config, device)
    batch = random_batch(config, device)
    plain = PlainLoop(config, deepcopy(network).to(memory_format=torch.contiguous_format), objective)
    with FlopCounterMode(display=False) as counter:
        PlainLoop(config, deepcopy(network), objective).step(batch)
    flops = float(counter.get_total_flops())
    learner = DiffusionLearner(config, network, objective)
    calls: dict[str, Callable[[], object]] = {
        "plain": lambda: plain.step(batch),
        "ours": lambda: learner.step(batch),
    }
    if options.compile:
        compiled_config = replace(config, train=replace(config.train, compile="default"))
        compiled_network, compiled_objective = build(compiled_config, device)
        compiled_objective.compile("default")
        compiled = DiffusionLearner(compiled_config, compiled_network, compiled_objective)
        calls["compiled"] = lambda: compiled.step(batch)
    rounds = 4 if options.quick else 20 if device.type == "cuda" else 8
    seconds = {
        name: statistics.median(times) for name, times in interleaved(calls, device, rounds, warmup=2).items()
    }
    split = {
        name: statistics.median(times)
        for name, times in interleaved(parts_of(learner, batch), device, max(3, rounds // 2), 1).items()
    }
    size = config.train.batch_size
    figures: dict[str, Any] = {
        "preset": config.preset,
        "micro_batch": size,
        "precision": config.train.precision,
        "seconds": seconds,
        "split_s": split,
        "samples_per_s": size / seconds["ours"],
        "compiled_samples_per_s": size / seconds["compiled"] if options.compile else None,
        "ratio_to_plain": seconds["plain"] / seconds["ours"],
        "gflop_per_sample": flops / size / 1e9,
        "tflops": flops / seconds["ours"] / 1e12,
        "share_of_peak": flops / seconds["ours"] / matrix_rate(device) if device.type == "cuda" else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None,
    }
    figures |= (
        measured_data_wait(learner, device, 4 if options.quick else 16)
        if options.data
        else {"data_wait": None}
    )
    return figures | {"machine": record.machine(device)}


def show(figures: Mapping[str, Any]) -> str:
    """Return the figures as tables."""
    size = figures["micro_batch"]
    rows = [
        [name, seconds * 1e3, size / seconds, figures["seconds"]["plain"] / seconds]
        for name, seconds in figures["seconds"].items()
    ]
    step = figures["seconds"]["ours"]
    split = [[name, seconds * 1e3, f"{seconds / step:.0%}"] for name, seconds in figures["split_s"].items()]
    title = (
        f"{figures['preset']}, micro-batch {size}, {figures['precision']}, {figures['gflop_per_sample']:.0f} "
        "GFLOP a sample"
    )
    parts = [
        title,
        record.table(["step", "ms", "samples/s", "to plain"], rows),
        record.table(["part", "ms", "of our step"], split),
    ]
    if figures["share_of_peak"] is not None:
        parts.append(f"{figures['tflops']:.0f} TFLOP/s, {figures['share_of_peak']:.0%} of the matrix rate")
    if figures["data_wait"] is not None:
        parts.append(
            f"fed by Ray Data on this machine: {figures['fed_samples_per_s']:.3g} samples/s, "
            f"{figures['data_wait']:.0%} waiting for data"
        )
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps: under a minute on two cores")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--preset", help="default: realsr-x4-s4 on CUDA, tiny-x4 on a CPU")
    parser.add_argument("--micro-batch", type=int, help="default: the preset's on CUDA, 4 on a CPU")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="also time the compiled step (default: unless --quick)",
    )
    parser.add_argument(
        "--data", action=argparse.BooleanOptionalAction, default=True, help="also time steps fed by Ray Data"
    )
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/train_step-DATE-MACHINE.json"
    )
    options = parser.parse_args(argv)
    options.compile = not options.quick if options.compile is None else options.compile
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    figures = run(options)
    print(show(figures))
    if options.write:
        record.write(record.RESULTS / record.file_name("train_step", figures["machine"]), figures)
    print(record.json_line(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
