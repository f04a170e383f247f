"""Training pairs: functions of seed, epoch and key, in the order of the plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray.data

from pipelines.epoch import Window, row_groups, stream
from pipelines.imagenet import ShardOptions, plan_shards, read_manifest, write_manifest, write_shard
from pipelines.pairs import Batch, PairSource, default_rows_per_execution, make_pairs, read_window
from resshift import degradation, storage
from resshift.config import DataConfig
from resshift.images import ImageError
from resshift.presets import test_x4 as toy_preset

Encode = Callable[..., bytes]
CROP = DataConfig(crop="random", crop_px=32)
RECIPE = replace(degradation.realesrgan_x4(), bicubic_share=0.3)


@pytest.fixture
def shards(tree: Path, tmp_path: Path) -> str:
    options = ShardOptions(row_group_rows=3)
    tasks = plan_shards(list(storage.list_entries(str(tree))), options)
    write_manifest(str(tmp_path / "s"), str(tree), [write_shard(task, str(tmp_path / "s"), options) for task in tasks])
    return str(tmp_path / "s")


def batch(data: list[bytes], epoch: int = 0) -> Batch:
    numbers = np.arange(len(data))
    keys = np.array([f"k{i}" for i in numbers], dtype=object)
    return {"bytes": np.array(data, dtype=object), "key": keys, "epoch": np.full(len(data), epoch), "row": numbers}


def test_rows_do_not_depend_on_their_batch(encode: Encode) -> None:
    whole = batch([encode(i) for i in range(4)])
    together = make_pairs(whole, 5, CROP, RECIPE)
    for i in range(4):
        alone = make_pairs({name: column[i : i + 1] for name, column in whole.items()}, 5, CROP, RECIPE)
        for name in ("hq", "lq", "row"):
            np.testing.assert_array_equal(alone[name][0], together[name][i])


def test_a_broken_picture_moves_no_neighbour(encode: Encode) -> None:
    data = [encode(i) for i in range(4)]
    expected = make_pairs(batch(data), 5, CROP, RECIPE)
    found = make_pairs(batch([data[0], b"broken", data[2], data[3]]), 5, CROP, RECIPE)
    assert found["substituted"].tolist() == [0, 1, 0, 0]
    assert found["row"].tolist() == [0, 1, 2, 3]
    for i in (0, 2, 3):
        np.testing.assert_array_equal(found["hq"][i], expected["hq"][i])
    np.testing.assert_array_equal(found["hq"][1], expected["hq"][0])
    with pytest.raises(ImageError):
        make_pairs(batch([b"broken", b""]), 5, CROP, RECIPE)


def test_window_reads_the_rows_that_the_plan_names(shards: str) -> None:
    groups = row_groups(read_manifest(shards))
    stored = {
        (group.shard, group.index): [
            row["key"] for row in pq.ParquetFile(f"{shards}/{group.shard}").read_row_group(group.index).to_pylist() if row["status"] == "ok"
        ]
        for group in groups
    }
    for window in stream(groups, 1, 7, 25, groups_per_window=2):
        table = read_window(shards, window)
        members = [key for group in window.groups for key in stored[group.shard, group.index]]
        assert table["key"].to_pylist() == [members[i] for i in window.order]
        assert table["row"].to_pylist() == list(range(window.first_row, window.first_row + len(window.order)))
        assert set(table["epoch"].to_pylist()) == {window.epoch}


def test_executions_follow_one_another(shards: str) -> None:
    """Relies on a private field of Ray: if it goes, training would repeat its first rows in silence."""
    assert ray.data.DataContext()._execution_idx == 0  # pyright: ignore[reportPrivateUsage]
    source = PairSource(shards, row_groups(read_manifest(shards)), seed=1, start_row=4, rows_per_execution=8)
    numbers: list[int] = []
    for i in range(3):
        context: Any = SimpleNamespace(_execution_idx=i)
        for task in source.get_read_tasks(1, data_context=context):
            for table in task():
                numbers += table["row"].to_pylist()  # type: ignore[union-attr]
    assert numbers == list(range(4, 28))


def test_no_batch_straddles_two_executions() -> None:
    config = toy_preset()
    assert default_rows_per_execution(config) == config.train.batch_size * config.train.steps
    longer = replace(config, train=replace(config.train, steps=10**6, batch_size=96))
    assert default_rows_per_execution(longer) % 96 == 0
    assert 30_000 < default_rows_per_execution(longer) <= 32_768


def test_windows_are_small_enough_to_travel() -> None:
    window = Window(0, (), tuple(range(256)), 0)
    assert len(window.order) * (256 * 256 * 3 + 64 * 64 * 3) < 64 << 20
