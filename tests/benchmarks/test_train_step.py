"""The benchmark of a training step compares like with like."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from resshift.training.step import DiffusionLearner
from tests.scripts import load_script

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CPU = torch.device("cpu")


train_step = load_script("benchmarks/train_step.py")


def test_plain_loop_does_the_same_arithmetic_and_learns() -> None:
    config = train_step.config_of(CPU, "test-x4", 4)
    network, objective = train_step.build(config, CPU)
    batch = train_step.random_batch(config, CPU)
    plain = train_step.PlainLoop(config, deepcopy(network), objective)
    learner = DiffusionLearner(config, network, objective)
    counts: list[float] = []
    for loop in (plain, learner):
        with FlopCounterMode(display=False) as counter:
            loop.step(batch)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 1e6
    for _ in range(5):
        plain.step(batch)
    assert len(plain.losses) == 6
    assert plain.losses[-1] != plain.losses[0]


def test_parts_leave_no_gradients_behind() -> None:
    config = replace(train_step.config_of(CPU, "test-x4", 2))
    learner = DiffusionLearner(config, *train_step.build(config, CPU))
    parts = train_step.parts_of(learner, train_step.random_batch(config, CPU))
    assert list(parts) == ["first_stage", "unet", "optimizer"]
    for part in parts.values():
        part()
    assert all(parameter.grad is None for parameter in learner.state.network.parameters())


@pytest.mark.slow
def test_last_line_is_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        train_step.main(["--quick", "--cpu", "--preset", "test-x4", "--micro-batch", "2", "--no-data"]) == 0
    )
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures.keys() >= {"ratio_to_plain", "samples_per_s", "share_of_peak", "data_wait"}
    assert 0.1 < figures["ratio_to_plain"] < 10
    assert figures["seconds"].keys() == {"plain", "ours"}
