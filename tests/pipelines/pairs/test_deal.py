"""Every rank gets its blocks in their order, and no more are taken than somebody waits for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipelines.pairs.deal import Deal


def test_block_k_goes_to_rank_k_mod_n_whoever_asks_first() -> None:
    deal = Deal(iter(range(1, 1001)), 8)

    def all_of(rank: int) -> list[int]:
        found: list[int] = []
        while (block := deal.next(rank)) is not None:
            found.append(block)
        return found

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(all_of, range(8)))
    assert found == [list(range(1 + rank, 1001, 8)) for rank in range(8)]
    assert [deal.next(rank) for rank in range(8)] == [None] * 8


def test_a_rank_whose_block_is_there_waits_for_nobody() -> None:
    """The fourth block never comes, for which rank 0 waits."""
    coming = threading.Event()

    def blocks() -> Iterator[str]:
        yield from ("a", "b", "c")
        assert coming.wait(60)

    deal = Deal(blocks(), 3)
    assert deal.next(0) == "a"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(deal.next, 0)
        assert [deal.next(1), deal.next(2)] == ["b", "c"]
        assert not waiting.done()
        coming.set()
        assert waiting.result(60) is None


def test_blocks_are_taken_only_while_a_rank_waits() -> None:
    taken: list[int] = []
    deal = Deal((taken.append(i) or i for i in range(100)), 2)
    assert deal.next(1) == 1
    assert deal.next(0) == 0
    assert taken == [0, 1]
    assert deal.next(0) == 2
    assert taken == [0, 1, 2]


def test_an_error_comes_after_all_blocks_before_and_to_every_rank() -> None:
    def blocks() -> Iterator[int]:
        yield from range(3)
        raise OSError("the store is gone")

    deal = Deal(blocks(), 2)
    assert [deal.next(0), deal.next(0), deal.next(1)] == [0, 2, 1]
    for rank in (0, 1):
        with pytest.raises(OSError, match="the store is gone"):
            deal.next(rank)


def test_a_deal_is_over_when_every_rank_has_been_told() -> None:
    deal = Deal(iter("ab"), 2)
    assert [deal.next(0), deal.next(0)] == ["a", None]
    assert not deal.is_over  # rank 1 has yet to take its block
    assert deal.next(1) == "b"
    assert not deal.is_over
    assert deal.next(1) is None
    assert deal.is_over
