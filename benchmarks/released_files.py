"""Every released weight file, as far as it can be tried without the file: random weights of its shapes, under
a neutral name and in the wrappings that releases have, are recognised and make a picture.

    python benchmarks/released_files.py [--only NAME ...]

Prints a table: keys, what the shapes say, what the model is once the preset is given, the picture or the
reason why there is none, seconds.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from resshift import Upscaler
from resshift.models import WeightsError, locate_model
from resshift.models.published import RELEASED
from resshift.networks.autoencoder import VQAutoencoder, build_first_stage
from resshift.networks.conv_unet import build_unet
from resshift.networks.recognition import inspect
from resshift.presets import preset

# Wrappings in which releases and their training write a state dict.
WRAPPINGS = {
    "raw": lambda state: state,
    "state_dict, module.": lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}},
    "_orig_mod.": lambda state: {f"_orig_mod.{k}": v for k, v in state.items()},
}


def save(network: nn.Module, path: Path, wrapping: str) -> int:
    """Write a network's state dict in a wrapping; return its number of keys."""
    state = network.state_dict()
    torch.save(WRAPPINGS[wrapping](state), path)
    return len(state)


def tried(name: str, directory: Path, wrapping: str) -> tuple[str, ...]:
    """Return the row of one released model."""
    released = RELEASED[name]
    config = preset(released.preset).model
    torch.manual_seed(0)
    unet, stage = directory / "weights-a.pth", directory / "weights-b.pth"
    num_keys = save(build_unet(config.unet), unet, wrapping)
    autoencoder = build_first_stage(config.first_stage)
    assert isinstance(autoencoder, VQAutoencoder)
    num_stage_keys = save(autoencoder, stage, "raw")
    shapes = ", ".join(inspect(unet)["presets"])
    started = time.monotonic()
    try:
        found = locate_model(unet, preset_name=released.preset, first_stage=stage)
        up = Upscaler.from_files(found, device="cpu")
        lq = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        hole = np.zeros((64, 64), np.uint8)
        hole[20:40, 16:48] = 255
        picture = up(lq, mask=hole if config.fills_holes else None)
        told = f"{picture.shape[1]} x {picture.shape[0]}, {config.steps} steps"
    except WeightsError as error:
        told = str(error).replace(f"{directory}/", "")
    seconds = time.monotonic() - started
    return released.unet.name, f"{num_keys} + {num_stage_keys}", wrapping, shapes, told, f"{seconds:.0f}"


def main() -> None:
    """Try the files and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=sorted(RELEASED), default=list(RELEASED))
    chosen = parser.parse_args()
    os.environ["RESSHIFT_ACCEPT_LICENCE"] = "0"
    print("| file | keys | wrapping | shapes say | with the preset | s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for i, name in enumerate(chosen.only):
        with tempfile.TemporaryDirectory(prefix="released-") as directory:
            row = tried(name, Path(directory), list(WRAPPINGS)[i % len(WRAPPINGS)])
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
