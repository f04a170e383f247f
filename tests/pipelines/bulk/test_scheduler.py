"""The scheduler without Ray: stages answer in this process and fail as Ray says they do, on a clock of the
test.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import (
    ActorDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from pipelines.bulk import scheduler
from pipelines.bulk.parcels import FEW, Underway
from pipelines.bulk.scheduler import Budget, BulkOptions, BulkRun, ReplicaTime, busy_share
from pipelines.bulk.selection import Batch, WorkItem
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.bulk.worker import Started, Upscaled
from pipelines.ledger.ledger import Row, failed
from resshift.storage import StorageError, StorageReason

Fault = Callable[[str], BaseException | None]
JOB = UpscaleOptions(model="nearest-x4", identity="nearest-x4", scale=4)


class Ref:
    """A reference whose value is there, or whose task failed."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        if isinstance(self.value, BaseException):
            raise self.value
        return self.value


class Stages:
    """The tasks and the engine of a run. `fault(stage)` returns what ends a call, or None.

    Calls are kept as (stage, keys) in their order. The model takes `seconds` of `now` for each picture, of
    which `ahead` may be under way at a time. A fault ends a unit when two pictures are answered, or at its
    last one.
    """

    @staticmethod
    def ends_at(keys: Sequence[str]) -> int:
        """Return the number of the picture at which a fault ends a unit."""
        return min(2, len(keys) - 1)

    num_replicas = 1
    is_starving = True

    def __init__(self, fault: Fault, seconds: float = 0.0, ahead: int = 1) -> None:
        self.fault, self.seconds, self.ahead = fault, seconds, ahead
        self.now = 0.0
        self.calls: list[tuple[str, list[str]]] = []
        self.alone: list[str] = []
        self.stored_at: list[float] = []
        self.bulk: BulkRun | None = None

    def units(self, stage: str = "upscale") -> list[str]:
        """Return the keys of each call of a stage, put together."""
        return ["".join(keys) for called, keys in self.calls if called == stage]

    def _begin(self, stage: str, keys: list[str]) -> BaseException | None:
        self.calls.append((stage, keys))
        return self.fault(stage)

    def prepare(self, items: Sequence[WorkItem], options: StageOptions) -> list[Ref]:
        error = self._begin("prepare", [item.key for item in items])
        answers = [(item.row(options.outputs.identity) | {"seconds": 0.0}, 100, 300, 0) for item in items]
        return [Ref(error or answers), Ref([item.key for item in items])]

    def store(self, rows: Sequence[Row], options: StageOptions, *results: Ref) -> Ref:
        del options
        assert [row["key"] for row in rows] == [key for result in results for key in result.value]
        self.stored_at.append(self.now)
        return Ref(self._begin("store", [row["key"] for row in rows]) or list(rows))

    async def start(self) -> None: ...

    async def start_shared(self, num_drivers: int) -> Callable[[], Any]:
        del num_drivers
        return lambda: self

    async def close(self) -> None: ...

    async def wait_for_slot(self) -> None: ...

    async def upscale(
        self, options: Any, keys: Sequence[str], inputs: Sequence[Any], *, alone: bool
    ) -> AsyncGenerator[Any]:
        """Answer as a replica does; an error is in the place of a result, as Ray puts it."""
        del options
        assert set(keys) <= {key for parcel in inputs for key in parcel.value}
        if alone:
            self.alone.extend(keys)
        error, group = self._begin("upscale", list(keys)), list[str]()
        yield Ref(Started(1, 0.0, self.ahead))
        for i, key in enumerate(keys):
            for _ in range(5):  # what is ready runs before the time of the model passes
                await asyncio.sleep(0)
            self.now += self.seconds
            if error is not None and i == self.ends_at(keys):
                yield Ref(error)
                return
            group.append(key)
            if len(keys) <= FEW or i == len(keys) - 1:
                yield Ref(group)
                yield Ref([Upscaled("", "", self.seconds, self.now) for _ in group])
                group = []


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Row]]:
    """Return a function that runs a job over one-letter keys, `run(stages, "abc")`, and returns its rows.
    `more` are the keys that follow from rows.
    """

    def run(
        stages: Stages, keys: str, options: BulkOptions | None = None, more: str = "", **settle: Any
    ) -> dict[str, Row]:
        for name, call in (("_prepare", stages.prepare), ("_store", stages.store)):
            task = SimpleNamespace(remote=call)
            task.options = lambda task=task, **_: task
            monkeypatch.setattr(scheduler, name, task)
        monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: stages.now))
        items = [WorkItem(key, f"/{key}", "e", 300, f"{key}_x4") for key in keys]
        rows: list[Row] = []

        async def play() -> None:
            bulk = BulkRun(
                iter([(items, [])]),
                StageOptions(outputs=JOB, target=str(tmp_path)),
                stages,
                options or BulkOptions(),
                rows.extend,
                num_cpus=2,
                object_store_bytes=1_000_000,
                **settle,
            )
            stages.bulk = bulk
            await asyncio.wait_for(bulk.run(), 20)
            assert bulk.budget.used == 0

        asyncio.run(play())
        assert sorted(row["key"] for row in rows) == sorted(keys + more)
        return {row["key"]: row for row in rows}

    return run


def no_fault(stage: str) -> None:
    del stage


def times(count: int, stage: str, error: BaseException) -> Fault:
    """Return a fault that ends the first `count` calls of a stage."""
    left = [error] * count

    def fault(called: str) -> BaseException | None:
        return left.pop() if called == stage and left else None

    return fault


def task_error(cause: Exception) -> RayTaskError:
    """Return what Ray raises when a task could not run to its end because of `cause`."""
    return RayTaskError("task", "Traceback of the task", cause)


LOST = ObjectLostError("a1", b"", "")
# What a lost node leaves behind.
NOBODYS = {
    "an object is lost": LOST,
    "the owner of an object died": OwnerDiedError("a1", b"", ""),
    "a task lost its input": task_error(LOST),
    "a task was on the node": NodeDiedError("the node is dead or unavailable"),
    "the node was taken back": RayActorError(preempted=True),
}
SOMEBODYS = {
    "a worker crashed": WorkerCrashedError(),
    "a replica died": ActorDiedError(),
    "a replica was killed": RayActorError(),
    "a worker had no memory": OutOfMemoryError("a worker was ended"),
    "a task lost its worker": task_error(WorkerCrashedError()),
}


@pytest.mark.parametrize("stage", ["prepare", "upscale", "store"])
@pytest.mark.parametrize("error", NOBODYS.values(), ids=NOBODYS)
def test_a_lost_node_is_not_charged_to_a_picture(
    error: BaseException, stage: str, run: Callable[..., dict[str, Row]]
) -> None:
    """Alone and cut off more often than any picture may be that ends its workers."""
    stages = Stages(times(5, stage, error))
    row = run(stages, "a", BulkOptions(max_deaths=2))["a"]
    assert (row["status"], row["attempts"]) == ("ok", 6)


@pytest.mark.parametrize("stage", ["prepare", "upscale", "store"])
@pytest.mark.parametrize("error", SOMEBODYS.values(), ids=SOMEBODYS)
def test_a_picture_that_ends_its_workers_alone_is_charged(
    error: BaseException, stage: str, run: Callable[..., dict[str, Row]]
) -> None:
    """A task is a process of its own; a replica may have had other units, and is had alone the next time."""
    stages = Stages(times(5, stage, error))
    row = run(stages, "a", BulkOptions(max_deaths=2))["a"]
    attempts = 3 if stage == "upscale" else 2
    assert (row["status"], row["reason"]) == ("failed", "killed_worker")
    assert f"2 workers ended while they had this input alone, {attempts} attempts in all: " in row["message"]
    assert len(stages.units(stage)) == attempts


def test_one_death_less_than_allowed_is_forgiven(run: Callable[..., dict[str, Row]]) -> None:
    stages = Stages(times(3, "upscale", ActorDiedError()))
    assert run(stages, "a", BulkOptions(max_deaths=3))["a"]["status"] == "ok"


@pytest.mark.parametrize("stage", ["prepare", "upscale", "store"])
def test_a_death_in_company_is_charged_to_nobody(stage: str, run: Callable[..., dict[str, Row]]) -> None:
    """Whoever it was is found when each is tried alone. A unit of one is in company at its replica too."""
    single = run(Stages(times(1, "upscale", WorkerCrashedError())), "a", BulkOptions(max_deaths=1))
    assert single["a"]["status"] == "ok"
    rows = run(Stages(times(1, stage, WorkerCrashedError())), "abc", BulkOptions(max_deaths=1))
    assert {row["status"] for row in rows.values()} == {"ok"}


def test_what_a_lost_node_took_keeps_its_company(run: Callable[..., dict[str, Row]]) -> None:
    """Nobody is suspected: what was answered is stored, the rest is one unit again."""
    stages = Stages(times(1, "upscale", LOST))
    rows = run(stages, "abcd", BulkOptions(unit_pictures=4))
    assert stages.units() == ["abcd", "cd"]
    assert sorted(stages.units("store")) == ["ab", "cd"]
    assert [rows[key]["attempts"] for key in "abcd"] == [1, 1, 2, 2]


@pytest.mark.parametrize(("ahead", "alone"), [(1, "c"), (2, "cd"), (8, "cdef")])
def test_only_what_was_under_way_is_tried_alone(
    ahead: int, alone: str, run: Callable[..., dict[str, Row]]
) -> None:
    """A unit of six ends its replica when two pictures are answered."""
    stages = Stages(times(1, "upscale", ActorDiedError()), ahead=ahead)
    rows = run(stages, "abcdef", BulkOptions(unit_pictures=6))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert sorted(unit for unit in stages.units() if len(unit) == 1) == sorted(alone)
    assert sorted(stages.alone) == sorted(alone)
    assert {key for unit in stages.units()[1:] if len(unit) > 1 for key in unit} == set("cdef") - set(alone)


def test_a_cluster_that_loses_everything_is_not_fed_forever(run: Callable[..., dict[str, Row]]) -> None:
    row = run(Stages(times(10_000, "upscale", LOST)), "a")["a"]
    assert (row["status"], row["reason"]) == ("failed", "killed_worker")
    assert "0 workers ended while they had this input alone, 20 attempts in all" in row["message"]


@pytest.mark.parametrize("stage", ["prepare", "upscale", "store"])
def test_a_programming_error_ends_the_run(stage: str, run: Callable[..., dict[str, Row]]) -> None:
    error = task_error(KeyError("a"))
    with pytest.raises(RayTaskError) as caught:
        run(Stages(times(1, stage, error)), "ab")
    assert caught.value is error


@pytest.mark.parametrize(
    ("seconds", "units", "stored_at"),
    [
        pytest.param(0.5, ["abcdefg"], [3.5], id="fast: once, at the end of the unit"),
        pytest.param(2.0, ["abc", "def", "g"], [6, 12, 14], id="every five seconds, and the rest at the end"),
        pytest.param(6.0, list("abcdefg"), [6, 12, 18, 24, 30, 36, 42], id="slow: one by one"),
    ],
)
def test_results_of_slow_pictures_do_not_wait_for_their_unit(
    seconds: float, units: list[str], stored_at: list[float], run: Callable[..., dict[str, Row]]
) -> None:
    stages = Stages(no_fault, seconds)
    run(stages, "abcdefg", BulkOptions(unit_pictures=7))
    assert stages.units("store") == units
    assert stages.stored_at == stored_at


def test_what_was_handed_on_is_not_done_again_after_a_death(run: Callable[..., dict[str, Row]]) -> None:
    stages = Stages(times(1, "upscale", ActorDiedError()), seconds=6.0)
    rows = run(stages, "abcd", BulkOptions(unit_pictures=4))
    assert stages.units("store") == ["a", "b", "c", "d"]
    assert [rows[key]["attempts"] for key in "abcd"] == [1, 1, 2, 2]


def letters(num: int) -> str:
    """Return so many keys of one letter."""
    return "".join(chr(0x4E00 + i) for i in range(num))


class Busy(Stages):
    """Has room for two units, as a replica has."""

    num_units = 0

    async def wait_for_slot(self) -> None:
        while self.num_units == 2:
            await asyncio.sleep(0)

    async def upscale(
        self, options: Any, keys: Sequence[str], inputs: Sequence[Any], *, alone: bool
    ) -> AsyncGenerator[Any]:
        self.num_units += 1
        try:
            async for ref in super().upscale(options, keys, inputs, alone=alone):
                yield ref
        finally:
            self.num_units -= 1


class Slow(Stages):
    """Tells how far its pictures are, before each result."""

    shares: list[float]

    async def upscale(
        self, options: Any, keys: Sequence[str], inputs: Sequence[Any], *, alone: bool
    ) -> AsyncGenerator[Any]:
        assert self.bulk is not None
        self.shares = []
        stream = super().upscale(options, keys, inputs, alone=alone)
        yield await anext(stream)
        for key in keys:
            for share in (0.25, 0.75):
                yield Ref([])
                yield Ref([Underway(((key, share),))])
                self.shares.append(self.bulk.share)
            yield await anext(stream)
            told = await anext(stream, None)
            if told is None:  # the fault
                return
            yield told
            self.shares.append(self.bulk.share)


def test_how_far_slow_pictures_are_is_known(run: Callable[..., dict[str, Row]]) -> None:
    """One that is done counts as a whole until it is stored, which is at the end of its unit here."""
    stages = Slow(no_fault)
    run(stages, "ab")
    assert stages.shares == [0.25, 0.75, 1.0, 1.25, 1.75]
    assert stages.bulk is not None
    assert stages.bulk.share == 0


def test_how_far_a_picture_was_is_forgotten_with_its_replica(run: Callable[..., dict[str, Row]]) -> None:
    stages = Slow(times(1, "upscale", ActorDiedError()))
    run(stages, "a")
    assert stages.shares == [0.25, 0.75]  # of the second attempt


class Sized(Stages):
    """Its pictures have so many pixels by key, or 100."""

    sizes: Mapping[str, int] = {"b": 90_000, "d": 400}

    def prepare(self, items: Sequence[WorkItem], options: StageOptions) -> list[Ref]:
        answers, names = super().prepare(items, options)
        sized = [
            (row, self.sizes.get(item.key, num_pixels), *rest)
            for item, (row, num_pixels, *rest) in zip(items, answers.value, strict=True)
        ]
        return [Ref(sized), names]


def test_small_pictures_of_a_unit_do_not_wait_for_large_ones(run: Callable[..., dict[str, Row]]) -> None:
    stages = Sized(no_fault)
    run(stages, "abcde")
    assert stages.units() == ["acedb"]


def test_small_pictures_travel_in_hundreds(run: Callable[..., dict[str, Row]]) -> None:
    """600 of 5 ms each. Units are of eight until the speed of the model is known."""
    stages = Busy(no_fault, seconds=0.005)
    rows = run(stages, letters(600))
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert [len(keys) for keys in stages.units("prepare")] == [256, 256, 88]
    sizes = [len(keys) for keys in stages.units()]
    assert sizes[:2] == [8, 8]
    assert 200 < max(sizes) <= 256
    assert len(sizes) <= 6
    assert len(stages.units("store")) == len(sizes)


@pytest.mark.parametrize(("seconds", "expected"), [(0.1, 19), (1.0, 8)])
def test_units_of_slow_pictures_are_short(
    seconds: float, expected: int, run: Callable[..., dict[str, Row]]
) -> None:
    """Nobody waits long for a unit, and a death costs little."""
    stages = Busy(no_fault, seconds=seconds)
    run(stages, letters(60))
    assert max(len(keys) for keys in stages.units()) == expected


class Poisoned(Busy):
    """A picture ends every worker of a stage that has it."""

    def __init__(self, stage: str, poison: str) -> None:
        super().__init__(no_fault, seconds=0.001)
        self.stage, self.poison = stage, poison

    def ends_at(self, keys: Sequence[str]) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        return keys.index(self.poison)

    def _begin(self, stage: str, keys: list[str]) -> BaseException | None:
        super()._begin(stage, keys)
        return ActorDiedError() if stage == self.stage and self.poison in keys else None


@pytest.mark.parametrize("stage", ["prepare", "upscale", "store"])
def test_a_picture_among_hundreds_that_ends_workers_is_found(
    stage: str, run: Callable[..., dict[str, Row]]
) -> None:
    """Once among many, once among a few, then alone; the many are never tried one by one."""
    keys = letters(500)
    poison = keys[300]
    stages = Poisoned(stage, poison)
    rows = run(stages, keys, BulkOptions(max_deaths=2))
    assert {key for key, row in rows.items() if row["status"] != "ok"} == {poison}
    assert rows[poison]["reason"] == "killed_worker"
    with_it = [len(unit) for unit in stages.units(stage) if poison in unit]
    assert with_it[0] > 8
    assert 1 < with_it[1] <= 8
    assert with_it[2:] == [1, 1]
    alone = [unit for unit in stages.units(stage) if len(unit) == 1]
    assert len(alone) <= 2 + (7 if stage != "upscale" else 0)


def test_a_death_among_many_charges_nobody(run: Callable[..., dict[str, Row]]) -> None:
    keys = letters(300)
    faults = iter([None, None, ActorDiedError()])
    stages = Busy(lambda stage: next(faults, None) if stage == "upscale" else None, seconds=0.001)
    rows = run(stages, keys, BulkOptions(max_deaths=1))
    assert len(stages.units()[2]) > 100
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert not stages.alone
    assert {row["attempts"] for row in rows.values()} == {1, 2}


class Leaving(Stages):
    """A fetch task does ten inputs at most."""

    def prepare(self, items: Sequence[WorkItem], options: StageOptions) -> list[Ref]:
        return super().prepare(items[:10], options)


def test_what_a_fetch_task_leaves_is_fetched_by_another(run: Callable[..., dict[str, Row]]) -> None:
    stages = Leaving(no_fault)
    rows = run(stages, letters(35))
    assert {(row["status"], row["attempts"]) for row in rows.values()} == {("ok", 1)}
    assert len(stages.units("prepare")) == 4
    assert sorted("".join(stages.units("prepare"))) == sorted(letters(35))


def test_a_budget_admits_one_and_then_what_fits() -> None:
    async def play() -> list[str]:
        budget, told = Budget(10), list[str]()
        await budget.reserve(50)  # larger than all of it, and alone

        async def second() -> None:
            await budget.reserve(4)
            told.append("second")

        task = asyncio.create_task(second())
        await asyncio.sleep(0.01)
        told.append("before")
        await budget.adjust(-50)
        await task
        return told

    assert asyncio.run(play()) == ["before", "second"]


@pytest.mark.parametrize(("in_flight_mb", "expected"), [(None, [400, 800]), (1, [1_000_000, 1_000_000])])
def test_a_run_works_with_what_the_cluster_has_become(
    tmp_path: Path, in_flight_mb: float | None, expected: list[int]
) -> None:
    stages = StageOptions(outputs=JOB, target=str(tmp_path))
    engine = Stages(lambda _: None)
    options = BulkOptions(in_flight_mb=in_flight_mb)
    bulk = BulkRun(iter([]), stages, engine, options, list[Row]().extend, num_cpus=0, object_store_bytes=1000)
    seen = [(bulk.num_tasks, bulk.budget.limit)]
    bulk.resize(num_cpus=30, object_store_bytes=2000)
    seen.append((bulk.num_tasks, bulk.budget.limit))
    assert seen == [(1, expected[0]), (30, expected[1])]


def test_busy_share_is_model_time_over_wall_clock() -> None:
    assert busy_share([ReplicaTime(0.0, 10.0, 9.0), ReplicaTime(5.0, 10.0, 4.5)]) == pytest.approx(0.9)
    assert busy_share([]) is None


class Refusing(Stages):
    """Writes no output of "b"."""

    def store(self, rows: Sequence[Row], options: StageOptions, *results: Ref) -> Ref:
        stored = super().store(rows, options, *results).value
        return Ref([failed(row, "corrupt", "") if row["key"] == "b" else row for row in stored])


def test_inputs_that_follow_from_a_row_are_done_in_the_same_run(run: Callable[..., dict[str, Row]]) -> None:
    """ "z" waits for the name of "b", and "C" for that of "c"."""

    def settle(row: Row) -> Batch:
        after_b = [WorkItem("z", "/z", "e", 300, "b_x4")] if row["key"] == "b" else []
        after_c = [failed({**row, "key": "C"}, "name_collision", "")] if row["key"] == "c" else []
        return after_b, after_c

    rows = run(Refusing(no_fault), "abc", settle=settle, more="zC")
    expected = {"a": "ok", "b": "failed", "z": "ok", "c": "ok", "C": "failed"}
    assert {key: row["status"] for key, row in rows.items()} == expected


def test_a_destination_that_cannot_be_written_ends_the_run_without_a_row(
    run: Callable[..., dict[str, Row]], caplog: pytest.LogCaptureFixture
) -> None:
    full = StorageError("/out/c_x4.png", StorageReason.FULL, "No space left on device")
    stages = Stages(times(1, "store", RayTaskError("_store", "traceback", full)))
    gc.collect()
    caplog.clear()  # what other tests left behind
    with pytest.raises(StorageError, match=r"/out/c_x4.png: full: No space left on device$"):
        run(stages, "abc")
    assert len(stages.units("store")) == 1
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == []
