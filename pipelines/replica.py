"""A replica: one model in one process, which upscales work units. Both engines run this class.

A unit is answered picture by picture, so that what is done survives the replica and a death is charged to the picture it was at:

    Started, then for every input: Frames (large, stays in the object store), Upscaled (small, for the driver)

`Frames` come before the `Upscaled` that announces them: who has the announcement has the pixels.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipelines.standin import standin
from resshift import seeds
from resshift.allocator import keep_freed_pages
from resshift.animation import Frames
from resshift.images import Picture
from resshift.models import locate_model


class Model(Protocol):
    """What a replica needs of a model; `resshift.Upscaler` is one."""

    identity: str

    @property
    def scale(self) -> int: ...

    def upscale(
        self, picture: Picture, *, seed: int = 0, outscale: float | None = None, steps: int | None = None, tile_px: int | None = None
    ) -> Picture: ...


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a job must know of a model before it is loaded: `steps` of its chain; `has_one_scale`: no other `outscale` can be asked for."""

    name: str
    identity: str
    scale: int
    smallest_tile_px: int
    steps: int
    has_one_scale: bool = False

    def check(self, outscale: float | None, steps: int | None) -> None:
        """Refuse what this model cannot do.

        Raises:
            ValueError: the message names the option without dashes, its value and what is allowed.
        """
        if outscale is not None and self.has_one_scale and outscale != self.scale:
            raise ValueError(f"outscale must be {self.scale} for {self.name}, got {outscale:g}")
        if steps is not None and not 1 <= steps <= self.steps:
            raise ValueError(f"steps must lie in 1 to {self.steps} for {self.name}, got {steps}")


def describe_model(name: str) -> ModelFacts:
    """Find a model without loading it.

    Raises:
        WeightsError: no such model.
    """
    if (model := standin(name)) is not None:
        return ModelFacts(name, model.identity, model.scale, model.smallest_tile_px, steps=1, has_one_scale=True)
    files = locate_model(name)
    config = files.config
    return ModelFacts(name, files.identity(), config.scale, config.unet.size_multiple * config.unet.lq_ratio, config.schedule.steps)


def load_model(name: str) -> Model:
    """Load a model: the stand-in, or whatever `Upscaler.from_pretrained` takes."""
    if (model := standin(name)) is not None:
        return model
    from resshift.upscaler import Upscaler

    return Upscaler.from_pretrained(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaOptions:
    """How a replica makes pixels; all of it is part of a job's fingerprint."""

    model: str
    identity: str
    seed: int = 0
    outscale: float | None = None
    steps: int | None = None
    tile_px: int | None = None


@dataclass(frozen=True, slots=True)
class Started:
    """The replica has begun with the unit."""

    replica: int
    at: float


@dataclass(frozen=True, slots=True)
class Upscaled:
    """One input of a unit is through.

    Fields:
        reason: empty when it went well, else why not.
        message: for the ledger.
        seconds: that the model took.
        at: wall clock at the end.
    """

    reason: str
    message: str
    seconds: float
    at: float


class Replica:
    """Loads the model once, then upscales unit after unit.

    Several units may be handed over at a time: one is computed, the results of another are being stored.

    Args:
        model: name or path.
        identity: what the model must be; empty accepts any.
        num_threads: of the networks on a CPU; the largest power of two up to it is used.
    """

    def __init__(self, model: str, identity: str, num_threads: int) -> None:
        import torch

        # A power of two: other numbers cut maps where vectors end in the middle, and the remainders are rounded differently.
        torch.set_num_threads(1 << (num_threads.bit_length() - 1))
        keep_freed_pages()
        self.model = load_model(model)
        if identity and self.model.identity != identity:
            raise RuntimeError(f"this node has another {model}: {self.model.identity} instead of {identity}")
        self._busy = threading.Lock()

    def pid(self) -> int:
        """Return the process id: the answer says that the replica is ready."""
        return os.getpid()

    def upscale(
        self, options: ReplicaOptions, keys: Sequence[str], *inputs: Frames, is_wanted: Callable[[], bool] | None = None
    ) -> Iterator[Started | Frames | Upscaled]:
        """Upscale the inputs of a unit in order; see the module for what is yielded.

        Args:
            options: of the job.
            keys: of the inputs; the noise of a picture depends on its key. An empty one stands for a picture without a name: its noise is
                that of the seed alone, as in a call of `Upscaler`.
            inputs: decoded.
            is_wanted: asked before the model begins with a picture; once it is not, the unit ends.
        """
        yield Started(os.getpid(), time.time())
        for key, frames in zip(keys, inputs, strict=True):
            # The lock is held for the arithmetic alone: results are copied to the object store while another unit computes.
            with self._busy:
                if is_wanted is not None and not is_wanted():
                    return
                result, done = self._one(options, key, frames)
            yield result
            yield done

    def _one(self, options: ReplicaOptions, key: str, frames: Frames) -> tuple[Frames, Upscaled]:
        import torch

        started = time.perf_counter()
        reason, message = "", ""
        try:
            seed = seeds.derive(options.seed, "picture", key) if key else options.seed
            frames = frames.map(
                lambda picture: self.model.upscale(
                    picture, seed=seed, outscale=options.outscale, steps=options.steps, tile_px=options.tile_px
                )
            )
        except torch.OutOfMemoryError as error:
            reason, message = "out_of_memory", f"{error}; a smaller --tile needs less"
        except torch.AcceleratorError:
            # An illegal access leaves the context of the device unusable: the next picture would fail for the sins of this one.
            traceback.print_exc()
            os._exit(70)
        except Exception:
            # The boundary of the stage: one picture must not end the job. The traceback is kept in the row.
            reason, message = "upscale_error", traceback.format_exc(limit=-4)
        return Frames(()) if reason else frames, Upscaled(reason, message, time.perf_counter() - started, time.time())
