"""Test sets: pure functions of seed, key and photo, and the geometry of the published protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipelines.evaluation.testset import (
    SetProtocol,
    bicubic_test,
    central_square,
    choose,
    folder_test,
    imagenet_test,
    make_pair,
    write_pairs,
)
from pipelines.shards.sources import Item, list_inputs
from resshift import degradation, images
from resshift.degradation import DegradationParams
from tests.pictures import encoded

Job = Callable[..., int]


@pytest.mark.parametrize(("height", "width"), [(256, 256), (300, 256), (256, 301), (600, 400), (100, 173)])
def test_central_square_keeps_the_middle(height: int, width: int) -> None:
    """Colours that are linear in position: whatever is resized, the middle of the square has the colour of
    the middle.
    """
    down, across = np.mgrid[:height, :width]
    rgb = (
        np.stack([down * 250 / height, across * 250 / width, np.zeros((height, width))], axis=2)
        .round()
        .astype(np.uint8)
    )
    square = central_square(rgb, 256)
    assert square.shape == (256, 256, 3)
    middle = square[127:129, 127:129].mean((0, 1))
    np.testing.assert_allclose(
        middle[:2], [(height - 1) / 2 * 250 / height, (width - 1) / 2 * 250 / width], atol=2.0
    )
    if (height, width) == (256, 256):
        np.testing.assert_array_equal(square, rgb)
    if min(height, width) == 256:  # nothing is resized: a plain cut
        top, left = (height - 256) // 2, (width - 256) // 2
        np.testing.assert_array_equal(square, rgb[top : top + 256, left : left + 256])


def test_a_pair_is_its_parameters() -> None:
    entry = make_pair(encoded(1, 300, 280), "a/b.png", imagenet_test())
    files = entry["files"]
    gt, lq = (images.decode(files[name]).pixels for name in ("gt", "lq"))
    assert (gt.shape, lq.shape, entry["width"], entry["height"]) == ((256, 256, 3), (64, 64, 3), 256, 256)
    np.testing.assert_array_equal(
        degradation.degrade(gt, DegradationParams.from_json(json.dumps(entry["params"]))), lq
    )
    for name, png in files.items():
        assert entry[f"sha256_{name}"] == hashlib.sha256(png).hexdigest()


def test_bicubic_is_matlabs() -> None:
    data = encoded(1, 256, 256)
    entry = make_pair(data, "a.png", bicubic_test())
    np.testing.assert_array_equal(images.decode(entry["files"]["gt"]).pixels, images.decode(data).pixels)
    expected = degradation.imresize(images.decode(data).pixels.astype(np.float64), 0.25)
    difference = images.decode(entry["files"]["lq"]).pixels - expected.clip(0, 255)
    assert np.abs(difference).max() <= 0.501


def test_whole_pictures_are_cut_to_the_scale() -> None:
    entry = make_pair(encoded(1, 43, 50), "a.png", folder_test("realesrgan-x4"))
    gt = images.decode(entry["files"]["gt"]).pixels
    assert gt.shape == (40, 48, 3)
    np.testing.assert_array_equal(gt, images.decode(encoded(1, 43, 50)).pixels[:40, :48])
    small = make_pair(encoded(1, 3, 50), "a.png", folder_test("realesrgan-x4"))
    assert (small["status"], small["reason"]) == ("skipped", "too_small")


def test_holes_have_a_mask() -> None:
    entry = make_pair(encoded(1, 64, 64), "a.png", folder_test("inpainting"))
    mask, lq = (images.decode(entry["files"][name]).pixels for name in ("mask", "lq"))
    assert set(np.unique(mask)) == {0, 255}
    assert not lq[mask[..., 0] == 255].any()


def test_degradation_depends_on_seed_and_key_alone() -> None:
    data = encoded(1, 64, 64)
    protocol = replace(folder_test("realesrgan-x4"))

    def made(key: str, seed: int) -> str:
        return make_pair(data, key, replace(protocol, seed=seed))["sha256_lq"]

    assert made("a", 0) == made("a", 0)
    assert len({made("a", 0), made("b", 0), made("a", 1)}) == 3


def test_order_is_not_moved_by_other_files() -> None:
    items = [Item(f"{i}.jpg", "", "", 0) for i in range(50)]
    tar = Item("x.tar", "", "", 0, outcome=("skipped", "archive", ""))
    order = choose(items, 0)
    assert order != items
    assert choose([tar, *items[::-1]], 0) == order
    assert choose(items[:40], 0) == [item for item in order if int(item.key[:-4]) < 40]
    assert choose(items, 1) != order


def test_bad_pictures_have_an_entry(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name, data in {"good.png": encoded(1, 64, 64), "cut.png": encoded()[:90]}.items():
        (tmp_path / "in" / name).write_bytes(data)
    items = [one for one in list_inputs(str(tmp_path / "in")) if isinstance(one, Item)]
    absent = Item("gone.png", str(tmp_path / "in/gone.png"), "", 0)
    entries = write_pairs([*items, absent], str(tmp_path / "out"), folder_test("bicubic-x4"))
    assert [(e["key"], e["status"], e["reason"]) for e in entries] == [
        ("cut.png", "failed", "truncated"),
        ("good.png", "ok", ""),
        ("gone.png", "failed", "missing"),
    ]
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["good.png", "good.png"]


def test_impossible_protocols_are_said() -> None:
    with pytest.raises(ValueError, match="num must be at least 1"):
        imagenet_test(num=0)
    with pytest.raises(ValueError, match="side_px must be a positive multiple of the scale 4, got 30"):
        SetProtocol(name="x", recipe=degradation.bicubic_x4(), side_px=30)


def test_unknown_recipe_is_said() -> None:
    with pytest.raises(ValueError, match="unknown recipe 'realesrgan'; allowed: imagenet-test-x4"):
        folder_test("realesrgan")


def tree_hashes(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.ray
@pytest.mark.timeout(600)  # Ray workers take minutes to start on a busy machine
@pytest.mark.usefixtures("ray_cluster")
def test_a_test_set_comes_out_the_same_again(
    tmp_path: Path, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(40):
        (photos / f"{i:02d}.png").write_bytes(encoded(i, 40 + i, 60))
    (photos / "07.jpg").write_bytes(
        cv2.imencode(".jpg", np.zeros((50, 50, 3), np.uint8))[1].tobytes()
    )  # 07.png has that name
    (photos / "99.png").write_bytes(b"")
    arguments = ("--protocol", "folder", "--recipe", "realesrgan-x4")
    for out in ("a", "b", "a"):
        assert job("testset", str(photos), str(tmp_path / out), *arguments) == 3
    assert "ok 40, skipped 1, failed 1" in capsys.readouterr().out
    hashes = tree_hashes(tmp_path / "a")
    assert hashes == tree_hashes(tmp_path / "b")
    assert len(hashes) == 2 * 40 + 1
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    for entry in manifest["pictures"]:
        if entry["status"] == "ok":
            assert {hashes[f"{folder}/{entry['name']}"] for folder in ("gt", "lq")} == {
                entry["sha256_gt"],
                entry["sha256_lq"],
            }

    assert job("testset", str(photos), str(tmp_path / "a"), *arguments, "--seed", "1") == 2
    assert "holds another test set; seed: 0 -> 1" in capsys.readouterr().err
    # Five good ones: a bad picture among the first is replaced by the next.
    assert job("testset", str(photos), str(tmp_path / "few"), *arguments, "--num", "5") in (0, 3)
    few = json.loads((tmp_path / "few" / "manifest.json").read_text())["pictures"]
    assert sum(entry["status"] == "ok" for entry in few) == 5
    assert [entry["key"] for entry in few] == [entry["key"] for entry in manifest["pictures"]][: len(few)]
