"""Servers that a chaos script starts on loopback and ends again."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import harness
import yaml


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def running(
    command: list[str], port: int, log: Path, timeout_s: float = 120
) -> Generator[subprocess.Popen[bytes]]:
    """Run a server while the block lasts; it listens when the block begins."""
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{command[:3]} does not listen: {log.read_text(errors='replace')[-2000:]}"
                )
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.1)
        yield process
    finally:
        process.terminate()
        process.wait(20)


@contextlib.contextmanager
def moto(log: Path) -> Generator[int]:
    """Run moto's S3 and return its port."""
    port = free_port()
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], port, log):
        yield port


def use_store(endpoint: str, access: str = "test", secret: str = "test", region: str = "us-east-1") -> None:
    """Point this process and what it starts at a store."""
    os.environ.update(
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID=access,
        AWS_SECRET_ACCESS_KEY=secret,
        AWS_REGION=region,
        AWS_DEFAULT_REGION=region,
        AWS_EC2_METADATA_DISABLED="true",
    )
    for name in ("AWS_CA_BUNDLE", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3"):
        os.environ.pop(name, None)


@contextlib.contextmanager
def endpoint(
    work: Path, change: Callable[[Any], None], *arguments: str
) -> Generator[tuple[subprocess.Popen[bytes], int, Any]]:
    """Run an endpoint in a session of its own while the block lasts; it has been started when the block
    begins, and may not be ready.

    Args:
        work: where its configuration and log go.
        change: is called with the configuration that `python -m serve --print-config` gives for the
            arguments.
        arguments: of `python -m serve`.

    Yields:
        The process, the port, and the configuration.
    """
    port = free_port()
    command = [sys.executable, "-m", "serve", *arguments, "--port", str(port), "--print-config"]
    config: Any = yaml.safe_load(
        subprocess.run(command, cwd=harness.ROOT, check=True, capture_output=True, text=True).stdout
    )
    change(config)
    (work / "serve.yaml").write_text(yaml.safe_dump(config))
    with (work / "serve.log").open("wb") as log:
        command = [sys.executable, "-m", "serve", "--config", str(work / "serve.yaml")]
        environment = os.environ | harness.ENVIRONMENT
        server = subprocess.Popen(
            command, cwd=harness.ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield server, port, config
    finally:
        harness.end(server)
