"""Pictures -> encoded bytes: PNG, JPEG, WebP, TIFF, AVIF or JPEG XL, with profile, EXIF and XMP.

The same picture gives the same bytes. Properties that a format cannot hold are dropped, with a note
(`fit_format`).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import get_args

import numpy as np
from PIL import Image

from resshift.images.avif import encode_deep_avif
from resshift.images.exif import resize_exif
from resshift.images.icc import from_working, means_srgb, to_srgb
from resshift.images.jxl import encode_jxl
from resshift.images.png import encode_png, resolution_chunks, text_chunks
from resshift.images.samples import to_eight_bit
from resshift.images.tiff import encode_tiff
from resshift.images.types import Format, ImageError, ImageReason, Picture
from resshift.images.xmp import resize_xmp

# The side of AVIF is what libavif, and with it every browser, decodes.
_MAX_SIDE_PX: dict[str, int] = {"jpeg": 65_500, "webp": 16_383, "avif": 32_768}
_AVIF_SPEED = 8  # photographs: the default, 6, takes five times as long for as many bytes
_ONE_FRAME = ("jpeg", "jxl")
_EIGHT_BIT = ("jpeg", "webp", "jxl")
_TEN_BIT_NOTE = "16 bit reduced to 10 for avif"
_MAX_JPEG_EXIF_BYTES = 65_000  # a segment holds 65 533 bytes
_MAX_JPEG_XMP_BYTES = 65_400


def encode(picture: Picture, format: Format = "png", quality: int = 95) -> bytes:
    """Encode a picture; the same picture gives the same bytes.

    Args:
        picture: Picture to encode. It is changed as by `fit_format`; call that first to get its notes.
        format: File format; png and tiff keep 16 bit and are lossless, avif keeps 10 of them, jpeg has no
            alpha.
        quality: Quality of jpeg, webp, avif and jxl, 1-100. From 90 on, colour of JPEG and AVIF of 8 bit is
            not subsampled; 100 is lossless in jxl and in AVIF of 10 bit.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, got {quality}")
    picture = fit_format(picture, format)
    exif, xmp = metadata_of(picture, format)
    if format == "tiff":
        return encode_tiff(picture.pixels, picture.alpha, picture.icc, exif, xmp, picture.resolution)
    if format == "png":
        chunks = (*resolution_chunks(picture.resolution), *text_chunks(picture.text))
        return encode_png(picture.pixels, picture.alpha, picture.icc, exif, xmp, chunks)
    if format == "jxl":
        return encode_jxl(picture.pixels, picture.alpha, quality, picture.icc, exif, xmp)
    if format == "avif" and picture.pixels.dtype == np.uint16:
        return encode_deep_avif(picture.pixels, picture.alpha, quality, _AVIF_SPEED, picture.icc, exif, xmp)
    image = to_pil(picture)
    out = io.BytesIO()
    metadata = {"icc_profile": picture.icc or b"", "exif": exif or b"", "xmp": xmp or b""}
    if format == "jpeg":
        dpi = {"dpi": picture.resolution} if picture.resolution else {}
        image.save(out, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2, **dpi, **metadata)
    elif format == "avif":
        chroma = "4:4:4" if quality >= 90 else "4:2:0"
        image.save(out, "AVIF", quality=quality, subsampling=chroma, speed=_AVIF_SPEED, **metadata)
    else:
        image.save(out, "WEBP", quality=quality, method=4, **metadata)
    return out.getvalue()


def metadata_of(picture: Picture, format: Format) -> tuple[bytes | None, bytes | None]:
    """Return the EXIF block and the XMP packet of a file of the picture, or None where there is none."""
    # JPEG, PNG and TIFF have a place of their own for it.
    told = None if format in ("jpeg", "png", "tiff") else picture.resolution
    exif = resize_exif(picture.exif, picture.width, picture.height, told) if picture.exif or told else None
    return exif, resize_xmp(picture.xmp, picture.width, picture.height) if picture.xmp else None


def fit_format(picture: Picture, format: Format) -> Picture:
    """Return the picture as `format` can hold it, with a note for everything that was dropped or changed.

    Raises:
        ImageError: too_large, if a side is longer than the format allows.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    check_sizes([(picture.width, picture.height)], format)
    if picture.text and format != "png":
        names = ", ".join(dict.fromkeys(name for name, _ in picture.text))
        picture = replace(picture, text=(), notes=(*picture.notes, f"text of the PNG dropped: {names[:200]}"))
    if format in _EIGHT_BIT:
        picture = in_eight_bit(picture, f"16 bit reduced to 8 for {format}")
    if format == "avif" and picture.pixels.dtype == np.uint16 and _TEN_BIT_NOTE not in picture.notes:
        picture = replace(picture, notes=(*picture.notes, _TEN_BIT_NOTE))
    if (
        format == "tiff"
        and picture.alpha is not None
        and picture.pixels.shape[2] == 1
        and picture.pixels.dtype == np.uint16
    ):
        pixels = np.repeat(picture.pixels, 3, axis=2)  # Pillow 13 cannot open 16-bit grey with alpha
        picture = replace(
            picture, pixels=pixels, notes=(*picture.notes, "16-bit grey with alpha written as RGB for tiff")
        )
    is_spread = format in ("webp", "avif") or (format == "jxl" and picture.alpha is not None)
    if is_spread and picture.icc and picture.pixels.shape[2] == 1 and picture.pixels.dtype == np.uint8:
        picture = in_srgb(picture, f"grey of a profile converted to sRGB, {format} holds it as RGB")
    if format == "jpeg" and picture.alpha is not None:
        weight = picture.alpha[..., None].astype(np.uint32)
        blended = ((picture.pixels * weight + 255 * (255 - weight) + 127) // 255).astype(np.uint8)
        picture = replace(
            picture,
            pixels=blended,
            alpha=None,
            notes=(*picture.notes, "transparency composited on white for jpeg"),
        )
    if format == "jpeg" and picture.exif is not None and len(picture.exif) > _MAX_JPEG_EXIF_BYTES:
        picture = replace(
            picture, exif=None, notes=(*picture.notes, "EXIF dropped, it is longer than a JPEG segment")
        )
    if format == "jpeg" and picture.xmp is not None and len(picture.xmp) > _MAX_JPEG_XMP_BYTES:
        picture = replace(
            picture, xmp=None, notes=(*picture.notes, "XMP dropped, it is longer than a JPEG segment")
        )
    return picture


def check_sizes(sizes: Sequence[tuple[int, int]], format: Format) -> None:
    """Refuse frames that a format cannot hold: this is known before they are made.

    Args:
        sizes: (width, height) of every frame.
        format: File format.

    Raises:
        ImageError: too_large, if a side is too long; animated, if the format holds one frame, or frames of
            one size.
    """
    allowed_px = _MAX_SIDE_PX.get(format)
    for width, height in sizes:
        if allowed_px is not None and max(width, height) > allowed_px:
            raise ImageError(
                ImageReason.TOO_LARGE,
                f"the picture is {width}x{height}, {format} holds at most {allowed_px} px a side",
            )
    if len(sizes) > 1 and format in _ONE_FRAME:
        raise ImageError(
            ImageReason.ANIMATED,
            f"{len(sizes)} frames do not fit into a {format}; choose png, webp or tiff, or frames=first",
        )
    if len(set(sizes)) > 1 and format != "tiff":
        told = ", ".join(f"{width}x{height}" for width, height in dict.fromkeys(sizes[:20]))
        raise ImageError(
            ImageReason.ANIMATED,
            f"frames of unlike sizes ({told}) do not fit into a {format}; choose tiff, or frames=first",
        )


def in_own_profile(picture: Picture) -> Picture:
    """Convert a picture that was converted for the network back to the profile of its file, and embed the
    profile; return any other picture as it is.
    """
    if picture.source_icc is None or picture.pixels.dtype != np.uint8:
        return picture
    pixels = from_working(picture.pixels, picture.icc, picture.source_icc)
    notes = tuple(f"{note} and back" if note.startswith("converted from") else note for note in picture.notes)
    return replace(picture, pixels=pixels, icc=picture.source_icc, source_icc=None, notes=notes)


def is_srgb(picture: Picture) -> bool:
    """Return whether the picture needs no profile."""
    return means_srgb(picture.icc, "L" if picture.pixels.shape[2] == 1 else "RGB")


def to_pil(picture: Picture) -> Image.Image:
    """Convert to a Pillow image of mode L, LA, RGB, RGBA or I;16, with profile, EXIF and XMP in `info`.

    Pillow has no 16-bit colour and no 16-bit alpha: both are reduced to 8 bit with rounding.
    """
    if picture.pixels.shape[2] == 3 or picture.alpha is not None:
        picture = in_eight_bit(picture)
    samples = (
        picture.pixels
        if picture.alpha is None
        else np.concatenate([picture.pixels, picture.alpha[..., None]], axis=2)
    )
    image = Image.fromarray(np.ascontiguousarray(samples[..., 0] if samples.shape[2] == 1 else samples))
    if picture.icc:
        image.info["icc_profile"] = picture.icc
    if picture.exif:
        image.info["exif"] = resize_exif(picture.exif, picture.width, picture.height)
    if picture.xmp:
        image.info["xmp"] = resize_xmp(picture.xmp, picture.width, picture.height)
    return image


def in_srgb(picture: Picture, *notes: str) -> Picture:
    """Return a picture of 8 bit in sRGB, without a profile, with the notes added."""
    return replace(
        picture, pixels=to_srgb(picture.pixels, picture.icc), icc=None, notes=picture.notes + notes
    )


def in_eight_bit(picture: Picture, *notes: str) -> Picture:
    """Return a 16-bit picture in 8 bit with the notes added; return any other picture as it is."""
    if picture.pixels.dtype == np.uint8:
        return picture
    alpha = None if picture.alpha is None else to_eight_bit(picture.alpha)
    return replace(picture, pixels=to_eight_bit(picture.pixels), alpha=alpha, notes=picture.notes + notes)
