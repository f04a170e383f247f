"""Training state: a run that stops and resumes is the run that did not stop, however its batches are cut."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resshift import seeds
from resshift.config import LossConfig, RunConfig, with_settings
from resshift.degradation import degrade, draw
from resshift.degradation.on_device.plan import encode
from resshift.models import WeightsError
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.presets import test_x4 as toy_preset
from resshift.training import checkpoint
from resshift.training.losses import LossTerms, Objective
from resshift.training.slots import Slots
from resshift.training.step import (
    DiffusionLearner,
    Pictures,
    TrainState,
    build_network,
    draw_noise,
    lpips_corner,
    mask_to_unit_range,
    start_from,
    to_unit_range,
)
from resshift.weights import state_to_store


def toy(*settings: str) -> RunConfig:
    return with_settings(toy_preset(), ["optim.warmup_steps=0", *settings])


def batch(i: int, size: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(i)
    hq = torch.randint(0, 256, (size, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return {"hq": hq, "lq": hq[:, ::4, ::4].contiguous()}


def start(config: RunConfig, slots: Slots | None = None, objective: Any = None) -> DiffusionLearner:
    return DiffusionLearner(
        config,
        build_network(config),
        objective or Objective(config.model, config.loss, PixelUnshuffle(4)),
        slots,
    )


def tensors(state: TrainState) -> dict[str, Tensor]:
    moments = {
        f"adam.{i}.{k}": v for i, s in state.optimizer.state_dict()["state"].items() for k, v in s.items()
    }
    averaged = {f"ema.{key}": value for key, value in state.ema.module.state_dict().items()}
    return {**state.network.state_dict(), **averaged, **moments}


def save(directory: Path, learner: DiffusionLearner, config: RunConfig) -> None:
    checkpoint.write(directory, checkpoint.take(learner.state), config)


@pytest.mark.slow
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    config = toy("model.unet.dropout=0.2", "train.precision=bf16")
    whole = start(config)
    for i in range(6):
        whole.state.means.add(*whole.step(batch(i)))
    first = start(config)
    for i in range(3):
        first.state.means.add(*first.step(batch(i)))
    save(tmp_path / "c", first, config)
    second = start(config)
    checkpoint.load(tmp_path / "c", second.state, config)
    assert second.state.step == 3
    torch.rand(5)  # whatever a new process has drawn before must not matter
    for i in range(3, 6):
        second.state.means.add(*second.step(batch(i)))
    ours, theirs = tensors(second.state), tensors(whole.state)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert second.state.means.pop() == whole.state.means.pop()  # a window of the log that holds the restart


def test_snapshot_does_not_change_when_training_goes_on() -> None:
    learner = start(toy())
    learner.step(batch(0))
    snapshot = checkpoint.take(learner.state)
    before = {key: value.clone() for key, value in snapshot.weights["model"].items()}
    moment = snapshot.rest["optimizers"]["model"]["state"][0]["exp_avg"].clone()
    learner.step(batch(1))
    assert all(torch.equal(snapshot.weights["model"][key], value) for key, value in before.items())
    assert torch.equal(snapshot.rest["optimizers"]["model"]["state"][0]["exp_avg"], moment)


def test_half_precision_run_keeps_its_loss_scale(tmp_path: Path) -> None:
    config = toy("train.precision=fp16")
    learner = start(config)
    learner.step(batch(0))
    learner.state.scaler.update(512.0)
    save(tmp_path / "c", learner, config)
    fresh = start(config)
    checkpoint.load(tmp_path / "c", fresh.state, config)
    assert fresh.state.scaler.state_dict() == learner.state.scaler.state_dict()
    assert fresh.state.scaler.get_scale() == 512.0


def test_another_run_is_refused_and_its_fields_are_named(tmp_path: Path) -> None:
    config = toy()
    learner = start(config)
    save(tmp_path / "c", learner, config)
    checkpoint.load(tmp_path / "c", learner.state, toy("train.steps=999"))
    with pytest.raises(checkpoint.ResumeRefused, match=r"train\.seed: 0 -> 5"):
        checkpoint.load(tmp_path / "c", learner.state, toy("train.seed=5"))
    record = json.loads((tmp_path / "c" / "run.json").read_text())
    assert record["versions"]["torch"] == torch.__version__


def test_micro_batches_are_a_partition() -> None:
    for rows, limit in itertools.product(range(1, 34), range(1, 35)):
        parts = Slots(0, rows, rows, 1).micro_batches(limit)
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(rows))
        sizes = [part.stop - part.start for part in parts]
        assert len(parts) == -(-rows // limit)
        assert max(sizes) <= limit
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("num_ranks", range(1, 9))
def test_every_slot_belongs_to_one_worker(num_ranks: int) -> None:
    for batch_size in range(num_ranks, 30):
        owned = [Slots.of_rank(batch_size, rank, num_ranks) for rank in range(num_ranks)]
        assert [slot for slots in owned for slot in range(slots.start, slots.stop)] == list(range(batch_size))
        sizes = [slots.stop - slots.start for slots in owned]
        assert max(sizes) - min(sizes) <= 1


def gradients(
    config: RunConfig, num_ranks: int, samples: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Run one step as `num_ranks` workers would, each on its slots, and average their gradients as DDP
    does.
    """
    samples = samples or batch(0)
    total: dict[str, Tensor] = {}
    for rank in range(num_ranks):
        slots = Slots.of_rank(config.train.batch_size, rank, num_ranks)
        learner = start(config, Slots(slots.start, slots.stop, slots.batch_size, 1))
        own = {name: value[slots.start : slots.stop] for name, value in samples.items()}
        learner.backward(own)
        for name, parameter in learner.state.network.named_parameters():
            assert parameter.grad is not None
            total[name] = total.get(name, torch.zeros_like(parameter)) + parameter.grad
    return total


@pytest.mark.parametrize(("micro_batch", "num_ranks"), [(4, 1), (2, 1), (3, 1), (4, 2), (3, 2), (4, 3)])
def test_gradient_does_not_depend_on_how_the_batch_is_cut(micro_batch: int, num_ranks: int) -> None:
    """1 x 8 = 2 x 4 = 4 x 2 = 3 + 2 + 3 = two workers x 4 = three workers with 2, 3 and 3. Real processes:
    test_sharding.py.
    """
    whole = gradients(toy("train.micro_batch=8"), 1)
    cut = gradients(toy(f"train.micro_batch={micro_batch}"), num_ranks)
    for name, value in whole.items():
        torch.testing.assert_close(
            cut[name], value, rtol=1e-4, atol=1e-6
        )  # the order of float32 sums differs


def test_pictures_degraded_here_do_not_depend_on_how_the_batch_is_cut() -> None:
    """1 x 4 = two workers x 2; and they are those of the CPU."""
    settings = ("degradation.kind=realesrgan", "data.degrade_on=device", "train.batch_size=4")
    config = toy(*settings)
    params = [draw(seeds.philox(1, "degrade", i), config.degradation) for i in range(4)]
    hq = batch(0, 4)["hq"]
    records = torch.from_numpy(np.stack([encode(one, 32) for one in params]))
    drawn = {"hq": hq, "plan": records}
    whole = gradients(config, 1, drawn)
    lq = np.stack([degrade(picture.numpy(), one) for picture, one in zip(hq, params, strict=True)])
    _, found, _ = Pictures(config)(drawn, slice(0, 4))
    torch.testing.assert_close(found, to_unit_range(torch.from_numpy(lq)), rtol=0, atol=2 / 127.5)
    assert torch.equal(Pictures(config)(drawn, slice(2, 4))[1], found[2:])
    cut = gradients(config, 2, drawn)
    for name, value in whole.items():
        torch.testing.assert_close(cut[name], value, rtol=1e-4, atol=1e-6)


def test_noise_of_a_slot_does_not_depend_on_its_worker() -> None:
    config = toy()
    t, noise = draw_noise(config, 5, Slots.of_rank(8), (48, 8, 8), torch.device("cpu"))
    for num_ranks in (2, 3):
        parts = [
            draw_noise(config, 5, Slots.of_rank(8, rank, num_ranks), (48, 8, 8), torch.device("cpu"))
            for rank in range(num_ranks)
        ]
        assert torch.equal(torch.cat([part[0] for part in parts]), t)
        assert torch.equal(torch.cat([part[1] for part in parts]), noise)
    other_t, other_noise = draw_noise(config, 6, Slots.of_rank(8), (48, 8, 8), torch.device("cpu"))
    assert not torch.equal(noise, other_noise)
    assert t.max() < config.model.schedule.steps
    assert not torch.equal(t, other_t) or config.model.schedule.steps == 1


def test_averaged_weights_follow_their_formula() -> None:
    """ema <- decay ema + (1 - decay) weights, from the first update on a copy of the first weights."""
    config = toy("train.ema_decay=0.9")
    learner = start(config)
    key = "out.2.weight"
    weights: list[Tensor] = []
    for i in range(3):
        learner.step(batch(i))
        weights.append(learner.state.network.state_dict()[key].clone())
    expected = 0.9 * (0.9 * weights[0] + 0.1 * weights[1]) + 0.1 * weights[2]
    torch.testing.assert_close(learner.state.ema.module.state_dict()[key], expected)


class StandIn:
    """An objective whose loss is chosen by the test: `loss(network, hq) -> Tensor`."""

    def __init__(self, loss: Callable[[torch.nn.Module, Tensor], Tensor]) -> None:
        self.loss = loss
        self.corners: list[tuple[int, int]] = []

    def __call__(
        self,
        network: torch.nn.Module,
        hq: Tensor,
        lq: Tensor,
        t: Tensor,
        noise: Tensor,
        mask: Tensor | None,
        corner: tuple[int, int],
    ) -> LossTerms:
        del lq, t, noise, mask
        self.corners.append(corner)
        loss = self.loss(network, hq)
        return LossTerms(loss, 2 * loss.detach(), 3 * loss.detach(), 4 * loss.detach())


def test_unequal_micro_batches_weigh_by_their_rows() -> None:
    """7 rows as 2 + 3 + 2: a mean of means would give every row of the pairs more."""
    pictures = batch(0, 7)
    pictures["hq"][:] = torch.tensor([0, 0, 255, 255, 255, 0, 0], dtype=torch.uint8)[:, None, None, None]
    config = toy("train.micro_batch=3", "train.batch_size=7")
    objective = StandIn(lambda network, hq: hq.mean() + 0 * next(network.parameters()).sum())
    terms = start(config, objective=objective).step(pictures).terms
    mean = (3 - 4) / 7
    assert [float(terms[name]) for name in ("loss", "mse", "lpips")] == pytest.approx(
        [mean, 2 * mean, 3 * mean]
    )


def test_every_corner_comes_up() -> None:
    config = toy("loss.lpips_corners=4")
    assert {lpips_corner(config, step) for step in range(400)} == {
        (row, column) for row in range(4) for column in range(4)
    }
    assert {lpips_corner(toy(), step) for step in range(20)} == {(0, 0)}


def test_all_micro_batches_of_a_step_have_its_corner() -> None:
    """It does not depend on the slots, so workers have the same one too."""
    config = toy("loss.lpips_corners=4", "train.batch_size=4", "train.micro_batch=2")
    objective = StandIn(lambda network, hq: hq.mean() + 0 * next(network.parameters()).sum())
    learner = start(config, objective=objective)
    for i in range(3):
        learner.step(batch(i, 4))
    assert objective.corners == [lpips_corner(config, step) for step in range(3) for _ in range(2)]


def test_skipped_step_changes_neither_weights_nor_moments() -> None:
    config = toy()
    learner = start(config)
    learner.step(batch(0))
    before = {
        key: value.clone() for key, value in tensors(learner.state).items() if not key.startswith("ema")
    }
    good = learner.objective
    learner.objective = StandIn(lambda network, hq: next(network.parameters()).sum() * float("nan"))  # type: ignore[assignment]
    result = learner.step(batch(1))
    learner.state.means.add(*result)
    assert not result.outcome.finite
    assert learner.state.step == 2
    after = tensors(learner.state)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(bool(torch.isfinite(value).all()) for value in after.values() if value.is_floating_point())
    learner.objective = good
    assert learner.step(batch(2)).outcome.finite


def test_initial_weights_follow_from_the_seed_alone() -> None:
    a, b, c = build_network(toy()), build_network(toy()), build_network(toy("train.seed=1"))
    key = "out.2.weight"
    assert torch.equal(a.state_dict()[key], b.state_dict()[key])
    assert not torch.equal(a.state_dict()[key], c.state_dict()[key])


@pytest.mark.parametrize("setting", ["train.activation_checkpointing=true", "train.channels_last=false"])
def test_ways_of_computing_change_rounding_only(setting: str) -> None:
    plain, other = start(toy()), start(toy(setting))
    for i in range(2):
        ours, theirs = other.step(batch(i)), plain.step(batch(i))
        torch.testing.assert_close(ours.terms["loss"], theirs.terms["loss"], rtol=1e-5, atol=1e-7)
    for a, b in zip(other.state.network.parameters(), plain.state.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_activations_are_recomputed_when_asked() -> None:
    """What is inside a stage runs twice: once forward, once in the backward pass."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for setting, expected in (("false", 1), ("true", 2)):
        learner = start(toy(f"train.activation_checkpointing={setting}", "train.micro_batch=8"))
        calls = 0
        learner.state.network.middle_block[0].register_forward_hook(count)  # type: ignore[index, union-attr]
        learner.step(batch(0))
        assert calls == expected


@pytest.mark.slow
def test_loss_falls_on_pictures_it_has_seen() -> None:
    config = toy("train.micro_batch=8", "train.batch_size=4", "optim.lr=0.005")
    learner = start(config)
    smooth = torch.nn.functional.interpolate(
        torch.rand((4, 3, 4, 4), generator=torch.Generator().manual_seed(0)), 32, mode="bicubic"
    )
    hq = (smooth.clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    pictures = {
        "hq": hq,
        "lq": hq.flip(1)[:, ::4, ::4].contiguous(),
    }  # upside down: nothing is right at the start
    losses = [float(learner.step(pictures).terms["loss"]) for _ in range(60)]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_mask_reaches_the_network() -> None:
    """255 in a hole becomes 1, 0 becomes -1; a network without `cond_mask` is never given one."""
    mask = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert mask_to_unit_range(mask).tolist() == [[[[-1.0, 1.0]]]]
    config = toy(
        "model.scale=1",
        "model.unet.lq_size=32",
        "model.unet.cond_mask=true",
        "degradation.kind=inpainting",
        "degradation.scale=1",
    )
    hq = batch(0)["hq"]
    empty, holes = torch.zeros(8, 32, 32, dtype=torch.uint8), torch.full((8, 32, 32), 255, dtype=torch.uint8)
    losses = [
        float(start(config).step({"hq": hq, "lq": hq, "mask": value}).terms["loss"])
        for value in (empty, empty, holes)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_run_begins_with_given_weights() -> None:
    config, given = toy(), build_network(toy("train.seed=9"))
    learner = start(config)
    start_from(learner, state_to_store(given))
    for module in (learner.state.network, learner.state.ema.module):
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), given.parameters(), strict=True))
    with pytest.raises(WeightsError, match="missing"):
        start_from(learner, {})
    learner.step(batch(0))
    with pytest.raises(WeightsError, match="at step 1"):
        start_from(learner, state_to_store(given))


@pytest.mark.slow
def test_rendering_follows_from_weights_and_keys_alone() -> None:
    """Picture by picture or together, after whatever was drawn before: the same pictures, up to the order of
    sums.
    """
    learner, pictures = start(toy()), batch(0, 2)
    with torch.no_grad():
        together = learner.render(pictures, ["a", "b"])
        torch.rand(3)
        alone = torch.cat(
            [
                learner.render({n: v[i : i + 1] for n, v in pictures.items()}, [key])
                for i, key in enumerate("ab")
            ]
        )
        renamed = learner.render(pictures, ["a", "c"])
    assert together.shape == (2, 3, 32, 32)
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(renamed[0], together[0])
    assert not torch.allclose(renamed[1], together[1], atol=1e-2)


def test_loss_config_needs_something_to_minimise() -> None:
    with pytest.raises(ValueError, match="not all zero"):
        LossConfig(mse=0, lpips=0)
