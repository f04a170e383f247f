"""Bulk upscaling, put together: pass over the inputs, drivers, engine, progress, report.

    Sweep -> Crew -> Driver (Worklist -> BulkRun(engine) -> LedgerWriter) -> report

`jobs/upscale.py` calls `run_job`, and so may any program: it needs a connected Ray and an engine that is not
started. `run_job_in_loop` is the same for a program with an event loop, such as the job keeper of `serve`;
`close_job` ends a pass that is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import platform
import secrets
import signal
import time

import ray

from pipelines.bulk.crew import Crew
from pipelines.bulk.driver import Job
from pipelines.bulk.engine import Engine, EngineOptions, check_memory, replica_resources
from pipelines.bulk.progress import JobProgress
from pipelines.bulk.scheduler import busy_share
from pipelines.bulk.settings import EngineSettings
from pipelines.bulk.stages import UpscaleOptions
from pipelines.bulk.sweep import Sweep
from pipelines.cluster.admission import Patience, free
from pipelines.ledger import ledger
from pipelines.ledger.pictures import Places
from pipelines.ledger.report import JobSummary, RunRecord, write_report, write_run

__all__ = [
    "Job",
    "UpscaleOptions",
    "close_job",
    "default_drivers",
    "engine_options",
    "run_job",
    "run_job_in_loop",
]

_REPLICAS_OF_A_DRIVER = 8

logger = logging.getLogger(__name__)


def engine_options(
    job: UpscaleOptions, replicas: tuple[int, int], settings: EngineSettings, num_drivers: int = 1
) -> EngineOptions:
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
        reserved_cpus=1 + (num_drivers if num_drivers > 1 else 0),
        step_s=settings.step_s,
    )


def default_drivers(replicas: int) -> int:
    """Return how many drivers keep so many replicas busy: each schedules some hundred pictures a second, a
    thousand small ones, and eight replicas seldom do more.
    """
    return -(-replicas // _REPLICAS_OF_A_DRIVER)


def admitted_drivers(
    num_drivers: int, sweep: Sweep, replicas: tuple[int, int], settings: EngineSettings
) -> int:
    """Return how many drivers the job has, at most as many as were asked for: as many as its listing can be
    divided for and as there are CPUs for beside the fewest replicas and a task. One needs none of its own.
    """
    most, why = num_drivers, ""
    if num_drivers == 1:
        return 1
    if not sweep.is_divisible:
        most, why = 1, "inputs of a list (--keys), or of different folders (--name), may want one name"
    else:
        left = free()["CPU"] - replicas[0] * settings.num_cpus - 1
        most, why = min(num_drivers, max(1, int(left))), "no CPU for more"
    if most < num_drivers:
        logger.warning("drivers=%d instead of %d: %s", most, num_drivers, why)
    return most


def run_job(job: Job, sweep: Sweep, engine: Engine, progress: JobProgress, num_drivers: int = 1) -> RunRecord:
    """Run the job to its end. Rows of finished inputs are in the ledger when this returns or raises, even
    after Ctrl-C or SIGTERM.

    Args:
        job: The job.
        sweep: The pass over its inputs.
        engine: An engine that is not started.
        progress: What is shown.
        num_drivers: Number of drivers. One works in this process, several are actors.

    Raises:
        EngineError: No replica can be started.
        StorageError: The listing or the ledger cannot be read or written.
        KeyboardInterrupt: The user pressed Ctrl-C.
    """
    return asyncio.run(run_job_in_loop(job, sweep, engine, progress, num_drivers))


def close_job(job: Job, sweep: Sweep, price_per_hour: float | None = None) -> JobSummary:
    """End a pass that is complete: write the rows of inputs that were refused without any work, and the
    report; return its figures.

    Raises:
        StorageError: The ledger or the report cannot be read or written.
    """
    stages = job.stages
    target, options = stages.target, stages.target_s3
    ledger.append(target, sweep.close(), options)
    places = Places(job.source, target, stages.source_s3, options)
    return write_report(target, job.record(), price_per_hour, options, places)


async def run_job_in_loop(
    job: Job, sweep: Sweep, engine: Engine, progress: JobProgress, num_drivers: int = 1
) -> RunRecord:
    """Do as `run_job` in a running loop. Cancelling it stops the job; when it has stopped, what is done is in
    the ledger.
    """
    run = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    started = time.time()
    patience = Patience("no picture has been finished")
    patience.waits()
    crew = Crew(job, sweep, engine, run, progress, num_drivers, patience.waits)
    replica_seconds = 0.0

    async def watch() -> None:
        nonlocal replica_seconds
        last = time.monotonic()
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            replica_seconds, last = replica_seconds + crew.num_replicas * (now - last), now
            progress.watch(crew.num_replicas, crew.is_listed)

    # `ray job stop` sends SIGTERM and kills three seconds later, time enough for the rows that are here.
    this = asyncio.current_task()
    assert this is not None
    # Outside the main thread the caller handles signals.
    with contextlib.suppress(RuntimeError, ValueError):
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    watching = asyncio.get_running_loop().create_task(watch())
    try:
        await crew.work()
    finally:
        patience.close()
        watching.cancel()
        progress.is_listed = crew.is_listed
        await asyncio.shield(asyncio.to_thread(sweep.save))
        if not crew.is_alone:
            await engine.close()
    facts = {
        "replicas seen": str(len(crew.replica_times)),
        "ray": ray.__version__,
        "python": platform.python_version(),
        "host": platform.node(),
    }
    if not crew.is_alone:
        facts["drivers"] = str(num_drivers)
    record = RunRecord(
        run=run,
        started=started,
        ended=time.time(),
        replica_seconds=replica_seconds,
        busy_share=busy_share(list(crew.replica_times.values())),
        facts=facts,
    )
    write_run(job.stages.target, record, job.stages.target_s3)
    return record
