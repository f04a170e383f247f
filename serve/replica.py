"""The model as a Serve deployment: autoscaling replicas that any number of callers share.

    app = model_app(EngineOptions(model="tiny-x4", identity=..., low=1, high=8))
    serve.run(app, name=app_name(identity), route_prefix=None)

One request is one work unit; `Replica` does the work in threads of its own, so that the event loop of the
replica answers health checks while the model computes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass
from ray import serve
from ray.serve.schema import ApplicationStatusOverview

from pipelines.bulk.engine import (
    UNITS_PER_REPLICA,
    EngineOptions,
    check_memory,
    most_replicas,
    replica_resources,
)
from pipelines.bulk.parcels import Parcel, Underway
from pipelines.bulk.wedged import DEFAULT_STEP_S
from pipelines.bulk.worker import Replica, ReplicaOptions, Started, Upscaled, describe_model
from resshift.images.animation import Frames
from serve.encode import Encoded, Encoding, encode_result, encode_steps

_HEALTH_CHECK_S = 2.0
# Serve replaces a replica after three checks that fail or take longer; an event loop beside other work on a
# small machine may be late by seconds.
_HEALTH_TIMEOUT_S = 20.0
_ENCODING = 2
_PROBE_EVERY_S = 10.0
_PROBE_SHARE = 0.05  # of a replica's time at most


class ModelReplica:
    """A replica of the deployment."""

    def __init__(self, model: str, identity: str, num_threads: int, ongoing: int, step_s: float) -> None:
        self._replica = Replica(model, identity, num_threads, step_s)
        self._threads = ThreadPoolExecutor(2 * (ongoing + _ENCODING) + 1, thread_name_prefix="upscale")
        self._probe: Future[Any] | None = None
        self._probe_at = 0.0

    async def check_health(self) -> None:
        """Fail when the last small picture that was sent through the model failed: a GPU whose context is
        broken fails with every picture. One that hangs ends the replica, see `pipelines.bulk.wedged`.
        """
        now = time.monotonic()
        if self._probe is not None and self._probe.done():
            probe, self._probe = self._probe, None
            seconds = probe.result().seconds
            self._probe_at = now + max(_PROBE_EVERY_S, seconds / _PROBE_SHARE)
        if self._probe is None and now >= self._probe_at:
            self._probe = self._replica.probe()

    async def upscale(
        self, options: ReplicaOptions, keys: Sequence[str], *inputs: Parcel, alone: bool = False
    ) -> AsyncGenerator[Started | Parcel | tuple[Upscaled | Underway, ...]]:
        """Upscale a work unit; see `Replica.upscale`."""
        loop = asyncio.get_running_loop()
        is_over = threading.Event()
        results = self._replica.upscale(
            options, keys, *inputs, alone=alone, is_wanted=lambda: not is_over.is_set()
        )
        try:
            while (result := await loop.run_in_executor(self._threads, next, results, None)) is not None:
                yield result
        finally:
            # The caller went away: the picture gives up its turn, or ends after the call that is computed.
            is_over.set()

    async def picture(
        self, options: ReplicaOptions, frames: Frames, encoding: Encoding, has_steps: bool = False
    ) -> Encoded:
        """Upscale one picture and encode the result here, or with `has_steps` what each step predicts."""
        is_over = threading.Event()
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._threads, self._picture, options, frames, encoding, has_steps, is_over
            )
        finally:
            is_over.set()  # as in `upscale`

    def _picture(
        self,
        options: ReplicaOptions,
        frames: Frames,
        encoding: Encoding,
        has_steps: bool,
        is_over: threading.Event,
    ) -> Encoded:
        result, done = Frames(()), None

        def is_wanted() -> bool:
            return not is_over.is_set()

        if has_steps:
            result, done = self._replica.predictions(options, frames, is_wanted) or (result, done)
        else:
            # An empty key: the picture's noise is that of the seed itself, as in a call of the library.
            for answer in self._replica.upscale(options, ("",), frames, is_wanted=is_wanted):
                if isinstance(answer, Frames):
                    result = answer
                elif isinstance(answer, Upscaled):
                    done = answer
        if done is None:
            return Encoded(reason="timeout", message="nobody waits for the picture")
        if done.reason:
            # The traceback belongs in the log.
            told = done.message.strip().splitlines()[-1] if done.message else ""
            message = told if done.reason == "out_of_memory" else "the model failed on this picture"
            return Encoded(reason=done.reason, message=message, model_seconds=done.seconds)
        if has_steps:
            return encode_steps(result.pictures, encoding, done.seconds)
        return encode_result(result.pictures[0], encoding, done.seconds)


def app_name(identity: str) -> str:
    """Return the name of the Serve application of a model."""
    return f"resshift-{identity}"


def num_running(app: ApplicationStatusOverview) -> int:
    """Return how many replicas of an application run, by `serve.status()`."""
    states = (one.replica_states for one in app.deployments.values())
    return sum(number for one in states for state, number in one.items() if state == "RUNNING")


def model_app(options: EngineOptions) -> serve.Application:
    """Return the application: one deployment, whose replicas take `options.ongoing` requests at a time."""
    deployment: Any = serve.deployment(
        name="model",
        # Beside what the model works on, results are encoded.
        max_ongoing_requests=options.ongoing + _ENCODING,
        health_check_period_s=_HEALTH_CHECK_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=120,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        autoscaling_config={
            "min_replicas": options.low,
            "max_replicas": options.high,
            "initial_replicas": options.low,
            # Independent of `ongoing`: adding replicas finishes sooner than filling them, and bulk jobs keep
            # two units for each.
            "target_ongoing_requests": UNITS_PER_REPLICA,
            "upscale_delay_s": options.upscale_s,
            "downscale_delay_s": options.downscale_s,
            "metrics_interval_s": min(2.0, options.upscale_s),
            "look_back_period_s": max(2.0, options.upscale_s),
        },
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )(ModelReplica)
    return deployment.bind(
        options.model, options.identity, options.num_threads, options.ongoing, options.step_s
    )


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class ReplicaSettings:
    """Settings of a model's application: its `args` in serve/config.yaml.

    Fields:
        model: Name or path of the model; its application must be called `resshift-IDENTITY`, as `python -m
            serve --print-config` does.
        low, high: Smallest and largest number of replicas; high null: as many as the cluster can have, by its
            GPUs, or one for each machine where there are none. With low 0 name the model under `sleeping` of
            the endpoint, or its probes keep it awake.
        num_gpus: Number of GPUs of a replica; null: one where the cluster has any.
        num_cpus, num_threads: CPUs and threads of a replica; threads null: an equal share of this machine's
            cores.
        upscale_s, downscale_s: Delays of scaling, see `EngineOptions`.
        step_s: Seconds after which a step of the model counts as hung and its replica is replaced.
        ongoing: Number of requests at a time at a replica: on a GPU 16, say, because small pictures of all of
            them are computed together.
    """

    model: str
    low: int = 1
    high: int | None = None
    num_gpus: float | None = None
    num_cpus: float = 1
    num_threads: int | None = None
    upscale_s: float = 5.0
    downscale_s: float = 60.0
    ongoing: int = UNITS_PER_REPLICA
    step_s: float = DEFAULT_STEP_S

    def __post_init__(self) -> None:
        if self.step_s <= 0:
            raise ValueError(f"step_s must be positive, got {self.step_s}")
        if self.ongoing < 1:
            raise ValueError(f"ongoing must be at least 1, got {self.ongoing}")
        if self.low < 0 or (self.high is not None and (self.low > self.high or self.high < 1)):
            raise ValueError(f"replicas need 0 <= low <= high and 1 <= high, got {self.low} and {self.high}")


def application(args: dict[str, Any]) -> serve.Application:
    """Return the application of a model that serve/config.yaml names.

    Args:
        args: Fields of `ReplicaSettings`.

    Raises:
        WeightsError: No such model, or no node has the memory for its weights.
    """
    asked = TypeAdapter(ReplicaSettings).validate_python(args)
    check_memory(asked.model)
    high = asked.high or max(asked.low, most_replicas(asked.num_gpus))
    num_gpus, num_threads = replica_resources(asked.num_gpus, asked.high or asked.low or 1)
    return model_app(
        EngineOptions(
            model=asked.model,
            identity=describe_model(asked.model).identity,
            low=asked.low,
            high=high,
            num_gpus=num_gpus,
            num_cpus=asked.num_cpus,
            num_threads=asked.num_threads or num_threads,
            upscale_s=asked.upscale_s,
            downscale_s=asked.downscale_s,
            ongoing=asked.ongoing,
            step_s=asked.step_s,
        )
    )
