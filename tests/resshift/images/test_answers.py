"""Answers of a decoder process: what is sent arrives, and what is no answer is found out before memory is
taken for it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any

import numpy as np
import pytest

from resshift.images import ImageError, ImageHeader, ImageReason, Picture
from resshift.images.animation import Frames
from resshift.images.answers import LENGTH, Answer, BadAnswer, pack, receive

PICTURE = Picture(
    pixels=np.arange(24, dtype=np.uint16).reshape(2, 4, 3),
    alpha=np.arange(8, dtype=np.uint16).reshape(2, 4),
    icc=b"profile",
    exif=b"Exif\0\0",
    resolution=(300.0, 299.5),
    text=(("Title", "grün\udcff"), ("", "")),
    format="PNG",
    notes=("orientation 6 applied",),
)


def received(data: bytes, max_bytes: int = 1000, max_pixels: int = 100) -> Answer:
    at = 0

    def fill(view: memoryview) -> None:
        nonlocal at
        if at + len(view) > len(data):
            raise ConnectionError
        view[:] = data[at : at + len(view)]
        at += len(view)

    answer = receive(fill, max_bytes, max_pixels)
    assert at == len(data)
    return answer


def test_pictures_arrive_as_they_were() -> None:
    grey = Picture(pixels=np.full((3, 1, 1), 7, np.uint8))
    sent = Frames((PICTURE, grey), (40, 0), 3)
    got = received(b"".join(pack(sent)))
    assert isinstance(got, Frames)
    assert (got.durations_ms, got.loop, len(got.pictures)) == ((40, 0), 3, 2)
    for one, other in zip(got.pictures, sent.pictures, strict=True):
        for field in fields(Picture):
            np.testing.assert_equal(getattr(one, field.name), getattr(other, field.name))
        assert one.pixels.dtype == other.pixels.dtype
        one.pixels[:] = 0  # theirs to change


def test_headers_and_refusals_arrive_as_they_were() -> None:
    header = ImageHeader(**HEADER)
    assert received(b"".join(pack(header))) == header
    refusal = received(b"".join(pack(ImageError(ImageReason.TRUNCATED, "ends early"))))
    assert isinstance(refusal, ImageError)
    assert (refusal.reason, str(refusal)) == (ImageReason.TRUNCATED, "ends early")


def test_a_description_that_is_too_long_is_a_refusal() -> None:
    refusal = received(b"".join(pack(Frames((replace(PICTURE, notes=("long" * (1 << 20),)),)))))
    assert isinstance(refusal, ImageError)
    assert refusal.reason is ImageReason.TOO_LARGE


class _Taking:
    def __reduce__(self) -> tuple[Any, ...]:
        return eval, ("1/0",)


HEADER = asdict(ImageHeader(format="TIFF", width=3, height=2, mode="I;16", num_frames=4, sample_bits=16))
HEAD: dict[str, Any] = json.loads(bytes(pack(Frames((PICTURE,)))[1]))
DESCRIBED = HEAD["pictures"][0]


@pytest.mark.parametrize(
    "head",
    [
        pickle.dumps(_Taking()),
        b"[" * 100_000,
        b"9" * 100_000,
        {},
        {"reason": "ok", "message": ""},
        {"reason": "corrupt", "message": 1},
        {"header": HEADER | {"width": 0}},
        {"header": {"format": "PNG"}},
        {
            "header": {
                "format": "EXE",
                "width": 1,
                "height": 1,
                "mode": "L",
                "num_frames": 1,
                "sample_bits": 8,
            }
        },
        HEAD | {"pictures": []},
        HEAD | {"durations_ms": ["x"]},
        HEAD | {"loop": 1.5},
        *(
            HEAD | {"pictures": [DESCRIBED | change]}
            for change in (
                {"shape": [1 << 20, 1 << 20, 3]},  # terabytes
                {"shape": [2, 4]},
                {"shape": [2, -4, 3]},
                {"shape": [2, 4, 60]},
                {"shape": [2, 4, True]},
                {"bits": 32},
                {"bits": []},
                {"metadata": {}},
                {"metadata": DESCRIBED["metadata"] | {"xmp": 1 << 30}},
                {"metadata": DESCRIBED["metadata"] | {"xmp": -1}},
                {"text": [[1, 1, 1]]},
                {"resolution": [10**400, 1]},
                {"resolution": [float("nan"), 1]},
                {"format": "../x"},
                {"notes": [{}]},
            )
        ),
    ],
)
def test_what_is_no_answer_is_found_out(head: bytes | Mapping[str, Any]) -> None:
    data = head if isinstance(head, bytes) else json.dumps(head).encode()
    with pytest.raises(BadAnswer):
        received(LENGTH.pack(len(data)) + data + bytes(200))
    with pytest.raises(BadAnswer):
        received(LENGTH.pack(1 << 62))
