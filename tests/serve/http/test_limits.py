"""Bounds by their arithmetic: clocks are numbers, and the line is looked at from inside."""

from __future__ import annotations

import asyncio

import pytest

from serve.http.limits import Admission, Bucket, ByteBudget, Deadline, Quota
from serve.http.problems import Problem


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_bucket_holds_a_minute_and_fills_evenly() -> None:
    clock = Clock()
    bucket = Bucket(6, clock)
    assert [bucket.take(1) for _ in range(6)] == [0.0] * 6
    assert bucket.take(1) == pytest.approx(10)
    clock.now = 9.9
    assert bucket.take(1) == pytest.approx(0.1)
    clock.now = 10
    assert bucket.take(1) == 0
    clock.now = 10_000  # never more than a minute's worth
    assert [bucket.take(1) for _ in range(6)] == [0.0] * 6
    assert bucket.take(1) > 0
    assert bucket.take(7) == float("inf")


def test_shares_of_a_bucket_together_are_the_bucket() -> None:
    clock = Clock()
    shares = [Bucket(6, clock) for _ in range(3)]
    for share in shares:
        share.share(3)
    assert sum(share.take(1) == 0 for share in shares for _ in range(6)) == 6
    assert shares[0].take(1) == pytest.approx(30)  # two a minute
    clock.now = 60
    assert shares[0].take(6) == 0  # a large one from a full share, which pays it off before the next
    assert shares[0].take(1) == pytest.approx(150)
    shares[0].share(1)
    assert shares[0].take(1) == pytest.approx(50)
    assert shares[0].take(7) == float("inf")


def test_shares_of_a_line_follow_the_number_of_gateways() -> None:
    async def run() -> None:
        line = Admission(2, 5)
        line.share(8, 3)
        assert (line.slots, line.queue) == (3, 2)
        held = [line.slot(Deadline(60)) for _ in range(5)]
        entering = [asyncio.ensure_future(one.__aenter__()) for one in held]
        await asyncio.sleep(0)
        assert (line.num_working, line.num_waiting) == (3, 2)
        line.share(8, 2)  # a gateway has ended: one of those that wait begins
        await asyncio.sleep(0)
        assert (line.num_working, line.num_waiting, line.queue) == (4, 1, 3)
        line.share(8, 8)  # more have come: slots are given up as requests end
        for one in held[:3]:
            await one.__aexit__(None, None, None)
        assert (line.slots, line.num_working, line.num_waiting) == (1, 1, 1)
        await held[3].__aexit__(None, None, None)
        await asyncio.gather(*entering)
        await held[4].__aexit__(None, None, None)
        assert (line.num_working, line.num_waiting) == (0, 0)

    asyncio.run(run())


def test_bucket_without_a_limit_gives_always() -> None:
    assert Bucket(None, Clock()).take(1e9) == 0


def test_quota_says_when_to_come_again() -> None:
    clock = Clock()
    quota = Quota(2, 1.5, clock)
    quota.take_request()
    quota.take_request()
    with pytest.raises(Problem) as refused:
        quota.take_request()
    assert (refused.value.status, refused.value.retry_after_s) == (429, pytest.approx(30))
    quota.take_pixels(1_000_000)
    with pytest.raises(Problem) as refused:
        quota.take_pixels(1_000_000)
    assert (refused.value.status, refused.value.retry_after_s) == (429, pytest.approx(20))
    with pytest.raises(Problem) as refused:
        quota.take_pixels(2_000_000)
    assert (refused.value.status, refused.value.retry_after_s) == (413, None)


def test_budget_counts_bytes_of_all_requests() -> None:
    budget = ByteBudget(10)
    budget.take(6)
    with pytest.raises(Problem) as refused:
        budget.take(5)
    assert (refused.value.status, refused.value.retry_after_s) == (503, 1)
    budget.give_back(6)
    budget.take(10)
    assert budget.used == 10


@pytest.mark.parametrize("header", ["0", "0.09", "-1", "nan", "inf", "601", "soon", ""])
def test_deadline_must_be_seconds_within_the_limit(header: str) -> None:
    with pytest.raises(Problem) as refused:
        Deadline.asked(header, 60, 600)
    assert refused.value.status == 422


def test_deadline_counts_down() -> None:
    clock = Clock()
    deadline = Deadline(5, clock)
    clock.now = 3
    assert deadline.left_s == 2
    assert 599 < Deadline.asked("600", 60, 600).left_s <= 600
    assert 0 < Deadline.asked("0.1", 60, 600).left_s <= 0.1
    assert 59 < Deadline.asked(None, 60, 600).left_s <= 60


def test_line_is_first_come_first_served_and_bounded() -> None:
    async def play() -> list[object]:
        admission, told = Admission(1, 2), list[object]()
        gate = asyncio.Event()

        async def visit(name: str) -> None:
            try:
                async with admission.slot(Deadline(60)):
                    told.append(name)
                    await gate.wait()
            except Problem as problem:
                told.append((name, problem.status, (problem.retry_after_s or 0) >= 1))

        visits = [asyncio.create_task(visit(name)) for name in "abcd"]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (admission.num_working, admission.num_waiting) == (1, 2)
        gate.set()
        await asyncio.gather(*visits)
        assert (admission.num_working, admission.num_waiting) == (0, 0)
        return told

    assert asyncio.run(play()) == ["a", ("d", 503, True), "b", "c"]


def test_line_gives_up_the_turn_of_who_left_or_ran_out_of_time() -> None:
    async def play() -> tuple[str, int, int]:
        admission, gate = Admission(1, 8), asyncio.Event()

        async def visit(deadline: Deadline) -> str:
            async with admission.slot(deadline):
                await gate.wait()
                return "served"

        first = asyncio.create_task(visit(Deadline(60)))
        await asyncio.sleep(0)
        gone = asyncio.create_task(visit(Deadline(60)))
        late = asyncio.create_task(visit(Deadline(0.05)))
        last = asyncio.create_task(visit(Deadline(60)))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(Problem, match="the deadline passed while the request waited"):
            await late
        gate.set()
        answers = await asyncio.gather(first, last)
        assert answers == ["served", "served"]
        return answers[1], admission.num_working, admission.num_waiting

    assert asyncio.run(play()) == ("served", 0, 0)


def test_line_refuses_at_once_who_would_wait_too_long() -> None:
    clock = Clock()

    async def play() -> None:
        admission = Admission(1, 8, clock)
        async with admission.slot(Deadline(60)):
            clock.now = 10  # a request takes ten seconds, as far as is known
        async with admission.slot(Deadline(60)):
            admission.check(10.5)
            with pytest.raises(Problem) as refused:
                admission.check(9.5)
            assert refused.value.status == 503

    asyncio.run(play())
