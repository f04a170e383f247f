"""Picture in, picture out: the composition of networks, tiles and noise that bulk jobs, serving, evaluation
and notebooks all use.

    lq -> reflect to whole tiles -> bicubic -> encode -> y0
    y0 -> chain; at every step the prediction of x0 is made tile by tile and blended -> x0
    x0 -> decode -> crop -> colour fix -> resize

Between reflection and crop stands the model (`resshift.tiles.rows.Renderer`): the chain of ResShift as above,
or one network from picture to picture, ours or one that spandrel reads.

The noise is a function of (seed, step, absolute latent position), tiles are a function of the picture's size
and the options, and no tile's result depends on what is computed beside it: the same picture, options and
type of device give the same bytes.

The result is `outscale` times as large as the input. The model has one scale; its result is brought to any
other by bicubic resizing, antialiased when it shrinks. Beyond the model's scale that adds size, not detail,
and a note of the result says so; with `cascade` the model makes its result larger again instead. Before the
last pass the picture is brought to the size from which that pass reaches the wanted one.
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

from resshift import images, seeds, weights
from resshift.config import ModelConfig, OptionError, Sampling
from resshift.devices import Module, on_device, resolve_device, resolve_dtype
from resshift.faces.align import SIDE_PX, aligned, pasted
from resshift.faces.detect import yunet
from resshift.faces.restore import NO_FACE, face_seed, similarities
from resshift.images import Picture, scaled
from resshift.images.alpha import fill_transparent
from resshift.images.masks import with_mask
from resshift.models import AnyModelConfig, Dtype, ModelFiles, WeightsError, locate_model
from resshift.models.files import machine_bytes
from resshift.networks import convolution
from resshift.networks.autoencoder import PixelUnshuffle, VQAutoencoder, build_first_stage
from resshift.networks.config import ForeignConfig, RegressionConfig
from resshift.networks.conv_unet import build_unet
from resshift.networks.foreign import ForeignNet
from resshift.networks.foreign import load as load_foreign
from resshift.networks.holes import fill_holes
from resshift.networks.regression import RegressionNet
from resshift.tiles.batching import Work, alone
from resshift.tiles.chain import Chain
from resshift.tiles.direct import Direct
from resshift.tiles.memory import is_out_of_memory
from resshift.tiles.noise import cut_from_whole
from resshift.tiles.output import RowOutput, resize_alpha
from resshift.tiles.plan import TilePlan
from resshift.tiles.rows import Renderer
from resshift.tiles.stages import TileCount

Pixels = TypeVar("Pixels", Image.Image, NDArray[Any])


class Upscaler:
    """A model that is ready to upscale pictures.

        up = Upscaler.from_pretrained("tiny-x4")
        out = up(image)                             # PIL.Image or HWC array in, the same kind out
        out = up(image, outscale=2.5, seed=7, tile_px=128)
        out = Upscaler.from_pretrained("inpaint-imagenet-s4")(image, mask=mask)     # fills the hole

    Args:
        config: Configuration of the model.
        network: Network of the model with its weights: the U-Net of a chain, or the one network that maps
            (n, 3, h, w) to (n, 3, h scale, w scale), both in [-1, 1].
        first_stage: Autoencoder or pixel rearrangement of a chain, with its weights; default: as `config`
            says.
        name: Name in reports.
        identity: Text that changes with any weight or setting of the model; part of a job's fingerprint.
        device: Device of the networks; "auto" takes CUDA, then Apple's MPS, then the CPU.
        dtype: Precision of the networks' arithmetic; "auto" is bfloat16 on CUDA cards that have it, for
            networks that support it, else float32. The chain is float32 always.
        optimise: Use the faster forms of the networks' layers (`resshift.networks.convolution`); they round
            differently.
    """

    def __init__(
        self,
        config: AnyModelConfig,
        network: nn.Module,
        first_stage: VQAutoencoder | PixelUnshuffle | None = None,
        *,
        name: str = "custom",
        identity: str = "",
        device: str | torch.device = "auto",
        dtype: Dtype = "auto",
        optimise: bool = True,
    ) -> None:
        self.config = config
        self.name = name
        self.identity = identity
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        if dtype == "auto" and isinstance(config, ForeignConfig) and not config.supports_bfloat16:
            self.dtype = torch.float32

        def ready(module: Module) -> Module:
            channels_last = not isinstance(module, ForeignNet) or module.allows_channels_last
            module = on_device(module.eval().requires_grad_(False), self.device, channels_last)
            if optimise and self.device.type == "cpu" and self.dtype == torch.float32:
                convolution.prepare(module)
            return module

        self.renderer: Renderer
        if isinstance(config, ModelConfig):
            stage = build_first_stage(config.first_stage) if first_stage is None else first_stage
            self.renderer = Chain(config, ready(network), ready(stage), self.device, self.dtype)
        else:
            self.renderer = Direct(config, ready(network), self.device, self.dtype)

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
            source: Name of a model that ships ("tiny-x4") or whose weights are published ("realsr-x4-s4"); or
                a model directory, checkpoint, run or weight file, as a path, file://, s3:// or hf://
                (`resshift.models.locate`).
            device: Device of the networks, see the class.
            dtype: Precision, see the class; unless it is "auto" it replaces what `source` asks for
                (`tiny-x4@bfloat16`).
            preset_name: Preset of a bare weight file, if the shapes of its tensors leave several.
            first_stage: Weights of the autoencoder of a bare file; default: the released file beside it.
            accept_licence: Whether you agree to the licence of published weights, so that they may be
                downloaded (or set RESSHIFT_ACCEPT_LICENCE=1).

        Raises:
            WeightsError: No such model, or its weights do not fit; the message says what is allowed.
        """
        found = locate_model(
            source, preset_name=preset_name, first_stage=first_stage, accept_licence=accept_licence
        )
        return cls.from_files(found if dtype == "auto" else replace(found, dtype=dtype), device=device)

    @classmethod
    def from_files(cls, found: ModelFiles, *, device: str | torch.device = "auto") -> Upscaler:
        """Load a model whose files have been found; errors as in `from_pretrained`."""
        if (memory := machine_bytes()) is not None:
            found.check_memory(memory, "this machine")
        network, stage = load_networks(found)
        return cls(
            found.config,
            network,
            stage,
            name=found.name,
            identity=found.identity(),
            device=device,
            dtype=found.dtype,
        )

    @property
    def scale(self) -> int:
        """Native scale: sides of the output over sides of the input."""
        return self.config.scale

    @property
    def fills_holes(self) -> bool:
        """Whether the model fills holes, so that pictures need masks."""
        return isinstance(self.config, ModelConfig) and self.config.fills_holes

    @property
    def shares_calls(self) -> bool:
        """Whether tiles of several pictures are computed together; a CPU computes them one by one."""
        return self.device.type != "cpu"

    @property
    def chain(self) -> Chain:
        """The chain with its networks.

        Raises:
            ValueError: The model is one call of one network.
        """
        if not isinstance(self.renderer, Chain):
            raise ValueError(f"{self.name} has no chain")
        return self.renderer

    def __call__(
        self,
        image: Pixels,
        *,
        mask: Image.Image | NDArray[Any] | None = None,
        seed: int = 0,
        outscale: float | None = None,
        cascade: bool = False,
        steps: int | None = None,
        sampler: str | None = None,
        fidelity: float | None = None,
        faces: str | None = None,
        tile_px: int | None = None,
        tile_batch: int | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Pixels:
        """Upscale an image.

        Args:
            image: PIL image of any common mode, or array (H, W), (H, W, 1 | 3 | 4), uint8 or uint16, RGB
                order, fourth channel alpha.
            mask: For models that fill holes: image or array, bool as well, of the size of `image`, bright or
                transparent in the hole (`resshift.images.masks`); default: what is transparent in `image`.
                What the hole hides is never looked at, and all other pixels come back as they were.
            seed: Seed of the noise; the same seed gives the same pixels. Without a chain there is no noise.
            outscale: Sides of the result over sides of the input, in (0, 16]; default: the model's own scale.
            cascade: Whether an `outscale` beyond the model's is made by further passes of the model, not by
                bicubic interpolation.
            steps: Steps of the chain, see `Sampling`.
            sampler: "posterior" or "ddim", see `Sampling`.
            fidelity: From 0, the model, to 1, which invents nothing, see `Sampling`.
            faces: File of a face detector, see `Sampling`: only faces are restored, by a model of scale 1.
            tile_px: Longest side of a tile in input pixels, see `Sampling`.
            tile_batch: Number of tiles in one call of the network on a GPU, see `Sampling`.
            progress: Function that is called after every tile with the share of the tiles that are done, in
                (0, 1]. It begins again if memory runs out and smaller tiles are tried.

        Returns:
            The same kind: a PIL image (grey stays grey, alpha stays), or an array of the same dtype and
            channels.

        Raises:
            ValueError: The image or an option is not usable; the message names the value and what is allowed.
        """
        sampling = Sampling(
            seed=seed,
            outscale=outscale,
            cascade=cascade,
            steps=steps,
            sampler=sampler,
            fidelity=fidelity,
            faces=faces,
            tile_px=tile_px,
            tile_batch=tile_batch,
        )
        return _like(image, self.upscale(_picture(image, mask), sampling, progress))

    def trajectory(
        self,
        image: Pixels,
        sampling: Sampling = Sampling(),
        *,
        mask: Image.Image | NDArray[Any] | None = None,
    ) -> list[Pixels]:
        """Return the picture that the chain predicts at each step, x0 by x_t: as many as there are steps, the
        last of them the result of `__call__` with the same options. A model without a chain has one.

        Args:
            image, mask: As for `__call__`; the pictures are of the kind of `image`.
            sampling: How pixels are made, without `cascade`.

        Raises:
            ValueError: The image or an option is not usable; the message names the value and what is allowed.
        """
        return [_like(image, one) for one in alone(self.predictions(_picture(image, mask), sampling))]

    def upscale(
        self,
        picture: Picture,
        sampling: Sampling = Sampling(),
        progress: Callable[[float], None] | None = None,
    ) -> Picture:
        """Upscale a decoded picture. ICC profile, EXIF and notes are handed on; `progress` is called as by
        `__call__`.

        When memory runs out for a single tile, smaller tiles are tried; the result then has a note, and this
        object remembers.
        """
        return alone(self.upscaling(picture, sampling, progress))

    def upscaling(
        self,
        picture: Picture,
        sampling: Sampling = Sampling(),
        progress: Callable[[float], None] | None = None,
    ) -> Work[Picture]:
        """Return `upscale` as a work for `resshift.tiles.batching.Batcher`, so that pictures share calls. The
        bytes are the same; errors are raised when the work runs.
        """
        if sampling.faces is not None:
            return (yield from self._restoring_faces(picture, sampling, progress))
        picture, factors = self._with_hole(picture), self._passes(sampling)
        made, total = picture, sum(before**2 for before in (1, *factors[:-1]))
        done, before = 0.0, 1.0
        for i, factor in enumerate(factors):
            size = scaled(picture.height, factor), scaled(picture.width, factor)
            seed = seeds.derive(sampling.seed, "pass", i) if i else sampling.seed
            told, share = progress, before**2 / total
            if progress is not None and len(factors) > 1:
                told = partial(_tell_part, progress, done, share)
            (made,) = yield from self._upscaling(made, size, replace(sampling, seed=seed), told)
            done, before = done + share, factor
        factor, scale = factors[-1], self.scale
        if len(factors) > 1:
            note = f"x{factor:g} is {len(factors)} passes of the model's x{scale}"
            return replace(made, notes=(*made.notes, note))
        if factor > scale:
            note = f"x{factor:g} is the model's x{scale} enlarged by bicubic interpolation"
            return replace(made, notes=(*made.notes, note))
        return made

    def predictions(self, picture: Picture, sampling: Sampling = Sampling()) -> Work[tuple[Picture, ...]]:
        """Return the pictures of `trajectory` as a work; see `upscaling`."""
        if sampling.cascade:
            raise OptionError("cascade", "must not be given where the steps of one chain are shown")
        if sampling.faces is not None:
            raise OptionError("faces", "must not be given where the steps of one chain are shown")
        factor = float(sampling.outscale or self.scale)
        size = scaled(picture.height, factor), scaled(picture.width, factor)
        picture = self._with_hole(picture)
        self.plan(picture.height, picture.width, sampling)  # refuses steps that the model has not
        number = sampling.steps or self.config.steps
        return (yield from self._upscaling(picture, size, sampling, None, number))

    def _restoring_faces(
        self, picture: Picture, sampling: Sampling, progress: Callable[[float], None] | None
    ) -> Work[Picture]:
        """Restore the faces that the detector of `sampling` finds; all else stays as it is, with a note of
        how many there were.
        """
        assert sampling.faces is not None
        self._check(sampling)
        picture = self._with_hole(picture)
        found = similarities(yunet(sampling.faces)(images.rgb_u8(picture)))
        pixels, notes = picture.pixels, picture.notes
        tile_px = sampling.tile_px or SIDE_PX  # a face is seen whole
        for i, to_square in enumerate(found):
            face = replace(picture, pixels=aligned(picture.pixels, to_square), alpha=None, notes=())
            options = replace(
                sampling, faces=None, outscale=None, tile_px=tile_px, seed=face_seed(sampling.seed, i)
            )
            told = progress and partial(_tell_part, progress, i / len(found), 1 / len(found))
            (square,) = yield from self._upscaling(face, (SIDE_PX, SIDE_PX), options, told)
            pixels, notes = pasted(pixels, square.pixels, to_square), notes + square.notes
        note = f"{len(found)} face{'s' * (len(found) > 1)} restored" if found else NO_FACE
        return replace(picture, pixels=pixels, notes=tuple(dict.fromkeys((*notes, note))))

    def _with_hole(self, picture: Picture) -> Picture:
        """Return a picture with its mask, if the model fills holes.

        Raises:
            ValueError: It has a mask, and the model fills none.
        """
        if self.fills_holes and picture.mask is None:
            return with_mask(picture, None)
        if picture.mask is not None and not self.fills_holes:
            raise ValueError(f"{self.name} fills no holes: a mask must not be given")
        return picture

    def _emptied(self, picture: Picture) -> Picture:
        """Return a picture with what the network sees in its hole, see `ModelConfig.hole`."""
        if picture.mask is None:
            return picture
        black = picture.pixels * ~picture.mask[..., None]
        if not self._starts_from_surroundings:
            return replace(picture, pixels=black)
        pixels = torch.from_numpy(black.astype(np.float32)).permute(2, 0, 1)[None]
        filled = fill_holes(pixels, torch.from_numpy(picture.mask)[None, None]).round()
        return replace(picture, pixels=filled[0].permute(1, 2, 0).numpy().astype(picture.pixels.dtype))

    @property
    def _starts_from_surroundings(self) -> bool:
        return isinstance(self.config, ModelConfig) and self.config.hole == "surroundings"

    def _passes(self, sampling: Sampling) -> list[float]:
        """Return the sides after each pass, over those of the input."""
        factors = [float(sampling.outscale or self.scale)]
        while sampling.cascade and factors[0] > self.scale > 1:
            factors.insert(0, factors[0] / self.scale)
        return factors

    def _upscaling(
        self,
        picture: Picture,
        size: tuple[int, int],
        sampling: Sampling,
        progress: Callable[[float], None] | None,
        num_shown: int = 1,
    ) -> Work[tuple[Picture, ...]]:
        """Upscale a picture to a size, (height, width), in one pass: what each of the last `num_shown` steps
        predicts, where 1 is the result alone and else all steps are meant.
        """
        hidden, (height, width) = fill_transparent(self._emptied(picture)), size
        dtype: Any = picture.pixels.dtype.type
        pixels = np.empty((num_shown, height, width, picture.pixels.shape[2]), dtype)
        backoff = self.renderer.backoff
        while True:
            plan, longest = self.plan(picture.height, picture.width, sampling), backoff.longest
            try:
                yield from self._fill(pixels, picture, hidden.pixels, plan, sampling, progress)
                break
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not backoff.shrink(plan, self.renderer.smallest, self.device):
                    raise
        notes = picture.notes + self.renderer.notes(plan)
        if longest is not None:
            notes += (f"tiles of at most {longest * self.renderer.ratio} px: memory ran out",)
        alpha = None if picture.alpha is None else resize_alpha(picture.alpha, height, width)
        return tuple(replace(picture, pixels=one, alpha=alpha, mask=None, notes=notes) for one in pixels)

    def upscale_tensor(
        self,
        lq: Tensor,
        sampling: Sampling = Sampling(),
        *,
        noise: Callable[[int], Tensor] | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Upscale a picture in [-1, 1], (1, 3, h, w) of any size -> (1, 3, h * scale, w * scale) float32,
        clamped to [-1, 1]; no colour fix.

        Args:
            lq: low-quality picture on the device of the model.
            sampling: How pixels are made; `outscale` must be None.
            noise: Function that replaces the noise field of a chain in parity tests: `noise(step)` of the
                shape of the padded latent, for steps T ... 1.
            mask: (1, 1, h, w), 1 in a hole, where lq is -1 unless `ModelConfig.hole` says otherwise, and -1
                elsewhere; for models that fill holes. The network's result is returned whole.

        Raises:
            ValueError: Wrong shape, or an option is not usable.
        """
        if sampling.outscale is not None:
            raise ValueError(
                f"outscale must be None for a tensor, which is not resized, got {sampling.outscale}"
            )
        if lq.ndim != 4 or lq.shape[:2] != (1, 3) or 0 in lq.shape:
            raise ValueError(f"lq must be (1, 3, h, w) with h and w at least 1, got {tuple(lq.shape)}")
        if (mask is not None) != self.fills_holes or (mask is not None and mask[0, 0].shape != lq.shape[2:]):
            needed = f"(1, 1, {lq.shape[2]}, {lq.shape[3]})" if self.fills_holes else "None"
            raise ValueError(f"mask must be {needed}, got {None if mask is None else tuple(mask.shape)}")
        if mask is not None and self._starts_from_surroundings:
            lq = fill_holes(lq, mask)
        inputs = lq if mask is None else torch.cat((lq, mask), dim=1)
        height, width = lq.shape[2:]
        bands: list[Tensor] = []
        work = self.renderer.work(
            self.plan(height, width, sampling),
            (height, width),
            sampling,
            read=lambda top, bottom: inputs[0, :, top:bottom],
            emit=lambda rows: bands.append(rows.clone()),
            noise=None if noise is None else cut_from_whole(noise),
            batch=self._batch(sampling),
        )
        alone(work)
        result = torch.cat(bands, 1)[None, :, : height * self.scale, : width * self.scale]
        return result.to(self.device).clamp(-1, 1)

    def plan(self, height: int, width: int, sampling: Sampling = Sampling()) -> TilePlan:
        """Return the tiles of a picture of this size, in positions of `renderer.ratio` pixels.

        Raises:
            ValueError: The model cannot do what `sampling` says.
        """
        self._check(sampling)
        asked = None if sampling.tile_px is None else sampling.tile_px // self.renderer.ratio
        limits = [side for side in (self.renderer.backoff.longest, asked) if side is not None]
        return self.renderer.plan(height, width, min(limits, default=None))

    def _check(self, sampling: Sampling) -> None:
        has_estimate = isinstance(self.config, ModelConfig) and self.config.has_estimate
        takes_faces = self.scale == 1 and not self.fills_holes
        config = self.config
        sampling.check_for("this model", config.steps, config.smallest_tile_px, has_estimate, takes_faces)

    def _fill(
        self,
        pixels: NDArray[Any],
        picture: Picture,
        source: NDArray[Any],
        plan: TilePlan,
        sampling: Sampling,
        progress: Callable[[float], None] | None,
    ) -> Work[None]:
        """Upscale `source`, what the network may see of a picture, (h, w, channels), to the size of `pixels`,
        (n, H, W, channels), which is written.
        """
        mask = picture.mask if self.scale == 1 else None
        shown = source if mask is None else picture.pixels
        outputs = [RowOutput(shown, one, self.scale, self.renderer.fixes_colour, mask).push for one in pixels]

        def read(top: int, bottom: int) -> Tensor:
            rows = images.to_tensor(source[top:bottom])[0]
            if picture.mask is not None:
                rows = torch.cat((rows, torch.from_numpy(picture.mask[None, top:bottom]).float() * 2 - 1))
            return rows.to(self.device)

        yield from self.renderer.work(
            plan,
            (source.shape[0], source.shape[1]),
            sampling,
            read=read,
            emit=outputs[-1],
            shown=outputs[:-1],
            batch=self._batch(sampling),
            count=None if progress is None else TileCount(progress),
        )

    def _batch(self, sampling: Sampling) -> int | None:
        """Return the number of tiles in a call; None is enough to keep a GPU busy."""
        return sampling.tile_batch if self.shares_calls else 1


def _picture(image: Image.Image | NDArray[Any], mask: Image.Image | NDArray[Any] | None = None) -> Picture:
    picture = images.from_pil(image) if isinstance(image, Image.Image) else images.from_array(image)
    if mask is None:
        return picture
    if not isinstance(mask, Image.Image) and mask.dtype == np.bool_:
        mask = np.uint8(255) * mask
    return with_mask(picture, _picture(mask))


def _like(image: Pixels, result: Picture) -> Pixels:
    """Return a result as the kind that `image` is."""
    if isinstance(image, Image.Image):
        return images.to_pil(result)
    array = images.to_array(result)
    return array[..., 0] if image.ndim == 2 else array


def _tell_part(progress: Callable[[float], None], done: float, share: float, part: float) -> None:
    progress(done + share * part)


def load_networks(found: ModelFiles) -> tuple[nn.Module, VQAutoencoder | PixelUnshuffle | None]:
    """Build the networks of a model on the CPU and read their weights: its network, and the first stage of a
    chain.

    Raises:
        WeightsError: The weights do not fit, or those of an autoencoder are missing.
    """
    config = found.config
    if isinstance(config, ForeignConfig):
        return load_foreign(found.unet, config), None
    if isinstance(config, RegressionConfig):
        return _filled(RegressionNet(config), found.unet), None
    stage = build_first_stage(config.first_stage)
    if not isinstance(stage, PixelUnshuffle):
        if found.first_stage is None:
            raise WeightsError(f"{found.name} needs the weights of its autoencoder: first_stage=FILE")
        _filled(stage, found.first_stage)
    return _filled(build_unet(config.unet), found.unet), stage


def _filled(network: Module, path: Path) -> Module:
    weights.load_into(network, weights.read_state_dict(path))
    return network
