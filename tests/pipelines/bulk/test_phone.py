"""A folder as a phone leaves it: every photo is made, and nothing counts as a failure."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.bulk.estimate import describe, estimate
from pipelines.bulk.nearest import Nearest
from pipelines.bulk.request import BulkRequest
from pipelines.bulk.stages import prepare, store
from pipelines.ledger.ledger import Row
from resshift import images
from resshift.images.profiles import PRIMARIES, colorants, matrix_profile
from tests.pictures import encoded, noise, tiff_of

_HEIC = Path(__file__).parents[2] / "resshift" / "images" / "heic"
_P3 = matrix_profile(colorants(PRIMARIES[12]), None, "Display P3")
_MOVIE = b"\0\0\0\x14ftypqt  \0\0\0\0qt  " + bytes(4000)


def _with_gain_map() -> bytes:
    out = io.BytesIO()
    gain_map = Image.fromarray(noise(1, 12, 16)[..., 0])
    Image.fromarray(noise(0, 24, 32)).save(out, "MPO", save_all=True, append_images=[gain_map])
    return out.getvalue()


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Phone"
    return encoded(5, 24, 32, "JPEG", exif=exif.tobytes())


PHOTOS = {
    "DCIM/100APPLE/IMG_0001.HEIC": (_HEIC / "photo.heic").read_bytes(),  # Live Photo
    "DCIM/100APPLE/IMG_0002.HEIC": (_HEIC / "turned.heic").read_bytes(),  # edited: sidecar and result
    "DCIM/100APPLE/IMG_E0002.JPG": _turned(),
    "DCIM/100APPLE/IMG_0003.JPG": encoded(3, 24, 32, "JPEG"),  # with its raw
    "DCIM/100APPLE/IMG_0004.PNG": encoded(4, 64, 30),  # screenshot
    "DCIM/100APPLE/IMG_0005.JPG": _with_gain_map(),
    "DCIM/100APPLE/IMG_0006.JPG": encoded(6, 16, 400, "JPEG"),  # panorama
    "DCIM/100APPLE/IMG_0007.JPG": encoded(7, 24, 32, "JPEG", icc_profile=_P3),
    "DCIM/100APPLE/IMG_0008.HEIC": (_HEIC / "ten.heic").read_bytes(),
    "DCIM/Camera/PXL_1.MP.jpg": encoded(8, 24, 32, "JPEG") + _MOVIE,  # motion photo
    "WhatsApp/IMG-20260801-WA0001.webp": encoded(9, 24, 32, "WEBP"),
}
OTHERS = {
    "DCIM/100APPLE/IMG_0001.MOV": _MOVIE,
    "DCIM/100APPLE/IMG_0002.AAE": b'<?xml version="1.0" encoding="UTF-8"?><plist/>',
    "DCIM/100APPLE/IMG_0003.DNG": tiff_of([(noise(0, 8, 12), {254: 1, 330: 0, 50706: 0x0401})]),
    "DCIM/100APPLE/IMG_0009.MOV": _MOVIE,
    "DCIM/100APPLE/._IMG_0003.JPG": b"\0\5\x16\7" + bytes(80),
    "DCIM/Camera/VID_1.mp4": _MOVIE.replace(b"qt  ", b"mp42"),
    "Takeout/PXL_1.MP.jpg.json": b"{}",
    "WhatsApp/.nomedia": b"",
    "WhatsApp/PTT-20260801-WA0001.opus": b"OggS" + bytes(40),
    ".DS_Store": b"\0\0\0\1Bud1",
    "Thumbs.db": b"\xd0\xcf\x11\xe0" + bytes(40),
    "notes.txt": b"BMW: service in May",
}


@pytest.fixture
def request_(tmp_path: Path) -> BulkRequest:
    for name, data in {**PHOTOS, **OTHERS}.items():
        (tmp_path / "phone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "phone" / name).write_bytes(data)
    return BulkRequest(source=str(tmp_path / "phone"), target=str(tmp_path / "out"), model="nearest-x4")


def test_every_photo_of_a_phone_is_made_and_nothing_fails(request_: BulkRequest) -> None:
    job = request_.job()
    worklist = request_.inputs().worklist(job.stages, request_.entries())
    rows: dict[str, Row] = {}
    for items, refused in list(worklist.batches()):
        rows |= {row["key"]: row for row in refused}
        started, frames = prepare(items, job.stages)
        assert [row["key"] for row in started if row["status"] != "ok"] == []
        results = [one.map(Nearest().upscale) for one in frames]
        for row in store(started, results, job.stages):
            rows[row["key"]] = row
            assert worklist.settle(row) == ([], [])
    assert {key for key, row in rows.items() if row["status"] == "ok"} == set(PHOTOS)
    assert {key: row["status"] for key, row in rows.items() if key in OTHERS} == dict.fromkeys(
        OTHERS, "skipped"
    )
    raw = rows["DCIM/100APPLE/IMG_0003.DNG"]
    assert raw["message"].endswith("DCIM/100APPLE/IMG_0003.JPG beside it")
    for row in rows.values():
        if row["status"] == "ok":
            made = images.decode((Path(request_.target) / row["output"]).read_bytes())
            assert (made.width, made.height) == (4 * (row["width_in"] or 0), 4 * (row["height_in"] or 0))
    wide = images.decode((Path(request_.target) / rows["DCIM/100APPLE/IMG_0007.JPG"]["output"]).read_bytes())
    assert wide.icc == _P3
    deep = images.decode((Path(request_.target) / rows["DCIM/100APPLE/IMG_0008.HEIC"]["output"]).read_bytes())
    assert deep.pixels.dtype == np.uint16


def test_the_plan_of_a_phone_says_so(request_: BulkRequest) -> None:
    job = request_.job()
    worklist = request_.inputs().worklist(job.stages, request_.entries())
    found = estimate(worklist, job.stages)
    assert (found.pending, found.num_refused, found.unreadable) == (len(PHOTOS), len(OTHERS), [])
    told = "\n".join(describe(found, worklist, (None, "not measured"), replicas=1))
    assert "DCIM/100APPLE/IMG_0001.MOV: not_an_image" in told
