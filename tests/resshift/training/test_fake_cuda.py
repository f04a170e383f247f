"""Every preset on CUDA tensors without values: a training step and a picture stay on the device, and a step
makes no host wait; and faults that only a GPU would show are caught.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from resshift.config import RunConfig, with_settings
from resshift.degradation.noise import normal_table
from resshift.degradation.on_device.noise import poisson_tables
from resshift.degradation.on_device.plan import PLAN_BYTES
from resshift.metrics.lpips import Lpips
from resshift.networks.autoencoder import build_first_stage
from resshift.networks.unet import UNetSwin
from resshift.presets import PRESETS, preset
from resshift.training import losses, staged, step
from resshift.training.autoencoder import (
    AUTOENCODER_PRESETS,
    AnyRunConfig,
    AutoencoderLearner,
    TrainableAutoencoder,
    autoencoder_preset,
)
from resshift.training.efficientnet import EfficientNetLite0
from resshift.training.losses import Objective
from resshift.training.staged import StagedLearner
from resshift.training.step import DiffusionLearner, build_network
from tests.fake_cuda import (
    CUDA,
    HostTraffic,
    backward_filled,
    fake_cuda,
    no_host_traffic,
    no_values,
    on_fake_cuda,
)

FAST = ("test-vq",)  # the others take more than a second of a core
BATCH = 2  # two micro-batches


def fast_and_slow(names: list[str]) -> list[Any]:
    return [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in names]


def config_of(name: str, **train: Any) -> Any:
    config: AnyRunConfig = preset(name) if name in PRESETS else autoencoder_preset(name)
    return replace(config, train=replace(config.train, batch_size=BATCH, micro_batch=1, **train))


def lpips_of(config: AnyRunConfig) -> Lpips | None:
    """LPIPS without weights; its package would download or make some."""
    if not config.loss.lpips:
        return None
    import lpips

    network = Lpips.__new__(Lpips)
    nn.Module.__init__(network)
    network.distance = lpips.LPIPS(net=config.loss.lpips_net, pnet_rand=True, pretrained=False, verbose=False)
    return network.eval().requires_grad_(False).to(torch.device("meta"))


def networks_of(config: AnyRunConfig) -> tuple[nn.Module, nn.Module | None, Lpips | None]:
    if not isinstance(config, RunConfig):
        return TrainableAutoencoder(config.first_stage.vq), None, lpips_of(config)
    stage = build_first_stage(config.model.first_stage).eval().requires_grad_(False)
    return build_network(config), stage, lpips_of(config)


def learner_of(
    config: AnyRunConfig, network: Any, stage: Any, lpips: Lpips | None
) -> DiffusionLearner | StagedLearner | AutoencoderLearner:
    if isinstance(config, RunConfig):
        objective = Objective(config.model, config.loss, stage, lpips)
        if not config.stages:
            return DiffusionLearner(config, network, objective)
        with torch.device("meta"):
            trunk = EfficientNetLite0().eval().requires_grad_(False)
        return StagedLearner(config, network, objective, on_fake_cuda(trunk))
    return AutoencoderLearner(config, network, lpips)


def batch_of(config: AnyRunConfig, device: torch.device) -> dict[str, Tensor]:
    side = config.data.crop_px
    shapes: dict[str, tuple[int, ...]] = {"hq": (side, side, 3)}
    if isinstance(config, RunConfig):
        low = side // config.model.scale
        shapes |= {"lq": (low, low, 3)} | ({"mask": (low, low)} if config.model.unet.cond_mask else {})
        shapes |= {"plan": (PLAN_BYTES,)} if config.data.degrade_on == "device" else {}
    return {
        name: torch.zeros(BATCH, *shape, dtype=torch.uint8, device=device) for name, shape in shapes.items()
    }


def train(config: AnyRunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take two steps on the device and make a picture. The first step may copy tables there, the second
    nothing.
    """
    with no_values(monkeypatch):
        built = networks_of(config)
    # Normalised layers cannot be moved while their tensors have no values.
    monkeypatch.setattr(staged, "on_device", lambda module, *_: on_fake_cuda(module))
    with fake_cuda(monkeypatch):
        placed: list[Any] = [part and on_fake_cuda(part) for part in built]
        learner = learner_of(config, *placed)
        state, batch = learner.state, batch_of(config, CUDA)
        if isinstance(learner, AutoencoderLearner):
            state.step = learner.config.loss.adversarial_start
        if isinstance(learner, StagedLearner):
            state.step = learner.config.train.steps - 2  # in the last stage, which has an adversary
        with backward_filled(list(state.networks.values()), monkeypatch):
            state.means.add(*learner.step(batch))
            with no_host_traffic():
                result = learner.step(batch)
                state.means.add(*result)
        tensors = {**result.terms, "norm": result.outcome.grad_norm, "finite": result.outcome.finite}
        assert {name: value.device for name, value in tensors.items()} == dict.fromkeys(tensors, CUDA)
        assert state.means.sums.device == CUDA
        with torch.no_grad():
            shown = learner.render({name: value[:1] for name, value in batch.items()}, ["key"])
        assert (shown.device, shown.shape) == (CUDA, (1, 3, config.data.crop_px, config.data.crop_px))


@pytest.mark.parametrize("name", fast_and_slow([*PRESETS, *AUTOENCODER_PRESETS]))
def test_a_step_and_a_picture_stay_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config_of(name), monkeypatch)


@pytest.mark.slow
def test_a_step_that_degrades_stays_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for the host no more than one that gets its low-quality pictures."""
    settings = ("degradation.kind=realesrgan", "data.degrade_on=device", "train.micro_batch=2")
    normal_table()  # kept, as the other tables are: without values none can be made
    poisson_tables()
    train(with_settings(config_of("test-x4"), settings), monkeypatch)


@pytest.mark.parametrize("name", fast_and_slow([*PRESETS, *AUTOENCODER_PRESETS]))
def test_every_parameter_gets_a_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on the meta device, which has shapes and no values."""
    config = config_of(name, precision="fp32")
    with no_values(monkeypatch):
        network, stage, lpips = networks_of(config)
        batch = batch_of(config, torch.device("meta"))
        if isinstance(config, RunConfig):
            assert stage is not None
            objective = Objective(config.model, config.loss, stage, lpips)  # type: ignore[arg-type]
            hq, lq = (step.to_unit_range(batch[name]) for name in ("hq", "lq"))
            mask = step.mask_to_unit_range(batch["mask"]) if "mask" in batch else None
            noise = torch.empty(BATCH, *step.latent_shape(config.model, batch["hq"]))
            t = torch.zeros(BATCH, dtype=torch.int64)
            objective(network, hq, lq, t, noise, mask).total.backward()
        else:
            x = step.to_unit_range(batch["hq"])
            x_rec, z, z_q = network(x)
            (x_rec.square().mean() + (z - z_q).square().mean()).backward()
    trained = [(name, one) for name, one in network.named_parameters() if one.requires_grad]
    without = [name for name, parameter in trained if parameter.grad is None]
    assert without == []


# --- Faults that a CPU does not show


def value_read(patch: pytest.MonkeyPatch) -> None:
    """The host decides with a number of the device whether to step."""
    original = step.guarded_step

    def guarded_step(*arguments: Any) -> Any:
        outcome = original(*arguments)
        assert bool(outcome.finite) in (False, True)
        return outcome

    patch.setattr(step, "guarded_step", guarded_step)


def loss_logged(patch: pytest.MonkeyPatch) -> None:
    """Each step brings its loss to the host."""
    original = losses.mse_per_sample

    def mse(*arguments: Any) -> Tensor:
        found = original(*arguments)
        found.detach().cpu()
        return found

    patch.setattr(losses, "mse_per_sample", mse)


def table_copied(patch: pytest.MonkeyPatch) -> None:
    """A table is copied from the host for each micro-batch, as `mse_weighting=weighted` once did."""
    original = losses.mse_per_sample

    def mse(*arguments: Any) -> Tensor:
        found = original(*arguments)
        return found * torch.ones(4).to(found)[arguments[2]]

    patch.setattr(losses, "mse_per_sample", mse)


def noise_of_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Noise is drawn on the CPU and stays there."""
    original = step.draw_noise

    def draw(config: Any, i_step: int, slots: Any, shape: Any, device: Any) -> tuple[Tensor, Tensor]:
        t, noise = original(config, i_step, slots, shape, device)
        return t, torch.zeros(noise.shape)

    patch.setattr(step, "draw_noise", draw)


def index_of_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Steps of the chain are drawn on the CPU and stay there."""
    original = step.draw_noise

    def draw(config: Any, i_step: int, slots: Any, shape: Any, device: Any) -> tuple[Tensor, Tensor]:
        t, noise = original(config, i_step, slots, shape, device)
        return torch.zeros(t.shape, dtype=t.dtype), noise

    patch.setattr(step, "draw_noise", draw)


def mask_of_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """A network keeps a tensor that is no buffer, so it does not move with the network."""
    original = UNetSwin.forward

    def forward(self: UNetSwin, x: Tensor, *conditions: Any) -> Tensor:
        return original(self, x * torch.ones(x.shape[1:]), *conditions)

    patch.setattr(UNetSwin, "forward", forward)


def samples_chosen(patch: pytest.MonkeyPatch) -> None:
    """Samples are chosen by a condition: their number is known on the device only."""
    original = losses.mse_per_sample

    def mse(*arguments: Any) -> Tensor:
        found = original(*arguments)
        return found[found.isfinite()]

    patch.setattr(losses, "mse_per_sample", mse)


FAULTS: dict[Callable[[pytest.MonkeyPatch], None], tuple[type[Exception], str]] = {
    value_read: (DataDependentOutputException, "_local_scalar_dense"),
    loss_logged: (HostTraffic, "from cuda to cpu"),
    table_copied: (HostTraffic, "from cpu to cuda"),
    noise_of_the_cpu: (RuntimeError, "two devices, .*cpu"),
    index_of_the_cpu: (RuntimeError, "two devices, .*cpu"),
    mask_of_the_cpu: (RuntimeError, "two devices, .*cpu"),
    samples_chosen: (DynamicOutputShapeException, "nonzero"),
}


@pytest.mark.slow
@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_planted_faults_are_caught(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, told = FAULTS[plant]
    plant(monkeypatch)
    with pytest.raises(kind, match=told):
        train(config_of("test-x4"), monkeypatch)
