"""`ray job submit` on a head of its own with the token on: the commands of the documents, and nothing without
the token.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest

from pipelines.ledger import ledger
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
TOKEN = "0123456789abcdef" * 4


@dataclass(frozen=True, slots=True)
class Head:
    """A head that runs, and the environment of somebody who may use it."""

    url: str
    environment: dict[str, str]

    def submit(
        self, *entrypoint: str, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "job",
            "submit",
            "--address",
            self.url,
            "--working-dir",
            str(ROOT),
            "--",
        ]
        return subprocess.run(
            [*command, *entrypoint],
            env=environment or self.environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Start a head with ports and a session folder of its own; end it, and nothing else, by its process."""
    # Not pytest's folder: the names of Ray's sockets may have 107 bytes.
    with tempfile.TemporaryDirectory(prefix="head-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        (Path(folder) / ".ray").mkdir(mode=0o700)
        (Path(folder) / ".ray" / "auth_token").touch(0o600)
        (Path(folder) / ".ray" / "auth_token").write_text(TOKEN)
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))
        }
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        environment |= {
            "HOME": folder,
            "PATH": path,
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
        }
        port = free_port()
        command = [
            sys.executable,
            "-m",
            "ray.scripts.scripts",
            "start",
            "--head",
            "--block",
            f"--port={free_port()}",
        ]
        command += [
            f"--dashboard-port={port}",
            "--dashboard-host=127.0.0.1",
            f"--temp-dir={folder}/ray",
            "--num-cpus=6",
        ]
        command += [
            "--object-store-memory=200000000",
            f"--ray-client-server-port={free_port()}",
            f"--dashboard-agent-listen-port={free_port()}",
        ]
        with (Path(folder) / "head.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            _wait_for(f"http://127.0.0.1:{port}/api/gcs_healthz", process, Path(folder) / "head.log")
            yield Head(f"http://127.0.0.1:{port}", environment)
        finally:
            process.send_signal(signal.SIGTERM)  # `ray start --block` ends what it has started
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path, timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"the head does not answer:\n{log.read_text(errors='replace')[-2000:]}")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(6):
        cv2.imwrite(
            str(folder / f"{i}.png"), np.random.default_rng(i).integers(0, 256, (48, 40, 3), np.uint8)
        )
    return folder


def status_of(url: str, token: str | None) -> int:
    request = urllib.request.Request(
        f"{url}/api/jobs/", headers={"Authorization": f"Bearer {token}"} if token else {}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_jobs_are_refused_without_the_token_and_with_another(head: Head, tmp_path: Path) -> None:
    assert (status_of(head.url, None), status_of(head.url, "f" * 64), status_of(head.url, TOKEN)) == (
        401,
        403,
        200,
    )
    made = tmp_path / "made"
    stranger = head.environment | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
    refused = head.submit("touch", str(made), environment=stranger)
    assert refused.returncode != 0
    assert not made.exists()


def test_a_submitted_bulk_job_finds_code_and_entry_point_on_the_cluster(
    head: Head, photos: Path, tmp_path: Path
) -> None:
    command = ("python", "jobs/upscale.py", str(photos), str(tmp_path / "out"), "--model", "nearest-x4")
    done = head.submit(*command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = ledger.read(str(tmp_path / "out")).to_pylist()
    assert sorted((row["key"], row["status"]) for row in found) == [(f"{i}.png", "ok") for i in range(6)]
    for i in range(6):
        given, made = cv2.imread(str(photos / f"{i}.png")), cv2.imread(str(tmp_path / "out" / f"{i}_x4.png"))
        assert given is not None
        assert np.array_equal(made, given.repeat(4, axis=0).repeat(4, axis=1))  # pyright: ignore[reportArgumentType]


def test_a_submitted_training_run_leaves_a_model(head: Head, photos: Path, tmp_path: Path) -> None:
    for i in range(6, 24):
        cv2.imwrite(
            str(photos / f"{i}.png"), np.random.default_rng(i).integers(0, 256, (72, 80, 3), np.uint8)
        )
    shards, run = tmp_path / "shards", tmp_path / "run"
    prepared = head.submit("python", "jobs/prepare.py", str(photos), str(shards), "--min-side", "32")
    assert (shards / "manifest.json").exists(), prepared.stdout[-2000:]
    settings = (
        "--set",
        "train.steps=2",
        "--set",
        "train.checkpoint_every=2",
        "--set",
        "optim.warmup_steps=0",
    )
    done = head.submit(
        "python", "jobs/train.py", "--preset", "test-x4", "--data", str(shards), "--out", str(run), *settings
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (run / "model" / "model.safetensors").exists()


def test_the_doctor_of_a_submitted_job_sees_the_cluster(head: Head, tmp_path: Path) -> None:
    done = head.submit("python", "jobs/doctor.py", "--nodes", str(tmp_path))
    shown = done.stdout
    assert re.search(r"ok    cluster: 1 nodes, 6 CPUs, 0 GPUs", shown), shown[-2000:] + done.stderr[-1000:]
    assert re.search(r"ok    [\d.]+ python: 3\.", shown)
    assert "ok    token" in shown
