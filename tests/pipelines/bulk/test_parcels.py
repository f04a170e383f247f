"""How pictures are put together, and how their results are."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest

from pipelines.bulk import parcels
from pipelines.bulk.parcels import FEW, MOST_PARCELS, Parcel, Underway, by_key, grouped, packed
from pipelines.bulk.worker import Upscaled
from resshift.images import Picture
from resshift.images.animation import Frames


def frames(side_px: int) -> Frames:
    pixels = np.broadcast_to(np.zeros((), np.uint8), (side_px, side_px, 3))
    return Frames((Picture(pixels=pixels),))


@pytest.mark.parametrize(
    ("sides", "places"),
    [
        pytest.param([64] * 200, [0] * 200, id="small: together"),
        pytest.param([4000] * 8, list(range(8)), id="large: one by one"),
        pytest.param([700, 700, 700, 700, 700], [0, 0, 1, 1, 2], id="a megapixel each"),
        pytest.param([9, 16, 2000, 16], [0, 0, 1, 2], id="a large one is alone"),
    ],
)
def test_small_pictures_share_a_parcel_and_large_ones_do_not(sides: list[int], places: list[int]) -> None:
    assert packed([frames(side) for side in sides]) == places


def test_there_are_never_more_parcels_than_a_task_returns() -> None:
    assert packed([frames(side) for side in (900, 500) * 100])[-1] < MOST_PARCELS


def results(num: int) -> Iterator[tuple[Frames, Upscaled]]:
    for i in range(num):
        yield frames(i + 1), Upscaled("", "", float(i), 0.0)


def sizes(num: int, seconds: float) -> list[int]:
    """Return how many results come together, of `num` that take `seconds` each."""
    now = itertools.count(step=seconds)
    keys = [f"{i}" for i in range(num)]
    told = list(grouped(keys, results(num), lambda: next(now)))
    pixels = [one for one in told if isinstance(one, Parcel)]
    answers = [one for one in told if isinstance(one, tuple)]
    assert [type(one) for one in told] == [Parcel, tuple] * len(pixels)
    assert list(by_key(pixels)) == keys
    assert [one.pictures[0].width for one in by_key(pixels).values()] == list(range(1, num + 1))
    assert [one.seconds for group in answers for one in group if isinstance(one, Upscaled)] == list(
        range(num)
    )
    assert [len(one.keys) for one in pixels] == [len(group) for group in answers]
    return [len(group) for group in answers]


def test_results_of_a_few_come_one_by_one_and_those_of_many_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes(FEW, 0.0) == [1] * FEW
    assert sizes(100, 0.0) == [100]
    assert sizes(20, 1.0)[0] == 2  # not later than after two seconds
    monkeypatch.setattr(parcels, "_GROUP_BYTES", 3 * 81)
    assert sizes(9, 0.0) == [6, 2, 1]  # 3 x (1 + 4 + 9 + 16 + 25 + 36), then 3 x (49 + 64)


def test_how_far_slow_pictures_are_comes_between_the_results() -> None:
    def answers() -> Iterator[tuple[Frames, Upscaled] | Underway]:
        yield Underway((("0", 0.25), ("1", 0.1)))
        for i, answer in enumerate(results(2)):
            yield answer
            yield Underway((("1", 0.5 + i / 10),))

    told = list(grouped(["0", "1"], answers()))
    assert [type(one) for one in told] == [Parcel, tuple] * 5
    assert [one.keys for one in told if isinstance(one, Parcel)] == [(), ("0",), (), ("1",), ()]
    groups = [one for one in told if isinstance(one, tuple)]
    assert groups[0] == (Underway((("0", 0.25), ("1", 0.1))),)
    assert [type(one) for group in groups for one in group] == [Underway, Upscaled] * 2 + [Underway]


def test_a_unit_that_ends_early_gives_what_it_has() -> None:
    told = list(grouped([f"{i}" for i in range(20)], results(12)))
    assert isinstance(told[0], Parcel)
    assert told[0].keys == tuple(f"{i}" for i in range(12))
