"""Dots per inch: read from where each format says it, and carried as they are.

The result of a scan at 300 dots an inch says 300 too, so its print is as many times larger as its sides are.
JPEG, PNG and TIFF say it in their own header (JFIF, pHYs, XResolution), WebP, AVIF and JPEG XL in EXIF.
"""

from __future__ import annotations

from typing import Any

from PIL import Image, TiffImagePlugin

_X, _Y, _UNIT = 0x011A, 0x011B, 0x0128
_INCH, _CENTIMETRE = 2, 3


def read_resolution(image: Image.Image) -> tuple[float, float] | None:
    """Return the dots per inch, across and down, of a loaded picture; None if it does not say."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags: Any = image.tag_v2
        return _of_tags({tag: tags.get(tag) for tag in (_X, _Y, _UNIT)})
    # Pillow makes up 72 for a JPEG that does not say.
    if image.format in ("PNG", "BMP") or image.info.get("jfif_unit") in (1, 2):
        return _checked(*image.info.get("dpi", (0, 0)))
    exif = image.getexif()
    return _of_tags({tag: exif.get(tag) for tag in (_X, _Y, _UNIT)})


def _of_tags(tags: dict[int, Any]) -> tuple[float, float] | None:
    factor = {_INCH: 1.0, _CENTIMETRE: 2.54}.get(tags[_UNIT] or _INCH)
    if factor is None or tags[_X] is None or tags[_Y] is None:
        return None
    return _checked(float(tags[_X]) * factor, float(tags[_Y]) * factor)


def _checked(across: float, down: float) -> tuple[float, float] | None:
    return (across, down) if 1 <= across < 1e6 and 1 <= down < 1e6 else None


def resolution_tags(resolution: tuple[float, float]) -> dict[int, Any]:
    """Return the tags of TIFF and EXIF that say it."""
    return {_X: resolution[0], _Y: resolution[1], _UNIT: _INCH}
