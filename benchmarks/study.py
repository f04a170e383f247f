"""Compare short controlled runs of a preset: the same pairs in the same order, equal samples or equal time,
one change at a time.

    python benchmarks/study.py --data shards --test bicubic=lq:gt --samples 4000 \\
        --variant base \\
        --variant "steps-4 model.schedule.steps=4" \\
        --variant "kappa-0.2 model.schedule.kappa=0.2"
    python benchmarks/study.py ... --seconds 200                 equal time instead of equal samples

A variant is a name, followed by settings as for `jobs/train.py --set`. Pairs are made before anything is
timed and kept in memory. The learning rate follows the preset's curve, stretched over the budget. At the end
the network (not its average, which in a short run still contains the initial weights) upscales the complete
test sets, with the full chain and with one step, and so does its average of each --average RATE. Small
differences are not significant: repeat with another --seed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import record
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pipelines.evaluation.evaluate import PictureSet, bicubic_resized, pairs_of
from pipelines.evaluation.figures import Judge
from pipelines.pairs.photos import read_groups
from pipelines.shards.parquet import read_manifest, row_groups
from resshift import images, seeds, storage, weights
from resshift.config import RunConfig, with_settings
from resshift.devices import on_device
from resshift.images import ImageError
from resshift.metrics.lpips import Lpips
from resshift.networks.autoencoder import build_first_stage
from resshift.pairs.training_pair import make_pair
from resshift.presets import preset
from resshift.training.losses import Objective
from resshift.training.step import DiffusionLearner, build_network, start_from
from resshift.upscaler import Upscaler


@dataclass(frozen=True, slots=True)
class Truth:
    """A test picture with its ground truth."""

    set: str
    key: str
    lq: images.Array
    gt: images.Array


def photos(shards: str) -> Iterator[tuple[str, bytes, int]]:
    """Yield (key, bytes, epoch) of all pictures, epoch after epoch without end."""
    groups = row_groups(read_manifest(shards))
    epoch = 0
    while True:
        for group in groups:
            for photo in read_groups(shards, [group])[0]:
                yield photo.key, photo.data, epoch
        epoch += 1


def make_pairs(shards: str, config: RunConfig, count: int) -> tuple[Tensor, Tensor]:
    """Return `count` pairs, shuffled: hq (N, H, W, 3) and lq (N, h, w, 3), uint8."""
    hq: list[images.Array] = []
    lq: list[images.Array] = []
    for key, data, epoch in photos(shards):
        if len(hq) == count:
            break
        try:
            pair = make_pair(data, key, epoch, config.train.seed, config.data, config.degradation)
        except ImageError:
            continue  # reported by jobs/prepare.py; a study needs enough pairs, not this one
        hq.append(pair.hq_u8)
        lq.append(pair.lq_u8)
    order = seeds.philox(config.train.seed, "study").permutation(count)
    return torch.from_numpy(np.stack(hq)[order]), torch.from_numpy(np.stack(lq)[order])


def load_truths(sets: Sequence[str]) -> list[Truth]:
    """Decode the test sets."""
    pairs = [pair for pair in pairs_of([PictureSet.parse(text) for text in sets]) if pair.gt_uri is not None]
    decoded = [
        (
            pair,
            *(
                images.rgb_u8(images.decode(storage.read_bytes(uri)))
                for uri in (pair.lq_uri, pair.gt_uri or "")
            ),
        )
        for pair in pairs
    ]
    return [Truth(pair.set, pair.key, lq, gt) for pair, lq, gt in decoded]


def figures_of(
    up: Upscaler | None, truths: Sequence[Truth], judge: Judge, steps: int | None = None
) -> dict[str, dict[str, float]]:
    """Return {set: {figure: mean}} of a model, or of bicubic."""
    found: dict[str, list[dict[str, float]]] = {}
    for truth in truths:
        result = (
            bicubic_resized(truth.lq, truth.gt.shape[0] / truth.lq.shape[0])
            if up is None
            else up(truth.lq, seed=seeds.derive(0, "picture", truth.key), steps=steps)
        )
        found.setdefault(truth.set, []).append(judge(result, truth.gt))
    return {
        name: {figure: round(float(np.mean([row[figure] for row in rows])), 4) for figure in rows[0]}
        for name, rows in found.items()
    }


def train(
    config: RunConfig,
    pairs: tuple[Tensor, Tensor],
    lpips: Lpips | None,
    samples: int | None,
    seconds: float | None,
    init: dict[str, Tensor] | None,
    rates: Sequence[float] = (),
) -> dict[str, Any]:
    """Train until the budget is spent; return the network, its average for each rate, and figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stage = on_device(build_first_stage(config.model.first_stage), device)  # type: ignore[type-var]
    size = config.train.batch_size
    # The learning rate follows the curve of a run of `steps`; with a time budget, the step is set from the
    # elapsed time.
    steps = (samples or 10**6) // size
    config = replace(
        config,
        train=replace(config.train, steps=steps),
        optim=replace(config.optim, warmup_steps=min(100, steps // 10)),
    )
    network = on_device(build_network(config), device)
    judge = None if lpips is None else lpips.to(device)
    learner = DiffusionLearner(config, network, Objective(config.model, config.loss, stage, judge))
    if init is not None:
        start_from(learner, init)
    averages = {rate: AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(rate)) for rate in rates}
    for average in averages.values():
        average.n_averaged.fill_(
            1
        )  # it already holds the initial weights; otherwise the first update would replace them
    taken, last, started = 0, [], time.monotonic()
    while (taken < steps) if seconds is None else (time.monotonic() - started < seconds):
        if seconds is not None and taken > config.optim.warmup_steps:
            learner.state.step = int(steps * min(1.0, (time.monotonic() - started) / seconds))
        rows = torch.arange(taken * size, (taken + 1) * size) % len(pairs[0])
        result = learner.step({"hq": pairs[0][rows].to(device), "lq": pairs[1][rows].to(device)})
        last.append(result.terms)  # on the device: reading them would make every step wait
        for average in averages.values():
            average.update_parameters(network)
        taken += 1
    elapsed = time.monotonic() - started
    tail = last[-max(1, len(last) // 5) :]
    return {
        "network": network.eval(),
        "averages": {rate: average.module.eval() for rate, average in averages.items()},
        "samples": taken * size,
        "samples_per_s": round(taken * size / elapsed, 2),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "training": {
            name: round(float(torch.stack([row[name] for row in tail]).mean()), 4)
            for name in ("mse", "lpips")
        },
    }


def main() -> int:
    """Run the variants one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, metavar="SHARDS")
    parser.add_argument("--test", action="append", required=True, metavar="[NAME=]LQ:GT")
    parser.add_argument("--preset", default="tiny-x4-swin")
    parser.add_argument("--variant", action="append", required=True, metavar="'NAME [SETTING ...]'")
    parser.add_argument(
        "--lpips-trunk", metavar="FILE", help="SqueezeNet weights, for the objective and for the figures"
    )
    parser.add_argument("--init", metavar="FILE", help="weights that every variant starts from, safetensors")
    parser.add_argument(
        "--average",
        action="append",
        type=float,
        default=[],
        metavar="RATE",
        help="also evaluate the average of this rate",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="also write a dated file to benchmarks/results")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--samples", type=int, help="samples that every variant sees")
    budget.add_argument("--seconds", type=float, help="seconds that every variant trains")
    chosen = parser.parse_args()

    base = with_settings(preset(chosen.preset), [f"train.seed={chosen.seed}"])
    truths, judge = (
        load_truths(chosen.test),
        Judge(lpips_net="squeeze" if chosen.lpips_trunk else None, lpips_trunk=chosen.lpips_trunk),
    )
    lpips = Lpips("squeeze", chosen.lpips_trunk) if chosen.lpips_trunk else None
    init = weights.read_state_dict(chosen.init) if chosen.init else None
    made: dict[str, tuple[Tensor, Tensor]] = {}
    rows: list[dict[str, Any]] = [{"name": "bicubic", "figures": figures_of(None, truths, judge)}]
    for variant in chosen.variant:
        name, *settings = shlex.split(variant)
        config = with_settings(base, settings)
        if lpips is None:
            config = replace(config, loss=replace(config.loss, lpips=0.0, mse=config.loss.mse or 1.0))
        data = repr((config.data, config.degradation))
        if data not in made:
            made[data] = make_pairs(chosen.data, config, min(chosen.samples or 8000, 16000))
        row = train(config, made[data], lpips, chosen.samples, chosen.seconds, init, chosen.average)
        up = Upscaler(config.model, row.pop("network"), optimise=False)
        averages = {
            rate: Upscaler(config.model, average, optimise=False)
            for rate, average in row.pop("averages").items()
        }
        row |= {"name": name, "settings": settings, "figures": figures_of(up, truths, judge)}
        row["figures_of_averages"] = {
            str(rate): figures_of(average, truths, judge) for rate, average in averages.items()
        }
        if up.config.steps > 1:
            row["figures_of_one_step"] = figures_of(up, truths, judge, steps=1)
        rows.append(row)
        print(record.json_line(row), flush=True)
    figures = list(rows[0]["figures"][truths[0].set])
    sets = list(rows[0]["figures"])
    header = [
        "variant",
        "M parameters",
        "samples",
        "samples/s",
        *(f"{name} {figure}" for name in sets for figure in figures),
    ]
    table = [
        [row["name"], row.get("parameters", 0) / 1e6, row.get("samples"), row.get("samples_per_s")]
        + [f"{row['figures'][name][figure]:.4g}" for name in sets for figure in figures]
        for row in rows
    ]
    print(record.table(header, table))
    result = {
        "preset": chosen.preset,
        "seed": chosen.seed,
        "samples": chosen.samples,
        "seconds": chosen.seconds,
        "variants": rows,
    }
    if chosen.write:
        where = record.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        record.write(
            record.RESULTS / record.file_name("study", where),
            {"benchmark": "study", "machine": where, **result},
        )
    print(record.json_line(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
