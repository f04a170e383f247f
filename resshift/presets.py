"""Presets of training runs. A preset is a function that returns a full configuration; its docstring gives the
source of its numbers.

Sources are the configurations of the official repository (its branch `journal`). All of them have a U-Net of
160 channels, kappa 2, power 0.3, sqrt(eta_T) = 0.99, AdamW (0.9, 0.999) at 5e-5 without weight decay or
clipping, 5000 steps of warm-up, and EMA 0.999. Two things differ here: bf16 instead of fp16 with a scaler
(nothing overflows), and a warm-up that is in effect from the first step.

The docstring of a preset gives its expected scores once they have been measured with this code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace

from resshift import degradation
from resshift.config import (
    ConfigError,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from resshift.degradation.masks import MaskRecipe
from resshift.networks.config import (
    ConvUNetConfig,
    FirstStageConfig,
    RegressionConfig,
    UNetConfig,
    VQConfig,
)
from resshift.schedule import ScheduleConfig, Target
from resshift.stages import Stage

# The released f8 face autoencoder: 77,009,115 parameters, with more blocks on smaller maps.
VQ_F8_FACE = VQConfig(
    ch=64, ch_mult=(1, 2, 4, 8), num_res_blocks=(1, 2, 3, 4), z_channels=8, embed_dim=8, n_embed=4096
)


def realsr_x4_s15() -> RunConfig:
    """Real-world x4 in 15 steps, as released v1 and v2 (NeurIPS 2023): 118.6 M parameters, MSE only, constant
    learning rate, batch 64.

    Source: realsr_swinunet_realesrgan256.yaml. v1 is the state after 300,000 steps, v2 after 500,000 (`--set
    train.steps=500000`). Official data: ImageNet and FFHQ, with short sides resized to 256.
    """
    return RunConfig(
        preset="realsr-x4-s15",
        model=ModelConfig(schedule=ScheduleConfig(steps=15, min_noise=0.04)),
        degradation=degradation.realesrgan_x4(),
        train=TrainConfig(
            steps=300_000, batch_size=64, micro_batch=8, precision="bf16", checkpoint_every=10_000
        ),
    )


def realsr_x4_s4() -> RunConfig:
    """Real-world x4 in 4 steps, as released v3 (journal version): MSE + LPIPS on the decoded prediction,
    cosine learning rate, batch 96.

    Source: realsr_swinunet_realesrgan256_journal.yaml.
    """
    base = realsr_x4_s15()
    return replace(
        base,
        preset="realsr-x4-s4",
        model=ModelConfig(),
        loss=LossConfig(lpips=1.0),
        optim=OptimConfig(lr_schedule="cosine"),
        train=replace(base.train, steps=400_000, batch_size=96, micro_batch=12),
    )


def sinsr_x4_s1() -> RunConfig:
    """Real-world x4 in one step: the U-Net of realsr-x4-s15 after SinSR's distillation (CVPR 2024), asked
    only at the end of its 15 steps. The training here is that of realsr-x4-s15, not the distillation.
    """
    base = realsr_x4_s15()
    schedule = replace(base.model.schedule, steps=1, trained_steps=15)
    return replace(base, preset="sinsr-x4-s1", model=replace(base.model, schedule=schedule))


def realsr_x2_s4() -> RunConfig:
    """Real-world x2 in 4 steps: as realsr-x4-s4, with a condition of 128 pixels that a strided extractor
    reduces.

    Source: realsr_realesrgan256_x2.yaml; no weights were released.
    """
    return replace(
        realsr_x4_s4(),
        preset="realsr-x2-s4",
        model=ModelConfig(scale=2, unet=UNetConfig(lq_size=128)),
        degradation=degradation.realesrgan_x2(),
    )


def bicubic_x4_s4() -> RunConfig:
    """MATLAB bicubic x4 in 4 steps: as realsr-x4-s4, with bicubic degradation and random crops at native
    resolution.

    Source: bicx4_swinunet_lpips.yaml, which also compiles the networks (`--set
    train.compile=reduce-overhead`), shrinks pictures to a short side of 256 before cropping, and rotates them
    by multiples of 90 degrees.
    """
    return replace(
        realsr_x4_s4(),
        preset="bicubic-x4-s4",
        degradation=degradation.bicubic_x4(),
        data=DataConfig(crop="random", crop_px=256),
    )


def inpaint_imagenet_s4() -> RunConfig:
    """Inpainting of photos in 4 steps: the condition is the picture with holes and the mask; LPIPS weight 10.

    Source: inpaint_lama256_imagenet.yaml, with its distortions of geometry and colour
    (`resshift.pairs.augment`).
    """
    base = realsr_x4_s4()
    return replace(
        base,
        preset="inpaint-imagenet-s4",
        model=ModelConfig(scale=1, unet=UNetConfig(lq_size=256, cond_mask=True)),
        degradation=degradation.inpainting(),
        loss=replace(base.loss, lpips=10.0),
        data=DataConfig(crop="distorted", crop_px=256),
    )


def inpaint_face_s4() -> RunConfig:
    """Inpainting of aligned faces (FFHQ at 256) in 4 steps: as inpaint-imagenet-s4 on whole pictures, with an
    autoencoder trained on faces.

    Source: inpaint_lama256_face.yaml.
    """
    return replace(
        inpaint_imagenet_s4(), preset="inpaint-face-s4", data=DataConfig(crop="short_side", crop_px=256)
    )


def face_s4() -> RunConfig:
    """Blind restoration of aligned 512-pixel faces in 4 steps: VQ-f8 latents (8 x 64 x 64), the 512-pixel
    picture as condition, batch 56.

    Source: faceir_gfpgan512_lpips.yaml.
    """
    base = realsr_x4_s4()
    return replace(
        base,
        preset="face-s4",
        model=ModelConfig(
            scale=1,
            unet=UNetConfig(in_channels=8, out_channels=8, lq_size=512),
            first_stage=FirstStageConfig(vq=VQ_F8_FACE),
        ),
        degradation=degradation.face(),
        loss=replace(base.loss, lpips=10.0),
        data=DataConfig(crop="short_side", crop_px=512),
        train=replace(base.train, batch_size=56, micro_batch=7),
    )


def tiny_x4_swin() -> RunConfig:
    """A small model with Swin blocks: pixel-unshuffle instead of an autoencoder, one step, the residual as
    target. Its weights shipped as tiny-x4 until tiny-x4 became a U-Net of convolutions.

    It has its full width at the size of the input, one Swin layer in the middle, and a small head at the size
    of the picture. With one step every sample trains the only prediction of inference, which takes a quarter
    of the time of a chain of four.
    The Swin mask is that of the Swin paper. It is trained on crops at native resolution with a mix of the
    heavy and the mild real-world chain and bicubic, and with a loss against lattices.
    """
    return RunConfig(
        preset="tiny-x4-swin",
        model=ModelConfig(
            target=Target.RESIDUAL,
            unet=UNetConfig(
                image_size=32,
                in_channels=48,
                out_channels=48,
                model_channels=128,
                channel_mult=(1,),
                num_res_blocks=4,
                attention_resolutions=(),
                swin_embed_dim=96,
                swin_depth=2,
                mlp_ratio=2.0,
                shift_mask="swin",
                lq_size=32,
                pixel_head_channels=16,
            ),
            first_stage=FirstStageConfig(kind="pixel_unshuffle", unshuffle_factor=4),
            schedule=ScheduleConfig(steps=1, kappa=0.05, min_noise=0.1),
        ),
        degradation=replace(degradation.realesrgan_x4(), bicubic_share=0.25, mild_share=0.5),
        loss=LossConfig(lpips=0.1, lpips_net="squeeze", lpips_corners=4, lattice=0.03),
        optim=OptimConfig(lr=5e-4, lr_end=1e-5, lr_schedule="cosine", warmup_steps=200, clip_norm=1.0),
        data=DataConfig(crop="random", crop_px=128),
        train=TrainConfig(
            steps=5000, batch_size=8, micro_batch=8, precision="bf16", checkpoint_every=250, log_every=50
        ),
    )


def tiny_x4() -> RunConfig:
    """The model that ships, for pictures as they come: one step from the estimate y0 = g(lq) of a regression
    network to x0, with a U-Net of convolutions at the size of the input, a half and a quarter of it; 4.8 M
    parameters with g.

    It is trained in three stages: g alone, for the distance of pixels and of spectra; the U-Net with g frozen
    and with LPIPS and distances of features; the U-Net with an adversary. There is no noise (kappa 0), so
    neither seeds nor steps change a picture. The weights that ship were trained in these stages, the last one
    in parts and at the end with the pictures of a teacher (docs/tiny-x4.md).
    """
    base = tiny_x4_swin()
    return replace(
        base,
        preset="tiny-x4",
        model=ModelConfig(
            target=Target.RESIDUAL,
            unet=ConvUNetConfig(padding="replicate", regression=RegressionConfig()),
            first_stage=FirstStageConfig(kind="pixel_unshuffle", unshuffle_factor=4),
            schedule=ScheduleConfig(steps=1, kappa=0.0, sqrt_eta_end=1.0),
        ),
        degradation=replace(
            degradation.realesrgan_x4(),
            bicubic_share=0.2,
            mild_share=0.2,
            camera_share=0.3,
            noise3_prob=0.2,
        ),
        loss=LossConfig(
            mse=0.0,
            charbonnier=1.0,
            fourier=0.1,
            lpips=0.2,
            lpips_net="squeeze",
            lpips_corners=4,
            features=0.1,
        ),
        optim=OptimConfig(lr=1e-3, muon=10.0, betas=(0.9, 0.99), warmup_steps=200, clip_norm=1.0),
        data=DataConfig(crop="scaled", crop_px=128),
        train=TrainConfig(steps=24_000, batch_size=8, micro_batch=8, checkpoint_every=500, log_every=50),
        stages=(
            Stage(trains="regression", steps=14_000, decay_steps=2_000, lpips=0.0, features=0.0),
            Stage(steps=2_000),
            Stage(lr=3e-4, decay_steps=1_000, lpips=0.15, lattice=0.06, artifacts=8.0, adversary=2.0),
        ),
    )


def tiny_x4_s4() -> RunConfig:
    """A small chain of four steps: y0 is the estimate of a regression network g, and the U-Net of
    convolutions (4.9 M parameters with g, 10 MB in float16) adds what g cannot know, step by step.

    The schedule has the released form with kappa 1: x_T is almost noise, so the first step predicts from y0
    and the picture alone, and the last one from an x_1 whose noise of 0.1, as much as what g misses, has to
    become detail. A small kappa, as that of tiny-x4-swin, leaves seeds and steps without effect. The
    objective is that of the last stage of tiny-x4, at every step of the chain; start with `--init tiny-x4`,
    whose U-Net makes the same picture at every step, except near edges (it sees no zeros there).
    """
    base = tiny_x4()
    return replace(
        base,
        preset="tiny-x4-s4",
        model=replace(
            base.model,
            unet=ConvUNetConfig(steps=4, regression=RegressionConfig()),
            schedule=ScheduleConfig(steps=4, kappa=1.0, min_noise=0.1),
        ),
        train=replace(base.train, steps=6000),
        stages=(base.stages[-1],),
    )


def tiny_inpaint() -> RunConfig:
    """A small model that fills strokes and boxes: the U-Net of tiny-x4 at scale 1, whose positions are 4 x 4
    pixels, with fewer channels; one step, no noise.

    The chain starts from a membrane over the hole. The objective is that of a picture whose known pixels are
    those of the truth, in the second stage with an adversary. Masks have brush strokes of
    6-28 px and boxes of 10-40 px, for crops of 96 px.
    """
    base = tiny_x4()
    return replace(
        base,
        preset="tiny-inpaint",
        model=replace(
            base.model,
            scale=1,
            hole="surroundings",
            unet=ConvUNetConfig(
                channels=(48, 96, 128),
                blocks_before=(1, 2, 4),
                blocks_after=(2, 2),
                lq_ratio=4,
                cond_mask=True,
            ),
        ),
        degradation=replace(
            degradation.inpainting(),
            mask=MaskRecipe(
                kind_probs=(0.75, 0.25, 0.0),
                strokes=(1, 3),
                stroke_segments=(1, 3),
                stroke_length_px=(10, 60),
                stroke_width_px=(6, 28),
                boxes=(1, 2),
                box_side_px=(10, 40),
                box_margin_px=0,
            ),
        ),
        loss=LossConfig(mse=0.0, charbonnier=1.0, lpips=0.5, lpips_net="squeeze", lpips_corners=4),
        optim=replace(base.optim, warmup_steps=100),
        data=DataConfig(crop="scaled", crop_px=96),
        train=replace(base.train, steps=4000, ema_decay=0.995),
        stages=(Stage(steps=2000), Stage(lr=3e-4, decay_steps=1000, lattice=0.02, adversary=1.0)),
    )


def test_x4() -> RunConfig:
    """A minimal model of the construction of tiny-x4-swin for tests: 32-pixel crops, bicubic, steps of
    milliseconds. Its pictures are not useful.
    """
    base = tiny_x4_swin()
    return replace(
        base,
        preset="test-x4",
        model=replace(
            base.model,
            schedule=ScheduleConfig(steps=4, kappa=1.0, min_noise=0.1),
            unet=replace(
                base.model.unet,
                image_size=8,
                lq_size=8,
                model_channels=32,
                num_res_blocks=1,
                attention_resolutions=(8,),
                swin_embed_dim=32,
                swin_depth=1,
            ),
        ),
        degradation=degradation.bicubic_x4(),
        loss=LossConfig(),
        data=DataConfig(crop="random", crop_px=32),
        optim=replace(base.optim, lr_end=2e-5),
        train=TrainConfig(steps=20, batch_size=8, micro_batch=4, checkpoint_every=10, log_every=5),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "realsr-x4-s15": realsr_x4_s15,
    "realsr-x4-s4": realsr_x4_s4,
    "sinsr-x4-s1": sinsr_x4_s1,
    "realsr-x2-s4": realsr_x2_s4,
    "bicubic-x4-s4": bicubic_x4_s4,
    "inpaint-imagenet-s4": inpaint_imagenet_s4,
    "inpaint-face-s4": inpaint_face_s4,
    "face-s4": face_s4,
    "tiny-x4": tiny_x4,
    "tiny-x4-swin": tiny_x4_swin,
    "tiny-x4-s4": tiny_x4_s4,
    "tiny-inpaint": tiny_inpaint,
    "test-x4": test_x4,
}


def preset(name: str) -> RunConfig:
    """Return the configuration called `name`, or that of the user's function MODULE:FUNCTION.

    Raises:
        ConfigError: There is no such preset; the message lists the presets.
    """
    if ":" in name:
        return _own(name)
    if name not in PRESETS:
        raise ConfigError(
            f"unknown preset {name!r}; allowed: {', '.join(PRESETS)}, or MODULE:FUNCTION of your own"
        )
    return PRESETS[name]()


def _own(name: str) -> RunConfig:
    module, _, function = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), function, None)
    except (ImportError, ValueError) as error:  # ValueError: the name is empty
        told = f"{module!r} cannot be imported ({error}); is its folder on PYTHONPATH?"
        raise ConfigError(f"preset {name}: {told}") from error
    if not callable(made):
        raise ConfigError(f"preset {name}: {module} has no function {function!r}")
    made = made()
    if not isinstance(made, RunConfig):
        raise ConfigError(f"preset {name} must return a RunConfig, got {type(made).__name__}")
    return made
