"""The parts of a model as modules that can be traced, each with the sizes that it works at.

    step        x_t, t, lq [, y0] [, mask] -> x0_pred   a step of the chain: scaled input, network, prediction
    regression  lq -> picture       models whose chain starts from y0 = encode(regression(lq))
    encoder     picture -> z        VQ models: latent before quantisation
    decoder     z -> picture        VQ models: quantises first
    picture     lq -> hq            models of one step whose latent is an unshuffled picture

`picture` is the whole model for pictures in [0, 1] of any size: reflection to whole windows, bicubic
enlargement, the prior without noise (x_T = y0), the step, the rearrangement of pixels, crop and clamp. Unlike
`Upscaler` it neither cuts tiles nor corrects colours.

Shapes: B batch, Z latent channels, h w a latent, h_lq w_lq a low-quality picture.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from resshift.config import ModelConfig
from resshift.networks.autoencoder import PixelUnshuffle, VQAutoencoder
from resshift.resize.bicubic import upsample
from resshift.sampler import network_denoiser
from resshift.schedule import ShiftSchedule, Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Graph:
    """A module to trace.

    Fields:
        name: Name of its file, without suffix.
        module: What is traced.
        output: Name of the output.
        multiple: Number that the sides of the first input must be multiples of.
        window: Side of the first input that is a whole window on every level; sizes are tried in this unit.
        examples: Function of (batch, rows, columns) of the first input that returns inputs by name, random by
            a fixed seed.
    """

    name: str
    module: nn.Module
    output: str
    multiple: int
    window: int
    examples: Callable[[int, int, int], dict[str, Tensor]]


class Step(nn.Module):
    """One step of the chain: x_t -> the prediction of x0."""

    def __init__(self, config: ModelConfig, unet: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.schedule = ShiftSchedule.from_config(config.schedule)
        self.unet = unet

    def forward(
        self, x_t: Tensor, t: Tensor, lq: Tensor, y0: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Predict x0.

        Args:
            x_t: Noisy latent, not scaled, (B, Z, h, w).
            t: Step indices in [0, T), int64 (B,); index i is the paper's t = i + 1.
            lq: Low-quality picture in [-1, 1], (B, 3, h_lq, w_lq).
            y0: Degraded latent, (B, Z, h, w); only for targets other than x0.
            mask: 1 in a hole and -1 where the picture is kept, (B, 1, h_lq, w_lq); only for inpainting.

        Returns:
            (B, Z, h, w).
        """
        config = self.config
        denoise = network_denoiser(
            self.unet,
            lq,
            x_t if y0 is None else y0,
            self.schedule,
            config.target,
            mask=mask,
            latent=config.latent_scaling,
            sees_y0=config.unet.sees_y0,
        )
        return denoise(x_t, t)


class Encoder(nn.Module):
    """Picture in [-1, 1], (B, 3, H, W) -> latent before quantisation."""

    def __init__(self, stage: VQAutoencoder) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, Z, H / f, W / f)."""
        return self.stage.encode(picture)


class Decoder(nn.Module):
    """Latent -> picture, about [-1, 1], not clamped."""

    def __init__(self, stage: VQAutoencoder) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, z: Tensor) -> Tensor:
        """(B, Z, h, w) -> (B, 3, h f, w f)."""
        return self.stage.decode(z)


class WholePicture(nn.Module):
    """Low-quality picture in [0, 1], any size -> high-quality picture in [0, 1], for a chain of one step."""

    def __init__(self, step: Step, stage: PixelUnshuffle) -> None:
        super().__init__()
        self.step = step
        self.stage = stage

    def forward(self, lq: Tensor) -> Tensor:
        """(B, 3, h_lq, w_lq) -> (B, 3, h_lq scale, w_lq scale)."""
        config = self.step.config
        height, width = lq.shape[2:]
        padded = 2 * lq - 1
        for axis in (2, 3):
            padded = _reflected(padded, axis, config.size_multiple_px)
        regression = getattr(self.step.unet, "regression", None)
        start = upsample(padded, config.scale) if regression is None else regression(padded)
        y0 = self.stage.encode(start)
        t = torch.zeros(lq.shape[0], dtype=torch.int64, device=lq.device)
        hq = self.stage.decode(self.step(y0, t, padded, y0))
        # Not slices: those would fix whether a size is a multiple of the window.
        for axis, length in ((2, height), (3, width)):
            hq = hq.index_select(axis, torch.arange(length * config.scale, device=lq.device))
        return (hq / 2 + 0.5).clamp(0, 1)


def _reflected(x: Tensor, axis: int, multiple: int) -> Tensor:
    """Extend an axis to the next multiple by one reflection without repeating the edge, in operations whose
    sizes may be symbols. `resshift.tiles.plan.reflected`, which folds as often as needed, gives the same from
    multiple // 2 + 1 positions on.
    """
    length = x.shape[axis]
    position = torch.arange((length + multiple - 1) // multiple * multiple, device=x.device)
    return x.index_select(axis, (length - 1 - (position - (length - 1)).abs()).clamp_min(0))


def graphs_of(
    config: ModelConfig, unet: nn.Module, stage: VQAutoencoder | PixelUnshuffle
) -> tuple[Graph, ...]:
    """Return the graphs of a model, its networks in evaluation mode and without gradients."""
    step = Step(config, unet.eval().requires_grad_(False)).eval()
    stage = stage.eval().requires_grad_(False)
    ratio, multiple, channels = config.unet.lq_ratio, config.unet.size_multiple, stage.channels

    def step_examples(batch: int, height: int, width: int) -> dict[str, Tensor]:
        draw = _normal()
        latent, (rows, columns) = (batch, channels, height, width), (height * ratio, width * ratio)
        inputs = {"x_t": draw(latent), "t": torch.arange(batch) % step.schedule.steps}
        inputs["lq"] = draw((batch, 3, rows, columns)).clamp(-1, 1)
        if config.target != Target.X0 or config.unet.sees_y0:
            inputs["y0"] = draw(latent)
        if config.unet.cond_mask:
            inputs["mask"] = draw((batch, 1, rows, columns)).sign()
        return inputs

    graphs = [
        Graph(
            name="step",
            module=step,
            output="x0_pred",
            multiple=multiple,
            window=multiple,
            examples=step_examples,
        )
    ]
    if (regression := getattr(unet, "regression", None)) is not None:
        graphs.append(
            Graph(
                name="regression",
                module=regression,
                output="picture",
                multiple=multiple,
                window=multiple,
                examples=lambda batch, height, width: {"lq": 2 * _uniform((batch, 3, height, width)) - 1},
            )
        )
    if isinstance(stage, VQAutoencoder):
        return (*graphs, *_vq_graphs(stage))
    if step.schedule.steps == 1 and not config.unet.cond_mask:
        picture = Graph(
            name="picture",
            module=WholePicture(step, stage).eval(),
            output="hq",
            multiple=1,
            window=config.size_multiple_px,
            examples=lambda batch, height, width: {"lq": _uniform((batch, 3, height, width))},
        )
        graphs.insert(0, picture)
    return tuple(graphs)


def _vq_graphs(stage: VQAutoencoder) -> tuple[Graph, Graph]:
    latent = 8  # an autoencoder has no windows

    def codes(batch: int, height: int, width: int) -> dict[str, Tensor]:
        # Vectors of the code book: for others two codes may be equally near, and rounding decides.
        book = stage.quantize.embedding.weight
        indices = torch.randint(len(book), (batch, height, width), generator=torch.Generator().manual_seed(0))
        return {"z": book[indices].permute(0, 3, 1, 2).contiguous()}

    return (
        Graph(
            name="encoder",
            module=Encoder(stage),
            output="z",
            multiple=stage.factor,
            window=latent * stage.factor,
            examples=lambda batch, height, width: {"picture": 2 * _uniform((batch, 3, height, width)) - 1},
        ),
        Graph(
            name="decoder",
            module=Decoder(stage),
            output="picture",
            multiple=1,
            window=latent,
            examples=codes,
        ),
    )


def _normal() -> Callable[[tuple[int, ...]], Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda shape: torch.randn(shape, generator=generator)


def _uniform(shape: tuple[int, ...]) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))
