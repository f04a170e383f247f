"""Limits between ranges of keys: which inputs compete for a name across them, and halves of listings."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from pipelines.bulk.ranges import boundary, keeps_to_directories, split_point, stem, straddling
from pipelines.bulk.stages import UpscaleOptions

WORDS = ["".join(some) for number in range(1, 6) for some in itertools.product("-./a", repeat=number)]
KEYS = [word for word in WORDS if not word.endswith("/")]


def test_stems_on_both_sides_of_a_limit_are_known() -> None:
    """Every limit and every two keys that have one output by the default template."""
    output_key = UpscaleOptions(model="m", identity="i", scale=4).output_key
    groups: dict[str, list[str]] = {}
    for key in KEYS:
        groups.setdefault(output_key(key), []).append(key)
    assert max(map(len, groups.values())) > 2
    num_straddling = 0
    for limit in WORDS:
        parted = {keys[0] for keys in groups.values() if min(keys) < limit <= max(keys)}
        assert {stem(key) for key in parted} <= straddling(limit)
        num_straddling += len(parted)
    assert num_straddling > 100
    assert straddling(None) == straddling("") == frozenset()


def test_a_boundary_leaves_a_stem_on_one_side() -> None:
    first_of = {stem(key): key for key in sorted(KEYS, reverse=True)}
    for key in KEYS:
        assert boundary(key) <= first_of[stem(key)]
        assert stem(key) not in straddling(boundary(key))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{dir}/{stem}_x{scale}.{ext}", True),
        ("{dir}/x4-{name}", True),
        ("{name}.png", False),
        ("{dir}/all.{ext}", False),
        ("{dir}/x/{stem}.{ext}", False),
        ("x/{dir}/{stem}.{ext}", False),
        ("{dir}{stem}.{ext}", False),
        ("{dir}/{stem}{dir}.{ext}", False),
    ],
)
def test_templates_that_keep_to_directories(template: str, expected: bool) -> None:
    assert keeps_to_directories(template) == expected


def looking(keys: list[str], asked: list[str]) -> Callable[[str, str | None], str | None]:
    """Return `first_key` of a sorted listing that notes what it is asked."""

    def first_key(start: str, stop: str | None) -> str | None:
        asked.append(start)
        i = bisect.bisect_left(keys, start)
        return keys[i] if i < len(keys) and (stop is None or keys[i] < stop) else None

    return first_key


@pytest.mark.parametrize(
    "names",
    [
        [f"img_{i:06}.jpg" for i in range(20_000)],
        [f"photos of the year/{i // 1000:02}/{i % 1000:03}.jpg" for i in range(20_000)],
        [f"{hash_:08x}.jpg" for hash_ in np.random.default_rng(0).integers(0, 1 << 32, 20_000)],
        [f"写真/{chr(0x4E00 + i)}.jpg" for i in range(20_000)],
    ],
    ids=["numbers", "folders", "hashes", "characters beyond ASCII"],
)
def test_a_listing_is_divided_into_parts_of_similar_size(names: list[str]) -> None:
    """Sixteen parts of names that are spread evenly, the largest of which is no eighth; few look-ups."""
    keys, asked = sorted(names), list[str]()
    limits: list[str] = []

    def sizes() -> list[int]:
        return np.diff(
            [0, *(bisect.bisect_left(keys, limit) for limit in sorted(limits)), len(keys)]
        ).tolist()

    for _ in range(15):
        ends = [*sorted(limits), None]
        widest = int(np.argmax(sizes()))
        limit = split_point(looking(keys, asked), (["", *sorted(limits)][widest], ends[widest]))
        assert limit is not None
        limits.append(limit)
    assert min(sizes()) > 0
    assert max(sizes()) < (len(keys) / 8 if names[0][0] != "写" else len(keys))
    assert len(asked) <= 15 * 22


def test_any_listing_is_divided_or_is_one_key() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        keys = sorted({WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(1, 12))})
        start = keys[rng.integers(0, len(keys))]
        left = [key for key in keys if key >= start]
        limit = split_point(looking(keys, []), (start, None))
        if limit is None:  # what is left begins with its first key
            assert all(key.startswith(left[0][:-1]) for key in left)
        else:
            assert left[0] < limit <= left[-1]
    assert split_point(looking([], []), ("", None)) is None
