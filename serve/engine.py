"""The GPU stage of the bulk job on replicas of a Serve deployment, which online traffic may share.

Serve's router gives every unit to the replica with the shortest queue, autoscales, and replaces what dies.
The job keeps two units in flight for each of the most replicas there may be: what no replica takes yet waits
in this process as references, and its number is what the autoscaler looks at. A deployment of the same model
that runs already is used and left running.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorAlreadyExistsError, ActorUnavailableError, RayActorError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, LoggingConfig

from pipelines.bulk.engine import UNITS_PER_REPLICA, EngineError, EngineOptions, admitted, cause
from pipelines.bulk.worker import ReplicaOptions
from pipelines.cluster import ray_internals
from serve.replica import app_name, model_app, num_running

_PATIENCE_S = 90.0
_GRACE_S = 2.0  # nobody waits for what a replica still computes, and docker kills 10 s after it has asked
_GONE_S = 5.0
_LOOK_EVERY_S = 0.5

logger = logging.getLogger(__name__)


_IN_USE = (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING, ApplicationStatus.UNHEALTHY)


class ServeEngine:
    """Replicas of the application `resshift-IDENTITY`.

    Args:
        options: Options of the replicas that are started.
        may_deploy: Whether the application is started when there is none; an endpoint's jobs wait for the one
            that its configuration deploys.
        num_drivers: Number of drivers of a job that keep the replicas busy together.
    """

    def __init__(self, options: EngineOptions, *, may_deploy: bool = True, num_drivers: int = 1) -> None:
        self.options, self._may_deploy, self._num_drivers = options, may_deploy, num_drivers
        self._name = app_name(options.identity)
        self._handle: Any = None
        self._is_ours = False
        self._has_started_serve = False
        self._num_replicas = 0
        self._in_flight = 0
        self._error: EngineError | None = None
        self._changed = asyncio.Condition()
        self._watching: asyncio.Task[None] | None = None
        self._ended = threading.Event()

    @property
    def num_replicas(self) -> int:
        return self._num_replicas

    @property
    def is_starving(self) -> bool:
        return self._in_flight * self._num_drivers < self._num_replicas

    async def start(self) -> None:
        await asyncio.to_thread(self._deploy)
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def start_shared(self, num_drivers: int) -> Callable[[], ServeEngine]:
        await self.start()
        return functools.partial(ServeEngine, self.options, may_deploy=False, num_drivers=num_drivers)

    def _deploy(self) -> None:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        status = serve.status()
        if not status.applications and not status.proxies:
            # No HTTP proxy: this job listens on no port. Where Serve runs already, its own settings
            # stay.
            with contextlib.suppress(ActorAlreadyExistsError):  # another job or an endpoint was faster
                serve.start(proxy_location="Disabled", logging_config=LoggingConfig(log_level="WARNING"))
                self._has_started_serve = True
        running = status.applications.get(self._name)
        # An application that is starting, or replaces a replica, belongs to whoever deployed it.
        if self._may_deploy and (running is None or running.status not in _IN_USE):
            self.options = admitted(self.options, self._pause)
            self._is_ours = True
            app = serve.RunTarget(target=model_app(self.options), name=self._name, route_prefix=None)
            # Do not wait: a replica that dies while others start is no failure of the application, although
            # Serve reports one.
            serve.run_many([app], wait_for_applications_running=False)
        if self._may_deploy or running is not None:
            with contextlib.suppress(RayServeException):  # deleted a moment ago: `_watch` tells
                self._handle = serve.get_app_handle(self._name).options(stream=True)

    def _pause(self, seconds: float) -> None:
        """Wait for room; `close` ends it."""
        if self._ended.wait(seconds):
            raise EngineError("stopped before there was room for a replica")

    def _look(self) -> tuple[int, str]:
        """Return the number of replicas that run, and, when there is none, what Serve says of it."""
        try:
            running = ray_internals.app_status(self._name)
        except RayActorError:  # whoever started Serve has ended it
            running = None
        if running is None:
            return 0, "it is gone"
        told = "\n".join(
            [running.message, *(deployment.message for deployment in running.deployments.values())]
        )
        number = num_running(running)
        is_failed = running.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY)
        return number, cause(told)[-600:] if is_failed and not number else ""

    async def _watch(self) -> None:
        failed_since: float | None = None
        while True:
            self._num_replicas, told = await asyncio.to_thread(self._look)
            now = time.monotonic()
            failed_since = None if not told else failed_since or now
            # Serve keeps restarting replicas; an application stays failed only when their
            # start fails repeatedly.
            if failed_since is not None and now - failed_since > _PATIENCE_S:
                self._error = EngineError(f"the Serve application {self._name} does not run: {told}")
            async with self._changed:
                self._changed.notify_all()
            await asyncio.sleep(_LOOK_EVERY_S)

    def _has_slot(self) -> bool:
        # Until the first replica runs, units would only wait in the router.
        units = UNITS_PER_REPLICA * max(self.options.high, self._num_replicas)
        return self._num_replicas > 0 and self._in_flight < -(-units // self._num_drivers)

    async def wait_for_slot(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._error is not None or self._has_slot())
        if self._error is not None:
            raise self._error

    async def upscale(
        self, options: ReplicaOptions, keys: Sequence[str], inputs: Sequence[ray.ObjectRef], *, alone: bool
    ) -> AsyncGenerator[ray.ObjectRef]:
        await self.wait_for_slot()
        self._in_flight += 1
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(
                    lambda: serve.get_app_handle(self._name).options(stream=True)
                )
            response = self._handle.upscale.remote(options, keys, *inputs, alone=alone)
            async for ref in await ray_internals.object_refs(response):
                yield ref
        except RayServeException as error:
            # It failed, or was deleted by the job that had started it. The unit was not sent: it waits for a
            # replica to run, and `_watch` for 90 s.
            self._num_replicas = 0
            raise ActorUnavailableError(str(error), None) from error
        finally:
            self._in_flight -= 1
            async with self._changed:
                self._changed.notify_all()

    async def close(self) -> None:
        self._ended.set()
        if self._watching is not None:
            self._watching.cancel()
        await asyncio.to_thread(self._undeploy)

    def _undeploy(self) -> None:
        if self._is_ours:
            # The router warns of every replica that is gone, which is what is asked for here.
            logging.getLogger("ray.serve").setLevel(logging.ERROR)
            ray_internals.begin_to_delete(self._name)
            if not self._is_gone_within(_GRACE_S):
                ray_internals.kill_replicas(self._name)
                if not self._is_gone_within(_GONE_S):
                    logger.warning(
                        "Serve still has the application %s; `serve.delete(%r)` ends it",
                        self._name,
                        self._name,
                    )
        # A Serve without proxies that is left running would keep a later `serve run` from opening its port.
        if self._has_started_serve and not serve.status().applications:
            serve.shutdown()

    def _is_gone_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while ray_internals.app_status(self._name) is not None:
            if time.monotonic() > until:
                return False
            time.sleep(0.2)
        return True
