"""Every rank gets its slots of each batch, whatever their number and wherever the run was interrupted."""

from __future__ import annotations

import hashlib
import itertools
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray

from pipelines.pairs import ranks
from pipelines.pairs.dataset import filled
from pipelines.pairs.maker import PairMaker
from pipelines.pairs.order import Rows, spans, stream
from pipelines.pairs.parcels import Batch, Turns, to_block
from pipelines.pairs.ranks import PairStream, rank_batches, start_dealer
from pipelines.pairs.share import Share
from pipelines.shards.build import ShardOptions
from pipelines.shards.parquet import read_manifest, row_groups
from pipelines.shards.prepare import prepare_here
from resshift import degradation
from resshift.config import RunConfig
from resshift.presets import test_x4 as toy_preset
from resshift.storage import StorageError, StorageReason

RECIPE = replace(degradation.realesrgan_x4(), bicubic_share=0.3)


@pytest.fixture
def shards(tree: Path, tmp_path: Path) -> str:
    prepare_here(str(tree), str(tmp_path / "s"), ShardOptions(row_group_rows=3))
    return str(tmp_path / "s")


def config_of(batch_size: int) -> RunConfig:
    toy = toy_preset()
    return replace(toy, degradation=RECIPE, train=replace(toy.train, batch_size=batch_size))


def digest(batch: Batch) -> str:
    """Return the hash of everything a batch holds."""
    state = hashlib.sha256()
    for name in sorted(batch):
        state.update(
            name.encode()
            + ("\n".join(map(str, batch[name])).encode() if name == "key" else batch[name].tobytes())
        )
    return state.hexdigest()


def test_batches_begin_where_a_batch_begins(shards: str) -> None:
    with pytest.raises(ValueError, match="must be a multiple"):
        next(rank_batches(PairStream(root=shards, config=config_of(8)), 3))


def test_a_batch_that_ranks_cannot_share_is_said(shards: str) -> None:
    with pytest.raises(ValueError, match=r"must be at least the number of ranks \(9\)"):
        PairStream(root=shards, config=config_of(8), num_ranks=9)


def test_several_ranks_without_a_dealer_are_an_error(shards: str) -> None:
    with pytest.raises(ValueError, match="2 ranks need a dealer"):
        next(rank_batches(PairStream(root=shards, config=config_of(8), num_ranks=2), 0))


def steps(root: str, config: RunConfig, first: int, stop: int, num_ranks: int) -> list[Batch]:
    """Return the global batches of some steps as the ranks get them when Ray Data deals blocks in turn."""
    train = config.train
    make = PairMaker(root, train.seed, config.data, config.degradation)
    turns = Turns(train.batch_size, num_ranks, 3 * train.batch_size)
    windows = spans(
        row_groups(read_manifest(root)), train.seed, first * train.batch_size, stop * train.batch_size
    )
    blocks = [
        block for task in filled(windows, itertools.repeat(40), 40) for block in make.blocks(task, turns)
    ]
    found = [
        list(ranks.batches(iter(blocks[rank::num_ranks]), rank, own))
        for rank, own in enumerate(shares(train.batch_size, num_ranks))
    ]
    return [
        {name: np.concatenate([rank[i][name] for rank in found]) for name in found[0][i]}
        for i in range(stop - first)
    ]


def shares(batch_size: int, num_ranks: int) -> list[int]:
    return [(i + 1) * batch_size // num_ranks - i * batch_size // num_ranks for i in range(num_ranks)]


@pytest.mark.slow
def test_pairs_do_not_depend_on_the_number_of_ranks_or_on_interruptions(shards: str) -> None:
    """Runs are (first step, last, ranks) one after the other; the hash is over rows, keys and pixels."""
    config = config_of(8)
    make = PairMaker(shards, config.train.seed, config.data, config.degradation)
    pieces = list(stream(row_groups(read_manifest(shards)), config.train.seed, 8, 0, 96))
    plain = [digest(batch) for batch in make.batches(pieces, np.split(np.arange(96), 12))]
    assert len(set(plain)) == 12
    one, four, eight = [(0, 12, 1)], [(0, 12, 4)], [(0, 12, 8)]
    resumed, elastic, uneven = [(0, 5, 8), (5, 12, 8)], [(0, 4, 8), (4, 9, 4), (9, 12, 8)], [(0, 12, 3)]
    for runs in (one, four, eight, resumed, elastic, uneven):
        assert [digest(batch) for run in runs for batch in steps(shards, config, *run)] == plain, runs


@ray.remote(num_cpus=0.1)
class Consumer:
    """A training worker as far as data goes."""

    def __init__(self, stream: PairStream, start: int, rank: int, dealer: str | None) -> None:
        self.batches = rank_batches(stream, start, rank=rank, dealer=dealer)

    def take(self, num: int) -> list[Batch]:
        return list(itertools.islice(self.batches, num))


def consumed(root: str, config: RunConfig, first: int, num_steps: int, num_ranks: int) -> list[Batch]:
    """Return the global batches that `num_ranks` processes consume side by side from a step on."""
    pairs = PairStream(
        root=root,
        config=config,
        num_ranks=num_ranks,
        held_cpus=0.1 * num_ranks,
        rows_per_execution=24,
    )
    name, dealer = start_dealer(pairs) if num_ranks > 1 else (None, None)
    actor: Any = Consumer  # Ray's decorator hides `remote` from type checkers
    start = first * config.train.batch_size
    workers = [actor.remote(pairs, start, rank, name) for rank in range(num_ranks)]
    found = ray.get([worker.take.remote(num_steps) for worker in workers])
    for worker in workers:
        ray.kill(worker)
    del dealer
    return [
        {name: np.concatenate([rank[i][name] for rank in found]) for name in found[0][i]}
        for i in range(num_steps)
    ]


@pytest.mark.ray
@pytest.mark.timeout(900)  # processes that import torch take minutes to start on a busy machine
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_that_grows_and_shrinks_sees_what_one_rank_sees(shards: str) -> None:
    """Nine steps over three executions of Ray Data and, with ten pictures, eight epochs: three ranks, then
    one, then two.
    """
    config, steps = config_of(8), 9
    make = PairMaker(shards, config.train.seed, config.data, config.degradation)
    groups = row_groups(read_manifest(shards))
    plain = list[str]()
    for i in range(steps):
        pieces = list(stream(groups, config.train.seed, 8, i * 8, i * 8 + 8))
        plain += [digest(batch) for batch in make.batches(pieces, [np.arange(8)])]
    assert len(set(plain)) == steps
    found = [
        batch
        for first, num, num_ranks in ((0, 5, 3), (5, 1, 1), (6, 3, 2))
        for batch in consumed(shards, config, first, num, num_ranks)
    ]
    assert [digest(batch) for batch in found] == plain


def parcel(rows: Rows) -> pa.Table:
    """Return a parcel of rank 0 without pictures."""
    keys = np.array([str(row) for row in rows], object)
    return to_block({"key": keys, "row": rows, "substituted": np.zeros(len(rows), np.uint8)}, 0)


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

        def batches(**_: object) -> Iterator[pa.Table]:
            self.told.append(("start", start_row))
            if start_row == self.broken_at:
                raise StorageError("shards", StorageReason.MISSING, "a test")
            try:
                for row in range(start_row, stop_row, 16):  # two batches
                    yield parcel(np.arange(row, row + 16))
            finally:
                self.told.append(("stop", start_row))

        return SimpleNamespace(iter_batches=batches)


def test_the_next_execution_starts_before_the_last_pairs_are_consumed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_of(8)
    monkeypatch.setattr(ranks, "rows_per_task", lambda *_: 16)  # so two batches ahead
    monkeypatch.setattr(ranks, "pair_dataset", (ray_data := Executions()).dataset)
    batches = rank_batches(PairStream(root="shards", config=config, rows_per_execution=48), 0)
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
    monkeypatch.setattr(ranks, "pair_dataset", (ray_data := Executions(broken_at=48)).dataset)
    batches = rank_batches(PairStream(root="shards", config=config_of(8), rows_per_execution=48), 0)
    assert [next(batches)["row"][0] for _ in range(6)] == list(range(0, 48, 8))
    with pytest.raises(StorageError, match="shards"):
        next(batches)
    assert ("stop", 0) in ray_data.told


def test_a_rank_that_is_executions_behind_another_still_gets_its_parcels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def dataset(root: str, config: RunConfig, start_row: int, stop_row: int, **_: object) -> Any:
        del root, config
        bundle = SimpleNamespace(block_refs=[f"parcel {row}" for row in range(start_row, stop_row, 4)])
        return SimpleNamespace(iter_internal_ref_bundles=lambda: iter([bundle]))

    monkeypatch.setattr(ranks, "pair_dataset", dataset)
    dealer = ranks.Dealer(PairStream(root="", config=config_of(8), num_ranks=2, rows_per_execution=8))

    def parcels(rank: int, first: int) -> list[str]:
        dealer.execution(first, waited=False)
        return list(itertools.chain.from_iterable(iter(lambda: dealer.parcel(first, rank), [])))

    assert [parcels(0, first) for first in (0, 8, 16)] == [["parcel 0"], ["parcel 8"], ["parcel 16"]]
    assert [parcels(1, first) for first in (0, 8, 16)] == [["parcel 4"], ["parcel 12"], ["parcel 20"]]
    dealer.execution(24, waited=False)
    assert dealer.parcel(0, 1) == []  # asked ahead of an end that it has seen by now


def test_rows_in_another_order_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    order = np.array([*range(8), 9, 8, *range(10, 16)])
    source = SimpleNamespace(iter_batches=lambda **_: [parcel(order)])
    monkeypatch.setattr(ranks, "pair_dataset", lambda *_, **__: source)
    batches = rank_batches(PairStream(root="shards", config=config_of(8), rows_per_execution=16), 0)
    assert next(batches)["row"].tolist() == list(range(8))
    with pytest.raises(RuntimeError, match="Ray Data changed their order"):
        next(batches)


def test_waiting_is_counted_from_the_first_item_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(ranks.time, "monotonic", lambda: now[0])

    def items() -> Iterator[int]:
        for seconds in (100, 1, 2):  # the first starts everything
            now[0] += seconds
            yield seconds

    waits = ranks.Waits()
    assert waits.share == 0
    for _ in waits.counted(items()):
        now[0] += 3
    assert waits.share == 3 / 12


def test_a_run_that_waits_asks_for_more_at_the_next_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executions are short while nodes may come."""
    asked: list[bool] = []

    def share(held_cpus: float, *, waited: bool) -> Share:
        asked.append(waited)
        return Share(cpus=2, object_store_bytes=1, may_grow=True)

    monkeypatch.setattr(ranks, "left_by_workers", share)
    monkeypatch.setattr(ranks, "rows_per_task", lambda *_: 16)
    monkeypatch.setattr(ranks, "pair_dataset", Executions().dataset)
    monkeypatch.setattr(ranks, "_WAITED", -1)
    batches = rank_batches(PairStream(root="shards", config=config_of(8), held_cpus=1), 0)
    rows = [next(batches)["row"][0] for _ in range(8 * 32 // 8 + 1)]
    assert rows[-1] == 256
    assert asked == [False, True]
    batches.close()
