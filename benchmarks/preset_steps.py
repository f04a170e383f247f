"""Do one optimiser step of every preset at its full width and crop, batch 1, on a pair of its own recipe.

    python benchmarks/preset_steps.py                       all presets: about five minutes on two cores,
                                                            up to 12 GiB
    python benchmarks/preset_steps.py realsr-x4-s4 tiny-x4  only these presets
    python benchmarks/preset_steps.py --quick               tiny-x4-swin and test-x4

This shows that a preset trains, not how fast (see train_step.py). Networks are newly initialised; first stage
and LPIPS trunk have random weights. Each preset runs in a separate process, so that its peak memory is
measured alone. Keys are compared with the released lists where there is one (tests/parity); for the other
networks the numbers of keys and parameters are known. The last line is a JSON object. The exit code is 1 when
a loss is not finite, no weight changed, or keys differ.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import record
import torch
from synthetic_photos import synthetic_photo
from torch import nn
from train_step import build

from resshift.networks.autoencoder import VQAutoencoder
from resshift.pairs.training_pair import make_pair
from resshift.presets import PRESETS, preset
from resshift.training.efficientnet import EfficientNetLite0
from resshift.training.staged import StagedLearner
from resshift.training.step import DiffusionLearner

# Official numbers of keys and parameters of the released networks without a list of keys, by task.
_COUNTS = {"realsr-x2-s4": (568, 118_640_431), "inpaint": (572, 118_714_399), "face-s4": (576, 118_931_604)}
_PARITY = record.ROOT / "tests" / "parity"


def keys_agree(name: str, unet: nn.Module, stage: object) -> str:
    """Return whether the keys agree with an official "list" or "count"; "ours" for a network that was never
    released.

    Raises:
        SystemExit: The keys do not agree.
    """
    state = {
        key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
        for key, value in unet.state_dict().items()
    }
    if name.startswith(("tiny", "small", "test")):
        return "ours"
    counts = _COUNTS.get(name) or (_COUNTS["inpaint"] if name.startswith("inpaint") else None)
    agrees = (
        state == json.loads((_PARITY / "full_unet_realsr_v3_keys.json").read_text())
        if counts is None
        else (len(state), sum(parameter.numel() for parameter in unet.parameters())) == counts
    )
    if name != "face-s4" and isinstance(stage, VQAutoencoder):
        vq = {
            key: [list(value.shape), str(value.dtype).removeprefix("torch.")]
            for key, value in stage.state_dict().items()
        }
        agrees = agrees and vq == json.loads((_PARITY / "full_vq_f4_keys.json").read_text())
    if not agrees:
        raise SystemExit(f"{name}: keys differ from the released checkpoint")
    return "list" if counts is None else "count"


def one_step(name: str) -> dict[str, Any]:
    """Do the step and return its figures."""
    config = preset(name)
    config = replace(config, train=replace(config.train, batch_size=1, micro_batch=1, precision="fp32"))
    torch.manual_seed(0)
    network, objective = build(config, torch.device("cpu"))
    agreement = keys_agree(name, network, objective.first_stage)
    side = max(config.data.crop_px + 64, 375)
    pair = make_pair(synthetic_photo(0, side + 125, side), "photo", 0, 0, config.data, config.degradation)
    batch = {"hq": torch.from_numpy(pair.hq_u8)[None], "lq": torch.from_numpy(pair.lq_u8)[None]}
    if pair.mask_u8 is not None:
        batch["mask"] = torch.from_numpy(np.ascontiguousarray(pair.mask_u8))[None]
    before = {key: value.detach().clone() for key, value in network.named_parameters()}
    if config.stages:
        learner = StagedLearner(config, network, objective, EfficientNetLite0().eval().requires_grad_(False))
        learner.state.step = config.train.steps - 1  # in the last stage, which has all terms
    else:
        learner = DiffusionLearner(config, network, objective)
    started = time.perf_counter()
    result = learner.step(batch)
    seconds = time.perf_counter() - started
    moved = sum(not torch.equal(before[key], value.detach()) for key, value in network.named_parameters())
    terms = {key: float(value) for key, value in result.terms.items()}
    if not all(math.isfinite(value) for value in terms.values()) or not moved:
        raise SystemExit(f"{name}: {terms}, {moved} parameters changed")
    return {
        "preset": name,
        "keys": agreement,
        "millions": sum(value.numel() for value in before.values()) / 1e6,
        "hq": list(batch["hq"].shape[1:3]),
        "lq": list(batch["lq"].shape[1:3]),
        **terms,
        "moved": f"{moved}/{len(before)}",
        "seconds": round(seconds, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Do the step of every preset, one after the other; return 1 if one fails, else 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="default: all")
    parser.add_argument("--quick", action="store_true", help="only the small presets")
    parser.add_argument(
        "--write", action="store_true", help="write benchmarks/results/preset_steps-DATE-MACHINE.json"
    )
    parser.add_argument(
        "--here", action="store_true", help=argparse.SUPPRESS
    )  # run in this process; used by the parent process
    options = parser.parse_args(argv)
    names = options.presets or (["tiny-x4-swin", "test-x4"] if options.quick else list(PRESETS))
    if options.here:
        print(json.dumps(one_step(names[0])))
        return 0
    results: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in names:
        done = subprocess.run(
            [sys.executable, __file__, name, "--here"], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            failed.append(name)
        else:
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(done.stdout.splitlines()[-1], file=sys.stderr, flush=True)
    columns = ("preset", "millions", "keys", "hq", "loss", "mse", "lpips", "moved", "seconds", "peak_gib")
    print(
        record.table(columns, [[str(r["hq"]) if c == "hq" else r.get(c) for c in columns] for r in results])
    )
    figures: dict[str, Any] = {
        "benchmark": "preset_steps",
        "machine": record.machine(torch.device("cpu")),
        "steps": results,
        "failed": failed,
    }
    if options.write:
        record.write(record.RESULTS / record.file_name("preset_steps", figures["machine"]), figures)
    print(record.json_line(figures))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
