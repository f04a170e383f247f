"""The model as a Serve deployment: autoscaling replicas that any number of callers share.

    app = model_app(EngineOptions(model="tiny-x4", identity=..., low=1, high=8))
    serve.run(app, name=app_name(identity), route_prefix=None)

One request is one work unit; `Replica` does the work in threads of its own, so that the event loop of the replica answers health checks
while the model computes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ray import serve

from pipelines.engines import UNITS_PER_REPLICA, EngineOptions
from pipelines.replica import Replica, ReplicaOptions, Started, Upscaled
from resshift.animation import Frames

_HEALTH_CHECK_S = 2.0


class ModelReplica:
    """A replica of the deployment."""

    def __init__(self, model: str, identity: str, num_threads: int) -> None:
        self._replica = Replica(model, identity, num_threads)
        self._threads = ThreadPoolExecutor(UNITS_PER_REPLICA + 1, thread_name_prefix="upscale")

    async def upscale(self, options: ReplicaOptions, keys: Sequence[str], *inputs: Frames) -> AsyncGenerator[Started | Frames | Upscaled]:
        """Upscale a work unit; see `Replica.upscale`."""
        loop = asyncio.get_running_loop()
        results = self._replica.upscale(options, keys, *inputs)
        while (result := await loop.run_in_executor(self._threads, next, results, None)) is not None:
            yield result


def app_name(identity: str) -> str:
    """Return the name of the Serve application of a model."""
    return f"resshift-{identity}"


def model_app(options: EngineOptions) -> serve.Application:
    """Return the application: one deployment that keeps two units in flight at every replica."""
    deployment: Any = serve.deployment(
        name="model",
        max_ongoing_requests=UNITS_PER_REPLICA,
        health_check_period_s=_HEALTH_CHECK_S,
        graceful_shutdown_timeout_s=120,
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        autoscaling_config={
            "min_replicas": options.low,
            "max_replicas": options.high,
            "initial_replicas": options.low,
            "target_ongoing_requests": UNITS_PER_REPLICA,
            "upscale_delay_s": options.upscale_s,
            "downscale_delay_s": options.downscale_s,
            "metrics_interval_s": min(2.0, options.upscale_s),
            "look_back_period_s": max(2.0, options.upscale_s),
        },
        logging_config={"log_level": "WARNING", "enable_access_log": False},
    )(ModelReplica)
    return deployment.bind(options.model, options.identity, options.num_threads)
