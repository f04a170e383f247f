"""Scheduler and engines on a real Ray: every input has one row and its own pixels, and deaths are charged."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from pipelines.bulk.actors import ActorEngine, Engine, EngineError, EngineOptions
from pipelines.bulk.job import entries
from pipelines.bulk.scheduler import BulkOptions, BulkRun, ReplicaTime
from pipelines.bulk.selection import Item, Selection, Worklist
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.bulk.worker import Started
from pipelines.ledger.digests import DigestSet, OwnerMap
from pipelines.ledger.ledger import Known, Row
from resshift import images
from serve.engine import ServeEngine

Encode = Callable[..., bytes]
# One cluster, few replicas: starting them is what takes the time.
pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]
JOB = UpscaleOptions(model="nearest-x4", identity="nearest-x4", scale=4)


def run_bulk(
    source: Path, target: Path, engine: Engine, unit_pictures: int = 4, enough_replicas: int | None = None
) -> tuple[list[Row], dict[int, ReplicaTime]]:
    """Run the scheduler over a folder and return its rows, and the time of its replicas by process id.

    With `enough_replicas` the listing ends early, when so many have answered.
    """
    rows: list[Row] = []

    async def run() -> dict[int, ReplicaTime]:
        worklist = Worklist(
            entries(str(source), Selection()), Known(DigestSet(), OwnerMap(), Counter()), JOB.output_key, 4
        )
        stages = StageOptions(job=JOB, target=str(target))
        options = BulkOptions(unit_pictures=unit_pictures, fetch_pictures=4)

        def listed() -> Iterator[tuple[list[Item], list[Row]]]:
            for items, refused in worklist.batches():
                for i in range(0, len(items), 4):
                    if enough_replicas is not None and len(bulk.replica_times) >= enough_replicas:
                        return
                    yield items[i : i + 4], []
                yield [], refused

        bulk = BulkRun(
            listed(), stages, engine, options, rows.append, num_cpus=2, object_store_bytes=300 << 20
        )
        try:
            await engine.start()
            await bulk.run()
        finally:
            await engine.close()
        return bulk.replica_times

    return rows, asyncio.run(run())


@pytest.mark.parametrize("kind", [ActorEngine, ServeEngine])
def test_every_input_has_one_row_and_its_own_pixels(
    kind: Callable[[EngineOptions], Engine], tree: Path, tmp_path: Path
) -> None:
    engine = kind(EngineOptions(model="nearest-x4", identity="nearest-x4", num_cpus=0.5))
    rows, _ = run_bulk(tree, tmp_path / "out", engine)
    assert Counter(row["status"] for row in rows) == {"ok": 10, "failed": 1}
    assert len({row["key"] for row in rows}) == 11
    for row in rows:
        if row["status"] == "ok":
            source = images.decode((tree / row["key"]).read_bytes()).pixels
            written = images.decode((tmp_path / "out" / row["output"]).read_bytes()).pixels
            assert (written == source.repeat(4, axis=0).repeat(4, axis=1)).all()


def test_a_picture_that_kills_replicas_is_charged_and_its_neighbours_are_not(
    tree: Path, tmp_path: Path
) -> None:
    engine = PoisonedEngine(
        EngineOptions(model="nearest-x4@150", identity="nearest-x4", num_cpus=0.5), "class1/3.png"
    )
    rows = {row["key"]: row for row in run_bulk(tree, tmp_path / "out", engine)[0]}
    assert len(rows) == 11
    assert (rows["class1/3.png"]["status"], rows["class1/3.png"]["reason"]) == ("failed", "killed_worker")
    assert "2 workers ended while they had this input alone" in rows["class1/3.png"]["message"]
    assert sum(row["status"] == "ok" for row in rows.values()) == 9


def test_all_that_may_have_been_under_way_are_tried_alone(tree: Path, tmp_path: Path) -> None:
    """Pictures that share calls: the last of a unit ends the replica before any is answered, and is found
    at the first retry.
    """
    engine = SharedPoisonEngine(EngineOptions(model="nearest-x4", identity="nearest-x4", num_cpus=0.5))
    rows = {row["key"]: row for row in run_bulk(tree, tmp_path / "out", engine)[0]}
    assert (rows[engine.poison]["status"], rows[engine.poison]["reason"]) == ("failed", "killed_worker")
    assert sum(row["status"] == "ok" for row in rows.values()) == 9
    assert engine.kept_company == [True, False, False]


@pytest.mark.parametrize("kind", [ActorEngine, ServeEngine])
def test_replicas_come_when_work_waits(
    kind: Callable[[EngineOptions], Engine], encode: Encode, tmp_path: Path
) -> None:
    """There is work for two minutes or until the second replica answers: how long a process takes to
    start is not what is tested.
    """
    (tmp_path / "photos").mkdir()
    encoded = encode(0, 10, 10)
    for i in range(400):
        (tmp_path / "photos" / f"{i:03}.png").write_bytes(encoded)
    options = EngineOptions(
        model="nearest-x4@3000", identity="nearest-x4", low=1, high=2, num_cpus=0.5, upscale_s=0.3
    )
    rows, times = run_bulk(
        tmp_path / "photos", tmp_path / "out", kind(options), unit_pictures=1, enough_replicas=2
    )
    assert len(times) == 2
    assert {row["status"] for row in rows} == {"ok"}


def test_a_replica_that_cannot_start_ends_the_job(tree: Path, tmp_path: Path) -> None:
    engine = ActorEngine(EngineOptions(model="nearest-x4", identity="another", num_cpus=0.5))
    with pytest.raises(EngineError, match="another nearest-x4: nearest-x4 instead of another"):
        run_bulk(tree, tmp_path / "out", engine)


class PoisonedEngine(ActorEngine):
    """Kills the replica that is given one certain picture, as a fault of a driver would."""

    def __init__(self, options: EngineOptions, poison: str) -> None:
        super().__init__(options)
        self._poison = poison

    async def upscale(self, options: Any, keys: Sequence[str], inputs: Sequence[Any]) -> AsyncGenerator[Any]:
        stream = super().upscale(options, keys, inputs)
        replica = number = 0
        async for ref in stream:
            if number == 0:
                replica = (await ref).replica
            # Started, then two answers a picture: with this one, everything before the poison is through.
            if self._poison in keys and number == 2 * list(keys).index(self._poison):
                await ref
                os.kill(replica, signal.SIGKILL)
            yield ref
            number += 1


class SharedPoisonEngine(ActorEngine):
    """Says that all pictures of a unit may be under way at a time; the last one of the first unit of several
    kills its replicas.
    """

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self.poison = ""
        self.kept_company: list[bool] = []  # whether others were in the unit, of every kill

    async def upscale(self, options: Any, keys: Sequence[str], inputs: Sequence[Any]) -> AsyncGenerator[Any]:
        stream = super().upscale(options, keys, inputs)
        started: Started = await (await anext(stream))
        yield ray.put(replace(started, ahead=len(keys)))
        if not self.poison and len(keys) > 1:
            self.poison = keys[-1]
        if self.poison in keys:
            self.kept_company.append(len(keys) > 1)
            os.kill(started.replica, signal.SIGKILL)
            raise RayActorError
        async for ref in stream:
            yield ref
