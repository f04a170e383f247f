"""The method on a picture of any size, row of tiles by row of tiles: bicubic or g, encode, T steps, decode.

    read -> lq -> enlarge, encode -> y0, x_T -> step T -> x_{T-1} -> ... -> step 1 -> x_0 -> decode -> emit

`Chain` is a model of this kind. `row_chain` composes its work from the stages of `resshift.tiles.stages`,
each with the windows that it reads and the output that takes its rows. Values are float32 between stages,
whatever the networks compute in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from resshift.config import ModelConfig, Sampling
from resshift.devices import autocast
from resshift.diffusion import prior_sample
from resshift.networks.autoencoder import FirstStage, PixelUnshuffle
from resshift.networks.config import ConvUNetConfig
from resshift.resize.bicubic import upsample
from resshift.sampler import network_denoiser, reverse_step
from resshift.schedule import Sampler, ShiftSchedule
from resshift.tiles.batching import Work
from resshift.tiles.memory import Backoff, place_windows, tiles_per_call
from resshift.tiles.noise import LatentNoise, NoiseField
from resshift.tiles.plan import TilePlan, choose_tiles, reflected
from resshift.tiles.rows import BAND_VALUES, Emit, ReadRows, RowEmitter, RowReader
from resshift.tiles.stages import Input, Output, Stage, TileCount, TileStage, capacity, column_parts, drive
from resshift.tiles.window import Allocate, RowBuffer, in_memory

# Bicubic interpolation reads two rows and columns beyond.
_HALO = 2
# A VQ tile of this many latent positions (245 x 245) spends as much in its attention as in everything else.
_VQ_ATTENTION_POSITIONS = 60_000


@dataclass(frozen=True)
class Networks:
    """What the chain computes with: networks, schedule, device and precision, and what is known of the
    memory.
    """

    config: ModelConfig
    unet: Callable[..., Tensor]
    first_stage: FirstStage
    schedule: ShiftSchedule
    device: torch.device
    dtype: torch.dtype = torch.float32
    backoff: Backoff = field(default_factory=Backoff)
    fidelity: float = 0.0
    sampler: Sampler = Sampler.POSTERIOR

    @property
    def unshuffles(self) -> bool:
        """The first stage looks at no neighbour: no tiles needed."""
        return isinstance(self.first_stage, PixelUnshuffle)

    @property
    def regression(self) -> Callable[[Tensor], Tensor] | None:
        """g, if y0 = encode(g(lq))."""
        return getattr(self.unet, "regression", None)

    def estimate(self, lq: Tensor) -> Tensor:
        """(n, 3, h, w) -> y0 = encode(g(lq)), float32."""
        assert self.regression is not None
        with autocast(self.device, self.dtype):
            return self.encode(self.backoff.call(self.regression, lq))

    def encode(self, upsampled: Tensor) -> Tensor:
        """(n, 3, H, W) -> latents, float32."""
        with autocast(self.device, self.dtype):
            return self.backoff.call(self.first_stage.encode, upsampled).float()

    def decode(self, latent: Tensor) -> Tensor:
        """Latents -> (n, 3, H, W), float32."""
        with autocast(self.device, self.dtype):
            return self.backoff.call(self.first_stage.decode, latent).float()

    def predict_x0(self, x_t: Tensor, y0: Tensor, lq: Tensor, t: Tensor) -> Tensor:
        """Predict x0 of a batch of tiles, each at the step of index t, int64 (n,). The last prediction is
        mixed with y0, see `Sampling.fidelity`. `lq` has a fourth channel where the network sees masks.
        """
        if self.fidelity == 1:
            return y0  # what the steps before it make of it has no share
        config = self.config

        def predict(x_t: Tensor, y0: Tensor, lq: Tensor, t: Tensor) -> Tensor:
            return network_denoiser(
                self.unet,
                lq[:, :3],
                y0,
                self.schedule,
                config.target,
                lq[:, 3:] if config.fills_holes else None,
                latent=config.latent_scaling,
                sees_y0=config.unet.sees_y0,
            )(x_t, t)

        with autocast(self.device, self.dtype):
            x0 = self.backoff.call(predict, x_t, y0, lq, t).float()
        if not self.fidelity:
            return x0
        return torch.where((t == 0)[:, None, None, None], torch.lerp(x0, y0, self.fidelity), x0)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Enlarged(Input):
    """The bicubic enlargement of the picture, made where it is read, so that it never exists whole.

    Sample positions are multiples of 1/8 pixel at scales that are powers of two, so any cut gives the same
    values.
    """

    enlargement: int
    device: torch.device

    def read(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Return latent positions [top, bottom) x [left, right) of the enlargement, (3, (bottom - top) f,
        (right - left) f).
        """
        first, end = max(0, self.first_row(top)), min(self.window.height, bottom * self.scale + self.halo)
        begin = max(0, left * self.scale - self.halo)
        stop = min(self.window.width, right * self.scale + self.halo)
        rows = self.window.read(first, end, begin, stop)[None, :3].to(self.device)
        enlarged = upsample(rows, self.enlargement)[0]
        down, across = (
            (position * self.scale - origin) * self.enlargement
            for position, origin in ((top, first), (left, begin))
        )
        height, width = (
            (end - start) * self.scale * self.enlargement for start, end in ((top, bottom), (left, right))
        )
        return enlarged[:, down : down + height, across : across + width]


@dataclass(frozen=True, slots=True)
class _Prior:
    """Take y0, and draw the prior x_T from it."""

    networks: Networks
    noise: LatentNoise
    y0: RowBuffer
    x_t: RowBuffer

    def take(self, blended: RowBuffer, top: int, bottom: int) -> None:
        for columns in column_parts(blended.width):
            y0 = blended.read(top, bottom, columns.start, columns.stop).to(self.networks.device)
            self.begin(top, columns.start, y0)

    def begin(self, top: int, left: int, y0: Tensor) -> None:
        """Take a rectangle of y0, (Z, height, width) on the device."""
        for plane in (self.y0, self.x_t):
            plane.extend(top + y0.shape[1])
        self.y0.write(top, left, y0)
        schedule = self.networks.schedule
        if not schedule.kappa:  # nothing is drawn: x_T is y0
            self.x_t.write(top, left, y0)
            return
        noise = _noise_like(y0, self.noise, schedule.steps, top, left)
        self.x_t.write(top, left, prior_sample(y0, noise, schedule))


@dataclass(frozen=True, slots=True)
class _Reverse:
    """Take the prediction of x0 at a step, and go back to x_{t-1}."""

    networks: Networks
    noise: LatentNoise
    i_step: int
    y0: RowBuffer
    x_t: RowBuffer
    x_prev: RowBuffer

    def take(self, blended: RowBuffer, top: int, bottom: int) -> None:
        networks, device = self.networks, self.networks.device
        self.x_prev.extend(bottom)
        t = torch.full((1,), self.i_step, dtype=torch.int64, device=device)
        for columns in column_parts(blended.width):
            x_prev = x0_pred = blended.read(top, bottom, columns.start, columns.stop).to(device)
            if self.i_step:  # the last step returns the prediction itself: no noise is drawn
                x_t, y0 = (
                    plane.read(top, bottom, columns.start, columns.stop).to(device)[None]
                    for plane in (self.x_t, self.y0)
                )
                noise = None
                if networks.sampler is Sampler.POSTERIOR:
                    noise = _noise_like(x_t[0], self.noise, self.i_step, top, columns.start)[None]
                x_prev = reverse_step(x_t, x0_pred[None], t, noise, networks.schedule, y0)[0]
            self.x_prev.write(top, columns.start, x_prev)


@dataclass(frozen=True, slots=True)
class _DecodeRows:
    """Take the last prediction of x0, decode it without neighbours, and emit it."""

    networks: Networks
    emit: Emit

    def take(self, blended: RowBuffer, top: int, bottom: int) -> None:
        step = max(1, BAND_VALUES // (self.networks.first_stage.channels * blended.width))
        for first in range(top, bottom, step):
            self.emit(self.networks.decode(blended.read(first, min(bottom, first + step))[None])[0])


@dataclass(kw_only=True)
class _EncodeRows:
    """Enlarge and rearrange pixels, in the rows that the steps advance by."""

    plan: TilePlan
    networks: Networks
    enlarged: _Enlarged
    prior: _Prior
    i_row: int = field(default=0, init=False)

    def needs(self) -> list[tuple[RowBuffer, int]]:
        return [(self.enlarged.window, self.enlarged.first_row(self.plan.rows.first_from(self.i_row)))]

    def is_ready(self) -> bool:
        rows = self.plan.rows
        return self.i_row < len(rows.starts) and self.enlarged.is_complete(rows.complete(self.i_row)[1])

    def run(self) -> Work[None]:
        top, bottom = self.plan.rows.complete(self.i_row)
        for columns in column_parts(self.plan.columns.length):
            enlarged = self.enlarged.read(top, bottom, columns.start, columns.stop)
            self.prior.begin(top, columns.start, self.networks.encode(enlarged[None])[0])
        self.i_row += 1
        yield from ()  # rearranging pixels needs no network


@dataclass(frozen=True, slots=True)
class _Both:
    """Two outputs of the same rows."""

    first: Output
    second: Output

    def take(self, blended: RowBuffer, top: int, bottom: int) -> None:
        self.first.take(blended, top, bottom)
        self.second.take(blended, top, bottom)


def _noise_like(x: Tensor, noise: LatentNoise, step: int, top: int, left: int) -> Tensor:
    return noise(step, top, left, x.shape[1], x.shape[2]).to(x.device)


class Windows:
    """All windows of a run.

    Args:
        networks: Networks of the model.
        plan: Tiles of the latent plane.
        allocate: Where the windows live.
        num_decoded: Number of predictions of x0 that are decoded.
    """

    def __init__(self, networks: Networks, plan: TilePlan, allocate: Allocate, num_decoded: int = 1) -> None:
        steps, ratio = networks.schedule.steps, networks.config.unet.lq_ratio
        stage, height, width = networks.first_stage, plan.rows.length, plan.columns.length
        self.all: list[RowBuffer] = []

        def window(channels: int, scale: int, rows: int) -> RowBuffer:
            self.all.append(RowBuffer(channels, height * scale, width * scale, rows, allocate))
            return self.all[-1]

        def latent(num_consumers: int) -> RowBuffer:
            return window(stage.channels, 1, capacity(plan.rows, num_consumers))

        tall = capacity(plan.rows, steps + 1)
        channels = 3 + networks.config.fills_holes
        self.lq = window(channels, ratio, min(height * ratio, tall * ratio + 2 * _HALO))
        self.y0 = latent(steps + 1)
        self.x = [latent(1) for _ in range(steps)]  # x[i] is the input of the step of index i
        self.x0_pred = [latent(0) for _ in range(steps)]
        if not networks.unshuffles or networks.regression is not None:
            self.encoded = latent(0)
        if not networks.unshuffles:
            self.x0 = [latent(1) for _ in range(num_decoded)]
            rows = capacity(plan.rows, 0) * stage.factor
            self.decoded = [window(3, stage.factor, rows) for _ in range(num_decoded)]

    @property
    def num_bytes(self) -> int:
        """Bytes of all windows."""
        return sum(one.num_bytes for one in self.all)


def window_bytes(networks: Networks, plan: TilePlan, num_decoded: int = 1) -> int:
    """Return the bytes of all windows of a run."""
    return Windows(networks, plan, in_memory(torch.device("meta")), num_decoded).num_bytes


def row_chain(
    networks: Networks,
    plan: TilePlan,
    size: tuple[int, int],
    *,
    read: ReadRows,
    noise: LatentNoise,
    emit: Emit,
    allocate: Allocate,
    batch: int,
    count: TileCount | None = None,
    shown: Sequence[Emit] = (),
) -> Work[None]:
    """Return the chain over one picture, to be run once.

    Args:
        networks: Networks of the model.
        plan: Tiles of the latent plane; its rows and columns may reach beyond the picture, which is then
            extended by reflection.
        size: Height and width of the picture.
        read: Function that returns rows of the picture. It is called with increasing rows, but at the end
            perhaps once more with the last ones.
        noise: Noise of the chain.
        emit: Takes the result, extension included, from the top to the bottom; the result is not clamped.
        allocate: Where windows live.
        batch: Number of tiles in a call.
        count: Count of the tiles that are done.
        shown: See `resshift.tiles.rows.Renderer`.
    """
    windows, ratio = Windows(networks, plan, allocate, 1 + len(shown)), networks.config.unet.lq_ratio
    rows, columns = reflected(size[0], windows.lq.height), reflected(size[1], windows.lq.width)
    lq, y0 = Input(window=windows.lq, scale=ratio), Input(window=windows.y0)
    enlarged = _Enlarged(
        window=windows.lq,
        scale=ratio,
        halo=_HALO,
        enlargement=networks.config.scale,
        device=networks.device,
    )
    prior = _Prior(networks, noise, windows.y0, windows.x[-1])
    tiles = partial(TileStage, plan=plan, device=networks.device, batch=batch, count=count)

    def step(i: int, output: Output) -> Stage:
        inputs, blended = [Input(window=windows.x[i]), y0, lq], windows.x0_pred[i]
        return tiles(function=networks.predict_x0, inputs=inputs, blended=blended, output=output, i_step=i)

    stages: list[Stage] = [
        RowReader(plan=plan, lq=windows.lq, ratio=ratio, rows=rows, columns=columns, read=read, halo=_HALO)
    ]
    if networks.regression is not None:
        stages.append(tiles(function=networks.estimate, inputs=[lq], blended=windows.encoded, output=prior))
    elif networks.unshuffles:
        stages.append(_EncodeRows(plan=plan, networks=networks, enlarged=enlarged, prior=prior))
    else:
        stages.append(
            tiles(function=networks.encode, inputs=[enlarged], blended=windows.encoded, output=prior)
        )

    def decoded(i: int, take: Emit) -> tuple[Output, list[Stage]]:
        """Return what takes a prediction of x0 to be decoded, the i-th of them, and the stages behind it."""
        if networks.unshuffles:
            return _DecodeRows(networks, take), []
        factor, x0 = networks.first_stage.factor, windows.x0[i]
        decoding = tiles(
            function=networks.decode,
            inputs=[Input(window=x0)],
            blended=windows.decoded[i],
            output=RowEmitter(factor, take),
            scale=factor,
        )
        return _Reverse(networks, noise, 0, windows.y0, windows.x[0], x0), [decoding]

    for i in range(networks.schedule.steps - 1, 0, -1):
        output: Output = _Reverse(networks, noise, i, windows.y0, windows.x[i], windows.x[i - 1])
        behind: list[Stage] = []
        if shown:
            picture, behind = decoded(i, shown[networks.schedule.steps - 1 - i])
            output = _Both(output, picture)
        stages += [step(i, output), *behind]
    output, behind = decoded(0, emit)
    return drive([*stages, step(0, output), *behind])


@dataclass(eq=False)
class Chain:
    """A model that predicts x0 at every step of a chain; see `resshift.tiles.rows.Renderer`.

    A position of its plans is a position of the latent.
    """

    config: ModelConfig
    unet: nn.Module
    first_stage: FirstStage
    device: torch.device
    dtype: torch.dtype = torch.float32
    backoff: Backoff = field(default_factory=Backoff)
    _networks: dict[tuple[int, float, Sampler], Networks] = field(
        default_factory=dict[tuple[int, float, Sampler], Networks], init=False
    )

    def __post_init__(self) -> None:
        self.schedule = ShiftSchedule.from_config(self.config.schedule)

    @property
    def ratio(self) -> int:
        return self.config.unet.lq_ratio

    @property
    def smallest(self) -> int:
        return self.config.unet.smallest_tile

    @property
    def fixes_colour(self) -> bool:
        """Noise leaves the low band a little off (`resshift.tiles.colour_fix`); a hole has none."""
        return not self.config.fills_holes

    def networks(
        self, steps: int | None = None, fidelity: float | None = None, sampler: str | None = None
    ) -> Networks:
        """Return what a chain of `steps` (default: all) computes with; see `Sampling`.

        Raises:
            ValueError: The model was trained with fewer steps.
        """
        # Kept: tables on the device are cached by schedule, and pictures share the calls of one object.
        steps = self.schedule.steps if steps is None else steps
        key = steps, float(fidelity or 0), Sampler(sampler or Sampler.POSTERIOR)
        if key not in self._networks:
            self._networks[key] = Networks(
                self.config,
                self.unet,
                self.first_stage,
                self.schedule.shortened(steps),
                self.device,
                self.dtype,
                self.backoff,
                *key[1:],
            )
        return self._networks[key]

    def plan(self, height: int, width: int, longest: int | None) -> TilePlan:
        """Return the tiles of a picture of height x width pixels."""
        has_attention = not isinstance(self.first_stage, PixelUnshuffle)
        return choose_tiles(
            -(-height // self.ratio),
            -(-width // self.ratio),
            self.config.unet.size_multiple,
            smallest=self.smallest,
            longest=longest,
            step=self.config.unet.size_multiple if isinstance(self.config.unet, ConvUNetConfig) else 1,
            attention_positions=_VQ_ATTENTION_POSITIONS if has_attention else float("inf"),
        )

    def notes(self, plan: TilePlan) -> tuple[str, ...]:
        """Tiles are blended at every step: there is nothing to say."""
        return ()

    def work(
        self,
        plan: TilePlan,
        size: tuple[int, int],
        sampling: Sampling,
        *,
        read: ReadRows,
        emit: Emit,
        noise: LatentNoise | None = None,
        batch: int | None = None,
        count: TileCount | None = None,
        shown: Sequence[Emit] = (),
    ) -> Work[None]:
        """Compute a picture, once."""
        networks = self.networks(sampling.steps, sampling.fidelity, sampling.sampler)
        if noise is None:
            noise = NoiseField(int(sampling.seed), "upscale", channels=self.first_stage.channels).window
        yield from row_chain(
            networks,
            plan,
            size,
            read=read,
            noise=noise,
            emit=emit,
            allocate=place_windows(window_bytes(networks, plan, 1 + len(shown)), self.device),
            batch=batch or tiles_per_call(plan.tile_area),
            count=count,
            shown=shown,
        )
