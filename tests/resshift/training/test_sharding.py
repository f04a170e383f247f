"""Two real processes over gloo, DDP and FSDP2: the same numbers as one process, and checkpoints that any of
them can read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from resshift.config import RunConfig, with_settings
from resshift.devices import on_device
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.presets import test_x4 as toy_preset
from resshift.training import checkpoint
from resshift.training.checkpoint import Snapshot
from resshift.training.losses import Objective
from resshift.training.slots import Slots
from resshift.training.step import DiffusionLearner, TrainState, build_network
from tests.gloo import run_workers

STEPS = 3
WAYS = ("ddp", "fsdp")


def config_of(parallel: str) -> RunConfig:
    return with_settings(
        toy_preset(),
        ["optim.warmup_steps=0", "optim.clip_norm=0.3", "train.micro_batch=2", f"train.parallel={parallel}"],
    )


def batch(i: int) -> dict[str, Tensor]:
    hq = torch.randint(0, 256, (8, 32, 32, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
    return {"hq": hq, "lq": hq[:, ::4, ::4].contiguous()}


def start(config: RunConfig, rank: int = 0, num_ranks: int = 1) -> DiffusionLearner:
    objective = Objective(config.model, config.loss, PixelUnshuffle(4))
    network = on_device(build_network(config), torch.device("cpu"), config.train.channels_last)
    return DiffusionLearner(config, network, objective, Slots.of_rank(8, rank, num_ranks))


def run(learner: DiffusionLearner, steps: range) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []
    for i in steps:
        slots = learner.slots
        learner.state.means.add(
            *learner.step({name: value[slots.start : slots.stop] for name, value in batch(i).items()})
        )
        lines.append(learner.state.means.pop())
    return lines


def work(rank: int, root: str) -> None:
    """Be one of two workers, with each way of sharing in turn."""
    for parallel in WAYS:
        take_steps(rank, parallel, Path(root) / parallel)


def save(learner: DiffusionLearner, rank: int, directory: Path) -> None:
    """Let each worker write its files, and make one checkpoint of them."""
    state = learner.state
    snapshot = checkpoint.take(state) if rank == 0 else checkpoint.take_part(state)
    own = directory if rank == 0 else directory.with_name("of-the-second")
    manifests: list[Any] = [None, None]
    manifest = snapshot and checkpoint.write(own, snapshot, learner.config)
    dist.all_gather_object(manifests, manifest)
    if rank == 0 and manifests[1] is not None:
        for name in manifests[1]["files"]:
            (directory.with_name("of-the-second") / name).rename(directory / name)
        files = manifests[0]["files"] | manifests[1]["files"]
        (directory / "files.json").write_text(checkpoint.manifest_text({**manifests[0], "files": files}))
    dist.barrier()


def whole(state: TrainState) -> tuple[Any, Any]:
    """Gather weights and the rest of the state, on all workers."""
    return state.weights(), state.state_dict()


def assert_equal(ours: Any, theirs: Any) -> None:
    """Check that two states are bitwise equal."""
    if isinstance(theirs, Mapping):
        assert ours.keys() == theirs.keys()
        for key in theirs:
            assert_equal(ours[key], theirs[key])
    elif isinstance(theirs, list | tuple):
        for one, other in zip(ours, theirs, strict=True):
            assert_equal(one, other)
    else:
        assert torch.equal(ours, theirs) if isinstance(theirs, Tensor) else ours == theirs


def take_steps(rank: int, parallel: str, out: Path) -> None:
    """Three steps by two workers, and two more after a round trip through a checkpoint; what one process must
    reproduce is written down.
    """
    config = config_of(parallel)
    learner = start(config, rank, 2)
    lines = run(learner, range(STEPS))
    save(learner, rank, out / "saved")
    before = whole(learner.state)
    resumed = start(config, rank, 2)
    checkpoint.load(out / "saved", resumed.state, config, rank)
    assert_equal(whole(resumed.state), before)
    if parallel == "fsdp":
        read_unsharded(rank, before, out / "unsharded")
    after = [run(each, range(STEPS, STEPS + 2)) for each in (learner, resumed)]
    bad = resumed.step(
        {name: value[resumed.slots.start : resumed.slots.stop] for name, value in batch(9).items()}
    )
    own = next(learner.state.network.parameters())
    share = (own.to_local() if parallel == "fsdp" else own).numel() / own.numel()  # type: ignore[operator, union-attr]
    with torch.no_grad():
        rendered = learner.render({name: value[:1] for name, value in batch(0).items()}, ["key"])
    if rank == 0:
        facts = {
            "lines": lines,
            "after": after,
            "finite": bool(bad.outcome.finite),
            "share": share,
        }
        (out / "facts.json").write_text(json.dumps(facts))
        torch.save(rendered, out / "rendered.pt")
        torch.save(before, out / "whole.pt")


def read_unsharded(rank: int, state: tuple[Any, Any], directory: Path) -> None:
    """Let sharded workers go on from a checkpoint without parts, as a run before or without sharding leaves
    it.
    """
    config = config_of("fsdp")
    if rank == 0:
        checkpoint.write(directory, Snapshot(STEPS, *state), config)
    dist.barrier()
    learner = start(config, rank, 2)
    checkpoint.load(directory, learner.state, config, rank)
    assert_equal(whole(learner.state), state)


@pytest.mark.slow
def test_two_workers_train_as_one_and_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    """One test, so that the processes, which take the time, are started once."""
    for parallel in WAYS:
        (tmp_path / parallel).mkdir()
    run_workers(2, work, str(tmp_path))
    learner = start(config_of("ddp"))
    lines = run(learner, range(STEPS))
    parts = [f"part-{i:05d}-of-00002.safetensors" for i in range(2)]
    rest = ["config.json", "ema.safetensors", "files.json", "run.json", "state.pt"]
    for parallel in WAYS:
        directory = tmp_path / parallel
        files = sorted(path.name for path in (directory / "saved").iterdir())
        assert files == sorted(rest + (parts if parallel == "fsdp" else ["model.safetensors"]))
        facts = json.loads((directory / "facts.json").read_text())
        other = start(config_of(parallel))
        # Written by two workers, read by one.
        checkpoint.load(directory / "saved", other.state, config_of(parallel))
        check_steps(facts, lines, other, learner)
        assert_equal(whole(other.state), tuple(torch.load(directory / "whole.pt")))
        # After the round trip, which is exact, the curve goes on.
        assert facts["after"][0] == facts["after"][1]
        assert facts["finite"]
        assert facts["share"] == pytest.approx(0.5 if parallel == "fsdp" else 1.0, abs=0.02)
        # A sharded average renders as a whole one.
        run(other, range(STEPS, STEPS + 2))
        with torch.no_grad():
            expected = other.render({name: value[:1] for name, value in batch(0).items()}, ["key"])
        torch.testing.assert_close(torch.load(directory / "rendered.pt"), expected, rtol=1e-2, atol=1e-2)


def check_steps(
    facts: dict[str, Any], lines: list[dict[str, float]], other: DiffusionLearner, learner: DiffusionLearner
) -> None:
    """2 workers x 2 micro-batches of 2 against 1 x 4 of 2: loss and gradient norm of every step, then weights
    and average.
    """
    for ours, theirs in zip(facts["lines"], lines, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    for module, expected in (
        (other.state.network, learner.state.network),
        (other.state.ema.module, learner.state.ema.module),
    ):
        ours, theirs = (
            torch.cat([p.detach().flatten() for p in one.parameters()]) for one in (module, expected)
        )
        difference = (ours - theirs).abs()
        # Adam's first steps are lr times the sign of the gradient: where that is nearly zero, rounding
        # decides, and a step goes either way.
        assert float((difference <= 1e-5).float().mean()) > 0.999
        assert float(difference.max()) <= 2 * STEPS * learner.config.optim.lr
    assert other.state.step == STEPS
