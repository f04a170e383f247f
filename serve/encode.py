"""Results of a model as files, made beside the model.

The pixels of a result are many times its file. They are encoded in the process that has them, and what
travels to the gateway is what it sends.
"""

from __future__ import annotations

import io
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace

from resshift import images
from resshift.images import Format, ImageError, Picture
from resshift.images.animation import Frames, encode_frames, fit_frames


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How a result is written.

    Fields:
        format: Format.
        quality: Quality of JPEG, WebP, AVIF and JPEG XL, 1 to 100.
        keeps_metadata: Whether EXIF, XMP and the profile of the input go with it.
    """

    format: Format = "png"
    quality: int = 95
    keeps_metadata: bool = True


PNG = Encoding()


def extension(format: Format) -> str:
    """Return the extension of a file that is offered for download."""
    return "jpg" if format == "jpeg" else format


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoded:
    """A result as a file, or why there is none.

    Fields:
        data: Encoded picture, or an archive of those of the steps of a chain.
        size: Width and height.
        notes: What was changed, for the user.
        reason, message: Reason and message of a failure; empty when there is none.
        model_seconds, encode_seconds: Seconds in the model and in the encoder.
    """

    data: bytes = b""
    size: tuple[int, int] = (0, 0)
    notes: tuple[str, ...] = ()
    reason: str = ""
    message: str = ""
    model_seconds: float = 0.0
    encode_seconds: float = 0.0


def encode_result(picture: Picture, encoding: Encoding, model_seconds: float = 0.0) -> Encoded:
    """Encode a result. What the format cannot hold, and what its encoder raises, are reasons."""
    started = time.perf_counter()
    try:
        fitted, data = _encode(picture, encoding)
    except ImageError as error:
        return Encoded(reason=str(error.reason), message=str(error), model_seconds=model_seconds)
    except Exception as error:
        # The boundary of the stage: whatever an encoder raises is due to this picture.
        message = f"the result cannot be written as {encoding.format}: {type(error).__name__}: {error}"
        return Encoded(reason="encode_error", message=message, model_seconds=model_seconds)
    return Encoded(
        data=data,
        size=(fitted.width, fitted.height),
        notes=fitted.notes,
        model_seconds=model_seconds,
        encode_seconds=time.perf_counter() - started,
    )


def encode_steps(pictures: Sequence[Picture], encoding: Encoding, model_seconds: float = 0.0) -> Encoded:
    """Encode what each step of a chain predicts: a ZIP file of step_1.png, ..., the last one the result."""
    made = [encode_result(picture, encoding, model_seconds) for picture in pictures]
    failed = next((one for one in made if one.reason), None)
    if failed is not None:
        return failed
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:  # stored: pictures are compressed already
        for i, one in enumerate(made, 1):
            # Of a fixed date: the same request has the same bytes.
            file.writestr(zipfile.ZipInfo(f"step_{i}.{extension(encoding.format)}"), one.data)
    seconds = sum(one.encode_seconds for one in made)
    return replace(made[-1], data=archive.getvalue(), encode_seconds=seconds)


def _encode(picture: Picture, encoding: Encoding) -> tuple[Picture, bytes]:
    """Return the picture as the format holds it, and the file."""
    if encoding.keeps_metadata:
        picture = images.in_own_profile(picture)
    else:
        # Samples outside sRGB mean nothing without their profile.
        icc = None if images.is_srgb(picture) else picture.icc
        picture = replace(picture, exif=None, xmp=None, source_icc=None, icc=icc)
    fitted = fit_frames(Frames((picture,)), encoding.format)
    return fitted.pictures[0], encode_frames(fitted, encoding.format, encoding.quality)
