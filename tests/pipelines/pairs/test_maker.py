"""Training pairs: functions of seed, epoch and key, in whatever order they are made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.pairs.maker import PairMaker
from pipelines.pairs.order import stream
from pipelines.pairs.parcels import Batch, from_block, to_block
from pipelines.shards.build import ShardOptions
from pipelines.shards.parquet import read_manifest, row_groups, write_shard_file
from pipelines.shards.prepare import finish, prepare_here
from resshift import degradation
from resshift.config import DataConfig
from resshift.degradation.on_device.chain import DeviceDegradation
from resshift.images import ImageError
from resshift.pairs.training_pair import make_pair
from tests.pictures import encoded

CROP = DataConfig(crop="random", crop_px=32)
RECIPE = replace(degradation.realesrgan_x4(), bicubic_share=0.3)


@pytest.fixture
def shards(tree: Path, tmp_path: Path) -> str:
    prepare_here(str(tree), str(tmp_path / "s"), ShardOptions(row_group_rows=3))
    return str(tmp_path / "s")


def rotten(root: str, photos: list[bytes]) -> str:
    """Return shards whose pictures were good when they were written, as the column says, and are what is
    given here.
    """
    rows = [
        {"key": f"k{i}", "sha256": str(i), "bytes": data, "status": "ok", "reason": ""}
        for i, data in enumerate(photos)
    ]
    finish(
        [write_shard_file(root, "shard-00000.parquet", "f", rows, max_rows=4, max_bytes=1 << 20)],
        "nowhere",
        root,
    )
    return root


def pieces_of(root: str, start: int, stop: int, batch_size: int = 4) -> list[Any]:
    return list(stream(row_groups(read_manifest(root)), 1, batch_size, start, stop))


def all_of(maker: PairMaker, pieces: list[Any]) -> Batch:
    (batch,) = maker.batches(pieces, [np.arange(sum(len(piece.rows) for piece in pieces))])
    return batch


def test_rows_do_not_depend_on_how_they_are_cut(shards: str) -> None:
    make = PairMaker(shards, 5, CROP, RECIPE)
    whole = all_of(make, pieces_of(shards, 0, 24))
    assert whole["row"].tolist() == list(range(24))
    for start, stop in ((0, 1), (3, 17), (23, 24)):
        part = all_of(make, pieces_of(shards, start, stop))
        for name, column in part.items():
            np.testing.assert_array_equal(column, whole[name][start:stop])


def test_records_take_the_place_of_low_quality_pictures(tmp_path: Path) -> None:
    """A batch of which the device makes the low-quality pictures is that of the CPUs, also where a picture is
    broken.
    """
    photos = [b"broken" if i in (2, 3) else encoded(i) for i in range(8)]
    root = rotten(str(tmp_path / "bad"), photos)
    expected, found = (
        all_of(PairMaker(root, 5, replace(CROP, degrade_on=where), RECIPE), pieces_of(root, 0, 8))
        for where in ("cpu", "device")
    )
    assert sorted(found) == ["epoch", "hq", "key", "plan", "row", "substituted"]
    for name in sorted(found.keys() - {"plan"}):
        np.testing.assert_array_equal(found[name], expected[name])
    arrived = from_block(to_block(found, 0), 0)
    np.testing.assert_array_equal(arrived["plan"], found["plan"])
    made = DeviceDegradation(RECIPE, CROP.crop_px)(
        *(torch.from_numpy(found[name]) for name in ("hq", "plan"))
    )
    assert np.abs(made.numpy().astype(int) - expected["lq"]).mean() < 0.1


def test_a_broken_picture_moves_no_neighbour(tmp_path: Path) -> None:
    photos = [encoded(i) for i in range(8)]
    good = rotten(str(tmp_path / "good"), photos)
    bad = rotten(str(tmp_path / "bad"), [b"broken" if i in (2, 3) else data for i, data in enumerate(photos)])
    expected, found = (
        all_of(PairMaker(root, 5, CROP, RECIPE), pieces_of(root, 0, 16)) for root in (good, bad)
    )
    is_broken = np.isin(expected["key"], ["k2", "k3"])
    np.testing.assert_array_equal(found["substituted"], is_broken)
    for name in ("key", "row", "epoch"):
        np.testing.assert_array_equal(found[name], expected[name])
    for name in ("hq", "lq"):
        np.testing.assert_array_equal(found[name][~is_broken], expected[name][~is_broken])
    # The next good picture of the row group stands in for both, with the draws of the broken one, whatever
    # the task holds besides.
    for row in np.flatnonzero(is_broken):
        expected = make_pair(photos[0], found["key"][row], int(found["epoch"][row]), 5, CROP, RECIPE)
        np.testing.assert_array_equal(found["hq"][row], expected.hq_u8)
        alone = all_of(PairMaker(bad, 5, CROP, RECIPE), pieces_of(bad, int(row), int(row) + 1))
        np.testing.assert_array_equal(alone["lq"][0], expected.lq_u8)


def test_a_row_group_without_a_good_picture_is_an_error(tmp_path: Path) -> None:
    root = rotten(str(tmp_path / "rotten"), [b"broken"] * 4)
    with pytest.raises(ImageError):
        all_of(PairMaker(root, 5, CROP, RECIPE), pieces_of(root, 0, 1))


def test_batches_are_the_parts_in_their_order(shards: str) -> None:
    make = PairMaker(shards, 5, CROP, RECIPE)
    pieces = pieces_of(shards, 0, 24)
    whole, order = all_of(make, pieces), np.random.default_rng(0).permutation(24)
    parts = [order[:7], order[7:7], order[7:]]
    found = list(make.batches(pieces, parts))
    assert [len(batch["row"]) for batch in found] == [7, 0, 17]
    for name, column in whole.items():
        for batch, part in zip(found, parts, strict=True):
            np.testing.assert_array_equal(batch[name], column[part])
            assert batch[name].shape[1:] == column.shape[1:]
