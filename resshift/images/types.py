"""Types of `resshift.images`: pictures, headers, limits, and reasons of refusals."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np

Array = np.ndarray
Format = Literal["png", "jpeg", "webp", "tiff", "avif", "jxl"]
SAMPLE_DTYPES = (np.dtype(np.uint8), np.dtype(np.uint16))


def check_pixels(pixels: Array) -> None:
    """Raise ValueError unless the array is (H, W, 1 or 3) uint8 or uint16 and not empty."""
    if (
        pixels.ndim != 3
        or pixels.shape[2] not in (1, 3)
        or pixels.dtype not in SAMPLE_DTYPES
        or not pixels.size
    ):
        raise ValueError(
            f"pixels must be (H, W, 1 or 3) uint8 or uint16 and not empty, got {pixels.shape} {pixels.dtype}"
        )


class ImageReason(StrEnum):
    """Reason of a refusal. The vocabulary is closed: the ledger and HTTP errors use these words."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    UNSUPPORTED_MODE = "unsupported_mode"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_LARGE = "too_large"
    ANIMATED = "animated"
    NO_MASK = "no_mask"
    BAD_MASK = "bad_mask"


class ImageError(ValueError):
    """A picture that cannot be read or written. The message names the value and what is allowed.

    Fields:
        reason: Reason of the refusal.
    """

    def __init__(self, reason: ImageReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[ImageReason, str]]:
        return ImageError, (self.reason, str(self))  # so that it can be sent from a worker


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """Limits of pictures that are decoded. The default of `max_side_px` is the largest side of a JPEG."""

    max_pixels: int = 100_000_000
    max_side_px: int = 65_500
    max_bytes: int = 1 << 30
    max_frames: int = 1000

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_side_px", "max_bytes", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def check_size(self, width: int, height: int) -> None:
        """Raise `ImageError` (too_large) unless a picture of this size is accepted."""
        if max(width, height) > self.max_side_px:
            raise ImageError(
                ImageReason.TOO_LARGE,
                f"the picture is {width}x{height}, the longest side allowed is {self.max_side_px} px",
            )
        if width * height > self.max_pixels:
            count = f"{width}x{height} = {width * height} pixels"
            raise ImageError(
                ImageReason.TOO_LARGE, f"the picture is {count}, at most {self.max_pixels} are allowed"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageHeader:
    """Content of a file's header.

    Fields:
        format: One of `identify.FORMATS`.
        width, height: Stored size, before the EXIF orientation is applied (TIFF, HEIF, JXL: after it).
        mode: Pillow's name of the pixel mode.
        num_frames: Number of frames or pages; at most 1000 pages of a TIFF are counted, and 2 means "several"
            in a GIF above 8 MB.
        sample_bits: Bits per sample in the file.
    """

    format: str
    width: int
    height: int
    mode: str
    num_frames: int
    sample_bits: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Picture:
    """A decoded picture, upright, in RGB order or grey.

    Fields:
        pixels: (H, W, 1) grey or (H, W, 3) RGB, uint8 or uint16.
        alpha: (H, W) of the same dtype, not premultiplied, or None.
        mask: (H, W) bool, True in the hole that a model is to fill (`resshift.images.masks`), or None.
        icc: Profile of the pixels, to embed; None means sRGB.
        source_icc: RGB or grey profile of the file, from which 8-bit pixels were converted for the network;
            `images.in_own_profile` converts them back. None if they were not converted, or cannot be.
        exif: Block of descriptive tags that starts with `Exif\\0\\0`, with the orientation applied; or None.
        xmp: XMP packet, with the orientation applied; or None.
        resolution: Dots per inch across and down, as the file says; or None.
        text: Names and texts of the tEXt, zTXt and iTXt chunks of a PNG, except what is EXIF or XMP.
        format: Format of the file, one of `identify.FORMATS`; empty for other sources.
        notes: Messages for the user ("first of 12 frames", "orientation 6 applied", ...).
    """

    pixels: Array
    alpha: Array | None = None
    mask: Array | None = None
    icc: bytes | None = None
    source_icc: bytes | None = None
    exif: bytes | None = None
    xmp: bytes | None = None
    resolution: tuple[float, float] | None = None
    text: tuple[tuple[str, str], ...] = ()
    format: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_pixels(self.pixels)
        if self.alpha is not None and (
            self.alpha.shape != self.pixels.shape[:2] or self.alpha.dtype != self.pixels.dtype
        ):
            raise ValueError(
                f"alpha must be {self.pixels.shape[:2]} {self.pixels.dtype}, got {self.alpha.shape} "
                f"{self.alpha.dtype}"
            )
        if self.mask is not None and (self.mask.shape, self.mask.dtype) != (self.pixels.shape[:2], np.bool_):
            raise ValueError(
                f"mask must be {self.pixels.shape[:2]} bool, got {self.mask.shape} {self.mask.dtype}"
            )

    @property
    def height(self) -> int:
        return self.pixels.shape[0]

    @property
    def width(self) -> int:
        return self.pixels.shape[1]


def scaled(length: int, factor: float) -> int:
    """Return the length of a side after scaling; at least 1."""
    return max(1, round(length * factor))
