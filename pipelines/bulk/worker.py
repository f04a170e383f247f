"""A replica: one model in one process, which upscales work units.

A unit is answered bit by bit, so that what is done survives the replica:

    Started, then for every input: Frames (large, stays in the object store), Upscaled (small, for the driver)
    or, if inputs came in parcels: Parcel, tuple[Upscaled, ...], for one or several at a time (`grouped`),
    and for slow ones, every few seconds, an empty Parcel and a tuple with an Underway

Pixels come before what announces them: when it arrives, they are available.

Pictures of all units at a replica share the calls of its networks (`resshift.tiles.batching`), which run in
one thread.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, cast, overload

import numpy as np

from pipelines.bulk.nearest import nearest_model
from pipelines.bulk.parcels import Parcel, Underway, by_key, grouped
from pipelines.bulk.wedged import DEFAULT_STEP_S, Wedged
from resshift import seeds
from resshift.allocator import keep_freed_pages
from resshift.config import ModelConfig, OptionError, Sampling
from resshift.images import Picture
from resshift.images.animation import Frames
from resshift.models import locate_model
from resshift.openmp import wait_passively

if TYPE_CHECKING:
    from resshift.tiles.batching import Done, Work

# A library that hangs with the interpreter's lock also stops the threads that send answers. So that a death
# is charged to the right unit, its start has left the process before the model begins, and what a suspect
# made before the next suspect is let in. A unit's wait passes while the model works on others.
_DELIVERY_S = 0.05
_DELIVERY_ALONE_S = 0.5
_TELL_S = 5.0  # a picture that takes longer is told of that often


class Model(Protocol):
    """What a replica needs of a model; `resshift.Upscaler` is one."""

    identity: str

    @property
    def scale(self) -> int: ...

    @property
    def shares_calls(self) -> bool:
        """Whether tiles of several pictures go through the networks together."""
        ...

    def upscaling(
        self,
        picture: Picture,
        sampling: Sampling = Sampling(),
        progress: Callable[[float], None] | None = None,
    ) -> Work[Picture]: ...

    def predictions(self, picture: Picture, sampling: Sampling = Sampling()) -> Work[tuple[Picture, ...]]: ...


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a job must know of a model before it is loaded.

    Fields:
        name, identity: Name as it was asked for, and digest of weights and configuration.
        scale: Sides of an output over sides of its input.
        smallest_tile_px: Side of the smallest tile in input pixels.
        steps: Steps of the chain that the model was trained with.
        has_one_scale: Whether no `outscale` but this scale can be asked for.
        has_estimate: Whether it has a `fidelity`, see `Sampling`.
        fills_holes: Whether it fills holes, so that pictures need masks.
        takes_faces: Whether it may restore the faces of a picture, see `Sampling.faces`.
        draws_noise: Whether another seed gives another picture.
    """

    name: str
    identity: str
    scale: int
    smallest_tile_px: int
    steps: int
    has_one_scale: bool = False
    has_estimate: bool = False
    fills_holes: bool = False
    takes_faces: bool = False
    draws_noise: bool = False

    def check(self, sampling: Sampling) -> None:
        """Refuse what this model cannot do.

        Raises:
            OptionError: The model cannot do it.
        """
        if self.has_one_scale and sampling.outscale not in (None, self.scale):
            message = f"must be {self.scale} for {self.name}, got {sampling.outscale:g}"
            raise OptionError("outscale", message)
        sampling.check_for(self.name, self.steps, self.smallest_tile_px, self.has_estimate, self.takes_faces)


def describe_model(name: str) -> ModelFacts:
    """Find a model without loading it.

    Raises:
        WeightsError: There is no such model.
    """
    if (model := nearest_model(name)) is not None:
        return ModelFacts(
            name, model.identity, model.scale, model.smallest_tile_px, steps=1, has_one_scale=True
        )
    files = locate_model(name)
    config = files.config
    return ModelFacts(
        name,
        files.identity(),
        config.scale,
        config.smallest_tile_px,
        config.steps,
        has_estimate=isinstance(config, ModelConfig) and config.has_estimate,
        fills_holes=files.fills_holes,
        takes_faces=files.takes_faces,
        draws_noise=isinstance(config, ModelConfig) and config.schedule.kappa > 0,
    )


def load_model(name: str) -> Model:
    """Load a model: the stand-in, or whatever `Upscaler.from_pretrained` takes, on the device that Ray
    granted.

    Raises:
        DeviceError: A GPU was granted and cannot be used.
        WeightsError: The model cannot be loaded.
    """
    if (model := nearest_model(name)) is not None:
        return model
    # Imported here: they load torch, which the driver does not need.
    from pipelines.cluster.granted import granted_device
    from resshift.upscaler import Upscaler

    return Upscaler.from_pretrained(name, device=granted_device())


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaOptions:
    """How a replica makes pixels; all of it is part of a job's fingerprint."""

    model: str
    identity: str
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class Started:
    """The replica has taken the unit.

    Fields:
        replica: Process id of the replica.
        at: Unix time.
        ahead: Number of the unit's inputs that may be under way at a time.
    """

    replica: int
    at: float
    ahead: int = 1


@dataclass(frozen=True, slots=True)
class Upscaled:
    """One input of a unit is done.

    Fields:
        reason: Why there is no result; empty when there is one.
        message: Message of the ledger row.
        seconds: Seconds in the model.
        at: Unix time at the end.
    """

    reason: str
    message: str
    seconds: float
    at: float


class Room:
    """A replica as a room for units: many at a time, or one that wants to be alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_inside = 0
        self._num_wanting_it_alone = 0

    @contextlib.contextmanager
    def entered(self, *, alone: bool) -> Generator[None]:
        """Wait for a place. A unit that wants to be alone waits for the room to be empty, and others wait for
        it from the moment that it asks: it comes to its turn however many there are.
        """
        with self._changed:
            if alone:
                self._num_wanting_it_alone += 1
                self._changed.wait_for(lambda: not self._num_inside)
            else:
                self._changed.wait_for(lambda: not self._num_wanting_it_alone)
            self._num_inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._num_inside -= 1
                self._num_wanting_it_alone -= alone
                self._changed.notify_all()


class Replica:
    """Loads the model once, then upscales unit after unit.

    It takes several units at a time: results of one are stored while another is computed, and small pictures
    of all of them go through the networks together. A unit that is suspected of ending replicas is alone
    here, whoever else sends work.

    Args:
        model: Name or path of the model.
        identity: Identity that the model must have; empty accepts any.
        num_threads: Threads of the networks on a CPU; the largest power of two up to it is used.
        step_s: Seconds after which a step counts as hung, see `Wedged`.
    """

    def __init__(self, model: str, identity: str, num_threads: int, step_s: float = DEFAULT_STEP_S) -> None:
        wedged = Wedged(step_s)
        wait_passively()
        import torch

        from resshift.tiles.batching import MOST_OPEN, Batcher

        # A power of two: other numbers split feature maps in the middle of a vector register, and the rest is
        # rounded differently.
        torch.set_num_threads(1 << (num_threads.bit_length() - 1))
        keep_freed_pages()
        try:
            self.model = load_model(model)
        finally:
            wedged.watch(has_work=False)
        if identity and self.model.identity != identity:
            raise RuntimeError(f"this node has another {model}: {self.model.identity} instead of {identity}")
        self._batcher = Batcher(watch=wedged.watch)
        self._room = Room()
        # Number of a unit's pictures in line at a time. Without shared calls it is one, so that a death is
        # charged to the right picture.
        self._ahead = MOST_OPEN if self.model.shares_calls else 1
        threading.Thread(target=self._compute, name="model", daemon=True).start()

    def _compute(self) -> None:
        """Serve the batcher. An exception here ends the process: without this thread a replica would take
        work and never answer.
        """
        try:
            self._batcher.serve()
        except BaseException:
            traceback.print_exc()
            os._exit(70)

    def probe(self) -> Future[Done[Picture]]:
        """Send a small picture through the model, behind what is under way."""
        frames = Picture(pixels=np.zeros((8, 8, 3), np.uint8))
        return self._batcher.submit(self.model.upscaling(frames))

    @overload
    def upscale(
        self,
        options: ReplicaOptions,
        keys: Sequence[str],
        *inputs: Frames,
        alone: bool = False,
        is_wanted: Callable[[], bool] = ...,
    ) -> Iterator[Started | Frames | Upscaled]: ...

    @overload
    def upscale(
        self,
        options: ReplicaOptions,
        keys: Sequence[str],
        *inputs: Parcel,
        alone: bool = False,
        is_wanted: Callable[[], bool] = ...,
    ) -> Iterator[Started | Parcel | tuple[Upscaled | Underway, ...]]: ...

    def upscale(
        self,
        options: ReplicaOptions,
        keys: Sequence[str],
        *inputs: Frames | Parcel,
        alone: bool = False,
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> Iterator[Started | Frames | Upscaled | Parcel | tuple[Upscaled | Underway, ...]]:
        """Upscale the inputs of a unit in order; see the module for what is yielded.

        Args:
            options: Options of the job.
            keys: Keys of the inputs; the noise of a picture depends on its key. An empty key stands for a
                picture without a name: its noise depends on the seed alone, as in a call of `Upscaler`.
            inputs: The decoded inputs, in the order of the keys; or parcels that have them, and may have
                others.
            alone: Whether to begin when nothing else is under way here, and to keep others waiting.
            is_wanted: Function that is asked before each call of the networks; the unit ends when it is
                false.
        """
        with self._room.entered(alone=alone):
            yield Started(os.getpid(), time.time(), self._ahead)
            if isinstance(inputs[0], Parcel):
                delivery_s = _DELIVERY_ALONE_S if alone else _DELIVERY_S
                time.sleep(delivery_s)
                pictures = by_key(cast("tuple[Parcel, ...]", inputs))
                frames = [pictures[key] for key in keys]
                yield from grouped(keys, self._answers(options, keys, frames, is_wanted))
                if alone:
                    time.sleep(delivery_s)
                return
            for answer in self._answers(options, keys, cast("tuple[Frames, ...]", inputs), is_wanted):
                if not isinstance(answer, Underway):
                    yield from answer

    def predictions(
        self, options: ReplicaOptions, frames: Frames, is_wanted: Callable[[], bool] = lambda: True
    ) -> tuple[Frames, Upscaled] | None:
        """Return what the chain predicts at each step for a picture without a name, as so many frames; None
        when it was no longer wanted.
        """

        def work() -> Work[Frames]:
            return Frames((yield from self.model.predictions(frames.pictures[0], options.sampling)))

        with self._room.entered(alone=False):
            try:
                return _answer(self._batcher.submit(work(), is_wanted))
            except CancelledError:
                return None

    def _answers(
        self,
        options: ReplicaOptions,
        keys: Sequence[str],
        inputs: Sequence[Frames],
        is_wanted: Callable[[], bool],
    ) -> Iterator[tuple[Frames, Upscaled] | Underway]:
        """Yield the results; some inputs are in line at a time."""
        waiting = iter(zip(keys, inputs, strict=True))
        line: collections.deque[Future[Done[Frames]]] = collections.deque()
        shares: dict[str, float] = {}
        while True:
            for key, frames in itertools.islice(waiting, self._ahead - len(line)):
                work = self._work(options, key, frames, shares)
                line.append(self._batcher.submit(work, is_wanted, frames.num_pixels))
            if not line:
                return
            while not line[0].done():
                with contextlib.suppress(TimeoutError, CancelledError):
                    line[0].exception(_TELL_S)
                told = tuple(shares.items())
                if told and not line[0].done():
                    yield Underway(told)
            try:
                answer = _answer(line.popleft())
            except CancelledError:  # no longer wanted
                return
            yield answer

    def _work(
        self, options: ReplicaOptions, key: str, frames: Frames, shares: dict[str, float]
    ) -> Work[Frames]:
        """Upscale every frame of one input, and note in `shares` how far that is until it is done."""
        sampling = options.sampling
        if key:
            sampling = replace(sampling, seed=seeds.derive(sampling.seed, "picture", key))
        pictures: list[Picture] = []

        def note(share: float) -> None:
            shares[key] = (len(pictures) + share) / len(frames.pictures)

        try:
            for picture in frames.pictures:
                pictures.append((yield from self.model.upscaling(picture, sampling, note)))
        finally:
            shares.pop(key, None)
        return replace(frames, pictures=tuple(pictures))


def _answer(future: Future[Done[Frames]]) -> tuple[Frames, Upscaled]:
    """Wait for an input; an error becomes a reason."""
    import torch

    try:
        done = future.result()
    except torch.OutOfMemoryError as error:
        return Frames(()), Upscaled(
            "out_of_memory", f"{error}; a smaller --tile needs less", 0.0, time.time()
        )
    except CancelledError:
        raise
    except Exception:
        # The boundary of the stage: one picture must not end the job. The row keeps the traceback.
        return Frames(()), Upscaled("upscale_error", traceback.format_exc(limit=-4), 0.0, time.time())
    finally:
        del future  # an error keeps the frames that it passed, and this frame would keep the error
    return done.value, Upscaled("", "", done.seconds, time.time())
