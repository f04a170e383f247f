"""Evaluation: matching, sets, and a stage whose records do not depend on who computes them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.evaluation.evaluate import (
    EvaluateOptions,
    EvaluateStage,
    Pair,
    PictureSet,
    bicubic_resized,
    pair_up,
    pairs_of,
)
from resshift import images
from tests.pictures import encoded


def write(folder: Path, *names: str) -> str:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return str(folder)


def test_pictures_are_matched_without_their_extension(tmp_path: Path) -> None:
    lq, gt = (
        write(tmp_path / "lq", "a.jpg", "x/b.png"),
        write(tmp_path / "gt", "a.png", "x/b.png", "unused.png"),
    )
    assert [(pair.key, Path(pair.gt_uri or "").name) for pair in pair_up(lq, gt)] == [
        ("a", "a.png"),
        ("x/b", "b.png"),
    ]
    assert [pair.gt_uri for pair in pair_up(lq, None)] == [None, None]


def test_what_cannot_be_matched_is_named(tmp_path: Path) -> None:
    lq = write(tmp_path / "lq", "a.jpg", "b.png")
    with pytest.raises(ValueError, match=r"1 pictures .*: b"):
        pair_up(lq, write(tmp_path / "gt", "a.png"))
    write(tmp_path / "lq", "a.png")
    with pytest.raises(ValueError, match="same name without extension"):
        pair_up(lq, None)


def test_what_is_no_picture_is_left_out_with_a_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stray = (".DS_Store", "._a.png", "notes.txt", "Thumbs.db")
    lq = write(tmp_path / "lq", "a.png", *stray)
    gt = write(tmp_path / "gt", "a.png", "desktop.ini")
    (tmp_path / "lq" / "b").write_bytes(encoded())
    (tmp_path / "gt" / "b.dat").write_bytes(encoded())
    with caplog.at_level("INFO"):
        assert [pair.key for pair in pair_up(lq, gt)] == ["a", "b"]
    told = [record.getMessage().rpartition(": ")[2] for record in caplog.records]
    assert told == [*sorted(stray), "desktop.ini"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("set5/lq:set5/gt", PictureSet("lq", "set5/lq", "set5/gt")),
        ("set5=lq/:gt", PictureSet("set5", "lq/", "gt")),
        ("photos/", PictureSet("photos", "photos/", None)),
        ("s3://b/lq:s3://b/gt", PictureSet("lq", "s3://b/lq", "s3://b/gt")),
        ("real=s3://b/a=b/lq", PictureSet("real", "s3://b/a=b/lq", None)),
        ("s3://b/a=b", PictureSet("a=b", "s3://b/a=b", None)),
    ],
)
def test_test_sets_are_read(text: str, expected: PictureSet) -> None:
    assert PictureSet.parse(text) == expected


@pytest.mark.parametrize("text", ["a:b:c", ":gt", ""])
def test_what_is_no_test_set_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\[NAME=\]LQ_DIR\[:GT_DIR\]"):
        PictureSet.parse(text)


def test_sets_of_one_name_are_refused(tmp_path: Path) -> None:
    lq = write(tmp_path / "lq", "a.jpg")
    assert [
        (pair.set, pair.key) for pair in pairs_of([PictureSet("x", lq, None), PictureSet("y", lq, None)])
    ] == [("x", "a"), ("y", "a")]
    with pytest.raises(ValueError, match="two test sets are called 'x'"):
        pairs_of([PictureSet("x", lq, None), PictureSet("x", lq, None)])


def test_bicubic_of_a_flat_picture_is_flat() -> None:
    for scale, size in ((4, (28, 20)), (0.25, (2, 2))):
        out = bicubic_resized(np.full((7, 5, 3), 200, np.uint8), scale)
        assert out.shape == (*size, 3)
        assert np.all(out == 200)


def test_a_truth_of_another_size_is_a_row_that_says_so(tmp_path: Path) -> None:
    pictures = {"lq": (10, 12), "right": (40, 48), "wrong": (40, 44)}
    for name, size in pictures.items():
        (tmp_path / f"{name}.png").write_bytes(
            images.encode(images.Picture(pixels=np.zeros((*size, 3), np.uint8)))
        )
    stage = EvaluateStage(EvaluateOptions(model="tiny-x4"))
    records: list[dict[str, Any]] = []
    for name in ("right", "wrong"):
        pair = Pair(set="s", key=name, lq_uri=str(tmp_path / "lq.png"), gt_uri=str(tmp_path / f"{name}.png"))
        records.append(json.loads(stage({"pair": json.dumps(asdict(pair))})["record"]))
    assert records[0]["status"] == "ok"
    assert (records[1]["status"], records[1]["reason"]) == ("failed", "size_mismatch")
    assert records[1]["message"] == "the truth is 44x40, and 12x10 times 4 is 48x40"
