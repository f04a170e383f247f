"""Sizes of blocks, parcels and tasks, and what Ray Data makes of them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import ray

from pipelines.pairs import dataset
from pipelines.pairs.dataset import rows_per_task, rows_per_turn, task_sizes
from pipelines.pairs.parcels import from_block
from pipelines.pairs.share import Share
from pipelines.shards.build import ShardOptions
from pipelines.shards.prepare import prepare_here
from resshift import degradation
from resshift.config import DataConfig, RunConfig
from resshift.presets import test_x4 as toy_preset

CROP = DataConfig(crop="random", crop_px=32)
RECIPE = replace(degradation.realesrgan_x4(), bicubic_share=0.3)


def config_of(batch_size: int, crop_px: int = 256) -> RunConfig:
    toy = toy_preset()
    return replace(toy, data=DataConfig(crop_px=crop_px), train=replace(toy.train, batch_size=batch_size))


def test_tasks_make_what_the_store_has_room_for() -> None:
    toy = toy_preset()
    sizes = {px: replace(toy, data=DataConfig(crop_px=px)) for px in (256, 512, 2048)}
    assert [rows_per_task(config, None) for config in (toy, *sizes.values())] == [4096, 2560, 640, 256]
    config, block = sizes[256], 160 * (3 * (256**2 + 64**2) + 64)
    for room, blocks in ((0.5, 1), (2.1, 2), (100, 16)):
        share = Share(cpus=2.5, object_store_bytes=int(room * 3 * block))
        assert rows_per_task(config, share) == 160 * blocks


@pytest.mark.parametrize(
    ("batch_size", "rows"), [(64, 128), (48, 144), (160, 160), (161, 160), (96, 96), (4096, 160)]
)
def test_a_rank_that_is_alone_gets_whole_batches_where_one_fits(batch_size: int, rows: int) -> None:
    assert rows_per_turn(config_of(batch_size), None, num_ranks=1) == rows


@pytest.mark.parametrize(
    ("batch_size", "num_ranks", "rows"),
    [(96, 8, 288), (64, 64, 2560), (768, 64, 2304), (4096, 64, 2560), (64, 2, 128)],
)
def test_a_turn_holds_eight_megabytes_for_each_rank_but_no_more_than_a_task(
    batch_size: int, num_ranks: int, rows: int
) -> None:
    config = config_of(batch_size)
    assert rows_per_turn(config, None, num_ranks) == rows
    short = Share(cpus=2, object_store_bytes=1)
    assert rows_per_turn(config, short, num_ranks) <= rows_per_task(config, short)


@pytest.mark.parametrize(
    ("share", "sizes"),
    [
        (None, [256, 512, 1024, 2048, 2560, 2560]),
        (
            Share(cpus=1.5, object_store_bytes=1 << 40),
            [256, 256, 512, 512, 1024, 1024, 2048, 2048, 2560, 2560, 2560],
        ),
        (Share(cpus=2, object_store_bytes=6 * 160 * 3 * (256**2 + 64**2 + 100)), [256, 256, 480, 480]),
        (Share(cpus=2, object_store_bytes=1), [160, 160, 160]),
    ],
)
def test_tasks_at_the_start_are_short_and_grow_to_what_there_is_room_for(
    share: Share | None, sizes: list[int]
) -> None:
    assert list(itertools.islice(task_sizes(config_of(160), share), len(sizes))) == sizes


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("recipe", [RECIPE, degradation.inpainting()], ids=lambda recipe: recipe.kind)
def test_ray_data_hands_parcels_over_as_they_were_made(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: degradation.DegradationRecipe
) -> None:
    """Neither joined nor cut, with masks or without, empty ones among them."""
    root = str(tmp_path / "s")
    prepare_here(str(tree), root, ShardOptions(row_group_rows=3))
    monkeypatch.setattr(dataset, "rows_per_turn", lambda *_: 16)
    config: Any = SimpleNamespace(data=CROP, degradation=recipe, train=config_of(8).train)
    made = dataset.pair_dataset(root, config, 0, 45, num_ranks=3)
    blocks: list[Any] = [
        ray.get(cast(Any, ref)) for bundle in made.iter_internal_ref_bundles() for ref in bundle.block_refs
    ]
    assert all(len(block) == 1 for block in blocks)
    rows = [from_block(block, i % 3)["row"].tolist() for i, block in enumerate(blocks)]
    assert sorted(itertools.chain(*rows)) == list(range(45))
    for rank in range(3):
        own = range(rank * 8 // 3, (rank + 1) * 8 // 3)
        assert list(itertools.chain(*rows[rank::3])) == [row for row in range(45) if row % 8 in own]
