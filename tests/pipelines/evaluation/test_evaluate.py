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
from resshift.config import Sampling
from tests.holes import box, write_hole_model
from tests.pictures import encoded, file_of, noise


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
    masks = write(tmp_path / "mask", "a.png", "x/b.jpg")
    assert [Path(pair.mask_uri or "").name for pair in pair_up(lq, gt, masks)] == ["a.png", "b.jpg"]


@pytest.mark.parametrize(
    ("lq", "gt"),
    [
        ("0801x4.png", "0801.png"),
        ("babyx4.png", "baby.png"),
        ("img_001_SRF_4_LR.png", "img_001_SRF_4_HR.png"),
        ("Canon_011_LR4.png", "Canon_011_HR.png"),
        ("x/DSC_1_x1.png", "x/DSC_1_x4.jpg"),
    ],
)
def test_names_of_published_sets_are_matched(lq: str, gt: str, tmp_path: Path) -> None:
    pairs = pair_up(write(tmp_path / "lq", lq, "max.png"), write(tmp_path / "gt", gt, "max.png"))
    assert {Path(pair.lq_uri).name: Path(pair.gt_uri or "").name for pair in pairs} == {
        Path(lq).name: Path(gt).name,
        "max.png": "max.png",
    }


def test_a_scene_of_two_truths_is_not_guessed(tmp_path: Path) -> None:
    truths = write(tmp_path / "gt", "ax2.png", "ax3.png")
    with pytest.raises(ValueError, match=r"1 pictures .*: ax4"):
        pair_up(write(tmp_path / "lq", "ax4.png"), truths)


def test_what_cannot_be_matched_is_named(tmp_path: Path) -> None:
    lq = write(tmp_path / "lq", "a.jpg", "b.png")
    with pytest.raises(ValueError, match=r"1 pictures .*: b"):
        pair_up(lq, write(tmp_path / "gt", "a.png"))
    with pytest.raises(ValueError, match=r"2 pictures .* have no mask in .*: a, b"):
        pair_up(lq, None, write(tmp_path / "mask", "c.png"))
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
        ("lq:gt:s3://b/mask", PictureSet("lq", "lq", "gt", "s3://b/mask")),
        ("s3://b/lq:s3://b/gt", PictureSet("lq", "s3://b/lq", "s3://b/gt")),
        ("real=s3://b/a=b/lq", PictureSet("real", "s3://b/a=b/lq", None)),
        ("s3://b/a=b", PictureSet("a=b", "s3://b/a=b", None)),
    ],
)
def test_test_sets_are_read(text: str, expected: PictureSet) -> None:
    assert PictureSet.parse(text) == expected


@pytest.mark.parametrize("text", ["a:b:c:d", ":gt", ""])
def test_what_is_no_test_set_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"\[NAME=\]LQ_DIR\[:GT_DIR\[:MASK_DIR\]\]"):
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


def test_holes_are_measured_inside(tmp_path: Path) -> None:
    gt, hole = noise(1, 24, 28), box(24, 28)
    lq = np.where(hole[..., None], np.uint8(0), gt)
    for name, pixels in (("gt", gt), ("lq", lq), ("mask", np.uint8(255) * hole)):
        (tmp_path / f"{name}.png").write_bytes(file_of(pixels))
    model = write_hole_model(tmp_path / "model")
    stage = EvaluateStage(EvaluateOptions(model=str(model), sampling=Sampling(steps=1)))
    uri = {name: str(tmp_path / f"{name}.png") for name in ("gt", "lq", "mask")}
    pair = Pair("a", uri["lq"], uri["gt"], "s", uri["mask"])
    made = stage({"pair": json.dumps(asdict(pair))})
    record = json.loads(made["record"])
    assert record["status"] == "ok", record["message"]
    for method in ("ours", "bicubic"):
        result = images.decode(made[method]).pixels
        assert np.array_equal(result[~hole], gt[~hole])
        error = np.mean((result[hole].astype(float) - gt[hole]) ** 2)
        assert record[method]["psnr_hole"] == pytest.approx(10 * np.log10(255**2 / error))
        assert record[method]["psnr_hole"] < record[method]["psnr_rgb"]
    assert (images.decode(made["bicubic"]).pixels[hole] != 0).any()
