"""Measure a cluster that grows for a job and shrinks after it, on this machine, with the node types of
cluster.yaml and Ray's fake provider.

The head runs Ray's real autoscaler. Its nodes are raylets with the labels, limits and (logical) GPUs of
cluster.yaml, two logical CPUs each. The model is the stand-in, which repeats pixels and sleeps. Only the head
runs when a job starts.

    python benchmarks/autoscale.py             a bulk job from zero nodes to three GPUs and back to zero;
                                               then an endpoint whose model sleeps
    python benchmarks/autoscale.py --write     also write the dated result

The last line is a JSON object with the main figures. The exit code is 1 when a picture was lost, or a node
did not start or was not released.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import record
import scale
import torch
import yaml

from pipelines.cluster import ray_internals

_STORE_BYTES = 100 << 20
_IDLE_MINUTES = 0.2
_FAKE_CLUSTER = {"RAY_FAKE_CLUSTER": "1"} | ray_internals.QUICK_AUTOSCALER | ray_internals.PATIENT_RAYLETS
_HEAD_TYPE = "ray.head.default"  # the only name that the fake provider accepts


def fake_cluster(port: int) -> dict[str, Any]:
    """Return cluster.yaml in the form of the fake provider: the same worker types, with small resources."""
    types = yaml.safe_load((record.ROOT / "cluster.yaml").read_text())["available_node_types"]
    made: dict[str, Any] = {}
    for name, node in types.items():
        gpus = {"GPU": 1} if node["labels"]["role"] == "gpu" else {}
        made[name] = {
            "resources": {"CPU": 2, "object_store_memory": _STORE_BYTES, **gpus},
            "node_config": {},
            "labels": node["labels"],
            "min_workers": 0,
            "max_workers": min(2, node["max_workers"]),
        }
    most = [made[name] for name in made if name != "head"]
    promised = {
        "max-cpus": sum(one["max_workers"] * 2 for one in most),
        "max-gpus": sum(one["max_workers"] * one["resources"].get("GPU", 0) for one in most),
    }
    head = made.pop("head")
    made[_HEAD_TYPE] = head | {
        "resources": {"CPU": 0},
        "max_workers": 0,
        "labels": {"role": "head"} | {k: str(v) for k, v in promised.items()},
    }
    empty = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "fake",
        "upscaling_speed": 1.0,
        "provider": {
            "type": "fake_multinode",
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "gcs_address": f"{_own_ip()}:{port}",
        },
        "available_node_types": made,
        "head_node_type": _HEAD_TYPE,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in empty},
    }


def _own_ip() -> str:
    import ray

    return ray.util.get_node_ip_address()


@contextmanager
def head(
    work: Path, max_workers: int = 6, idle_minutes: float = _IDLE_MINUTES, *, is_lost: bool = False
) -> Generator[str]:
    """Run a head with the autoscaler in its own process group; yield its address.

    Args:
        work: Folder of its files.
        max_workers: Largest number of nodes beside it.
        idle_minutes: Minutes after which a node that does nothing is released.
        is_lost: Whether it ends as a machine that is lost, with all its nodes, instead of being stopped.
    """
    port = scale.free_port()
    config = fake_cluster(port)
    config |= {"max_workers": max_workers, "idle_timeout_minutes": idle_minutes}
    path = work / "cluster.json"
    path.write_text(json.dumps(config))
    labels = ",".join(
        f"{name}={value}" for name, value in config["available_node_types"][_HEAD_TYPE]["labels"].items()
    )
    command = [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--port={port}",
        "--num-cpus=0",
        f"--labels={labels}",
    ]
    command += [
        f"--object-store-memory={_STORE_BYTES}",
        f"--temp-dir={work}/ray",
        f"--autoscaling-config={path}",
        "--include-dashboard=false",
        f"--dashboard-port={scale.free_port()}",
        "--include-log-monitor=false",
    ]
    command += [f"--node-ip-address={_own_ip()}"]
    process = _started(command, os.environ | _FAKE_CLUSTER, work / "head.log")
    try:
        yield f"{_own_ip()}:{port}"
    finally:
        if not is_lost:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):  # a busy machine is slow to stop nodes
                process.wait(30)
        _end(process)


def _started(command: Sequence[str], environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    """Start a head and wait until it runs. Ray gives its processes half a minute, which does not always do on
    a busy machine: then it is tried again.
    """
    for _ in range(5):
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=environment, stdout=out, stderr=out, start_new_session=True
            )
        while process.poll() is None:
            if "Ray runtime started" in log.read_text(errors="replace"):
                return process
            time.sleep(0.2)
        _end(process)
    raise RuntimeError(f"the head does not start: {log.read_text(errors='replace')[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@dataclass(slots=True)
class Watch:
    """Running node types by seconds since the start."""

    began: float = field(default_factory=time.monotonic)
    seen: list[tuple[float, Counter[str]]] = field(default_factory=list[tuple[float, Counter[str]]])

    def look(self) -> Counter[str]:
        """Count the nodes other than the head, by role and market."""
        import ray

        now = Counter(
            f"{n['Labels'].get('role')}-{n['Labels'].get('market')}"
            for n in ray.nodes()
            if n["Alive"] and n["Labels"].get("role") != "head"
        )
        if not self.seen or self.seen[-1][1] != now:
            self.seen.append((round(time.monotonic() - self.began, 1), now))
        return now

    def until(self, condition: Callable[[Counter[str]], bool], what: str, timeout_s: float = 180) -> float:
        """Wait until the condition holds; return the seconds since the start.

        Raises:
            RuntimeError: The condition did not hold within the timeout.
        """
        deadline = time.monotonic() + timeout_s
        while not condition(self.look()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{what}: not within {timeout_s:g} s; nodes: {self.seen}")
            time.sleep(0.3)
        return round(time.monotonic() - self.began, 1)

    @property
    def most(self) -> dict[str, int]:
        """Return the largest number of nodes of each kind at the same time."""
        kinds = {kind for _, now in self.seen for kind in now}
        return {kind: max(now[kind] for _, now in self.seen) for kind in sorted(kinds)}


def is_empty(nodes: Counter[str]) -> bool:
    """Return whether only the head is left."""
    return not nodes.total()


def bulk(address: str, work: Path, count: int, seconds: float) -> dict[str, Any]:
    """Run a bulk job on a cluster that has only a head, and wait until its nodes are released."""
    source, target, log = work / "in", work / "out", work / "job.log"
    scale.make_pictures(source, count)
    watch = Watch()
    assert is_empty(watch.look())
    command = [sys.executable, str(record.ROOT / "jobs" / "upscale.py"), str(source), str(target)]
    command += [
        "--model",
        f"nearest-x4@{seconds * 1e6 / scale.SIDE_PX**2:.4f}",
        "--replicas",
        "1:3",
        "--set",
        "engine.upscale_s=2",
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=os.environ | {"RAY_ADDRESS": address}, stdout=out, stderr=out)
    ended = threading.Event()

    def keep_looking() -> None:
        while not ended.wait(0.3):
            watch.look()

    looking = threading.Thread(target=keep_looking)
    looking.start()
    try:
        found = scale.finish(process, source, target, log, 600)
    finally:
        ended.set()
        looking.join()
    done = round(time.monotonic() - watch.began, 1)
    first = next(at for at, now in watch.seen if any(kind.startswith("gpu") for kind in now))
    return {
        "pictures": len(found),
        "rows_twice": len(found) - len({row["key"] for row in found}),
        "first_gpu_node_s": first,
        "done_s": done,
        "most_nodes": watch.most,
        "empty_again_s": watch.until(is_empty, "idle nodes are released"),
    }


def endpoint(address: str, work: Path) -> dict[str, Any]:
    """Run an endpoint whose model sleeps: a request starts a replica; without requests the replica stops and
    its node is released.
    """
    port = scale.free_port()
    config = subprocess.run(
        [sys.executable, "-m", "serve", "--model", "nearest-x4", "--replicas", "0:2",
         "--port", str(port), "--print-config"],
        cwd=record.ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    made = yaml.safe_load(config)
    made["applications"][0]["args"]["downscale_s"] = 5
    made["applications"][1]["args"]["limits"]["timeout_s"] = 120
    path = work / "serve.yaml"
    path.write_text(yaml.safe_dump(made))
    watch = Watch()
    base = f"http://127.0.0.1:{port}"
    with (work / "serve.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", "--config", str(path)],
            cwd=record.ROOT,
            env=os.environ | {"RAY_ADDRESS": address},
            stdout=log,
            stderr=log,
        )
    try:
        started = watch.until(lambda _: _answers(f"{base}/readyz"), "the endpoint answers", 240)
        asleep = httpx2.get(f"{base}/readyz").json()["models"]["nearest-x4"]
        gpu_free = watch.until(
            lambda now: not now["gpu-spot"] and not now["gpu-on-demand"], "no GPU node before a request", 120
        )
        picture = next((work / "in").iterdir())
        asked = time.monotonic()
        answer = httpx2.post(f"{base}/v1/upscale", content=picture.read_bytes(), timeout=180)
        woke_s = round(time.monotonic() - asked, 1)
        awake = watch.look()
        slept_s = watch.until(
            lambda _: httpx2.get(f"{base}/readyz").json()["models"]["nearest-x4"]["replicas"] == 0,
            "the model sleeps again",
        )
        gone_s = watch.until(
            lambda now: not now["gpu-spot"] and not now["gpu-on-demand"], "its node is released"
        )
    finally:
        process.terminate()
        process.wait(60)
    if answer.status_code != 200 or not asleep["asleep"] or not awake["gpu-spot"] + awake["gpu-on-demand"]:
        raise RuntimeError(
            f"answer {answer.status_code} {answer.text[:200] if answer.status_code != 200 else ''}, before "
            f"it {asleep}, nodes {awake}"
        )
    return {
        "ready_without_replicas_s": started,
        "no_gpu_node_s": gpu_free,
        "first_answer_s": woke_s,
        "asleep_again_s": slept_s,
        "node_gone_s": gone_s,
    }


def _answers(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed options."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n", 1)[0], epilog="example: benchmarks/autoscale.py --write"
    )
    parser.add_argument("--pictures", type=int, default=150, help="pictures of the bulk job (150)")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="seconds that the stand-in sleeps for each picture (0.5)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=record.RESULTS,
        metavar="DIR",
        help="directory of the JSON file (benchmarks/results)",
    )
    parser.add_argument("--write", action="store_true", help="write the file")
    parser.add_argument("--commit", help="commit to record if the tree has no git directory")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print tables, write the file on request; return 0, or 1 when a check failed."""
    import ray

    options = parse(argv)
    os.environ.update(scale.ENVIRONMENT)
    where = record.machine(torch.device("cpu"), options.commit)
    print(" ".join(f"{key}={value}" for key, value in where.items()))
    # /tmp, whatever TMPDIR is: the paths of Ray's sockets may have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="autoscale-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        try:
            with head(work) as address:
                connect(address)
                grown = bulk(address, work, options.pictures, options.seconds)
                print(
                    "\na bulk job on a cluster that has only a head\n\n"
                    + record.table(["figure", "value"], [[k, v] for k, v in grown.items()]),
                    flush=True,
                )
                slept = endpoint(address, work)
                print(
                    "\nan endpoint whose model sleeps\n\n"
                    + record.table(["figure", "value"], [[k, v] for k, v in slept.items()]),
                    flush=True,
                )
                ray.shutdown()
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    figures = {"benchmark": "autoscale", "machine": where, "bulk": grown, "endpoint": slept}
    if options.write:
        record.write(options.out / record.file_name("autoscale", where), figures)
    print(record.json_line({"bulk": grown, "endpoint": slept}))
    return 0


def connect(address: str, timeout_s: float = 60) -> None:
    """Join the cluster of a head."""
    import ray

    deadline = time.monotonic() + timeout_s
    while True:
        try:
            ray.init(address, log_to_driver=False)
            return
        except ConnectionError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
