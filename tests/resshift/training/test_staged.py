"""Training in stages: the steps of `benchmarks/gpu_train.py`, whatever the number of micro-batches and
workers, and stops anywhere.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import squeezenet1_1

from resshift.config import LossConfig, RunConfig, with_settings
from resshift.metrics.lpips import Lpips
from resshift.models import WeightsError
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.networks.config import ConvUNetConfig, RegressionConfig
from resshift.networks.conv_unet import ConvUNet
from resshift.networks.regression import RegressionNet
from resshift.presets import tiny_x4
from resshift.stages import Stage
from resshift.training import staged
from resshift.training.adversary import Adversary
from resshift.training.efficientnet import EfficientNetLite0
from resshift.training.lattice import patterns
from resshift.training.losses import Objective
from resshift.training.picture_loss import PictureLoss, artifact_map
from resshift.training.slots import Slots
from resshift.training.staged import StagedLearner
from resshift.training.step import TrainState, build_network, start_from
from resshift.weights import state_to_store
from tests.gloo import run_workers
from tests.resshift.training.test_adversary import published
from tests.stops import check_stops, tensors

CPU = torch.device("cpu")
SMALL = RegressionConfig(channels=8, half_channels=8, blocks_before=1, half_blocks=1, blocks_after=1)
UNET = ConvUNetConfig(channels=(8, 8, 8), blocks_before=(1, 1, 1), blocks_after=(1, 1), regression=SMALL)
STAGES = (
    Stage(trains="regression", steps=2, decay_steps=1, features=0.0),
    Stage(steps=2),
    Stage(lr=3e-4, adversary=1.0, decay_steps=2),
)


def toy(*settings: str, unet: ConvUNetConfig = UNET) -> RunConfig:
    base = tiny_x4()
    return with_settings(
        replace(
            base,
            model=replace(base.model, unet=unet),
            loss=replace(base.loss, lpips=0.0),
            stages=tuple(replace(stage, lpips=None) for stage in STAGES),
            train=replace(base.train, steps=7, batch_size=4, micro_batch=4),
        ),
        ["optim.warmup_steps=3", *settings],
    )


def batch(i: int, size: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(i)
    hq = torch.randint(0, 256, (size, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return {"hq": hq, "lq": hq[:, ::4, ::4].contiguous()}


def trunk() -> EfficientNetLite0:
    torch.manual_seed(0)
    return EfficientNetLite0().eval().requires_grad_(False)


def learner(config: RunConfig, slots: Slots | None = None, network: nn.Module | None = None) -> StagedLearner:
    objective = Objective(config.model, config.loss, PixelUnshuffle(4))
    return StagedLearner(config, network or build_network(config), objective, trunk(), slots)


@pytest.fixture(scope="module")
def gpu_train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
        yield importlib.import_module("gpu_train")


def as_the_script(pictures: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return pictures["hq"].permute(0, 3, 1, 2), pictures["lq"].permute(0, 3, 1, 2)


def assert_close(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-3, atol: float = 1e-5) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


def test_the_first_stage_is_that_of_the_script(gpu_train: ModuleType) -> None:
    """g from the same weights: gradients, then weights after three steps of Muon and AdamW with warm-up and
    clipping.
    """
    config = toy("optim.warmup_steps=200", "stages.0.steps=5", "stages.0.decay_steps=0", "train.steps=9")
    ours = learner(config)
    theirs = gpu_train.Trainer(gpu_train.Regression(SMALL, CPU), CPU, 0)
    regression = ours.state.network.regression
    assert isinstance(regression, RegressionNet)
    theirs.network.load_state_dict(regression.state_dict())
    stage = gpu_train.Stage(batch=4, crop_px=32, learning_rate=1e-3)
    ours.backward(batch(0))
    hq, lq = (picture.float() / 127.5 - 1 for picture in as_the_script(batch(0)))
    theirs.model.backward(theirs.network, hq, lq, stage, 0)
    for a, b in zip(regression.parameters(), theirs.network.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-7)
    for one in (ours.state.network, theirs.network):
        one.zero_grad()
    for i in range(3):
        ours.step(batch(i))
        theirs.train(as_the_script(batch(i)), 1e-3, stage)
    # A step is orthogonalised, which enlarges the rounding of small singular values.
    assert_close(regression, theirs.network)


@pytest.mark.slow
def test_the_chain_and_its_adversary_are_those_of_the_script(
    gpu_train: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of the full U-Net in both later stages, then a step of it and of the heads. The script has no
    noise, so the chain has none that a float32 shows.
    """
    torch.manual_seed(0)
    g = RegressionNet(RegressionConfig())
    nn.init.normal_(g.head.weight, std=0.02)
    save_file(g.state_dict(), tmp_path / "g.safetensors")
    save_file(published(torch.Generator().manual_seed(0)), tmp_path / "features.safetensors")
    torch.save(squeezenet1_1(weights=None).state_dict(), tmp_path / "squeeze.pth")
    files = [tmp_path / name for name in ("g.safetensors", "squeeze.pth", "features.safetensors")]
    theirs = gpu_train.Trainer(gpu_train.Detail(CPU, *files), CPU, 0)
    nn.init.normal_(theirs.network.head.weight, std=0.02)

    config = replace(tiny_x4(), train=replace(tiny_x4().train, batch_size=2, micro_batch=2))
    settings = ["model.schedule.kappa=1e-12", "stages.0.steps=0", "stages.1.steps=1"]
    # Pictures of 32 px are too small for the lattice term.
    config = with_settings(config, [*settings, "stages.2.decay_steps=0", "stages.2.lattice=0"])
    network = build_network(config)
    assert isinstance(network, ConvUNet)
    assert network.regression is not None
    network.load_state_dict(theirs.network.state_dict(), strict=False)
    network.regression.load_state_dict(g.state_dict())
    objective = Objective(config.model, config.loss, PixelUnshuffle(4), Lpips("squeeze", files[1]))
    ours = StagedLearner(config, network, objective, EfficientNetLite0.from_file(files[2]))
    adversary = ours.state.networks["adversary"]
    assert isinstance(adversary, Adversary)
    adversary.heads.load_state_dict(theirs.model.adversary.heads.state_dict())

    def corner(_: object, step: int) -> tuple[int, int]:
        row, column = gpu_train.seeds.philox("corner", step).integers(0, 4, 2)
        return row, column

    monkeypatch.setattr(staged, "lpips_corner", corner)
    weights = {"batch": 2, "crop_px": 32, "features": 0.1}
    plan = (
        gpu_train.Stage(**weights, learning_rate=1e-3, lpips=0.2),
        gpu_train.Stage(**weights, learning_rate=3e-4, lpips=0.15, artifacts=8.0, adversary=2.0),
    )
    for i, stage in enumerate(plan):
        pictures = batch(i, 2)
        before = copy.deepcopy(adversary.state_dict()), copy.deepcopy(theirs.model.adversary.state_dict())
        ours.backward(pictures)
        hq, lq = (picture.float() / 127.5 - 1 for picture in as_the_script(pictures))
        theirs.network.zero_grad()
        theirs.model.backward(theirs.network, hq, lq, stage, i)
        own = [p for name, p in network.named_parameters() if not name.startswith("regression.")]
        for a, b in zip(own, theirs.network.parameters(), strict=True):
            assert a.grad is not None
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3 * float(b.grad.abs().max()))
            a.grad = b.grad = None
        for one, state in zip((adversary, theirs.model.adversary), before, strict=True):
            one.load_state_dict(state)
            one.zero_grad()
        for optimiser in (ours.state.optimizers["adversary"], theirs.model.optimiser):
            optimiser.state.clear()
        ours.step(pictures)
        theirs.train(as_the_script(pictures), stage.learning_rate, stage)
        for a, b in zip(own, theirs.network.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    # Adam's first step has the sign of the gradient, which rounding turns where that is almost zero.
    for a, b in zip(adversary.heads.parameters(), theirs.model.adversary.heads.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
        assert (~torch.isclose(a, b, rtol=1e-3, atol=1e-5)).sum() <= 1e-4 * a.numel()
    torch.testing.assert_close(adversary.norms, theirs.model.adversary.norms, rtol=1e-3, atol=0)
    assert adversary.norms.all()


def test_a_stage_trains_its_network_alone_and_g_is_handed_over_averaged() -> None:
    run = learner(toy())
    network = run.state.network
    assert isinstance(network, ConvUNet)
    assert network.regression is not None
    nn.init.normal_(network.head.weight, std=0.02)
    moved: list[set[str]] = []
    for i in range(5):
        before = {key: value.clone() for key, value in network.state_dict().items()}
        heads = copy.deepcopy(run.state.networks["adversary"].state_dict())
        averaged = copy.deepcopy(run.state.ema.module.get_submodule("regression").state_dict())
        terms = run.step(batch(i)).terms
        now = network.state_dict()
        if i == 2:
            assert all(torch.equal(now[f"regression.{key}"], value) for key, value in averaged.items())
        changed = {key for key, value in before.items() if not torch.equal(now[key], value)}
        moved.append({"g" if key.startswith("regression.") else "u" for key in changed})
        after = run.state.networks["adversary"].state_dict()
        assert any(not torch.equal(heads[key], value) for key, value in after.items()) == (i == 4)
        assert bool(terms["seen"]) == (i == 4)
        assert bool(terms["features"]) == (i >= 2)
    assert moved == [{"g"}, {"g"}, {"g", "u"}, {"u"}, {"u"}]  # at the third step g takes its average


def test_learning_rate_and_average_of_each_stage() -> None:
    config = toy("train.steps=8", "optim.warmup_steps=2")
    run = learner(config)
    rates = [run.learning_rate(step) / 1e-3 for step in range(8)]
    # Warm-up of two steps in each part; the first stage ends with one step of decay, the last with two.
    assert rates == pytest.approx([0.5, 1.0, 0.5, 1.0, 0.3, 0.3, 0.3, 0.15])
    run.step(batch(0))
    muon = run.state.optimizers["muon"].param_groups[0]
    assert muon["lr"] == pytest.approx(10 * 0.5e-3)
    twice = with_settings(config, ["optim.lr_batch=1"])
    assert learner(twice).learning_rate(1) == pytest.approx(2e-3)  # sqrt(4 / 1)
    long = learner(toy("train.steps=20000", "stages.2.decay_steps=100"))
    decays = [long._average_decay(step) for step in (0, 2, 101, 19899, 19900)]  # pyright: ignore[reportPrivateUsage]
    assert decays == pytest.approx([0.1, 0.1, 100 / 109, 0.999, 0.99])


@pytest.mark.slow
def test_a_stop_anywhere_leaves_no_trace(tmp_path: Path) -> None:
    """Bit for bit: in a stage, at the boundary where g is handed over, and where the adversary begins."""
    config = toy()
    check_stops(
        config, lambda: learner(config), lambda at: [batch(i) for i in range(at, 6)], (1, 2, 4, 5), tmp_path
    )


def run_five(
    config: RunConfig, rank: int = 0, num_ranks: int = 1
) -> tuple[list[dict[str, float]], TrainState]:
    """Take two steps of each of the first stages and one with the adversary."""
    slots = Slots.of_rank(4, rank, num_ranks)
    run = learner(config, slots)
    nn.init.normal_(run.state.network.get_parameter("head.weight"), std=0.02, generator=torch.Generator())
    lines: list[dict[str, float]] = []
    for i in range(5):
        own = {name: value[slots.start : slots.stop] for name, value in batch(i).items()}
        run.state.means.add(*run.step(own))
        lines.append(run.state.means.pop())
    return lines, run.state


def facts(lines: list[dict[str, float]], state: TrainState) -> Any:
    """Terms and norms of gradients of all steps, running means of the adversary, and squares of the gradients
    of its heads. Their weights are no measure: the first step of Adam is the sign of a gradient.
    """
    heads = state.optimizers["adversary"].state_dict()["state"]
    norms = state.weights()["adversary"]["norms"]
    squares = {str(i): float(values["exp_avg_sq"].sum().sqrt()) for i, values in heads.items()}
    return [*lines, {str(i): value for i, value in enumerate(norms.tolist())}, squares]


def check_same(found: Any, expected: Any) -> None:
    """Muon gives small singular values the size of large ones, so rounding grows from step to step."""
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=2e-3, abs=1e-6)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_neither_micro_batches_nor_workers_change_more_than_rounding(tmp_path: Path) -> None:
    """One worker with 4, and with 2 + 2 samples; two workers with 1 + 1, with DDP around another network in
    each part. Weights, heads and norms of both workers are the same bits.
    """
    expected = facts(*run_five(toy()))
    check_same(facts(*run_five(toy("train.micro_batch=3"))), expected)
    run_workers(2, work, str(tmp_path))
    check_same(json.loads((tmp_path / "facts.json").read_text()), expected)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def work(rank: int, out: str) -> None:
    """Be one of two workers."""
    found, state = run_five(toy("train.micro_batch=1"), rank, 2)
    weights = {f"{name}.{key}": v for name, part in state.weights().items() for key, v in part.items()}
    torch.save(weights, f"{out}/{rank}.pt")
    if rank == 0:
        Path(out, "facts.json").write_text(json.dumps(facts(found, state)))


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    config = toy()
    run = learner(config)
    for i in range(5):
        run.step(batch(i))
    names = ("model", "adversary", "muon")
    before = {key: v.clone() for key, v in tensors(run.state).items() if key.startswith(names)}
    judge = run.judge

    class Broken(PictureLoss):
        def __call__(self, *arguments: Any) -> Any:
            judged = judge(*arguments)
            assert judged.seen is not None
            return judged._replace(gradient=judged.gradient * float("nan"), seen=judged.seen * float("nan"))

    run.judge = Broken()
    assert not run.step(batch(5)).outcome.finite
    after = tensors(run.state)
    # A step of the power iteration is a function of the weights alone.
    kept = [key for key in before if not key.endswith(("._u", "._v"))]
    assert [key for key in kept if not torch.equal(after[key], before[key])] == []
    run.judge = judge
    assert run.step(batch(6)).outcome.finite


def test_a_run_begins_with_a_regression_network_alone_or_with_the_whole() -> None:
    config = toy("stages.0.steps=0")
    torch.manual_seed(5)
    g = RegressionNet(SMALL)
    nn.init.normal_(g.head.weight, std=0.02)
    run = learner(config)
    start_from(run, state_to_store(g))
    run.step(batch(0))
    regression = run.state.network.regression
    assert isinstance(regression, RegressionNet)
    assert_close(regression, g, rtol=0, atol=0)
    whole = build_network(with_settings(config, ["train.seed=9"]))
    run = learner(config)
    start_from(run, state_to_store(whole))
    assert_close(run.state.network, whole, rtol=0, atol=0)
    with pytest.raises(WeightsError, match="missing"):
        start_from(learner(config), {"stem.weight": torch.zeros(1)})


def test_pictures_of_a_run_are_those_of_g_until_the_chain_is_trained() -> None:
    run = learner(toy())
    run.step(batch(0))
    g = run.state.ema.module.get_submodule("regression")
    with torch.no_grad():
        shown = run.render(batch(1), ["a", "b", "c", "d"])
        lq = batch(1)["lq"].permute(0, 3, 1, 2).float() / 127.5 - 1
        torch.testing.assert_close(shown, g(lq), atol=1e-5, rtol=0)


def test_the_loss_of_a_picture_is_its_formula() -> None:
    """A constant difference of 1/2: Charbonnier sqrt(1/4 + 1e-6). One of its 8 (8 / 2 + 1) coefficients is
    not zero: sqrt(8 8) times 1/2.
    """
    hq = torch.zeros(2, 3, 8, 8)
    loss = LossConfig(mse=0, charbonnier=2.0, fourier=3.0)
    judged = PictureLoss()(hq + 0.5, hq, hq, loss)
    charbonnier, fourier = (0.25 + 1e-6) ** 0.5, 8 * 0.5 / (8 * 5)
    assert float(judged.terms["charbonnier"]) == pytest.approx(charbonnier)
    assert float(judged.terms["fourier"]) == pytest.approx(fourier)
    assert float(judged.terms["loss"]) == pytest.approx(2 * charbonnier + 3 * fourier)
    assert judged.gradient.shape == hq.shape
    assert judged.pull is None


def test_the_lattice_term_is_that_of_the_picture() -> None:
    """One pixel of every position of 4 x 4 is brighter, which the measures see."""
    hq = torch.zeros(2, 3, 64, 64)
    picture = hq.clone()
    picture[..., 1::4, 2::4] = 0.5
    loss = LossConfig(mse=0, charbonnier=1.0, lattice=3.0)
    judged = PictureLoss(periods=(4, 16))(picture, hq, hq, loss)
    expected = patterns(picture, 4, 16)
    assert float(judged.terms["lattice"]) == pytest.approx(float(expected))
    total = judged.terms["charbonnier"] + 3 * expected
    assert float(judged.terms["loss"]) == pytest.approx(float(total))


def test_artifacts_are_where_the_error_changes_from_pixel_to_pixel() -> None:
    """A constant error has none. One pixel of 3 x 1/2 in 7 x 7: var_7x7 = 1.5^2 (1/49 - 1/49^2) around it,
    and the term is that of this pixel alone.
    """
    hq = torch.zeros(1, 3, 16, 16)
    assert not artifact_map(hq + 0.5).any()
    dot = hq.clone()
    dot[..., 8, 8] = 0.5
    local = 1.5**2 * (1 / 49 - 1 / 49**2)
    whole = 1.5**2 * (1 / 256 - 1 / 256**2) * 256 / 255
    expected = whole**0.2 * local
    found = artifact_map(dot)
    assert float(found[0, 0, 8, 11]) == pytest.approx(expected, rel=1e-4)
    assert float(found[0, 0, 8, 12]) == pytest.approx(0, abs=1e-7)
    loss = LossConfig(mse=0, charbonnier=1.0, artifacts=9.0)
    judged = PictureLoss()(dot, hq, hq, loss)
    assert float(judged.terms["artifacts"]) == pytest.approx(expected * 0.5 / 256, rel=1e-4)
    white, brighter = (PictureLoss()(dot * scale, hq, hq, loss).terms["artifacts"] for scale in (2, 200))
    assert white == brighter  # a network that diverges is not driven by this term


def test_the_factor_of_the_adversary_is_the_ratio_of_running_means() -> None:
    adversary = Adversary()
    assert float(adversary.balance(torch.tensor([4.0, 16.0]))) == pytest.approx(0.5)
    expected = (0.95 * 2 + 0.05 * 6) / (0.95 * 4 + 0.05 * 1)
    assert float(adversary.balance(torch.tensor([36.0, 1.0]))) == pytest.approx(expected)
    assert float(adversary.balance(torch.tensor([float("nan"), 1.0]))) == pytest.approx(expected)
    assert "norms" in adversary.state_dict()
