"""The endpoint: a FastAPI application without a model in it, and its two deployments, the gateway and the job
keeper.

    serve run serve/config.yaml        Serve builds `application(args)` beside the applications of the models
    python -m serve                    the same on this machine, for the models it is given

A gateway reads requests, keeps the limits, decodes and encodes on CPUs. The models are applications of their
own (`serve.replica`), shared with bulk jobs. The keeper has the jobs (`serve.jobs`); there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, MutableMapping
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from ray import serve
from ray.exceptions import RayError, RayTaskError

import resshift
from pipelines.cluster.capacity import reachable
from pipelines.cluster.ray_internals import ONE_LOOP, app_status, serve_host
from resshift.allocator import give_back_freed_pages, knows_own_bytes, map_large_blocks, own_bytes
from resshift.images import Format
from serve import routes
from serve.http import problems, site
from serve.http.keys import is_loopback
from serve.http.limits import announced_bytes
from serve.http.options import BulkBody, PictureOptions
from serve.http.problems import Problem
from serve.jobs import JobKeeper, JobView
from serve.models import served_models
from serve.pictures import PictureService
from serve.services import Services, watching
from serve.settings import ServeSettings, parse

APP_NAME = "resshift"
_FORGET_EVERY_S = 600.0
_GIVE_BACK_EVERY_S = 2.0
_GROWTH_BYTES = 16 * 2**20  # growth since the last trim; with less, trimming is not worthwhile
_SAFE_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
# What a page of another origin may send and read, where `cors` allows it.
_ASKED_HEADERS = (
    "Authorization",
    "X-API-Key",
    "Content-Type",
    "Prefer",
    "Idempotency-Key",
    "X-Request-Timeout",
)
_TOLD_HEADERS = (
    *("Content-Disposition", "Location", "Preference-Applied", "Retry-After", "Server-Timing"),
    *("X-Model", "X-Model-Identity", "X-Notes", "X-Picture-Size", "X-Request-ID", "X-Result-Size"),
)
# Less than this of a body that is no longer needed is cheaper to read than a new connection.
_CHEAP_BYTES = 1_000_000


class Answering:
    """ASGI middleware: headers that make answers safe to show, and counts by route and status. (Serve adds
    `x-request-id`.)

    An answer before the end of a body closes the connection; the server would read the rest, without end if
    the body has none, to find the next request behind it.

    Args:
        app: Application that answers.
        services: Services with the counters.
    """

    def __init__(self, app: Any, services: Services) -> None:
        self._app, self._services = app, services

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        asked = dict(scope["headers"])
        announced = announced_bytes(asked.get(b"content-length", b"").decode("latin-1"))
        is_arriving = announced > _CHEAP_BYTES or b"transfer-encoding" in asked

        started, bytes_in, bytes_out, status = time.monotonic(), 0, 0, 0

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal is_arriving, bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            is_arriving = is_arriving and bool(message.get("more_body"))
            return message

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal bytes_out, status
            bytes_out += len(message.get("body", b""))
            if message["type"] == "http.response.start":
                headers = list(message["headers"])
                if is_arriving:
                    headers.append((b"connection", b"close"))
                names = {name.lower() for name, _ in headers}
                headers += [(name, value) for name, value in _SAFE_HEADERS if name not in names]
                if scope["path"].startswith("/v1/") and b"cache-control" not in names:
                    headers.append((b"cache-control", b"no-store"))
                message["headers"] = headers
                route = getattr(scope.get("route"), "path", "other")
                status = message["status"]
                self._services.metrics.requests.labels(route, str(status)).inc()
            await send(message)

        try:
            await self._app(scope, receiving, sending)
        finally:
            self._services.access.write(
                {
                    "caller": scope.get("state", {}).get("caller", ""),
                    "peer": (scope.get("client") or ("",))[0],
                    "method": scope.get("method", ""),
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(time.monotonic() - started, 4),
                    "bytes_in": bytes_in,
                    "bytes_out": bytes_out,
                }
            )


def create_app(services: Services) -> FastAPI:
    """Return the application. It needs no Ray of its own: what it calls is in `services`."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncGenerator[None]:
        giving_back = asyncio.get_running_loop().create_task(give_back_memory())
        async with watching(services):
            yield
        giving_back.cancel()
        await services.jobs.close()
        services.pictures.close()

    api = FastAPI(
        title="ResShift", version=resshift.__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    api.state.services = services
    api.include_router(routes.router)
    api.include_router(site.router)
    problems.install(api)
    if services.settings.cors:
        api.add_middleware(
            CORSMiddleware,
            allow_origins=services.settings.cors,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=_ASKED_HEADERS,
            expose_headers=_TOLD_HEADERS,
            max_age=3600,
        )
    api.add_middleware(Answering, services=services)
    return api


async def give_back_memory() -> None:
    """Return free memory of this process to the system until cancelled: large blocks as they are freed, other
    free pages from time to time. Does nothing where the system does not tell what a process holds.

    Bodies, pixels and results come and go in many threads, and blocks that stay lie between them. After the
    files and bodies of tests/chaos/hostile_http.py a gateway of 154 MB has 164 to 167; with only free pages
    given back 404, without either 399.
    """
    if not knows_own_bytes():
        return
    map_large_blocks()
    least = own_bytes()
    while True:
        await asyncio.sleep(_GIVE_BACK_EVERY_S)
        if own_bytes() > least + _GROWTH_BYTES:
            await asyncio.to_thread(give_back_freed_pages)  # without the interpreter's lock
            least = own_bytes()


class RemoteJobs:
    """The keeper as the gateway calls it; see `serve.services.Jobs`.

    Args:
        handle: Handle of the keeper's deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def _call(self, method: str, *arguments: object) -> Any:
        try:
            answer = await self._handle.answer.remote(method, *arguments)
        except RayTaskError:
            raise
        except RayError as error:
            raise Problem("unavailable", "the job keeper is being started again", retry_after_s=5) from error
        if isinstance(answer, Problem):
            raise answer
        return answer

    async def submit_bulk(self, body: BulkBody, owner: str, idempotency_key: str = "") -> JobView:
        """See `JobKeeper`."""
        return await self._call("submit_bulk", body, owner, idempotency_key)

    async def submit_picture(
        self,
        data: bytes,
        options: PictureOptions,
        format: Format,
        owner: str,
        idempotency_key: str = "",
        mask: bytes = b"",
    ) -> JobView:
        """See `JobKeeper`."""
        return await self._call("submit_picture", data, options, format, owner, idempotency_key, mask)

    async def get(self, id: str, owner: str) -> JobView:
        """See `JobKeeper`."""
        return await self._call("get", id, owner)

    async def list(self, owner: str) -> list[JobView]:
        """See `JobKeeper`."""
        return await self._call("list", owner)

    async def cancel(self, id: str, owner: str) -> JobView | None:
        """See `JobKeeper`."""
        return await self._call("cancel", id, owner)

    async def report(self, id: str, owner: str, format: str) -> tuple[bytes, str]:
        """See `JobKeeper`."""
        return await self._call("report", id, owner, format)

    async def result(self, id: str, owner: str) -> tuple[bytes, str]:
        """See `JobKeeper`."""
        return await self._call("result", id, owner)

    async def close(self) -> None:
        """Do nothing: the keeper outlives a gateway."""


async def _count_gateways() -> int:
    """Return how many replicas of this deployment run; 0 while Serve does not tell."""
    context = serve.get_replica_context()
    try:
        app = await asyncio.to_thread(app_status, context.app_name)
    except RayError:
        return 0
    deployment = None if app is None else app.deployments.get(context.deployment)
    states = {} if deployment is None else deployment.replica_states
    return sum(number for state, number in states.items() if state == "RUNNING")


class Gateway:
    """A replica of the gateway.

    Args:
        settings: Settings of the endpoint.
        jobs: Handle of the keeper.

    Raises:
        RuntimeError: There are no keys, and Serve listens beyond this machine.
    """

    def __init__(self, settings: ServeSettings, jobs: Any) -> None:
        host = serve_host()
        if not settings.keys and host is not None and not is_loopback(host):
            raise RuntimeError(
                f"Serve listens on {host} and there are no API keys: set http_options.host to 127.0.0.1, or "
                "make keys"
            )
        pictures = PictureService(
            settings.limits,
            served_models(settings.models),
            sleeping=settings.sleeping,
            detector=settings.faces,
        )
        self._services = Services(settings, pictures, RemoteJobs(jobs), count_gateways=_count_gateways)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the ASGI application; called by Serve after the constructor."""
        return create_app(self._services)


class Keeper(JobKeeper):
    """A replica of the job keeper; there is one."""

    def __init__(self, settings: ServeSettings) -> None:
        super().__init__(
            settings,
            PictureService(
                settings.limits,
                served_models(settings.models),
                num_cpus=1,
                sleeping=settings.sleeping,
                detector=settings.faces,
            ),
        )
        self._tending: list[asyncio.Task[None]] = []

    async def answer(self, method: str, *arguments: object) -> Any:
        """Call a method of `JobKeeper`. A problem is returned: Serve would log one that is raised, with its
        traceback, as a failure.
        """
        try:
            return await getattr(self, method)(*arguments)
        except Problem as problem:
            return problem

    async def start(self) -> None:
        """See `JobKeeper`; then forget old jobs and give back memory from time to time."""
        if not self._tending:
            loop = asyncio.get_running_loop()
            self._tending = [loop.create_task(self._tend()), loop.create_task(give_back_memory())]
        await super().start()

    async def _tend(self) -> None:
        while True:
            await asyncio.sleep(_FORGET_EVERY_S)
            await self.forget_old()

    async def check_health(self) -> None:
        """Continue what a predecessor left, without waiting for the first request."""
        await self.start()


def application(args: dict[str, Any]) -> serve.Application:
    """Return the application that serve/config.yaml names.

    Args:
        args: Fields of `serve.settings.ServeSettings`.
    """
    settings = parse(args)
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    deployment: Any = serve.deployment
    keeper = deployment(
        name="keeper",
        num_replicas=1,
        max_ongoing_requests=1000,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": 0.1},
        logging_config=quiet,
    )(Keeper)
    gateways = settings.gateways
    gateway = deployment(
        name="gateway",
        # More than the queue of `Admission` holds, so that the gateway refuses, with a reason, and not the
        # proxy in front of it.
        max_ongoing_requests=10_000,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=120,
        ray_actor_options={"num_cpus": gateways.num_cpus, "runtime_env": {"env_vars": ONE_LOOP}},
        autoscaling_config={
            "min_replicas": gateways.low,
            "max_replicas": gateways.high or max(gateways.low, int(reachable().get("CPU", 1.0)) // 8),
            "initial_replicas": gateways.low,
            "target_ongoing_requests": gateways.target,
            "upscale_delay_s": 5.0,
            "downscale_delay_s": 120.0,
        },
        logging_config=quiet,
    )(serve.ingress()(Gateway))
    return gateway.bind(settings, keeper.bind(settings))
