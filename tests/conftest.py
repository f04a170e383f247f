"""Fixtures that several packages use."""

from __future__ import annotations

import gc
import os
import urllib.request
import uuid
from collections.abc import Callable, Generator, Iterator

import pytest

from pipelines.cluster import ray_internals
from tests import servers
from tests.scripts import load_script

# Read by torch when it is imported: the tensors of tests are small, and threads that wait for each other cost
# a busy machine many times the work. Tests of thread counts set their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read by Ray when a test starts its cluster: a short poll instead of two seconds, no bars, no telemetry, no
# token file at home. A call that needs a cluster fails where none is, instead of starting one whose dozen
# processes run beside all tests that follow.
os.environ.update(
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_AUTO_CONNECT="0",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_DEDUP_LOGS="0",
    **ray_internals.WORKERS_NOT_NICE,
    **ray_internals.METADATA_INLINE,
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep the garbage collector away from what collection makes: modules and tests, a million objects that
    live as long as the process and would be looked through again and again.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


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
    with (
        servers.moto(tmp_path_factory.mktemp("moto") / "moto.log") as port,
        servers.using_store(f"http://127.0.0.1:{port}") as environment,
    ):
        yield environment


@pytest.fixture
def bucket(s3: dict[str, str]) -> str:
    """Return the URI of a fresh, empty bucket."""
    name = f"b-{uuid.uuid4().hex[:12]}"
    request = urllib.request.Request(f"{s3['AWS_ENDPOINT_URL']}/{name}", method="PUT")
    with urllib.request.urlopen(request):
        return f"s3://{name}"


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
        dashboard_port=servers.free_port(),
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def job() -> Callable[..., int]:
    """Return a function that runs a command in this process: `job("upscale", "SRC", "DST", "--plan")` gives
    its exit code.
    """

    def run(name: str, *arguments: str) -> int:
        return int(load_script(f"jobs/{name}.py").main(arguments))

    return run
