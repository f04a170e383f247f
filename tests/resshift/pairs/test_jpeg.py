"""The short way to a training photo gives the pixels of the long one, and leaves to it what is not plain."""

from __future__ import annotations

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from resshift.images import ImageError, decode
from resshift.pairs import jpeg
from resshift.pairs.jpeg import decode_photo
from resshift.seeds import philox


def picture(height: int = 60, width: int = 84, grain_px: int = 6) -> Image.Image:
    coarse = philox("test", "photo").integers(
        0, 256, (height // grain_px, width // grain_px, 3), dtype=np.uint8
    )
    return Image.fromarray(
        np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
    )


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def rgb(data: bytes) -> np.ndarray:
    pixels = decode(data).pixels
    return pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)


PLAIN = {
    "4:2:0": encoded(picture(), quality=90),
    "4:4:4": encoded(picture(), quality=95, subsampling=0),
    "4:2:2": encoded(picture(), quality=80, subsampling=1),
    "odd size": encoded(picture(60, 84).crop((0, 0, 83, 59)), quality=90),
    "progressive": encoded(picture(), progressive=True),
    "grey": encoded(picture().convert("L")),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_jpeg_gives_the_same_pixels_without_pillow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = rgb(PLAIN[name])
    monkeypatch.delattr(jpeg, "decode")
    np.testing.assert_array_equal(decode_photo(PLAIN[name]), expected)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def linear_profile() -> bytes:
    """Return an sRGB profile whose tone curves say gamma 1: a picture with it looks much brighter than its
    numbers.
    """
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for i in range(int.from_bytes(profile[128:132], "big")):
        name, offset, size = struct.unpack_from(">4sII", profile, 132 + 12 * i)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            assert size >= 14
            profile[offset : offset + 14] = b"curv" + bytes(4) + struct.pack(">IH", 1, 0x0100)
    return bytes(profile)


OTHER = {
    "turned": encoded(picture(), exif=exif(6)),
    "profile": encoded(picture(), icc_profile=linear_profile()),
    "CMYK": encoded(picture().convert("CMYK")),
    "PNG": encoded(picture(), "PNG"),
    "palette": encoded(picture().convert("P"), "PNG"),
    "bytes after the end": PLAIN["4:2:0"] + b"\0\0",
}


@pytest.mark.parametrize("name", OTHER)
def test_everything_else_takes_the_long_way(name: str) -> None:
    np.testing.assert_array_equal(decode_photo(OTHER[name]), rgb(OTHER[name]))


def test_the_other_files_would_differ_on_the_short_way() -> None:
    """Otherwise the test above could not fail."""
    for name in ("turned", "profile", "CMYK"):
        ignored = cv2.imdecode(
            np.frombuffer(OTHER[name], np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        )
        assert ignored is not None
        assert not np.array_equal(ignored, rgb(OTHER[name])), name


def test_16_bit_is_rounded_and_alpha_dropped() -> None:
    flat = np.full((20, 30, 4), 100 * 257 + 129, dtype=np.uint16)
    np.testing.assert_array_equal(
        decode_photo(cv2.imencode(".png", flat)[1].tobytes()), np.full((20, 30, 3), 101, dtype=np.uint8)
    )


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff\xd8\xff\xd9", PLAIN["4:2:0"][:200], PLAIN["4:2:0"][:-2], PLAIN["4:2:0"][:30] + b"\xff\xd9"],
)
def test_damaged_files_are_refused_as_on_the_long_way(data: bytes) -> None:
    with pytest.raises(ImageError) as expected:
        decode(data)
    with pytest.raises(ImageError) as found:
        decode_photo(data)
    assert found.value.reason == expected.value.reason


def test_a_header_that_promises_too_many_pixels_is_refused_before_decoding() -> None:
    data = bytearray(PLAIN["4:2:0"])
    i_frame = data.index(b"\xff\xc0")
    data[i_frame + 5 : i_frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(ImageError, match="60000x60000"):
        decode_photo(bytes(data))


@pytest.mark.parametrize(
    ("least_side_px", "expected"),
    [
        (None, (240, 336)),
        (240, (240, 336)),
        (121, (240, 336)),
        (120, (120, 168)),
        (61, (120, 168)),
        (60, (60, 84)),
        (10, (30, 42)),
    ],
)
def test_jpeg_is_reduced_as_far_as_the_short_side_allows(
    least_side_px: int | None, expected: tuple[int, int]
) -> None:
    data = encoded(picture(240, 336), quality=95)
    assert decode_photo(data, least_side_px).shape == (*expected, 3)


def test_a_reduced_jpeg_is_near_the_average_of_its_pixels() -> None:
    data = encoded(picture(240, 336, grain_px=24), quality=95)
    whole, half = decode_photo(data), decode_photo(data, 120)
    averages = cv2.resize(whole, (168, 120), interpolation=cv2.INTER_AREA)
    assert cv2.PSNR(half, averages) > 40


def test_other_formats_keep_their_size() -> None:
    assert decode_photo(encoded(picture(240, 336), "PNG"), 120).shape == (240, 336, 3)
