"""A bulk job as it is asked for, by a command or over HTTP: everything is checked before any work."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from pipelines.bulk.driver import Job
from pipelines.bulk.selection import Selection
from pipelines.bulk.settings import BulkSettings
from pipelines.bulk.stages import IfExists, StageOptions, UpscaleOptions
from pipelines.bulk.sweep import Inputs, Sweep
from pipelines.bulk.worker import describe_model
from pipelines.command import UsageError, check_places
from pipelines.ledger import ledger
from resshift.config import OptionError, Sampling
from resshift.faces.detect import yunet
from resshift.output_names import OutputFormat
from resshift.storage import Entry


@dataclass(frozen=True, kw_only=True)  # no slots: fields of other classes take their defaults from here
class BulkRequest:
    """All that a bulk job is asked for; `jobs/upscale.py` and `POST /v1/jobs` both make one.

    Fields:
        source: Folder or s3:// prefix of the inputs, SRC.
        target: Folder or s3:// prefix of the outputs and the ledger, DST; not inside the source.
        model: Name or path of the model.
        sampling: How the pixels are made.
        format: Format of the outputs; "keep" follows the extension of each input.
        quality: Quality of JPEG and WebP, 1 to 100.
        name: Template of output names, see `names.output_key`.
        include, exclude: Globs of inputs, see `Selection`.
        masks: Folder or s3:// prefix with a mask for each input, for models that fill holes
            (`stages.mask_keys`); the source itself, if the inputs are transparent in their holes.
        keys: File with the keys of the inputs, one a line; None: a listing of the source.
        max_megapixels: Size of the largest input that is tried, at most 10,000.
        if_exists: What happens to outputs without a row, see `StageOptions`.
        retry_failed: Whether inputs that failed are tried again.
        price_per_hour: Price of one replica, for estimate and report.
        settings: What is set with `--set`.

    Raises:
        OptionError: A field cannot have its value.
    """

    source: str
    target: str
    model: str = "tiny-x4"
    sampling: Sampling = Sampling()
    format: OutputFormat = "png"
    quality: int = 95
    name: str = "{dir}/{stem}_x{scale}.{ext}"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    masks: str | None = None
    keys: str | None = None
    max_megapixels: float = 25.0
    if_exists: IfExists = "overwrite"
    retry_failed: bool = False
    price_per_hour: float | None = None
    settings: BulkSettings = field(default_factory=BulkSettings)

    def __post_init__(self) -> None:
        check_places(self.source, self.target, "outputs")
        if not 1 <= self.quality <= 100:
            raise OptionError("quality", f"must lie in 1 to 100, got {self.quality}")
        if not 0 < self.max_megapixels <= 10_000:
            raise OptionError(
                "max_megapixels", f"must be positive and at most 10000, got {self.max_megapixels}"
            )
        if self.price_per_hour is not None and not self.price_per_hour >= 0:
            raise OptionError("price_per_hour", f"must be at least 0, got {self.price_per_hour}")

    def job(self) -> Job:
        """Return the job, checked against its model and the target.

        Raises:
            WeightsError: There is no such model.
            OptionError: The model cannot do it, needs masks or takes none, the face detector cannot be read,
                or the name is no template.
            JobMismatch: The target belongs to another job.
        """
        model = describe_model(self.model)
        model.check(self.sampling)
        if model.fills_holes and self.masks is None:
            message = f"must be a folder or s3:// prefix for {model.name}, which fills holes, got none"
            raise OptionError("masks", message)
        if self.masks is not None and not model.fills_holes:
            message = f"must not be given for {model.name}, which fills no holes, got {self.masks}"
            raise OptionError("masks", message)
        outputs = UpscaleOptions(
            model=self.model,
            identity=model.identity,
            scale=self.sampling.outscale or model.scale,
            sampling=self.sampling,
            format=self.format,
            quality=self.quality,
            name=self.name,
            frames=self.settings.output.frames,
            masks=self.masks,
            detector=None if self.sampling.faces is None else yunet(self.sampling.faces).sha256,
        )
        try:
            outputs.output_key("folder/picture.png")
        except ValueError as error:
            raise OptionError("name", str(error)) from None
        ledger.check_job(self.target, outputs.record(self.source), self.settings.target)
        stages = StageOptions(
            outputs=outputs,
            target=self.target,
            limits=self.settings.decoder_limits(int(self.max_megapixels * 1e6)),
            if_exists=self.if_exists,
            source_s3=self.settings.source,
            target_s3=self.settings.target,
        )
        bulk = self.settings.work.bulk_options(self.settings.limits.deaths)
        return Job(source=self.source, stages=stages, bulk=bulk)

    def inputs(self, again: Collection[str] = ()) -> Inputs:
        """Return which inputs the job has.

        Args:
            again: Keys of inputs that are not done, whatever the ledger says.
        """
        selection = Selection(
            include=self.include,
            exclude=self.exclude,
            min_bytes=self.settings.select.min_bytes,
            max_bytes=self.settings.select.max_bytes,
        )
        return Inputs(
            source=self.source,
            selection=selection,
            keys=self.keys,
            retry_failed=self.retry_failed,
            again=frozenset(again),
        )

    def entries(self) -> Iterator[Entry]:
        """Return the selected inputs. The listing begins here, and streams.

        Raises:
            UsageError: There are none.
            OptionError: The list of keys cannot be read.
        """
        inputs = self.inputs()
        found = inputs.entries(self.settings.source)
        first = next(found, None)
        if first is None:
            selected = " that are selected" if inputs.selection != Selection() or self.keys else ""
            raise UsageError(f"no files under {self.source}{selected}")
        return itertools.chain([first], found)

    def sweep(self, job: Job, entries: Iterator[Entry], again: Collection[str] = ()) -> Sweep:
        """Return a pass over the inputs, or what is left of one that was stopped.

        Args:
            job: What `job` returned.
            entries: What `entries` returned.
            again: See `inputs`.
        """
        return Sweep(self.inputs(again), job.stages, entries)
