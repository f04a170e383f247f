"""Pictures: encoded bytes <-> arrays <-> tensors.

`probe` reads a header, `decode` returns a `Picture` (upright, sRGB, RGB or grey, alpha apart), `encode`
writes one. What a file is, is decided by its content, never by its name. Sizes are checked in the header,
before anything is allocated. Whatever a hostile file makes Pillow or OpenCV raise becomes an `ImageError`
with a reason from a closed vocabulary.

Pillow reads everything but 16-bit colour, which it would reduce to 8 bit: that goes through OpenCV. OpenCV
writes PNG (7x faster than Pillow's default). OpenCV's channel order is BGR: nowhere outside this module.

Value ranges: uint8 0-255 or uint16 0-65535 in arrays, [-1, 1] float32 in tensors.

What it does not do: animation (`resshift.images.animation`), floating-point colour, more than four bands
(what Pillow makes of the first, with a note).
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

from resshift.images.containers import essential_png, grey_alpha_png, insert_png_chunks, tiff_bytes
from resshift.images.exif import descriptive_exif, read_orientation, resize_exif, upright
from resshift.images.header import count_frames, identify, probe, read_header, refusals, sample_bits
from resshift.images.icc import from_srgb, to_srgb
from resshift.images.types import Array, ImageError, ImageHeader, ImageLimits, Picture, Reason, check_pixels
from resshift.images.xmp import descriptive_xmp, resize_xmp

if TYPE_CHECKING:
    from torch import (
        Tensor,
    )  # imported by the two functions that need it: a process that only decodes starts in 0.3 s

__all__ = [
    "Format",
    "ImageError",
    "ImageHeader",
    "ImageLimits",
    "Picture",
    "Reason",
    "decode",
    "encode",
    "fit_format",
    "from_pil",
    "from_tensor",
    "in_own_profile",
    "probe",
    "swap_red_blue",
    "to_pil",
    "to_tensor",
]

Format = Literal["png", "jpeg", "webp", "tiff"]
_MAX_SIDE_PX: dict[str, int] = {"jpeg": 65_500, "webp": 16_383}
_MAX_JPEG_EXIF_BYTES = 65_000  # a segment holds 65 533 bytes
_MAX_JPEG_XMP_BYTES = 65_400
# Named, not OpenCV's default, so that bytes do not change with its version. These are the fastest for
# photographs.
_PNG_OPTIONS = (
    *(cv2.IMWRITE_PNG_COMPRESSION, 1),
    *(cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE),
    *(cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_SUB),
)


def swap_red_blue(pixels: Array) -> Array:
    """Bring (H, W, 3) from RGB to the order that OpenCV's codecs take and give, or back."""
    return np.asarray(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR))


def _sixteen_bit_colour(image: Image.Image, data: bytes) -> Array | None:
    """Decode a 16-bit picture that Pillow reduces to 8 bit, uint16 in 2 (grey, alpha), 3 or 4 channels; None
    when it is not one.
    """
    if (
        image.format not in ("PNG", "TIFF")
        or image.mode not in ("RGB", "RGBA")
        or sample_bits(image, data) != 16
    ):
        return None
    clean = essential_png(data) if image.format == "PNG" else data
    decoded = cv2.imdecode(np.frombuffer(clean, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if (
        decoded is None
        or decoded.dtype != np.uint16
        or decoded.ndim != 3
        or decoded.shape[1::-1] != image.size
    ):
        raise ImageError(
            Reason.CORRUPT, f"{image.format} data: Pillow reads it in 8 bit, OpenCV cannot read it in 16 bit"
        )
    extra = (
        image.tag_v2.get(TiffImagePlugin.EXTRASAMPLES, ())
        if isinstance(image, TiffImagePlugin.TiffImageFile)
        else ()
    )
    rgb = swap_red_blue(decoded[..., :3])
    if extra != (1,) and not np.array_equal(
        rgb >> 8, np.asarray(image)[..., :3]
    ):  # e.g. separate planes, which OpenCV mixes up
        raise ImageError(
            Reason.UNSUPPORTED_MODE,
            "Pillow and OpenCV read different values; 16-bit colour must be interleaved",
        )
    if decoded.shape[2] == 3:
        return rgb
    if extra == (0,):  # a fourth band without a meaning
        return rgb
    alpha = decoded[..., 3:]
    if (
        image.format == "PNG" and data[25] == 4
    ):  # IHDR: grey with alpha, which both libraries spread over three channels
        return np.concatenate([rgb[..., :1], alpha], axis=2)
    if extra == (1,):  # premultiplied
        rgb = np.minimum(rgb.astype(np.uint64) * 65535 // np.maximum(alpha, 1), 65535).astype(np.uint16)
    return np.concatenate([rgb, alpha], axis=2)


def decode(data: bytes, limits: ImageLimits | None = None) -> Picture:
    """Decode a file: upright, sRGB, RGB or grey, 16 bit kept.

    Args:
        data: the whole file.
        limits: sizes accepted; `ImageLimits()` when None.

    Raises:
        ImageError: with the reason. No other exception leaves, whatever the bytes.
    """
    limits = limits or ImageLimits()
    image = read_header(data, limits)
    name = identify(data)
    with refusals(f"{name} data"):
        orientation = read_orientation(image) if name == "TIFF" else 1  # Pillow turns a TIFF while loading it
        image.load()
        limits.check_size(*image.size)  # a GIF frame may be larger than its screen
        num_frames, is_exact = count_frames(data)
        notes = (f"first of {'' if is_exact else 'at least '}{num_frames} frames",) if num_frames > 1 else ()
        if orientation != 1:
            notes += (f"orientation {orientation} applied",)
        picture = _from_loaded(image, _sixteen_bit_colour(image, data))
        return replace(picture, format=name, notes=notes + picture.notes)


def from_pil(image: Image.Image) -> Picture:
    """Convert a Pillow image of any mode but LAB and HSV (I and F within 16 bit); its EXIF orientation and
    ICC profile are applied.

    Raises:
        ImageError: unsupported_mode, or what a lazily opened file turns out to be.
    """
    with refusals("Pillow image"):
        image.load()
        return _from_loaded(image, None)


def _grey16(image: Image.Image) -> Picture:
    """Take the samples of modes I;16*, and of I when they fit in 16 bit."""
    samples = np.asarray(image)
    notes: tuple[str, ...] = ()
    if image.mode == "I":
        if samples.min() < 0 or samples.max() > 65535:
            raise ImageError(
                Reason.UNSUPPORTED_MODE,
                f"samples reach from {samples.min()} to {samples.max()}, 0 to 65535 is allowed",
            )
        notes = ("signed or 32-bit samples taken as 16-bit",)
    values = samples.astype(np.uint16)
    tags: Any = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    if tags.get(TiffImagePlugin.BITSPERSAMPLE) == (12,):
        values = ((values.astype(np.uint32) * 65535 + 2047) // 4095).astype(np.uint16)
        notes = ("12-bit samples scaled to 16-bit",)
    alpha = None
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        alpha = np.where(values == transparent, 0, 65535).astype(np.uint16)
    if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero; Pillow inverts only 8 bit
        values = 65535 - values
    return Picture(pixels=values[..., None], alpha=alpha, notes=notes)


def _float_grey(image: Image.Image) -> Picture:
    """Bring floating-point grey to 16 bit. Its white is the smallest of 1, 255 and 65535 that no finite
    sample exceeds.
    """
    samples = np.asarray(image)
    finite = samples[np.isfinite(samples)]
    highest = float(finite.max(initial=0.0))
    white = next((white for white in (1.0, 255.0, 65535.0) if highest <= white), None)
    if white is None or float(finite.min(initial=0.0)) < 0:
        message = f"floating-point samples reach from {finite.min()} to {highest}, 0 to 65535 is allowed"
        raise ImageError(Reason.UNSUPPORTED_MODE, message)
    notes = (f"floating-point samples with white at {white:g} written as 16-bit",)
    if finite.size < samples.size:
        notes += (f"{samples.size - finite.size} samples were NaN or infinite",)
    known = np.nan_to_num(samples, nan=0.0, posinf=white, neginf=0.0).astype(np.float64)
    return Picture(pixels=(known * (65535 / white) + 0.5).astype(np.uint16)[..., None], notes=notes)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(image: Image.Image, icc: bytes | None) -> Picture:
    """Convert any 8-bit mode; palette, key colours and profiles applied."""
    notes: tuple[str, ...] = ()
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        num_samples = int(image.tag_v2.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
        if num_samples > len(image.getbands()):
            notes = (f"{num_samples - len(image.getbands())} extra bands dropped",)
    has_alpha = image.has_transparency_data
    if image.mode in ("1", "L", "LA", "La"):
        image = _in_mode(image, "LA" if has_alpha else "L")
    elif image.mode in ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"):
        image = _in_mode(image, "RGBA" if has_alpha else "RGB")
    elif image.mode != "CMYK":
        allowed = "grey, RGB, palette, YCbCr and CMYK of 8 or 16 bit"
        raise ImageError(Reason.UNSUPPORTED_MODE, f"pixel mode {image.mode!r}, allowed are {allowed}")
    alpha = np.array(image.getchannel("A")) if has_alpha else None
    image = image.convert(image.mode[:-1]) if has_alpha else image
    space, profile = image.mode, icc
    image, icc, colour_notes = to_srgb(image, profile)
    source = (
        profile
        if profile and icc is None and space != "CMYK" and colour_notes[0].startswith("converted from")
        else None
    )
    pixels = np.array(image)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return Picture(pixels=pixels, alpha=alpha, icc=icc, source_icc=source, notes=notes + colour_notes)


def in_own_profile(picture: Picture) -> Picture:
    """Return a picture that was converted to sRGB for the network in the profile of its file, embedded again;
    any other as it is.
    """
    if picture.source_icc is None or picture.pixels.dtype != np.uint8:
        return picture
    pixels = from_srgb(picture.pixels, picture.source_icc)
    notes = tuple(f"{note} and back" if note.startswith("converted from") else note for note in picture.notes)
    return replace(picture, pixels=pixels, icc=picture.source_icc, source_icc=None, notes=notes)


def _from_loaded(image: Image.Image, samples: Array | None) -> Picture:
    """Build the picture of a loaded image; `samples` are its 16-bit values where Pillow has only 8."""
    orientation = read_orientation(image)
    exif, exif_notes = descriptive_exif(image)
    xmp, xmp_notes = descriptive_xmp(image)
    icc: bytes | None = image.info.get("icc_profile") or None
    if samples is not None:
        has_alpha = samples.shape[2] in (2, 4)
        picture = Picture(
            pixels=samples[..., :-1] if has_alpha else samples,
            alpha=samples[..., -1] if has_alpha else None,
            icc=icc,
        )
    elif image.mode.startswith("I"):
        picture = replace(_grey16(image), icc=icc)
    elif image.mode == "F":
        picture = replace(_float_grey(image), icc=icc)
    else:
        picture = _eight_bit(image, icc)
    if picture.pixels.dtype == np.uint16 and icc:
        exif_notes += ("16 bit: ICC profile kept, not converted to sRGB",)
    turned = upright(picture.pixels, orientation)
    alpha = None if picture.alpha is None else upright(picture.alpha, orientation)
    turn_notes = () if orientation == 1 else (f"orientation {orientation} applied",)
    return replace(
        picture,
        pixels=turned,
        alpha=alpha,
        exif=exif,
        xmp=xmp,
        notes=turn_notes + picture.notes + exif_notes + xmp_notes,
    )


def to_pil(picture: Picture) -> Image.Image:
    """Convert to a Pillow image of mode L, LA, RGB, RGBA or I;16, profile, EXIF and XMP in `info`.

    Pillow has no 16-bit colour and no 16-bit alpha: both are reduced to 8 bit with rounding.
    """
    if picture.pixels.shape[2] == 3 or picture.alpha is not None:
        picture = _reduced(picture)
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


def _to_eight_bit(samples: Array) -> Array:
    """Round uint16 to uint8: 65535 / 255 = 257 exactly."""
    return ((samples.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _reduced(picture: Picture, *notes: str) -> Picture:
    """Return a 16-bit picture in 8 bit with the notes added, any other as it is."""
    if picture.pixels.dtype == np.uint8:
        return picture
    alpha = None if picture.alpha is None else _to_eight_bit(picture.alpha)
    return replace(picture, pixels=_to_eight_bit(picture.pixels), alpha=alpha, notes=picture.notes + notes)


def fit_format(picture: Picture, format: Format) -> Picture:
    """Return the picture as `format` can hold it, with a note for everything that was given up.

    Raises:
        ImageError: too_large, when a side is longer than the format allows.
    """
    if format not in get_args(Format):
        raise ValueError(f"format must be one of {', '.join(get_args(Format))}, got {format!r}")
    allowed_px = _MAX_SIDE_PX.get(format)
    if allowed_px is not None and max(picture.width, picture.height) > allowed_px:
        size = f"{picture.width}x{picture.height}"
        raise ImageError(
            Reason.TOO_LARGE, f"the picture is {size}, {format} holds at most {allowed_px} px a side"
        )
    if format in ("jpeg", "webp"):
        picture = _reduced(picture, f"16 bit reduced to 8 for {format}")
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


def encode(picture: Picture, format: Format = "png", quality: int = 95) -> bytes:
    """Encode a picture; the same picture gives the same bytes.

    Args:
        picture: what `fit_format` would change is changed here too, silently: call it first to keep the
            notes.
        format: png and tiff keep 16 bit and are lossless; jpeg has no alpha.
        quality: 1-100, jpeg and webp only. From 90 on, JPEG colour is not subsampled.
    """
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must be 1 to 100, got {quality}")
    picture = fit_format(picture, format)
    exif = resize_exif(picture.exif, picture.width, picture.height) if picture.exif else None
    xmp = resize_xmp(picture.xmp, picture.width, picture.height) if picture.xmp else None
    if format == "tiff":
        return tiff_bytes(picture.pixels, picture.alpha, picture.icc, exif, xmp)
    if format == "png":
        return insert_png_chunks(_png(picture), picture.icc, exif, xmp)
    image = to_pil(picture)
    out = io.BytesIO()
    metadata = {"icc_profile": picture.icc or b"", "exif": exif or b"", "xmp": xmp or b""}
    if format == "jpeg":
        image.save(out, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2, **metadata)
    else:
        image.save(out, "WEBP", quality=quality, method=4, **metadata)
    return out.getvalue()


def _png(picture: Picture) -> bytes:
    pixels, alpha = picture.pixels, picture.alpha
    if pixels.shape[2] == 1 and alpha is not None:
        return grey_alpha_png(pixels, alpha)
    if pixels.shape[2] == 3:
        bgr = swap_red_blue(pixels)
        pixels = bgr if alpha is None else np.concatenate([bgr, alpha[..., None]], axis=2)
    encoded, buffer = cv2.imencode(".png", pixels, _PNG_OPTIONS)
    if not encoded:
        raise ImageError(
            Reason.TOO_LARGE, f"OpenCV could not write a PNG of {picture.width}x{picture.height}"
        )
    return buffer.tobytes()


def to_tensor(pixels: Array) -> Tensor:
    """Convert (H, W, 1 or 3) uint8 or uint16 to (1, 3, H, W) float32 in [-1, 1]; grey becomes three equal
    channels.
    """
    import torch

    check_pixels(pixels)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1)).astype(np.float32)
    planes /= np.float32(np.iinfo(pixels.dtype).max / 2)
    planes -= 1
    return torch.as_tensor(planes).expand(3, -1, -1)[None].contiguous()


def from_tensor(x: Tensor, dtype: type[np.uint8] | type[np.uint16] = np.uint8) -> Array:
    """Convert (1, C, H, W) or (C, H, W) in [-1, 1] to (H, W, C) integers, round(max * (x + 1) / 2), halves
    up, values outside clamped.

    Raises:
        ValueError: another shape, or NaN or infinity among the values.
    """
    import torch

    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[0] != 1):
        raise ValueError(f"x must be (1, C, H, W) or (C, H, W), got {tuple(x.shape)}")
    planes = x.detach().to("cpu", torch.float32).reshape(x.shape[-3:])
    if not bool(torch.isfinite(planes).all()):
        raise ValueError("x holds NaN or infinity, finite values are needed")
    scaled = planes.clamp(-1, 1).add_(1).mul_(np.iinfo(dtype).max / 2).add_(0.5).floor_()
    return np.ascontiguousarray(scaled.permute(1, 2, 0).numpy()).astype(dtype)
