"""HEIC, AVIF and JPEG XL: known pixels, depth, colours and metadata; limits that hold for their decoders."""

from __future__ import annotations

import io
import struct
import time
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
from PIL import Image

from resshift import images
from resshift.images import Format, ImageError, ImageLimits, ImageReason, Picture
from resshift.images.animation import Frames, decode_frames, encode_frames
from resshift.images.exif import upright
from resshift.images.profiles import PRIMARIES, colorants, matrix_profile
from resshift.images.sandbox import Decoder, DecoderDied, DecoderLimits, DecoderTimeout
from tests.pictures import encoded, noise

_Y, _X = np.mgrid[0:48, 0:64]
RAMP = np.stack([4 * _X, 5 * _Y, 2 * (_X + _Y)], axis=2).astype(np.uint8)
DEEP_RAMP = np.stack([1023 * _X // 63, 1023 * _Y // 47, 1023 * (_X + _Y) // 110], axis=2)
P3 = matrix_profile(colorants(PRIMARIES[12]), None, "Display P3")
NEW: tuple[Format, ...] = ("avif", "jxl")


def heic(name: str) -> bytes:
    return (Path(__file__).parent / "heic" / f"{name}.heic").read_bytes()


def difference(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one.astype(int) - other).max())


def test_heic_gives_its_pixels() -> None:
    photo, grey, alpha = (images.decode(heic(name)) for name in ("photo", "grey", "alpha"))
    assert (photo.format, photo.notes, photo.icc, photo.alpha) == ("HEIF", (), None, None)
    assert difference(photo.pixels, RAMP) <= 3
    assert difference(grey.pixels, RAMP[..., :1]) <= 3
    assert difference(alpha.pixels, RAMP) <= 3
    assert alpha.alpha is not None
    assert difference(alpha.alpha, 255 - RAMP[..., 0]) <= 3


def test_heic_is_turned_once_and_keeps_its_colours_and_its_date() -> None:
    data = heic("turned")
    assert (images.probe(data).width, images.probe(data).height) == (48, 64)
    picture = images.decode(data)
    assert difference(picture.pixels, np.rot90(RAMP, -1)) <= 3
    assert (picture.icc, picture.notes) == (P3, ("in the colours of Display P3",))
    for format in ("jpeg", "png", "avif"):
        out = Image.open(io.BytesIO(images.encode(picture, format)))
        exif = out.getexif()
        assert (out.size, exif[0x010F], exif.get(0x0112, 1)) == ((48, 64), "Phone", 1)
        assert exif.get_ifd(0x8769)[0x9003] == "2026:08:01 12:00:00"
        assert out.info["icc_profile"] == P3


def test_heic_of_ten_bits_keeps_them() -> None:
    assert images.probe(heic("ten")).sample_bits == 10
    picture = images.decode(heic("ten"))
    assert picture.pixels.dtype == np.uint16
    assert difference(picture.pixels, np.round(DEEP_RAMP * (65535 / 1023))) <= 65535 * 6 // 1023
    assert len(np.unique(picture.pixels[0, :, 0])) > 60
    assert picture.icc == P3  # from its code points


@pytest.mark.parametrize("choice", ["first", "all", "fail"])
def test_what_follows_a_photo_in_a_heic_is_no_frame(choice: str) -> None:
    frames = decode_frames(heic("two"), None, choice)  # pyright: ignore[reportArgumentType]
    assert [picture.pixels.shape for picture in frames.pictures] == [RAMP.shape]
    assert "left out (gain map, preview or second view): 1" in frames.pictures[0].notes[0]


@pytest.mark.parametrize("format", NEW)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_a_result_is_written_and_read_back(format: Format, channels: int, has_alpha: bool) -> None:
    alpha = 255 - RAMP[..., 0] if has_alpha else None
    source = Picture(pixels=RAMP[..., :channels], alpha=alpha, icc=P3 if channels == 3 else None)
    back = images.decode(images.encode(source, format, 100))
    assert (back.format, back.icc) == (format.upper(), source.icc)
    assert difference(back.pixels, source.pixels) <= (0 if format == "jxl" else 3)
    assert (back.alpha is None) == (alpha is None)
    if alpha is not None and back.alpha is not None:
        assert difference(back.alpha, alpha) <= (0 if format == "jxl" else 3)
    assert len(images.encode(source, format, 40)) < len(images.encode(source, format, 95))


@pytest.mark.parametrize("format", get_args(Format))
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_arrays_that_cannot_be_written_to_are_encoded(
    format: Format, dtype: type, channels: int, has_alpha: bool
) -> None:
    """Ray's arrays are so. The file is that of arrays that can be written to."""
    pixels = RAMP[..., :channels].astype(dtype)
    alpha = RAMP[..., 1].astype(dtype) if has_alpha else None
    mask = RAMP[..., 0] > 9
    for num_frames in (1,) if format in ("jpeg", "jxl") else (1, 2):
        frames = Frames((Picture(pixels=pixels, alpha=alpha, mask=mask),) * num_frames)
        results: list[Frames] = []
        for is_writeable in (True, False):
            for plane in (pixels, alpha, mask):
                if plane is not None:
                    plane.flags.writeable = is_writeable
            results.append(decode_frames(encode_frames(frames, format), None, "all"))
        for one, other in zip(*(result.pictures for result in results), strict=True):
            np.testing.assert_array_equal(images.to_array(one), images.to_array(other))


@pytest.mark.parametrize("format", NEW)
def test_metadata_travels_in_the_new_formats(format: Format) -> None:
    source = images.decode(heic("turned"))
    xmp = b'<x:xmpmeta><rdf:RDF><rdf:Description dc:title="Sea"/></rdf:RDF></x:xmpmeta>'
    data = images.encode(Picture(pixels=source.pixels, exif=source.exif, xmp=xmp), format)
    back = images.decode(data)
    assert back.xmp == xmp
    exif = Image.Exif()
    exif.load(back.exif or b"")
    assert (exif[0x010F], exif.get(0x0112, 1)) == ("Phone", 1)


def test_avif_of_ten_and_twelve_bits_keeps_them() -> None:
    for bits in (10, 12):
        highest = (1 << bits) - 1
        deep = (DEEP_RAMP * (highest / 1023)).astype(np.uint16)
        options = [cv2.IMWRITE_AVIF_DEPTH, bits, cv2.IMWRITE_AVIF_QUALITY, 100]
        _, data = cv2.imencode(".avif", deep[..., ::-1], options)
        picture = images.decode(data.tobytes())
        assert images.probe(data.tobytes()).sample_bits == bits
        assert difference(picture.pixels, np.round(deep * (65535 / highest))) <= 1


@pytest.mark.parametrize(("quality", "most"), [(100, 33), (95, 300)])
@pytest.mark.parametrize("kind", ["colour", "alpha", "grey"])
def test_sixteen_bit_is_written_as_ten_in_an_avif(kind: str, quality: int, most: int) -> None:
    """Lossless at 100: a step of ten bits is 64 of 65535. Below it, the mean error of a smooth picture."""
    y, x = np.mgrid[0:32, 0:48]
    smooth = np.stack([x * 1300, y * 2000, (x + y) * 800], axis=2).astype(np.uint16)
    alpha = (65535 - y * 1900).astype(np.uint16) if kind == "alpha" else None
    pixels = smooth[..., :1] if kind == "grey" else smooth
    exif = images.decode(heic("turned")).exif
    xmp = b'<x:xmpmeta><rdf:RDF><rdf:Description dc:title="Sea"/></rdf:RDF></x:xmpmeta>'
    icc = None if kind == "grey" else P3
    picture = Picture(pixels=pixels, alpha=alpha, icc=icc, exif=exif, xmp=xmp)
    fitted = images.fit_format(picture, "avif")
    assert images.fit_format(fitted, "avif").notes == ("16 bit reduced to 10 for avif",)
    back = images.decode(images.encode(picture, "avif", quality))
    assert back.pixels.dtype == np.uint16
    assert (back.icc, back.xmp) == (icc, xmp)
    tags = Image.Exif()
    tags.load(back.exif or b"")
    assert tags[0x010F] == "Phone"
    error = np.abs(back.pixels.astype(int) - pixels)
    assert (error.max() if quality == 100 else error.mean()) <= most
    if alpha is not None:
        assert back.alpha is not None
        assert np.abs(back.alpha.astype(int) - alpha).mean() <= most


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_turned_once(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    out = io.BytesIO()
    Image.fromarray(RAMP).save(out, "AVIF", quality=100, subsampling="4:4:4", exif=exif.tobytes())
    jpeg = encoded(0, format="JPEG", exif=exif.tobytes())
    picture = images.decode(out.getvalue())
    assert picture.pixels.shape[:2] == ((48, 64) if orientation < 5 else (64, 48))
    turned = upright(RAMP, orientation)
    assert difference(picture.pixels, turned) <= 3
    assert images.decode(jpeg).notes == picture.notes


def test_frames_of_an_avif_are_frames_and_jxl_holds_one() -> None:
    frames = Frames(
        tuple(Picture(pixels=np.full((16, 16, 3), level, np.uint8)) for level in (0, 128, 255)), (40, 60, 80)
    )
    back = decode_frames(encode_frames(frames, "avif", 100), None, "all")
    assert back.durations_ms == frames.durations_ms
    for one, other in zip(back.pictures, frames.pictures, strict=True):
        assert difference(one.pixels, other.pixels) <= 2
    with pytest.raises(ImageError, match="3 frames do not fit into a jxl"):
        images.check_sizes(frames.sizes(), "jxl")


def jxl_header(width: int, height: int) -> bytes:
    """Return a codestream that ends behind its header (ISO/IEC 18181-1, section D.3)."""
    height_bits, width_bits = (
        f"11{side - 1:030b}"[:2] + f"{side - 1:030b}"[::-1] for side in (height, width)
    )
    bits = "0" + height_bits + "000" + width_bits  # no multiple of 8 px, no aspect ratio
    bits = bits.ljust(-(-len(bits) // 8) * 8 + 8, "1")
    return b"\xff\x0a" + bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8)) + bytes(20)


def test_a_heic_of_another_size_than_it_says_is_refused() -> None:
    """libheif tells the size of the coded picture, which is the one that is allocated."""
    for side in (30_000, 65):
        with pytest.raises(ImageError, match="Decoded image does not have the size"):
            images.decode(with_size(heic("photo"), side))


def with_size(data: bytes, side: int) -> bytes:
    """Return a HEIF or AVIF whose properties promise another size."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", side, side) + data[at + 8 :]


BOMBS = {
    "avif": with_size(images.encode(Picture(pixels=RAMP), "avif"), 15_000),
    "jxl": jxl_header(60_000, 59_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_sizes_are_refused_from_the_header(name: str) -> None:
    start = time.perf_counter()
    with pytest.raises(ImageError) as caught:
        images.probe(BOMBS[name])
    assert caught.value.reason is ImageReason.TOO_LARGE
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("data", [heic("photo"), *(images.encode(Picture(pixels=RAMP), one) for one in NEW)])
def test_limits_of_sizes_are_values_of_the_call(data: bytes) -> None:
    for limits in (
        ImageLimits(max_pixels=64 * 48 - 1),
        ImageLimits(max_side_px=63),
        ImageLimits(max_bytes=len(data) - 1),
    ):
        with pytest.raises(ImageError) as caught:
            images.decode(data, limits)
        assert caught.value.reason is ImageReason.TOO_LARGE
    images.decode(data, ImageLimits(max_pixels=64 * 48, max_side_px=64, max_bytes=len(data)))


@pytest.mark.slow
@pytest.mark.parametrize("format", NEW)
def test_memory_of_the_decoders_is_limited(format: Format) -> None:
    data = images.encode(Picture(pixels=np.zeros((1000, 1000, 3), np.uint8)), format, 60)
    with Decoder(DecoderLimits(memory_mb=8)) as decoder, pytest.raises((ImageError, DecoderDied)):
        decoder.decode(data)
    with Decoder(DecoderLimits(images=ImageLimits(max_pixels=1_000_000))) as decoder:
        assert decoder.decode(data).pictures[0].pixels.shape == (1000, 1000, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["photo", "ten", *NEW])
def test_damage_is_an_image_error_or_a_picture_and_never_the_end_of_the_parent(name: str) -> None:
    data = images.encode(Picture(pixels=noise(0, 24, 32)), name) if name in NEW else heic(name)  # pyright: ignore[reportArgumentType]
    rng = np.random.default_rng(0)
    num_refused = 0
    with Decoder(DecoderLimits(images=ImageLimits(max_pixels=1_000_000), seconds=10)) as decoder:
        for i in range(40):
            damaged = bytearray(data[: len(data) * (i + 1) // 20] if i < 20 else data)
            for at in rng.integers(0, len(damaged), 3 if i >= 20 else 0):
                damaged[at] = rng.integers(256)
            try:
                decoder.decode(bytes(damaged))
            except (ImageError, DecoderDied, DecoderTimeout):
                num_refused += 1
    assert num_refused > 10
