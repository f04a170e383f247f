"""Faults of a training run, on purpose: kills, lost nodes, preemption notices, workers that come and go.

    faults.py kill-worker one worker is killed at step 17 of 40: bit for bit the uninterrupted run
    faults.py kill-pair   the same with two workers: no sample twice or missed, loss within 1e-6
    faults.py kill-distill as kill-worker, with the student of a chain in both forms
    faults.py kill-sharded the same with FSDP, whose workers write their parts of the checkpoints
    faults.py kill-data   the processes that make training pairs are killed
    faults.py hang        one of two workers waits for ever in a step
    faults.py mistake     one of two workers finds a mistake, or a bug at every attempt
    faults.py kill-driver the command is killed and run again
    faults.py two-trainers a second command on one --out, while the first lives and after it was killed
    faults.py lose-node   2 -> 1 -> 2 workers as a node of a simulated cluster dies and another comes
    faults.py notice      AWS announces an interruption: checkpoints, then the node goes
    faults.py shared      training and a bulk job on one cluster of four CPUs
    faults.py shared-endpoint the same beside an endpoint, whose replica the bulk job shares
    faults.py kill-upload 20 kills while a checkpoint goes to S3: the latest can be read every time

Each prints what it found, last as one line of JSON: the steps that were lost and the seconds until the next
one; the exit code is 1 when a promise is broken. They take a minute or a few;
what fits into the test suite is in tests/pipelines/training/test_on_ray.py and uses the functions here.
"""

from __future__ import annotations

import contextlib
import itertools
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
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from PIL import Image

from tests import servers, stops
from tests.chaos import harness
from tests.metadata_server import metadata_server
from tests.pictures import encoded

ROOT = Path(__file__).resolve().parents[2]
Found = dict[str, Any]  # what a scenario measured
TERMS = ("loss", "mse", "lpips", "grad_norm", "fake", "fooled", "seen")
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


def hurt(
    trace: str, step: int = -1, rank: int = 0, how: str = "", pause_s: float = 0.0
) -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """Return a worker function that hurts itself before it takes the step after `step`. It computes on the
    CPU, also where a simulated node grants a GPU.

    Args:
        trace: File to which the first worker adds "TIME STEP" before every step; `trace`.hurt exists when it
            has happened.
        step: Step.
        rank: Worker that is hurt.
        how: "kill", "hang" (both once), "mistake" or "bug" (at every attempt).
        pause_s: Seconds that every step takes longer, so that something can happen between them.
    """

    def worker(settings: Mapping[str, str]) -> dict[str, Any]:
        import os
        import signal
        import time

        import ray.train
        import torch

        from pipelines.training import worker
        from resshift.config import ConfigError
        from resshift.training.rsd import RsdLearner
        from resshift.training.step import DiffusionLearner

        worker.granted_device = lambda: torch.device("cpu")
        originals: dict[Any, Any] = {kind: kind.step for kind in (DiffusionLearner, RsdLearner)}

        def step_or_hurt(self: Any, batch: Any) -> Any:
            time.sleep(pause_s)
            own = ray.train.get_context().get_world_rank()
            if own == 0:
                with open(trace, "a") as file:
                    file.write(f"{time.time()} {self.state.step}\n")
            if self.state.step == step and own == rank:
                has_been = os.path.exists(f"{trace}.hurt")
                open(f"{trace}.hurt", "w").close()
                if how == "mistake":
                    raise ConfigError("a setting that only this worker finds wrong")
                if how == "bug":
                    raise ValueError("a bug at this step")
                if how == "hang" and not has_been:
                    time.sleep(10_000)
                if how == "kill" and not has_been:
                    os.kill(os.getpid(), signal.SIGKILL)
            return originals[type(self)](self, batch)

        for kind in originals:
            kind.step = step_or_hurt
        try:
            return worker.train_worker(settings)
        finally:
            for kind, original in originals.items():
                kind.step = original

    return worker


def dying(marker: str, step: int, rank: int = 0) -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """Return a worker function that kills its own process, once, before it takes the step after `step`."""
    return hurt(marker, step, rank, "kill")


def slow(seconds: float, trace: str) -> Callable[[Mapping[str, str]], dict[str, Any]]:
    """Return a worker function whose steps take longer."""
    return hurt(trace, pause_s=seconds)


def recovery(trace: Path) -> dict[str, float]:
    """Return the steps that were taken again and the seconds without a step, around the longest of them."""
    lines = [line.split() for line in trace.read_text().splitlines()]
    steps = [(float(at), int(step)) for at, step in lines]
    gaps = [later[0] - earlier[0] for earlier, later in itertools.pairwise(steps)]
    i = gaps.index(max(gaps))
    return {"lost_steps": steps[i][1] + 1 - steps[i + 1][1], "recover_s": round(gaps[i], 1)}


def train(
    config: Any,
    data: str,
    out: str,
    workers: tuple[int, int] = (1, 1),
    worker: Any = None,
    check_resize_s: float = 60.0,
    init: str | None = None,
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
            init=init,
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
    return {int(line["step"]): {name: line[name] for name in TERMS if name in line} for line in lines}


def learner_of(config: Any) -> Any:
    from pipelines.training.build_learner import build_learner
    from resshift.training.slots import Slots

    return build_learner(config, None, torch.device("cpu"), Slots.of_rank(config.train.batch_size))


def state_of(out: str, step: int) -> dict[str, torch.Tensor]:
    """Return weights, average and moments of a checkpoint, flat."""
    from resshift.config import RunConfig, from_dict
    from resshift.training import checkpoint

    config = from_dict(RunConfig, json.loads(Path(out, "run.json").read_text())["config"])
    state = learner_of(config).state
    checkpoint.load(Path(out, f"step-{step:08d}"), state, config)
    return stops.tensors(state)


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

    os.environ.update(RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2")
    ray.init(
        address="local",
        num_cpus=5,
        object_store_memory=300 << 20,
        logging_level=logging.WARNING,
        log_to_driver="-v" in sys.argv,
    )


def kill_worker(work: Path, num_steps: int = 40, kill_at: int = 17) -> Found:
    return killed(toy(f"train.steps={num_steps}"), make_shards(work), work, kill_at)


def kill_distill(work: Path, num_steps: int = 40, kill_at: int = 17) -> Found:
    """A student in the form of SinSR, and one in that of RSD, whose fake network and head stop too."""
    from resshift import weights
    from resshift.config import with_settings
    from resshift.models import locate_model
    from resshift.training.distillation import student_run
    from resshift.training.step import build_network

    data, chain, at = make_shards(work), toy(f"train.steps={num_steps}"), str(work / "chain")
    weights.save_model(at, "chain", chain.model, build_network(chain))
    teacher = locate_model(at)
    student = student_run(chain, at, teacher.identity(), teacher.config)
    return {
        form: killed(with_settings(student, [f"distill.form={form}"]), data, work / form, kill_at, init=at)
        for form in ("sinsr", "rsd")
    }


def killed(
    config: Any,
    data: str,
    work: Path,
    kill_at: int,
    num_workers: int = 1,
    tolerance: float = 0.0,
    init: str | None = None,
) -> Found:
    """Run `config` undisturbed, and with the last worker killed before the step after `kill_at`: both end
    alike.
    """
    work.mkdir(exist_ok=True)
    whole, cut, workers = str(work / "whole"), str(work / "cut"), (num_workers, num_workers)
    train(config, data, whole, workers, init=init)
    train(config, data, cut, workers, dying(str(work / "marker"), kill_at, num_workers - 1), init=init)
    assert (work / "marker.hurt").exists()
    check_killed(whole, cut, config.train.steps, tolerance)
    check_samples(cut, config.train.steps, 8, 50)
    return recovery(work / "marker")


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


def kill_sharded(work: Path) -> Found:
    """As `kill_pair`; one worker then goes on from the parts of two."""
    found = kill_pair(work, num_steps=24, parallel="fsdp")
    train(toy("train.steps=32"), str(work / "shards"), str(work / "cut"), workers=(1, 1))
    check_samples(str(work / "cut"), 32, 8, 50)
    return found


def kill_data(work: Path, num_steps: int = 120, pause_s: float = 0.1) -> Found:
    """The processes that make pairs for two workers are killed: Ray Data makes their pairs again, and no
    worker starts anew.
    """
    data, out, trace = make_shards(work), str(work / "run"), work / "trace"
    config = toy(f"train.steps={num_steps}", "train.checkpoint_every=1000")
    thread, problems = in_background(
        lambda: train(config, data, out, (2, 2), hurt(str(trace), pause_s=pause_s))
    )
    until(lambda: trace.exists() and len(trace.read_text().splitlines()) > 8, problems, "eight steps")
    victims = descendants("ray::ReadPairSource")
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    thread.join(900)
    if problems:
        raise problems[0]
    assert victims, "no task was making pairs"
    losses(out)
    check_samples(out, num_steps, 8, 50)
    found = recovery(trace)
    assert found["lost_steps"] == 0
    return found | {"killed": len(victims)}


def descendants(title: str) -> list[int]:
    """Return the processes with this title that descend from this one; other clusters may run here."""
    found: list[int] = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if not (process / "cmdline").read_text().startswith(title):
                continue
            pid = int(process.name)
            while pid > 1 and pid != os.getpid():
                pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        if pid == os.getpid():
            found.append(int(process.name))
    return found


def kill_pair(work: Path, num_steps: int = 40, kill_at: int = 17, parallel: str = "ddp") -> Found:
    config = toy(f"train.steps={num_steps}", f"train.parallel={parallel}")
    return killed(config, make_shards(work), work, kill_at, num_workers=2, tolerance=1e-6)


def hang(work: Path, hung_at: int = 17, limit_s: float = 40) -> Found:
    """One of two workers waits for ever in step 18: it ends itself, and both go on from step 16."""
    data, out, trace = make_shards(work), str(work / "run"), work / "trace"
    config = toy("train.steps=24", f"train.step_timeout_s={limit_s}")
    train(config, data, out, (2, 2), hurt(str(trace), hung_at, 1, "hang"))
    check_samples(out, 24, 8, 50)
    found = recovery(trace)
    assert found["lost_steps"] == hung_at + 1 - 16
    return found | {"step_timeout_s": limit_s}


def mistake(work: Path) -> Found:
    """What one of two workers cannot do ends both, at once or, where another attempt might help, at the
    third; the other worker waits for it in a collective operation.
    """
    from pipelines.training.failures import TrainingStopped
    from resshift.config import ConfigError

    data, seconds = make_shards(work), dict[str, float]()
    for how, kind, text in (
        ("mistake", ConfigError, "a setting that only this worker finds wrong"),
        ("bug", TrainingStopped, "3 attempts after step 8 ended with the same error: ValueError on worker 1"),
    ):
        out, trace = str(work / how), work / f"trace-{how}"
        problem: Exception | None = None
        try:
            train(toy("train.steps=24"), data, out, (2, 2), hurt(str(trace), 11, 1, how))
        except kind as error:
            problem = error
        assert str(problem).startswith(text), f"{how}: {problem}"
        last = float(trace.read_text().splitlines()[-1].split()[0])
        seconds[f"{how}_told_after_s"] = round(time.time() - last, 1)
    return seconds


def train_command(data: str, out: str, *settings: str, workers: str = "1") -> list[str]:
    """Return the training job as a command line."""
    command = [sys.executable, "jobs/train.py", "--preset", "test-x4", "--data", data, "--out", out]
    command += ["--workers", workers]
    for setting in (*SETTINGS, *settings):
        command += ["--set", setting]
    return command


def started(command: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def kill_driver(work: Path, num_kills: int = 3) -> Found:
    """The command, and with it its whole local cluster, is killed and run again."""
    data, out = make_shards(work), str(work / "run")
    seconds: list[float] = []
    for _ in range(num_kills):
        process = started(train_command(data, out, "train.steps=4000", workers="2"), work / "log")
        before, began = latest(out), time.monotonic()
        while latest(out) <= before and process.poll() is None:
            time.sleep(0.1)
        assert process.poll() is None, (work / "log").read_text()[-2000:]
        seconds.append(round(time.monotonic() - began, 1))
        while latest(out) <= before + 8:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGKILL)
        print(f"driver killed; latest checkpoint: step {latest(out)}")
    last = train_command(data, out, f"train.steps={latest(out) + 10}", workers="2")
    done = subprocess.run(last, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    losses(out)
    check_samples(out, latest(out), 8, 50)
    # With the start of Ray and of the workers, to the first checkpoint, eight steps later.
    return {"lost_steps": "those since the last checkpoint", "to_next_checkpoint_s": seconds[1:]}


def two_trainers(work: Path) -> Found:
    """A second command on the same --out is refused while the first one lives; when it is killed, the next
    goes on.
    """
    data, out, log = make_shards(work), str(work / "run"), work / "log"
    first = started(train_command(data, out, "train.steps=4000"), log)
    while latest(out) < 8:
        assert first.poll() is None, log.read_text()[-2000:]
        time.sleep(0.2)
    began = time.monotonic()
    command = train_command(data, out, "train.steps=4000")
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    refused_s = time.monotonic() - began
    errors = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert second.returncode == 2, second.stderr[-2000:]
    assert len(errors) == 1
    assert "another run works at" in errors[0]
    assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    third = train_command(data, out, f"train.steps={latest(out) + 8}")
    began = time.monotonic()
    done = subprocess.run(third, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    check_samples(out, latest(out), 8, 50)
    return {"refused_s": round(refused_s, 1), "next_run_s": round(time.monotonic() - began, 1)}


def latest(out: str) -> int:
    from pipelines.training.checkpoints import stored

    return max((found.step for found in stored(out) if found.complete), default=0)


def ray_environment() -> None:
    """Make Ray notice a lost node within seconds."""
    os.environ.update(
        RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
        RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S="0.5",
        RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="10",
        RAY_health_check_period_ms="500",
        RAY_health_check_timeout_ms="1000",
        RAY_health_check_failure_threshold="3",
        RAY_health_check_initial_delay_ms="1000",
    )


def simulated_cluster(num_nodes: int) -> tuple[Any, list[Any]]:
    """Start a head and nodes with room for one worker each, as processes of this machine; a lost node is
    noticed within seconds.
    """
    import ray
    from ray.cluster_utils import Cluster

    ray_environment()
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


def lose_node(work: Path) -> Found:
    """A node is killed with no notice at two workers, one goes on alone, a new node comes, two finish."""
    import ray

    cluster, nodes = simulated_cluster(2)
    config, data, out = elastic_run(work, num_steps=80, checkpoint_every=8)
    trace = work / "trace"
    thread, problems = in_background(lambda: train_on_gpus(config, data, out, slow(0.5, str(trace))))
    until(lambda: worker_counts(out) == [2] and latest(out) >= 8, problems, "a checkpoint by two workers")
    cluster.remove_node(nodes[1], allow_graceful=False)
    print(f"node killed; latest checkpoint: step {latest(out)}")
    until(lambda: worker_counts(out) == [2, 1], problems, "a checkpoint by one worker")
    found = recovery(trace)
    add_node(cluster)
    print(f"node added; latest checkpoint: step {latest(out)}")
    thread.join(600)
    if problems:
        raise problems[0]
    print(f"workers over the run: {worker_counts(out)}")
    assert worker_counts(out) == [2, 1, 2]
    assert found["lost_steps"] <= 8
    losses(out)
    check_samples(out, 80, 8, 50)
    ray.shutdown()
    cluster.shutdown()
    return found


def train_on_gpus(config: Any, data: str, out: str, worker: Any) -> None:
    """One worker a node: nodes have one logical GPU each, which nobody uses (`hurt`), and without CUDA
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


def notice(work: Path, deadline_s: float = 30) -> Found:
    """AWS announces an interruption to the watcher of a node: Ray is told, training saves at once and again
    shortly before the node goes, and one worker goes on from there.
    """
    import ray

    cluster, nodes = simulated_cluster(2)
    config, data, out = elastic_run(work, num_steps=150, checkpoint_every=1000)
    trace = work / "trace"
    with metadata_server() as aws:
        watcher = started(
            [
                *(sys.executable, str(ROOT / "pipelines" / "cluster" / "notices.py")),
                *("--metadata", aws.url, "--every-s", "1"),
                *("--address", cluster.address, "--node-id", nodes[1].node_id),
            ],
            work / "log",
        )
        thread, problems = in_background(lambda: train_on_gpus(config, data, out, slow(0.4, str(trace))))
        until(trace.exists, problems, "the first step")
        time.sleep(2)
        given = time.time()
        aws.interrupt(deadline_s)
        until(lambda: latest(out) > 0, problems, "a checkpoint after the notice", 60)
        found: Found = {"notice_to_checkpoint_s": round(time.time() - given, 1)}
        assert watcher.wait(60) == 0, (work / "log").read_text()
    print(f"notice given; checkpoint at step {latest(out)}, the next regular one would be step 1000")
    until(lambda: time.time() > given + deadline_s, problems, "the deadline")
    cluster.remove_node(nodes[1], allow_graceful=False)
    last = latest(out)
    thread.join(600)
    if problems:
        raise problems[0]
    losses(out)
    check_samples(out, 150, 8, 50)
    print(f"checkpoints before the node went: the last at step {last}; workers: {worker_counts(out)}")
    ray.shutdown()
    cluster.shutdown()
    return found | recovery(trace)


def shared(work: Path, num_pictures: int = 400) -> Found:
    """A bulk job that may grow and a training run with two workers on one cluster of four CPUs: both come to
    their end. Replicas that leave no CPU for their tasks are refused.
    """
    with four_cpus():
        bulk, train = beside(work, num_pictures)
        ended = wait_for_both(work, {"bulk": [*bulk, "--replicas", "1:3"], "train": train})
        bulk[3] = str(work / "out2")
        log = work / "greedy.log"
        greedy = started([*bulk, "--replicas", "4:4"], log)
        assert greedy.wait(120) == 1
        (line,) = [one for one in log.read_text().splitlines() if one.startswith("error: ")]
        assert line.startswith("error: 4 replicas need 4 CPUs"), line
        print(line)
    return ended | {"refused": line}


def shared_endpoint(work: Path, num_pictures: int = 400) -> Found:
    """The same beside an endpoint, whose replica the bulk job shares: both come to their end, and every
    request is answered meanwhile, with a picture or with 503 and when to try again.
    """
    picture, answers = encoded(0, 16, 16), Counter[int]()
    with (
        four_cpus(),
        harness.endpoint(work, lambda _: None, "--model", "nearest-x4") as (server, port, _),
        httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client,
    ):

        def is_ready() -> bool:
            assert server.poll() is None, (work / "serve.log").read_text()[-2000:]
            with contextlib.suppress(httpx2.TransportError):
                return client.get("/readyz").status_code == 200
            return False

        def ask() -> int:
            answer = client.post("/v1/upscale", content=picture)
            assert answer.status_code == 200 or "retry-after" in answer.headers, answer.text
            answers[answer.status_code] += 1
            return answer.status_code

        until(is_ready, (), "the endpoint is up", 600)
        bulk, train = beside(work, num_pictures)
        ended = wait_for_both(work, {"bulk": bulk, "train": train}, ask)
        assert ask() == 200
    assert set(answers) <= {200, 503}, answers
    return ended | {"answers": dict(answers)}


@contextlib.contextmanager
def four_cpus() -> Generator[None]:
    """Run a cluster of four CPUs that commands join."""
    from ray.cluster_utils import Cluster

    ray_environment()
    head = {
        "num_cpus": 4,
        "object_store_memory": 300 << 20,
        "include_dashboard": True,
        "dashboard_port": servers.free_port(),
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    os.environ["RAY_ADDRESS"] = str(cluster.address)
    try:
        yield
    finally:
        cluster.shutdown()


def beside(work: Path, num_pictures: int) -> tuple[list[str], list[str]]:
    """Return the commands of a bulk job and of a training run with two workers and 48 steps."""
    data, out = make_shards(work), str(work / "run")
    harness.make_pictures(str(work / "in"), num_pictures)
    bulk = [sys.executable, "jobs/upscale.py", str(work / "in"), str(work / "out"), "--model", "nearest-x4"]
    return bulk, train_command(data, out, "train.steps=48", workers="2")


def wait_for_both(
    work: Path, commands: Mapping[str, list[str]], meanwhile: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Run commands together until all have ended well; return the seconds of each, and print what they said
    that they wait for.
    """
    began = time.monotonic()
    log = {name: work / f"{name}.log" for name in commands}
    jobs = {name: started(command, log[name]) for name, command in commands.items()}
    ended: dict[str, float] = {}
    while len(ended) < len(jobs):
        for name, process in jobs.items():
            if process.poll() is not None and name not in ended:
                ended[name] = round(time.monotonic() - began, 1)
                assert process.returncode == 0, f"{name}: {log[name].read_text()[-2000:]}"
        assert time.monotonic() - began < 600, "".join(path.read_text()[-2000:] for path in log.values())
        meanwhile()
        time.sleep(0.2)
    assert latest(str(work / "run")) == 48
    said = [line for path in log.values() for line in path.read_text().splitlines()]
    print(*(line for line in said if " waits for " in line or " free are " in line), sep="\n")
    return {f"{name}_s": seconds for name, seconds in ended.items()}


def kill_upload(work: Path, num_kills: int = 20) -> Found:
    """Twenty processes that upload a checkpoint to S3 are killed at twenty moments."""
    with servers.moto(work / "moto.log") as port, servers.using_store(f"http://127.0.0.1:{port}"):
        kill_uploads(work, num_kills)
    return {"kills": num_kills, "unreadable": 0}


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
    from resshift.training import checkpoint
    from resshift.training.checkpoint import Snapshot

    config = toy()
    taken = checkpoint.take(learner_of(config).state)
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


SCENARIOS: dict[str, tuple[Callable[[Path], Found], bool]] = {
    "kill-worker": (kill_worker, True),
    "kill-pair": (kill_pair, True),
    "kill-distill": (kill_distill, True),
    "kill-sharded": (kill_sharded, True),
    "kill-data": (kill_data, True),
    "hang": (hang, True),
    "mistake": (mistake, True),
    "kill-driver": (kill_driver, False),
    "two-trainers": (two_trainers, False),
    "lose-node": (lose_node, False),
    "notice": (notice, False),
    "shared": (shared, False),
    "shared-endpoint": (shared_endpoint, False),
    "kill-upload": (kill_upload, False),
}


def main() -> int:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in SCENARIOS:
        print(__doc__)
        return 2
    scenario, needs_ray = SCENARIOS[name]
    os.environ.update(harness.ENVIRONMENT)
    if needs_ray:
        start_ray()
    with tempfile.TemporaryDirectory(prefix="resshift-chaos-") as work:
        try:
            found = scenario(Path(work))
        except AssertionError as error:
            print(f"{name}: broken: {error}")
            return 1
    print(json.dumps({"scenario": name, **found, "passed": True}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
