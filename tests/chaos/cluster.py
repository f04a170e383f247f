"""Training, a bulk job and an endpoint together on a simulated cluster that grows by itself: a spot notice
takes one of its nodes, then the head is lost with everything on it and comes back.

    python tests/chaos/cluster.py              three notices of 30 s, some minutes
    python tests/chaos/cluster.py --quick      one notice of 10 s

The head runs Ray's autoscaler with the node types of cluster.yaml (benchmarks/autoscale.py); its nodes are
raylets on this machine. After the loss the same commands are started again, as docs/operate.md says.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2

from tests.chaos import faults, harness
from tests.metadata_server import metadata_server
from tests.pictures import decoded, encoded, enlarged
from tests.scripts import load_script
from tests.servers import free_port

ROOT = Path(__file__).parents[2]
MOST_NODES, IDLE_MINUTES = 4, 5
# One model, whose pixels are known; at a second a picture the bulk job is at work when the head is lost.
SLOW, FAST = "nearest-x4@250", "nearest-x4"
STEPS_AFTER = 4
# A node that is killed is noticed within seconds, one that is slow for half a minute is not taken for dead.
NOTICED_SOON = {
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "30000",
    "RAY_health_check_failure_threshold": "4",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


class Scenario:
    """The three commands on one cluster after the other, and how far they are."""

    def __init__(self, folder: Path, pictures: int) -> None:
        self.folder, self.pictures = folder, pictures
        self.data = faults.make_shards(folder)
        self.run, self.out, self.port = str(folder / "run"), str(folder / "out"), free_port()
        harness.make_pictures(str(folder / "in"), pictures)
        self.jobs: dict[str, subprocess.Popen[bytes]] = {}
        self.endpoint: subprocess.Popen[bytes] | None = None
        self.answers: Counter[int | str] = Counter()
        self.nodes = 0

    def start(self, address: str, model: str, steps: int) -> dict[str, float]:
        """Start the commands, or start them again; return the seconds until each has done something."""
        self.jobs = {}
        serve = [sys.executable, "-m", "serve", "--model", model, "--replicas", "1", "--port", str(self.port)]
        self.endpoint = faults.started(serve, self.folder / "serve.log", RAY_ADDRESS=address)
        train = faults.train_command(self.data, self.run, f"train.steps={steps}", "train.checkpoint_every=2")
        self.jobs["train"] = faults.started(
            [*train, "--gpus-per-worker", "0"], self.folder / "train.log", RAY_ADDRESS=address
        )
        before = faults.latest(self.run)
        took = {
            "first_answer_s": self.until(self.has_answered, "an answer of the endpoint"),
            "first_checkpoint_s": self.until(lambda: faults.latest(self.run) > before, "a checkpoint"),
        }
        upscale = harness.command(str(self.folder / "in"), self.out, "--model", model)
        self.jobs["bulk"] = faults.started(upscale, self.folder / "bulk.log", RAY_ADDRESS=address)
        return took

    def end(self) -> None:
        """End what still runs."""
        for process in (*self.jobs.values(), *([self.endpoint] if self.endpoint else [])):
            harness.end(process)

    def has_answered(self) -> bool:
        """Ask the endpoint for a picture; return whether it was the right one."""
        picture = encoded(0, 16, 16)
        try:
            url = f"http://127.0.0.1:{self.port}/v1/upscale"
            answer = httpx2.post(url, content=picture, timeout=60)
        except httpx2.TransportError as error:
            self.answers[type(error).__name__] += 1
            return False
        self.answers[answer.status_code] += 1
        return answer.status_code == 200 and bool((decoded(answer.content) == enlarged(picture)).all())

    def done(self) -> int:
        """Return the number of pictures that have been made."""
        return len(harness.outputs(self.out)) if Path(self.out).exists() else 0

    def until(self, holds: Callable[[], bool], what: str, timeout_s: float = 600) -> float:
        """Wait until something holds and return the seconds that took.

        Raises:
            RuntimeError: It does not hold in time, or a job has failed.
        """
        import ray

        began = time.monotonic()
        while not holds():
            alive = [one for one in ray.nodes() if one["Alive"] and one["Labels"].get("role") != "head"]
            self.nodes = max(self.nodes, len(alive))
            ended = {name: one.poll() for name, one in self.jobs.items() if one.poll()}
            if ended or time.monotonic() - began > timeout_s:
                raise RuntimeError(f"{what}: not within {timeout_s:g} s; failed: {ended}")
            time.sleep(0.5)
        return round(time.monotonic() - began, 1)

    def log(self) -> str:
        paths = self.folder.glob("*.log")
        text = {
            path.name: [
                line for line in path.read_text(errors="replace").splitlines() if "Cleaner" not in line
            ]
            for path in paths
        }
        return "\n".join(f"--- {name}\n" + "\n".join(lines[-40:]) for name, lines in text.items())


def lose_a_node(scenario: Scenario, address: str, notice_s: float) -> dict[str, float]:
    """AWS announces the end of a GPU node, whose watcher tells Ray; then the machine goes."""
    import ray

    node = next(one for one in ray.nodes() if one["Alive"] and one["Labels"].get("role") == "gpu")
    with metadata_server() as aws:
        aws.interrupt(notice_s)
        given = time.monotonic()
        watcher = [sys.executable, str(ROOT / "pipelines" / "cluster" / "notices.py"), "--metadata", aws.url]
        watcher += ["--every-s", "1", "--address", address, "--node-id", node["NodeID"]]
        with (scenario.folder / "notices.log").open("ab") as file:
            subprocess.run(watcher, stdout=file, stderr=file, check=True, timeout=120)
    told_s = round(time.monotonic() - given, 1)
    time.sleep(max(0.0, given + notice_s - time.monotonic()))
    (raylet,) = [
        pid
        for pid in harness.descendants(os.getpid())
        if "raylet/raylet" in harness.title(pid) and node["RayletSocketName"] in harness.title(pid)
    ]
    for pid in [raylet, *harness.descendants(raylet)]:
        harness.kill(pid)
    gone_s = scenario.until(
        lambda: not any(one["Alive"] and one["NodeID"] == node["NodeID"] for one in ray.nodes()),
        "Ray notices the lost node",
    )
    return {"ray_told_s": told_s, "noticed_s": gone_s}


def scenario(
    work: Scenario, autoscale: Any, notices_s: Sequence[float]
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Run it; return what was measured, and the claims."""
    import ray

    found: dict[str, Any] = {"pictures": work.pictures, "notices_s": notices_s, "lost_nodes": []}
    first, second = work.folder / "a", work.folder / "b"
    for folder in (first, second):
        folder.mkdir()
    with autoscale.head(first, MOST_NODES, IDLE_MINUTES, is_lost=True) as address:
        autoscale.connect(address)
        found |= work.start(address, SLOW, steps=100_000)
        found["first_picture_s"] = work.until(lambda: work.done() > 0, "a picture of the bulk job")
        for notice_s in notices_s:
            lost = lose_a_node(work, address, notice_s)
            made, step = work.done(), faults.latest(work.run)
            lost["answer_s"] = work.until(work.has_answered, "an answer after a node was lost")
            lost["picture_s"] = work.until(lambda made=made: work.done() > made, "a picture after that")
            lost["checkpoint_s"] = work.until(
                lambda step=step: faults.latest(work.run) > step, "a checkpoint after that"
            )
            found["lost_nodes"].append(lost)
        found["answers"] = {str(status): number for status, number in work.answers.items()}
        ray.shutdown()
    work.end()
    made, step = work.done(), faults.latest(work.run)
    found |= {"most_nodes": work.nodes, "made_when_head_was_lost": made, "step_when_head_was_lost": step}
    with autoscale.head(second, MOST_NODES, IDLE_MINUTES) as address:
        autoscale.connect(address)
        began = time.monotonic()
        again = work.start(address, FAST, step + STEPS_AFTER)
        codes = {name: process.wait(900) for name, process in work.jobs.items()}
        found["on_the_new_head"] = again | {"jobs_ended_s": round(time.monotonic() - began, 1)}
        work.end()
        ray.shutdown()
    rows = harness.all_rows(work.out)
    claims = {
        "both jobs end well on the new head": codes == {"train": 0, "bulk": 0},
        "the head was lost in the middle of both": 0 < made < work.pictures and step > 0,
        "every picture is made": len(harness.outputs(work.out)) == work.pictures,
        "one row for each": len({row["key"] for row in rows if row["status"] == "ok"}) == work.pictures,
        "no row twice": harness.duplicates(rows) == 0,
        "training ends with its last step": faults.latest(work.run) == step + STEPS_AFTER,
    }
    try:
        faults.losses(work.run)
        faults.check_samples(work.run, step + STEPS_AFTER, 8, 50)
        claims["no step logged twice, no sample seen twice or missed"] = True
    except AssertionError as error:
        print(error)
        claims["no step logged twice, no sample seen twice or missed"] = False
    return found, claims


def main() -> int:
    """Run the scenario; return 0 when every claim holds."""
    pictures, notices_s = (400, [10.0]) if "--quick" in sys.argv[1:] else (2000, [30.0] * 3)
    autoscale: Any = load_script("benchmarks/autoscale.py")
    os.environ.update(harness.ENVIRONMENT)
    os.environ.update(NOTICED_SOON)
    # /tmp, whatever TMPDIR is: the paths of Ray's sockets may have at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="cluster-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        work = Scenario(Path(folder), pictures)
        try:
            found, claims = scenario(work, autoscale, notices_s)
        except (RuntimeError, subprocess.SubprocessError, StopIteration) as error:
            print(work.log(), f"broken: {error}", sep="\n")
            return 1
        finally:
            work.end()
        if not all(claims.values()):
            print(work.log())
        return harness.report(found, claims)


if __name__ == "__main__":
    sys.exit(main())
