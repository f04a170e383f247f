"""Jobs of an endpoint: bulk jobs, and pictures that are answered later. One keeper has them all, and its
records outlive it.

    STATE/jobs/ID.json            the record: owner, request and state of a job
    STATE/pictures/ID/in, mask, out     bodies of a picture that is answered later

A bulk job is `jobs/upscale.py` without the command line: the same checks, scheduler, engine, ledger and
report. What it has done is in the ledger at its target, so a restarted keeper continues every job that had
not ended. Records are single atomic writes, made before the client is told of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # the one that pydantic takes below Python 3.12

from pipelines.bulk.engine import Engine, EngineError, most_replicas
from pipelines.bulk.job import Job, close_job, engine_options, run_job_in_loop
from pipelines.bulk.progress import JobProgress, ProgressSnapshot
from pipelines.bulk.request import BulkRequest
from pipelines.command import UsageError
from pipelines.ledger import ledger
from pipelines.ledger.lease import Lease, Occupied
from resshift import storage
from resshift.config import OptionError
from resshift.images import Format
from resshift.models import WeightsError, cache_directory
from resshift.storage import StorageError
from serve.engine import ServeEngine
from serve.http.limits import Deadline
from serve.http.options import BulkBody, PictureOptions
from serve.http.problems import Problem, option_problem
from serve.models import find_model
from serve.pictures import PictureService
from serve.settings import ServeSettings

_logger = logging.getLogger(__name__)
Kind = Literal["bulk", "picture"]
State = Literal["queued", "running", "complete", "complete_with_failures", "failed", "cancelled"]
_ENDED = ("complete", "complete_with_failures", "failed", "cancelled")
_REPORTS = {"json": "application/json", "csv": "text/csv; charset=utf-8", "html": "text/html; charset=utf-8"}
_OCCUPIED_S = 30.0  # seconds between two attempts at a target where another run works
_PICTURE_S = 3600.0  # no client waits for a picture that is answered later


@dataclass(slots=True)
class JobRecord:
    """One job.

    Fields:
        id: Name of the job in addresses.
        kind: What was asked for.
        owner: Name of the API key that made the job; nobody else sees it.
        created, ended: Unix times.
        request: Options as they were asked for.
        state: Where the job stands.
        idempotency_key: Key that the client gave the request.
        message: What went wrong, or what the job waits for.
        counts: Rows of a bulk job that ended, by status and reason.
        result: Content type, sizes, notes and seconds of a picture that is done.
    """

    id: str
    kind: Kind
    owner: str
    created: float
    request: dict[str, Any]
    state: State = "queued"
    idempotency_key: str = ""
    ended: float | None = None
    message: str = ""
    counts: dict[str, int] = field(default_factory=dict[str, int])
    result: dict[str, Any] = field(default_factory=dict[str, Any])


class JobView(TypedDict):
    """A job as its owner sees it: the answer of `GET /v1/jobs/{id}`.

    Fields:
        id, kind, state, created, ended, request, message, counts, result: See `JobRecord`.
        progress: State of a bulk job that runs.
    """

    id: str
    kind: Kind
    state: State
    created: float
    ended: float | None
    request: dict[str, Any]
    message: NotRequired[str]
    progress: NotRequired[ProgressSnapshot]
    counts: NotRequired[dict[str, int]]
    result: NotRequired[dict[str, Any]]


class JobKeeper:
    """Takes jobs, runs some of them at a time, and keeps their records.

    Args:
        settings: Settings of the endpoint.
        pictures: Service that upscales the pictures that are answered later.
    """

    def __init__(self, settings: ServeSettings, pictures: PictureService) -> None:
        self.settings, self.pictures = settings, pictures
        self.state = settings.jobs.state or str(cache_directory() / "serve")
        self.records: dict[str, JobRecord] = {}
        self._progress: dict[str, JobProgress] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._slots = {kind: asyncio.Semaphore(settings.jobs.running) for kind in ("bulk", "picture")}
        self._started = asyncio.Lock()
        self._is_started = False

    async def start(self) -> None:
        """Read the records and continue the jobs that had not ended; the first caller waits for it."""
        async with self._started:
            if self._is_started:
                return
            for record in await asyncio.to_thread(self._load):
                self.records[record.id] = record
                if record.state not in _ENDED:
                    self._spawn(record)
            self._is_started = True

    async def close(self) -> None:
        """Stop without ending any job: the records stay as they are, and the next keeper continues them."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _load(self) -> list[JobRecord]:
        try:
            entries = list(storage.list_entries(storage.join(self.state, "jobs")))
        except StorageError as error:
            if error.reason is not storage.StorageReason.MISSING:
                raise
            return []
        return [
            JobRecord(**json.loads(storage.read_bytes(entry.uri)))
            for entry in entries
            if entry.key.endswith(".json")
        ]

    async def _save(self, record: JobRecord) -> None:
        data = (json.dumps(asdict(record), indent=1) + "\n").encode()
        await _write(storage.join(self.state, f"jobs/{record.id}.json"), data, "application/json")

    def _blob(self, record: JobRecord, name: str) -> str:
        return storage.join(self.state, f"pictures/{record.id}/{name}")

    async def submit_bulk(self, body: BulkBody, owner: str, idempotency_key: str = "") -> JobView:
        """Take a bulk job; return its view.

        Raises:
            Problem: forbidden, bad_option, conflict, busy, reused_key.
        """
        await self.start()
        asked = body.model_dump(mode="json")
        if known := self._known("bulk", owner, idempotency_key, asked):
            return self._view(known)
        for uri, prefixes, name in (
            (body.source, self.settings.jobs.sources, "source"),
            (body.target, self.settings.jobs.targets, "target"),
            (body.masks, self.settings.jobs.sources, "masks"),
        ):
            if uri is not None:
                check_prefix(uri, prefixes, name)
        find_model(self.pictures.models, body.model)
        for record in self.records.values():
            if (
                record.kind == "bulk"
                and record.state not in _ENDED
                and storage.is_inside(body.target, record.request["target"])
            ):
                raise Problem("conflict", f"a job that has not ended writes to {body.target}")
        await asyncio.to_thread(self._checked, body)
        return await self._take("bulk", owner, idempotency_key, asked)

    def _checked(self, body: BulkBody) -> tuple[BulkRequest, Job]:
        """Return what a body asks for, checked as the command checks it.

        Raises:
            Problem: bad_option, conflict.
        """
        try:
            request = body.request(
                next(iter(self.pictures.models)),
                self.settings.limits.megapixels,
                self.settings.jobs.bulk,
                self.settings.faces,
            )
            return request, request.job()
        except OptionError as error:
            raise option_problem(error) from None
        except ledger.JobMismatch as error:
            raise Problem("conflict", str(error)) from None
        except (StorageError, WeightsError) as error:
            raise Problem("bad_option", str(error)) from None

    async def submit_picture(
        self,
        data: bytes,
        options: PictureOptions,
        format: Format,
        owner: str,
        idempotency_key: str = "",
        mask: bytes = b"",
    ) -> JobView:
        """Take a picture that is answered later; return the view of its job.

        Raises:
            Problem: busy, reused_key.
        """
        await self.start()
        asked = options.model_dump(mode="json") | {"format": format} | ({"mask": True} if mask else {})
        if known := self._known("picture", owner, idempotency_key, asked):
            return self._view(known)
        bodies = {"in": data} | ({"mask": mask} if mask else {})
        return await self._take("picture", owner, idempotency_key, asked, bodies)

    def _known(
        self, kind: str, owner: str, idempotency_key: str, asked: Mapping[str, Any]
    ) -> JobRecord | None:
        if not idempotency_key:
            return None
        for record in self.records.values():
            if (record.owner, record.idempotency_key) == (owner, idempotency_key):
                if record.kind != kind or record.request != asked:
                    raise Problem(
                        "reused_key",
                        f"the key {idempotency_key[:80]!r} belongs to job {record.id}, which asked for "
                        "something else",
                    )
                return record
        return None

    async def _take(
        self,
        kind: Kind,
        owner: str,
        idempotency_key: str,
        asked: dict[str, Any],
        bodies: Mapping[str, bytes] | None = None,
    ) -> JobView:
        num_open = sum(record.kind == kind and record.state not in _ENDED for record in self.records.values())
        if num_open >= self.settings.jobs.waiting + self.settings.jobs.running:
            raise Problem("busy", f"{num_open} jobs wait already", retry_after_s=30)
        record = JobRecord(
            secrets.token_hex(8), kind, owner, time.time(), asked, idempotency_key=idempotency_key
        )
        self.records[record.id] = (
            record  # before anything is awaited: a second request with the same key finds it
        )
        try:
            for name, data in (bodies or {}).items():
                await _write(self._blob(record, name), data)
            await self._save(record)
        except BaseException:
            await self._forget(record)
            raise
        self._spawn(record)
        return self._view(record)

    def _spawn(self, record: JobRecord) -> None:
        task = self._tasks[record.id] = asyncio.get_running_loop().create_task(self._run(record))
        task.add_done_callback(lambda _: self._tasks.pop(record.id, None))

    async def _run(self, record: JobRecord) -> None:
        work = self._run_bulk if record.kind == "bulk" else self._run_picture
        try:
            async with self._slots[record.kind]:
                record.state = "running"
                await self._save(record)
                record.state = await work(record)
        except asyncio.CancelledError:
            if record.id not in self._cancelled:
                raise  # the keeper itself ends; the next one continues the job
            record.state = "cancelled"
        except (EngineError, StorageError, Problem, UsageError) as error:
            record.state, record.message = "failed", str(error)
        except Exception:
            # The boundary of a job: one must not end the others. The traceback goes to the log, not to the
            # client.
            _logger.exception("job=%s failed", record.id)
            record.state, record.message = "failed", "internal server error; see the server log"
        await self._end(record)

    async def _end(self, record: JobRecord) -> None:
        record.ended = time.time()
        await self._save(record)

    async def _run_bulk(self, record: JobRecord) -> State:
        body = BulkBody.model_validate(record.request)
        request, job = await asyncio.to_thread(self._checked, body)
        while True:
            lease = Lease(request.target, request.settings.target)
            try:
                await asyncio.to_thread(lease.take)
                record.message = ""
                return await self._work(record, request, job)
            except Occupied as error:
                record.message = f"{error}. This job waits"
            finally:
                await asyncio.shield(asyncio.to_thread(lease.release))
            await asyncio.sleep(_OCCUPIED_S)

    async def _work(self, record: JobRecord, request: BulkRequest, job: Job) -> State:
        entries = await asyncio.to_thread(request.entries)
        sweep = await asyncio.to_thread(request.sweep, job, entries)
        await asyncio.to_thread(ledger.begin_job, request.target, job.record(), request.settings.target)
        if await asyncio.to_thread(sweep.has_work):
            progress = self._progress[record.id] = JobProgress(sweep.counts)
            try:
                await run_job_in_loop(job, sweep, await asyncio.to_thread(self._engine, job), progress)
            finally:
                del self._progress[record.id]
        summary = await asyncio.to_thread(close_job, job, sweep)
        record.counts = {name: count for name, count in summary.counts.items() if count}
        return "complete_with_failures" if summary.counts["failed"] else "complete"

    def _engine(self, job: Job) -> Engine:
        engine = self.settings.jobs.bulk.engine
        replicas = (1, self.settings.jobs.replicas or most_replicas(engine.num_gpus))
        return ServeEngine(engine_options(job.outputs, replicas, engine), may_deploy=False)

    async def _run_picture(self, record: JobRecord) -> State:
        asked = dict(record.request)
        format: Format = asked.pop("format")
        data, mask = await asyncio.to_thread(storage.read_bytes, self._blob(record, "in")), b""
        if asked.pop("mask", False):
            mask = await asyncio.to_thread(storage.read_bytes, self._blob(record, "mask"))
        result = await self.pictures.upscale(
            data, PictureOptions(**asked), format, Deadline(_PICTURE_S), mask=mask
        )
        await _write(self._blob(record, "out"), result.data, result.content_type)
        record.result = {
            "content_type": result.content_type,
            "sizes": result.sizes,
            "notes": result.notes,
            "seconds": result.seconds,
        }
        return "complete"

    async def get(self, id: str, owner: str) -> JobView:
        """Return the view of a job.

        Raises:
            Problem: not_found.
        """
        return self._view(await self._find(id, owner))

    async def list(self, owner: str) -> list[JobView]:
        """Return the views of the owner's jobs, the latest first."""
        await self.start()
        mine = [record for record in self.records.values() if record.owner == owner]
        return [self._view(record) for record in sorted(mine, key=lambda record: -record.created)]

    async def cancel(self, id: str, owner: str) -> JobView | None:
        """Stop a job and return its view; forget one that has ended and return None. What a bulk job wrote
        stays.

        Raises:
            Problem: not_found.
        """
        record = await self._find(id, owner)
        task, has_ended = self._tasks.get(id), record.state in _ENDED
        if not has_ended and id not in self._cancelled:
            self._cancelled.add(id)
            if task is not None:
                task.cancel()
        if task is not None:
            # `wait` and not `gather`: when this client goes away too, the job still writes that it has ended.
            await asyncio.wait({task})
        if has_ended:
            await self._forget(record)
            return None
        if record.state not in _ENDED:  # cancelled before its task began
            record.state = "cancelled"
            await self._end(record)
        return self._view(record)

    async def report(self, id: str, owner: str, format: str) -> tuple[bytes, str]:
        """Return the report of a bulk job that ended, and its content type.

        Raises:
            Problem: not_found, bad_option, conflict.
        """
        record = await self._find(id, owner)
        if format not in _REPORTS:
            raise Problem("bad_option", f"format must be one of {', '.join(_REPORTS)}, got {format[:40]!r}")
        if record.kind != "bulk":
            raise Problem("not_found", "a picture has no report, it has a result")
        uri = storage.join(record.request["target"], f"{ledger.DIRECTORY}/report.{format}")
        try:
            return await asyncio.to_thread(
                storage.read_bytes, uri, None, self.settings.jobs.bulk.target
            ), _REPORTS[format]
        except StorageError as error:
            if error.reason is not storage.StorageReason.MISSING:
                raise
            raise Problem(
                "conflict", f"the job is {record.state}; its report is written when it ends", retry_after_s=5
            ) from None

    async def result(self, id: str, owner: str) -> tuple[bytes, str]:
        """Return the picture of a job that is complete, and its content type.

        Raises:
            Problem: not_found; conflict when it is not complete.
        """
        record = await self._find(id, owner)
        if record.kind != "picture":
            raise Problem("not_found", "a bulk job has no result here; its outputs are at its target")
        if record.state == "complete":
            return await asyncio.to_thread(storage.read_bytes, self._blob(record, "out")), record.result[
                "content_type"
            ]
        if record.state in _ENDED:
            raise Problem("conflict", f"the job is {record.state}: {record.message}")
        raise Problem("conflict", f"the job is {record.state}", retry_after_s=2)

    async def _find(self, id: str, owner: str) -> JobRecord:
        await self.start()
        record = self.records.get(id)
        if record is None or record.owner != owner:  # that another owner's job exists is not revealed
            raise Problem("not_found", f"there is no job {id[:40]!r}")
        return record

    async def _forget(self, record: JobRecord) -> None:
        self.records.pop(record.id, None)
        self._cancelled.discard(record.id)
        names = [storage.join(self.state, f"jobs/{record.id}.json")]
        if record.kind == "picture":
            names += [self._blob(record, name) for name in ("in", "mask", "out")]
        for uri in names:
            await asyncio.to_thread(_remove, uri)

    async def forget_old(self) -> None:
        """Forget the jobs that ended longer ago than the settings keep them."""
        oldest = time.time() - 3600 * self.settings.jobs.keep_hours
        for record in [one for one in self.records.values() if one.ended is not None and one.ended < oldest]:
            await self._forget(record)

    def _view(self, record: JobRecord) -> JobView:
        view: JobView = {
            "id": record.id,
            "kind": record.kind,
            "state": record.state,
            "created": record.created,
            "ended": record.ended,
            "request": record.request,
        }
        if record.message:
            view["message"] = record.message
        if record.result:
            view["result"] = record.result
        if (progress := self._progress.get(record.id)) is not None:
            view["progress"] = progress.snapshot()
        if record.counts:
            view["counts"] = record.counts
        return view


def check_prefix(uri: str, prefixes: Sequence[str], name: str) -> None:
    """Refuse a place outside the prefixes.

    Raises:
        Problem: forbidden.
    """
    if not prefixes:
        raise Problem("forbidden", "bulk jobs are off here: the server has no jobs.sources and jobs.targets")
    # ".." is refused and not resolved: S3 takes it literally, a path does not.
    is_plain = ".." not in uri.split("/") and "\0" not in uri
    try:
        if is_plain and any(storage.is_inside(uri, prefix) for prefix in prefixes):
            return
    except (StorageError, ValueError):
        is_plain = False
    raise Problem(
        "forbidden", f"{name} must lie inside {', '.join(prefixes)}, got {storage.printable(uri)[:200]!r}"
    )


async def _write(uri: str, data: bytes, content_type: str | None = None) -> None:
    """Write a file. A thread cannot be cancelled: a cancelled task waits for it, lest this write comes after
    one that the end of the task makes, or after the file was removed.
    """
    writing = asyncio.ensure_future(
        asyncio.to_thread(storage.write_bytes, uri, data, content_type=content_type)
    )
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait({writing})
        raise


def _remove(uri: str) -> None:
    try:
        storage.remove(uri)
    except StorageError as error:
        if error.reason is not storage.StorageReason.MISSING:
            raise
