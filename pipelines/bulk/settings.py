"""Settings of the bulk job that have no flag: `--set section.field=value`.

--set source.endpoint=https://s3.example.org --set source.profile=photos
--set target.sse=aws:kms --set target.storage_class=STANDARD_IA
--set limits.seconds=20 --set limits.memory_mb=2000
--set output.frames=all
"""

from __future__ import annotations

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from pipelines.bulk.scheduler import BulkOptions
from pipelines.bulk.wedged import DEFAULT_STEP_S
from resshift.images import ImageLimits
from resshift.images.animation import FrameChoice
from resshift.images.sandbox import DecoderLimits
from resshift.storage.s3 import S3Options

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class OutputSettings:
    """Settings of outputs.

    Fields:
        frames: Which frames or pages of a file are upscaled: the first, all, or none, which fails the input.
    """

    frames: FrameChoice = "first"


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class InputLimitSettings:
    """Limits of an input. One beyond them becomes a failed row, and may be retried after a limit was raised.

    Fields:
        max_side_px, max_bytes, max_frames: Largest input, checked on the header as --max-megapixels is; at
            least 1.
        seconds: Time for decoding, above 0.
        memory_mb: Memory for decoding, at least 16; null: enough for --max-megapixels.
        deaths: Number of workers that may end while they have an input alone, at least 1.
    """

    max_side_px: int = 65_500
    max_bytes: int = 1 << 30
    max_frames: int = 1000
    seconds: float = 60.0
    memory_mb: int | None = None
    deaths: int = 2

    def __post_init__(self) -> None:
        for name in ("max_side_px", "max_bytes", "max_frames", "deaths"):
            if getattr(self, name) < 1:
                raise ValueError(f"limits.{name} must be at least 1, got {getattr(self, name)}")
        if self.seconds <= 0 or (self.memory_mb is not None and self.memory_mb < 16):
            raise ValueError(
                f"limits.seconds must be positive and memory_mb at least 16, got {self.seconds} and "
                f"{self.memory_mb}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class SelectSettings:
    """Which objects are inputs, by their size; globs have flags.

    Fields:
        min_bytes, max_bytes: Smallest and largest input; other objects get no row.
    """

    min_bytes: int = 0
    max_bytes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class WorkSettings:
    """How the work is cut; see `BulkOptions`.

    Fields:
        unit_pictures, unit_megapixels: Inputs, or megapixels of input, with which the unit of a replica is
            full; at least 1, and above 0. More than 8 are put together as far as they take 2 s.
        fetch_pictures: Inputs of one fetch task at most, at least 1; more than 8 if they are small.
        in_flight_mb: Megabytes of pictures in the object store; null: 40 % of the cluster's store.
    """

    unit_pictures: int = 256
    unit_megapixels: float = 1.0
    fetch_pictures: int = 256
    in_flight_mb: float | None = None

    def __post_init__(self) -> None:
        self.bulk_options(1)

    def bulk_options(self, deaths: int) -> BulkOptions:
        """Return the options of the scheduler."""
        return BulkOptions(
            unit_pictures=self.unit_pictures,
            unit_megapixels=self.unit_megapixels,
            fetch_pictures=self.fetch_pictures,
            in_flight_mb=self.in_flight_mb,
            max_deaths=deaths,
        )


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class EngineSettings:
    """Settings of the replicas; see `EngineOptions`.

    Fields:
        num_gpus: GPUs of a replica; null: one where the cluster has any.
        num_cpus: CPUs of a replica.
        upscale_s, downscale_s: Seconds that work waits, or a replica is idle, before their number changes.
        step_s: Seconds after which a step of a replica counts as hung and the replica is replaced, see
            `pipelines.bulk.wedged`.
    """

    num_gpus: float | None = None
    num_cpus: float = 1
    upscale_s: float = 5.0
    downscale_s: float = 60.0
    step_s: float = DEFAULT_STEP_S

    def __post_init__(self) -> None:
        if self.step_s <= 0:
            raise ValueError(f"engine.step_s must be positive, got {self.step_s}")


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class BulkSettings:
    """All settings of a bulk job."""

    output: OutputSettings = OutputSettings()
    limits: InputLimitSettings = InputLimitSettings()
    select: SelectSettings = SelectSettings()
    work: WorkSettings = WorkSettings()
    engine: EngineSettings = EngineSettings()
    source: S3Options = S3Options()
    target: S3Options = S3Options()

    def decoder_limits(self, max_pixels: int) -> DecoderLimits:
        """Return the limits of the decoder."""
        limits = self.limits
        sizes = ImageLimits(
            max_pixels=max_pixels,
            max_side_px=limits.max_side_px,
            max_bytes=limits.max_bytes,
            max_frames=limits.max_frames,
        )
        return DecoderLimits(images=sizes, seconds=limits.seconds, memory_mb=limits.memory_mb)
