"""Masks over HTTP, with a model that fills every hole with one grey."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from resshift.config import Sampling
from resshift.images import Picture
from resshift.images.animation import Frames
from serve.encode import PNG, Encoded, Encoding, encode_result
from tests.holes import box
from tests.pictures import decoded, encoded, file_of, noise

PIXELS, HOLE = noise(0, 20, 24), box(20, 24)
MASK = file_of(np.uint8(255) * HOLE)
FILLED = np.where(HOLE[..., None], np.uint8(77), PIXELS)


async def fill(
    frames: Frames, sampling: Sampling = Sampling(), encoding: Encoding = PNG, has_steps: bool = False
) -> Encoded:
    def filled(picture: Picture) -> Picture:
        assert picture.mask is not None
        pixels = np.where(picture.mask[..., None], np.uint8(77), picture.pixels)
        return replace(picture, pixels=pixels, mask=None)

    return encode_result(filled(frames.pictures[0]), encoding)


@pytest.fixture(scope="module")
def filling(start_endpoint: Callable[..., Any]) -> Iterator[Any]:
    made = start_endpoint()
    made.model.facts = replace(made.model.facts, scale=1, has_one_scale=False, fills_holes=True)
    made.model.upscale = fill
    with made.client:
        yield made


def test_the_field_mask_has_the_hole(filling: Any) -> None:
    answer = filling.client.post("/v1/upscale", files={"image": file_of(PIXELS), "mask": MASK})
    assert answer.status_code == 200, answer.text
    assert np.array_equal(decoded(answer.content), FILLED)
    assert filling.client.get("/v1/models").json()["models"][0]["mask"] is True


def test_a_transparent_picture_needs_no_mask(filling: Any) -> None:
    erased = np.dstack([PIXELS, np.uint8(255) * ~HOLE])
    assert np.array_equal(decoded(filling.post(file_of(erased)).content), FILLED)


def test_a_picture_that_is_answered_later_keeps_its_mask(filling: Any) -> None:
    files = {"image": file_of(PIXELS), "mask": MASK}
    job = filling.client.post("/v1/upscale", files=files, headers={"Prefer": "respond-async"}).json()
    deadline = time.monotonic() + 60
    while filling.client.get(f"/v1/jobs/{job['id']}").json()["state"] in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    answer = filling.client.get(f"/v1/jobs/{job['id']}/result")
    assert answer.status_code == 200, answer.text
    assert np.array_equal(decoded(answer.content), FILLED)


@pytest.mark.parametrize(
    ("mask", "reason", "told"),
    [
        (None, "no_mask", "the picture needs a mask, or transparent pixels"),
        (b"<html>", "bad_mask", "the mask: "),
        (file_of(np.zeros((24, 20), np.uint8)), "bad_mask", "the mask is 20x24, and must be 24x20"),
        (file_of(np.zeros((20, 24), np.uint8)), "bad_mask", "the hole of the mask is empty"),
    ],
)
def test_a_mask_that_cannot_be_used_is_a_problem(
    mask: bytes | None, reason: str, told: str, filling: Any
) -> None:
    files = {"image": file_of(PIXELS)} | ({} if mask is None else {"mask": mask})
    answer = filling.client.post("/v1/upscale", files=files)
    assert answer.status_code == 422
    body = answer.json()
    assert (body["type"], body["reason"]) == ("/problems/bad_mask", reason)
    assert told in body["detail"]


def test_a_model_that_fills_no_holes_takes_no_mask(endpoint: Any) -> None:
    answer = endpoint.client.post("/v1/upscale", files={"image": encoded(0, 20, 24), "mask": MASK})
    assert answer.status_code == 422
    assert answer.json()["detail"] == "mask must not be given for nearest-x4, which fills no holes"


def test_two_pictures_are_refused(endpoint: Any) -> None:
    answer = endpoint.client.post("/v1/upscale", files={"image": MASK, "file": MASK})
    assert answer.status_code == 400
    assert "two pictures" in answer.json()["detail"]
