"""Colour management: which numbers the network sees, and which profile belongs to them.

Networks are trained on sRGB, but what they need is its curve, not its gamut: numbers that are spaced as the
eye sees. Converting a photo in Display P3 or Adobe RGB to sRGB would clip its colours.

- A picture that is already sRGB keeps its bytes and its profile.
- One in another space with such a curve (Display P3, Adobe RGB, ProPhoto, a grey gamma, most scanners) is
  worked on in its own numbers and keeps its profile.
- One with another curve (linear light) is converted to its own primaries with the curve of sRGB, or to sRGB
  where its profile has no primaries, and `from_working` converts the result back.
- CMYK, and profiles that can only be read (some scanners), come out in sRGB.

Conversions are relative colorimetric with black point compensation. A profile that is broken, or that belongs
to another kind of picture, is ignored with a note.

What it does not do: convert 16-bit pictures (Pillow's LittleCMS binding has no 16-bit RGB). They keep their
numbers and their profile, whatever its curve.
"""

# Pillow's types of ImageCms are incomplete.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import functools
import io
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from resshift.images.profiles import matrix_profile

# LittleCMS raises PyCMSError for a bad profile; the binding raises the others for a profile that it cannot
# open and for a mode that it does not know.
_PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, TypeError, ValueError)
_SPACE_BY_MODE = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
_SRGB_TOLERANCE = 1  # in 8-bit levels: v2 and v4 sRGB profiles of different vendors differ by that much
# Greys of a space with a curve for the eye differ from those of sRGB by at most that: Adobe RGB by 6,
# ProPhoto by 18, linear light by 60.
_CURVE_TOLERANCE = 24
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a profile is like.

    Fields:
        name: Its description, in one line.
        is_srgb: Whether it maps its pictures to sRGB unchanged.
        has_curve: Whether its numbers are spaced about as those of sRGB.
        is_writable: Whether pictures can be converted to it.
        working: Profile in which its pictures are worked on when they have another curve.
    """

    name: str
    is_srgb: bool
    has_curve: bool
    is_writable: bool
    working: bytes


def _opened(icc: bytes) -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(io.BytesIO(icc))


def _transform(source: bytes, target: bytes, mode: str, target_mode: str) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        _opened(source),
        _opened(target),
        mode,
        target_mode,
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )


def _converted(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    return converted


def _probe_colours(mode: str) -> Image.Image:
    """Return 6^3 colours, or 256 greys, that distinguish an sRGB profile from others."""
    if mode == "L":
        return Image.frombytes("L", (256, 1), bytes(range(256)))
    levels = range(0, 256, 51)
    return Image.frombytes(
        "RGB", (216, 1), bytes(v for r in levels for g in levels for b in levels for v in (r, g, b))
    )


def _difference(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> int:
    """Return by how many levels a transform to sRGB changes an image at most."""
    pairs = zip(image.convert("RGB").tobytes(), _converted(image, transform).tobytes(), strict=True)
    return max(abs(a - b) for a, b in pairs)


@functools.lru_cache(maxsize=32)
def _inspect(icc: bytes, mode: str) -> _Facts:
    """Raise one of _PROFILE_ERRORS if the profile is unusable."""
    profile: Any = _opened(icc).profile
    space = profile.xcolor_space.strip()
    if space != _SPACE_BY_MODE[mode]:
        raise ValueError(f"the profile is for {space} pictures and this one is {mode}")
    to_srgb = _transform(icc, _SRGB, mode, "RGB")
    description = ImageCms.getProfileDescription(_opened(icc))
    name = (
        " ".join("".join(c if c.isprintable() else " " for c in description).split())[:80]
        or "unnamed profile"
    )
    if mode == "CMYK":
        return _Facts(name, False, False, False, _SRGB)
    greys = _probe_colours("L").convert(mode)
    return _Facts(
        name,
        _difference(_probe_colours(mode), to_srgb) <= _SRGB_TOLERANCE,
        _difference(greys, to_srgb) <= _CURVE_TOLERANCE,
        _is_writable(icc, mode),
        _with_curve_of_srgb(profile) or _SRGB,
    )


def _is_writable(icc: bytes, mode: str) -> bool:
    try:
        _transform(_SRGB, icc, "RGB", mode)
    except _PROFILE_ERRORS:
        return False
    return True


def _with_curve_of_srgb(profile: Any) -> bytes | None:
    """Return a profile of the same primaries; None where there are none."""
    columns = [getattr(profile, f"{name}_colorant") for name in ("red", "green", "blue")]
    if not profile.is_matrix_shaper or None in columns:
        return None
    return matrix_profile(
        np.array([xyz for xyz, _ in columns]).T, None, "primaries of the file, curve of sRGB"
    )


def means_srgb(icc: bytes | None, mode: str) -> bool:
    """Return whether pictures of a mode, L or RGB, with this profile are sRGB."""
    try:
        return icc is None or _inspect(icc, mode).is_srgb
    except _PROFILE_ERRORS:
        return True  # which is how programs show it


class Working(NamedTuple):
    """A picture as a network sees it.

    Fields:
        image: Picture of mode L or RGB.
        icc: Its profile; None is sRGB.
        source_icc: Profile that the result is converted to; None where it is that of the image.
        notes: What was done.
    """

    image: Image.Image
    icc: bytes | None
    source_icc: bytes | None = None
    notes: tuple[str, ...] = ()


def to_working(image: Image.Image, icc: bytes | None) -> Working:
    """Bring a loaded picture into numbers that a network can work on.

    Args:
        image: Picture of mode L, RGB or CMYK.
        icc: Embedded profile, or None.
    """
    plain = image.convert("RGB") if image.mode == "CMYK" else image
    plain_note = ("CMYK converted to RGB without a profile",) if image.mode == "CMYK" else ()
    if not icc:
        return Working(plain, None, None, plain_note)
    try:
        facts = _inspect(icc, image.mode)
        if facts.is_srgb:
            return Working(image, icc)
        if facts.is_writable and facts.has_curve:
            return Working(image, icc, None, (f"in the colours of {facts.name}",))
        working = facts.working if facts.is_writable else _SRGB
        converted = _converted(image, _transform(icc, working, image.mode, "RGB"))
    except _PROFILE_ERRORS as error:
        return Working(plain, None, None, (f"ICC profile ignored: {str(error)[:120]}", *plain_note))
    if image.mode == "L":
        converted = converted.getchannel(0)
    told = "sRGB" if working is _SRGB else "the curve of sRGB"
    only = "" if facts.is_writable or image.mode == "CMYK" else ", as the profile can only be read"
    note = f"converted from {facts.name} to {told}{only}"
    return Working(
        converted, None if working is _SRGB else working, icc if facts.is_writable else None, (note,)
    )


def from_working(pixels: np.ndarray, working: bytes | None, icc: bytes) -> np.ndarray:
    """Convert pixels back to a profile that `to_working` gave as `source_icc`.

    Args:
        pixels: (H, W, 1) grey or (H, W, 3) RGB, uint8.
        working: Their profile; None is sRGB.
        icc: Profile for that kind of picture.

    Returns:
        Pixels of the same shape.
    """
    mode = "L" if pixels.shape[2] == 1 else "RGB"
    image = Image.fromarray(np.ascontiguousarray(pixels if mode == "RGB" else pixels.repeat(3, axis=2)))
    return np.asarray(_converted(image, _transform(working or _SRGB, icc, "RGB", mode))).reshape(pixels.shape)


def to_srgb(pixels: np.ndarray, icc: bytes | None) -> np.ndarray:
    """Return (H, W, 1 or 3) uint8 pixels with a profile in sRGB, of the same shape; colours outside it are
    clipped. A profile that is broken is ignored.
    """
    mode = "L" if pixels.shape[2] == 1 else "RGB"
    if icc is None or means_srgb(icc, mode):
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if mode == "L" else pixels))
    converted = np.asarray(_converted(image, _transform(icc, _SRGB, mode, "RGB")))
    return converted[..., : pixels.shape[2]]
