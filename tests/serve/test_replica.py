"""What Serve says of a model's application."""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
import zipfile
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
    ReplicaState,  # pyright: ignore[reportPrivateImportUsage]
)

from pipelines.bulk.nearest import Nearest
from pipelines.bulk.worker import ReplicaOptions
from resshift.config import Sampling
from resshift.images import Picture
from resshift.images.animation import Frames
from serve import app, replica
from serve.encode import Encoded, Encoding
from serve.models import ServedModel
from serve.replica import ModelReplica, num_running
from tests.pictures import decoded, noise

OPTIONS = ReplicaOptions(model="nearest-x4", identity="nearest-x4")
FRAMES = Frames((Picture(pixels=noise(0, 20, 24)),))


def test_results_are_encoded_beside_the_model() -> None:
    async def run() -> None:
        model = ModelReplica("nearest-x4", "nearest-x4", 1, 2, 600.0)
        png = await model.picture(OPTIONS, FRAMES, Encoding())
        assert (png.reason, png.size) == ("", (96, 80))
        assert np.array_equal(decoded(png.data), FRAMES.pictures[0].pixels.repeat(4, 0).repeat(4, 1))
        assert png.encode_seconds > 0
        steps = await model.picture(OPTIONS, FRAMES, Encoding(), has_steps=True)
        with zipfile.ZipFile(io.BytesIO(steps.data)) as archive:
            assert archive.namelist() == ["step_1.png"]  # one step, which is the result
            assert archive.read("step_1.png") == png.data
        wide = Frames((Picture(pixels=noise(0, 1, 5000)),))
        refused = await model.picture(OPTIONS, wide, Encoding(format="webp"))
        assert (refused.reason, refused.data) == ("too_large", b"")
        scaled = ReplicaOptions(model="nearest-x4", identity="nearest-x4", sampling=Sampling(outscale=2))
        failed = await model.picture(scaled, FRAMES, Encoding())
        assert (failed.reason, failed.message) == ("upscale_error", "the model failed on this picture")

    asyncio.run(run())


def test_a_call_that_is_cancelled_at_the_replica_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Response:
        def __init__(self, outcome: Encoded | BaseException) -> None:
            self.outcome, self.is_cancelled = outcome, False

        def __await__(self) -> Generator[None, None, Encoded]:
            yield
            if isinstance(self.outcome, Encoded):
                return self.outcome
            raise self.outcome

        def cancel(self) -> None:
            self.is_cancelled = True

    responses = [Response(asyncio.CancelledError()), Response(Encoded(data=b"file")), Response(Encoded())]
    waiting = iter(responses)
    monkeypatch.setattr("serve.models._PAUSE_S", 0.0)
    model = ServedModel("nearest-x4")
    handle = SimpleNamespace(picture=SimpleNamespace(remote=lambda *_: next(waiting)))
    monkeypatch.setattr(model, "_handle", handle)

    async def run() -> None:
        assert (await model.upscale(FRAMES)).data == b"file"
        calling = asyncio.ensure_future(model.upscale(FRAMES))  # and by its caller: not again
        asyncio.get_running_loop().call_soon(calling.cancel)
        with pytest.raises(asyncio.CancelledError):
            await calling

    asyncio.run(run())
    assert [one.is_cancelled for one in responses] == [True, False, True]


def test_a_model_that_fails_with_a_small_picture_is_not_healthy() -> None:
    class Broken(Nearest):
        def upscale(self, picture: Picture, sampling: Sampling = Sampling()) -> Picture:
            raise RuntimeError("CUDA error: unspecified launch failure")

    async def checked(model: ModelReplica) -> None:
        await model.check_health()
        assert model._probe is not None  # pyright: ignore[reportPrivateUsage]
        concurrent.futures.wait([model._probe], 60)  # pyright: ignore[reportPrivateUsage]
        await model.check_health()

    asyncio.run(checked(ModelReplica("nearest-x4", "nearest-x4", 1, 2, 600.0)))
    broken = ModelReplica("nearest-x4", "nearest-x4", 1, 2, 600.0)
    broken._replica.model = Broken()  # pyright: ignore[reportPrivateUsage]
    with pytest.raises(RuntimeError, match="unspecified launch failure"):
        asyncio.run(checked(broken))


@pytest.mark.parametrize(("has", "most"), [({"CPU": 8.0, "GPU": 3.0}, 3), ({"CPU": 8.0}, 2)])
def test_the_default_is_what_the_cluster_can_have(
    has: dict[str, float], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpus = {"CPU": 4.0}
    nodes = [
        {"Alive": True, "Resources": cpus},
        {"Alive": True, "Resources": cpus},
        {"Alive": True, "Resources": {}},  # a head without CPUs
        {"Alive": False, "Resources": {}},
    ]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    for module in ("pipelines.bulk.engine", "pipelines.cluster.capacity", "serve.app"):
        monkeypatch.setattr(f"{module}.reachable", lambda: has)
    made: Any = replica.application({"model": "nearest-x4"})
    scaling = made._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, most)
    gateway: Any = app.application({"models": ["nearest-x4"]})
    scaling = gateway._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 1)
    gateway = app.application({"models": ["nearest-x4"], "gateways": {"high": 5}})
    assert gateway._bound_deployment._deployment_config.autoscaling_config.max_replicas == 5


def test_replicas_that_start_or_stop_do_not_run() -> None:
    unlooked: Any = None

    def deployment(**states: int) -> DeploymentStatusOverview:
        found = {ReplicaState(name.upper()): number for name, number in states.items()}
        return DeploymentStatusOverview(unlooked, unlooked, found, "")

    deployments = {"a": deployment(starting=1, running=3, stopping=2), "b": deployment(updating=1)}
    assert num_running(ApplicationStatusOverview(ApplicationStatus.RUNNING, "", 0, deployments)) == 3
