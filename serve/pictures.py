"""One picture through the endpoint: header -> queue -> decode (in a limited process) -> model and encode
(`serve.replica`), each step timed.

The gateway runs this for pictures that are answered at once, the job keeper for those that are answered
later.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from resshift import images
from resshift.config import OptionError, Sampling
from resshift.faces.detect import yunet
from resshift.images import Format, ImageError, ImageHeader, scaled
from resshift.images.animation import Frames
from resshift.images.identify import identify
from resshift.images.masks import with_mask
from resshift.images.sandbox import Decoder, DecoderDied, DecoderLimits, DecoderTimeout
from resshift.output_names import CONTENT_TYPES
from serve.encode import Encoded, Encoding
from serve.http.limits import Admission, Deadline
from serve.http.options import PictureOptions
from serve.http.problems import Problem, option_problem, picture_problem
from serve.models import EndpointModel, Readiness, find_model
from serve.settings import LimitSettings


@dataclass(frozen=True, slots=True)
class Result:
    """A finished picture.

    Fields:
        data: Encoded picture, or the archive of those of the steps.
        format: Format of the picture or pictures.
        model: Name and identity of the model.
        sizes: Width and height of the input and of the result.
        notes: What was changed, for the user.
        seconds: Seconds of each phase: queue, decode, model, encode.
        has_steps: Whether it is an archive.
    """

    data: bytes
    format: Format
    model: tuple[str, str]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict[str, float])
    has_steps: bool = False

    @property
    def content_type(self) -> str:
        return "application/zip" if self.has_steps else CONTENT_TYPES[self.format]


_READ_BY_LIBRARIES = ("HEIF", "AVIF", "JXL")


@contextmanager
def _refusals() -> Generator[None]:
    """Turn what a decoder raises into a Problem."""
    try:
        yield
    except ImageError as error:
        raise picture_problem(error.reason, str(error)) from None
    except DecoderTimeout as error:
        raise picture_problem("timeout", str(error)) from None
    except DecoderDied as error:
        raise picture_problem("killed_worker", str(error)) from None


class Decoding:
    """A few threads with a decoder process each.

    Args:
        limits: Limits of a file.
        num_threads: Number of files that are decoded at a time.
    """

    def __init__(self, limits: DecoderLimits, num_threads: int) -> None:
        self.limits = limits
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode")
        # Headers that libraries read, and not Python, get a process as well; they do not wait for pixels.
        self._header_pool = ThreadPoolExecutor(1, thread_name_prefix="header")
        self._own = threading.local()
        self._decoders: list[Decoder] = []

    async def header(self, data: bytes) -> ImageHeader:
        """Read the header; sizes are within the limits when this returns.

        Raises:
            Problem: with the picture's reason.
        """
        with _refusals():
            if await asyncio.to_thread(identify, data) in _READ_BY_LIBRARIES:
                loop = asyncio.get_running_loop()
                return await loop.run_in_executor(self._header_pool, lambda: self._decoder().header(data))
            return await asyncio.to_thread(images.probe, data, self.limits.images)

    async def decode(self, data: bytes) -> Frames:
        """Decode the first frame.

        Raises:
            Problem: with the picture's reason.
        """
        with _refusals():
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, lambda: self._decoder().decode(data, "first"))

    def _decoder(self) -> Decoder:
        """Return the decoder of this thread."""
        decoder: Decoder | None = getattr(self._own, "decoder", None)
        if decoder is None:
            decoder = self._own.decoder = Decoder(self.limits)
            self._decoders.append(decoder)
        return decoder

    def close(self) -> None:
        """End the processes."""
        for pool in (self._pool, self._header_pool):
            pool.shutdown(wait=False, cancel_futures=True)
        for decoder in self._decoders:
            decoder.close()


class PictureService:
    """Upscales pictures, one request at a time each.

    Args:
        limits: Limits of the endpoint.
        models: Models by name.
        num_cpus: Number of threads for decoding.
        sleeping: Names of the models that may have no replicas.
        detector: File of the face detector; empty: faces cannot be asked for.

    Raises:
        OptionError: The detector cannot be loaded.
    """

    def __init__(
        self,
        limits: LimitSettings,
        models: Mapping[str, EndpointModel],
        num_cpus: int = 2,
        sleeping: Collection[str] = (),
        detector: str = "",
    ) -> None:
        if detector:
            yunet(detector)
        self.detector = detector
        self.limits, self.models = limits, models
        self.decoding = Decoding(limits.decoder(), num_cpus)
        self.admission = Admission(limits.slots(1, 1), limits.queue)
        self.readiness = {
            name: Readiness(busy_s=limits.max_timeout_s, may_sleep=name in sleeping) for name in models
        }

    async def upscale(
        self,
        data: bytes,
        options: PictureOptions,
        format: Format,
        deadline: Deadline,
        charge: Callable[[int], None] | None = None,
        mask: bytes = b"",
    ) -> Result:
        """Upscale one encoded picture.

        Args:
            data: Encoded picture, the whole file.
            options: Options of the request.
            format: Format of the result.
            deadline: Deadline, checked before the picture gets its turn, and again by whoever waits for the
                result.
            charge: Function that is called with the number of pixels of the header; it may refuse.
            mask: Encoded mask, for a model that fills holes; empty: what is transparent in the picture.

        Raises:
            Problem: whatever is wrong with the picture, the options or the time.
        """
        model = find_model(self.models, options.model)
        try:
            sampling = options.sampling(self.detector)
            model.facts.check(sampling)
            if options.trajectory and (model.facts.steps == 1 or options.cascade or options.faces):
                why = (
                    f"for {model.facts.name}, which has one step"
                    if model.facts.steps == 1
                    else f"with {'cascade' if options.cascade else 'faces'}"
                )
                raise OptionError("trajectory", f"must be false {why}")
            if mask and not model.facts.fills_holes:
                message = f"must not be given for {model.facts.name}, which fills no holes"
                raise OptionError("mask", message)
        except OptionError as error:
            raise option_problem(error) from None
        header = await self.decoding.header(data)
        num_pictures = (options.steps or model.facts.steps) if options.trajectory else 1
        self._check_output(header, options.outscale or model.facts.scale, format, num_pictures)
        if charge is not None:
            charge(header.width * header.height)
        seconds: dict[str, float] = {}
        try:
            async with self.admission.slot(deadline) as seconds["queue"]:
                async with asyncio.timeout(max(0.0, deadline.left_s)):
                    with _timed(seconds, "decode"):
                        frames = await self.decoding.decode(data)
                        if model.facts.fills_holes:
                            frames = await self._masked(frames, mask)
                    encoding = Encoding(
                        format=format, quality=options.quality, keeps_metadata=options.metadata == "keep"
                    )
                    encoded = await self._run(model, frames, sampling, encoding, options.trajectory)
        except TimeoutError:
            raise Problem("timeout", "the deadline passed while the picture was worked on") from None
        size_in = (header.width, header.height)
        seconds |= {"model": encoded.model_seconds, "encode": encoded.encode_seconds}
        names = (model.facts.name, model.facts.identity)
        sizes = size_in, encoded.size
        return Result(encoded.data, format, names, sizes, encoded.notes, seconds, options.trajectory)

    async def _masked(self, frames: Frames, mask: bytes) -> Frames:
        """Return the picture with its hole.

        Raises:
            Problem: bad_mask.
        """
        shown = None
        if mask:
            try:
                await self.decoding.header(mask)
                shown = (await self.decoding.decode(mask)).pictures[0]
            except Problem as problem:
                raise picture_problem("bad_mask", f"the mask: {problem.detail}") from None
        try:
            return await asyncio.to_thread(frames.map, lambda picture: with_mask(picture, shown))
        except ImageError as error:
            raise picture_problem(error.reason, str(error)) from None

    async def _run(
        self,
        model: EndpointModel,
        frames: Frames,
        sampling: Sampling,
        encoding: Encoding,
        has_steps: bool,
    ) -> Encoded:
        async with self.noted_pass(model.facts.name):
            encoded = await model.upscale(frames, sampling, encoding, has_steps)
        if encoded.reason:
            raise picture_problem(encoded.reason, encoded.message)
        return encoded

    @asynccontextmanager
    async def noted_pass(self, name: str) -> AsyncGenerator[None]:
        """Report the outcome of a pass to the readiness of a model."""
        readiness = self.readiness[name]
        readiness.begin()
        is_good: bool | None = None
        try:
            yield
            is_good = True
        except Problem as problem:
            is_good = False if problem.kind == "unavailable" else None
            raise
        finally:
            readiness.end(is_good)

    def _check_output(self, header: ImageHeader, factor: float, format: Format, number: int) -> None:
        width, height = scaled(header.width, factor), scaled(header.height, factor)
        try:
            images.check_sizes([(width, height)], format)
        except ImageError as error:
            raise picture_problem(error.reason, str(error)) from None
        if number * width * height > self.limits.output_megapixels * 1e6:
            times = f"{number} times " if number > 1 else ""
            message = (
                f"the result would be {times}{width}x{height}, at most {self.limits.output_megapixels:g} "
                "megapixels are allowed"
            )
            raise Problem("too_large", message, members={"reason": "too_large"})

    def close(self) -> None:
        """End the processes of the decoders."""
        self.decoding.close()


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Generator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started
