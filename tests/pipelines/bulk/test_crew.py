"""Drivers that share a job, in one process and without Ray: rows do not depend on how many there are, nor on
one that ends; a pass that was stopped lists what is open.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from pipelines.bulk import crew as crew_module
from pipelines.bulk import driver as driver_module
from pipelines.bulk import scheduler, sweep
from pipelines.bulk.driver import Driver
from pipelines.bulk.job import close_job, run_job
from pipelines.bulk.progress import JobProgress
from pipelines.bulk.request import BulkRequest
from pipelines.bulk.settings import BulkSettings, WorkSettings
from pipelines.bulk.stages import StageOptions
from pipelines.bulk.sweep import Sweep
from pipelines.bulk.worker import Started, Upscaled
from pipelines.ledger import ledger
from pipelines.ledger.ledger import Row
from resshift import storage
from resshift.storage import Entry

TIMES = {"run", "written_at", "seconds", "model_seconds", "attempts"}


class Ref:
    """A reference whose value is there."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0.0002).__await__()
        return self.value


class Model:
    """An engine whose results are the inputs."""

    num_replicas = 1
    is_starving = True

    async def start(self) -> None: ...

    async def start_shared(self, num_drivers: int) -> Callable[[], Any]:
        del num_drivers
        return Model

    async def close(self) -> None: ...

    async def wait_for_slot(self) -> None: ...

    async def upscale(
        self, options: Any, keys: Sequence[str], inputs: Sequence[Any], *, alone: bool
    ) -> AsyncGenerator[Any]:
        del options, alone
        yield Ref(Started(1, 0.0))
        assert set(keys) <= {key for parcel in inputs for key in parcel.value}
        yield Ref(list(keys))
        yield Ref([Upscaled("", "", 0.01, 0.0) for _ in keys])


class Actor:
    """A driver in this process that is called as an actor is."""

    all: list[Actor]

    def __init__(self, *arguments: Any) -> None:
        self.driver, self.is_dead, self.id = Driver(*arguments), False, len(Actor.all)
        self.running: asyncio.Task[Any] | None = None
        Actor.all.append(self)

    def __getattr__(self, method: str) -> Any:
        loop = asyncio.get_running_loop()
        return SimpleNamespace(remote=lambda *arguments: loop.create_task(self._call(method, arguments)))

    async def _call(self, method: str, arguments: Sequence[Any]) -> Any:
        if self.is_dead:
            raise ActorDiedError
        if method != "run":
            await asyncio.sleep(0)
            return getattr(self.driver, method)(*arguments)
        self.running = asyncio.get_running_loop().create_task(self.driver.run())
        try:
            return await self.running
        except asyncio.CancelledError:
            raise ActorDiedError from None

    def kill(self) -> None:
        self.is_dead = True
        if self.running is not None:
            self.running.cancel()


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let stages answer in this process; return the keys whose outputs are made, in their order."""
    made: list[str] = []
    Actor.all = []

    def prepare(items: Sequence[Any], options: StageOptions) -> list[Ref]:
        rows = [(item.row(options.outputs.identity) | {"seconds": 0.0}, 100, 300, 0) for item in items]
        return [Ref(rows), Ref([item.key for item in items])]

    def store(rows: Sequence[Row], options: StageOptions, *results: Ref) -> Ref:
        del options, results
        made.extend(row["key"] for row in rows)
        return Ref([ledger.failed(row, "corrupt", "") if "broken" in row["key"] else row for row in rows])

    for name, call in (("_prepare", prepare), ("_store", store)):
        task = SimpleNamespace(remote=call)
        task.options = lambda task=task, **_: task
        monkeypatch.setattr(scheduler, name, task)
    monkeypatch.setattr(driver_module, "capacity", lambda *_: {"num_cpus": 4, "object_store_bytes": 1 << 30})
    monkeypatch.setattr(crew_module, "start_actor", Actor)
    monkeypatch.setattr(crew_module, "kill_actor", Actor.kill)
    monkeypatch.setattr(crew_module, "_LOOK_S", 0.02)
    return made


def run(request: BulkRequest, num_drivers: int) -> tuple[list[Row], Sweep]:
    """Run a job to its end; return its rows by key, without times, and the pass."""
    job = request.job()
    found = request.sweep(job, request.entries())
    if found.has_work():
        engine: Any = Model()
        progress = JobProgress(found.counts)
        run_job(job, found, engine, progress, num_drivers)
        assert progress.is_listed
        assert progress.counts.total() == found.counts.pending + found.counts.refused
    close_job(job, found)
    rows: list[Any] = [row for part in ledger.parts(request.target) for row in part.to_pylist()]
    return sorted(rows, key=lambda row: row["key"]), found


def timeless(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def folder_of(root: Path, num: int) -> None:
    """Write files some of which compete for names, are no pictures, or stand at the limits of ranges."""
    names = [f"{i % 7}-{i % 3}/img {i:04}.png" for i in range(num)]
    names += ["0-1.png", "0-1.jpg", "3.jpg", "3.png", "3-0.b/x.png", "5-1/a.png", "5-1/a.jpg", "5-1/a.webp"]
    names += ["2-2/broken.jpg", "2-2/broken.png", "4-1/note.txt", "6-0/IMG.cr2", "6-0/IMG.jpg", "m\udcff.png"]
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"photo")


@pytest.mark.slow
def test_rows_are_the_same_with_one_driver_and_with_three(outputs: list[str], tmp_path: Path) -> None:
    """Each input once; and the ranges were divided: at least two drivers made something."""
    folder_of(tmp_path / "in", 900)
    found: dict[int, list[dict[str, Any]]] = {}
    for num_drivers in (1, 3):
        request = BulkRequest(
            source=str(tmp_path / "in"), target=str(tmp_path / str(num_drivers)), model="nearest-x4"
        )
        rows, _ = run(request, num_drivers)
        assert Counter(row["key"] for row in rows).most_common(1)[0][1] == 1
        found[num_drivers] = timeless(rows)
        assert len(outputs) == len(set(outputs))
        outputs.clear()
    assert found[3] == found[1]
    assert len(found[1]) == 900 + 14
    assert Counter(row["reason"] for row in found[1])["name_collision"] == 4
    assert len(Actor.all) == 3
    made = [actor.driver.state().counts.total() for actor in Actor.all]
    assert sum(made) == 900 + 14
    assert sorted(made)[-2] > 60  # the third may come when all is done: this engine takes no time


@pytest.mark.slow
def test_ranges_of_a_driver_that_ends_go_to_others(
    outputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two are killed when they have made some: nothing is lost, no row is there twice, and what is made twice
    is what was in no part of the ledger.
    """
    folder_of(tmp_path / "in", 900)
    original = Driver.write

    def write(driver: Driver, rows: Sequence[Row]) -> None:
        actor = next(actor for actor in Actor.all if actor.driver is driver)
        if not actor.is_dead:
            original(driver, rows)
        if actor.id < 2 and driver.progress.counts.total() > 100:
            actor.is_dead = True
            loop.call_soon_threadsafe(actor.kill)

    monkeypatch.setattr(Driver, "write", write)
    starting = crew_module.start_actor

    def start(*arguments: Any) -> Any:
        nonlocal loop
        loop = asyncio.get_running_loop()
        return starting(*arguments)

    loop: Any = None
    monkeypatch.setattr(crew_module, "start_actor", start)
    request = BulkRequest(source=str(tmp_path / "in"), target=str(tmp_path / "out"), model="nearest-x4")
    rows, _ = run(request, 3)
    assert len(Actor.all) == 5
    assert sorted(row["key"] for row in rows) == sorted({row["key"] for row in rows})
    assert len(rows) == 900 + 14
    assert {row["status"] for row in rows if row["key"].startswith("1-")} == {"ok"}
    assert len(outputs) - len(set(outputs)) < 600


def interrupted(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the next run end with an error when so many rows are in the ledger."""
    original = Driver.write
    written = 0

    def write(driver: Driver, rows: Sequence[Row]) -> None:
        nonlocal written
        original(driver, rows)
        written += len(rows)
        if written >= after:
            raise storage.StorageError("/out", storage.StorageReason.FULL, "No space left on device")

    monkeypatch.setattr(Driver, "write", write)


@pytest.mark.slow
@pytest.mark.parametrize("num_drivers", [1, 3])
def test_a_pass_that_was_stopped_lists_only_what_is_open(
    num_drivers: int, outputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next pass lists everything again, and finds what is new. Rows are those of one run."""
    monkeypatch.setattr(sweep, "_WORTH_CURSORS", 100)
    folder_of(tmp_path / "in", 900)
    # Small units: with hundreds in each, all pictures may be under way when the pass is stopped.
    small = BulkSettings(work=WorkSettings(unit_pictures=8, fetch_pictures=8))
    request = BulkRequest(
        source=str(tmp_path / "in"), target=str(tmp_path / "out"), model="nearest-x4", settings=small
    )
    with monkeypatch.context() as patch:
        interrupted(patch, 500)
        with pytest.raises(storage.StorageError, match="No space left"):
            run(request, num_drivers)
    expected = [storage.printable_key(entry.key) for entry in storage.list_entries(request.source)]
    kept = json.loads((tmp_path / "out" / "_resshift" / "cursors.json").read_text())
    num_written = ledger.read(request.target).num_rows
    assert num_written > 400
    finished = kept["finished"]
    assert finished[0][0] == ""

    listed: list[str] = []
    original = storage.list_entries

    def list_entries(root: str, *arguments: Any) -> Iterator[Entry]:
        for entry in original(root, *arguments):
            if root == request.source:
                listed.append(entry.key)
            yield entry

    first = tmp_path / "in" / "0-0" / "img 0000 new.png"
    first.write_bytes(b"photo")
    outputs.clear()
    with monkeypatch.context() as patch:
        patch.setattr(storage, "list_entries", list_entries)
        rows, continued = run(request, num_drivers)
    assert continued.num_continued
    assert len(set(listed)) < 750
    assert len(outputs) <= 914 - num_written
    assert {row["key"] for row in rows} ^ set(expected) == set()
    assert len(rows) == 914
    assert not (tmp_path / "out" / "_resshift" / "cursors.json").exists()
    rows, again = run(request, 1)
    assert (again.counts.pending, again.counts.done, len(rows)) == (1, 914, 915)


def test_names_across_folders_and_lists_of_keys_are_for_one_driver(
    outputs: list[str], tmp_path: Path
) -> None:
    del outputs
    folder_of(tmp_path / "in", 10)
    (tmp_path / "keys.txt").write_text("0-0/img 0000.png\n")
    whole = BulkRequest(source=str(tmp_path / "in"), target=str(tmp_path / "out"), model="nearest-x4")
    others = [
        BulkRequest(source=whole.source, target=whole.target, model="nearest-x4", name="{stem}.{ext}"),
        BulkRequest(
            source=whole.source, target=whole.target, model="nearest-x4", keys=str(tmp_path / "keys.txt")
        ),
    ]
    assert whole.sweep(whole.job(), whole.entries()).is_divisible
    assert [one.sweep(one.job(), one.entries()).is_divisible for one in others] == [False, False]
