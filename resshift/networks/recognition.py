"""Which model a weight file is, by the names and shapes of its tensors.

    python -m resshift.networks.recognition FILE

prints the answer of `inspect` as JSON, for processes that do not load torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from resshift.config import to_dict
from resshift.models.files import WeightsError
from resshift.networks import foreign
from resshift.networks.autoencoder import VQAutoencoder, build_first_stage
from resshift.networks.config import ConvUNetConfig, UNetConfig
from resshift.networks.conv_unet import build_unet
from resshift.presets import PRESETS, preset
from resshift.weights import is_derived, read_state_dict

Shapes = Mapping[str, tuple[int, ...]]
# Released autoencoders, by the preset whose first stage they are.
_FIRST_STAGES = {"VQ-f4": "realsr-x4-s4", "VQ-f8 of faces": "face-s4"}


def inspect(path: Path) -> dict[str, Any]:
    """Say which model a weight file is.

    Returns:
        {"presets": names of the presets whose U-Net has these shapes}, or {"foreign": configuration of a
        network of another package}, or {"error": line that says why the file is no model}.
    """
    try:
        state = read_state_dict(path)
        shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
        if presets := presets_of(shapes):
            return {"presets": presets}
        if stage := first_stage_of(shapes):
            return {
                "error": f"{path} is an autoencoder ({stage}), a part of a model: give it as --first-stage"
            }
        return {"foreign": to_dict(foreign.describe(path))}
    except WeightsError as error:
        return {"error": str(error)}


def presets_of(shapes: Shapes) -> list[str]:
    """Return the presets whose U-Net has exactly these tensors, derived buffers apart."""
    if "input_blocks.0.0.weight" not in shapes and "stem.weight" not in shapes:
        return []
    given = {key: shape for key, shape in shapes.items() if not is_derived(key)}
    return [name for name in PRESETS if _unet_shapes(preset(name).model.unet) == given]


@lru_cache(maxsize=16)
def _unet_shapes(config: UNetConfig | ConvUNetConfig) -> Shapes:
    with torch.device("meta"):
        return _shapes(build_unet(config))


def first_stage_of(shapes: Shapes) -> str | None:
    """Return the name of the released autoencoder that has exactly these tensors."""
    if "quantize.embedding.weight" not in shapes:
        return None
    with torch.device("meta"):
        for name, preset_name in _FIRST_STAGES.items():
            stage = build_first_stage(preset(preset_name).model.first_stage)
            if isinstance(stage, VQAutoencoder) and _shapes(stage) == shapes:
                return name
    return None


def _shapes(network: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in network.state_dict().items() if not is_derived(key)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(inspect(Path(sys.argv[1]))))
