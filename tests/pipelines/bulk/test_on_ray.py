"""The scheduler and its engine on a real Ray: rows, pixels, replicas that come, and replicas that end."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipelines.bulk.engine import Engine, EngineError, EngineOptions
from pipelines.bulk.scheduler import BulkOptions, BulkRun, ReplicaTime
from pipelines.bulk.selection import WorkItem, Worklist
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.bulk.sweep import Inputs
from pipelines.ledger.digests import DigestSet, OwnerMap
from pipelines.ledger.ledger import Known, Row
from resshift import images
from serve import engine as serve_engine
from serve.engine import ServeEngine

# Starting a replica is what takes the time: a test says how many it starts.
pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]
JOB = UpscaleOptions(model="nearest-x4", identity="nearest-x4", scale=4)


def engine_options(low: int = 1, high: int = 1, identity: str = "nearest-x4") -> EngineOptions:
    """Return options of replicas that take 0.3 s for a picture of `tree`."""
    return EngineOptions(
        model="nearest-x4@150", identity=identity, low=low, high=high, num_cpus=0.5, upscale_s=0.3
    )


def run_bulk(
    source: Path, target: Path, engine: Engine, options: BulkOptions, enough_replicas: int | None = None
) -> tuple[dict[str, Row], dict[int, ReplicaTime]]:
    """Run the scheduler over a folder and return its rows by key, and the time of its replicas by process id.

    With `enough_replicas` the listing ends early, when so many have answered.
    """
    rows: list[Row] = []

    async def run() -> dict[int, ReplicaTime]:
        worklist = Worklist(
            Inputs(source=str(source)).entries(), Known(DigestSet(), OwnerMap(), Counter()), JOB.output_key, 4
        )

        def listed() -> Iterator[tuple[list[WorkItem], list[Row]]]:
            for items, refused in worklist.batches():
                for i in range(0, len(items), 4):
                    if enough_replicas is not None and len(bulk.replica_times) >= enough_replicas:
                        return
                    yield items[i : i + 4], []
                yield [], refused

        stages = StageOptions(outputs=JOB, target=str(target))
        bulk = BulkRun(
            listed(), stages, engine, options, rows.extend, num_cpus=2, object_store_bytes=300 << 20
        )
        try:
            await engine.start()
            await bulk.run()
        finally:
            await engine.close()
        return bulk.replica_times

    times = asyncio.run(run())
    by_key = {row["key"]: row for row in rows}
    assert len(by_key) == len(rows)
    return by_key, times


def test_replicas_come_when_work_waits_and_every_input_has_its_own_pixels(tree: Path, tmp_path: Path) -> None:
    """Two replicas. There is work for two minutes or until the second one answers: how long a process takes
    to start is not what is tested.
    """
    for i in range(400):
        shutil.copy(tree / "class0" / "0.png", tree / f"more{i:03}.png")
    rows, times = run_bulk(
        tree,
        tmp_path / "out",
        ServeEngine(engine_options(low=1, high=2)),
        BulkOptions(unit_pictures=1, fetch_pictures=4),
        enough_replicas=2,
    )
    assert len(times) == 2
    assert {key for key, row in rows.items() if row["status"] != "ok"} == {"broken.png"}
    for key, row in rows.items():
        if row["status"] == "ok":
            source = images.decode((tree / key).read_bytes()).pixels
            written = images.decode((tmp_path / "out" / row["output"]).read_bytes()).pixels
            assert (written == source.repeat(4, axis=0).repeat(4, axis=1)).all()


def test_a_picture_that_kills_replicas_is_charged_and_its_neighbours_are_not(
    tree: Path, tmp_path: Path
) -> None:
    """One replica is killed in company, one alone, and a third one does what may be left by then."""
    engine = PoisonedEngine(engine_options(), "class1/3.png")
    options = BulkOptions(unit_pictures=4, fetch_pictures=4, max_deaths=1)
    rows, times = run_bulk(tree, tmp_path / "out", engine, options)
    assert len(rows) == 11
    assert len(times) in (2, 3)
    assert (rows["class1/3.png"]["status"], rows["class1/3.png"]["reason"]) == ("failed", "killed_worker")
    assert sum(row["status"] == "ok" for row in rows.values()) == 9


def test_a_replica_that_cannot_start_ends_the_job(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three replicas, one after the other."""
    monkeypatch.setattr(serve_engine, "_PATIENCE_S", 0.0)
    engine = ServeEngine(engine_options(identity="another"))
    told = "this node has another nearest-x4@150: nearest-x4 instead of another"
    with pytest.raises(EngineError, match=f"^the Serve application resshift-another does not run: {told}$"):
        run_bulk(tree, tmp_path / "out", engine, BulkOptions())


class PoisonedEngine(ServeEngine):
    """Kills the replica that is given one certain picture, as a fault of a driver would."""

    def __init__(self, options: EngineOptions, poison: str) -> None:
        super().__init__(options)
        self._poison = poison

    async def upscale(
        self, options: Any, keys: Sequence[str], inputs: Sequence[Any], *, alone: bool
    ) -> AsyncGenerator[Any]:
        stream = super().upscale(options, keys, inputs, alone=alone)
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
