"""Encoded bytes -> pictures: upright, sRGB, RGB or grey, alpha apart, 16 bit kept.

A file's format is decided by its content, never by its name. Sizes are checked in the header, before
anything is allocated. Whatever a hostile file makes Pillow or OpenCV raise becomes an `ImageError` with a
reason from a closed vocabulary.

Pillow reads everything but colour of more than 8 bit, which it would reduce to 8: that goes through OpenCV
(PNG, TIFF, AVIF) or libheif. JPEG XL is read in 8 bit.

What it does not do: animation (`resshift.images.animation`), floating-point colour, more than four bands
(Pillow reads the first ones; a note says so).
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin

from resshift.images.coded_colours import coded_colours
from resshift.images.exif import ORIENTATION, descriptive_exif, read_orientation, upright
from resshift.images.header import count_frames, read_header, refusals, sample_bits
from resshift.images.icc import to_working
from resshift.images.identify import identify
from resshift.images.png import essential_png, read_text, scale_transparent_level
from resshift.images.resolution import read_resolution
from resshift.images.samples import swap_red_blue
from resshift.images.types import Array, ImageError, ImageLimits, ImageReason, Picture
from resshift.images.xmp import descriptive_xmp

_EOI = 0xD9
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")  # of a segment, or EOI; a scan holds none of them


def decode(data: bytes, limits: ImageLimits | None = None) -> Picture:
    """Decode a file: upright, sRGB, RGB or grey, 16 bit kept.

    Args:
        data: Content of the file.
        limits: Sizes that are accepted; None means `ImageLimits()`.

    Raises:
        ImageError: The file is refused, with the reason. No other exception is raised, whatever the bytes.
    """
    limits = limits or ImageLimits()
    image = read_header(data, limits)
    name = identify(data)
    with refusals(f"{name} data"):
        num_in_file = int(getattr(image, "n_frames", 1)) if name in ("JPEG", "HEIF") else 1
        picture = read_frame(image, data, limits)
        num_frames, is_exact = count_frames(data)
        notes = (f"first of {'' if is_exact else 'at least '}{num_frames} frames",) if num_frames > 1 else ()
        if name in ("JPEG", "HEIF") and (num_more := num_in_file - 1):
            notes += (
                f"further pictures in the file left out (gain map, preview or second view): {num_more}",
            )
        elif name == "JPEG" and data[(end := _jpeg_end(data)) :].strip(b"\0\xff"):  # which may be padding
            notes += (
                f"data behind the picture left out (a video or a further picture): {len(data) - end} bytes",
            )
        if getattr(image, "is_animated", False) and name == "JXL":
            notes += ("first frame of an animation",)
        return replace(picture, notes=notes + picture.notes)


def _jpeg_end(data: bytes) -> int:
    """Return where the first picture of a JPEG ends, behind its EOI marker (ITU-T T.81, section B.1); the
    length of the data if it has none.
    """
    at = 2
    while match := _MARKER.search(data, at):
        at = match.end()
        if data[at - 1] == _EOI:
            return at
        at += int.from_bytes(data[at : at + 2])  # a segment, in which a thumbnail may have an EOI of its own
    return len(data)


def read_frame(image: Image.Image, data: bytes, limits: ImageLimits, is_film: bool = False) -> Picture:
    """Convert the frame or page at which an opened file stands.

    Args:
        image: What `read_header` returned, moved to a frame.
        data: Content of the file.
        limits: Sizes that are accepted.
        is_film: Whether further frames of an animation are read: they are composed by Pillow, in 8 bit, so
            all are of 8 bit. Pages of a TIFF keep 16.

    Raises:
        ImageError: too_large, unsupported_mode or corrupt. Exceptions of decoders are left to the caller.
    """
    name = identify(data)
    orientation = read_orientation(image) if name == "TIFF" else 1  # Pillow rotates a TIFF as it loads it
    image.load()
    limits.check_size(*image.size)  # a frame of a GIF may be larger than its header says
    if is_film:
        copy = image.copy()  # `info`, which is changed below, is that of later frames too
        copy.format = image.format
        image = copy
    if name in ("HEIF", "JXL"):
        image.getexif()[ORIENTATION] = 1  # libheif and libjxl have applied theirs, and EXIF may repeat it
    bits = sample_bits(image, data)
    if name == "PNG":
        scale_transparent_level(image, bits)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and TiffImagePlugin.ICCPROFILE not in image.tag_v2:
        image.info.pop("icc_profile", None)  # Pillow leaves that of the page before
    icc, colour_notes = coded_colours(image, data)
    picture = _from_loaded(image, icc, None if is_film else _deep_samples(image, data))
    notes = () if orientation == 1 else (f"orientation {orientation} applied",)
    if bits > 8 and picture.pixels.dtype == np.uint8:
        notes += (f"{bits} bit read as 8",)
    return replace(picture, format=name, notes=notes + colour_notes + picture.notes)


def from_pil(image: Image.Image) -> Picture:
    """Convert a Pillow image of any mode except LAB and HSV (I and F within 16 bit); its EXIF orientation and
    ICC profile are applied.

    Raises:
        ImageError: unsupported_mode, or any other reason if the image is a file that is not yet loaded.
    """
    with refusals("Pillow image"):
        image.load()
        icc, notes = coded_colours(image)
        picture = _from_loaded(image, icc, None)
        return replace(picture, notes=notes + picture.notes)


def _from_loaded(image: Image.Image, icc: bytes | None, samples: Array | None) -> Picture:
    """Build the picture of a loaded image; `samples` are its 16-bit values if Pillow has only 8 bits."""
    orientation = read_orientation(image)
    exif, exif_notes = descriptive_exif(image)
    xmp, xmp_notes = descriptive_xmp(image)
    text, text_notes = read_text(image)
    resolution = read_resolution(image)
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
        resolution=resolution if resolution is None or orientation < 5 else resolution[::-1],
        text=text,
        notes=turn_notes + picture.notes + exif_notes + xmp_notes + text_notes,
    )


def _deep_samples(image: Image.Image, data: bytes) -> Array | None:
    """Return the uint16 samples of a picture that Pillow reads in 8 bit; None for any other picture."""
    bits = sample_bits(image, data)
    if image.format not in ("HEIF", "AVIF") or bits <= 8:
        return _sixteen_bit_colour(image, data)
    samples = _heif_samples(data, bits) if image.format == "HEIF" else _avif_samples(data)
    if samples is None or samples.shape[1::-1] != image.size:
        return None
    highest = (1 << bits) - 1
    return ((samples.astype(np.uint32) * 65535 + highest // 2) // highest).astype(np.uint16)


def _heif_samples(data: bytes, bits: int) -> Array:
    from pi_heif import open_heif

    file: Any = open_heif(data, convert_hdr_to_8bit=False)
    shifted = np.asarray(file[file.primary_index])  # in the upper bits of 16
    samples = shifted >> (16 - bits) if shifted.dtype == np.uint16 else shifted
    return samples if samples.ndim == 3 else samples[..., None]


def _avif_samples(data: bytes) -> Array | None:
    decoded = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_UNCHANGED)
    if decoded is None or decoded.dtype != np.uint16:
        return None
    if decoded.ndim == 2:
        return decoded[..., None]
    return np.concatenate([swap_red_blue(np.ascontiguousarray(decoded[..., :3])), decoded[..., 3:]], axis=2)


def _sixteen_bit_colour(image: Image.Image, data: bytes) -> Array | None:
    """Decode a 16-bit picture that Pillow would reduce to 8 bit, as uint16 with 2 (grey and alpha), 3 or 4
    channels; return None for any other picture.
    """
    if (
        image.format not in ("PNG", "TIFF")
        or image.mode not in ("RGB", "RGBA")
        or sample_bits(image, data) != 16
    ):
        return None
    clean = np.frombuffer(essential_png(data) if image.format == "PNG" else data, dtype=np.uint8)
    page = image.tell() if image.format == "TIFF" else 0
    _, read = cv2.imdecodemulti(clean, cv2.IMREAD_UNCHANGED, range=(page, page + 1))
    decoded = read[0] if read else None
    if (
        decoded is None
        or decoded.dtype != np.uint16
        or decoded.ndim != 3
        or decoded.shape[1::-1] != image.size
    ):
        raise ImageError(
            ImageReason.CORRUPT,
            f"{image.format} data: Pillow reads it in 8 bit, OpenCV cannot read it in 16 bit",
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
            ImageReason.UNSUPPORTED_MODE,
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


def _grey16(image: Image.Image) -> Picture:
    """Return the samples of modes I;16*, and of mode I if they fit in 16 bit."""
    samples = np.asarray(image)
    notes: tuple[str, ...] = ()
    if image.mode == "I":
        if samples.min() < 0 or samples.max() > 65535:
            raise ImageError(
                ImageReason.UNSUPPORTED_MODE,
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
    """Convert floating-point grey to 16 bit. White is the smallest of 1, 255 and 65535 that no finite sample
    exceeds.
    """
    samples = np.asarray(image)
    finite = samples[np.isfinite(samples)]
    highest = float(finite.max(initial=0.0))
    white = next((white for white in (1.0, 255.0, 65535.0) if highest <= white), None)
    if white is None or float(finite.min(initial=0.0)) < 0:
        message = f"floating-point samples reach from {finite.min()} to {highest}, 0 to 65535 is allowed"
        raise ImageError(ImageReason.UNSUPPORTED_MODE, message)
    notes = (f"floating-point samples with white at {white:g} written as 16-bit",)
    if finite.size < samples.size:
        notes += (f"{samples.size - finite.size} samples were NaN or infinite",)
    known = np.nan_to_num(samples, nan=0.0, posinf=white, neginf=0.0).astype(np.float64)
    return Picture(pixels=(known * (65535 / white) + 0.5).astype(np.uint16)[..., None], notes=notes)


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _eight_bit(image: Image.Image, icc: bytes | None) -> Picture:
    """Convert any 8-bit mode; palette, transparent colours and profiles are applied."""
    notes: tuple[str, ...] = ()
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        num_samples = int(image.tag_v2.get(TiffImagePlugin.SAMPLESPERPIXEL, 1))
        if num_samples > len(image.getbands()):
            notes = (f"{num_samples - len(image.getbands())} extra bands dropped",)
    if image.mode == "1" and "transparency" in image.info:  # Pillow makes no alpha of one bit
        level = image.info["transparency"]
        image = image.convert("L")
        image.info["transparency"] = level
    has_alpha = image.has_transparency_data
    if image.mode in ("1", "L", "LA", "La"):
        image = _in_mode(image, "LA" if has_alpha else "L")
    elif image.mode in ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "YCbCr"):
        image = _in_mode(image, "RGBA" if has_alpha else "RGB")
    elif image.mode != "CMYK":
        allowed = "grey, RGB, palette, YCbCr and CMYK of 8 or 16 bit"
        raise ImageError(ImageReason.UNSUPPORTED_MODE, f"pixel mode {image.mode!r}, allowed are {allowed}")
    alpha = np.array(image.getchannel("A")) if has_alpha else None
    image = image.convert(image.mode[:-1]) if has_alpha else image
    working = to_working(image, icc)
    pixels = np.array(working.image)
    pixels = pixels if pixels.ndim == 3 else pixels[..., None]
    return Picture(
        pixels=pixels,
        alpha=alpha,
        icc=working.icc,
        source_icc=working.source_icc,
        notes=notes + working.notes,
    )
