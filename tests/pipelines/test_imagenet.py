"""Shards: every input has a row, a re-run does only what is missing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.imagenet import ShardOptions, plan_shards, row_of, write_shard
from pipelines.shards import read_manifest, write_manifest
from resshift import storage

Encode = Callable[..., bytes]
OPTIONS = ShardOptions(row_group_rows=4)


def test_plan_does_not_depend_on_the_order_of_the_listing(tree: Path) -> None:
    entries = list(storage.list_entries(str(tree)))
    assert plan_shards(entries, OPTIONS) == plan_shards(entries[::-1], OPTIONS)


def test_shards_are_cut_by_bytes(tree: Path) -> None:
    entries = list(storage.list_entries(str(tree)))
    largest = max(entry.size_bytes for entry in entries)
    tasks = plan_shards(entries, replace(OPTIONS, shard_bytes=3 * largest))
    assert [task.name for task in tasks] == [f"shard-{i:05d}.parquet" for i in range(len(tasks))]
    assert sorted(key for task in tasks for key in task.keys) == sorted(entry.key for entry in entries)
    assert 3 <= len(tasks) <= 5
    assert len(plan_shards(entries, replace(OPTIONS, shard_bytes=1))) == len(entries)


def test_good_picture_keeps_its_bytes(tree: Path) -> None:
    row = row_of("class0/0.png", str(tree / "class0/0.png"), OPTIONS)
    assert row["bytes"] == (tree / "class0/0.png").read_bytes()
    assert (row["status"], row["label"], row["width"], row["height"], row["mode"]) == ("ok", "class0", 48, 40, "RGB")


@pytest.mark.parametrize(
    ("data", "reason"), [(None, "missing"), (b"", "empty"), (b"hello", "not_an_image"), ("cut", "truncated"), ("small", "too_small")]
)
def test_bad_inputs_become_rows_with_a_reason(data: bytes | str | None, reason: str, tmp_path: Path, encode: Encode) -> None:
    content = {"cut": encode()[:200], "small": encode(0, 8, 90)}.get(str(data), data)
    if isinstance(content, bytes):
        (tmp_path / "x.png").write_bytes(content)
    row = row_of("x.png", str(tmp_path / "x.png"), OPTIONS)
    assert (row["status"], row["reason"], row["bytes"]) == ("failed", reason, None)
    assert row["message"]


def test_shard_is_written_once_and_again_when_an_input_changes(tree: Path, tmp_path: Path, encode: Encode) -> None:
    root = str(tmp_path / "shards")

    def build() -> list[bool]:
        tasks = plan_shards(list(storage.list_entries(str(tree))), OPTIONS)
        return [write_shard(task, root, OPTIONS).reused for task in tasks]

    assert build() == [False]
    assert build() == [True]
    (tree / "class0/0.png").write_bytes(encode(50, 64, 64))
    assert build() == [False]
    shard = tmp_path / "shards" / "shard-00000.parquet"
    data = bytearray(shard.read_bytes())
    data[-200:-8] = bytes(192)  # the footer, between intact markers
    for damaged in (b"not parquet", bytes(data)):
        shard.write_bytes(damaged)
        assert build() == [False]


def test_a_foreign_parquet_file_of_the_same_name_is_replaced(tree: Path, tmp_path: Path) -> None:
    (task,) = plan_shards(list(storage.list_entries(str(tree))), OPTIONS)
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.table({"x": [1]}), tmp_path / "shards" / task.name)
    assert not write_shard(task, str(tmp_path / "shards"), OPTIONS).reused
    assert pq.read_table(tmp_path / "shards" / task.name).num_rows == 11


def test_manifest_counts_what_the_files_hold(tree: Path, tmp_path: Path) -> None:
    root = str(tmp_path / "shards")
    (task,) = plan_shards(list(storage.list_entries(str(tree))), OPTIONS)
    summary = write_shard(task, root, OPTIONS)
    write_manifest(root, str(tree), [summary])
    assert read_manifest(root) == [summary]
    assert (summary.num_rows, summary.num_ok, summary.reasons) == (11, 10, {"truncated": 1})
    file = pq.ParquetFile(tmp_path / "shards" / task.name)
    for i, (num_rows, num_ok) in enumerate(summary.row_groups):
        status = file.read_row_group(i, columns=["status"])["status"].to_pylist()
        assert (len(status), status.count("ok")) == (num_rows, num_ok)


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"format": 99, "shards": []}))
    with pytest.raises(ValueError, match="format 99; this version reads 1"):
        read_manifest(str(tmp_path))
