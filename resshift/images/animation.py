"""Pictures of several frames or pages: the caller takes the first, takes all, or refuses them.

    frames = decode_frames(data, limits, "all")       one Picture for each frame, and the time it is shown
    data = encode_frames(frames, "webp")

A still picture is one frame, so pictures are passed on as `Frames` everywhere. APNG, WebP and GIF give
composed frames of the canvas size, so does AVIF, and TIFF gives its pages. Several frames are written as
APNG, WebP, AVIF or a TIFF of pages, lossless except for WebP below quality 100 and AVIF. Pages of a TIFF keep
16 bit, their profiles, XMP and resolutions; frames are of 8 bit and of one profile.

What it does not do: GIF output (256 colours), EXIF for each frame or page, XMP, resolution and text for each
frame (those of the first are written).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import TiffImagePlugin

from resshift.images.decoding import decode, read_frame
from resshift.images.encoding import (
    check_sizes,
    encode,
    fit_format,
    in_eight_bit,
    in_srgb,
    metadata_of,
    to_pil,
)
from resshift.images.header import probe, read_header, refusals
from resshift.images.identify import identify, pages
from resshift.images.png import insert_chunks, read_text, resolution_chunks, text_chunks
from resshift.images.types import Format, ImageError, ImageLimits, ImageReason, Picture, scaled

_PAGE_MS = 1000  # pages of a document have no duration: in an animation each is shown for a second
FrameChoice = Literal["first", "all", "fail"]


@dataclass(frozen=True, slots=True)
class Frames:
    """One or several pictures of one file.

    Fields:
        pictures: At least one picture, or none in a result that failed.
        durations_ms: Time that each frame is shown; empty for pages and still pictures.
        loop: Number of times that an animation is repeated; 0 repeats it forever.
    """

    pictures: tuple[Picture, ...]
    durations_ms: tuple[int, ...] = ()
    loop: int = 0

    def map(self, change: Callable[[Picture], Picture]) -> Frames:
        """Return the frames with `change` applied to every picture."""
        return replace(self, pictures=tuple(change(picture) for picture in self.pictures))

    def sizes(self, factor: float = 1) -> list[tuple[int, int]]:
        """Return (width, height) of every frame after scaling."""
        return [(scaled(one.width, factor), scaled(one.height, factor)) for one in self.pictures]

    @property
    def num_pixels(self) -> int:
        return sum(picture.width * picture.height for picture in self.pictures)

    @property
    def num_bytes(self) -> int:
        """Size of the arrays in memory."""
        planes = (plane for one in self.pictures for plane in (one.pixels, one.alpha, one.mask))
        return sum(plane.nbytes for plane in planes if plane is not None)


def decode_frames(data: bytes, limits: ImageLimits | None = None, choice: FrameChoice = "first") -> Frames:
    """Decode a file of one or several frames.

    Args:
        data: Content of the file.
        limits: Sizes that are accepted. `max_pixels` is a limit for all frames together, `max_frames` for
            their number.
        choice: "first" takes the first frame, with a note; "all" takes every frame; "fail" refuses files of
            several frames.

    Raises:
        ImageError: The file is refused, with the reason; `animated` for "fail".
    """
    limits = limits or ImageLimits()
    num_frames = probe(data, limits).num_frames
    if num_frames > 1 and choice == "fail":
        raise ImageError(
            ImageReason.ANIMATED,
            f"the file has {num_frames} frames or pages; frames=first or frames=all accept it",
        )
    if num_frames == 1 or choice == "first":
        return Frames((decode(data, limits),))
    if num_frames > limits.max_frames:
        raise ImageError(
            ImageReason.TOO_LARGE,
            f"the file has {num_frames} frames or pages, at most {limits.max_frames} are allowed",
        )
    image = read_header(data, limits)
    width, height = image.size
    if width * height * num_frames > limits.max_pixels:
        count = f"{num_frames} frames of {width}x{height}"
        raise ImageError(
            ImageReason.TOO_LARGE,
            f"the file has {count}, at most {limits.max_pixels} pixels are allowed in all",
        )
    pictures: list[Picture] = []
    durations: list[int] = []
    name = identify(data)
    with refusals(f"{name} frames"):
        for i_frame in pages(data) if name == "TIFF" else range(num_frames):
            image.seek(i_frame)
            pictures.append(read_frame(image, data, limits, is_film=name != "TIFF"))
            durations.append(round(float(image.info.get("duration") or 0)))
        loop = int(image.info.get("loop") or 0)
        text, text_notes = read_text(image)  # of an APNG, from all of its frames
    first = pictures[0]
    first = replace(first, text=text, notes=(f"{num_frames} frames", *first.notes, *text_notes))
    return Frames((first, *pictures[1:]), () if name == "TIFF" else tuple(durations), loop)


def fit_frames(frames: Frames, format: Format) -> Frames:
    """Return the frames as `format` can hold them; the notes of all are on the first. See
    `images.fit_format`.

    Raises:
        ImageError: See `images.check_sizes`.
    """
    check_sizes(frames.sizes(), format)
    if len(frames.pictures) > 1 and format != "tiff":
        frames = frames.map(lambda one: in_eight_bit(one, f"16 bit reduced to 8 for frames of {format}"))
        if len({one.icc for one in frames.pictures}) > 1:
            frames = frames.map(lambda one: in_srgb(one, "frames of unlike profiles converted to sRGB"))
    first, *others = (fit_format(picture, format) for picture in frames.pictures)
    notes = dict.fromkeys(note for one in (first, *others) for note in one.notes)
    return replace(frames, pictures=(replace(first, notes=tuple(notes)), *others))


def encode_frames(frames: Frames, format: Format = "png", quality: int = 95) -> bytes:
    """Encode one picture as `images.encode` does, or all frames of an animation."""
    if len(frames.pictures) == 1:
        return encode(frames.pictures[0], format, quality)
    first, *others = fit_frames(frames, format).pictures
    out = io.BytesIO()
    if format == "tiff":
        with TiffImagePlugin.AppendingTiffWriter(out, True) as writer:
            for page in (first, *(replace(other, exif=None) for other in others)):
                writer.write(encode(page, format))
                writer.newFrame()
        return out.getvalue()
    converted = [to_pil(picture) for picture in (first, *others)]
    is_grey = format == "png" and all(picture.pixels.shape[2] == 1 for picture in (first, *others))
    has_alpha = any(image.has_transparency_data for image in converted)
    mode = ("L" if is_grey else "RGB") + ("A" if has_alpha else "")
    shown = [image.convert(mode) for image in converted]
    # Frames replace each other instead of being blended, so that a decoder shows exactly these pixels.
    durations = list(frames.durations_ms) or [_PAGE_MS] * len(shown)
    options: dict[str, Any] = {
        "png": {"loop": frames.loop, "compress_level": 1, "blend": 0, "disposal": 0, "icc_profile": None},
        "webp": {"loop": frames.loop, "quality": quality, "lossless": quality == 100, "method": 4},
        "avif": {"quality": quality},
    }[format]
    exif, xmp = metadata_of(first, format)
    if format != "png":
        options |= {"icc_profile": first.icc or b"", "exif": exif or b"", "xmp": xmp or b""}
    shown[0].save(out, format.upper(), save_all=True, append_images=shown[1:], duration=durations, **options)
    if format != "png":
        return out.getvalue()
    chunks = (*resolution_chunks(first.resolution), *text_chunks(first.text))
    return insert_chunks(out.getvalue(), first.icc, exif, xmp, chunks)
