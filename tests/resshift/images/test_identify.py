"""What a file is: pictures that are read, pictures of other kinds, and everything else."""

from __future__ import annotations

import io
import re
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.bulk.nearest import Nearest
from resshift import images
from resshift.images import ImageError, ImageReason
from resshift.images.animation import decode_frames
from resshift.images.identify import MAX_PAGES, identify, pages
from tests.pictures import encoded, noise, tiff_of

SMALL, LARGE, OTHER = noise(0, 6, 8), noise(1, 24, 32), noise(2, 10, 10)


def media(*brands: bytes) -> bytes:
    return struct.pack(">I", 16 + 4 * len(brands)) + b"ftyp" + brands[0] + bytes(4) + b"".join(brands)


@pytest.mark.parametrize(
    "data",
    [
        tiff_of([(SMALL, {254: 1, 330: 0})]),  # NEF, ARW, SRW: a preview, and the rest in a sub-directory
        tiff_of([(SMALL, {50706: 0x0401})]),  # DNG
        tiff_of([(SMALL, {254: 1, 50706: 0x0401}), (LARGE, {})]),
        tiff_of([(SMALL, {262: 32803})]),
        b"II*\0\x10\0\0\0CR\x02\0" + bytes(50),
        b"FUJIFILMCCD-RAW 0201" + bytes(50),
        b"IIU\0\x08\0\0\0" + bytes(50),
        b"IIRO\x08\0\0\0" + bytes(50),
        media(b"crx ", b"isom"),
    ],
)
def test_camera_raw_is_not_taken_for_its_preview(data: bytes) -> None:
    with pytest.raises(ImageError, match="the file is camera raw, allowed are JPEG") as caught:
        images.decode(data)
    assert caught.value.reason is ImageReason.UNSUPPORTED_FORMAT


def with_sub_directories(data: bytes) -> bytes:
    """Return a TIFF whose directories behind the first one are listed in it instead."""
    moved, links = bytearray(data), [4]
    (at,) = struct.unpack_from("<I", data, 4)
    while at:
        links.append(at + 2 + 12 * struct.unpack_from("<H", data, at)[0])
        (at,) = struct.unpack_from("<I", data, links[-1])
    found = [struct.unpack_from("<I", data, link)[0] for link in links[1:-1]]
    for link in links[1:]:
        moved[link : link + 4] = bytes(4)
    entry = moved.index(struct.pack("<HHI", 330, 4, 1))
    where = found[0] if len(found) == 1 else len(moved)
    moved[entry + 4 : entry + 12] = struct.pack("<II", len(found), where)
    return bytes(moved) + struct.pack(f"<{len(found)}I", *found)


SENSOR, LINEAR = (LARGE, {262: 32803}), (LARGE, {262: 34892})


@pytest.mark.parametrize("flag", [{}, {254: 0}, {254: 1}])
@pytest.mark.parametrize("sensor", [SENSOR, LINEAR])
def test_a_sensor_behind_a_preview_is_camera_raw_whatever_the_preview_says_of_itself(
    sensor: tuple[np.ndarray, dict[int, int]], flag: dict[int, int]
) -> None:
    preview = (SMALL, {330: 0, **flag})
    chains = [[(SMALL, flag), sensor], [(SMALL, flag), (OTHER, {}), sensor]]
    below = [with_sub_directories(tiff_of([preview, *rest])) for rest in ([sensor], [(OTHER, {}), sensor])]
    for data in (*map(tiff_of, chains), *below):
        with pytest.raises(ImageError, match="the file is camera raw"):
            identify(data)
        with pytest.raises(ImageError, match="the file is camera raw"):
            images.decode(data)
    if not flag:  # the beginning of the file does not tell
        assert identify(tiff_of(chains[1])[:-300]) == identify(below[1][:-8]) == "TIFF"


def test_a_picture_with_smaller_ones_beside_it_is_no_camera_raw() -> None:
    pyramid = with_sub_directories(tiff_of([(LARGE, {330: 0}), (SMALL, {254: 1}), (OTHER, {254: 1})]))
    developed = tiff_of([(LARGE, {}), (SMALL, {262: 32803})])
    loop = with_sub_directories(tiff_of([(LARGE, {330: 0}), (SMALL, {})]))
    (first,) = struct.unpack_from("<I", loop, 4)
    for data in (pyramid, developed, loop.replace(loop[-4:], struct.pack("<I", first))):
        assert identify(data) == "TIFF"
        np.testing.assert_array_equal(images.decode(data).pixels, LARGE)


@pytest.mark.parametrize(
    "data",
    [
        *(media(brand, b"isom") for brand in (b"qt  ", b"mp42", b"3gp4", b"M4A ")),
        b"\0\0\0\x08wide\0\0\x10\0mdat",  # QuickTime before it had brands
        *(b"BM of the week", b"BMW service book", b"P5 is a page", b"%PDF-1.7", b"<svg/>", b"\0\5\x16\7"),
        b"\xef\xbb\xbftext",
    ],
)
def test_what_is_no_picture_is_called_so(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        identify(data + bytes(40))
    assert caught.value.reason is ImageReason.NOT_AN_IMAGE


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (media(b"qt  ", b"qt  "), "is a film or sound,"),
        (b"\0\0\0\x08wide\0\0\x10\0mdat", "is a film or sound,"),
        (b"%PDF-1.7", "is a PDF,"),
        (b"PK\3\4", "is a ZIP archive,"),
        (b"<?xml version", "is XML,"),
        (b"some text that goes on", "starts with b'some text that g',"),
    ],
)
def test_the_message_says_what_a_file_is_that_is_no_picture(data: bytes, told: str) -> None:
    with pytest.raises(ImageError, match=re.escape(f"the file {told}")):
        identify(data)


@pytest.mark.parametrize("data", [b"P5\n3 3\n255\n", b"8BPS\0\1", b"\0\0\1\0\1\0", b"\0\0\0\x0cjP  \r\n"])
def test_other_pictures_are_of_an_unsupported_format(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        identify(data + bytes(40))
    assert caught.value.reason is ImageReason.UNSUPPORTED_FORMAT


@pytest.mark.parametrize("flag", [{254: 1}, {254: 4}, {255: 2}, {254: 5}])
def test_a_thumbnail_before_the_picture_is_not_the_picture(flag: dict[int, int]) -> None:
    data = tiff_of([(SMALL, flag), (LARGE, {})])
    assert (images.probe(data).width, images.probe(data).num_frames) == (32, 1)
    np.testing.assert_array_equal(images.decode(data).pixels, LARGE)
    assert len(decode_frames(data, None, "all").pictures) == 1


def test_pages_behind_the_picture_are_pages() -> None:
    for flag in ({}, {254: 1}):
        data = tiff_of([(LARGE, {}), (SMALL, flag)])
        assert [one.pixels.shape for one in decode_frames(data, None, "all").pictures] == [
            LARGE.shape,
            SMALL.shape,
        ]
        assert images.decode(data).notes == ("first of 2 frames",)
    alone = tiff_of([(SMALL, {254: 1}), (OTHER, {254: 1})])  # somebody's flag is wrong
    np.testing.assert_array_equal(images.decode(alone).pixels, SMALL)


def test_a_deep_picture_behind_a_thumbnail_keeps_its_bits() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (12, 10, 3), np.uint16)
    wide = deep.astype("<u2").view(np.uint8).reshape(12, 10, 6)
    data = tiff_of([(SMALL, {254: 1}), (wide, {256: 10, 258: 16})])
    np.testing.assert_array_equal(images.decode(data).pixels, deep)


def test_directories_without_an_end_are_left_at_the_limit() -> None:
    data = bytearray(tiff_of([(SMALL, {}), (SMALL, {})]))
    (first,) = struct.unpack_from("<I", data, 4)
    data[-4:] = struct.pack("<I", first)  # the last one points to the first
    assert pages(bytes(data)) == range(2)
    assert pages(tiff_of([(OTHER[:1, :1], {})] * 1200)) == range(MAX_PAGES)
    assert pages(b"II*\0\xff\xff\xff\xff") == range(1)


def photo_with(second: np.ndarray) -> bytes:
    """Return a JPEG with a second picture in the way of phones and stereo cameras."""
    out = io.BytesIO()
    Image.fromarray(LARGE).save(
        out, "MPO", save_all=True, append_images=[Image.fromarray(second)], quality=100, subsampling=0
    )
    return out.getvalue()


@pytest.mark.parametrize("second", [noise(3, 12, 16)[..., 0], noise(4, 24, 32), noise(5, 3, 4)])
@pytest.mark.parametrize("choice", ["first", "all", "fail"])
def test_a_gain_map_is_no_second_frame(second: np.ndarray, choice: str) -> None:
    frames = decode_frames(photo_with(second), None, choice)  # pyright: ignore[reportArgumentType]
    assert (len(frames.pictures), frames.durations_ms) == (1, ())
    assert frames.pictures[0].notes == (
        "further pictures in the file left out (gain map, preview or second view): 1",
    )
    assert np.abs(frames.pictures[0].pixels.astype(int) - LARGE).mean() < 3
    assert images.probe(photo_with(second)).num_frames == 1


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}])
def test_data_behind_a_jpeg_is_left_out_with_a_note(options: dict[str, Any]) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0" + encoded(3, format="JPEG")  # as a thumbnail is
    photo = encoded(1, 24, 32, "JPEG", exif=exif, comment=b"\xff\xd9", **options)
    for behind in (encoded(2, format="JPEG"), media(b"mp42") + bytes(50), b"\0\0SEFT"):
        for padding in (b"", bytes(16)):
            picture = images.decode(photo + padding + behind)
            size = len(padding + behind)
            note = f"data behind the picture left out (a video or a further picture): {size} bytes"
            assert picture.notes == (note,)
            np.testing.assert_array_equal(picture.pixels, images.decode(photo).pixels)
    for padding in (b"", bytes(700), b"\xff" * 9):
        assert images.decode(photo + padding).notes == ()


def test_the_packet_of_a_photo_does_not_promise_its_gain_map_or_video() -> None:
    packet = (
        b'<x:xmpmeta><rdf:RDF><rdf:Description hdrgm:Version="1.0" GCamera:MotionPhoto="1" dc:title="Sea" '
        b"GCamera:MicroVideoOffset='99'><Container:Directory><rdf:Seq><rdf:li>GainMap</rdf:li></rdf:Seq>"
        b"</Container:Directory><Camera:MotionPhoto>1</Camera:MotionPhoto></rdf:Description></rdf:RDF></x:xmpmeta>"
    )
    picture = images.decode(encoded(0, format="JPEG", xmp=packet))
    expected = b'<x:xmpmeta><rdf:RDF><rdf:Description dc:title="Sea"></rdf:Description></rdf:RDF></x:xmpmeta>'
    assert picture.xmp == expected
    grown = Nearest().upscale(replace(picture, xmp=picture.xmp))
    assert images.decode(images.encode(grown, "jpeg")).xmp == expected
