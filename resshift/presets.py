"""Named runs. A preset is a function that returns a full configuration; each says where its numbers come from.

The scores expected of a preset stand in its docstring once they have been measured with this code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from resshift import degradation
from resshift.autoencoder import FirstStageConfig
from resshift.config import ConfigError, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from resshift.diffusion import Target
from resshift.schedule import ScheduleConfig
from resshift.unet import UNetConfig


def realsr_x4_s15() -> RunConfig:
    """Real-world x4 in 15 steps, as released v1 and v2 (NeurIPS 2023): 118.6 M parameters, MSE only, constant learning rate, batch 64."""
    return RunConfig(
        preset="realsr-x4-s15",
        model=ModelConfig(schedule=ScheduleConfig(steps=15, min_noise=0.04)),
        degradation=degradation.realesrgan_x4(),
        train=TrainConfig(steps=300_000, batch_size=64, micro_batch=8, checkpoint_every=10_000),
    )


def realsr_x4_s4() -> RunConfig:
    """Real-world x4 in 4 steps, as released v3 (journal version): MSE + LPIPS on the decoded prediction, cosine learning rate, batch 96."""
    base = realsr_x4_s15()
    return replace(
        base,
        preset="realsr-x4-s4",
        model=ModelConfig(),
        loss=LossConfig(lpips=1.0),
        optim=OptimConfig(lr_schedule="cosine"),
        train=replace(base.train, steps=400_000, batch_size=96, micro_batch=12),
    )


def realsr_x2_s4() -> RunConfig:
    """Real-world x2 in 4 steps: as realsr-x4-s4 with a 128-pixel condition brought down by a strided extractor."""
    return replace(
        realsr_x4_s4(),
        preset="realsr-x2-s4",
        model=ModelConfig(scale=2, unet=UNetConfig(lq_size=128)),
        degradation=degradation.realesrgan_x2(),
    )


def bicubic_x4_s4() -> RunConfig:
    """MATLAB bicubic x4 in 4 steps: as realsr-x4-s4 with the plain degradation and random native-resolution crops."""
    return replace(
        realsr_x4_s4(), preset="bicubic-x4-s4", degradation=degradation.bicubic_x4(), data=DataConfig(crop="random", crop_px=256)
    )


def tiny_x4() -> RunConfig:
    """The small model that ships: pixel-unshuffle instead of an autoencoder, 4 steps, the residual as target.

    kappa 1 and sqrt(eta_1) = 0.1 are for a latent in [-1, 1]. The Swin mask is the one of the Swin paper. Trained on native-resolution
    crops with a mix of the real-world chain and plain bicubic.
    """
    return RunConfig(
        preset="tiny-x4",
        model=ModelConfig(
            target=Target.RESIDUAL,
            unet=UNetConfig(
                image_size=32,
                in_channels=48,
                out_channels=48,
                model_channels=64,
                channel_mult=(1, 1, 2),
                num_res_blocks=(1, 2, 2),
                attention_resolutions=(16, 8),
                swin_embed_dim=128,
                swin_depth=2,
                mlp_ratio=2.0,
                shift_mask="swin",
                lq_size=32,
            ),
            first_stage=FirstStageConfig(kind="pixel_unshuffle", unshuffle_factor=4),
            schedule=ScheduleConfig(steps=4, kappa=1.0, min_noise=0.1),
        ),
        degradation=replace(degradation.realesrgan_x4(), bicubic_share=0.3),
        loss=LossConfig(lpips=0.05, lpips_net="squeeze"),
        optim=OptimConfig(lr=5e-4, lr_end=2e-5, lr_schedule="cosine", warmup_steps=200, clip_norm=1.0),
        data=DataConfig(crop="random", crop_px=128),
        train=TrainConfig(steps=4000, batch_size=16, micro_batch=16, checkpoint_every=250, log_every=25),
    )


def test_x4() -> RunConfig:
    """A toy of the same construction as tiny-x4 for tests: 32-pixel crops, bicubic, a step in milliseconds. It does not learn to see."""
    base = tiny_x4()
    return replace(
        base,
        preset="test-x4",
        model=replace(
            base.model,
            unet=replace(
                base.model.unet,
                image_size=8,
                lq_size=8,
                model_channels=32,
                channel_mult=(1,),
                num_res_blocks=1,
                attention_resolutions=(8,),
                swin_embed_dim=32,
                swin_depth=1,
            ),
        ),
        degradation=degradation.bicubic_x4(),
        loss=LossConfig(),
        data=DataConfig(crop="random", crop_px=32),
        train=TrainConfig(steps=20, batch_size=8, micro_batch=4, checkpoint_every=10, log_every=5),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "realsr-x4-s15": realsr_x4_s15,
    "realsr-x4-s4": realsr_x4_s4,
    "realsr-x2-s4": realsr_x2_s4,
    "bicubic-x4-s4": bicubic_x4_s4,
    "tiny-x4": tiny_x4,
    "test-x4": test_x4,
}


def preset(name: str) -> RunConfig:
    """Return the configuration called `name`.

    Raises:
        ConfigError: there is none; the message lists those that exist.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; allowed: {', '.join(PRESETS)}")
    return PRESETS[name]()
