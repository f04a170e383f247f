"""Picture in, picture out: the one composition of first stage, chain, network, tiles and noise.

Bulk jobs, serving, evaluation and notebooks all use it.

    lq -> reflect to whole tiles -> bicubic -> encode -> y0
    y0 -> chain; at every step the prediction of x0 is made tile by tile and blended -> x0 -> decode -> crop -> colour fix -> resize

The noise is a function of (seed, step, absolute latent position), tiles are a function of the picture's size
and the options, and no tile's result depends on what is computed beside it: the same picture, options and
type of device give the same bytes.

The result is `outscale` times as large as the input. The model has one scale; every other is reached from
there by bicubic resizing, antialiased when it shrinks. Beyond the model's scale that adds size, not detail,
and the result says so in its notes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from resshift import images, weights
from resshift.config import ModelConfig, Sampling
from resshift.devices import autocast, on_device, resolve_device, resolve_dtype
from resshift.images import Picture, scaled
from resshift.images.alpha import fill_transparent
from resshift.models import Dtype, WeightsError, locate_model
from resshift.networks import convolution
from resshift.networks.autoencoder import FirstStage, PixelUnshuffle, build_first_stage
from resshift.networks.unet import UNetSwin
from resshift.schedule import ShiftSchedule
from resshift.tiles.batching import Work, alone
from resshift.tiles.chain import Emit, Networks, Noise, ReadRows, row_chain, window_bytes
from resshift.tiles.colour_fix import COLOUR_FIXES, ColourFix
from resshift.tiles.compiled import Compiled, CompiledStage
from resshift.tiles.memory import (
    OVERLAP_SHARE,
    Backoff,
    Footprint,
    MemoryBudgetError,
    bytes_alive,
    free_bytes,
    is_out_of_memory,
    plan_for,
    tiles_per_call,
)
from resshift.tiles.noise import NoiseField
from resshift.tiles.output import Filler, PixelRows, RowOutput, Sink, resize_alpha
from resshift.tiles.plan import TilePlan, plan_tiles
from resshift.tiles.window import Allocate, in_file, in_memory

Pixels = TypeVar("Pixels", Image.Image, NDArray[Any])

# A VQ tile of this many latent positions (245 x 245) spends as much in its attention as in everything else.
_VQ_ATTENTION_POSITIONS = 60_000


class Upscaler:
    """A model that is ready to use.

        up = Upscaler.from_pretrained("tiny-x4")
        out = up(image)                             # PIL.Image or HWC array in, the same kind out
        out = up(image, outscale=2.5, seed=7, tile_px=128)

    Args:
        config: of the model.
        unet: with its weights.
        first_stage: with its weights.
        name: for reports.
        identity: changes with any weight or setting of the model; part of a job's fingerprint.
        device: "auto" takes CUDA, then Apple's MPS, then the CPU.
        dtype: of the networks' arithmetic; "auto" is bfloat16 on CUDA cards that have it, else float32. The
            chain is float32 always.
        colour_fix: give the result the low band ("wavelet") or the mean and spread ("adain") of the input's
            colours, or "none".
        memory_budget_bytes: what upscaling may take beside the model, the input and the result; it decides
            the tiles, and so the pixels. None: tiles of the usual size.
        optimise: use the faster forms of the networks' layers (`resshift.networks.convolution`); they round
            differently.
        compile: run the networks through `torch.compile` (`resshift.tiles.compiled`): minutes at the first
            picture of a size.
    """

    def __init__(
        self,
        config: ModelConfig,
        unet: nn.Module,
        first_stage: FirstStage | None = None,
        *,
        name: str = "custom",
        identity: str = "",
        device: str | torch.device = "auto",
        dtype: Dtype = "auto",
        colour_fix: ColourFix = "wavelet",
        memory_budget_bytes: int | None = None,
        optimise: bool = True,
        compile: bool = False,
    ) -> None:
        if colour_fix not in COLOUR_FIXES:
            raise ValueError(f"colour_fix must be one of {', '.join(COLOUR_FIXES)}, got {colour_fix!r}")
        if memory_budget_bytes is not None and memory_budget_bytes < 1:
            raise ValueError(f"memory_budget_bytes must be positive, got {memory_budget_bytes}")
        self.config = config
        self.name = name
        self.identity = identity
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self.colour_fix: ColourFix = colour_fix
        self.memory_budget_bytes = memory_budget_bytes
        stage = first_stage if first_stage is not None else build_first_stage(config.first_stage)
        self.first_stage: FirstStage = (
            on_device(stage.eval().requires_grad_(False), self.device)
            if isinstance(stage, nn.Module)
            else stage
        )
        self.unet = on_device(unet.eval().requires_grad_(False), self.device)
        self.schedule = ShiftSchedule.from_config(config.schedule)
        if optimise and self.device.type == "cpu" and self.dtype == torch.float32:
            for network in (self.unet, self.first_stage):
                if isinstance(network, nn.Module):
                    convolution.prepare(network)
        self._networks: dict[int, Networks] = {}
        self._compiled = self._compile() if compile else None
        self._backoff = Backoff()
        self._largest_side: int | None = None  # what memory has turned out to allow
        self._footprint: Footprint | None = None

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: Dtype = "auto",
        preset_name: str | None = None,
        first_stage: str | Path | None = None,
        accept_licence: bool = False,
        colour_fix: ColourFix = "wavelet",
        memory_budget_bytes: int | None = None,
    ) -> Upscaler:
        """Load a model.

        Args:
            source: a name that ships ("tiny-x4") or whose weights are published ("realsr-x4-s4"); or a model
                or checkpoint directory; or a weight file: our `.safetensors`, or a released `.pth`.
            device: see the class.
            dtype: see the class; unless it is "auto" it replaces what `source` asks for (`tiny-x4@bfloat16`).
            preset_name: which model a bare weight file belongs to; known for files with their released names.
            first_stage: weights of the autoencoder of a bare file; default: `autoencoder_vq_f4.pth` beside
                it.
            accept_licence: agree to the licence of published weights so that they may be downloaded (or set
                RESSHIFT_ACCEPT_LICENCE=1).
            colour_fix: see the class.
            memory_budget_bytes: see the class.

        Raises:
            WeightsError: no such model, or its weights do not fit; the message says what is allowed.
        """
        found = locate_model(
            source, preset_name=preset_name, first_stage=first_stage, accept_licence=accept_licence
        )
        found = found if dtype == "auto" else replace(found, dtype=dtype)
        unet = UNetSwin(found.config.unet)
        weights.load_into(unet, weights.read_state_dict(found.unet))
        stage = build_first_stage(found.config.first_stage)
        if not isinstance(stage, PixelUnshuffle):
            if found.first_stage is None:
                raise WeightsError(f"{source} needs the weights of its autoencoder: first_stage=FILE")
            weights.load_into(stage, weights.read_state_dict(found.first_stage))
        return cls(
            found.config,
            unet,
            stage,
            name=found.name,
            identity=found.identity(),
            device=device,
            dtype=found.dtype,
            colour_fix=colour_fix,
            memory_budget_bytes=memory_budget_bytes,
        )

    @property
    def scale(self) -> int:
        """Native scale: sides of the output over sides of the input."""
        return self.config.scale

    @property
    def shares_calls(self) -> bool:
        """Whether tiles of several pictures go through the networks together; a CPU computes them one
        by one.
        """
        return self.device.type != "cpu"

    def __call__(
        self,
        image: Pixels,
        *,
        seed: int = 0,
        outscale: float | None = None,
        steps: int | None = None,
        tile_px: int | None = None,
        tile_batch: int | None = None,
    ) -> Pixels:
        """Upscale an image.

        Args:
            image: PIL image of any common mode, or array (H, W), (H, W, 1 | 3 | 4), uint8 or uint16, RGB
                order, fourth channel alpha.
            seed: Seed of the noise; the same seed gives the same pixels.
            outscale: Sides of the result over sides of the input, in (0, 16]; default: the model's own scale.
            steps: Steps of the chain, see `Sampling`.
            tile_px: Longest side of a tile in input pixels, see `Sampling`.
            tile_batch: Number of tiles in one call of the network on a GPU, see `Sampling`.

        Returns:
            The same kind: a PIL image (grey stays grey, alpha stays), or an array of the same dtype and
            channels.

        Raises:
            ValueError: the image or an option is not usable; the message names the value and what is allowed.
        """
        sampling = Sampling(seed=seed, outscale=outscale, steps=steps, tile_px=tile_px, tile_batch=tile_batch)
        if isinstance(image, Image.Image):
            return images.to_pil(self.upscale(images.from_pil(image), sampling))
        channels = _channels_of(image)
        pixels = image.reshape(*image.shape[:2], channels)
        picture = Picture(
            pixels=np.ascontiguousarray(pixels[..., :3] if channels >= 3 else pixels),
            alpha=np.ascontiguousarray(pixels[..., 3]) if channels == 4 else None,
        )
        result = self.upscale(picture, sampling)
        out = (
            result.pixels
            if result.alpha is None
            else np.concatenate([result.pixels, result.alpha[..., None]], axis=2)
        )
        return out[..., 0] if image.ndim == 2 else out

    def upscale(self, picture: Picture, sampling: Sampling = Sampling()) -> Picture:
        """Upscale a decoded picture. ICC profile, EXIF and notes are handed on.

        When memory runs out for a single tile, smaller tiles are tried; the result then has a note, and this
        object remembers.
        """
        return alone(self.upscaling(picture, sampling))

    def upscaling(self, picture: Picture, sampling: Sampling = Sampling()) -> Work[Picture]:
        """Return `upscale` as a work for `resshift.tiles.batching.Batcher`, so that pictures share calls: the
        same bytes, errors when it runs.
        """
        factor = sampling.outscale or self.scale
        picture = fill_transparent(picture)
        width, height = scaled(picture.width, factor), scaled(picture.height, factor)
        dtype: Any = picture.pixels.dtype.type
        pixels = np.empty((height, width, picture.pixels.shape[2]), dtype)
        notes = picture.notes
        while True:
            side = self._largest_side  # of this attempt: pictures that share calls run out of memory together
            try:
                yield from self._rows(picture.pixels, Filler(pixels), sampling)
                break
            except Exception as error:
                if not is_out_of_memory(error) or not self._shrink_tiles(picture, sampling, side):
                    raise
        if side is not None:
            notes += (f"tiles of at most {side * self.config.unet.lq_ratio} px: memory ran out",)
        if factor > self.scale:
            notes += (f"x{factor:g} is the model's x{self.scale} enlarged by bicubic interpolation",)
        alpha = None if picture.alpha is None else resize_alpha(picture.alpha, height, width)
        return replace(picture, pixels=pixels, alpha=alpha, notes=notes)

    def upscale_rows(self, source: PixelRows, sink: Sink, sampling: Sampling = Sampling()) -> tuple[int, int]:
        """Upscale a picture of any size without ever holding it; the pixels are those of `upscale`, to the
        byte.

        Args:
            source: rows of the input, (height, width, 1 or 3). It is read from the top to the bottom, the
                last rows perhaps twice.
            sink: is called with the next rows of the result, (n, width, channels) of the same dtype: for
                example `PngRows.write`.
            sampling: How pixels are made.

        Returns:
            Height and width of the result.

        Raises:
            ValueError: an option is not usable; "adain" needs the whole picture.
            MemoryBudgetError: the budget is below what one tile needs.
        """
        if self.colour_fix == "adain":
            raise ValueError(
                "colour_fix='adain' needs the whole picture at once: use 'wavelet' or 'none' to upscale by "
                "rows"
            )
        factor = sampling.outscale or self.scale
        alone(self._rows(source, sink, sampling))
        return scaled(source.shape[0], factor), scaled(source.shape[1], factor)

    def upscale_tensor(
        self,
        lq: Tensor,
        sampling: Sampling = Sampling(),
        *,
        noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Upscale a picture in [-1, 1], (1, 3, h, w) of any size -> (1, 3, h * scale, w * scale) float32,
        clamped to [-1, 1]; no colour fix.

        Args:
            lq: on the device of the model.
            sampling: How pixels are made; `outscale` must be None.
            noise: replaces the noise field: `noise(step)` of the shape of the padded latent, for steps T ...
                1. For parity tests.

        Raises:
            ValueError: wrong shape, or an option is not usable.
        """
        if sampling.outscale is not None:
            raise ValueError(
                f"outscale must be None for a tensor, which is not resized, got {sampling.outscale}"
            )
        if lq.ndim != 4 or lq.shape[:2] != (1, 3) or 0 in lq.shape:
            raise ValueError(f"lq must be (1, 3, h, w) with h and w at least 1, got {tuple(lq.shape)}")
        size = (lq.shape[2], lq.shape[3])
        bands: list[Tensor] = []
        chain = self._chain(
            size,
            read=lambda top, bottom: lq[0, :, top:bottom],
            emit=lambda rows: bands.append(rows.clone()),
            noise=self._noise_of(sampling) if noise is None else _cut(noise),
            sampling=sampling,
        )
        alone(chain)
        return (
            torch.cat(bands, 1)[None, :, : size[0] * self.scale, : size[1] * self.scale]
            .to(self.device)
            .clamp(-1, 1)
        )

    def plan(self, height: int, width: int, sampling: Sampling = Sampling()) -> TilePlan:
        """Return the tiles of an input picture, in latent positions.

        Raises:
            ValueError: the model cannot do what `sampling` says.
            MemoryBudgetError: the budget is too small.
        """
        sampling.check_for("this model", self.schedule.steps, self.config.smallest_tile_px)
        tile_px = sampling.tile_px
        ratio, multiple = self.config.unet.lq_ratio, self.config.unet.size_multiple
        size = (-(-height // ratio), -(-width // ratio))
        attention = float("inf") if isinstance(self.first_stage, PixelUnshuffle) else _VQ_ATTENTION_POSITIONS
        limits = [
            side
            for side in (self._largest_side, None if tile_px is None else tile_px // ratio)
            if side is not None
        ]
        if limits:
            side = min(limits) // multiple * multiple
            plan = plan_tiles(*size, side, side // OVERLAP_SHARE, multiple)
            if self._fits(plan.tile_area):
                return plan
            least_area = plan.tile_area
        else:
            plan = plan_for(size, multiple, attention_positions=attention, fits=self._fits)
            if plan is not None:
                return plan
            least_area = multiple**2
        least, asked = (
            self.footprint().tile_bytes(least_area),
            "" if tile_px is None else f" with tile_px {tile_px}",
        )
        raise MemoryBudgetError(
            f"memory_budget_bytes{asked} must be at least {least} for this model, got "
            f"{self.memory_budget_bytes}"
        )

    def footprint(self) -> Footprint:
        """Return what this model takes, measured at the first call on one small tile."""
        if self._footprint is None:
            networks, side = self.networks(), self.config.unet.size_multiple
            lq_side, channels = side * self.config.unet.lq_ratio, self.first_stage.channels

            def zeros(channels: int, side: int) -> Tensor:
                return torch.zeros((1, channels, side, side), device=self.device)

            latent = zeros(channels, side)
            first = torch.zeros(1, dtype=torch.int64, device=self.device)
            calls = [lambda: networks.predict_x0(latent, latent, zeros(3, lq_side), first)]
            if not networks.unshuffles:
                calls += [
                    lambda: networks.encode(zeros(3, lq_side * self.scale)),
                    lambda: networks.decode(latent),
                ]
            with torch.inference_mode():
                self._footprint = Footprint(max(map(bytes_alive, calls)) / side**2)
        return self._footprint

    def _fits(self, area: int) -> bool:
        return (
            self.memory_budget_bytes is None or self.footprint().tile_bytes(area) <= self.memory_budget_bytes
        )

    def networks(self, steps: int | None = None) -> Networks:
        """Return what a chain of `steps` (default: all) computes with.

        Raises:
            ValueError: the model was not trained with so many.
        """
        # Kept: tables on the device are cached by schedule, and pictures share the calls of one object.
        steps = self.schedule.steps if steps is None else steps
        if steps not in self._networks:
            schedule = self.schedule if steps == self.schedule.steps else self.schedule.shortened(steps)
            precision = partial(autocast, self.device, self.dtype)
            unet, stage = self._compiled or (self.unet, self.first_stage)
            self._networks[steps] = Networks(
                self.config, unet, stage, schedule, self.device, precision, self._backoff.call
            )
        return self._networks[steps]

    def _compile(self) -> tuple[Callable[..., Tensor], FirstStage]:
        unet, stage = Compiled(self.unet, "the U-Net", self.device), self.first_stage
        if isinstance(stage, PixelUnshuffle):
            return unet, stage
        encode, decode = (
            Compiled(call, name, self.device)
            for call, name in ((stage.encode, "the encoder"), (stage.decode, "the decoder"))
        )
        return unet, CompiledStage(stage.factor, stage.channels, encode, decode)

    def _chain(
        self,
        size: tuple[int, int],
        *,
        read: ReadRows,
        emit: Emit,
        noise: Noise,
        sampling: Sampling,
    ) -> Work[None]:
        plan, networks = self.plan(*size, sampling), self.networks(sampling.steps)
        batch = (
            (sampling.tile_batch or tiles_per_call(plan.tile_area, self._fits)) if self.shares_calls else 1
        )
        needed = window_bytes(networks, plan)
        if self.memory_budget_bytes is not None:
            room = self.memory_budget_bytes - self.footprint().tile_bytes(batch * plan.tile_area)
        else:
            room = (free_bytes(self.device) or needed) // 2
        allocate: Allocate = in_memory(self.device) if needed <= room else in_file
        yield from row_chain(
            networks, plan, size, read=read, noise=noise, emit=emit, allocate=allocate, batch=batch
        )

    def _rows(self, source: PixelRows, sink: Sink, sampling: Sampling) -> Work[None]:
        height, width = source.shape[:2]
        output = RowOutput(
            source, sink, scale=self.scale, factor=sampling.outscale or self.scale, colour_fix=self.colour_fix
        )
        yield from self._chain(
            (height, width),
            read=lambda top, bottom: images.to_tensor(source[top:bottom])[0].to(self.device),
            emit=output.push,
            noise=self._noise_of(sampling),
            sampling=sampling,
        )
        output.finish()

    def _noise_of(self, sampling: Sampling) -> Noise:
        return NoiseField(int(sampling.seed), "upscale", channels=self.first_stage.channels).window

    def _shrink_tiles(self, picture: Picture, sampling: Sampling, attempted: int | None) -> bool:
        """Halve the largest tile after an attempt ran out of memory; False when it was the smallest
        already.
        """
        if self._largest_side == attempted:
            plan, multiple = (
                self.plan(picture.height, picture.width, sampling),
                self.config.unet.size_multiple,
            )
            side = max(plan.rows.tile, plan.columns.tile)
            if side == multiple:
                return False
            self._largest_side = max(multiple, side // 2 // multiple * multiple)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True


def _cut(noise: Callable[[int], Tensor]) -> Noise:
    """Cut rectangles from noise that is made for the whole latent, a step at a time."""
    made: dict[int, Tensor] = {}

    def cut(step: int, top: int, left: int, height: int, width: int) -> Tensor:
        if step not in made:
            made[step] = noise(step)[0]
        return made[step][:, top : top + height, left : left + width]

    return cut


def _channels_of(array: NDArray[Any]) -> int:
    if not isinstance(array, np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance] - what types forbid is what people try
        raise ValueError(
            f"an image must be a PIL image or an array, got {type(array).__name__}: a file is opened with "
            "PIL.Image.open"
        )
    if array.dtype.type not in (np.uint8, np.uint16):
        raise ValueError(f"an array must be uint8 or uint16, got {array.dtype}")
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"an array must be (H, W) or (H, W, 1 | 3 | 4) and not empty, got {array.shape}")
    return channels
