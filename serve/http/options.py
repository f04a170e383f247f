"""What a request may ask for. Unknown options are errors everywhere."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipelines.bulk.request import BulkRequest
from pipelines.bulk.settings import BulkSettings
from pipelines.bulk.stages import IfExists
from resshift.config import MAX_OUTSCALE, OptionError, Sampling
from resshift.images import Format
from resshift.output_names import CONTENT_TYPES, OutputFormat
from resshift.schedule import Sampler
from serve.http.problems import Problem

Outscale = Annotated[float, Field(gt=0, le=MAX_OUTSCALE)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
_FORMAT_BY_TYPE: dict[str, Format] = {content_type: format for format, content_type in CONTENT_TYPES.items()}


class PictureOptions(BaseModel):
    """Options of one picture."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str | None, Field(description="name of `GET /v1/models`; default: the first")] = None
    outscale: Annotated[
        Outscale | None,
        Field(description="sides of the result over sides of the picture; default: the model's"),
    ] = None
    cascade: Annotated[
        bool, Field(description="beyond the model's scale run it again, instead of bicubic interpolation")
    ] = False
    steps: Annotated[
        int | None,
        Field(ge=1, description="of the chain, at most the model's own, the default; fewer cost less"),
    ] = None
    sampler: Annotated[
        Sampler | None, Field(description="posterior, the default: noise at every step; ddim: at the first")
    ] = None
    fidelity: Annotated[
        float | None, Field(ge=0, le=1, description="0, the model, to 1, which invents nothing; default: 0")
    ] = None
    faces: Annotated[
        bool, Field(description="restore only the faces that a detector finds; for models that can")
    ] = False
    seed: Annotated[Seed, Field(description="same seed, same pixels")] = 0
    trajectory: Annotated[
        bool, Field(description="a ZIP file of what each step of the chain predicts, the result last")
    ] = False
    format: Annotated[Format | None, Field(description="of the result; default: by `Accept`, else png")] = (
        None
    )
    quality: Annotated[int, Field(ge=1, le=100, description="of jpeg, webp, avif and jxl")] = 95
    metadata: Annotated[
        Literal["keep", "strip"],
        Field(description="strip: no EXIF, and sRGB without a profile (other colours keep theirs)"),
    ] = "keep"

    def sampling(self, detector: str) -> Sampling:
        """Return how the pixels are made.

        Args:
            detector: File of the endpoint's face detector; empty: it has none.

        Raises:
            OptionError: Faces are wanted, and there is no detector; or beside another size.
        """
        return Sampling(
            seed=self.seed,
            outscale=self.outscale,
            cascade=self.cascade or None,
            steps=self.steps,
            sampler=self.sampler,
            fidelity=self.fidelity,
            faces=_detector(self.faces, detector),
        )


def _detector(is_wanted: bool, detector: str) -> str | None:
    """Return the detector for `Sampling.faces`.

    Raises:
        OptionError: It is wanted, and there is none.
    """
    if is_wanted and not detector:
        raise OptionError("faces", "must be false: this endpoint has no face detector")
    return detector if is_wanted else None


class BulkBody(BaseModel):
    """The body of `POST /v1/jobs`. Types and lengths are checked here, values by `BulkRequest`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[
        str, Field(max_length=2048, description="folder or s3:// prefix, inside what the server allows")
    ]
    target: Annotated[str, Field(max_length=2048, description="where outputs and the ledger go")]
    model: Annotated[str | None, Field(description="name of `GET /v1/models`; default: the first")] = None
    outscale: Annotated[
        float | None,
        Field(description="sides of an output over sides of its input, in (0, 16]; default: the model's"),
    ] = None
    cascade: Annotated[
        bool, Field(description="beyond the model's scale run it again, instead of bicubic interpolation")
    ] = False
    steps: Annotated[
        int | None, Field(description="of the chain, from 1 to the model's own, the default; fewer cost less")
    ] = None
    sampler: Annotated[
        str | None, Field(description="posterior, the default: noise at every step; ddim: at the first")
    ] = None
    fidelity: Annotated[
        float | None, Field(description="0, the model, to 1, which invents nothing; default: 0")
    ] = None
    faces: Annotated[
        bool, Field(description="restore only the faces that a detector finds; for models that can")
    ] = False
    format: Annotated[OutputFormat, Field(description="of outputs; keep: as the input's extension")] = (
        BulkRequest.format
    )
    quality: Annotated[int, Field(description="of jpeg and webp, 1 to 100")] = BulkRequest.quality
    name: Annotated[str, Field(max_length=256, description="template of output names")] = BulkRequest.name
    seed: Annotated[Seed, Field(description="same seed, same bytes")] = 0
    tile: Annotated[
        int | None, Field(description="side of a tile in input pixels; default: chosen, up to 256")
    ] = None
    masks: Annotated[
        str | None, Field(max_length=2048, description="where the masks are, for models that fill holes")
    ] = None
    include: Annotated[tuple[str, ...], Field(max_length=100, description="globs; only these inputs")] = ()
    exclude: Annotated[tuple[str, ...], Field(max_length=100, description="globs; not these inputs")] = ()
    if_exists: Annotated[IfExists, Field(description="what happens to outputs that no row names")] = (
        BulkRequest.if_exists
    )
    retry_failed: Annotated[bool, Field(description="do what failed once more")] = False

    def request(
        self, default_model: str, max_megapixels: float, settings: BulkSettings, detector: str = ""
    ) -> BulkRequest:
        """Return the job that is asked for.

        Args:
            default_model: Name of the model when the body names none.
            max_megapixels: Size of the largest input that the server takes.
            settings: What the server sets for all bulk jobs.
            detector: File of the endpoint's face detector; empty: it has none.

        Raises:
            OptionError: An option cannot have its value.
        """
        return BulkRequest(
            source=self.source,
            target=self.target,
            model=self.model or default_model,
            sampling=Sampling(
                seed=self.seed,
                outscale=self.outscale,
                cascade=self.cascade or None,
                steps=self.steps,
                sampler=self.sampler,
                fidelity=self.fidelity,
                faces=_detector(self.faces, detector),
                tile_px=self.tile,
            ),
            format=self.format,
            quality=self.quality,
            name=self.name,
            include=self.include,
            exclude=self.exclude,
            masks=self.masks,
            max_megapixels=max_megapixels,
            if_exists=self.if_exists,
            retry_failed=self.retry_failed,
            settings=settings,
        )


def negotiated_format(asked: Format | None, accept: str) -> Format:
    """Return the format of a result: the option, else the first of the accepted types that can be made, else
    png.

    Raises:
        Problem: not_acceptable.
    """
    if asked is not None:
        return asked
    ranges: list[tuple[float, str]] = []
    for part in accept.split(",") if accept.strip() else ["*/*"]:
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((value.removeprefix("q=") for value in parameters if value.startswith("q=")), "1")
        ranges.append((float(weight) if weight.replace(".", "", 1).isdecimal() else 0.0, name))
    for weight, name in sorted(ranges, key=lambda one: -one[0]):
        if weight > 0 and name in _FORMAT_BY_TYPE:
            return _FORMAT_BY_TYPE[name]
        if weight > 0 and name in ("*/*", "image/*"):
            return "png"
    raise Problem("not_acceptable", f"results are {', '.join(_FORMAT_BY_TYPE)}; `Accept` is {accept[:200]!r}")
