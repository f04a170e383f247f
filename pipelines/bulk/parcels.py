"""Parcels: small pictures travel together, because a Ray object costs a driver some time whatever is in it.

    fetch task --1 to 8 parcels--> replica --groups of results--> store task

Between the results of large pictures, empty parcels come with how far those are (`Underway`).

A unit of a replica names the pictures of its parcels that it wants by their keys. Units of a few pictures are
answered picture by picture, so that a death is charged to the right one; larger ones in groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from resshift.images.animation import Frames

if TYPE_CHECKING:
    from pipelines.bulk.worker import Upscaled

FEW = 8  # pictures whose number matters little beside what each of them costs
MOST_PARCELS = 8  # of a fetch task
_PARCEL_PIXELS = 1_000_000
_GROUP_BYTES = 32 << 20
_GROUP_S = 2.0


@dataclass(frozen=True, slots=True)
class Parcel:
    """Pictures in one object of the store.

    Fields:
        keys: Keys of the inputs.
        frames: The frames of each.
    """

    keys: tuple[str, ...]
    frames: tuple[Frames, ...]


@dataclass(frozen=True, slots=True)
class Underway:
    """How far pictures of a unit are whose results take long.

    Fields:
        shares: Key of each picture that the model has begun, and the share of its work that is done, in
            (0, 1].
    """

    shares: tuple[tuple[str, float], ...]


def by_key(parcels: Iterable[Parcel]) -> dict[str, Frames]:
    """Return the pictures of parcels."""
    return {key: one for parcel in parcels for key, one in zip(parcel.keys, parcel.frames, strict=True)}


def packed(frames: Sequence[Frames]) -> list[int]:
    """Return the number of the parcel that each picture is put into: neighbours share one up to a megapixel,
    and `FEW` large ones have one each.
    """
    most = max(_PARCEL_PIXELS, sum(one.num_pixels for one in frames) // MOST_PARCELS)
    places: list[int] = []
    place = num_pixels = 0
    for one in frames:
        if num_pixels and num_pixels + one.num_pixels > most and place < MOST_PARCELS - 1:
            place, num_pixels = place + 1, 0
        num_pixels += one.num_pixels
        places.append(place)
    return places


def grouped(
    keys: Sequence[str],
    answers: Iterator[tuple[Frames, Upscaled] | Underway],
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Parcel | tuple[Upscaled | Underway, ...]]:
    """Yield the results of a unit: a parcel, then what is to be told of its pictures.

    Args:
        keys: Keys of the unit.
        answers: Results in this order, and between them how far the next are; it may end early.
        clock: Function that returns seconds.
    """
    first = num_bytes = 0
    since = clock()
    frames: list[Frames] = []
    told: list[Upscaled] = []

    def group() -> Iterator[Parcel | tuple[Upscaled, ...]]:
        yield Parcel(tuple(keys[first : first + len(frames)]), tuple(frames))
        yield tuple(told)

    for answer in answers:
        if isinstance(answer, Underway):
            yield Parcel((), ())
            yield (answer,)
            continue
        result, done = answer
        frames.append(result)
        told.append(done)
        num_bytes += result.num_bytes
        if len(keys) <= FEW or num_bytes >= _GROUP_BYTES or clock() - since >= _GROUP_S:
            yield from group()
            first, num_bytes, since = first + len(frames), 0, clock()
            frames, told = [], []
    if told:
        yield from group()
