"""Bulk upscaling, put together: selection, scheduler, engine, ledger, progress, report.

    listing -> Worklist -> BulkRun(engine) -> LedgerWriter, Progress -> report

`jobs/upscale.py` calls `run_job`, and so may any program: it needs a connected Ray and an engine that is not
started. `run_job_in_loop` is the same for a program with an event loop, such as the job keeper of `serve`;
`close_job` writes what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import platform
import secrets
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from pipelines.bulk.engine import Engine, EngineOptions, check_memory, replica_resources
from pipelines.bulk.progress import JobProgress
from pipelines.bulk.scheduler import BulkOptions, BulkRun, busy_share
from pipelines.bulk.selection import Selection, Worklist, listed_keys
from pipelines.bulk.settings import EngineSettings
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.cluster.admission import Patience
from pipelines.cluster.capacity import reachable
from pipelines.ledger import ledger
from pipelines.ledger.ledger import LedgerWriter, Row
from pipelines.ledger.report import JobSummary, RunRecord, write_report, write_run
from resshift import storage
from resshift.storage import Entry, s3
from resshift.storage.s3 import S3Options

__all__ = ["Job", "UpscaleOptions", "close_job", "engine_options", "entries", "run_job", "run_job_in_loop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """Everything about a run but its engine.

    Fields:
        source: SRC.
        stages: What is made, and where.
        bulk: How the work is cut.
    """

    source: str
    stages: StageOptions
    bulk: BulkOptions = field(default_factory=BulkOptions)

    @property
    def outputs(self) -> UpscaleOptions:
        """What is made."""
        return self.stages.outputs

    def record(self) -> dict[str, Any]:
        """Return what job.json says."""
        return self.outputs.record(self.source)


def entries(
    source: str, selection: Selection, keys: Iterable[str] | None = None, options: S3Options = s3.DEFAULT
) -> Iterator[Entry]:
    """Stream the selected inputs of the listing, or of a list of keys."""
    found = storage.list_entries(source, options) if keys is None else listed_keys(source, keys, options)
    return filter(selection.matcher(), found)


def engine_options(job: UpscaleOptions, replicas: tuple[int, int], settings: EngineSettings) -> EngineOptions:
    """Return what replicas are started with on the connected cluster: a GPU each where there are any, else a
    share of a machine's cores.

    Raises:
        WeightsError: No node has the memory for the weights of the model.
    """
    check_memory(job.model)
    num_gpus, num_threads = replica_resources(settings.num_gpus, replicas[1])
    return EngineOptions(
        model=job.model,
        identity=job.identity,
        low=replicas[0],
        high=replicas[1],
        num_gpus=num_gpus,
        num_cpus=settings.num_cpus,
        num_threads=num_threads,
        upscale_s=settings.upscale_s,
        downscale_s=settings.downscale_s,
        step_s=settings.step_s,
    )


_LOOK_EVERY_S = 5.0  # seconds between two looks at the size of the cluster


def _capacity() -> dict[str, int]:
    """Return `num_cpus` and `object_store_bytes` of a run: all CPUs that the cluster can have, and the memory
    that it has.
    """
    resources = reachable()
    return {
        "num_cpus": int(resources.get("CPU", 1)),
        "object_store_bytes": int(resources.get("object_store_memory", 1 << 30)),
    }


def run_job(job: Job, worklist: Worklist, engine: Engine, progress: JobProgress) -> RunRecord:
    """Run the job to its end. Rows of finished inputs are in the ledger when this returns or raises, even
    after Ctrl-C or SIGTERM.

    Raises:
        EngineError: No replica can be started.
        StorageError: The listing or the ledger cannot be read or written.
        KeyboardInterrupt: The user pressed Ctrl-C.
    """
    return asyncio.run(run_job_in_loop(job, worklist, engine, progress))


def close_job(job: Job, worklist: Worklist, price_per_hour: float | None = None) -> JobSummary:
    """Write the rows of inputs that a worklist without work refused, and the report; return its figures.

    Raises:
        StorageError: The ledger or the report cannot be read or written.
    """
    target, options = job.stages.target, job.stages.target_s3
    for _, refused in worklist.batches():
        ledger.append(target, refused, options)
    return write_report(target, job.record(), price_per_hour, options)


async def run_job_in_loop(job: Job, worklist: Worklist, engine: Engine, progress: JobProgress) -> RunRecord:
    """Do as `run_job` in a running loop. Cancelling it stops the job; when it has stopped, what is done is in
    the ledger.
    """
    target, options = job.stages.target, job.stages.target_s3
    run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    started = time.time()

    def write(rows: Sequence[Row]) -> None:
        ledger.append(target, rows, options)

    writer = LedgerWriter(write)

    patience = Patience("no picture has been finished")
    patience.waits()

    def finished(row: Row) -> None:
        patience.waits()
        progress.count(row)
        writer.add({**row, "run": run})

    bulk = BulkRun(
        worklist.batches(), job.stages, engine, job.bulk, finished, settle=worklist.settle, **_capacity()
    )
    replica_seconds = 0.0

    async def watch() -> None:
        nonlocal replica_seconds
        last = looked_at = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            replica_seconds, last = replica_seconds + engine.num_replicas * (now - last), now
            progress.watch(engine.num_replicas, bulk.is_listed)
            writer.flush_if_due()
            if now - looked_at > _LOOK_EVERY_S:
                bulk.resize(**await asyncio.to_thread(_capacity))  # asks the head of the cluster
                looked_at = now

    # `ray job stop` sends SIGTERM and kills three seconds later, time enough for the rows that are here.
    this = asyncio.current_task()
    assert this is not None
    # Outside the main thread the caller handles signals.
    with contextlib.suppress(RuntimeError, ValueError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    watching = asyncio.get_running_loop().create_task(watch())
    try:
        await engine.start()
        await bulk.run()
    finally:
        patience.close()
        watching.cancel()
        progress.is_listed = bulk.is_listed
        await asyncio.shield(asyncio.to_thread(writer.close))
        await engine.close()
    facts = {
        "engine": type(engine).__name__.removesuffix("Engine").lower(),
        "replicas seen": str(len(bulk.replica_times)),
        "ray": ray.__version__,
        "python": platform.python_version(),
        "host": platform.node(),
    }
    share = busy_share(list(bulk.replica_times.values()))
    record = RunRecord(
        run=run,
        started=started,
        ended=time.time(),
        replica_seconds=replica_seconds,
        busy_share=share,
        facts=facts,
    )
    write_run(target, record, options)
    return record
