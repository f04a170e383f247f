"""Named runs of `jobs/train_autoencoder.py`: the first stages that the presets of `resshift.presets` need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from resshift.config import ConfigError, DataConfig, OptimConfig, TrainConfig
from resshift.networks.config import FirstStageConfig, VQConfig
from resshift.networks.discriminator import DiscriminatorConfig
from resshift.presets import VQ_F8_FACE
from resshift.training.autoencoder import AutoencoderLossConfig, AutoencoderRunConfig


def vq_f4() -> AutoencoderRunConfig:
    """VQ-f4 of latent diffusion (Rombach et al. 2022): 55.3 M parameters, 3 x 64 x 64 latents of 256-pixel
    crops, 8192 codes.

    Objective and weights (LPIPS 1, codebook 1, commitment 0.25, adversarial 0.75 adaptive, hinge), betas
    (0.5, 0.9) and 4.5e-6 of learning rate for each sample of the batch are theirs. Ours: warm-up, an average
    of the weights, bf16, and a discriminator that begins at step 10,000, when there is something to judge.
    """
    return AutoencoderRunConfig(
        preset="vq-f4",
        optim=OptimConfig(lr=4.5e-6 * 64, lr_end=4.5e-6, betas=(0.5, 0.9), warmup_steps=1000),
        data=DataConfig(crop="random", crop_px=256),
        train=TrainConfig(
            steps=400_000, batch_size=64, micro_batch=8, precision="bf16", checkpoint_every=10_000
        ),
    )


def vq_f8_face() -> AutoencoderRunConfig:
    """VQ-f8 for 512-pixel faces, the first stage of face-s4: 8 x 64 x 64 latents, 4096 codes. Trained as
    vq-f4.
    """
    base = vq_f4()
    return replace(
        base,
        preset="vq-f8-face",
        first_stage=FirstStageConfig(vq=VQ_F8_FACE),
        data=DataConfig(crop="short_side", crop_px=512),
        optim=replace(base.optim, lr=4.5e-6 * 32),
        train=replace(base.train, batch_size=32, micro_batch=4),
    )


def test_vq() -> AutoencoderRunConfig:
    """A toy of the same construction for tests: 32-pixel crops, a step in tens of milliseconds."""
    base = vq_f4()
    return replace(
        base,
        preset="test-vq",
        first_stage=FirstStageConfig(vq=VQConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, n_embed=64)),
        loss=AutoencoderLossConfig(
            lpips=0.0, adversarial_start=4, discriminator=DiscriminatorConfig(channels=16, layers=2)
        ),
        optim=replace(base.optim, lr=1e-3, warmup_steps=0),
        data=DataConfig(crop="random", crop_px=32),
        train=TrainConfig(steps=20, batch_size=8, micro_batch=4, checkpoint_every=10, log_every=5),
    )


AUTOENCODER_PRESETS: dict[str, Callable[[], AutoencoderRunConfig]] = {
    "vq-f4": vq_f4,
    "vq-f8-face": vq_f8_face,
    "test-vq": test_vq,
}


def autoencoder_preset(name: str) -> AutoencoderRunConfig:
    """Return the configuration called `name`.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    if name not in AUTOENCODER_PRESETS:
        raise ConfigError(f"unknown preset {name!r}; allowed: {', '.join(AUTOENCODER_PRESETS)}")
    return AUTOENCODER_PRESETS[name]()
