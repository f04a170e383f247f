"""Picture in, picture out: the one composition of first stage, chain, network, tiles and noise.

Bulk jobs, serving, evaluation and notebooks all use it.

    lq -> reflect to whole tiles -> bicubic -> encode -> y0
    y0 -> chain; at every step the prediction of x0 is made tile by tile and blended -> x0 -> decode -> crop

The noise is a function of (seed, step, absolute latent position), so a result does not depend on tiles that happen to share a batch, on the
order of pictures, or on retries.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from resshift import images, weights
from resshift.alpha import fill_transparent
from resshift.autoencoder import FirstStage, PixelUnshuffle, build_first_stage
from resshift.config import ConfigError, ModelConfig, to_dict
from resshift.images import Picture
from resshift.losses import upsample
from resshift.presets import PRESETS, preset
from resshift.sampler import network_denoiser, sample
from resshift.schedule import ShiftSchedule
from resshift.seeds import NoiseField
from resshift.tiling import TilePlan, map_tiles, plan_tiles, reflect_to
from resshift.training import on_device
from resshift.unet import UNetSwin
from resshift.weights import WeightsError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Pixels = TypeVar("Pixels", Image.Image, NDArray[Any])


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
        dtype: of the networks' arithmetic; "auto" is bfloat16 on CUDA cards that have it, else float32. The chain is float32 always.
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
    ) -> None:
        self.config = config
        self.name = name
        self.identity = identity
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        stage = first_stage if first_stage is not None else build_first_stage(config.first_stage)
        self.first_stage: FirstStage = on_device(stage.eval().requires_grad_(False), self.device) if isinstance(stage, nn.Module) else stage
        self.unet = on_device(unet.eval().requires_grad_(False), self.device)
        self.schedule = ShiftSchedule.from_config(config.schedule)

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
    ) -> Upscaler:
        """Load a model.

        Args:
            source: a name that ships ("tiny-x4") or whose weights are published ("realsr-x4-s4"); or a model or checkpoint directory; or a
                weight file: our `.safetensors`, or a released `.pth`.
            device: see the class.
            dtype: see the class.
            preset_name: which model a bare weight file belongs to; known for files with their released names.
            first_stage: weights of the autoencoder of a bare file; default: `autoencoder_vq_f4.pth` beside it.
            accept_licence: agree to the licence of published weights so that they may be downloaded (or set RESSHIFT_ACCEPT_LICENCE=1).

        Raises:
            WeightsError: no such model, or its weights do not fit; the message says what is allowed.
        """
        found = locate_model(source, preset_name=preset_name, first_stage=first_stage, accept_licence=accept_licence)
        unet = UNetSwin(found.config.unet)
        weights.load_into(unet, weights.read_state_dict(found.unet))
        stage = build_first_stage(found.config.first_stage)
        if not isinstance(stage, PixelUnshuffle):
            if found.first_stage is None:
                raise WeightsError(f"{source} needs the weights of its autoencoder: first_stage=FILE")
            weights.load_into(stage, weights.read_state_dict(found.first_stage))
        return cls(found.config, unet, stage, name=found.name, identity=found.identity(), device=device, dtype=dtype)

    @property
    def scale(self) -> int:
        """Native scale: sides of the output over sides of the input."""
        return self.config.scale

    def __call__(
        self, image: Pixels, *, seed: int = 0, outscale: float | None = None, tile_px: int | None = None, tile_batch: int | None = None
    ) -> Pixels:
        """Upscale an image.

        Args:
            image: PIL image of any common mode, or array (H, W), (H, W, 1 | 3 | 4), uint8 or uint16, RGB order, fourth channel alpha.
            seed: of the noise; the same seed gives the same pixels.
            outscale: sides of the result over sides of the input, > 0; default the model's own scale.
            tile_px: side of a tile in input pixels; default 128. Smaller needs less memory.
            tile_batch: tiles at a time; default 8 on a GPU and 1 on a CPU.

        Returns:
            The same kind: a PIL image (grey stays grey, alpha stays), or an array of the same dtype and channels.

        Raises:
            ValueError: the image or an option is not usable; the message names the value and what is allowed.
        """
        upscale = partial(self.upscale, seed=seed, outscale=outscale, tile_px=tile_px, tile_batch=tile_batch)
        if isinstance(image, Image.Image):
            return images.to_pil(upscale(images.from_pil(image)))
        channels = _channels_of(image)
        pixels = image.reshape(*image.shape[:2], channels)
        picture = Picture(
            pixels=np.ascontiguousarray(pixels[..., :3] if channels >= 3 else pixels),
            alpha=np.ascontiguousarray(pixels[..., 3]) if channels == 4 else None,
        )
        result = upscale(picture)
        out = result.pixels if result.alpha is None else np.concatenate([result.pixels, result.alpha[..., None]], axis=2)
        return out[..., 0] if image.ndim == 2 else out

    @torch.inference_mode()
    def upscale(
        self,
        picture: Picture,
        *,
        seed: int = 0,
        outscale: float | None = None,
        tile_px: int | None = None,
        tile_batch: int | None = None,
    ) -> Picture:
        """Upscale a decoded picture; arguments as in `__call__`. ICC profile, EXIF and notes are handed on."""
        if outscale is not None and not 0 < outscale <= 16:
            raise ValueError(f"outscale must lie in (0, 16], got {outscale}")
        picture = fill_transparent(picture)
        lq = images.to_tensor(picture.pixels).to(self.device)
        hq = self.upscale_tensor(lq, seed=seed, tile_px=tile_px, tile_batch=tile_batch)[0]
        if picture.pixels.shape[2] == 1:
            hq = hq.mean(0, keepdim=True)
        factor = self.scale if outscale is None else outscale
        width, height = max(1, round(picture.width * factor)), max(1, round(picture.height * factor))
        out = _resized(hq.permute(1, 2, 0).float().cpu().numpy(), width, height)
        dtype: Any = picture.pixels.dtype.type
        alpha = None
        if picture.alpha is not None:
            limit = np.iinfo(dtype).max
            alpha = (_resized(picture.alpha.astype(np.float32), width, height)[..., 0].clip(0, limit) + 0.5).astype(dtype)
        pixels = images.from_tensor(torch.from_numpy(np.ascontiguousarray(out)).permute(2, 0, 1)[None], dtype=dtype)
        return replace(picture, pixels=pixels, alpha=alpha)

    @torch.inference_mode()
    def upscale_tensor(
        self,
        lq: Tensor,
        *,
        seed: int = 0,
        tile_px: int | None = None,
        tile_batch: int | None = None,
        noise: Callable[[int], Tensor] | None = None,
    ) -> Tensor:
        """Upscale a picture in [-1, 1], (1, 3, h, w) of any size -> (1, 3, h * scale, w * scale) float32, clamped to [-1, 1].

        Args:
            lq: on the device of the model.
            seed: of the noise.
            tile_px: side of a tile in input pixels.
            tile_batch: tiles at a time.
            noise: replaces the noise field: `noise(step)` of the shape of the padded latent. For parity tests.

        Raises:
            ValueError: wrong shape, or tile_px too small.
        """
        if lq.ndim != 4 or lq.shape[:2] != (1, 3) or 0 in lq.shape:
            raise ValueError(f"lq must be (1, 3, h, w) with h and w at least 1, got {tuple(lq.shape)}")
        if tile_batch is not None and tile_batch < 1:
            raise ValueError(f"tile_batch must be at least 1, got {tile_batch}")
        height, width = lq.shape[-2] * self.scale, lq.shape[-1] * self.scale
        per_call = tile_batch or (1 if self.device.type == "cpu" else 8)
        lq, plan = self._tiles(lq, tile_px)
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32):
            y0 = self._encode(upsample(lq, self.scale), plan, per_call)
            if noise is None:
                noise = NoiseField(seed, "upscale", channels=y0.shape[1]).for_latent(y0.shape[-2], y0.shape[-1], self.device)

            def denoise(x_t: Tensor, t: Tensor) -> Tensor:
                def tiles(x_tile: Tensor, y_tile: Tensor, lq_tile: Tensor) -> Tensor:
                    one = network_denoiser(self.unet, lq_tile, y_tile, self.schedule, self.config.target, latent=self.config.latent_scaling)
                    return one(x_tile, t.expand(x_tile.shape[0])).float()

                lq_ratio = self.config.unet.lq_ratio
                return map_tiles(tiles, [(x_t, 1), (y0, 1), (lq, lq_ratio)], plan, tile_batch=per_call)

            latent = sample(denoise, y0, self.schedule, noise)
            out = self._decode(latent, plan, per_call)
        return out[..., :height, :width].float().clamp(-1, 1)

    def _tiles(self, lq: Tensor, tile_px: int | None) -> tuple[Tensor, TilePlan]:
        """Extend the picture so that it can be cut, and cut it. The unit is the latent position."""
        config = self.config
        ratio, multiple = config.unet.lq_ratio, config.unet.size_multiple
        side = (tile_px if tile_px is not None else 128) // ratio // multiple * multiple
        if side < multiple:
            raise ValueError(f"tile_px must be at least {multiple * ratio} for this model, got {tile_px}")
        sizes = [-(-length // ratio) for length in lq.shape[-2:]]
        sizes = [size if size > side else -(-size // multiple) * multiple for size in sizes]
        return reflect_to(lq, sizes[0] * ratio, sizes[1] * ratio), plan_tiles(sizes[0], sizes[1], side, side // 8)

    def _encode(self, picture: Tensor, plan: TilePlan, tile_batch: int) -> Tensor:
        if isinstance(self.first_stage, PixelUnshuffle):  # looks at no neighbour: no tiles needed
            return self.first_stage.encode(picture).float()
        factor = self.first_stage.factor
        return map_tiles(lambda x: self.first_stage.encode(x).float(), [(picture, factor)], plan, tile_batch=tile_batch)

    def _decode(self, latent: Tensor, plan: TilePlan, tile_batch: int) -> Tensor:
        if isinstance(self.first_stage, PixelUnshuffle):
            return self.first_stage.decode(latent)
        factor = self.first_stage.factor
        return map_tiles(lambda z: self.first_stage.decode(z).float(), [(latent, 1)], plan, output_scale=factor, tile_batch=tile_batch)


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device that `device` names; "auto" takes CUDA, then MPS, then the CPU."""
    if device != "auto":
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resolve_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype that `dtype` names for `device`; "auto" is bfloat16 on CUDA cards that have it, else float32.

    Raises:
        ValueError: unknown name.
    """
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if dtype not in named:
        raise ValueError(f"dtype must be auto, {', '.join(named)}, got {dtype!r}")
    return named[dtype]


def _channels_of(array: NDArray[Any]) -> int:
    if array.dtype.type not in (np.uint8, np.uint16):
        raise ValueError(f"an array must be uint8 or uint16, got {array.dtype}")
    channels = 1 if array.ndim == 2 else array.shape[2] if array.ndim == 3 else 0
    if channels not in (1, 3, 4) or 0 in array.shape:
        raise ValueError(f"an array must be (H, W) or (H, W, 1 | 3 | 4) and not empty, got {array.shape}")
    return channels


def _resized(image: NDArray[np.float32], width: int, height: int) -> NDArray[np.float32]:
    """Bring (H, W, C) or (H, W) float32 to another size -> (height, width, C): area averaging when shrinking, bicubic when growing."""
    if (image.shape[1], image.shape[0]) != (width, height):
        shrinks = width < image.shape[1] or height < image.shape[0]
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)  # type: ignore[assignment]
    return image[..., None] if image.ndim == 2 else image


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where the files of a model are, and what it is."""

    name: str
    config: ModelConfig
    unet: Path
    first_stage: Path | None

    def identity(self) -> str:
        """Return 16 hexadecimal digits that change with any weight or setting of the model."""
        digest = hashlib.sha256(json.dumps(to_dict(self.config), sort_keys=True).encode())
        for path in (self.unet, self.first_stage):
            if path is not None:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()[:16]


def locate_model(
    source: str | Path,
    *,
    preset_name: str | None = None,
    first_stage: str | Path | None = None,
    accept_licence: bool = False,
) -> ModelFiles:
    """Find the files of a model without loading them; arguments and errors as in `Upscaler.from_pretrained`."""
    source = str(source)
    accept_licence = accept_licence or os.environ.get("RESSHIFT_ACCEPT_LICENCE") == "1"
    path = Path(source).expanduser()
    stage = Path(first_stage).expanduser() if first_stage is not None else None
    shipped = weights.PRETRAINED / source
    if path.is_dir() or (shipped / "config.json").is_file():
        directory = path if path.is_dir() else shipped
        name, config = weights.read_model_config(directory)
        averaged = directory / "ema.safetensors"
        own_stage = directory / "first_stage.safetensors"
        unet = averaged if averaged.is_file() else directory / "model.safetensors"
        return ModelFiles(name, config, unet, stage or (own_stage if own_stage.is_file() else None))
    if path.is_file():
        return _located_file(path, preset_name, stage)
    if source in weights.RELEASED:
        unet_file, stage_file = weights.RELEASED[source]
        unet = weights.fetch(unet_file, accept_licence=accept_licence)
        return ModelFiles(source, preset(source).model, unet, stage or weights.fetch(stage_file, accept_licence=accept_licence))
    names = sorted({entry.name for entry in weights.PRETRAINED.glob("*") if (entry / "config.json").is_file()} | weights.RELEASED.keys())
    raise WeightsError(f"no model {source!r}: give one of {', '.join(names)}, a model directory, or a weight file")


def _located_file(path: Path, preset_name: str | None, stage: Path | None) -> ModelFiles:
    embedded = weights.embedded_model_config(path)
    if embedded is not None and preset_name is None:
        return ModelFiles(*embedded, path, stage)
    if (path.parent / "config.json").is_file() and preset_name is None:
        return ModelFiles(*weights.read_model_config(path.parent), path, stage)
    if preset_name is None:
        preset_name = next((name for name, (file, _) in weights.RELEASED.items() if file.name == path.name), None)
    if preset_name is None:
        raise WeightsError(f"{path} does not say which model it is: give preset_name, one of {', '.join(PRESETS)}")
    try:
        config = preset(preset_name).model
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    beside = path.with_name(weights.VQ_F4.name)
    return ModelFiles(preset_name, config, path, stage or (beside if beside.is_file() else None))
