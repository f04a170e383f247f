"""Colours that a file tells by numbers and not by a profile: cICP, gAMA, cHRM of PNG, nclx of HEIF and AVIF.

They become a profile (`resshift.images.profiles`), which every format of an output holds and every program
heeds. Of several, the first of cICP, profile, sRGB, and gAMA with cHRM counts (PNG, third edition, section
4.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from resshift.images.profiles import (
    HDR_TRANSFERS,
    PRIMARIES,
    coded_profile,
    colorants,
    grey_profile,
    matrix_profile,
)

_GREY_MODES = ("1", "L", "LA", "La", "I", "I;16", "I;16B", "I;16L")
_SRGB_GAMMA = 1 / 2.2  # what PNG writes for the curve of sRGB


def coded_colours(image: Image.Image, data: bytes = b"") -> tuple[bytes | None, tuple[str, ...]]:
    """Return the profile of an opened picture, and notes; None is sRGB.

    Args:
        image: Opened picture.
        data: Content of its file, for what Pillow does not read.
    """
    icc: bytes | None = image.info.get("icc_profile") or None
    code = _code(image, data)
    if code is not None and (icc is None or image.format == "PNG"):
        primaries, transfer = code
        if transfer in HDR_TRANSFERS:
            name = HDR_TRANSFERS[transfer]
            return coded_profile(primaries, 13), (f"{name} curve of an HDR picture taken for that of sRGB",)
        return coded_profile(primaries, transfer), ()
    if icc is not None or "srgb" in image.info or "gamma" not in image.info:
        return icc, ()
    return _of_gamma(image)


def _of_gamma(image: Image.Image) -> tuple[bytes | None, tuple[str, ...]]:
    gamma = float(image.info["gamma"])
    if not 0.1 <= gamma <= 10:
        return None, (f"gAMA ignored, it is {gamma:g}",)
    exponent = None if abs(gamma - _SRGB_GAMMA) < 0.01 else 1 / gamma
    if image.mode in _GREY_MODES:
        return None if exponent is None else grey_profile(exponent, f"gAMA {gamma:g}"), ()
    values: Sequence[float] = image.info.get("chromaticity") or np.ravel(PRIMARIES[1]).tolist()
    primaries = [(values[i], values[i + 1]) for i in range(0, 8, 2)]
    if exponent is None and np.abs(np.ravel(primaries) - np.ravel(PRIMARIES[1])).max() < 0.002:
        return None, ()
    try:
        columns = colorants(primaries)
    except ValueError as error:
        return None, (f"cHRM ignored: {error}",)
    return matrix_profile(columns, exponent, f"gAMA {gamma:g} and cHRM"), ()


def _code(image: Image.Image, data: bytes) -> tuple[int, int] | None:
    """Return (primaries, transfer) of ITU-T H.273; None where there are none, or they are left open."""
    code: tuple[int, int] | None = None
    if image.format == "PNG":
        code = _cicp(data)
    elif image.format == "HEIF":
        nclx: dict[str, Any] = image.info.get("nclx_profile") or {}
        code = (nclx.get("color_primaries", 2), nclx.get("transfer_characteristics", 2))
    elif image.format == "AVIF" and (at := data.find(b"colrnclx", 0, 1 << 16)) >= 0:
        code = (int.from_bytes(data[at + 8 : at + 10]), int.from_bytes(data[at + 10 : at + 12]))
    return None if code is None or 2 in code else code


def _cicp(png: bytes) -> tuple[int, int] | None:
    at = 8
    while at + 12 <= len(png) and (name := png[at + 4 : at + 8]) not in (b"IDAT", b"IEND"):
        if name == b"cICP":
            return png[at + 8], png[at + 9]
        at += 12 + int.from_bytes(png[at : at + 4])
    return None
