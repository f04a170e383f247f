"""Colour management: ICC profiles in, sRGB out.

The network was trained on sRGB values, so an 8-bit picture with another profile (Display P3, Adobe RGB, a
CMYK press, a grey gamma) is converted to sRGB first, relative colorimetric with black point compensation, and
`from_srgb` converts the result back to the profile of the file. A picture that is already sRGB keeps its
bytes and its profile. A profile that is broken, or that belongs to another kind of picture, is ignored with a
note.

What it does not do: convert 16-bit pictures (Pillow's LittleCMS binding has no 16-bit RGB). They keep their
own profile, which stays correct for the output because super-resolution does not change the colour space.
"""

# Pillow's types of ImageCms are incomplete.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# LittleCMS raises PyCMSError for a bad profile; the binding raises the others for a profile that it cannot
# open and for a mode that it does not know.
_PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, TypeError, ValueError)
_SPACE_BY_MODE = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
_SRGB_TOLERANCE = 1  # in 8-bit levels: v2 and v4 sRGB profiles of different vendors differ by that much


def _transform(icc: bytes, mode: str) -> ImageCms.ImageCmsTransform:
    source = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    described: Any = source.profile
    space = described.xcolor_space.strip()
    if space != _SPACE_BY_MODE[mode]:
        raise ValueError(f"the profile is for {space} pictures and this one is {mode}")
    srgb: Any = ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(
        source,
        srgb,
        mode,
        "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _probe_colours(mode: str) -> Image.Image:
    """Return 6^3 colours, or 256 greys, that distinguish an sRGB profile from others."""
    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    levels = range(0, 256, 51)
    return Image.frombytes(
        "RGB", (216, 1), bytes(v for r in levels for g in levels for b in levels for v in (r, g, b))
    )


@functools.lru_cache(maxsize=32)
def _inspect(icc: bytes, mode: str) -> tuple[str, bool]:
    """Return the name of a profile, and whether it maps `mode` to sRGB unchanged. Raises one of
    _PROFILE_ERRORS if the profile is unusable.
    """
    transform = _transform(icc, mode)
    description = ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(icc)))
    name = (
        " ".join("".join(c if c.isprintable() else " " for c in description).split())[:80]
        or "unnamed profile"
    )
    if mode == "CMYK":
        return name, False
    probe = _probe_colours(mode)
    converted = ImageCms.applyTransform(probe, transform)
    assert converted is not None
    pairs = zip(probe.convert("RGB").tobytes(), converted.tobytes(), strict=True)
    return name, all(abs(a - b) <= _SRGB_TOLERANCE for a, b in pairs)


def to_srgb(image: Image.Image, icc: bytes | None) -> tuple[Image.Image, bytes | None, tuple[str, ...]]:
    """Convert a loaded picture to sRGB.

    Args:
        image: Picture of mode L, RGB or CMYK.
        icc: Embedded profile, or None.

    Returns:
        The picture in mode L or RGB, the profile to embed with it (None means untagged, which is sRGB
        everywhere), and notes.
    """
    plain = image.convert("RGB") if image.mode == "CMYK" else image
    plain_note = ("CMYK converted to RGB without a profile",) if image.mode == "CMYK" else ()
    if not icc:
        return plain, None, plain_note
    try:
        name, is_srgb = _inspect(icc, image.mode)
        if is_srgb:
            return image, icc, ()
        converted = ImageCms.applyTransform(image, _transform(icc, image.mode))
    except _PROFILE_ERRORS as error:
        return plain, None, (f"ICC profile ignored: {str(error)[:120]}", *plain_note)
    assert converted is not None
    if image.mode == "L":
        converted = converted.getchannel(0)
    return converted, None, (f"converted from {name} to sRGB",)


def from_srgb(pixels: np.ndarray, icc: bytes) -> np.ndarray:
    """Convert sRGB pixels back to the colour space of a profile that `to_srgb` accepted.

    Colours outside sRGB were clipped by `to_srgb`; colours inside it come back within one or two levels.

    Args:
        pixels: (H, W, 1) grey or (H, W, 3) RGB, uint8.
        icc: Profile for that kind of picture.

    Returns:
        Pixels of the same shape.
    """
    mode = "L" if pixels.shape[2] == 1 else "RGB"
    srgb: Any = ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(
        srgb,
        ImageCms.ImageCmsProfile(io.BytesIO(icc)),
        "RGB",
        mode,
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    image = Image.fromarray(np.ascontiguousarray(pixels if mode == "RGB" else pixels.repeat(3, axis=2)))
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return np.asarray(converted).reshape(pixels.shape)
