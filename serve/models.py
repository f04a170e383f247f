"""The models of an endpoint as it calls them: replicas of `serve.replica`, which bulk jobs share.

A call goes through Serve's router to the replica with the shortest queue. A replica that dies takes no
request with it: the same picture and seed give the same pixels, so it is asked again elsewhere. A call that
is cancelled (the client went away, the deadline passed) is dropped at the replica, at the latest after the
call of the networks that is under way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ray import serve
from ray.exceptions import RayError, RayTaskError

from pipelines.bulk.worker import ModelFacts, ReplicaOptions, describe_model
from pipelines.cluster.ray_internals import app_status
from resshift.config import Sampling
from resshift.images.animation import Frames
from serve.encode import PNG, Encoded, Encoding
from serve.http.problems import Problem
from serve.replica import app_name, num_running

_ATTEMPTS = 5
_PAUSE_S = 0.2


class EndpointModel(Protocol):
    """A model as an endpoint calls it."""

    facts: ModelFacts

    async def upscale(
        self,
        frames: Frames,
        sampling: Sampling = Sampling(),
        encoding: Encoding = PNG,
        has_steps: bool = False,
    ) -> Encoded:
        """Return the result, with `has_steps` an archive of what each step predicts, or the reason why there
        is none.

        Raises:
            Problem: unavailable, failed.
        """
        ...

    async def count_replicas(self) -> int:
        """Return the number of replicas that run."""
        ...


class ServedModel:
    """A model behind a Serve application.

    Args:
        name: Name or path of the model, see `describe_model`.

    Raises:
        WeightsError: No such model.
    """

    def __init__(self, name: str) -> None:
        self.facts = describe_model(name)
        self._app = app_name(self.facts.identity)
        self._handle: Any = None

    async def upscale(
        self,
        frames: Frames,
        sampling: Sampling = Sampling(),
        encoding: Encoding = PNG,
        has_steps: bool = False,
    ) -> Encoded:
        """See `EndpointModel`."""
        options = ReplicaOptions(model=self.facts.name, identity=self.facts.identity, sampling=sampling)
        for i_attempt in range(_ATTEMPTS):
            try:
                return await self._call(options, frames, encoding, has_steps)
            except RayTaskError as error:
                raise Problem("failed", "the replica failed; see the server log") from error
            except (RayError, ConnectionError) as error:
                if i_attempt == _ATTEMPTS - 1:
                    raise Problem(
                        "unavailable", "replicas of the model ended repeatedly", retry_after_s=5
                    ) from error
                await asyncio.sleep(_PAUSE_S * 2**i_attempt)
        raise AssertionError("unreachable")

    async def _call(
        self, options: ReplicaOptions, frames: Frames, encoding: Encoding, has_steps: bool
    ) -> Encoded:
        if self._handle is None:
            try:
                self._handle = await asyncio.to_thread(serve.get_app_handle, self._app)
            except Exception as error:  # RayServeException, before the application is there
                raise ConnectionError(f"the application {self._app} is not there: {error}") from error
        response = self._handle.picture.remote(options, frames, encoding, has_steps)
        try:
            return await response
        except asyncio.CancelledError as error:
            response.cancel()
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # Nobody cancelled this task: Serve raises the same for a call that ended otherwise, with the
            # request in whose context a job was taken, say.
            raise ConnectionError("the call was cancelled at the replica") from error

    async def count_replicas(self) -> int:
        """See `EndpointModel`."""
        app = await asyncio.to_thread(app_status, self._app)
        return 0 if app is None else num_running(app)


def find_model(models: Mapping[str, EndpointModel], name: str | None) -> EndpointModel:
    """Return a model by name, the first when None.

    Raises:
        Problem: bad_option.
    """
    if name is None:
        return next(iter(models.values()))
    if name not in models:
        raise Problem("bad_option", f"model must be one of {', '.join(models)}, got {name[:80]!r}")
    return models[name]


def served_models(names: Sequence[str]) -> dict[str, EndpointModel]:
    """Return the models by name."""
    return {name: ServedModel(name) for name in names}


class Readiness:
    """Whether an endpoint can do its work: a model is ready when a forward pass came through it in the last
    seconds.

    Every pass counts, a probe's or a request's. While one is under way, a busy model stays ready as long as
    its replicas run: a large picture takes longer than the window. A pass that failed for want of replicas
    makes it red until one succeeds.

    A model that may sleep has no replicas while nobody asks for it, and no pass that would keep it awake. It
    is ready until a pass fails, or waits for a first replica for longer than one takes to start.

    Args:
        window_s: Largest age of the last pass in seconds.
        busy_s: Longest duration of a pass in seconds.
        may_sleep: Whether having no replicas is normal.
        start_s: Longest time for a first replica to start, in seconds.
        clock: Clock in seconds.
    """

    def __init__(
        self,
        window_s: float = 4.0,
        busy_s: float = 600.0,
        *,
        may_sleep: bool = False,
        start_s: float = 180.0,
        clock: Any = time.monotonic,
    ) -> None:
        self._window_s, self._busy_s, self._start_s, self._clock = window_s, busy_s, start_s, clock
        self.may_sleep = may_sleep
        self._last_pass: float | None = None
        self._is_failing = False
        self._num_under_way = 0
        self._waits_since: float | None = None  # for a first replica
        self._num_replicas = 0

    @property
    def num_replicas(self) -> int:
        """Replicas that run, as last counted."""
        return self._num_replicas

    @num_replicas.setter
    def num_replicas(self, number: int) -> None:
        self._num_replicas = number
        if number:
            self._waits_since = None

    @property
    def is_asleep(self) -> bool:
        return self.may_sleep and self.num_replicas == 0 and self.is_idle and self.is_ready

    @property
    def is_ready(self) -> bool:
        if self.may_sleep:
            return not self._is_failing and not self._waits_too_long
        if self._last_pass is None or self._is_failing or self.num_replicas < 1:
            return False
        age = self._clock() - self._last_pass
        return age <= self._window_s or (self._num_under_way > 0 and age <= self._busy_s)

    @property
    def pass_age_s(self) -> float | None:
        return None if self._last_pass is None else self._clock() - self._last_pass

    @property
    def _waits_too_long(self) -> bool:
        return self._waits_since is not None and self._clock() - self._waits_since > self._start_s

    @property
    def is_idle(self) -> bool:
        return self._num_under_way == 0

    def begin(self) -> None:
        """Note that a pass begins."""
        self._num_under_way += 1
        if self.num_replicas == 0 and self._waits_since is None:
            self._waits_since = self._clock()

    def end(self, is_good: bool | None) -> None:
        """Note that a pass ended. True: it succeeded; False: there was no replica; None: inconclusive."""
        self._num_under_way -= 1
        if is_good:
            self._last_pass, self._is_failing, self._waits_since = self._clock(), False, None
        elif is_good is False:
            self._is_failing = True
        if self.is_idle and not self._waits_too_long:
            self._waits_since = None  # the caller left before a replica had time to start
