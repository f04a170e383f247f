"""Tiles of several works go through a function together, and nobody's result says so."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor

from resshift.config import Sampling
from resshift.images import Picture
from resshift.presets import test_x4 as toy_preset
from resshift.tiles.batching import Batcher, Done, TileCall, Work, alone
from resshift.training.step import build_network
from resshift.upscaler import Upscaler

SIZE = 4


@dataclass
class Halving:
    """x / 2, element by element; notes the size of every call, and fails where a tile holds 13."""

    sizes: list[int] = field(default_factory=list)

    def call(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        if (x == 13).any():
            raise ArithmeticError("thirteen")
        return x / 2


def asking(network: Halving, values: list[list[float]], width: int = 1) -> Work[list[float]]:
    """Ask for the halves of lists of values, one list a call, each value a tile of `width`."""
    found: list[float] = []
    for wanted in values:
        tiles = torch.tensor(wanted)[:, None].expand(-1, width)
        halves = yield TileCall(network.call, (tiles,), SIZE)
        assert halves.shape == tiles.shape
        found += halves[:, 0].tolist()
    return found


def drive(batcher: Batcher) -> None:
    while batcher.turn():
        pass


def test_one_work_gets_its_own_tiles_in_calls_of_one_size() -> None:
    network = Halving()
    assert alone(asking(network, [[2.0, 4.0, 6.0], [8.0]])) == [1, 2, 3, 4]
    assert network.sizes == [SIZE, SIZE]


def test_works_of_one_shape_share_calls_and_a_call_may_be_cut() -> None:
    network, batcher = Halving(), Batcher()
    works = [[[2.0, 4.0, 6.0]] * 3, [[8.0, 10.0, 12.0]] * 3, [[14.0, 16.0]] * 3]
    futures = [batcher.submit(asking(network, values)) for values in works]
    drive(batcher)
    assert [future.result().value for future in futures] == [
        [x / 2 for row in values for x in row] for values in works
    ]
    # 24 tiles, the oldest work's first: 3 a + 1 b three times, 3 b + 1 c twice, and what is left of c in its
    # own rounds. Alone: nine calls.
    assert network.sizes == [SIZE] * 7


def test_shapes_are_not_mixed_and_the_oldest_goes_first() -> None:
    network, batcher = Halving(), Batcher()
    ended: list[str] = []
    futures = {
        name: batcher.submit(asking(network, [[1.0]] * count, width))
        for name, count, width in (("a", 3, 1), ("b", 1, 2), ("c", 1, 1))
    }
    for name, future in futures.items():
        future.add_done_callback(lambda _, name=name: ended.append(name))
    drive(batcher)
    assert ended == ["c", "a", "b"]  # c rides with a; b has to wait for both
    assert len(network.sizes) == 4


def test_full_calls_begin_no_further_work() -> None:
    """Large pictures are made one after the other: each may hold gigabytes."""
    network, batcher, begun = Halving(), Batcher(), list[int]()

    def noting(i: int, count: int) -> Work[int]:
        begun.append(i)
        yield TileCall(network.call, (torch.ones(count, 1),), SIZE)
        return i

    for i in range(3):
        batcher.submit(noting(i, SIZE))
    batcher.turn()
    assert begun == [0]
    drive(batcher)
    assert begun == [0, 1, 2]
    crowd = Batcher(most_open=2)
    for i in range(5):
        crowd.submit(noting(i, 1))
    crowd.turn()
    assert begun[3:] == [0, 1]


@pytest.mark.parametrize(
    ("size", "expected"),
    [(8.0, ["small"] * 4 + ["large"]), (9.0, ["large"] + ["small"] * 4), (0.0, ["large"] + ["small"] * 4)],
)
def test_small_works_pass_a_large_one_with_every_other_call(size: float, expected: list[str]) -> None:
    network, batcher, ended = Halving(), Batcher(), list[str]()

    def noting(name: str, num_calls: int, count: int) -> Work[None]:
        for _ in range(num_calls):
            yield TileCall(network.call, (torch.ones(count, 1),), SIZE)
        ended.append(name)

    batcher.submit(noting("large", 8, SIZE), size=64.0)
    batcher.submit(noting("as large", 1, SIZE), size=64.0)  # has to wait: each may hold gigabytes
    for _ in range(4):
        batcher.submit(noting("small", 2, 2), size=size)
    for _ in range(8):
        batcher.turn()
    # Four calls each: two small works fill a call, and have two to make.
    assert ended == (["small"] * 4 if size == 8.0 else ["large"])
    drive(batcher)
    assert [name for name in ended if name != "as large"] == expected
    assert ended.index("as large") > ended.index("large")


def test_an_error_meets_only_the_work_it_belongs_to() -> None:
    network, batcher = Halving(), Batcher()
    good, bad = (
        batcher.submit(asking(network, [[2.0], [4.0]])),
        batcher.submit(asking(network, [[13.0], [6.0]])),
    )
    drive(batcher)
    assert good.result().value == [1, 2]
    with pytest.raises(ArithmeticError, match="thirteen"):
        bad.result()


def test_a_work_may_catch_the_error_of_its_call_and_go_on() -> None:
    network = Halving()

    def careful() -> Work[str]:
        try:
            yield TileCall(network.call, (torch.full((1, 1), 13.0),), 1)
        except ArithmeticError:
            answer = yield TileCall(network.call, (torch.full((1, 1), 8.0),), 1)
            return f"after all {answer.item():g}"
        return "unreachable"

    assert alone(careful()) == "after all 4"


def test_what_is_no_longer_wanted_is_not_begun() -> None:
    network, batcher = Halving(), Batcher()
    left, kept = (
        batcher.submit(asking(network, [[2.0]]), lambda: False),
        batcher.submit(asking(network, [[4.0]])),
    )
    drive(batcher)
    assert kept.result().value == [2]
    with pytest.raises(CancelledError):
        left.result()
    assert network.sizes == [SIZE]


def test_what_is_no_longer_wanted_ends_between_calls_and_gives_up_what_it_holds() -> None:
    network, batcher, wanted, ended = Halving(), Batcher(), [True], list[str]()

    def large() -> Work[list[float]]:
        try:
            return (yield from asking(network, [[2.0]] * 9))
        finally:
            ended.append("large")

    left = batcher.submit(large(), lambda: wanted[0])
    batcher.turn()
    batcher.turn()
    wanted[0] = False
    kept = batcher.submit(asking(network, [[4.0]]))
    batcher.turn()
    assert kept.result(0).value == [2]
    assert left.cancelled()
    assert ended == ["large"]
    assert network.sizes == [SIZE] * 3  # two of nine calls


def test_a_thread_serves_works_from_other_threads() -> None:
    network, batcher = Halving(), Batcher()
    threading.Thread(target=batcher.serve, daemon=True).start()
    answers: dict[int, Done[list[float]]] = {}

    def ask(i: int) -> None:
        answers[i] = batcher.submit(asking(network, [[2.0 * i]] * 20)).result(timeout=60)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {i: answer.value for i, answer in answers.items()} == {i: [float(i)] * 20 for i in range(6)}
    assert all(answer.seconds > 0 for answer in answers.values())


class Cramped(torch.nn.Module):
    """Runs out of memory for tiles above 16 x 16."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None = None) -> Tensor:
        if x.shape[2] * x.shape[3] > 16 * 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.network(x, t, lq, mask)


class Sharing(Upscaler):
    """As on a GPU: tiles of several pictures in one call."""

    shares_calls = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]


@pytest.mark.slow
def test_pictures_that_share_calls_have_the_bytes_of_pictures_alone(
    recipe_weights: Callable[[torch.nn.Module], torch.nn.Module],
) -> None:
    # A new network ends in zeros: whatever it is given, it would say the same.
    up = Sharing(toy_preset().model, recipe_weights(build_network(toy_preset())), device="cpu")
    rng = np.random.default_rng(0)
    # One tile, the same shape again, another shape, several tiles.
    pictures = [
        Picture(pixels=rng.integers(0, 256, (*size, 3), np.uint8))
        for size in ((24, 16), (24, 16), (9, 30), (60, 40))
    ]
    expected = [
        up.upscale(picture, Sampling(seed=i, tile_px=24)).pixels for i, picture in enumerate(pictures)
    ]
    batcher = Batcher()
    futures = [
        batcher.submit(up.upscaling(picture, Sampling(seed=i, tile_px=24)))
        for i, picture in enumerate(pictures)
    ]
    drive(batcher)
    for future, wanted in zip(futures, expected, strict=True):
        assert np.array_equal(future.result().value.pixels, wanted)
    assert not np.array_equal(expected[0], expected[1])


@pytest.mark.slow
def test_pictures_that_run_out_of_memory_together_try_smaller_tiles_once() -> None:
    up = Sharing(toy_preset().model, Cramped(build_network(toy_preset())), device="cpu")
    batcher = Batcher()
    futures = [
        batcher.submit(up.upscaling(Picture(pixels=np.full((20, 12, 3), i, np.uint8)))) for i in range(3)
    ]
    drive(batcher)
    assert {future.result().value.notes for future in futures} == {("tiles of at most 8 px: memory ran out",)}


def test_an_unusable_device_ends_the_batcher() -> None:
    """No work can go on, and none may be told that it is to blame."""

    def broken(_: Tensor) -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def asks() -> Work[None]:
        yield TileCall(broken, (torch.ones(1, 1),), SIZE)

    batcher = Batcher()
    futures = [batcher.submit(asks()) for _ in range(2)]
    with pytest.raises(torch.AcceleratorError, match="illegal"):
        batcher.turn()
    assert not any(future.done() for future in futures)
