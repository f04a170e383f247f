"""Pairs that a teacher was asked about once: what is stored, and what training makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray

from pipelines.pairs.maker import PairMaker
from pipelines.pairs.order import stream
from pipelines.pairs.parcels import Batch
from pipelines.shards import taught
from pipelines.shards.build import ShardOptions
from pipelines.shards.parquet import read_manifest, row_groups
from pipelines.shards.prepare import prepare_here
from resshift.config import ConfigError, DataConfig, ModelConfig, RunConfig, with_settings
from resshift.degradation import DegradationParams, degrade, realesrgan_x4
from resshift.degradation.apply import BICUBIC
from resshift.images import decode
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.pairs.training_pair import make_pair
from resshift.presets import preset
from resshift.training.losses import Objective
from resshift.training.step import DiffusionLearner, build_network
from tests.stops import check_stops

Image = NDArray[np.uint8]


def run_of(*settings: str) -> RunConfig:
    base = replace(preset("test-x4"), degradation=realesrgan_x4())
    return with_settings(base, ["data.crop_px=64", "data.crop=random", *settings])


def nearest(lq_u8: Image) -> Image:
    """A teacher whose every pixel can be told from the input."""
    return lq_u8.repeat(4, 0).repeat(4, 1)


class Found:
    """A model that is named, not loaded."""

    def __init__(self, scale: int = 4, fills_holes: bool = False) -> None:
        self.config = replace(preset("test-x4").model) if scale == 4 else ModelConfig(scale=2, unet=X2_UNET)
        self.fills_holes = fills_holes

    def identity(self) -> str:
        return "nearest"


X2_UNET = replace(preset("realsr-x2-s4").model.unet)


@pytest.fixture
def photos(tree: Path, tmp_path: Path) -> str:
    prepare_here(str(tree), str(tmp_path / "photos"), ShardOptions(row_group_rows=3))
    return str(tmp_path / "photos")


@pytest.fixture
def teach(monkeypatch: pytest.MonkeyPatch, photos: str, tmp_path: Path) -> Callable[..., tuple[str, int]]:
    """Return a function that makes two passes of pairs in this process, and returns their place and how many
    shards were there already.
    """

    def here(function: Callable[[Any], Any], inputs: Sequence[Any], **_: object) -> Iterator[Any]:
        yield from map(function, inputs)

    monkeypatch.setattr(taught, "results", here)
    monkeypatch.setattr(taught, "_teacher", lambda *_: nearest)
    monkeypatch.setattr(taught, "locate_model", lambda _: Found())

    def make(*settings: str, keep_bicubic: bool = False) -> tuple[str, int]:
        root, config = str(tmp_path / "pairs"), run_of(*settings)
        return root, taught.teach(photos, root, config, "nearest", passes=2, keep_bicubic=keep_bicubic)[1]

    return make


def batch_of(root: str, crop: DataConfig, seed: int = 1) -> Batch:
    pieces = list(stream(row_groups(read_manifest(root)), seed, 4, 0, 40))
    (batch,) = PairMaker(root, seed, crop, realesrgan_x4()).batches(pieces, [np.arange(40)])
    return batch


def test_pairs_are_those_of_a_run_with_the_picture_of_the_teacher(
    teach: Callable[..., tuple[str, int]], photos: str
) -> None:
    root, _ = teach()
    config = run_of()
    rows = [
        row for path in sorted(Path(root).glob("shard-*.parquet")) for row in pq.read_table(path).to_pylist()
    ]
    sources = {
        row["key"]: row["bytes"]
        for path in Path(photos).glob("shard-*.parquet")
        for row in pq.read_table(path).to_pylist()
    }
    used = [row for row in rows if row["status"] == "ok"]
    assert len(used) >= 8
    assert {row["key"].rsplit("#", 1)[1] for row in used} == {"0", "1"}
    for row in used:
        key, epoch = row["key"].rsplit("#", 1)
        pair = make_pair(sources[key], key, int(epoch), config.train.seed, config.data, config.degradation)
        hq, lq, made = (decode(row[name]).pixels for name in ("bytes", "lq", "taught"))
        np.testing.assert_array_equal(hq, pair.hq_u8)
        np.testing.assert_array_equal(lq, pair.lq_u8)
        np.testing.assert_array_equal(made, nearest(pair.lq_u8))


def test_bicubic_pairs_may_keep_the_truth(teach: Callable[..., tuple[str, int]]) -> None:
    root, _ = teach("degradation.bicubic_share=0.5", keep_bicubic=True)
    rows = [row for path in Path(root).glob("shard-*.parquet") for row in pq.read_table(path).to_pylist()]
    kept = 0
    for row in (row for row in rows if row["status"] == "ok"):
        hq, lq, made = (decode(row[name]).pixels for name in ("bytes", "lq", "taught"))
        shrunk = degrade(hq, DegradationParams(scale=4, ops=(BICUBIC,)))
        kept += np.array_equal(shrunk, lq)
        np.testing.assert_array_equal(made, hq if np.array_equal(shrunk, lq) else nearest(lq))
    assert 0 < kept < len(rows)
    assert teach("degradation.bicubic_share=0.5")[1] == 0  # other pairs: all are made again


def test_the_share_says_whose_picture_is_the_target(teach: Callable[..., tuple[str, int]]) -> None:
    """Of the same samples, crops and mirrors: the truth with 0, the teacher's with 1, and with 0.5 either."""
    root, _ = teach()
    crop = DataConfig(crop_px=32)
    truth, all_taught, half = (batch_of(root, replace(crop, taught=share)) for share in (0.0, 1.0, 0.5))
    for batch in (all_taught, half):
        assert batch["key"].tolist() == truth["key"].tolist()
        np.testing.assert_array_equal(batch["lq"], truth["lq"])
    # Crops lie on whole pixels of the degraded side, in both pictures alike, mirrored or not.
    np.testing.assert_array_equal(all_taught["hq"], truth["lq"].repeat(4, 1).repeat(4, 2))
    is_taught = [np.array_equal(a, b) for a, b in zip(half["hq"], all_taught["hq"], strict=True)]
    is_truth = [np.array_equal(a, b) for a, b in zip(half["hq"], truth["hq"], strict=True)]
    assert all(a != b for a, b in zip(is_taught, is_truth, strict=True))
    assert 10 <= sum(is_taught) <= 30  # 20 of 40 expected, deviation 3.2
    # The truth shrinks to about what was degraded from it; another crop would not.
    small = truth["hq"].reshape(40, 8, 4, 8, 4, 3).mean((2, 4))
    near = np.abs(small - truth["lq"]).mean((1, 2, 3))
    far = np.abs(small[:, ::-1] - truth["lq"]).mean((1, 2, 3))
    assert np.median(near) < np.median(far)


@pytest.mark.slow
def test_training_on_them_stops_and_continues_bit_for_bit(
    teach: Callable[..., tuple[str, int]], tmp_path: Path
) -> None:
    root, _ = teach()
    run = run_of("data.crop_px=32", "data.taught=0.5", "train.batch_size=4", "train.micro_batch=4")

    def batches(start: int) -> list[dict[str, torch.Tensor]]:
        pieces = list(stream(row_groups(read_manifest(root)), 1, 4, 4 * start, 12))
        parts = list(np.arange(12 - 4 * start).reshape(-1, 4))
        found = PairMaker(root, 1, run.data, run.degradation).batches(pieces, parts)
        return [{name: torch.from_numpy(batch[name]) for name in ("hq", "lq")} for batch in found]

    def learner() -> DiffusionLearner:
        return DiffusionLearner(run, build_network(run), Objective(run.model, run.loss, PixelUnshuffle(4)))

    check_stops(run, learner, batches, (1,), tmp_path / "run")


def test_running_again_makes_what_is_missing(teach: Callable[..., tuple[str, int]]) -> None:
    root, reused = teach()
    assert reused == 0
    (first, *others) = sorted(Path(root).glob("shard-*.parquet"))
    before = first.read_bytes()
    first.unlink()
    assert teach() == (root, len(others))
    assert first.read_bytes() == before
    assert json.loads((Path(root) / "taught.json").read_text()) == {
        "teacher": "nearest",
        "scale": 4,
        "crop_px": 64,
    }
    with pytest.raises(ConfigError, match="holds pairs of another teacher or size"):
        teach("data.crop_px=32")


def test_runs_and_teachers_that_do_not_fit_are_told_in_one_line(
    teach: Callable[..., tuple[str, int]], photos: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = teach()
    taught.check_pairs(root, run_of("data.taught=0.5", "data.crop_px=32"))
    taught.check_pairs(photos, run_of())
    for where, run, message in (
        (photos, run_of("data.taught=0.5"), r"data.taught=0.5 needs shards .* jobs/teach.py makes of"),
        (root, run_of("data.crop_px=96"), "holds pairs of scale 4 and 64 pixels, got .* data.crop_px=96"),
        (root, run_of("data.degrade_on=device"), "are degraded already, data.degrade_on must be cpu"),
        (root, preset("realsr-x2-s4"), "holds pairs of scale 4 .* got model.scale=2"),
    ):
        with pytest.raises(ConfigError, match=message):
            taught.check_pairs(where, run)
    with pytest.raises(ConfigError, match=r"data.taught must lie in \[0, 1\], got 2"):
        run_of("data.taught=2")
    for found, message in (
        (Found(scale=2), "must have scale 4, got m with scale 2"),
        (Found(fills_holes=True), "pairs with holes cannot be taught"),
    ):
        monkeypatch.setattr(taught, "locate_model", lambda _, found=found: found)
        with pytest.raises(ConfigError, match=message):
            taught.teacher_identity("m", run_of())
