"""Faults of a training run, on purpose: kills, lost nodes, preemption notices, workers that come and go.

    faults.py kill-worker one worker is killed at step 17 of 40: bit for bit the uninterrupted run
    faults.py kill-pair   the same with two workers: no sample twice or missed, loss within 1e-6
    faults.py kill-driver the command is killed and run again
    faults.py lose-node   2 -> 1 -> 2 workers as a node of a simulated cluster dies and another comes
    faults.py preempt     a notice: a checkpoint at once, then the node goes
    faults.py kill-upload 20 kills while a checkpoint goes to S3: the latest can be read every time

Each prints what it found and ends with exit code 1 when a promise is broken. They take a minute or a few;
what fits into the test suite is in tests/pipelines/training/test_on_ray.py and uses the functions here.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tests import servers

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "optim.warmup_steps=0",
    "train.log_every=1",
    "train.checkpoint_every=8",
    "log.samples=true",
    "log.tensorboard=false",
)


def make_shards(root: Path, num_photos: int = 50) -> str:
    """Make photos of noise and shards of them; Ray must be running."""
    from pipelines.shards.prepare import prepare_here

    (root / "photos").mkdir(parents=True)
    for i in range(num_photos):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{i:03d}.png")
    prepare_here(str(root / "photos"), str(root / "shards"))
    return str(root / "shards")


def toy(*settings: str) -> Any:
    from resshift.config import with_settings
    from resshift.presets import test_x4

    return with_settings(test_x4(), [*SETTINGS, *settings])


def dying(marker: str, step: int, rank: int = 0) -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """Return a worker function that kills its own process, once, before it takes the step after `step`."""

    def worker(settings: Mapping[str, str]) -> dict[str, Any]:
        import os
        import signal

        import ray.train

        from pipelines.training import worker
        from resshift.training.step import DiffusionLearner

        original = DiffusionLearner.step

        def step_or_die(self: Any, batch: Any) -> Any:
            if (
                self.state.step == step
                and ray.train.get_context().get_world_rank() == rank
                and not os.path.exists(marker)
            ):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, batch)

        DiffusionLearner.step = step_or_die  # type: ignore[method-assign]
        try:
            return worker.train_worker(settings)
        finally:
            DiffusionLearner.step = original  # type: ignore[method-assign]

    return worker


def slow(seconds: float, marker: str = "") -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """Return a worker function whose steps take longer, so that something can happen between them; the first
    leaves a file `marker`. It computes on the CPU, also where a simulated node grants a GPU.
    """

    def worker(settings: Mapping[str, str]) -> dict[str, Any]:
        import time

        import torch

        from pipelines.training import worker
        from resshift.training.step import DiffusionLearner

        worker.granted_device = lambda: torch.device("cpu")
        original = DiffusionLearner.step

        def slow_step(self: Any, batch: Any) -> Any:
            time.sleep(seconds)
            if marker:
                open(marker, "w").close()
            return original(self, batch)

        DiffusionLearner.step = slow_step  # type: ignore[method-assign]
        try:
            return worker.train_worker(settings)
        finally:
            DiffusionLearner.step = original  # type: ignore[method-assign]

    return worker


def train(
    config: Any,
    data: str,
    out: str,
    workers: tuple[int, int] = (1, 1),
    worker: Any = None,
    check_resize_s: float = 60.0,
) -> None:
    """Run the trainer with another worker function."""
    from pipelines.training import trainer

    original = trainer.train_worker
    trainer.train_worker = worker or original
    try:
        trainer.run_training(
            config,
            data,
            out,
            trainer.Workers(least=workers[0], most=workers[1], cpus=0.5),
            check_resize_s=check_resize_s,
        )
    finally:
        trainer.train_worker = original


def seen(out: str) -> dict[int, list[tuple[int, str]]]:
    """Return {step: [(stream row, key)]} that all workers together have seen on the way to the last
    checkpoint.
    """
    from pipelines.training.checkpoints import stored

    steps: dict[int, list[tuple[int, str]]] = {}
    final = max(found.step for found in stored(out) if found.complete)
    for path in sorted(Path(out, "seen").glob("*.jsonl")):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["step"] <= final:
                steps.setdefault(line["step"], []).extend(zip(line["rows"], line["keys"], strict=True))
    return {step: sorted(rows) for step, rows in sorted(steps.items())}


def losses(out: str) -> dict[int, dict[str, float]]:
    """Return the logged loss terms by step; raises when a step is logged twice."""
    from pipelines.training.log import read_lines

    lines = read_lines(out)
    steps = [int(line["step"]) for line in lines]
    assert len(set(steps)) == len(steps), (
        f"logged twice: {[step for step, n in Counter(steps).items() if n > 1]}"
    )
    return {
        int(line["step"]): {name: line[name] for name in ("loss", "mse", "lpips", "grad_norm")}
        for line in lines
    }


def state_of(out: str, step: int) -> dict[str, torch.Tensor]:
    """Return weights, average and moments of a checkpoint, flat."""
    from resshift.weights import read_state_dict

    directory = Path(out, f"step-{step:08d}")
    flat = {
        f"{name}.{key}": value
        for name in ("model", "ema")
        for key, value in read_state_dict(directory / f"{name}.safetensors").items()
    }
    rest = torch.load(directory / "state.pt", weights_only=True)
    moments = rest["optimizers"]["model"]["state"]
    return flat | {f"adam.{i}.{name}": value for i, entry in moments.items() for name, value in entry.items()}


def check_samples(out: str, num_steps: int, batch_size: int, num_photos: int) -> None:
    """Check that step s saw stream rows [(s - 1) B, s B), once each, and every epoch each photo once."""
    steps = seen(out)
    assert sorted(steps) == list(range(1, num_steps + 1)), f"steps {sorted(steps)}"
    for step, rows in steps.items():
        assert [row for row, _ in rows] == list(range((step - 1) * batch_size, step * batch_size)), (
            f"step {step} saw {rows}"
        )
    keys = [key for step in sorted(steps) for _, key in steps[step]]
    whole = len(keys) // num_photos
    for epoch in range(whole):
        assert len(set(keys[epoch * num_photos : (epoch + 1) * num_photos])) == num_photos, (
            f"epoch {epoch} repeats or misses a photo"
        )
    print(
        f"samples: {len(keys)} rows in {num_steps} steps, each once; {whole} whole epochs of {num_photos} "
        "photos, each photo once"
    )


def start_ray() -> None:
    import ray

    os.environ.update(
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2", RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="disabled"
    )
    ray.init(
        address="local",
        num_cpus=5,
        object_store_memory=300 << 20,
        logging_level=logging.WARNING,
        log_to_driver="-v" in sys.argv,
    )


def kill_worker(work: Path, num_steps: int = 40, kill_at: int = 17) -> None:
    data = make_shards(work)
    config = toy(f"train.steps={num_steps}")
    whole, cut = str(work / "whole"), str(work / "cut")
    train(config, data, whole)
    train(config, data, cut, worker=dying(str(work / "marker"), kill_at))
    assert (work / "marker").exists()
    check_killed(whole, cut, num_steps, tolerance=0.0)
    check_samples(cut, num_steps, 8, 50)


def check_killed(whole: str, cut: str, num_steps: int, tolerance: float) -> None:
    """Check that two runs logged the same losses and, at tolerance 0, that their states are bitwise equal."""
    ours, theirs = losses(cut), losses(whole)
    assert list(ours) == list(theirs) == list(range(1, num_steps + 1))
    worst = max(abs(ours[step][name] - theirs[step][name]) for step in ours for name in ours[step])
    print(f"loss log: {len(ours)} lines, largest difference {worst:g}")
    assert worst <= tolerance
    a, b = state_of(cut, num_steps), state_of(whole, num_steps)
    assert a.keys() == b.keys()
    difference = max(float((a[key].double() - b[key].double()).abs().max()) for key in a)
    print(f"weights, average, moments: {len(a)} tensors, largest difference {difference:g}")
    assert tolerance or all(torch.equal(a[key], b[key]) for key in a)


def kill_pair(work: Path, num_steps: int = 40, kill_at: int = 17) -> None:
    data = make_shards(work)
    config = toy(f"train.steps={num_steps}")
    whole, cut = str(work / "whole"), str(work / "cut")
    train(config, data, whole, workers=(2, 2))
    train(config, data, cut, workers=(2, 2), worker=dying(str(work / "marker"), kill_at, rank=1))
    assert (work / "marker").exists()
    check_killed(whole, cut, num_steps, tolerance=1e-6)
    check_samples(cut, num_steps, 8, 50)


def kill_driver(work: Path) -> None:
    data, out = make_shards(work), str(work / "run")
    command = [
        sys.executable,
        "jobs/train.py",
        "--preset",
        "test-x4",
        "--data",
        data,
        "--out",
        out,
        "--workers",
        "2",
    ]
    for setting in (*SETTINGS, "train.steps=400"):
        command += ["--set", setting]
    kills = 0
    while kills < 3:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        before = latest(out)
        while latest(out) <= before + 8 and process.poll() is None:
            time.sleep(0.2)
        assert process.poll() is None, f"ended with {process.returncode}"
        os.killpg(process.pid, signal.SIGKILL)  # the driver and, with it, its whole cluster
        kills += 1
        print(f"driver killed; latest checkpoint: step {latest(out)}")
    command[-1] = f"train.steps={latest(out) + 10}"
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    final = latest(out)
    losses(out)
    check_samples(out, final, 8, 50)


def latest(out: str) -> int:
    from pipelines.training.checkpoints import stored

    return max((found.step for found in stored(out) if found.complete), default=0)


def simulated_cluster(num_nodes: int) -> tuple[Any, list[Any]]:
    """Start a head and nodes with room for one worker each, as processes of this machine; a lost node is
    noticed within seconds.
    """
    import ray
    from ray.cluster_utils import Cluster

    os.environ.update(
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
        RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5",
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10",
        RAY_health_check_period_ms="500",
        RAY_health_check_timeout_ms="1000",
        RAY_health_check_failure_threshold="3",
        RAY_health_check_initial_delay_ms="1000",
        RAY_AUTH_MODE="disabled",
        RAY_USAGE_STATS_ENABLED="0",
    )
    head = {
        "num_cpus": 3,
        "num_gpus": 0,
        "object_store_memory": 150 << 20,
        "include_dashboard": True,
        "dashboard_port": servers.free_port(),
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [add_node(cluster) for _ in range(num_nodes)]
    ray.init(address=cluster.address, logging_level=logging.WARNING, log_to_driver="-v" in sys.argv)
    cluster.wait_for_nodes()
    return cluster, nodes


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 << 20)


def in_background(call: Callable[[], None]) -> tuple[threading.Thread, list[BaseException]]:
    """Run the trainer in a thread: nodes of a simulated cluster can be added by the main thread only."""
    problems: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:  # handed to the main thread
            problems.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, problems


def until(
    condition: Callable[[], bool], problems: Sequence[BaseException], what: str, timeout_s: float = 300
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if problems:
            raise problems[0]
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(0.2)


def worker_counts(out: str) -> list[int]:
    """Return how many workers did each step on the way to the last checkpoint, runs of equal numbers drawn
    together.
    """
    from pipelines.training.log import read_lines

    counts: list[int] = []
    for line in read_lines(out):
        if not counts or counts[-1] != line["workers"]:
            counts.append(int(line["workers"]))
    return counts


def elastic_run(work: Path, num_steps: int, checkpoint_every: int) -> tuple[Any, str, str]:
    data, out = make_shards(work), str(work / "run")
    return toy(f"train.steps={num_steps}", f"train.checkpoint_every={checkpoint_every}"), data, out


def lose_node(work: Path) -> None:
    """A node dies with no notice at two workers, one goes on alone, a new node comes, two finish."""
    import ray

    cluster, nodes = simulated_cluster(2)
    config, data, out = elastic_run(work, num_steps=80, checkpoint_every=8)
    thread, problems = in_background(lambda: train_on_gpus(config, data, out, slow(0.5)))
    until(lambda: worker_counts(out) == [2] and latest(out) >= 8, problems, "a checkpoint by two workers")
    cluster.remove_node(nodes[1], allow_graceful=False)
    print(f"node killed; latest checkpoint: step {latest(out)}")
    until(lambda: worker_counts(out) == [2, 1], problems, "a checkpoint by one worker")
    add_node(cluster)
    print(f"node added; latest checkpoint: step {latest(out)}")
    thread.join(600)
    if problems:
        raise problems[0]
    print(f"workers over the run: {worker_counts(out)}")
    assert worker_counts(out) == [2, 1, 2]
    losses(out)
    check_samples(out, 80, 8, 50)
    ray.shutdown()
    cluster.shutdown()


def train_on_gpus(config: Any, data: str, out: str, worker: Any) -> None:
    """One worker a node: nodes have one logical GPU each, which nobody uses (`slow`), and without CUDA
    workers take gloo.
    """
    from pipelines.training import trainer

    trainer.train_worker, kept = worker, trainer.train_worker
    try:
        trainer.run_training(
            config, data, out, trainer.Workers(least=1, most=2, gpus=1.0, cpus=0.5), check_resize_s=3.0
        )
    finally:
        trainer.train_worker = kept


def preempt(work: Path) -> None:
    """A notice of eight seconds: the next check saves, the node goes, one worker goes on from that step."""
    import ray
    from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue] - compiled
    from ray.core.generated import autoscaler_pb2

    cluster, nodes = simulated_cluster(2)
    config, data, out = elastic_run(work, num_steps=60, checkpoint_every=50)
    first_step = work / "first-step"
    thread, problems = in_background(lambda: train_on_gpus(config, data, out, slow(0.4, str(first_step))))
    until(first_step.exists, problems, "the first step")
    time.sleep(2)
    messages: Any = autoscaler_pb2
    reason = messages.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    GcsClient(address=cluster.address).drain_node(
        nodes[1].node_id, reason, "spot reclaim", int((time.time() + 8) * 1000)
    )
    until(lambda: latest(out) > 0, problems, "a checkpoint after the notice", 60)
    saved = latest(out)
    print(f"notice given; checkpoint at step {saved}, the next regular one would be step 50")
    time.sleep(8)
    cluster.remove_node(nodes[1], allow_graceful=False)
    thread.join(600)
    if problems:
        raise problems[0]
    assert 0 < saved < 50
    losses(out)
    check_samples(out, 60, 8, 50)
    print(f"workers over the run: {worker_counts(out)}")
    ray.shutdown()
    cluster.shutdown()


def kill_upload(work: Path, num_kills: int = 20) -> None:
    """Twenty processes that upload a checkpoint to S3 are killed at twenty moments."""
    with servers.moto(work / "moto.log") as port, servers.using_store(f"http://127.0.0.1:{port}"):
        kill_uploads(work, num_kills)


def kill_uploads(work: Path, num_kills: int) -> None:
    from pipelines.training import checkpoints
    from pipelines.training.checkpoints import Keeping
    from resshift import storage
    from resshift.storage import s3

    s3.call(s3.DEFAULT, "create_bucket", Bucket="kills")
    out, outcomes = "s3://kills/run", Counter[str]()
    manifests = write_checkpoints(work, range(1, num_kills + 2))
    started_at = time.monotonic()
    assert Upload(work, out, manifests[0]).wait() == 0
    duration_s = time.monotonic() - started_at
    for i, manifest in enumerate(manifests[1:]):
        process = Upload(work, out, manifest)
        time.sleep(duration_s * (i + 0.5) / num_kills)
        process.kill()
        process.wait()
        half = [found.step for found in checkpoints.stored(out) if not found.complete]
        with tempfile.TemporaryDirectory() as directory:
            found = checkpoints.fetch_latest(out, Path(directory))  # verifies every byte
        assert found is not None, "no checkpoint can be read"
        is_published = found == manifest["step"]
        outcomes["published" if is_published else "half-written" if half else "nothing written"] += 1
        if i % 5 == 4:
            checkpoints.clear(out, Keeping(3))
            assert all(item.complete for item in checkpoints.stored(out)), "an orphan is left"
    checkpoints.clear(out, Keeping(1))
    left = [entry.key for entry in storage.list_entries(out)]
    assert len(left) == 6, left
    print(
        f"{num_kills} kills: {dict(outcomes)}; the latest was readable every time; after clearing one "
        "checkpoint is left, no orphan"
    )


def write_checkpoints(work: Path, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Write real checkpoints of a few megabytes and return their manifests."""
    from resshift.networks.autoencoder import PixelUnshuffle
    from resshift.training import checkpoint
    from resshift.training.checkpoint import Snapshot
    from resshift.training.losses import Objective
    from resshift.training.step import DiffusionLearner, build_network

    config = toy()
    learner = DiffusionLearner(
        config, build_network(config), Objective(config.model, config.loss, PixelUnshuffle(4))
    )
    taken = checkpoint.take(learner.state)
    return [
        checkpoint.write(work / str(step), Snapshot(step, taken.weights, taken.rest | {"step": step}), config)
        for step in steps
    ]


class Upload:
    """A forked process that publishes one checkpoint."""

    def __init__(self, work: Path, out: str, manifest: dict[str, Any]) -> None:
        self.pid = os.fork()
        if not self.pid:
            from pipelines.training.checkpoints import publish

            try:
                publish(work / str(manifest["step"]), out, manifest)
            finally:
                os._exit(0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return os.waitpid(self.pid, 0)[1]


SCENARIOS: dict[str, tuple[Callable[[Path], None], bool]] = {
    "kill-worker": (kill_worker, True),
    "kill-pair": (kill_pair, True),
    "kill-driver": (kill_driver, False),
    "lose-node": (lose_node, False),
    "preempt": (preempt, False),
    "kill-upload": (kill_upload, False),
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in SCENARIOS:
        print(__doc__)
        return 2
    scenario, needs_ray = SCENARIOS[name]
    if needs_ray:
        start_ray()
    with tempfile.TemporaryDirectory(prefix="resshift-chaos-") as work:
        try:
            scenario(Path(work))
        except AssertionError as error:
            print(f"{name}: broken: {error}")
            return 1
    print(f"{name}: held")
    return 0


if __name__ == "__main__":
    sys.exit(main())
