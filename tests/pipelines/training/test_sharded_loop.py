"""The loop of two real workers over gloo with a sharded network, without Ray: what one checkpoint is made of,
and that the run goes on from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray.train
import ray.train.collective
import torch
import torch.distributed as dist

from pipelines.pairs.parcels import Batch
from pipelines.training import checkpoints, worker
from pipelines.training.watchdog import Watchdog
from pipelines.training.worker import Assignment, TrainLoop
from resshift.config import with_settings
from resshift.presets import test_x4 as toy_preset
from tests.gloo import run_workers


def batches(_: Any, start_row: int, *, rank: int = 0, **__: Any) -> Iterator[Batch]:
    step = start_row // 4
    while True:
        hq = np.random.default_rng((step, rank)).integers(0, 256, (2, 32, 32, 3), np.uint8)
        rows = 4 * step + 2 * rank + np.arange(2)
        keys = np.array([f"{row}.png" for row in rows], object)
        yield {"hq": hq, "lq": np.ascontiguousarray(hq[:, ::4, ::4]), "row": rows, "key": keys}
        step += 1


def broadcast(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def work(rank: int, out: str) -> None:
    """Be a worker of a run of four steps, and of one that goes on to six."""
    here = SimpleNamespace(get_local_rank=lambda: rank, get_node_rank=lambda: 0)
    ray.train.get_context = lambda: here
    ray.train.get_preemption_info = lambda: None
    ray.train.collective.barrier = dist.barrier
    ray.train.collective.broadcast_from_rank_zero = broadcast
    worker.left_by_workers = lambda *_: None
    worker.start_dealer = lambda _: ("dealer", None)
    worker.rank_batches = batches
    sizes = ("train.batch_size=4", "train.micro_batch=2", "train.checkpoint_every=2", "train.parallel=fsdp")
    for steps in (4, 6):
        config = with_settings(toy_preset(), [*sizes, f"train.steps={steps}", "log.tensorboard=false"])
        assignment = Assignment(config=config, data="", out=out, held_cpus=2)
        with (
            contextlib.closing(Watchdog(600)) as watchdog,
            contextlib.closing(TrainLoop(assignment, rank, 2, torch.device("cpu"), watchdog)) as loop,
        ):
            assert loop.state.step == (0 if steps == 4 else 4)
            loop.run()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_workers_write_one_checkpoint_and_go_on_from_it(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    run_workers(2, work, out)
    found = checkpoints.stored(out)
    assert [one.step for one in found if one.complete] == [6, 4, 2]
    parts = [f"part-{i:05d}-of-00002.safetensors" for i in range(2)]
    names = ["config.json", "ema.safetensors", "files.json", *parts, "run.json", "state.pt"]
    assert all(sorted(one.names) == names for one in found)
    assert checkpoints.fetch_latest(out, tmp_path / "got") == 6
    average = (tmp_path / "got" / "ema.safetensors").read_bytes()
    assert (Path(out) / "model" / "model.safetensors").read_bytes() == average
