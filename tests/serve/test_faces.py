"""Faces over HTTP, with a detector's file and a model that makes every face grey."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resshift.config import OptionError, Sampling
from resshift.images.animation import Frames
from serve.encode import PNG, Encoded, Encoding, encode_result
from tests.faces import check_grey_faces, grey_model, photo_with, write_detector
from tests.pictures import decoded, file_of

CELLS = [(40, 56), (120, 0), (48, 160)]  # the second at the left border
PHOTO, NO_FACE = photo_with(CELLS, 176, 233), photo_with([], 40, 50)


@pytest.fixture(scope="module")
def restoring(start_endpoint: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("faces")
    made = start_endpoint(
        faces=write_detector(folder / "cells.onnx"),
        jobs={"sources": [str(folder)], "targets": [f"{folder}-out"]},
    )
    made.folder, grey = folder, grey_model()

    async def upscale(
        frames: Frames, sampling: Sampling = Sampling(), encoding: Encoding = PNG, has_steps: bool = False
    ) -> Encoded:
        return encode_result(grey.upscale(frames.pictures[0], sampling), encoding)

    made.model.facts = replace(made.model.facts, scale=1, has_one_scale=False, steps=4, takes_faces=True)
    made.model.upscale = upscale
    with made.client:
        yield made


def test_several_faces_are_restored_and_counted(restoring: Any) -> None:
    answer = restoring.post(file_of(PHOTO), "/v1/upscale?faces=true")
    assert answer.status_code == 200, answer.text
    check_grey_faces(decoded(answer.content), PHOTO, CELLS)
    assert answer.headers["X-Notes"] == "3 faces restored"
    assert restoring.client.get("/v1/models").json()["models"][0]["faces"] is True


def test_without_a_face_the_picture_is_as_it_was_and_a_note_says_so(restoring: Any) -> None:
    answer = restoring.client.post("/v1/upscale", files={"image": file_of(NO_FACE)}, data={"faces": "true"})
    assert np.array_equal(decoded(answer.content), NO_FACE)
    assert answer.headers["X-Notes"] == "no face was found"


def test_a_picture_that_is_answered_later_has_its_faces_restored(restoring: Any) -> None:
    told = restoring.post(file_of(PHOTO), "/v1/upscale?faces=1", headers={"Prefer": "respond-async"})
    job = told.json()
    deadline = time.monotonic() + 60
    while restoring.client.get(f"/v1/jobs/{job['id']}").json()["state"] in ("queued", "running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    answer = restoring.client.get(f"/v1/jobs/{job['id']}/result")
    check_grey_faces(decoded(answer.content), PHOTO, CELLS)


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("outscale=2", "outscale must be 1 where faces are restored, got 2"),
        ("trajectory=true", "trajectory must be false with faces"),
    ],
)
def test_options_that_do_not_go_with_faces_are_refused(query: str, told: str, restoring: Any) -> None:
    answer = restoring.post(file_of(PHOTO), f"/v1/upscale?faces=true&{query}")
    assert (answer.status_code, answer.json()["detail"]) == (422, told)


def test_who_has_no_detector_and_which_model_restores_no_faces_is_told(
    endpoint: Any, restoring: Any, start_endpoint: Callable[..., Any], tmp_path: Path
) -> None:
    answer = endpoint.post(file_of(NO_FACE), "/v1/upscale?faces=true")
    assert answer.json()["detail"] == "faces must be false: this endpoint has no face detector"
    body = {"source": str(restoring.folder), "target": f"{restoring.folder}-out", "faces": True}
    answer = restoring.client.post("/v1/jobs", json=body)
    told = "faces must not be given for nearest-x4: a model of faces has scale 1 and fills no holes"
    assert (answer.status_code, answer.json()["detail"]) == (422, told)
    with pytest.raises(OptionError, match="faces must be the file of a face detector"):
        start_endpoint(faces=str(tmp_path / "missing.onnx"))
