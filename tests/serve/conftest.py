"""An endpoint in this process, whose model repeats pixels: every answer is known."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pipelines.bulk.nearest import Nearest
from pipelines.bulk.worker import describe_model
from resshift.config import Sampling
from resshift.images.animation import Frames
from serve.app import create_app
from serve.encode import PNG, Encoded, Encoding, encode_result, encode_steps
from serve.jobs import JobKeeper
from serve.pictures import PictureService
from serve.services import Services
from serve.settings import ServeSettings, parse
from tests.pictures import encoded


class LocalModel:
    """`nearest-x4` without replicas. Tests hold it up, count what it does, and take its replicas away. With
    more steps than one, all before the last predict the negative.
    """

    def __init__(self) -> None:
        self.facts = describe_model("nearest-x4")
        self.num_begun = self.num_done = self.num_probes = self.num_looks = 0
        self.num_replicas = 1
        self.is_held = False

    async def upscale(
        self,
        frames: Frames,
        sampling: Sampling = Sampling(),
        encoding: Encoding = PNG,
        has_steps: bool = False,
    ) -> Encoded:
        if frames.pictures[0].height == 8:  # the probe of the readiness is counted apart
            self.num_probes += 1
            return Encoded()
        self.num_begun += 1
        while self.is_held:
            await asyncio.sleep(0.01)
        result = frames.map(lambda picture: Nearest().upscale(picture, sampling))
        self.num_done += 1
        if has_steps:
            (last,), number = result.pictures, sampling.steps or self.facts.steps
            steps = [replace(last, pixels=255 - last.pixels)] * (number - 1)
            return encode_steps([*steps, last], encoding)
        return encode_result(result.pictures[0], encoding, 0.001)

    async def count_replicas(self) -> int:
        self.num_looks += 1
        return self.num_replicas


class Endpoint:
    """An application, its parts, and a client that is on this machine."""

    def __init__(self, settings: ServeSettings) -> None:
        self.model = LocalModel()
        self.pictures = PictureService(
            settings.limits,
            {"nearest-x4": self.model},
            num_cpus=1,
            sleeping=settings.sleeping,
            detector=settings.faces,
        )
        self.services = Services(settings, self.pictures, JobKeeper(settings, self.pictures))
        self.app = create_app(self.services)
        self.client = TestClient(
            self.app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000), raise_server_exceptions=False
        )

    def post(self, data: bytes, path: str = "/v1/upscale", **options: Any) -> Any:
        return self.client.post(path, content=data, **options)


@pytest.fixture(scope="session")
def start_endpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Endpoint]:
    """Return a function that makes an endpoint: `start_endpoint(limits={"queue": 1})`; enter its client to
    run it.
    """

    def start(**args: Any) -> Endpoint:
        settings = parse({"models": ["nearest-x4"]} | args)
        if not settings.jobs.state:
            settings = replace(
                settings, jobs=replace(settings.jobs, state=str(tmp_path_factory.mktemp("state")))
            )
        return Endpoint(settings)

    return start


@pytest.fixture(scope="session")
def endpoint(start_endpoint: Callable[..., Endpoint]) -> Iterator[Endpoint]:
    """Return the endpoint with narrow limits that most tests share."""
    made = start_endpoint(
        limits={"body_mb": 2, "megapixels": 1, "output_megapixels": 8, "max_side_px": 20_000}
    )
    with made.client:
        yield made


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return a folder of three pictures and a broken one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(encoded(i, 20, 24))
    (folder / "broken.png").write_bytes(encoded(4, 20, 24)[:90])
    return folder
