"""The services of a gateway that its routes use: `services(request)`."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import numpy as np
from fastapi import Request

from resshift.images import Format, Picture
from resshift.images.animation import Frames
from serve.http.access import AccessLog
from serve.http.keys import Caller, Keys
from serve.http.limits import ByteBudget
from serve.http.metrics import Metrics
from serve.http.options import BulkBody, PictureOptions
from serve.http.problems import Problem
from serve.jobs import JobView
from serve.pictures import PictureService
from serve.settings import ServeSettings

_LOOK_S = 0.5
_PROBE_EVERY_S = 1.5
_PROBE_S = 3.0
T = TypeVar("T")


class Jobs(Protocol):
    """The methods of the job keeper that routes call; see `serve.jobs.JobKeeper`."""

    async def submit_bulk(self, body: BulkBody, owner: str, idempotency_key: str = "") -> JobView: ...

    async def submit_picture(
        self,
        data: bytes,
        options: PictureOptions,
        format: Format,
        owner: str,
        idempotency_key: str = "",
        mask: bytes = b"",
    ) -> JobView: ...

    async def get(self, id: str, owner: str) -> JobView: ...

    async def list(self, owner: str) -> list[JobView]: ...

    async def cancel(self, id: str, owner: str) -> JobView | None: ...

    async def report(self, id: str, owner: str, format: str) -> tuple[bytes, str]: ...

    async def result(self, id: str, owner: str) -> tuple[bytes, str]: ...

    async def close(self) -> None: ...


@dataclass(slots=True)
class Services:
    """The parts of a gateway."""

    settings: ServeSettings
    pictures: PictureService
    jobs: Jobs
    keys: Keys = field(init=False)
    metrics: Metrics = field(default_factory=Metrics)
    budget: ByteBudget = field(init=False)
    access: AccessLog = field(init=False)
    count_gateways: Callable[[], Awaitable[int]] | None = None
    num_gateways: int = 1
    started: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.keys = Keys(self.settings.keys, self.settings.behind_proxy)
        self.access = AccessLog(self.settings.access_log)
        self.budget = ByteBudget(int(self.settings.limits.bodies_mb * 1e6))

    def share(self, num_gateways: int) -> None:
        """Hold this gateway's part of the line and of the quotas."""
        self.num_gateways = num_gateways
        num_replicas = sum(one.num_replicas for one in self.pictures.readiness.values())
        slots = self.settings.limits.slots(num_replicas, self.num_gateways)
        self.pictures.admission.share(slots, self.num_gateways)
        self.keys.share(self.num_gateways)

    def count(self) -> None:
        """Update the gauges."""
        self.metrics.gateways.set(self.num_gateways)
        self.metrics.in_flight.set(self.pictures.admission.num_working)
        self.metrics.waiting.set(self.pictures.admission.num_waiting)
        self.metrics.body_bytes.set(self.budget.used)
        for name, readiness in self.pictures.readiness.items():
            self.metrics.ready.labels(name).set(readiness.is_ready)
            self.metrics.replicas.labels(name).set(readiness.num_replicas)


def services(request: Request) -> Services:
    """Return the services of the application that has this request."""
    found: Services = request.app.state.services
    return found


async def caller(request: Request) -> Caller:
    """Return the caller, counted against the quota.

    It awaits nothing, but FastAPI runs what is no coroutine in a thread, and the search of anyio for the task
    that waits for it goes through all tasks: half of what 100 requests a second cost.

    Raises:
        Problem: unauthorised, forbidden, rate_limited.
    """
    peer = request.client.host if request.client is not None else None
    version = str(request.scope.get("http_version", "1.1"))
    found = services(request).keys.caller(request.headers, peer, version)
    request.state.caller = found.name
    found.quota.take_request()
    return found


@contextlib.asynccontextmanager
async def watching(services: Services) -> AsyncGenerator[None]:
    """Keep the readiness of every model, and the share of this gateway, up to date while this context is
    open.
    """
    pictures, loop = services.pictures, asyncio.get_running_loop()
    if services.count_gateways is not None:
        services.share(1 + await services.count_gateways())  # this one does not run yet
    tasks = [loop.create_task(_watch(pictures, name)) for name in pictures.models]
    tasks.append(loop.create_task(_watch_gateways(services)))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watch_gateways(services: Services) -> None:
    while True:
        await asyncio.sleep(_LOOK_S)
        number = 1 if services.count_gateways is None else await services.count_gateways()
        services.share(number or services.num_gateways)


async def _watch(pictures: PictureService, name: str) -> None:
    """Count replicas, and send a small picture through the model whenever nothing else goes through it,
    unless it may sleep.
    """
    readiness, model = pictures.readiness[name], pictures.models[name]
    probing: asyncio.Task[None] | None = None
    while True:
        readiness.num_replicas = await model.count_replicas()
        age_s = readiness.pass_age_s
        is_due = age_s is None or age_s > _PROBE_EVERY_S
        # A probe would keep a model awake; a model that is not ready is woken to find out whether it still
        # fails.
        is_wanted = not readiness.is_ready if readiness.may_sleep else readiness.num_replicas > 0 and is_due
        if is_wanted and readiness.is_idle and (probing is None or probing.done()):
            probing = asyncio.get_running_loop().create_task(_probe(pictures, name))
        await asyncio.sleep(_LOOK_S)


async def _probe(pictures: PictureService, name: str) -> None:
    mask = np.eye(8, dtype=np.bool_) if pictures.models[name].facts.fills_holes else None
    frames = Frames((Picture(pixels=np.zeros((8, 8, 3), np.uint8), mask=mask),))
    # `noted_pass` notes the outcome of the probe; a timeout counts as no result.
    with contextlib.suppress(Problem, TimeoutError):
        async with asyncio.timeout(_PROBE_S), pictures.noted_pass(name):
            await pictures.models[name].upscale(frames)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Do work whose client may go away; then it is cancelled.

    Raises:
        Problem: closed; and what the work raises.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Problem("closed", "the client went away")
    finally:
        leaving.cancel()
        if not working.done():
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
