"""What a file says about its picture, and the output says as well: text, resolution, colours told by numbers,
transparent levels.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pipelines.bulk.nearest import Nearest
from resshift import images
from resshift.images import Format
from resshift.images.animation import FrameChoice, decode_frames
from tests.pictures import encoded, file_of, noise

RGB = noise(0, 12, 16)
FORMATS: tuple[Format, ...] = ("jpeg", "png", "webp", "tiff", "avif")


def upscaled(data: bytes, format: Format) -> Image.Image:
    picture = images.in_own_profile(Nearest().upscale(images.decode(data)))
    return Image.open(io.BytesIO(images.encode(images.fit_format(picture, format), format)))


def png_with(pixels: np.ndarray, *chunks: tuple[bytes, bytes], bits: int = 8) -> bytes:
    """Return a PNG with chunks behind its header; grey of fewer bits is packed."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, 0 if pixels.ndim == 2 else 2, 0, 0, 0)
    rows = b""
    for row in pixels:
        digits = "".join(f"{value:0{bits}b}" for value in row.ravel())
        digits = digits.ljust(-(-len(digits) // 8) * 8, "0")
        rows += b"\0" + bytes(int(digits[i : i + 8], 2) for i in range(0, len(digits), 8))
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += chunk(name, body)
    return data


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def apng_with(frames: Iterable[np.ndarray], *chunks: tuple[bytes, bytes], bits: int = 8) -> bytes:
    """Return an APNG of frames that replace each other, with chunks behind its header."""
    frames = list(frames)
    height, width = frames[0].shape[:2]

    def control(number: int) -> bytes:
        return struct.pack(">IIIIIHHBB", number, width, height, 0, 0, 1, 10, 0, 0)

    first = ((b"acTL", struct.pack(">II", len(frames), 0)), *chunks, (b"fcTL", control(0)))
    data = png_with(frames[0], *first, bits=bits)[:-12]
    for i, frame in enumerate(frames[1:]):
        alone = png_with(frame, bits=bits)
        rows = alone[alone.index(b"IDAT") + 4 : -16]
        data += chunk(b"fcTL", control(2 * i + 1)) + chunk(b"fdAT", struct.pack(">I", 2 * i + 2) + rows)
    return data + chunk(b"IEND", b"")


TEXTS = {0x010E: "Übung am Zürichsee – 日本", 0x013B: "José Müller", 0x8298: "© 2026 José Müller"}


def exif_with_text(kind: int = 2, order: str = "<") -> bytes:
    """Return a block with UTF-8 in tags of type ASCII, as editors write them, or of another type, one of four
    bytes in place.
    """
    inner = {0xA430: "Zoë".encode() + b"\0", 0x9003: b"2026:08:05 10:00:00\0"}
    tags = {tag: text.encode() + b"\0" for tag, text in TEXTS.items()} | {0x0131: "é!".encode() + b"\0"}
    inner_at = 8 + 2 + 12 * (len(tags) + 1) + 4

    def directory(start: int, values: dict[int, bytes], pointer: bytes = b"") -> bytes:
        entries, data = b"", b""
        data_at = start + 2 + 12 * len(values) + len(pointer) + 4 + (len(inner_block) if pointer else 0)
        for tag in sorted(values):
            value = values[tag]
            place = (
                value.ljust(4, b"\0") if len(value) <= 4 else struct.pack(order + "I", data_at + len(data))
            )
            data += value if len(value) > 4 else b""
            entries += struct.pack(order + "HHI", tag, kind, len(value)) + place
        count = struct.pack(order + "H", len(values) + bool(pointer))
        return count + entries + pointer + bytes(4) + (inner_block if pointer else b"") + data

    inner_block = directory(inner_at, inner)
    body = directory(8, tags, struct.pack(order + "HHII", 0x8769, 4, 1, inner_at))
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8)
    return b"Exif\0\0" + head + body


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("in_format", ["JPEG", "WEBP", "PNG"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [2, 129])  # ASCII, and UTF-8 of Exif 3.0
def test_exif_text_keeps_its_bytes(kind: int, order: str, in_format: str, format: Format) -> None:
    exif = upscaled(file_of(RGB, in_format, exif=exif_with_text(kind, order)), format).getexif()
    assert {tag: exif[tag].encode("latin-1").decode() for tag in TEXTS} == TEXTS
    assert exif[0x0131].encode("latin-1").decode() == "é!"
    assert exif.get_ifd(0x8769)[0xA430].encode("latin-1").decode() == "Zoë"


@pytest.mark.filterwarnings("ignore")  # Pillow warns about damaged tags
@pytest.mark.parametrize("kind", [2, 129])
def test_a_damaged_block_of_exif_is_no_reason_to_refuse_a_picture(kind: int) -> None:
    block = exif_with_text(kind)
    loop = struct.pack("<HHII", 0x8769, 4, 1, 8)  # the directory points to itself
    at = block.index(loop[:8])
    for damaged in (*(block[:n] for n in range(0, len(block), 5)), block[:at] + loop + block[at + 12 :]):
        picture = images.decode(file_of(RGB, "PNG", exif=damaged))
        np.testing.assert_array_equal(picture.pixels, RGB)


def test_exif_text_that_a_program_set_is_written_as_pillow_does() -> None:
    image = Image.fromarray(RGB)
    image.getexif()[0x013B] = "日本"
    exif = Image.open(io.BytesIO(images.encode(images.from_pil(image), "jpeg"))).getexif()
    assert exif[0x013B] == "??"


def dots(image: Image.Image) -> tuple[float, float] | None:
    """Return the dots per inch in the format's own place."""
    if image.format in ("JPEG", "PNG"):
        assert image.format == "PNG" or image.info["jfif_unit"] == 1
        return image.info.get("dpi")
    tags = image.tag_v2 if image.format == "TIFF" else image.getexif()  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType]
    return (float(tags[282]), float(tags[283])) if 282 in tags and tags[296] == 2 else None


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("in_format", "options", "expected"),
    [
        ("JPEG", {"dpi": (300, 300)}, (300, 300)),
        ("PNG", {"dpi": (600, 300)}, (600, 300)),
        ("TIFF", {"dpi": (240, 240)}, (240, 240)),
        ("BMP", {"dpi": (150, 150)}, (150, 150)),
        ("TIFF", {"tiffinfo": {282: 100.0, 283: 100.0, 296: 3}}, (254, 254)),  # a centimetre
    ],
)
def test_resolution_stands_where_the_format_says_it(
    in_format: str, options: dict[str, object], expected: tuple[float, float], format: Format
) -> None:
    told = dots(upscaled(file_of(RGB, in_format, **options), format))
    assert told == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("in_format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_picture_without_a_resolution_gets_none(in_format: str) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    data = file_of(RGB, in_format, **({} if in_format == "TIFF" else {"exif": exif.tobytes()}))
    assert images.decode(data).resolution is None
    assert upscaled(data, "jpeg").info.get("jfif_unit", 0) == 0


def test_resolution_turns_with_the_picture() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    assert images.decode(encoded(0, format="JPEG", dpi=(600, 300), exif=exif.tobytes())).resolution == (
        300,
        600,
    )


def test_text_of_a_png_travels_or_is_named() -> None:
    info = PngInfo()
    info.add_text("Author", "José")
    info.add_itxt("Title", "日本")
    info.add_text("Comment", "a" * 5000, zip=True)
    data = file_of(RGB, "PNG", pnginfo=info)
    text = {"Author": "José", "Title": "日本", "Comment": "a" * 5000}
    out = upscaled(data, "png")
    out.load()
    assert out.text == text  # pyright: ignore[reportAttributeAccessIssue]
    fitted = images.fit_format(images.decode(data), "jpeg")
    assert (fitted.text, fitted.notes) == ((), ("text of the PNG dropped: Author, Title, Comment",))
    info.add_text("Long", "b" * (1 << 20))
    long = images.decode(file_of(RGB, "PNG", pnginfo=info))
    assert (long.text, "1048576 are carried" in long.notes[-1]) == ((), True)


LINEAR = (b"gAMA", struct.pack(">I", 100_000))
SRGB_GAMMA = (b"gAMA", struct.pack(">I", 45_455))
P3_PRIMARIES = (b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("chunks", [[LINEAR], [LINEAR, P3_PRIMARIES]])
def test_linear_numbers_are_seen_as_light_and_said_to_be_linear(
    chunks: list[tuple[bytes, bytes]], format: Format
) -> None:
    flat = np.full((8, 8, 3), 55, np.uint8)
    picture = images.decode(png_with(flat, *chunks))
    assert np.abs(picture.pixels.astype(int) - 128).max() <= 1  # 55 / 255 is 0.5022 on the curve of sRGB
    out = upscaled(png_with(flat, *chunks), format)
    assert np.abs(np.asarray(out.convert("RGB")).astype(int) - 55).max() <= 3
    assert (
        np.abs(
            images.rgb_u8(images.decode(images.encode(images.in_own_profile(picture), format))).astype(int)
            - 128
        ).max()
        <= 5
    )


def test_linear_grey_is_seen_as_light_too() -> None:
    data = png_with(np.full((8, 8), 55, np.uint8), LINEAR)
    picture = images.decode(data)
    assert np.abs(picture.pixels.astype(int) - 128).max() <= 1
    assert np.abs(np.asarray(upscaled(data, "png")).astype(int) - 55).max() <= 1


@pytest.mark.parametrize(
    ("chunks", "has_profile", "notes"),
    [
        ([SRGB_GAMMA], False, ()),
        ([(b"sRGB", b"\0"), LINEAR], False, ()),
        ([SRGB_GAMMA, P3_PRIMARIES], True, ("in the colours of gAMA 0.45455 and cHRM",)),
        ([(b"cICP", bytes([12, 13, 0, 1]))], True, ("in the colours of Display P3",)),
        ([(b"cICP", bytes([1, 13, 0, 1])), LINEAR], False, ()),
        (
            [(b"cICP", bytes([9, 16, 0, 1]))],
            True,
            ("PQ curve of an HDR picture taken for that of sRGB", "in the colours of BT.2020"),
        ),
        ([(b"gAMA", bytes(4))], False, ("gAMA ignored, it is 0",)),
        (
            [LINEAR, (b"cHRM", bytes(32))],
            False,
            (
                "cHRM ignored: primaries must have y above 0, got "
                "[(0.0, 0.0), (0.0, 0.0), (0.0, 0.0), (0.0, 0.0)]",
            ),
        ),
    ],
)
def test_colours_by_numbers_become_a_profile(
    chunks: list[tuple[bytes, bytes]], has_profile: bool, notes: tuple[str, ...]
) -> None:
    picture = images.decode(png_with(RGB, *chunks))
    assert (picture.icc is not None, picture.notes) == (has_profile, notes)
    np.testing.assert_array_equal(picture.pixels, RGB)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_the_transparent_level_of_grey_is_transparent(bits: int) -> None:
    levels = np.random.default_rng(bits).integers(0, 1 << bits, (9, 13), np.uint8)
    for level in {0, (1 << bits) // 2, (1 << bits) - 1}:
        picture = images.decode(png_with(levels, (b"tRNS", struct.pack(">H", level)), bits=bits))
        assert picture.alpha is not None
        np.testing.assert_array_equal(picture.alpha == 0, levels == level)
        np.testing.assert_array_equal(picture.pixels[..., 0], levels * (255 // ((1 << bits) - 1)))


@pytest.mark.parametrize("choice", ["first", "all"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_level_of_grey_is_that_of_every_frame(bits: int, choice: FrameChoice) -> None:
    levels = np.random.default_rng(bits).integers(0, min(1 << bits, 7), (3, 9, 13), np.uint8)
    for level in {0, min(1 << bits, 7) // 2}:
        data = apng_with(levels, (b"tRNS", struct.pack(">H", level)), bits=bits)
        pictures = decode_frames(data, None, choice).pictures
        assert len(pictures) == (1 if choice == "first" else 3)
        for picture, expected in zip(pictures, levels, strict=False):
            assert picture.alpha is not None
            np.testing.assert_array_equal(picture.alpha == 0, expected == level)
            scale = 1 if bits == 16 else 255 // ((1 << bits) - 1)
            np.testing.assert_array_equal(picture.pixels[..., 0], expected * scale)


@pytest.mark.parametrize("pixels", [RGB, RGB[..., 0]])
@pytest.mark.parametrize(
    "chunks",
    [
        [(b"cICP", bytes([12, 13, 0, 1]))],
        [(b"cICP", bytes([9, 16, 0, 1]))],
        [LINEAR],
        [LINEAR, P3_PRIMARIES],
        [(b"tRNS", bytes(6))],
        [(b"pHYs", struct.pack(">IIB", 11811, 5906, 1))],
    ],
)
def test_every_frame_is_read_as_a_picture_alone(
    chunks: list[tuple[bytes, bytes]], pixels: np.ndarray
) -> None:
    chunks = [(name, body[:2] if name == b"tRNS" and pixels.ndim == 2 else body) for name, body in chunks]
    frames = decode_frames(apng_with((pixels, 255 - pixels), *chunks), None, "all")
    for picture, shown in zip(frames.pictures, (pixels, 255 - pixels), strict=True):
        alone = images.decode(png_with(shown, *chunks))
        for plane in ("pixels", "alpha"):
            np.testing.assert_array_equal(getattr(picture, plane), getattr(alone, plane))
        for name in ("icc", "source_icc", "resolution"):
            assert getattr(picture, name) == getattr(alone, name)
        assert picture.notes[-len(alone.notes) :] == alone.notes or not alone.notes


def test_an_apng_of_sixteen_bit_colour_is_read_in_eight_and_says_so() -> None:
    deep = np.random.default_rng(0).integers(0, 1 << 16, (2, 9, 13, 3), np.uint16)
    frames = decode_frames(apng_with(deep, bits=16), None, "all")
    assert [picture.notes[-1] for picture in frames.pictures] == ["16 bit read as 8"] * 2
    for picture, expected in zip(frames.pictures, deep, strict=True):
        np.testing.assert_array_equal(picture.pixels, expected >> 8)
