"""Training state: a run that stops and resumes is the run that did not stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from resshift import checkpoint
from resshift.autoencoder import PixelUnshuffle
from resshift.config import LossConfig, OptimConfig, RunConfig, with_settings
from resshift.losses import LossTerms, Objective
from resshift.presets import test_x4 as toy_preset
from resshift.training import TrainingDiverged, TrainState, build_network, build_state, learning_rate, micro_batches, train_step
from resshift.weights import WeightsError


def toy(*settings: str) -> RunConfig:
    return with_settings(toy_preset(), ["optim.warmup_steps=0", *settings])


def batch(i: int, size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(i)
    hq = torch.randint(0, 256, (size, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return {"hq": hq, "lq": hq[:, ::4, ::4].contiguous()}


def start(config: RunConfig) -> tuple[TrainState, Objective]:
    return build_state(config, build_network(config)), Objective(config.model, config.loss, PixelUnshuffle(4))


def tensors(state: TrainState) -> dict[str, Tensor]:
    moments = {f"adam.{i}.{k}": v for i, s in state.optimizer.state_dict()["state"].items() for k, v in s.items()}
    averaged = {f"ema.{key}": value for key, value in state.ema.module.state_dict().items()}
    return {**state.plain.state_dict(), **averaged, **moments}


def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    config = toy("model.unet.dropout=0.2")
    whole, objective = start(config)
    for i in range(6):
        train_step(whole, objective, batch(i), config)
    first, _ = start(config)
    for i in range(3):
        train_step(first, objective, batch(i), config)
        first.rows += 4
    checkpoint.save(tmp_path / "c", first, config)
    second, _ = start(config)
    checkpoint.load(tmp_path / "c", second, config)
    assert (second.step, second.rows) == (3, 12)
    torch.rand(5)  # whatever a new process has drawn before must not matter
    for i in range(3, 6):
        train_step(second, objective, batch(i), config)
    ours, theirs = tensors(second), tensors(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_another_run_is_refused_and_its_fields_are_named(tmp_path: Path) -> None:
    config = toy()
    state, _ = start(config)
    checkpoint.save(tmp_path / "c", state, config)
    checkpoint.load(tmp_path / "c", state, toy("train.steps=999"))
    with pytest.raises(checkpoint.ResumeRefused, match=r"train\.seed: 0 -> 5"):
        checkpoint.load(tmp_path / "c", state, toy("train.seed=5"))
    record = json.loads((tmp_path / "c" / "run.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    (tmp_path / "c" / "ema.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"ema\.safetensors"):
        checkpoint.load(tmp_path / "c", state, config)
    with pytest.raises(WeightsError, match="not a checkpoint"):
        checkpoint.load(tmp_path, state, config)


def test_learning_rate_has_its_closed_form() -> None:
    optim = OptimConfig(lr=1.0, lr_end=0.1, warmup_steps=10, lr_schedule="cosine")
    assert [learning_rate(step, optim, 111) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(60, optim, 111) == pytest.approx(0.55)
    assert learning_rate(110, optim, 111) == pytest.approx(0.1)
    assert learning_rate(500, optim, 111) == pytest.approx(0.1)  # a run that is continued beyond its plan
    assert learning_rate(99, OptimConfig(lr=1.0, warmup_steps=10), 100) == 1.0


@pytest.mark.parametrize("rows", range(1, 34))
def test_micro_batches_are_a_partition(rows: int) -> None:
    for limit in range(1, 35):
        parts = micro_batches(rows, limit)
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
        sizes = [part.stop - part.start for part in parts]
        assert len(parts) == -(-rows // limit)
        assert max(sizes) <= limit
        assert max(sizes) - min(sizes) <= 1


def test_gradients_are_averaged_over_micro_batches() -> None:
    """With a loss that is the mean of the clean picture times a weight, the size of the micro-batch must not matter."""

    class Linear:
        def __call__(self, network: torch.nn.Module, hq: Tensor, lq: Tensor, generator: torch.Generator) -> LossTerms:
            weight = next(network.parameters())
            loss = (hq.mean((1, 2, 3)) * weight.sum()).mean()
            return LossTerms(loss, loss.detach(), torch.zeros(()))

    norms: list[float] = []
    for limit in (1, 3, 7):
        config = toy(f"train.micro_batch={limit}")
        state, _ = start(config)
        objective: Any = Linear()
        norms.append(train_step(state, objective, batch(0, 7), config)["grad_norm"])
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_averaged_weights_follow_their_formula() -> None:
    """ema <- decay ema + (1 - decay) weights, from the first update on a copy of the first weights."""
    config = toy("train.ema_decay=0.9")
    state, objective = start(config)
    key = "out.2.weight"
    weights: list[Tensor] = []
    for i in range(3):
        train_step(state, objective, batch(i), config)
        weights.append(state.plain.state_dict()[key].clone())
    expected = 0.9 * (0.9 * weights[0] + 0.1 * weights[1]) + 0.1 * weights[2]
    torch.testing.assert_close(state.ema.module.state_dict()[key], expected)


def test_unequal_micro_batches_weigh_by_their_rows() -> None:
    """7 rows as 2 + 3 + 2: a mean of means would give every row of the pairs more."""
    pictures = batch(0, 7)
    pictures["hq"][:] = torch.tensor([0, 0, 255, 255, 255, 0, 0], dtype=torch.uint8)[:, None, None, None]

    class Brightness:
        def __call__(self, network: torch.nn.Module, hq: Tensor, lq: Tensor, generator: torch.Generator) -> LossTerms:
            loss = hq.mean() + 0 * next(network.parameters()).sum()
            return LossTerms(loss, 2 * loss.detach(), 3 * loss.detach())

    config = toy("train.micro_batch=3")
    state, _ = start(config)
    objective: Any = Brightness()
    metrics = train_step(state, objective, pictures, config)
    mean = (3 - 4) / 7
    assert [metrics[name] for name in ("loss", "mse", "lpips")] == pytest.approx([mean, 2 * mean, 3 * mean])


def test_gradient_is_cut_at_its_limit_and_reported_as_it_was() -> None:
    free, limited = toy(), toy("optim.clip_norm=0.001")
    norms: list[float] = []
    for config in (free, limited):
        state, objective = start(config)
        norms.append(train_step(state, objective, batch(0), config)["grad_norm"])
        first = sum(float((entry["exp_avg"] / 0.1).square().sum()) for entry in state.optimizer.state_dict()["state"].values()) ** 0.5
        wanted = min(norms[0], config.optim.clip_norm or norms[0])
        assert first == pytest.approx(wanted, rel=1e-3)  # Adam's first moment is (1 - beta1) times the gradient it was given
    assert norms[0] == norms[1] > 0.001


def test_a_finite_step_ends_a_series_of_skipped_ones() -> None:
    config = toy("train.max_skipped_steps=2")
    state, good = start(config)

    class Broken:
        def __call__(self, network: torch.nn.Module, hq: Tensor, lq: Tensor, generator: torch.Generator) -> LossTerms:
            loss = next(network.parameters()).sum() * float("inf")
            return LossTerms(loss, loss.detach(), loss.detach())

    bad: Any = Broken()
    skipped = [train_step(state, objective, batch(i), config)["skipped"] for i, objective in enumerate((bad, good, bad, good))]
    assert skipped == [1, 0, 1, 0]
    assert (state.step, state.skipped, state.skipped_in_a_row) == (4, 2, 0)
    assert int(state.ema.n_averaged) == 2  # a skipped step is no update
    assert all(bool(torch.isfinite(value).all()) for value in state.plain.state_dict().values() if value.is_floating_point())


def test_initial_weights_follow_from_the_seed_alone() -> None:
    a, b, c = build_network(toy()), build_network(toy()), build_network(toy("train.seed=1"))
    key = "out.2.weight"
    assert torch.equal(a.state_dict()[key], b.state_dict()[key])
    assert not torch.equal(a.state_dict()[key], c.state_dict()[key])


def test_ranks_draw_different_noise() -> None:
    config = toy()
    losses: list[float] = []
    for rank in (0, 1, 0):
        state, objective = start(config)
        losses.append(train_step(state, objective, batch(0), config, rank=rank)["loss"])
    assert losses[0] == losses[2] != losses[1]


def test_non_finite_gradients_are_skipped_counted_and_then_stop_the_run() -> None:
    config = toy("train.max_skipped_steps=3")
    state, _ = start(config)

    class Broken:
        def __call__(self, network: torch.nn.Module, hq: Tensor, lq: Tensor, generator: torch.Generator) -> LossTerms:
            loss = next(network.parameters()).sum() * float("nan")
            return LossTerms(loss, loss.detach(), loss.detach())

    before = {key: value.clone() for key, value in state.plain.state_dict().items()}
    objective: Any = Broken()
    for _ in range(2):
        assert train_step(state, objective, batch(0), config)["skipped"] == 1
    with pytest.raises(TrainingDiverged, match=r"3 steps in a row.*cat\.jpg"):
        train_step(state, objective, batch(0), config, keys=["cat.jpg"])
    assert all(torch.equal(before[key], value) for key, value in state.plain.state_dict().items())
    assert state.skipped == 3


def test_loss_falls_on_pictures_it_has_seen() -> None:
    config = toy("train.micro_batch=8", "optim.lr=0.003")
    state, objective = start(config)
    smooth = torch.nn.functional.interpolate(torch.rand((4, 3, 4, 4), generator=torch.Generator().manual_seed(0)), 32, mode="bicubic")
    hq = (smooth.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    pictures = {"hq": hq, "lq": hq.flip(1)[:, ::4, ::4].contiguous()}  # upside down: nothing is right at the start
    losses = [train_step(state, objective, pictures, config)["loss"] for _ in range(60)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_loss_config_needs_something_to_minimise() -> None:
    with pytest.raises(ValueError, match="not both zero"):
        LossConfig(mse=0, lpips=0)
