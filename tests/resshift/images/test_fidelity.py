"""The fidelity table: what comes out of decode -> upscale -> encode for every kind of picture, asserted case
by case.

The model repeats every pixel, so the result is known: 4 x 4 blocks of what a viewer would show. 107 cases.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms

from pipelines.bulk.nearest import Nearest
from resshift import images
from resshift.images import Format, ImageError, ImageLimits, ImageReason, Picture
from resshift.images.alpha import fill_transparent
from resshift.images.animation import Frames, decode_frames, encode_frames, fit_frames
from resshift.images.profiles import PRIMARIES, colorants, grey_profile, matrix_profile

RNG = np.random.default_rng(7)
GREY = RNG.integers(0, 256, (12, 10), np.uint8)
RGB = RNG.integers(0, 256, (12, 10, 3), np.uint8)
_ACROSS, _DOWN = np.meshgrid(np.linspace(40, 200, 24), np.linspace(60, 180, 16))
SMOOTH = np.stack([_ACROSS, _DOWN, _ACROSS], axis=2).astype(np.uint8)


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def upscaled(data: bytes, format: Format = "png", choice: Any = "first", quality: int = 95) -> bytes:
    """Do what the bulk job does with one file."""
    frames = decode_frames(data, None, choice).map(
        lambda picture: Nearest().upscale(fill_transparent(picture))
    )
    return encode_frames(fit_frames(frames.map(images.in_own_profile), format), format, quality)


def grown(array: np.ndarray) -> np.ndarray:
    return array.repeat(4, axis=0).repeat(4, axis=1)


def exif_of(data: bytes) -> Image.Exif:
    return Image.open(io.BytesIO(data)).getexif()


def shot(orientation: int, format: str) -> bytes:
    """A photo with everything a camera writes: orientation, sizes, a thumbnail, a date, a place."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x8298] = "Maker", orientation, "Owner"
    exif[0x8769] = {0x9003: "2024:01:02 03:04:05", 0xA002: 24, 0xA003: 16}
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    options = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    return saved(Image.fromarray(SMOOTH), format, exif=exif.tobytes(), **options)


TURNS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.fliplr(np.rot90(a, -1)),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.fliplr(np.rot90(a, 1)),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    data = (
        shot(orientation, format)
        if format != "WEBP"
        else saved(
            Image.fromarray(SMOOTH), "WEBP", exif=exif_of(shot(orientation, "PNG")).tobytes(), **options
        )
    )
    out = upscaled(data)
    expected = grown(TURNS[orientation](SMOOTH))
    assert np.abs(images.decode(out).pixels.astype(int) - expected).max() <= (4 if format == "JPEG" else 0)
    assert exif_of(out).get(0x0112, 1) == 1
    assert Image.open(io.BytesIO(out)).size == (expected.shape[1], expected.shape[0])


@pytest.mark.parametrize("out_format", ["png", "jpeg", "webp", "tiff"])
def test_metadata_of_the_photo_travels_and_that_of_the_file_does_not(out_format: Format) -> None:
    exif = exif_of(upscaled(shot(6, "JPEG"), out_format))
    inner = exif.get_ifd(0x8769)
    assert (exif[0x010F], exif[0x8298], inner[0x9003]) == ("Maker", "Owner", "2024:01:02 03:04:05")
    assert (inner[0xA002], inner[0xA003]) == (64, 96)  # 16 x 24 turned, four times larger
    assert exif.get_ifd(0x8825)[1] == "N"
    assert not exif.get_ifd(1)  # the thumbnail


XMP = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" tiff:Orientation="6" '
    b"xmpNote:HasExtendedXMP='0123' xmlns:tiff=\"http://ns.adobe.com/tiff/1.0/\">"
    b"<dc:rights>\xc2\xa9 Owner</dc:rights>"
    b"<exif:PixelXDimension>24</exif:PixelXDimension><tiff:ImageLength>16</tiff:ImageLength>"
    b"<xmp:Thumbnails><rdf:Alt>AAAA</rdf:Alt></xmp:Thumbnails>"
    b'</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
)


@pytest.mark.parametrize("out_format", ["png", "jpeg", "webp", "tiff"])
@pytest.mark.parametrize("in_format", ["JPEG", "WEBP", "TIFF"])
def test_xmp_travels_and_says_nothing_wrong(in_format: str, out_format: Format) -> None:
    packet: dict[str, Any] = {"tiffinfo": {700: XMP}} if in_format == "TIFF" else {"xmp": XMP}
    out = upscaled(saved(Image.fromarray(SMOOTH), in_format, **packet), out_format)
    image = Image.open(io.BytesIO(out))
    width, height = image.size
    assert (width, height) == (64, 96)  # the orientation stands in the packet alone; Pillow heeds it
    upright = (
        b"" if in_format == "TIFF" else b'tiff:Orientation="1"'
    )  # Pillow turns a TIFF itself, and takes the property out
    expected = XMP.replace(b'tiff:Orientation="6"', upright).replace(b" xmpNote:HasExtendedXMP='0123'", b"")
    expected = expected.replace(b"<xmp:Thumbnails><rdf:Alt>AAAA</rdf:Alt></xmp:Thumbnails>", b"")
    expected = expected.replace(b">24<", b">%d<" % width).replace(b">16<", b">%d<" % height)
    assert image.info["xmp"] == expected
    assert images.decode(out).notes == ()  # nothing is turned a second time


def test_xmp_that_cannot_travel_is_named() -> None:
    long = XMP.replace(b"Owner", b"Owner" * 20_000)
    assert images.fit_format(Picture(pixels=RGB, xmp=long), "jpeg").notes == (
        "XMP dropped, it is longer than a JPEG segment",
    )
    for packet, problem in (
        (b"\xff\xfe<rdf:RDF", "it is not UTF-8"),
        (b"hello", "it is not an XMP packet"),
        (b'<!DOCTYPE x [<!ENTITY a "b">]>' + XMP, "it is not an XMP packet"),
        (XMP + b" " * (1 << 20), f"it is {len(XMP) + (1 << 20)} bytes long, {1 << 20} are carried"),
    ):
        picture = images.decode(saved(Image.fromarray(RGB), "WEBP", xmp=packet))
        assert (picture.xmp, picture.notes[-1]) == (None, f"XMP dropped, {problem}")


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("out_format", ["png", "jpeg", "webp", "tiff"])
def test_srgb_profiles_stay(out_format: Format) -> None:
    out = upscaled(saved(Image.fromarray(RGB), "PNG", icc_profile=SRGB), out_format)
    assert Image.open(io.BytesIO(out)).info["icc_profile"] == SRGB
    if out_format in ("png", "tiff"):
        np.testing.assert_array_equal(images.decode(out).pixels, grown(RGB))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("out_format", ["png", "tiff"])
def test_grey_stays_grey_and_colour_stays_colour(mode: str, out_format: Format) -> None:
    source = GREY if mode == "L" else RGB
    out = upscaled(saved(Image.fromarray(source), "PNG"), out_format)
    assert Image.open(io.BytesIO(out)).mode == mode
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(out))), grown(source))


@pytest.mark.parametrize("out_format", ["png", "tiff", "webp"])
@pytest.mark.parametrize("source", ["rgba", "la", "palette", "key"])
def test_transparency_stays(source: str, out_format: Format) -> None:
    alpha = np.where(np.arange(10) < 5, 255, 0).astype(np.uint8)[None].repeat(12, axis=0)
    if source == "rgba":
        image, options = Image.fromarray(np.dstack([RGB, alpha])), {}
    elif source == "la":
        image, options = Image.fromarray(np.dstack([GREY, alpha]), "LA"), {}
    else:
        image = Image.fromarray((alpha // 255).astype(np.uint8), "P")
        image.putpalette([10, 20, 30, 200, 100, 50])
        options = {"transparency": 0}
        if source == "key":
            image, options = image.convert("RGB"), {"transparency": (10, 20, 30)}
    out = Image.open(io.BytesIO(upscaled(saved(image, "PNG", **options), out_format))).convert("RGBA")
    np.testing.assert_array_equal(np.asarray(out)[..., 3], grown(alpha))


@pytest.mark.parametrize("hidden", [0, 255, 128])
def test_hidden_colours_do_not_show(hidden: int) -> None:
    alpha = np.zeros((20, 20), np.uint8)
    alpha[5:15, 5:15] = 255
    pixels = np.full((20, 20, 3), hidden, np.uint8)
    pixels[5:15, 5:15] = (200, 60, 20)
    filled = fill_transparent(Picture(pixels=pixels, alpha=alpha)).pixels
    assert np.abs(filled.astype(int) - (200, 60, 20)).max() <= 1
    np.testing.assert_array_equal(filled[5:15, 5:15], pixels[5:15, 5:15])


@pytest.mark.parametrize("out_format", ["png", "tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bit_stays_sixteen_bit(channels: int, out_format: Format) -> None:
    samples = RNG.integers(0, 65536, (12, 10, channels), np.uint16)
    alpha = samples[..., 3] | 1 if channels == 4 else None
    source = Picture(pixels=samples[..., : min(channels, 3)], alpha=alpha)
    result = images.decode(upscaled(images.encode(source, "png"), out_format))
    np.testing.assert_array_equal(result.pixels, grown(source.pixels))
    assert (result.alpha is None) == (alpha is None)
    if alpha is not None:
        np.testing.assert_array_equal(result.alpha, grown(alpha))


def test_sixteen_bit_is_reduced_where_the_format_has_none() -> None:
    for out_format in ("jpeg", "webp"):
        samples = np.full((8, 8, 3), 257 * 100, np.uint16)
        result = images.decode(upscaled(images.encode(Picture(pixels=samples), "png"), out_format))  # pyright: ignore[reportArgumentType]
        assert result.pixels.dtype == np.uint8
        assert abs(int(result.pixels[0, 0, 0]) - 100) <= 2


def test_palette_becomes_colour() -> None:
    image = Image.fromarray(RGB).quantize(16)
    np.testing.assert_array_equal(
        images.decode(upscaled(saved(image, "PNG"))).pixels, grown(np.asarray(image.convert("RGB")))
    )
    np.testing.assert_array_equal(
        images.decode(upscaled(saved(image, "GIF"))).pixels, grown(np.asarray(image.convert("RGB")))
    )


def test_cmyk_becomes_rgb() -> None:
    image = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    picture = images.decode(upscaled(saved(image, "TIFF")))
    assert picture.pixels.shape == (64, 64, 3)
    np.testing.assert_allclose(picture.pixels[0, 0], (0, 255, 255), atol=2)


@pytest.mark.parametrize(
    ("format", "options"),
    [("JPEG", {"progressive": True}), ("JPEG", {}), ("GIF", {"interlace": 1}), ("GIF", {"interlace": 0})],
)
def test_progressive_and_interlaced_equal_plain(format: str, options: dict[str, Any]) -> None:
    image = Image.fromarray(SMOOTH if format == "JPEG" else GREY)
    plain = {"progressive": False} if format == "JPEG" else {"interlace": 0}
    assert upscaled(saved(image, format, **options)) == upscaled(saved(image, format, **plain))


COLOURS = [(40, 0, 0), (0, 80, 0), (0, 0, 120)]


def film(format: str) -> bytes:
    frames = [Image.new("RGB", (16, 8), colour) for colour in COLOURS]
    options: dict[str, Any] = {"save_all": True, "append_images": frames[1:]}
    if format != "TIFF":
        options |= {"duration": [100, 200, 300], "loop": 2}
    return saved(frames[0], format, **options | ({"lossless": True} if format == "WEBP" else {}))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("out_format", ["png", "webp", "tiff"])
def test_all_frames_are_upscaled_when_asked(format: str, out_format: Format) -> None:
    out = Image.open(io.BytesIO(upscaled(film(format), out_format, "all", 100)))
    assert getattr(out, "n_frames", 1) == 3
    for i, colour in enumerate(COLOURS):
        out.seek(i)
        shown = np.asarray(out.convert("RGB"))
        assert shown.shape == (32, 64, 3)
        assert np.abs(shown.astype(int) - colour).max() <= 1
        if format != "TIFF" and out_format != "tiff":
            assert out.info["duration"] == (i + 1) * 100


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_is_taken_and_said(format: str) -> None:
    frames = decode_frames(film(format), None, "first")
    assert frames.pictures[0].notes[0] == "first of 3 frames"
    np.testing.assert_array_equal(images.decode(upscaled(film(format))).pixels[0, 0], COLOURS[0])


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_several_frames_can_be_refused(format: str) -> None:
    with pytest.raises(ImageError, match="3 frames") as caught:
        decode_frames(film(format), None, "fail")
    assert caught.value.reason is ImageReason.ANIMATED
    assert len(decode_frames(saved(Image.fromarray(RGB), format), None, "fail").pictures) == 1


@pytest.mark.parametrize("shape", [(12, 10), (12, 10, 3), (12, 10, 4)])
def test_pages_of_sixteen_bit_are_read_in_sixteen_bit(shape: tuple[int, ...]) -> None:
    pages = RNG.integers(1, 1 << 16, (3, *shape), np.uint16)
    out = io.BytesIO()
    extra = {"extrasamples": ["unassalpha"]} if shape[2:] == (4,) else {}
    with tifffile.TiffWriter(out) as writer:
        for page in pages:
            writer.write(page, photometric="minisblack" if len(shape) == 2 else "rgb", **extra)  # pyright: ignore[reportArgumentType]
    for picture, page in zip(decode_frames(out.getvalue(), None, "all").pictures, pages, strict=True):
        np.testing.assert_array_equal(np.squeeze(images.to_array(picture)), page)


FILMS: tuple[Format, ...] = ("png", "webp", "avif", "tiff")
P3 = matrix_profile(colorants(PRIMARIES[12]), None, "Display P3")
GREY_18 = grey_profile(1.8, "grey of 1.8")


@pytest.mark.parametrize("format", FILMS)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("has_alpha", [False, True])
def test_frames_of_sixteen_bit_are_reduced_with_a_note_and_pages_are_not(
    format: Format, channels: int, has_alpha: bool
) -> None:
    levels = (10_000, 40_000, 65_535)
    alpha = np.full((16, 24), 51_400, np.uint16) if has_alpha else None
    deep = [Picture(pixels=np.full((16, 24, channels), level, np.uint16), alpha=alpha) for level in levels]
    fitted = fit_frames(Frames(tuple(deep)), format)
    back = decode_frames(encode_frames(fitted, format, 100), None, "all").pictures
    notes = () if format == "tiff" else (f"16 bit reduced to 8 for frames of {format}",)
    assert fitted.pictures[0].notes[: len(notes)] == notes
    assert "16 bit reduced to 10 for avif" not in fitted.pictures[0].notes
    for picture, level in zip(back, levels, strict=True):
        assert picture.pixels.dtype == (np.uint16 if format == "tiff" else np.uint8)
        shown = images.rgb_u8(picture).astype(int)
        assert np.abs(shown - round(level / 257)).max() <= (0 if format in ("png", "tiff") else 2)
        if format == "tiff":
            assert (picture.pixels == level).all()
        if has_alpha:
            assert picture.alpha is not None
            assert np.abs(picture.alpha * (1.0 if format == "tiff" else 257.0) - 51_400).max() <= 257


@pytest.mark.parametrize("format", FILMS)
def test_what_the_first_frame_says_is_written(format: Format) -> None:
    exif, xmp = images.decode(shot(1, "JPEG")).exif, b"<x:xmpmeta><rdf:RDF>sea</rdf:RDF></x:xmpmeta>"
    text = (("Title", "Sea"), ("Author", "日本"))
    first = Picture(pixels=SMOOTH, icc=P3, exif=exif, xmp=xmp, resolution=(300, 150), text=text)
    frames = Frames((first, Picture(pixels=SMOOTH[::-1].copy(), icc=P3)), (100, 200))
    back = decode_frames(encode_frames(fit_frames(frames, format), format), None, "all").pictures[0]
    tags = Image.Exif()
    tags.load(back.exif or b"")
    assert (tags[0x010F], tags[0x8298], tags.get_ifd(0x8825)[1]) == ("Maker", "Owner", "N")
    assert tags.get_ifd(0x8769)[0x9003] == "2024:01:02 03:04:05"
    assert (back.icc, back.xmp) == (P3, xmp)
    assert back.resolution is not None
    np.testing.assert_allclose(back.resolution, (300, 150), atol=0.1)
    assert back.text == (text if format == "png" else ())


@pytest.mark.parametrize(
    ("format", "num_frames"), [*((one, 1) for one in get_args(Format)), *((one, 2) for one in FILMS)]
)
@pytest.mark.parametrize("has_alpha", [False, True])
def test_grey_of_a_profile_looks_the_same(format: Format, num_frames: int, has_alpha: bool) -> None:
    grey = SMOOTH[..., :1]
    alpha = np.full(grey.shape[:2], 200, np.uint8) if has_alpha and format != "jpeg" else None
    source = [
        Picture(pixels=one, alpha=alpha, icc=GREY_18) for one in (grey, grey[:, ::-1].copy())[:num_frames]
    ]
    fitted = fit_frames(Frames(tuple(source)), format)
    back = decode_frames(encode_frames(fitted, format, 100), None, "all").pictures
    for one, expected in zip(back, source, strict=True):
        assert not any("ignored" in note for note in one.notes)
        shown, wanted = images.rgb_u8(one).astype(int), images.rgb_u8(expected)
        assert np.abs(shown - wanted).max() <= (0 if format in ("png", "tiff") else 8)
    keeps = format in ("png", "tiff", "jpeg") or (format == "jxl" and not has_alpha)
    assert back[0].icc == (GREY_18 if keeps else None)
    note = f"grey of a profile converted to sRGB, {format} holds it as RGB"
    assert (note in fitted.pictures[0].notes) != keeps


@pytest.mark.parametrize("format", FILMS)
@pytest.mark.parametrize("profiles", [(P3, None), (None, P3), (None, P3, None)])
def test_frames_of_unlike_profiles_look_the_same(profiles: tuple[bytes | None, ...], format: Format) -> None:
    colours = [(200, 80, 80), (80, 200, 80), (90, 90, 200)]
    source = [
        Picture(pixels=np.full((16, 24, 3), colour, np.uint8), icc=icc)
        for colour, icc in zip(colours, profiles, strict=False)
    ]
    fitted = fit_frames(Frames(tuple(source)), format)
    back = decode_frames(encode_frames(fitted, format, 100), None, "all").pictures
    for one, expected in zip(back, source, strict=True):
        error = np.abs(images.rgb_u8(one).astype(int) - images.rgb_u8(expected))
        assert error.max() <= (0 if format in ("png", "tiff") else 4)
        assert one.icc == (expected.icc if format == "tiff" else None)
    note = "frames of unlike profiles converted to sRGB"
    assert (note in fitted.pictures[0].notes) == (format != "tiff")


def test_notes_of_all_frames_stand_on_the_first_once() -> None:
    said = ("3 frames", "a"), ("b", "a"), ("b",)
    frames = Frames(tuple(Picture(pixels=RGB, notes=notes) for notes in said))
    assert fit_frames(frames, "png").pictures[0].notes == ("3 frames", "a", "b")


def test_frames_have_limits_and_formats_their_own() -> None:
    with pytest.raises(ImageError, match="at most 2 are allowed"):
        decode_frames(film("GIF"), ImageLimits(max_frames=2), "all")
    with pytest.raises(ImageError, match="3 frames of 16x8"):
        decode_frames(film("GIF"), ImageLimits(max_pixels=300), "all")
    with pytest.raises(ImageError, match="do not fit into a jpeg") as caught:
        fit_frames(decode_frames(film("GIF"), None, "all"), "jpeg")
    assert caught.value.reason is ImageReason.ANIMATED


def test_notes_tell_what_was_changed() -> None:
    frames = decode_frames(shot(6, "JPEG"))
    assert "orientation 6 applied" in frames.pictures[0].notes
    alpha = np.full((4, 4), 100, np.uint8)
    fitted = fit_frames(Frames((Picture(pixels=RGB[:4, :4], alpha=alpha),)), "jpeg")
    assert fitted.pictures[0].notes == ("transparency composited on white for jpeg",)
    assert replace(fitted.pictures[0], notes=()).alpha is None
