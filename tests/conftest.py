"""Fixtures that several packages use."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.cluster import ray_internals

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses the cluster: a test cannot be forgotten."""
    for item in items:
        if isinstance(item, pytest.Function) and "ray_cluster" in item.fixturenames:
            item.add_marker("ray")


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Run moto's S3 in a process of its own and point the environment at it, before a cluster starts and
    inherits it.
    """
    port = free_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    removed = ("AWS_CA_BUNDLE", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3")
    before = {name: os.environ.get(name) for name in (*environment, *removed)}
    with (tmp_path_factory.mktemp("moto") / "moto.log").open("w") as log:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_for(port, server)
            for name in removed:
                os.environ.pop(name, None)
            os.environ.update(environment)
            yield environment
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            server.terminate()
            server.wait(10)


def _wait_for(port: int, server: subprocess.Popen[bytes], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the S3 server ended with {server.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise TimeoutError(f"the S3 server did not listen within {timeout_s} s")


@pytest.fixture
def bucket(s3: dict[str, str]) -> str:
    """Return the URI of a fresh, empty bucket."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    name = f"b-{uuid.uuid4().hex[:12]}"
    s3fs.S3FileSystem(endpoint_url=s3["AWS_ENDPOINT_URL"]).mkdir(name)
    return f"s3://{name}"


# Read by torch when it is imported: the tensors of tests are small, and threads that wait for each other cost
# a busy machine many times the work. Tests of thread counts set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read by Ray when a test starts its cluster: a short poll instead of two seconds, no bars, no telemetry, no
# token file at home.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_DEDUP_LOGS="0",
    **ray_internals.WORKERS_NOT_NICE,
    **ray_internals.METADATA_INLINE,
)


@pytest.fixture(scope="session")
def ray_cluster(s3: dict[str, str]) -> Iterator[None]:
    """Start the one local cluster of the run; S3 comes first because workers inherit the environment."""
    import ray

    # The dashboard stays on: without it Ray Train's placement group cleaner fills the log.
    ray.init(
        address="local",
        num_cpus=6,
        num_gpus=0,
        object_store_memory=300 << 20,
        log_to_driver=False,
        dashboard_port=free_port(),
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def job() -> Callable[..., int]:
    """Return a function that runs a command in this process: `job("upscale", "SRC", "DST", "--plan")` gives
    its exit code.
    """

    def run(name: str, *arguments: str) -> int:
        return int(load_job(name).main(arguments))

    return run


def load_job(name: str) -> Any:
    """Import jobs/NAME.py, which is a script and not part of a package."""
    spec = importlib.util.spec_from_file_location(f"resshift_job_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
