"""What a request may ask for. Unknown options are errors everywhere."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipelines.ledger.names import CONTENT_TYPES
from resshift.config import MAX_OUTSCALE, Sampling
from resshift.images.codec import Format
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
    steps: Annotated[
        int | None,
        Field(ge=1, description="of the chain, at most the model's own, the default; fewer cost less"),
    ] = None
    seed: Annotated[Seed, Field(description="same seed, same pixels")] = 0
    format: Annotated[Format | None, Field(description="of the result; default: by `Accept`, else png")] = (
        None
    )
    quality: Annotated[int, Field(ge=1, le=100, description="of jpeg and webp")] = 95
    metadata: Annotated[
        Literal["keep", "strip"],
        Field(description="strip: no EXIF, and sRGB without a profile (16-bit pictures keep theirs)"),
    ] = "keep"

    @property
    def sampling(self) -> Sampling:
        """How the pixels are made."""
        return Sampling(seed=self.seed, outscale=self.outscale, steps=self.steps)


class BulkRequest(BaseModel):
    """A bulk job: what `jobs/upscale.py` takes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Annotated[
        str, Field(max_length=2048, description="folder or s3:// prefix, inside what the server allows")
    ]
    target: Annotated[str, Field(max_length=2048, description="where outputs and the ledger go")]
    model: str | None = None
    outscale: Outscale | None = None
    steps: Annotated[int | None, Field(ge=1)] = None
    format: Literal["keep", "png", "jpeg", "webp", "tiff"] = "png"
    quality: Annotated[int, Field(ge=1, le=100)] = 95
    name: Annotated[str, Field(max_length=256, description="template of output names")] = (
        "{dir}/{stem}_x{scale}.{ext}"
    )
    seed: Seed = 0
    tile: Annotated[int | None, Field(ge=1)] = None
    include: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    exclude: Annotated[tuple[str, ...], Field(max_length=100)] = ()
    if_exists: Literal["skip", "verify", "overwrite"] = "overwrite"
    retry_failed: bool = False


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
