"""The method on a picture of any size, row of tiles by row of tiles: bicubic, encode, T steps, decode.

`RowChain` wires the stages of `resshift.tiles.stages`: what each reads, what it does with a row of tiles that
is complete, and what may be given up. Values are float32 between stages, whatever the networks compute in.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from resshift.config import ModelConfig
from resshift.diffusion import prior_sample
from resshift.networks.autoencoder import FirstStage, PixelUnshuffle
from resshift.resize.bicubic import upsample
from resshift.sampler import network_denoiser, reverse_step
from resshift.schedule import ShiftSchedule
from resshift.tiles.batching import Work
from resshift.tiles.plan import TilePlan, reflected
from resshift.tiles.stages import Stage, TileStage, capacity, column_parts, drive
from resshift.tiles.window import Allocate, RowBuffer

# Bicubic interpolation reads two rows and columns beyond.
_HALO = 2
# Values of a band of the result that is handed on: 4 MiB in float32.
_BAND_VALUES = 2**20

ReadRows = Callable[
    [int, int], Tensor
]  # rows [top, bottom) of the input -> (3, bottom - top, width) in [-1, 1]
Emit = Callable[[Tensor], None]  # takes the next rows of the result, (3, n, width scale)


class Noise(Protocol):
    """Standard normal noise of a rectangle of the latent at a step, (Z, height, width)."""

    def __call__(self, step: int, top: int, left: int, height: int, width: int, /) -> Tensor: ...


def _directly(function: Callable[..., Tensor], *tiles: Tensor) -> Tensor:
    return function(*tiles)


@dataclass(frozen=True)
class Networks:
    """What the chain computes with: the networks, the precision they run in, and how a function is called on
    a batch of tiles.
    """

    config: ModelConfig
    unet: Callable[..., Tensor]
    first_stage: FirstStage
    schedule: ShiftSchedule
    device: torch.device
    precision: Callable[[], AbstractContextManager[object]] = nullcontext
    call: Callable[..., Tensor] = _directly

    @property
    def unshuffles(self) -> bool:
        """The first stage looks at no neighbour: no tiles needed."""
        return isinstance(self.first_stage, PixelUnshuffle)

    def encode(self, upsampled: Tensor) -> Tensor:
        """(n, 3, H, W) -> latents, float32."""
        with self.precision():
            return self.call(self.first_stage.encode, upsampled).float()

    def decode(self, latent: Tensor) -> Tensor:
        """Latents -> (n, 3, H, W), float32."""
        with self.precision():
            return self.call(self.first_stage.decode, latent).float()

    def predict_x0(self, x_t: Tensor, y0: Tensor, lq: Tensor, t: Tensor) -> Tensor:
        """Predict x0 of a batch of tiles, each at the step of index t, int64 (n,)."""
        config = self.config

        def predict(x_t: Tensor, y0: Tensor, lq: Tensor, t: Tensor) -> Tensor:
            return network_denoiser(
                self.unet, lq, y0, self.schedule, config.target, latent=config.latent_scaling
            )(x_t, t)

        with self.precision():
            return self.call(predict, x_t, y0, lq, t).float()


class RowChain:
    """One run over one picture.

    Args:
        networks: of the model.
        plan: tiles of the latent plane; its rows and columns may reach beyond the picture, which is then
            extended by reflection.
        size: height and width of the picture.
        read: gives rows of the picture. Calls go down, but at the end the last rows may be asked for again.
        noise: of the chain.
        emit: takes the result, extension included, from the top to the bottom; the result is not clamped.
        allocate: where windows live.
        batch: tiles in a call.
    """

    def __init__(
        self,
        networks: Networks,
        plan: TilePlan,
        size: tuple[int, int],
        *,
        read: ReadRows,
        noise: Noise,
        emit: Emit,
        allocate: Allocate,
        batch: int,
    ) -> None:
        self.networks, self.plan, self.read, self.noise, self.emit = networks, plan, read, noise, emit
        config, steps = networks.config, networks.schedule.steps
        self.ratio = config.unet.lq_ratio
        height, width, channels = plan.rows.length, plan.columns.length, networks.first_stage.channels
        self._rows = reflected(size[0], height * self.ratio)
        self._columns = reflected(size[1], width * self.ratio)

        tall = capacity(plan.rows, steps + 1)
        lq_rows = min(height * self.ratio, tall * self.ratio + 2 * _HALO)
        self.lq = RowBuffer(3, height * self.ratio, width * self.ratio, lq_rows, allocate)
        self.y0 = RowBuffer(channels, height, width, tall, allocate)

        def window(factor: int = 1, of: int = channels, tiles: int = 1) -> RowBuffer:
            return RowBuffer(
                of, height * factor, width * factor, capacity(plan.rows, tiles) * factor, allocate
            )

        self.x = [window() for _ in range(steps)]  # x[i] is the input of the step of index i
        self.stages: list[Stage] = []
        if networks.unshuffles:
            self.stages.append(_EncodeRows(self))
        else:
            blended = window(tiles=0)
            inputs = [(self.lq, self.ratio)]
            encode = _EncodeTiles(
                plan, networks.encode, inputs, blended, 1, self._begin_from(blended), networks.device, batch
            )
            encode.chain = self
            self.stages.append(encode)
        for i_step in range(steps - 1, -1, -1):
            blended = window(tiles=0)
            inputs = [(self.x[i_step], 1), (self.y0, 1), (self.lq, self.ratio)]
            finish = partial(self._finish_step, i_step, blended)
            self.stages.append(
                TileStage(
                    plan, networks.predict_x0, inputs, blended, 1, finish, networks.device, batch, i_step
                )
            )
        if not networks.unshuffles:
            factor = networks.first_stage.factor
            self.latent = window()
            blended = window(factor, of=3, tiles=0)
            finish = partial(self._emit_decoded, blended)
            self.stages.append(
                TileStage(
                    plan, networks.decode, [(self.latent, 1)], blended, factor, finish, networks.device, batch
                )
            )

    @staticmethod
    def window_bytes(networks: Networks, plan: TilePlan) -> int:
        """Return the bytes of all windows of a run."""
        counted = 0

        def count(shape: tuple[int, ...]) -> tuple[Tensor, None]:
            nonlocal counted
            counted += 4 * math.prod(shape)
            return torch.empty(shape, device="meta"), None

        RowChain(
            networks, plan, (1, 1), read=_unused, noise=_unused, emit=lambda _: None, allocate=count, batch=1
        )
        return counted

    def run(self) -> Work[None]:
        """Do it, once."""
        try:
            yield from drive(self.stages, self._feed, self._discard)
        finally:
            # Stages call back to this object. Without the cycle, windows and pictures go when the run ends,
            # not when the collector comes: a replica had 8 GB of them after ten pictures.
            self.stages.clear()

    def upsampled(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """Return latent positions [top, bottom) x [left, right) of the bicubic enlargement, (3, (bottom -
        top) f, (right - left) f).

        Sample positions are multiples of 1/8 pixel at scales that are powers of two, so any cut gives the
        same values.
        """
        ratio, scale = self.ratio, self.networks.config.scale
        first, end = max(0, top * ratio - _HALO), min(self.lq.height, bottom * ratio + _HALO)
        begin, stop = max(0, left * ratio - _HALO), min(self.lq.width, right * ratio + _HALO)
        enlarged = upsample(self.lq.read(first, end, begin, stop)[None].to(self.networks.device), scale)[0]
        down, across = (top * ratio - first) * scale, (left * ratio - begin) * scale
        return enlarged[
            :, down : down + (bottom - top) * ratio * scale, across : across + (right - left) * ratio * scale
        ]

    def can_upsample(self, bottom: int) -> bool:
        """Tell whether the rows that `upsampled` reads for positions above `bottom` are there."""
        return self.lq.bottom >= min(self.lq.height, bottom * self.ratio + _HALO)

    def begin(self, top: int, bottom: int, columns: slice, y0: Tensor) -> None:
        """Take (Z, bottom - top, n) of y0 that is complete, and draw the prior x_T from it."""
        for plane in (self.y0, self.x[-1]):
            plane.extend(bottom)
        self.y0.write(top, columns.start, y0)
        steps = self.networks.schedule.steps
        x_t = prior_sample(y0, self._noise(steps, top, bottom, columns), self.networks.schedule)
        self.x[-1].write(top, columns.start, x_t)

    def _begin_from(self, blended: RowBuffer) -> Callable[[int, int], None]:
        def finish(top: int, bottom: int) -> None:
            for columns in column_parts(blended.width):
                self.begin(
                    top,
                    bottom,
                    columns,
                    blended.read(top, bottom, columns.start, columns.stop).to(self.networks.device),
                )

        return finish

    def _noise(self, step: int, top: int, bottom: int, columns: slice) -> Tensor:
        return self.noise(step, top, columns.start, bottom - top, columns.stop - columns.start).to(
            self.networks.device
        )

    def _finish_step(self, i_step: int, blended: RowBuffer, top: int, bottom: int) -> None:
        device, schedule = self.networks.device, self.networks.schedule
        if i_step == 0 and self.networks.unshuffles:
            self._emit_unshuffled(blended, top, bottom)
            return
        after = self.x[i_step - 1] if i_step else self.latent
        after.extend(bottom)
        t = torch.full((1,), i_step, dtype=torch.int64, device=device)
        for columns in column_parts(blended.width):
            x0_pred, x_t = (
                plane.read(top, bottom, columns.start, columns.stop).to(device)
                for plane in (blended, self.x[i_step])
            )
            x_prev = x0_pred  # at the last step the posterior is the prediction itself
            if i_step:
                noise = self._noise(i_step, top, bottom, columns)
                x_prev = reverse_step(x_t[None], x0_pred[None], t, noise[None], schedule)[0]
            after.write(top, columns.start, x_prev)

    def _emit_unshuffled(self, blended: RowBuffer, top: int, bottom: int) -> None:
        step = max(1, _BAND_VALUES // (self.networks.first_stage.channels * blended.width))
        for first in range(top, bottom, step):
            self.emit(self.networks.decode(blended.read(first, min(bottom, first + step))[None])[0])

    def _emit_decoded(self, blended: RowBuffer, top: int, bottom: int) -> None:
        factor = self.networks.first_stage.factor
        step = max(1, _BAND_VALUES // (3 * blended.width * factor)) * factor
        for first in range(top * factor, bottom * factor, step):
            self.emit(blended.read(first, min(bottom * factor, first + step)))

    def _feed(self) -> bool:
        """Read the rows that the first stage needs next; False at the end of the picture."""
        if self.lq.bottom == self.lq.height:
            return False
        end = min(self.lq.height, (self.stages[0].needs_from + self.plan.rows.tile) * self.ratio + _HALO)
        step = max(1, _BAND_VALUES // (3 * self.lq.width))
        for first in range(self.lq.bottom, end, step):
            wanted = self._rows[first : min(end, first + step)]
            begin = int(wanted.min())
            rows = self.read(begin, int(wanted.max()) + 1)[:, wanted - begin][:, :, self._columns]
            self.lq.extend(first + len(wanted))
            self.lq.write(first, 0, rows)
        return True

    def _discard(self) -> None:
        steps = [
            stage
            for stage in self.stages
            if isinstance(stage, TileStage) and not isinstance(stage, _EncodeTiles)
        ]
        behind = min(stage.needs_from for stage in steps)
        for stage in steps:
            for plane, scale in stage.inputs:
                if plane is not self.lq and plane is not self.y0:
                    plane.discard(stage.needs_from * scale)
        self.y0.discard(behind)
        self.lq.discard(min(behind, self.stages[0].needs_from) * self.ratio - _HALO)


def _unused(*_: object) -> Tensor:
    raise AssertionError("a chain that only counts its windows is not run")


class _EncodeTiles(TileStage):
    """Enlarge and encode tile by tile, so that the enlarged picture never exists; all steps share the
    encoding.
    """

    chain: RowChain

    def ready(self) -> bool:
        return self.i_row < len(self.plan.rows.starts) and self.chain.can_upsample(
            self.needs_from + self.plan.rows.tile
        )

    def tile(self, window: RowBuffer, top: int, left: int, scale: int) -> Tensor:
        return self.chain.upsampled(top, top + self.plan.rows.tile, left, left + self.plan.columns.tile)


class _EncodeRows:
    """Enlarge and rearrange pixels, in the rows that the steps advance by."""

    def __init__(self, chain: RowChain) -> None:
        self.chain = chain
        self.i_row = 0

    @property
    def needs_from(self) -> int:
        rows = self.chain.plan.rows
        return rows.starts[self.i_row] if self.i_row < len(rows.starts) else rows.length

    def ready(self) -> bool:
        rows = self.chain.plan.rows
        return self.i_row < len(rows.starts) and self.chain.can_upsample(rows.complete(self.i_row)[1])

    def run(self) -> Work[None]:
        chain = self.chain
        top, bottom = chain.plan.rows.complete(self.i_row)
        for columns in column_parts(chain.plan.columns.length):
            enlarged = chain.upsampled(top, bottom, columns.start, columns.stop)
            chain.begin(top, bottom, columns, chain.networks.encode(enlarged[None])[0])
        self.i_row += 1
        yield from ()  # rearranging pixels needs no network
