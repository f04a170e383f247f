"""Four real processes over gloo as two nodes of two workers: DDP, FSDP2 and HSDP, with gradients averaged in
float32 and in bfloat16, against one process.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from resshift.config import ConfigError, RunConfig, with_settings
from resshift.devices import on_device
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.presets import test_x4 as toy_preset
from resshift.training import checkpoint
from resshift.training.losses import Objective
from resshift.training.sharding import mesh_shape
from resshift.training.slots import Slots
from resshift.training.step import DiffusionLearner, build_network
from tests.gloo import run_workers

Lines = list[dict[str, float]]
STEPS, RANKS = 3, 4
pytestmark = pytest.mark.timeout(900)  # four processes on a busy machine
WAYS = [("ddp", "fp32"), ("ddp", "bf16"), ("fsdp", "fp32"), ("hsdp", "fp32"), ("hsdp", "bf16")]


def config_of(parallel: str, gradient_dtype: str = "fp32") -> RunConfig:
    settings = [f"train.parallel={parallel}", f"train.gradient_dtype={gradient_dtype}"]
    return with_settings(toy_preset(), ["optim.warmup_steps=0", "train.micro_batch=2", *settings])


def run(
    config: RunConfig, rank: int = 0, num_ranks: int = 1
) -> tuple[DiffusionLearner, list[dict[str, float]]]:
    """Take three steps on this worker's slots of random pictures, and return the means of each."""
    slots = Slots.of_rank(8, rank, num_ranks)
    objective = Objective(config.model, config.loss, PixelUnshuffle(4))
    network = on_device(build_network(config), torch.device("cpu"), config.train.channels_last)
    learner = DiffusionLearner(config, network, objective, slots)
    lines: Lines = []
    for i in range(STEPS):
        generator = torch.Generator().manual_seed(i)
        hq = torch.randint(0, 256, (8, 32, 32, 3), generator=generator, dtype=torch.uint8)
        batch: dict[str, Tensor] = {"hq": hq, "lq": hq[:, ::4, ::4].contiguous()}
        own = {name: value[slots.start : slots.stop] for name, value in batch.items()}
        learner.state.means.add(*learner.step(own))
        lines.append(learner.state.means.pop())
    return learner, lines


def work(rank: int, out: str) -> None:
    """Be one of four workers, with each way in turn."""
    found: dict[str, Any] = {}
    for parallel, gradient_dtype in WAYS:
        learner, lines = run(config_of(parallel, gradient_dtype), rank, RANKS)
        own: Any = next(learner.state.network.parameters())
        local = own if parallel == "ddp" else own.to_local()
        weights = torch.cat([value.flatten() for value in learner.state.weights()["model"].values()])
        part = checkpoint.take(learner.state) if rank == 0 else checkpoint.take_part(learner.state)
        written: list[Any] = [None] * RANKS
        dist.all_gather_object(written, None if part is None or part.place is None else part.place.index)
        found[f"{parallel} {gradient_dtype}"] = {
            "written": written,
            "lines": lines,
            "share": local.numel() / own.numel(),
            "mesh": None if parallel == "ddp" else list(own.device_mesh.shape),
            "norm": float(weights.double().norm()),
        }
    if rank == 0:
        Path(out).write_text(json.dumps(found))


@pytest.mark.slow
def test_four_workers_train_as_one(tmp_path: Path) -> None:
    """Losses and gradient norms of three steps, in each way. One test, so that the processes, which take the
    time, are started once. A bfloat16 has 8 bits, so a norm of many values is off by less than a step of one
    of them, 2^-8.
    """
    run_workers(RANKS, work, str(tmp_path / "found.json"), ranks_of_node=2)
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    learner, lines = run(config_of("ddp"))
    weights = torch.cat([value.flatten() for value in learner.state.weights()["model"].values()])
    for parallel, gradient_dtype in WAYS:
        facts = found[f"{parallel} {gradient_dtype}"]
        tolerance = 1e-5 if gradient_dtype == "fp32" else 2**-8
        for ours, theirs in zip(facts["lines"], lines, strict=True):
            assert ours == pytest.approx(theirs, rel=tolerance, abs=1e-9), (parallel, gradient_dtype)
        assert facts["norm"] == pytest.approx(float(weights.double().norm()), rel=1e-4)
        none = [None] * RANKS
        mesh, share, written = {
            "ddp": (None, 1.0, none),
            "fsdp": ([4], 0.25, [0, 1, 2, 3]),
            "hsdp": ([2, 2], 0.5, [0, 1, None, None]),  # the second node has copies
        }[parallel]
        assert facts["mesh"] == mesh
        assert facts["written"] == written  # parts of a checkpoint
        assert facts["share"] == pytest.approx(share, abs=0.02)
    for parallel in ("ddp", "hsdp"):  # bfloat16 is really used
        norms = {kind: found[f"{parallel} {kind}"]["lines"][0]["grad_norm"] for kind in ("fp32", "bf16")}
        assert norms["fp32"] != norms["bf16"]


def test_mesh_shards_inside_nodes_of_equal_size() -> None:
    assert mesh_shape("hsdp", [8] * 64) == (8, 8)
    assert mesh_shape("hsdp", [8] * 8) == (8,)  # one node: nothing to replicate
    assert mesh_shape("hsdp", [1] * 4) == (4, 1)
    with pytest.raises(ConfigError, match=r"equally many workers on every node, got \[4, 8\]"):
        mesh_shape("hsdp", [8] * 8 + [4] * 4)
