"""The learning rate in closed form, clipping, and steps that are skipped on the device."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler

from resshift.config import OptimConfig
from resshift.training.optimizer import Outcome, adamw, guarded_step, learning_rate
from resshift.training.running_means import RunningMeans


def test_learning_rate_has_its_closed_form() -> None:
    optim = OptimConfig(lr=1.0, lr_end=0.1, warmup_steps=10, lr_schedule="cosine")
    assert [learning_rate(step, optim, 111) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(60, optim, 111) == pytest.approx(0.55)
    assert learning_rate(110, optim, 111) == pytest.approx(0.1)
    assert learning_rate(500, optim, 111) == pytest.approx(0.1)  # a run that is continued beyond its plan
    assert learning_rate(99, OptimConfig(lr=1.0, warmup_steps=10), 100) == 1.0
    assert learning_rate(0, OptimConfig(lr=1.0, warmup_steps=0), 1) == 1.0


def test_cosine_agrees_with_torch() -> None:
    optim = OptimConfig(lr=5e-5, lr_end=2e-5, warmup_steps=0, lr_schedule="cosine")
    reference = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=optim.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=99, eta_min=optim.lr_end)
    for step in range(100):
        assert learning_rate(step, optim, 100) == pytest.approx(reference.param_groups[0]["lr"], rel=1e-12)
        reference.step()
        schedule.step()


def one_weight(gradient: float, value: float = 0.0) -> nn.Linear:
    network = nn.Linear(1, 1, bias=False)
    nn.init.constant_(network.weight, value)
    network.weight.grad = torch.tensor([[gradient]])
    return network


def test_first_step_of_adam_is_its_learning_rate() -> None:
    network = one_weight(3.0)
    outcome = guarded_step(adamw(network, OptimConfig(lr=0.5)), None, GradScaler("cpu", enabled=False))
    assert float(network.weight.detach()) == pytest.approx(-0.5)
    assert (float(outcome.grad_norm), bool(outcome.finite)) == (3.0, True)
    assert network.weight.grad is None


@pytest.mark.parametrize(("limit", "kept"), [(None, 3.0), (5.0, 3.0), (0.5, 0.5)])
def test_gradient_is_cut_at_its_limit_and_reported_as_it_was(limit: float | None, kept: float) -> None:
    network = one_weight(3.0)
    optimizer = adamw(network, OptimConfig())
    outcome = guarded_step(optimizer, limit, GradScaler("cpu", enabled=False))
    assert float(outcome.grad_norm) == 3.0
    # Adam's first moment is (1 - beta1) times the gradient it was given.
    assert float(optimizer.state[network.weight]["exp_avg"]) == pytest.approx(0.1 * kept, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("limit", [None, 1.0])
def test_gradient_that_is_not_finite_is_no_step(bad: float, limit: float | None) -> None:
    network = one_weight(bad, value=7.0)
    optimizer = adamw(network, OptimConfig(weight_decay=0.1))
    outcome = guarded_step(optimizer, limit, GradScaler("cpu", enabled=False))
    assert not outcome.finite
    assert float(network.weight.detach()) == 7.0
    assert {name: float(value) for name, value in optimizer.state[network.weight].items()} == {
        "step": 0,
        "exp_avg": 0,
        "exp_avg_sq": 0,
    }


def test_overflow_halves_the_loss_scale_and_skips() -> None:
    network = one_weight(math.inf, value=7.0)
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    outcome = guarded_step(adamw(network, OptimConfig()), None, scaler)
    assert (bool(outcome.finite), float(network.weight.detach()), scaler.get_scale()) == (False, 7.0, 512.0)


def test_loss_scale_does_not_change_the_step() -> None:
    network = one_weight(3.0 * 1024)
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    optimizer = adamw(network, OptimConfig())
    assert float(guarded_step(optimizer, None, scaler).grad_norm) == 3.0
    assert float(optimizer.state[network.weight]["exp_avg"]) == pytest.approx(0.3)


def outcome(norm: float, finite: bool = True) -> Outcome:
    return Outcome(torch.tensor(norm), torch.tensor(finite))


def test_running_means_are_those_over_the_steps_that_were_taken() -> None:
    means = RunningMeans(("loss",), torch.device("cpu"))
    means.add({"loss": torch.tensor(1.0)}, outcome(10.0))
    means.add({"loss": torch.tensor(math.nan)}, outcome(math.nan, finite=False))
    means.add({"loss": torch.tensor(3.0)}, outcome(20.0))
    assert means.steps == 3
    assert means.pop() == {"loss": 2.0, "grad_norm": 15.0}
    assert means.steps == 0
    means.add({"loss": torch.tensor(5.0)}, outcome(1.0))
    assert means.pop() == {"loss": 5.0, "grad_norm": 1.0}  # a new window


def test_skipped_steps_are_counted_in_all_and_in_a_row() -> None:
    means = RunningMeans(("loss",), torch.device("cpu"))
    seen: list[tuple[int, int]] = []
    for finite in (True, False, False, True, False):
        means.add({"loss": torch.zeros(())}, outcome(1.0, finite))
        seen.append(means.skips())
    assert seen == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    assert math.isnan(RunningMeans(("loss",), torch.device("cpu")).pop()["loss"])


def test_running_means_come_back_whole_and_to_the_first_worker_alone() -> None:
    means = RunningMeans(("loss",), torch.device("cpu"))
    means.add({"loss": torch.tensor(4.0)}, outcome(2.0))
    means.add({"loss": torch.tensor(0.0)}, outcome(2.0, finite=False))
    first, second = (RunningMeans(("loss",), torch.device("cpu")) for _ in range(2))
    first.load_state_dict(means.state_dict(), rank=0)
    second.load_state_dict(means.state_dict(), rank=1)
    assert first.pop() == {"loss": 4.0, "grad_norm": 2.0}
    assert second.pop() == {"loss": 0.0, "grad_norm": 2.0}  # its share of the sum is with the first
    assert first.skips() == second.skips() == (1, 1)
    with pytest.raises(ValueError, match=r"loss terms \['loss'\], this run \['mse'\]"):
        RunningMeans(("mse",), torch.device("cpu")).load_state_dict(means.state_dict())
