"""Shards: every input has a row, a re-run does only what is missing."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.shards.build import ShardOptions, ShardTask, build_shard, plan_shards, row_of
from pipelines.shards.parquet import (
    Shard,
    ShardSummary,
    read_manifest,
    row_groups,
    write_manifest,
)
from pipelines.shards.pictures import read_pictures
from pipelines.shards.sources import Item, list_inputs
from pipelines.shards.status import status_of, summaries_of
from resshift import images
from resshift.storage import StorageError, StorageReason
from tests.pictures import encoded

OPTIONS = ShardOptions(row_group_rows=4)


def items_of(root: Path) -> list[Item]:
    return [one for one in list_inputs(str(root)) if isinstance(one, Item)]


def row(key: str, data: bytes | StorageError, options: ShardOptions = OPTIONS) -> dict[str, Any]:
    return row_of(Item(key, key, "", 0), data, "", options)


def test_plan_does_not_depend_on_the_order_of_the_listing(tree: Path) -> None:
    items = items_of(tree)
    assert plan_shards(items, OPTIONS) == plan_shards(items[::-1], OPTIONS)


def test_shards_are_cut_by_bytes(tree: Path) -> None:
    items = items_of(tree)
    largest = max(item.size_bytes for item in items)
    tasks = plan_shards(items, replace(OPTIONS, shard_bytes=3 * largest))
    assert [task.name for task in tasks] == [f"shard-{i:05d}.parquet" for i in range(len(tasks))]
    assert sorted(item.key for task in tasks for item in task.items) == sorted(item.key for item in items)
    assert 3 <= len(tasks) <= 5
    assert len(plan_shards(items, replace(OPTIONS, shard_bytes=1))) == len(items)


def test_inputs_without_a_picture_move_no_other(tree: Path) -> None:
    items = items_of(tree)
    tar = Item("a.tar", "a.tar", "e", 10**9, outcome=("skipped", "archive", ""))
    (plain,), (with_tar,) = plan_shards(items, OPTIONS), plan_shards([tar, *items], OPTIONS)
    assert with_tar.items == (*plain.items, tar)


def test_a_key_stands_for_one_input(tree: Path) -> None:
    items = items_of(tree)
    (task,) = plan_shards([*items, items[0]], OPTIONS)
    outcomes = [item.outcome for item in task.items if item.key == items[0].key]
    assert outcomes[0] is None
    assert outcomes[1] is not None
    assert outcomes[1][:2] == ("failed", "duplicate_key")


def test_row_groups_end_by_rows_and_by_bytes(tree: Path, tmp_path: Path) -> None:
    (task,) = plan_shards(items_of(tree), OPTIONS)
    by_rows = build_shard(task, str(tmp_path / "rows"), OPTIONS)
    assert np.bincount(by_rows.status["row_group"]).tolist() == [4, 4, 3]
    by_bytes = build_shard(task, str(tmp_path / "bytes"), replace(OPTIONS, row_group_bytes=1))
    assert (
        np.bincount(by_bytes.status["row_group"]).max() <= 2
    )  # a picture each, and the broken one with its neighbour


def test_good_picture_keeps_its_bytes() -> None:
    data = encoded()
    found = row("class0/0.png", data)
    assert found["bytes"] == data
    assert (found["status"], found["width"], found["height"], found["mode"], found["size_bytes"]) == (
        "ok",
        48,
        40,
        "RGB",
        len(data),
    )
    assert found["message"] == ""


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not_an_image"),
        ("cut", "truncated"),
        ("small", "too_small"),
        ("away", "unavailable"),
    ],
)
def test_bad_inputs_become_rows_with_a_reason(data: bytes | str, reason: str) -> None:
    away = StorageError("x.png", StorageReason.UNAVAILABLE, "try again")
    content: Any = {"cut": encoded()[:200], "small": encoded(0, 8, 90), "away": away}.get(str(data), data)
    found = row("x.png", content)
    assert (found["status"], found["reason"], found["bytes"]) == (
        "skipped" if reason == "too_small" else "failed",
        reason,
        None,
    )
    assert found["message"]


def _saved(image: Image.Image, format: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def test_what_imagenet_is_known_for_is_used_and_named() -> None:
    """A PNG with a .JPEG name (n02105855_2933), CMYK (22 in train), damaged EXIF (n04152593_17460), grey."""
    rgb = Image.fromarray(np.full((40, 50, 3), 90, np.uint8))
    damaged = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03"
    cases = {
        "n02105855_2933.JPEG": (_saved(rgb.convert("RGBA"), "PNG"), "RGBA", "PNG in a file named .jpeg"),
        "cmyk.JPEG": (_saved(rgb.convert("CMYK"), "JPEG"), "CMYK", "CMYK converted to RGB"),
        "n04152593_17460.JPEG": (_saved(rgb, "JPEG", exif=damaged), "RGB", "EXIF"),
        "grey.JPEG": (_saved(rgb.convert("L"), "JPEG"), "L", ""),
    }
    for key, (data, mode, note) in cases.items():
        found = row(key, data)
        assert (found["status"], found["mode"], found["bytes"]) == ("ok", mode, data), key
        assert note in found["message"]


def test_larger_pictures_are_shrunk_and_none_is_enlarged() -> None:
    options = replace(OPTIONS, short_side_px=64)
    ramp = np.broadcast_to(np.linspace(0, 255, 300, dtype=np.float32)[None, :, None], (200, 300, 3)).astype(
        np.uint8
    )
    found = row("x.png", cv2.imencode(".png", ramp)[1].tobytes(), options)
    assert (found["status"], found["width"], found["height"], found["message"]) == (
        "ok",
        96,
        64,
        "was 300x200 RGB PNG",
    )
    header, picture = images.probe(found["bytes"]), images.decode(found["bytes"])
    assert (header.format, picture.width, picture.height, found["size_bytes"]) == (
        "JPEG",
        96,
        64,
        len(found["bytes"]),
    )
    expected = cv2.resize(ramp, (96, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(picture.pixels.astype(int) - expected).max() <= 2  # JPEG of quality 95
    assert Image.open(io.BytesIO(found["bytes"])).layer[1][1:3] == (1, 1)  # type: ignore[attr-defined] # colour is not subsampled
    small = encoded(0, 64, 80)
    assert row("x.png", small, options)["bytes"] == small
    grey = row("x.png", cv2.imencode(".png", ramp[..., 0])[1].tobytes(), options)
    assert (grey["mode"], images.decode(grey["bytes"]).pixels.shape) == ("L", (64, 96, 1))


@pytest.mark.parametrize(("name", "value"), [("min_side_px", 0), ("shard_bytes", 0), ("short_side_px", 16)])
def test_impossible_options_are_said(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least .*got {value}"):
        ShardOptions(**{name: value})


def test_shard_is_written_once_and_again_when_an_input_changes(tree: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "shards")

    def build() -> list[Shard]:
        return [build_shard(task, root, OPTIONS) for task in plan_shards(items_of(tree), OPTIONS)]

    (first,) = build()
    assert not first.reused
    (again,) = build()
    assert again.reused
    assert again.status == first.status
    shard = tmp_path / "shards" / "shard-00000.parquet"
    assert (again.size_bytes, first.size_bytes) == (shard.stat().st_size, shard.stat().st_size)
    (tree / "class0/0.png").write_bytes(encoded(50, 64, 64))
    assert not build()[0].reused
    data = bytearray(shard.read_bytes())
    data[-200:-8] = bytes(192)  # the footer, between intact markers
    for damaged in (b"not parquet", bytes(data), data[-5000:]):
        shard.write_bytes(damaged)
        assert not build()[0].reused


def test_only_what_was_unavailable_is_read_again(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.shards import sources

    (task,) = plan_shards(items_of(tree), OPTIONS)
    read: list[str] = []
    original = sources.read

    def away(item: Item, max_bytes: int) -> bytes:
        read.append(item.key)
        if item.key == "class0/4.png" and len(read) <= 11:
            raise StorageError(item.uri, StorageReason.UNAVAILABLE, "try again")
        return original(item, max_bytes)

    monkeypatch.setattr(sources, "read", away)
    shard = build_shard(task, str(tmp_path / "s"), OPTIONS)
    assert shard.status["reason"].to_pylist().count("unavailable") == 1
    again = build_shard(task, str(tmp_path / "s"), OPTIONS)
    assert read[11:] == ["class0/4.png"]
    assert not again.reused
    whole = build_shard(ShardTask(task.name, task.items, task.fingerprint), str(tmp_path / "t"), OPTIONS)
    assert (tmp_path / "s" / task.name).read_bytes() == (tmp_path / "t" / task.name).read_bytes()
    assert again.status == whole.status
    assert build_shard(task, str(tmp_path / "s"), OPTIONS).reused


def test_a_foreign_parquet_file_of_the_same_name_is_replaced(tree: Path, tmp_path: Path) -> None:
    (task,) = plan_shards(items_of(tree), OPTIONS)
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "shards" / task.name)
    assert not build_shard(task, str(tmp_path / "shards"), OPTIONS).reused
    assert pq.read_table(tmp_path / "shards" / task.name).num_rows == 11


def test_of_equal_pictures_the_first_key_is_used(tree: Path, tmp_path: Path) -> None:
    """In whichever shard they are; their shards do not change, the manifest says which rows not to use."""
    root = str(tmp_path / "s")
    for key in ("class0/2.png", "class1/zz.png", "aaa.png"):
        (tree / key).parent.mkdir(exist_ok=True)
        (tree / key).write_bytes((tree / "class1/3.png").read_bytes())
    options = replace(OPTIONS, shard_bytes=4 * (tree / "class1/3.png").stat().st_size)
    shards = [build_shard(task, root, options) for task in plan_shards(items_of(tree), options)]
    assert len(shards) >= 3
    status = status_of(shards)
    marked = {r["key"]: r["message"] for r in status.to_pylist() if r["reason"] == "duplicate"}
    assert marked == dict.fromkeys(["class0/2.png", "class1/3.png", "class1/zz.png"], "same bytes as aaa.png")
    write_manifest(root, str(tree), summaries_of(shards, status))
    groups = row_groups(read_manifest(root))
    used = [photo.key for group in groups for photo in read_pictures(root, group)]
    assert sorted(used) == sorted(r["key"] for r in status.to_pylist() if r["status"] == "ok")
    assert [len(read_pictures(root, group)) for group in groups] == [group.num_ok for group in groups]


def test_manifest_counts_what_the_files_hold(tree: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "shards")
    (task,) = plan_shards(items_of(tree), OPTIONS)
    shard = build_shard(task, root, OPTIONS)
    summaries = summaries_of([shard], status_of([shard]))
    write_manifest(root, str(tree), summaries)
    assert read_manifest(root) == summaries
    (summary,) = summaries
    assert (summary.num_rows, summary.num_ok, summary.reasons) == (11, 10, {"truncated": 1})
    file = pq.ParquetFile(tmp_path / "shards" / task.name)
    for i, (num_rows, num_ok) in enumerate(summary.row_groups):
        found = file.read_row_group(i, columns=["status"])["status"].to_pylist()
        assert (len(found), found.count("ok")) == (num_rows, num_ok)
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["totals"] == {"rows": 11, "ok": 10}


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 1, "shards": []}))
    with pytest.raises(ValueError, match="format 1; this version reads 2: prepare them again"):
        read_manifest(str(tmp_path))


def test_failed_rows_are_not_in_the_plan() -> None:
    shards = [
        ShardSummary("z", "", ((4, 0), (4, 2)), 0, {}, ((1, 3),)),
        ShardSummary("a", "", ((2, 2),), 0, {}),
    ]
    assert [(g.shard, g.index, g.num_ok, g.duplicates) for g in row_groups(shards)] == [
        ("a", 0, 2, ()),
        ("z", 1, 2, (3,)),
    ]
