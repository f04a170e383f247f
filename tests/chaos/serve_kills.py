"""Kill replicas and the job keeper of a real endpoint under load, then replace everything by a rolling
update, and count what clients saw.

    python tests/chaos/serve_kills.py

Four clients ask one after the other, all the time. A replica is killed, then all of them, then the keeper
while twenty pictures are to be answered later; then the configuration is deployed again with other arguments
for every deployment, as a release does it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import harness
import httpx2
import yaml

from tests.pictures import encoded

# Deploys a configuration on the cluster of $RAY_ADDRESS, as `serve deploy` would.
DEPLOY = """
import sys
import yaml
from pipelines.command import connect_to_ray
from serve.__main__ import start

connect_to_ray()
with open(sys.argv[1]) as file:
    start(yaml.safe_load(file))
"""


@dataclass
class Clients:
    """Four clients that never rest; answers by phase."""

    base: str
    data: bytes
    expected: bytes
    phase: str = "calm"
    statuses: dict[str, Counter[str]] = field(default_factory=dict[str, Counter[str]])
    slowest_s: dict[str, float] = field(default_factory=dict[str, float])
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        with httpx2.Client(timeout=60) as client:
            while not self.stop.is_set():
                phase, began = self.phase, time.monotonic()
                try:
                    answer = client.post(f"{self.base}/v1/upscale", content=self.data)
                    told = (
                        "wrong pixels"
                        if answer.status_code == 200 and answer.content != self.expected
                        else str(answer.status_code)
                    )
                except httpx2.HTTPError as error:
                    told = type(error).__name__
                self.statuses.setdefault(phase, Counter())[told] += 1
                self.slowest_s[phase] = max(self.slowest_s.get(phase, 0.0), time.monotonic() - began)

    def failed(self, phase: str) -> int:
        """Return how many requests of a phase had another end than their picture."""
        return sum(count for told, count in self.statuses[phase].items() if told != "200")


def until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> float:
    """Wait; return the seconds it took.

    Raises:
        RuntimeError: it did not come to that.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise RuntimeError(f"{what}: not within {timeout_s:g} s")
        time.sleep(0.1)
    return round(time.monotonic() - began, 1)


def status_of(url: str) -> int:
    """Return the status, 0 when nobody answers."""
    try:
        return httpx2.get(url, timeout=10).status_code
    except httpx2.HTTPError:
        return 0


def pids(server: int, name: str) -> list[int]:
    """Return the processes of a deployment."""
    return [
        pid
        for pid in harness.descendants(server)
        if harness.title(pid).startswith("ray::ServeReplica") and name in harness.title(pid)
    ]


def main() -> int:
    """Run and count."""
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    with tempfile.TemporaryDirectory(prefix="serve-kills-") as temporary:
        work = Path(temporary)

        def change(config: Any) -> None:
            config["applications"][0]["args"]["num_cpus"] = 0.5
            config["applications"][1]["args"]["jobs"]["state"] = str(work / "state")

        with harness.endpoint(work, change, "--model", "nearest-x4@24", "--replicas", "2:2") as (
            server,
            port,
            config,
        ):
            result, claims = disturb(f"http://127.0.0.1:{port}", server, config, work)
    return harness.report(result, claims)


def disturb(
    base: str,
    server: subprocess.Popen[bytes],
    config: Any,
    work: Path,
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Do everything to the endpoint; returns figures and claims."""
    ready = f"{base}/readyz"
    until(lambda: status_of(ready) == 200, "the endpoint is ready", 240)
    data = encoded(height=64, width=64)
    clients = Clients(base, data, httpx2.post(f"{base}/v1/upscale", content=data, timeout=60).content)
    threads = [threading.Thread(target=clients.run) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        time.sleep(5)
        clients.phase = "one replica killed"
        assert harness.kill(pids(server.pid, "model")[0])
        time.sleep(10)
        until(lambda: len(pids(server.pid, "model")) == 2, "two replicas again")
        clients.phase = "all replicas killed"
        for pid in pids(server.pid, "model"):
            harness.kill(pid)
        red_s = until(lambda: status_of(ready) != 200, "/readyz is red", 20)
        green_s = until(lambda: status_of(ready) == 200, "/readyz is green again")
        time.sleep(3)
        clients.phase = "keeper killed"
        views = [
            httpx2.post(f"{base}/v1/upscale", content=data, headers={"Prefer": "respond-async"}, timeout=60)
            for _ in range(20)
        ]
        assert all(view.status_code == 202 for view in views)
        harness.kill(pids(server.pid, "keeper")[0])
        jobs = [view.json()["id"] for view in views]
        until(
            lambda: all(status_of(f"{base}/v1/jobs/{id}/result") == 200 for id in jobs),
            "the results of all jobs",
            180,
        )
        same = sum(
            httpx2.get(f"{base}/v1/jobs/{id}/result", timeout=60).content == clients.expected for id in jobs
        )
        clients.phase = "rolling update"
        before = set(pids(server.pid, ""))
        config["applications"][0]["args"]["num_cpus"] = 0.4
        config["applications"][1]["args"]["limits"]["timeout_s"] = 61
        (work / "new.yaml").write_text(yaml.safe_dump(config))
        update = [sys.executable, "-c", DEPLOY, str(work / "new.yaml")]
        changed = os.environ | harness.ENVIRONMENT | {"RAY_ADDRESS": gcs_address(server.pid)}
        done = subprocess.run(
            update, cwd=harness.ROOT, env=changed, capture_output=True, text=True, timeout=300, check=False
        )
        if done.returncode:
            raise RuntimeError(f"the update failed: {done.stderr[-2000:]}")
        time.sleep(5)
        after = set(pids(server.pid, ""))
    finally:
        clients.stop.set()
        for thread in threads:
            thread.join()
    for phase, statuses in clients.statuses.items():
        print(f"{phase:22} {dict(statuses.most_common())}  slowest {clients.slowest_s[phase]:.1f} s")
    result = {
        "answers": {phase: dict(statuses) for phase, statuses in clients.statuses.items()},
        "slowest_s": {phase: round(seconds, 1) for phase, seconds in clients.slowest_s.items()},
        "red_after_s": red_s,
        "green_after_s": green_s,
        "async_jobs": [len(jobs), same],
        "replaced": len(before - after),
    }
    claims = {
        "no request failed when one replica was killed": clients.failed("one replica killed") == 0,
        "/readyz is red within 5 s when all are gone": red_s <= 5,
        "no async job was lost, and all pixels are right": same == len(jobs),
        "no request failed when the keeper was killed": clients.failed("keeper killed") == 0,
        "the update replaced every replica": not before & after,
        "no request failed in the rolling update": clients.failed("rolling update") == 0,
    }
    return result, claims


def gcs_address(server: int) -> str:
    """Return the address of the endpoint's Ray, from the command line of its raylet."""
    found = [re.search(r"--gcs-address=(\S+)", harness.title(pid)) for pid in harness.descendants(server)]
    return next(match[1] for match in found if match is not None)


if __name__ == "__main__":
    sys.exit(main())
