"""A small model that fills holes, with random weights in which every input matters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from resshift import weights
from resshift.config import ModelConfig
from resshift.networks.config import ConvUNetConfig
from resshift.networks.conv_unet import build_unet
from resshift.presets import test_x4 as toy_preset
from resshift.upscaler import Upscaler


def hole_config() -> ModelConfig:
    """Return its configuration: four steps on unshuffled pixels, the condition at the size of the picture."""
    toy = toy_preset().model
    return replace(toy, scale=1, unet=replace(toy.unet, lq_size=32, cond_mask=True))


def conv_hole_config() -> ModelConfig:
    """Return that of a model as `tiny-inpaint`: unshuffled pixels, and y0 is a membrane."""
    unet = ConvUNetConfig(channels=(16,), blocks_before=(1,), blocks_after=(), lq_ratio=4, cond_mask=True)
    return replace(hole_config(), unet=unet, hole="surroundings")


def hole_model(config: ModelConfig | None = None) -> Upscaler:
    """Return the model, or one of another configuration."""
    config = config or hole_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_unet(config.unet)
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return Upscaler(config, network, device="cpu")


def write_hole_model(directory: Path) -> Path:
    """Write the model into a new directory, and return that."""
    model = hole_model()
    weights.save_model(directory, "holes", hole_config(), model.chain.unet)
    return directory


def box(height: int, width: int) -> NDArray[np.bool_]:
    """Return a hole, (height, width): a box that touches the left edge."""
    hole = np.zeros((height, width), np.bool_)
    hole[height // 4 : height // 2, : width // 3] = True
    return hole
