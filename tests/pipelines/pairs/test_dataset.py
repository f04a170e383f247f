"""Training pairs: functions of seed, epoch and key, in the order of the plan."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import ray

from pipelines.pairs import dataset
from pipelines.pairs.dataset import (
    Batch,
    PairMaker,
    PairSource,
    Share,
    cpus_of_a_task,
    fair_share,
    rank_batches,
    read_groups,
    rows_per_block,
    rows_per_task,
    task_sizes,
)
from pipelines.pairs.order import stream
from pipelines.shards.build import ShardOptions
from pipelines.shards.parquet import RowGroup, read_manifest, row_groups, write_shard_file
from pipelines.shards.prepare import finish, prepare_here
from resshift import degradation
from resshift.config import ConfigError, DataConfig, RunConfig
from resshift.images import ImageError
from resshift.pairs.training_pair import make_pair
from resshift.presets import test_x4 as toy_preset
from resshift.storage import StorageError, StorageReason
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


def pieces_of(root: str, start: int, stop: int, batch_size: int = 4, **ranks: int) -> list[Any]:
    return list(stream(row_groups(read_manifest(root)), 1, batch_size, start, stop, **ranks))


def all_of(maker: PairMaker, pieces: list[Any]) -> Batch:
    (batch,) = maker.batches(pieces, 1000)
    return batch


def digest(batch: Batch) -> str:
    """Return the hash of everything a batch holds."""
    state = hashlib.sha256()
    for name in sorted(batch):
        state.update(
            name.encode()
            + ("\n".join(map(str, batch[name])).encode() if name == "key" else batch[name].tobytes())
        )
    return state.hexdigest()


def test_rows_do_not_depend_on_how_they_are_cut(shards: str) -> None:
    make = PairMaker(shards, 5, CROP, RECIPE)
    whole = all_of(make, pieces_of(shards, 0, 24))
    assert whole["row"].tolist() == list(range(24))
    for start, stop in ((0, 1), (3, 17), (23, 24)):
        part = all_of(make, pieces_of(shards, start, stop))
        for name, column in part.items():
            np.testing.assert_array_equal(column, whole[name][start:stop])


def test_groups_hold_the_rows_that_the_plan_names(shards: str) -> None:
    for piece in pieces_of(shards, 7, 25):
        tables = read_groups(shards, piece.groups)
        assert [len(table) for table in tables] == [group.num_ok for group in piece.groups]
    keys = [
        key
        for group in row_groups(read_manifest(shards))
        for key in read_groups(shards, [group])[0]["key"].to_pylist()
    ]
    assert sorted(keys) == sorted(f"class{i % 2}/{i}.png" for i in range(10))


def test_a_broken_picture_moves_no_neighbour(tmp_path: Path) -> None:
    photos = [encoded(i) for i in range(8)]
    good = rotten(str(tmp_path / "good"), photos)
    bad = rotten(str(tmp_path / "bad"), [b"broken" if i in (2, 3) else data for i, data in enumerate(photos)])
    whole = pieces_of(good, 0, 16)
    expected, found = (
        all_of(PairMaker(good, 5, CROP, RECIPE), whole),
        all_of(PairMaker(bad, 5, CROP, RECIPE), whole),
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


def test_an_outage_is_waited_for_and_nothing_else(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    original = dataset.read_pictures

    def failing(reason: StorageReason, times: int) -> Callable[[str, RowGroup], Any]:
        def read(root: str, group: RowGroup) -> Any:
            calls.append(0)
            if len(calls) <= times:
                raise StorageError(root, reason, "try again")
            return original(root, group)

        return read

    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    groups = row_groups(read_manifest(shards))[:1]
    monkeypatch.setattr(dataset, "read_pictures", failing(StorageReason.UNAVAILABLE, 3))
    assert len(read_groups(shards, groups)[0]) == groups[0].num_ok
    assert waits == [0.5, 1.0, 2.0]
    for reason, num_calls in ((StorageReason.MISSING, 1), (StorageReason.UNAVAILABLE, 7)):
        calls.clear()
        monkeypatch.setattr(dataset, "read_pictures", failing(reason, 100))
        with pytest.raises(StorageError, match=str(reason)):
            read_groups(shards, groups)
        assert len(calls) == num_calls


def test_blocks_are_what_rows_of_the_same_batch_are_cut_into(shards: str) -> None:
    make = PairMaker(shards, 5, CROP, RECIPE)
    pieces = pieces_of(shards, 0, 24)
    whole, parts = all_of(make, pieces), list(make.batches(pieces, 7))
    assert [len(part["row"]) for part in parts] == [7, 7, 7, 3]
    for name, column in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), column)


def test_blocks_hold_a_few_dozen_megabytes_and_tasks_what_the_store_has_room_for() -> None:
    toy = toy_preset()
    sizes = {px: replace(toy, data=DataConfig(crop_px=px)) for px in (256, 512, 2048)}
    assert [rows_per_block(config) for config in (toy, *sizes.values())] == [256, 160, 40, 16]
    config, block = sizes[256], 160 * (3 * (256**2 + 64**2) + 64)
    assert rows_per_task(config, None) == 160 * 16
    for room, blocks in ((0.5, 1), (2.1, 2), (100, 16)):
        assert (
            rows_per_task(config, Share(cpus=2.5, object_store_bytes=int(room * 3 * block))) == 160 * blocks
        )


@pytest.mark.parametrize(
    ("batch_size", "num_ranks", "rows"),
    [(64, 1, 128), (48, 1, 144), (160, 1, 160), (161, 1, 160), (161, 2, 160), (96, 8, 156)],
)
def test_blocks_hold_whole_batches_where_one_fits(batch_size: int, num_ranks: int, rows: int) -> None:
    config = replace(config_of(batch_size), data=DataConfig(crop_px=256))
    assert rows_per_block(config, num_ranks) == rows
    assert rows_per_task(config, None, num_ranks) == 16 * rows


@pytest.mark.parametrize(
    ("share", "blocks"),
    [
        (None, [1, 2, 4, 8, 16, 16, 16]),
        (Share(cpus=1.5, object_store_bytes=1 << 40), [1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 16]),
        (Share(cpus=2, object_store_bytes=6 * 160 * 3 * (256**2 + 64**2 + 100)), [1, 1, 2, 2, 3, 3, 3]),
        (Share(cpus=2, object_store_bytes=1), [1, 1, 1]),
    ],
)
def test_tasks_at_the_start_are_short_and_grow_to_what_there_is_room_for(
    share: Share | None, blocks: list[int]
) -> None:
    config = replace(config_of(160), data=DataConfig(crop_px=256))
    assert list(itertools.islice(task_sizes(config, share), len(blocks))) == [160 * num for num in blocks]


@pytest.mark.parametrize(("start_row", "num_ranks"), [(3, 1), (0, 9)])
def test_batches_begin_where_a_batch_begins(shards: str, start_row: int, num_ranks: int) -> None:
    with pytest.raises(ValueError, match=r"must be a(t least| multiple)"):
        next(rank_batches(shards, toy_preset(), start_row, num_ranks=num_ranks))


def test_what_is_left_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def node(cpus: float, role: str, alive: bool = True) -> dict[str, Any]:
        return {
            "Alive": alive,
            "Labels": {"role": role},
            "Resources": {"CPU": cpus, "object_store_memory": 1000.0},
        }

    nodes = [node(4, "gpu"), node(16, "data"), node(16, "data", alive=False)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    assert fair_share(4, 2) == Share(cpus=4.5, object_store_bytes=250)
    assert fair_share(4, 0, {"role": "data"}) == Share(
        cpus=4, object_store_bytes=125, labels={"role": "data"}
    )
    nodes[0]["Labels"]["max-cpus"] = "100"  # the autoscaler would add nodes for tasks that wait
    assert fair_share(4, 2).cpus == 24.5
    assert fair_share(4, 0, {"role": "data"}).cpus == 4
    del nodes[0]["Labels"]["max-cpus"]
    with pytest.raises(ConfigError, match="no node of the cluster has the labels"):
        fair_share(4, 0, {"role": "date"})
    with pytest.raises(ConfigError, match="none is left to make training pairs"):
        fair_share(4, 20)


def config_of(batch_size: int) -> RunConfig:
    toy = toy_preset()
    return replace(toy, degradation=RECIPE, train=replace(toy.train, batch_size=batch_size))


@ray.remote(num_cpus=1)
class Consumer:
    """A training worker as far as data goes: its own process with its own pipeline."""

    def __init__(self, root: str, config: RunConfig, rank: int, num_ranks: int) -> None:
        share = fair_share(num_ranks, held_cpus=num_ranks)
        self.batches = rank_batches(
            root, config, 0, rank=rank, num_ranks=num_ranks, share=share, rows_per_execution=24
        )

    def take(self, num: int) -> list[Batch]:
        return list(itertools.islice(self.batches, num))


def consumed(root: str, config: RunConfig, num_steps: int, num_ranks: int) -> list[Batch]:
    """Return the global batches that `num_ranks` processes consume side by side."""
    actor: Any = Consumer  # Ray's decorator hides `remote` from type checkers
    workers = [actor.remote(root, config, rank, num_ranks) for rank in range(num_ranks)]
    ranks = ray.get([worker.take.remote(num_steps) for worker in workers])
    for worker in workers:
        ray.kill(worker)
    return [
        {name: np.concatenate([rank[i][name] for rank in ranks]) for name in ranks[0][i]}
        for i in range(num_steps)
    ]


@pytest.mark.ray
@pytest.mark.timeout(600)  # processes that import torch take minutes to start on a busy machine
@pytest.mark.usefixtures("ray_cluster")
def test_consumers_side_by_side_see_what_one_sees_and_what_a_resumed_one_sees(shards: str) -> None:
    """Nine steps over three executions of Ray Data and, with ten pictures, eight epochs."""
    config, steps = config_of(8), 9
    make = PairMaker(shards, config.train.seed, config.data, config.degradation)
    groups = row_groups(read_manifest(shards))
    plain = [
        digest(all_of(make, list(stream(groups, config.train.seed, 8, i * 8, i * 8 + 8))))
        for i in range(steps)
    ]
    assert len(set(plain)) == steps
    assert [digest(batch) for batch in consumed(shards, config, steps, num_ranks=2)] == plain
    resumed = rank_batches(shards, config, 4 * 8, rows_per_execution=24)
    assert [digest(batch) for batch in itertools.islice(resumed, steps - 4)] == plain[4:]


class Executions:
    """Stands for Ray Data: each execution is told of when it starts, and when it is stopped or has ended."""

    def __init__(self, broken_at: int | None = None) -> None:
        self.told: list[tuple[str, int]] = []
        self.broken_at = broken_at

    def is_told(self, what: str, start_row: int, within_s: float = 30) -> bool:
        until = time.monotonic() + within_s
        while (what, start_row) not in self.told and time.monotonic() < until:
            time.sleep(0.01)
        return (what, start_row) in self.told

    def dataset(self, root: str, config: RunConfig, start_row: int, stop_row: int, **_: object) -> Any:
        del root, config

        def batches(batch_size: int, **_: object) -> Iterator[Batch]:
            self.told.append(("start", start_row))
            if start_row == self.broken_at:
                raise StorageError("shards", StorageReason.MISSING, "a test")
            try:
                for row in range(start_row, stop_row, batch_size):
                    yield {"row": np.arange(row, row + batch_size), "substituted": np.zeros(batch_size)}
            finally:
                self.told.append(("stop", start_row))

        return SimpleNamespace(iter_batches=batches)


def test_the_next_execution_starts_before_the_last_pairs_are_consumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(8)
    monkeypatch.setattr(dataset, "rows_per_task", lambda *_: 32)  # so two batches ahead
    monkeypatch.setattr(dataset, "pair_dataset", (ray_data := Executions()).dataset)
    batches = rank_batches("shards", config, 0, rows_per_execution=48)
    rows = [next(batches)["row"][0] for _ in range(4)]
    assert ray_data.told == [("start", 0)]
    rows.append(next(batches)["row"][0])
    assert ray_data.is_told("start", 48)
    rows += [next(batches)["row"][0] for _ in range(3)]
    assert rows == list(range(0, 64, 8))
    assert ray_data.told == [("start", 0), ("start", 48), ("stop", 0)]
    batches.close()
    assert ray_data.told[3:] == [("stop", 48)]


def test_an_execution_that_cannot_start_costs_no_pair_of_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dataset, "pair_dataset", (ray_data := Executions(broken_at=48)).dataset)
    batches = rank_batches("shards", config_of(8), 0, rows_per_execution=48)
    assert [next(batches)["row"][0] for _ in range(6)] == list(range(0, 48, 8))
    with pytest.raises(StorageError, match="shards"):
        next(batches)
    assert ("stop", 0) in ray_data.told


@pytest.mark.parametrize(
    ("cpus", "tasks"), [(0.25, 1), (1, 1), (1.9, 2), (2, 2), (2.5, 3), (16, 16), (30.01, 31)]
)
def test_as_many_tasks_as_cpus(cpus: float, tasks: int) -> None:
    asked = cpus_of_a_task(cpus)
    assert 0 < asked <= 1
    assert int(cpus / asked + 1e-9) == tasks


def test_a_share_of_next_to_nothing_asks_for_something() -> None:
    assert cpus_of_a_task(0.004) == 0.01


def test_tasks_keep_to_their_size_and_change_no_row(shards: str) -> None:
    """Pieces are epochs here, of ten rows."""
    make = PairMaker(shards, 5, CROP, RECIPE)
    pieces = pieces_of(shards, 0, 33)
    whole = all_of(make, pieces)
    for sizes in ([1] * 33, [4] * 9, [7] * 5, [25, 25], [100], [1, 2, 4, 8, 16, 32], [1, 1, 10, 10, 30]):
        tasks = [
            list(task())
            for task in PairSource(
                make, pieces, itertools.chain(sizes, itertools.repeat(1)), rows_per_block=3
            ).tasks
        ]
        assert [sum(map(len, tables)) for tables in tasks] == [*sizes[:-1], 33 - sum(sizes[:-1])]
        assert all(len(table) == 3 for tables in tasks for table in tables[:-1])
        keys = [key for tables in tasks for table in tables for key in table["key"].to_pylist()]
        assert keys == whole["key"].tolist()


def test_a_part_of_a_piece_reads_the_groups_of_its_rows(shards: str) -> None:
    (piece,) = pieces_of(shards, 0, 10)
    parts = [piece.cut(first, first + 3) for first in range(0, 10, 3)]
    assert [len(part.rows) for part in parts] == [3, 3, 3, 1]
    assert [len(piece.cut(i, i + 1).groups) for i in range(10)] == [1] * 10
    make = PairMaker(shards, 5, CROP, RECIPE)
    np.testing.assert_array_equal(
        np.concatenate([all_of(make, [part])["lq"] for part in parts]), all_of(make, [piece])["lq"]
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("recipe", [RECIPE, degradation.inpainting()], ids=lambda recipe: recipe.kind)
def test_ray_data_hands_blocks_over_as_they_were_made(
    shards: str, monkeypatch: pytest.MonkeyPatch, recipe: degradation.DegradationRecipe
) -> None:
    """Tasks of one block and of two: neither joined nor cut, with masks or without."""
    monkeypatch.setattr(dataset, "rows_per_block", lambda *_: 16)
    monkeypatch.setattr(dataset, "rows_per_task", lambda *_: 32)
    config: Any = SimpleNamespace(data=CROP, degradation=recipe, train=config_of(8).train)
    made = dataset.pair_dataset(shards, config, 0, 90)
    tables: list[Any] = [
        ray.get(cast(Any, ref)) for bundle in made.iter_internal_ref_bundles() for ref in bundle.block_refs
    ]
    assert [row for table in tables for row in table["row"].to_pylist()] == list(range(90))
    assert [len(table) for table in tables] == [16, 16, 16, 16, 16, 10]
