"""A bulk job put together, with a scheduler that does what a test wants in place of Ray."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from pipelines.bulk import driver as driver_module
from pipelines.bulk.job import Job, UpscaleOptions, run_job
from pipelines.bulk.stages import StageOptions
from pipelines.bulk.sweep import Inputs, Sweep
from pipelines.ledger import ledger
from pipelines.ledger.ledger import Row

OPTIONS = UpscaleOptions(model="nearest-x4", identity="nearest-x4", scale=4)
Work = Callable[[Callable[[Sequence[Row]], None]], Coroutine[Any, Any, None]]


class NoEngine:
    num_replicas = 0
    is_closed = False

    async def start(self) -> None: ...

    async def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Work], None]:
    """Return a function that runs a job whose scheduler is `work(finished)`. Its outputs go to `tmp_path`."""

    def run(work: Work) -> None:
        def scheduler(*arguments: Any, **_: Any) -> Any:
            finished = arguments[4]
            return SimpleNamespace(
                run=lambda: work(finished), is_idle=False, replica_times={}, share=0.0, resize=mock.Mock()
            )

        monkeypatch.setattr(driver_module, "capacity", lambda *_: {"num_cpus": 1, "object_store_bytes": 1})
        monkeypatch.setattr(driver_module, "BulkRun", scheduler)
        progress: Any = mock.Mock()
        engine: Any = NoEngine()
        progress.counts = Counter[str]()
        progress.megapixels = 0.0
        job = Job(source="/photos", stages=StageOptions(outputs=OPTIONS, target=str(tmp_path)))
        sweep = Sweep(Inputs(source="/photos"), job.stages, iter([]))
        sweep.has_work()
        try:
            run_job(job, sweep, engine, progress)
        finally:
            assert engine.is_closed

    return run


def test_a_row_reaches_the_ledger_while_the_job_runs(
    run: Callable[[Work], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else has to finish for that. The ten seconds of the ledger pass a hundred times faster here."""
    clock = SimpleNamespace(monotonic=lambda: 100 * time.monotonic(), time=time.time, time_ns=time.time_ns)
    monkeypatch.setattr(ledger, "time", clock)
    seen: list[str] = []

    async def work(finished: Callable[[Sequence[Row]], None]) -> None:
        finished([ledger.row("a", "1", "ok")])
        until = time.monotonic() + 20
        while not seen and time.monotonic() < until:
            await asyncio.sleep(0.05)
            seen.extend(ledger.read(str(tmp_path))["key"].to_pylist())

    run(work)
    assert seen == ["a"]


@pytest.mark.parametrize(
    ("number", "raised"),
    [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, asyncio.CancelledError)],
    ids=["Ctrl-C", "SIGTERM"],
)
def test_rows_of_a_job_that_is_stopped_are_in_the_ledger(
    number: signal.Signals, raised: type[BaseException], run: Callable[[Work], None], tmp_path: Path
) -> None:
    # In a process that was started in the background of a script SIGINT is ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    stopped_at = 0.0

    async def work(finished: Callable[[Sequence[Row]], None]) -> None:
        nonlocal stopped_at
        finished([ledger.row("a", "1", "ok")])
        stopped_at = time.monotonic()
        signal.raise_signal(number)
        await asyncio.sleep(600)  # a unit that would take longer than anybody waits

    with pytest.raises(raised):
        run(work)
    assert time.monotonic() - stopped_at < 300
    (row,) = ledger.read(str(tmp_path)).to_pylist()
    assert (row["key"], row["status"], bool(row["run"])) == ("a", "ok", True)
