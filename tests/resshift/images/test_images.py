"""Pictures: known answers for every kind of file, and nothing but ImageError for every kind of damage. All
pictures are made here.
"""

from __future__ import annotations

import io
import pickle
import struct
import time
import tracemalloc
import zlib
from dataclasses import replace
from typing import get_args

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from resshift.images import (
    Format,
    ImageError,
    ImageLimits,
    ImageReason,
    Picture,
    decode,
    encode,
    fit_format,
    from_pil,
    in_own_profile,
    is_srgb,
    probe,
    rgb_u8,
    swap_red_blue,
    to_pil,
)
from resshift.images.profiles import PRIMARIES, coded_profile, colorants
from resshift.images.profiles import matrix_profile as profile_of_matrix
from resshift.seeds import philox

FORMATS: tuple[Format, ...] = get_args(Format)
CORNERS = np.array(
    [[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]], [[0, 0, 0], [250, 250, 250]]], dtype=np.uint8
)


def noise(*shape: int, dtype: type[np.uint8] | type[np.uint16] = np.uint8) -> np.ndarray:
    return philox("test_images", str(shape)).integers(
        0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True
    )


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    """Return a picture that JPEG reproduces closely, with no two corners alike."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 * (x + y) / (width + height)], axis=2).astype(
        np.uint8
    )


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)  # pyright: ignore[reportArgumentType]
    return out.getvalue()


def png_chunk(name: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + name + payload + struct.pack(">I", zlib.crc32(name + payload))


def raw_png(
    width: int,
    height: int,
    depth: int,
    colour_type: int,
    rows: bytes,
    *,
    extra: bytes = b"",
    interlace: int = 0,
) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, interlace)
    body = (
        png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def matrix_profile(
    name: str,
    red: tuple[float, float, float],
    green: tuple[float, float, float],
    blue: tuple[float, float, float],
) -> bytes:
    """Return an ICC v2 display profile: three D50 primaries (X, Y, Z) and gamma 2.2."""

    def s15(*values: float) -> bytes:
        return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))

    text = name.encode()
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    tags = {
        b"desc": b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 1 + 67),
        b"wtpt": b"XYZ " + bytes(4) + s15(0.9642, 1.0, 0.8249),
        b"rXYZ": b"XYZ " + bytes(4) + s15(*red),
        b"gXYZ": b"XYZ " + bytes(4) + s15(*green),
        b"bXYZ": b"XYZ " + bytes(4) + s15(*blue),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body = b"", b""
    offset = 128 + 4 + 12 * len(tags)
    for tag, payload in tags.items():
        padded = payload + bytes(-len(payload) % 4)
        table += tag + struct.pack(">II", offset + len(body), len(payload))
        body += padded
    size = offset + len(body)
    head = (
        struct.pack(">I4sI4s4s4s", size, b"test", 0x02100000, b"mntr", b"RGB ", b"XYZ ")
        + struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
        + b"acsp"
    )
    head = head.ljust(68, b"\0") + s15(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


DISPLAY_P3 = matrix_profile(
    "Test P3", (0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)
)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def test_lossless_round_trip_is_exact() -> None:
    for dtype in (np.uint8, np.uint16):
        for channels in (1, 3):
            for alpha in (None, noise(9, 7, dtype=dtype)):
                picture = Picture(pixels=noise(9, 7, channels, dtype=dtype), alpha=alpha)
                for format in ("png", "tiff"):
                    back = decode(encode(picture, format))
                    is_spread = (
                        format == "tiff" and channels == 1 and alpha is not None and dtype is np.uint16
                    )  # see fit_format
                    np.testing.assert_array_equal(
                        back.pixels, picture.pixels.repeat(3, axis=2) if is_spread else picture.pixels
                    )
                    assert back.pixels.dtype == dtype
                    if alpha is None:
                        assert back.alpha is None
                    else:
                        np.testing.assert_array_equal(back.alpha, alpha)


def test_other_readers_agree_on_what_is_written() -> None:
    picture = Picture(pixels=noise(700, 500, 3), alpha=noise(700, 500))  # more than one TIFF strip
    assert picture.alpha is not None
    expected = np.concatenate([picture.pixels, picture.alpha[..., None]], axis=2)
    for format in ("png", "tiff"):
        image = Image.open(io.BytesIO(encode(picture, format)))
        assert image.mode == "RGBA"
        np.testing.assert_array_equal(np.asarray(image), expected)
    grey = Picture(pixels=noise(5, 6, 1), alpha=noise(5, 6))
    assert Image.open(io.BytesIO(encode(grey, "png"))).mode == "LA"


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_opencv_and_tifffile_read_the_same_tiff(
    dtype: type[np.uint8] | type[np.uint16], has_alpha: bool
) -> None:
    picture = Picture(
        pixels=noise(700, 500, 3, dtype=dtype),
        alpha=noise(700, 500, dtype=dtype) if has_alpha else None,
        icc=DISPLAY_P3,
        exif=from_pil(with_exif(smooth())).exif,
        xmp=b"<rdf:RDF/>",
    )
    encoded = encode(picture, "tiff")
    with tifffile.TiffFile(io.BytesIO(encoded)) as file:
        page = file.pages.first
        tags = {tag.name: tag.value for tag in page.tags}
        read = page.asarray()
    np.testing.assert_array_equal(read[..., :3], picture.pixels)
    assert (tags["InterColorProfile"], tags["XMP"]) == (DISPLAY_P3, b"<rdf:RDF/>")
    assert (int(tags["Compression"]), int(tags["Predictor"])) == (8, 2)  # Deflate, horizontal
    assert tags["ExifTag"]["PixelXDimension"] == 500
    assert tags["Make"] == "Maker"
    decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    assert decoded is not None
    if picture.alpha is not None:
        np.testing.assert_array_equal(read[..., 3], picture.alpha)
        np.testing.assert_array_equal(decoded[..., 3], picture.alpha)
    if picture.alpha is None or dtype is np.uint16:  # OpenCV premultiplies 8-bit colour
        np.testing.assert_array_equal(swap_red_blue(decoded[..., :3]), picture.pixels)


@pytest.mark.parametrize("has_alpha", [False, True])
@pytest.mark.parametrize("num_colours", [1, 3])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_stream_of_a_png_has_every_row_with_the_sub_filter(
    dtype: type, num_colours: int, has_alpha: bool
) -> None:
    """By zlib and the filter's definition (ISO/IEC 15948, section 9.2), over several blocks of rows."""
    rng, shape = philox("png rows"), (1 + (1 << 20) // 300, 301)
    highest = np.iinfo(dtype).max
    pixels = rng.integers(0, highest, (*shape, num_colours), dtype, endpoint=True)
    alpha = rng.integers(0, highest, shape, dtype, endpoint=True) if has_alpha else None
    png, body, position = encode(Picture(pixels=pixels, alpha=alpha)), b"", 8
    while position < len(png):
        end = position + 12 + int.from_bytes(png[position : position + 4])
        name, payload = png[position + 4 : position + 8], png[position + 8 : end - 4]
        assert int.from_bytes(png[end - 4 : end]) == zlib.crc32(name + payload)
        body += payload if name == b"IDAT" else b""
        position = end
    num_samples, depth = num_colours + has_alpha, np.dtype(dtype).itemsize
    rows = np.frombuffer(zlib.decompress(body), np.uint8).reshape(
        shape[0], 1 + shape[1] * num_samples * depth
    )
    assert (rows[:, 0] == 1).all()
    differences = rows[:, 1:].reshape(*shape, num_samples * depth)
    samples = np.add.accumulate(differences, axis=1, dtype=np.uint8).view(f">u{depth}")
    expected = pixels if alpha is None else np.dstack([pixels, alpha])
    np.testing.assert_array_equal(samples, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_encoding_is_deterministic(format: Format) -> None:
    picture = replace(from_pil(with_exif(smooth())), icc=SRGB)
    assert encode(picture, format) == encode(picture, format)


def test_lossy_formats_stay_close() -> None:
    picture = Picture(pixels=smooth())
    for format in ("jpeg", "webp"):
        back = decode(encode(picture, format))
        assert np.abs(back.pixels.astype(int) - picture.pixels).max() <= 8  # quality 95 on a gradient


def with_exif(pixels: np.ndarray, orientation: int = 1) -> Image.Image:
    image = Image.fromarray(pixels)
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    exif[0x0112] = orientation
    exif[0x8769] = {
        0x9003: "2024:01:02 03:04:05",
        0xA002: 9999,
        0xA003: 8888,
        0x920A: 35.5,
        0x927C: b"maker note \0\1",
    }
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    image.info["exif"] = exif.tobytes()
    return image


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """Return how a camera stores a picture so that this orientation makes it upright (Exif 3.0: where row 0
    and column 0 are).
    """
    height, width = upright.shape[:2]
    turned = np.empty((width, height, 3) if orientation >= 5 else (height, width, 3), dtype=np.uint8)
    for y in range(height):
        for x in range(width):
            bottom, right = height - 1 - y, width - 1 - x
            row, column = {
                1: (y, x),
                2: (y, right),
                3: (bottom, right),
                4: (bottom, x),
                5: (x, y),
                6: (right, y),
                7: (right, bottom),
                8: (x, bottom),
            }[orientation]
            turned[row, column] = upright[y, x]
    return turned


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_orientation_is_applied_once(orientation: int, format: str) -> None:
    image = with_exif(stored_as(CORNERS, orientation), orientation)
    options = {"lossless": True} if format == "WEBP" else {}
    picture = decode(saved(image, format, exif=image.info["exif"], **options))
    np.testing.assert_array_equal(picture.pixels, CORNERS)
    assert (f"orientation {orientation} applied" in picture.notes) is (orientation != 1)
    again = decode(encode(picture, "png"))
    np.testing.assert_array_equal(again.pixels, CORNERS)
    assert not again.notes
    np.testing.assert_array_equal(from_pil(image).pixels, CORNERS)


def test_orientation_of_a_jpeg_is_applied() -> None:
    image = with_exif(np.rot90(smooth()), 6)
    picture = decode(saved(image, "JPEG", quality=98, subsampling=0, exif=image.info["exif"]))
    assert np.abs(picture.pixels.astype(int) - smooth()).max() <= 6


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_invalid_orientation_is_ignored(orientation: int) -> None:
    image = with_exif(CORNERS, orientation)
    np.testing.assert_array_equal(decode(saved(image, "PNG", exif=image.info["exif"])).pixels, CORNERS)


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "jxl"])  # Pillow reads no JXL
def test_exif_survives_with_the_new_size_and_no_thumbnail(format: Format) -> None:
    image = with_exif(smooth(), 3)
    thumbnail = b"\xff\xd8 thumbnail \xff\xd9"
    source = saved(image, "JPEG", exif=image.info["exif"] + thumbnail)
    written = encode(decode(source), format)
    assert thumbnail not in written
    exif = Image.open(io.BytesIO(written)).getexif()
    inner, gps = exif.get_ifd(0x8769), exif.get_ifd(0x8825)
    assert exif[0x010F] == "Maker"
    assert exif.get(0x0112, 1) == 1
    assert (inner[0xA002], inner[0xA003]) == (64, 48)
    assert inner[0x9003] == "2024:01:02 03:04:05"
    assert inner[0x927C] == b"maker note \0\1"
    assert float(inner[0x920A]) == 35.5
    assert gps[1] == "N"


def test_structure_tags_of_a_tiff_are_not_carried() -> None:
    picture = decode(
        saved(Image.fromarray(smooth()), "TIFF", tiffinfo={270: "description", 33550: (1.0, 1.0, 0.0)})
    )
    exif = Image.open(io.BytesIO(encode(picture, "jpeg"))).getexif()
    assert exif[270] == "description"
    assert not {256, 257, 273, 279, 33550} & set(exif)


@pytest.mark.filterwarnings("ignore")
def test_damaged_exif_is_dropped_with_the_picture_kept() -> None:
    data = saved(Image.fromarray(CORNERS), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f garbage")
    np.testing.assert_array_equal(decode(data).pixels, CORNERS)


@pytest.mark.parametrize("format", FORMATS)
def test_srgb_profile_survives_untouched(format: Format) -> None:
    picture = decode(saved(Image.fromarray(smooth()), "PNG", icc_profile=SRGB))
    np.testing.assert_array_equal(picture.pixels, smooth())
    assert decode(encode(picture, format)).icc == SRGB


def matrix(name: str, gamma: float | None, coded: int = 12) -> bytes:
    return profile_of_matrix(colorants(PRIMARIES[coded]), gamma, name)


def lut(device_class: bytes, gamma: float = 2.2) -> bytes:
    """Return an RGB profile of a scanner: a table to Lab, of a grey axis with a gamma, and none back."""
    levels = np.linspace(0, 1, 3)
    red, green, blue = np.meshgrid(levels, levels, levels, indexing="ij")
    luminance = 0.22 * red**gamma + 0.72 * green**gamma + 0.06 * blue**gamma
    lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)
    lab = [lightness / 100 * 255, 128 + 60 * (red - green), 128 + 60 * (green - blue)]
    table = np.stack(lab, axis=3).clip(0, 255).astype(np.uint8).tobytes()
    identity = bytes(range(256)) * 3
    a2b0 = (
        b"mft1\0\0\0\0" + bytes([3, 3, 3, 0]) + struct.pack(">9i", *(np.eye(3).ravel() * 65536).astype(int))
    )
    a2b0 += identity + table + identity
    text = b"desc\0\0\0\0" + struct.pack(">I", 8) + b"scanner\0" + bytes(78)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    parts = {b"desc": text, b"cprt": b"text\0\0\0\0none\0", b"wtpt": white, b"A2B0": a2b0}
    body, entries = b"", b""
    for tag, data in parts.items():
        entries += tag + struct.pack(">II", 132 + 12 * len(parts) + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = 132 + len(entries) + len(body)
    header = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02400000, device_class, b"RGB ", b"Lab ", b"acsp")
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + struct.pack(">I", len(parts)) + entries + body


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    "icc", [DISPLAY_P3, matrix("Adobe RGB", 2.2), matrix("BT.2020", None, 9), matrix("ProPhoto", 1.8, 9)]
)
def test_a_wide_gamut_keeps_its_colours(icc: bytes, format: Format) -> None:
    pixels = np.array([[[0, 255, 0], [255, 0, 0], [3, 250, 17], [128, 128, 128]]], np.uint8).repeat(9, 1)
    picture = decode(saved(Image.fromarray(pixels.repeat(9, 0)), "PNG", icc_profile=icc))
    np.testing.assert_array_equal(picture.pixels[0], pixels[0])  # what the network sees
    assert (picture.icc, picture.source_icc) == (icc, None)
    assert picture.notes[0].startswith("in the colours of ")
    back = decode(encode(in_own_profile(picture), format, 100))
    assert back.icc == icc
    assert np.abs(back.pixels[4, 4::9].astype(int) - pixels[0, 4::9]).max() <= (
        0 if format in ("png", "tiff") else 24
    )


def test_grey_of_another_gamma_keeps_its_numbers() -> None:
    assert decode(saved(Image.fromarray(smooth()), "PNG", icc_profile=matrix("P3", None))).icc is not None
    grey = smooth()[..., 0]
    linear_rgb = matrix("linear", 1.0)
    assert decode(saved(Image.fromarray(grey), "PNG", icc_profile=linear_rgb)).icc is None  # not for grey


@pytest.mark.parametrize("coded", [1, 12, 9])
def test_linear_light_is_seen_by_the_curve_of_srgb_and_comes_back(coded: int) -> None:
    icc = matrix("Linear", 1.0, coded)
    pixels = np.array([[[0, 255, 0], [55, 55, 55], [200, 55, 20]]], np.uint8)
    picture = decode(saved(Image.fromarray(pixels), "PNG", icc_profile=icc))
    # Linear 55 / 255 = 0.2157 is 0.5022 on the curve of sRGB, in whatever primaries.
    assert np.abs(picture.pixels[0, :2].astype(int) - [[0, 255, 0], [128, 128, 128]]).max() <= 1
    assert picture.notes == ("converted from Linear to the curve of sRGB",)
    back = in_own_profile(picture)
    assert np.abs(back.pixels.astype(int) - pixels).max() <= 1
    assert (back.icc, back.source_icc) == (icc, None)
    assert back.notes == ("converted from Linear to the curve of sRGB and back",)


@pytest.mark.parametrize("device_class", [b"scnr", b"prtr", b"mntr"])
def test_a_profile_that_can_only_be_read_gives_srgb_with_a_note(device_class: bytes) -> None:
    picture = decode(saved(Image.fromarray(smooth()), "JPEG", icc_profile=lut(device_class)))
    assert (picture.icc, picture.source_icc) == (None, None)
    assert picture.notes == ("converted from scanner to sRGB, as the profile can only be read",)
    assert in_own_profile(picture) is picture


def test_srgb_for_those_who_ask_for_pixels() -> None:
    pixels = np.array([[[128, 128, 128], [200, 100, 100], [255, 0, 0]]], dtype=np.uint8)
    grey, pink, red = rgb_u8(decode(saved(Image.fromarray(pixels), "PNG", icc_profile=DISPLAY_P3)))[0].astype(
        int
    )
    # The linear P3 to sRGB matrix applied by hand: (0.586, 0.127, 0.127) linear becomes (0.689, 0.108,
    # 0.118); red is out of gamut.
    assert np.abs(grey - 128).max() <= 2
    assert np.abs(pink - (216, 93, 97)).max() <= 2
    assert tuple(red) == (255, 0, 0)
    assert rgb_u8(Picture(pixels=pixels, icc=b"no profile")) is pixels


def test_profiles_of_numbers_equal_those_of_others() -> None:
    """LittleCMS' own sRGB, and the matrix of Display P3 that Apple publishes."""
    for ours, theirs in ((matrix("sRGB", None, 1), SRGB), (matrix("P3", None), DISPLAY_P3)):
        for name in ("red", "green", "blue"):
            pair = [
                getattr(ImageCms.ImageCmsProfile(io.BytesIO(icc)).profile, f"{name}_colorant")[0]
                for icc in (ours, theirs)
            ]
            np.testing.assert_allclose(pair[0], pair[1], atol=5e-4)
    assert is_srgb(Picture(pixels=smooth(), icc=matrix("sRGB", None, 1)))
    assert not is_srgb(Picture(pixels=smooth(), icc=DISPLAY_P3))
    assert (coded_profile(1, 13), coded_profile(2, 2)) == (None, None)
    with pytest.raises(ValueError, match="triangle"):
        colorants([(0.3, 0.3), (0.1, 0.1), (0.2, 0.2), (0.3, 0.3)])


def test_sixteen_bit_keeps_its_profile() -> None:
    picture = replace(Picture(pixels=noise(4, 5, 3, dtype=np.uint16)), icc=DISPLAY_P3)
    for format in ("png", "tiff"):
        back = decode(encode(picture, format))
        np.testing.assert_array_equal(back.pixels, picture.pixels)
        assert back.icc == DISPLAY_P3
        assert back.notes == ("16 bit: ICC profile kept, not converted to sRGB",)


@pytest.mark.parametrize("profile", [b"not a profile", DISPLAY_P3[:200], b""])
def test_broken_profile_is_ignored_with_a_note(profile: bytes) -> None:
    picture = decode(saved(Image.fromarray(smooth()), "TIFF", icc_profile=profile or b"\0"))
    np.testing.assert_array_equal(picture.pixels, smooth())
    assert picture.icc is None
    assert picture.notes[0].startswith("ICC profile ignored")


def test_profile_of_another_kind_of_picture_is_ignored() -> None:
    picture = decode(saved(Image.fromarray(smooth()[..., 0]), "PNG", icc_profile=DISPLAY_P3))
    np.testing.assert_array_equal(picture.pixels[..., 0], smooth()[..., 0])
    assert picture.notes == ("ICC profile ignored: the profile is for RGB pictures and this one is L",)


def test_cmyk_jpeg_becomes_rgb() -> None:
    inks = np.zeros((16, 16, 4), dtype=np.uint8)
    inks[:8, :8, 0] = 255  # cyan: no red
    inks[8:, 8:, 3] = 255  # black
    picture = decode(saved(Image.fromarray(inks, "CMYK"), "JPEG", quality=100))
    assert picture.notes == ("CMYK converted to RGB without a profile",)
    np.testing.assert_allclose(picture.pixels[3, 3], (0, 255, 255), atol=4)
    np.testing.assert_allclose(picture.pixels[12, 12], (0, 0, 0), atol=4)
    np.testing.assert_allclose(picture.pixels[3, 12], (255, 255, 255), atol=4)


def test_grey_stays_grey() -> None:
    grey = smooth()[..., 0]
    for format in ("PNG", "TIFF", "GIF", "BMP"):
        picture = decode(saved(Image.fromarray(grey), format))
        assert np.ptp(picture.pixels, axis=2).max() == 0
        np.testing.assert_array_equal(picture.pixels[..., 0], grey)
    assert decode(saved(Image.fromarray(grey), "JPEG")).pixels.shape == (48, 64, 1)


def test_bilevel_becomes_grey() -> None:
    bits = smooth()[..., 0] > 100
    for format in ("PNG", "TIFF", "BMP"):
        picture = decode(saved(Image.fromarray(bits), format))
        np.testing.assert_array_equal(picture.pixels[..., 0], bits * np.uint8(255))
        assert picture.pixels.shape[2] == 1


def test_palette_and_its_transparency_become_rgb_and_alpha() -> None:
    image = Image.fromarray(np.array([[0, 1, 2, 1]], dtype=np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    expected = [[[10, 20, 30], [40, 50, 60], [70, 80, 90], [40, 50, 60]]]
    plain = decode(saved(image, "PNG"))
    np.testing.assert_array_equal(plain.pixels, expected)
    assert plain.alpha is None
    keyed = decode(saved(image, "PNG", transparency=bytes([255, 100, 0])))
    np.testing.assert_array_equal(keyed.pixels, expected)
    np.testing.assert_array_equal(keyed.alpha, [[255, 100, 0, 100]])


def test_key_colours_become_alpha() -> None:
    rows8 = b"\0" + bytes([1, 2, 3, 9, 9, 9])
    key8 = png_chunk(b"tRNS", struct.pack(">3H", 9, 9, 9))
    np.testing.assert_array_equal(decode(raw_png(2, 1, 8, 2, rows8, extra=key8)).alpha, [[255, 0]])
    rows16 = b"\0" + struct.pack(">2H", 7, 40_000)
    picture = decode(raw_png(2, 1, 16, 0, rows16, extra=png_chunk(b"tRNS", struct.pack(">H", 7))))
    np.testing.assert_array_equal(picture.alpha, [[0, 65535]])
    np.testing.assert_array_equal(picture.pixels[..., 0], [[7, 40_000]])


def test_sixteen_bit_values_are_exact() -> None:
    samples = noise(5, 4, 4, dtype=np.uint16)
    for colour_type, channels in ((0, 1), (2, 3), (4, 2), (6, 4)):
        part = samples[..., :channels]
        rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in part)
        picture = decode(raw_png(4, 5, 16, colour_type, rows))
        colours = 1 if channels < 3 else 3
        np.testing.assert_array_equal(picture.pixels, part[..., :colours])
        if channels in (2, 4):
            np.testing.assert_array_equal(picture.alpha, part[..., -1])
    assert probe(raw_png(4, 5, 16, 2, b"")).sample_bits == 16


@pytest.mark.parametrize(
    ("white", "values"), [(1, [0, 0.5, 1]), (255, [0, 51, 255]), (65535, [0, 300, 65535])]
)
def test_floating_point_grey_becomes_sixteen_bit(white: float, values: list[float]) -> None:
    picture = decode(saved(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF"))
    np.testing.assert_array_equal(
        picture.pixels[0, :, 0], [int(value * 65535 / white + 0.5) for value in values]
    )


def test_samples_that_are_no_numbers_are_black_or_white_and_told() -> None:
    picture = decode(
        saved(Image.fromarray(np.array([[0.5, np.nan, np.inf, -np.inf]], dtype=np.float32)), "TIFF")
    )
    np.testing.assert_array_equal(picture.pixels[0, :, 0], [32768, 0, 65535, 0])
    assert "3 samples were NaN or infinite" in picture.notes


def test_interlaced_png_equals_plain() -> None:
    values = np.arange(64, dtype=np.uint8).reshape(8, 8)
    passes = (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    )  # PNG, 8.2 (Adam7)
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in values[y::dy, x::dx])
    np.testing.assert_array_equal(decode(raw_png(8, 8, 8, 0, rows, interlace=1)).pixels[..., 0], values)


def test_progressive_jpeg_equals_baseline() -> None:
    image = Image.fromarray(smooth())
    baseline, progressive = (decode(saved(image, "JPEG", quality=90, progressive=p)) for p in (False, True))
    np.testing.assert_array_equal(baseline.pixels, progressive.pixels)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animation_gives_its_first_frame_and_a_note(format: str) -> None:
    frames = [Image.new("RGB", (16, 8), (40 * i, 0, 0)) for i in range(1, 5)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **options)
    picture = decode(data)
    assert picture.notes[0] == "first of 4 frames"
    assert probe(data).num_frames == 4
    np.testing.assert_array_equal(picture.pixels, np.full((8, 16, 3), (40, 0, 0)))


def test_one_pixel_is_a_picture() -> None:
    for format in FORMATS:
        back = decode(encode(Picture(pixels=np.full((1, 1, 3), 200, dtype=np.uint8)), format))
        assert back.pixels.shape == (1, 1, 3)
        assert np.abs(back.pixels.astype(int) - 200).max() <= 3


def test_content_decides_not_the_name() -> None:
    for format in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"):
        data = saved(Image.fromarray(smooth()), format)
        header = probe(data)
        assert (header.format, header.width, header.height, header.num_frames) == (format, 64, 48, 1)
        assert decode(data).format == format


def refusal(data: bytes, limits: ImageLimits | None = None) -> ImageReason:
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    assert str(caught.value)
    return caught.value.reason


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", ImageReason.EMPTY),
        (b"<!DOCTYPE html><html>not found</html>", ImageReason.NOT_AN_IMAGE),
        (bytes(1000), ImageReason.NOT_AN_IMAGE),
        (b"\xff\xd8", ImageReason.NOT_AN_IMAGE),
        (b"\0\0\0\x1cftypavif" + bytes(50), ImageReason.CORRUPT),
        (b"8BPS" + bytes(50), ImageReason.UNSUPPORTED_FORMAT),
        (b"\x89PNG\r\n\x1a\n", ImageReason.CORRUPT),
        (raw_png(0, 0, 8, 2, b""), ImageReason.CORRUPT),
        (saved(Image.fromarray(np.full((2, 2), -1, dtype=np.float32)), "TIFF"), ImageReason.UNSUPPORTED_MODE),
        (
            saved(Image.fromarray(np.full((2, 2), 1e6, dtype=np.float32)), "TIFF"),
            ImageReason.UNSUPPORTED_MODE,
        ),
        (
            saved(Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)), "TIFF"),
            ImageReason.UNSUPPORTED_MODE,
        ),
    ],
)
def test_unusable_files_are_refused_with_the_reason(data: bytes, reason: ImageReason) -> None:
    assert refusal(data) is reason


def test_size_is_refused_from_the_header_without_allocating() -> None:
    bombs = [
        raw_png(100_000, 100_000, 8, 2, b""),
        raw_png(30_000, 30_000, 1, 0, bytes(30_000 * 100)),
        raw_png(2**31 - 1, 1, 8, 2, b""),
    ]
    bombs.append(
        saved(Image.fromarray(smooth()), "JPEG").replace(
            struct.pack(">HH", 48, 64), struct.pack(">HH", 65_500, 65_500), 1
        )
    )
    tracemalloc.start()
    start = time.perf_counter()
    try:
        for bomb in bombs:
            assert refusal(bomb) is ImageReason.TOO_LARGE
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - start < 0.5


def test_limits_are_values_of_the_call() -> None:
    data = saved(Image.fromarray(smooth()), "PNG")
    for limits in (
        ImageLimits(max_pixels=64 * 48 - 1),
        ImageLimits(max_side_px=63),
        ImageLimits(max_bytes=len(data) - 1),
    ):
        assert refusal(data, limits) is ImageReason.TOO_LARGE
    decode(data, ImageLimits(max_pixels=64 * 48, max_side_px=64, max_bytes=len(data)))
    generous = probe(
        raw_png(20_000, 10_000, 8, 0, b""), ImageLimits(max_pixels=200_000_000)
    )  # above Pillow's own limit
    assert generous.width == 20_000
    with pytest.raises(ValueError, match="max_pixels must be at least 1, got 0"):
        ImageLimits(max_pixels=0)


def samples() -> dict[str, bytes]:
    rgb = Image.fromarray(smooth())
    jpeg = with_exif(smooth(), 6)
    frames = [Image.new("P", (16, 8), i) for i in range(3)]
    return {
        "jpeg": saved(jpeg, "JPEG", exif=jpeg.info["exif"], icc_profile=DISPLAY_P3),
        "progressive": saved(rgb, "JPEG", progressive=True),
        "cmyk": saved(rgb.convert("CMYK"), "JPEG"),
        "png": encode(replace(from_pil(jpeg), icc=DISPLAY_P3), "png"),
        "png16": encode(
            Picture(pixels=noise(20, 30, 3, dtype=np.uint16), alpha=noise(20, 30, dtype=np.uint16)), "png"
        ),
        "tiff": encode(replace(from_pil(jpeg), icc=DISPLAY_P3), "tiff"),
        "tiff16": encode(Picture(pixels=noise(20, 30, 3, dtype=np.uint16)), "tiff"),
        "tiff_lzw": saved(rgb, "TIFF", compression="tiff_lzw"),
        "webp": saved(rgb, "WEBP", exif=jpeg.info["exif"]),
        "webp_lossless": saved(rgb, "WEBP", lossless=True),
        "gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bmp": saved(rgb, "BMP"),
    }


@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged tags
@pytest.mark.parametrize(("name", "data"), samples().items(), ids=samples().keys())
def test_truncation_is_an_image_error_or_a_picture(name: str, data: bytes) -> None:
    outcomes: list[ImageReason | None] = []
    for end in sorted(
        {*range(0, len(data), max(1, len(data) // 60)), *range(max(0, len(data) - 12), len(data))}
    ):
        try:
            decode(data[:end])
            outcomes.append(None)
        except ImageError as error:
            outcomes.append(error.reason)
    assert outcomes[0] is ImageReason.EMPTY
    assert sum(outcome is None for outcome in outcomes) <= len(outcomes) // 4, (
        "a cut file passed for a whole one"
    )


def test_half_a_file_is_called_truncated() -> None:
    data = samples()
    for name in ("jpeg", "progressive", "png", "png16", "bmp"):
        assert refusal(data[name][: len(data[name]) * 3 // 4]) is ImageReason.TRUNCATED, name


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    kind = int(rng.integers(4))
    if kind == 0:  # flip bits anywhere
        for position in rng.integers(0, len(damaged), int(rng.integers(1, 12))):
            damaged[position] ^= 1 << int(rng.integers(8))
    elif kind == 1:  # overwrite in the header
        for position in rng.integers(0, min(200, len(damaged)), int(rng.integers(1, 8))):
            damaged[position] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF]))
    elif kind == 2:  # delete a piece
        start = int(rng.integers(len(damaged)))
        del damaged[start : start + int(rng.integers(1, 64))]
    else:  # repeat a piece elsewhere
        start, target = (int(v) for v in rng.integers(0, len(damaged), 2))
        damaged[target:target] = damaged[start : start + int(rng.integers(1, 64))]
    return bytes(damaged)


@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged tags
@pytest.mark.parametrize(("name", "data"), samples().items(), ids=samples().keys())
def test_mutated_files_raise_nothing_but_image_errors(name: str, data: bytes) -> None:
    rng = philox("mutations", name)
    limits = ImageLimits(max_pixels=1_000_000)
    for _ in range(60):
        damaged = mutated(data, rng)
        try:
            picture = decode(damaged, limits)
        except ImageError as error:
            assert isinstance(error.reason, ImageReason)  # noqa: PT017  both outcomes are right
        else:
            encode(picture, "tiff")
            encode(picture, "jpeg")


def test_jpeg_has_no_alpha_and_no_sixteen_bit() -> None:
    alpha = np.array([[0, 65535]], dtype=np.uint16)
    picture = Picture(pixels=np.full((1, 2, 3), 128 * 257 + 128, dtype=np.uint16), alpha=alpha)
    fitted = fit_format(picture, "jpeg")
    np.testing.assert_array_equal(fitted.pixels, [[[255, 255, 255], [128, 128, 128]]])
    assert fitted.alpha is None
    assert fitted.notes == ("16 bit reduced to 8 for jpeg", "transparency composited on white for jpeg")
    for format in ("png", "tiff"):
        assert fit_format(picture, format) is picture
    assert decode(encode(picture, "jpeg")).pixels.dtype == np.uint8


def test_format_limits_and_arguments_are_checked() -> None:
    wide = Picture(pixels=np.zeros((1, 20_000, 1), dtype=np.uint8))
    with pytest.raises(ImageError, match="webp holds at most 16383 px a side") as caught:
        encode(wide, "webp")
    assert caught.value.reason is ImageReason.TOO_LARGE
    with pytest.raises(ValueError, match="format must be one of png, jpeg, webp, tiff, avif, jxl, got 'gif'"):
        encode(wide, "gif")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="quality must be 1 to 100, got 0"):
        encode(wide, "jpeg", quality=0)
    with pytest.raises(ValueError, match="pixels must be"):
        Picture(pixels=np.zeros((2, 2, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="alpha must be"):
        Picture(pixels=np.zeros((2, 2, 3), dtype=np.uint8), alpha=np.zeros((2, 2), dtype=np.uint16))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "I;16", "P", "1", "CMYK"])
def test_pillow_images_convert_both_ways(mode: str) -> None:
    rgba = Image.fromarray(noise(6, 5, 4), "RGBA")
    image = (
        Image.fromarray(noise(6, 5, dtype=np.uint16))
        if mode == "I;16"
        else rgba.convert("RGB" if mode == "P" else mode).convert(mode)
    )
    picture = from_pil(image)
    back = to_pil(picture)
    assert back.mode == {"P": "RGB", "1": "L", "CMYK": "RGB"}.get(mode, mode)
    np.testing.assert_array_equal(
        np.asarray(back), np.asarray(image.convert(back.mode) if back.mode != mode else image)
    )
    assert from_pil(back).pixels.dtype == picture.pixels.dtype


def test_sixteen_bit_colour_is_rounded_for_pillow() -> None:
    values = np.array([[[0, 128, 129], [257, 65535, 65407], [65406, 385, 386]]], dtype=np.uint16)
    expected = [[[0, 0, 1], [1, 255, 255], [254, 1, 2]]]
    np.testing.assert_array_equal(np.asarray(to_pil(Picture(pixels=values))), expected)


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(ImageError(ImageReason.TRUNCATED, "cut")))
    assert (error.reason, str(error)) == (ImageReason.TRUNCATED, "cut")


def test_import_leaves_pillow_as_it_was() -> None:
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3
