"""The objective: the released losses for the four targets, and the LPIPS term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resshift.config import LossConfig, ModelConfig
from resshift.diffusion import q_sample, scale_input, target_of
from resshift.metrics.lpips import Lpips
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.networks.config import FirstStageConfig
from resshift.presets import tiny_x4_swin
from resshift.resize.bicubic import upsample
from resshift.schedule import ShiftSchedule, Target
from resshift.training.lattice import beads, lattice, screen
from resshift.training.losses import Objective, mse_per_sample, step_weights

Load = Callable[[str], dict[str, np.ndarray]]
SCHEDULES = {
    "realsr_v1v2_T15": ShiftSchedule.released(15, 2.0, 0.04),
    "journal_T4": ShiftSchedule.released(4, 2.0, 0.2),
}
OFFICIAL = {
    Target.X0: "xstart",
    Target.RESIDUAL: "residual",
    Target.EPSILON: "epsilon",
    Target.EPSILON_SCALE: "epsilon_scale",
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("target", Target)
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_against_official(name: str, target: Target, weighted: bool, parity: Load) -> None:
    """The fixture's first stage is an average over 4 x 4 pixels; its network returns one fixed array."""
    arrays = {key: torch.from_numpy(value) for key, value in parity("diffusion_training_loss").items()}
    schedule = SCHEDULES[name]
    x0 = nn.functional.avg_pool2d(arrays["gt"], 4)
    y0 = nn.functional.avg_pool2d(upsample(arrays["lq"], 4), 4)
    torch.testing.assert_close(y0, arrays["z_y"], atol=1e-5, rtol=0)
    expected = arrays[f"{name}/{OFFICIAL[target]}/{'weighted' if weighted else 'plain'}"]
    for i in range(schedule.steps):
        t = torch.full((4,), i)
        wanted = target_of(x0, y0, arrays["noise"], t, schedule, target)
        loss = mse_per_sample(arrays["model_out"], wanted, t, schedule, target, weighted)
        torch.testing.assert_close(loss.double(), expected[i], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("name", "i"), [("realsr_v1v2_T15", 7), ("journal_T4", 2)])
def test_network_input_against_official(name: str, i: int, parity: Load) -> None:
    arrays = {key: torch.from_numpy(value) for key, value in parity("diffusion_training_loss").items()}
    t = torch.full((4,), i)
    x_t = q_sample(
        nn.functional.avg_pool2d(arrays["gt"], 4), arrays["z_y"], t, arrays["noise"], SCHEDULES[name]
    )
    torch.testing.assert_close(x_t, arrays[f"{name}/z_t_t{i}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        scale_input(x_t, t, SCHEDULES[name]), arrays[f"{name}/model_in_t{i}"], atol=1e-5, rtol=0
    )


def test_weights_against_official(parity: Load) -> None:
    arrays = parity("diffusion_schedules")
    for name, schedule in SCHEDULES.items():
        for targets, key in (
            ((Target.X0, Target.RESIDUAL), "weight_x0"),
            ((Target.EPSILON, Target.EPSILON_SCALE), "weight_eps"),
        ):
            for target in targets:
                np.testing.assert_allclose(
                    step_weights(schedule, target), arrays[f"{name}/{key}"], rtol=1e-12
                )


def test_weighted_loss_needs_two_steps() -> None:
    with pytest.raises(ValueError, match="at least 2 steps, got 1"):
        step_weights(ShiftSchedule.released(1), Target.X0)


class _Oracle(nn.Module):
    """Knows the clean and the degraded latent, so it answers with the residual exactly."""

    def __init__(self, residual: Tensor) -> None:
        super().__init__()
        self.residual = nn.Parameter(residual)

    def forward(self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None) -> Tensor:
        return self.residual


def _pictures() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand((2, 3, 64, 64), generator=generator) * 2 - 1, torch.rand(
        (2, 3, 16, 16), generator=generator
    ) * 2 - 1


def _draws() -> tuple[Tensor, Tensor]:
    return torch.tensor([1, 3]), torch.randn((2, 48, 16, 16), generator=torch.Generator().manual_seed(1))


def _model() -> ModelConfig:
    model = tiny_x4_swin().model
    return replace(model, schedule=replace(model.schedule, steps=4))


def test_perfect_network_has_no_loss() -> None:
    hq, lq = _pictures()
    stage = PixelUnshuffle(4)
    network = _Oracle(stage.encode(upsample(lq, 4)) - stage.encode(hq))
    terms = Objective(_model(), LossConfig(), stage)(network, hq, lq, *_draws())
    assert terms.total.item() < 1e-12


def test_coefficients_scale_the_terms(lpips: Lpips) -> None:
    hq, lq = _pictures()
    stage = PixelUnshuffle(4)
    network = _Oracle(torch.zeros(2, 48, 16, 16))
    objective = Objective(_model(), LossConfig(mse=2.0, lpips=3.0, lpips_net="squeeze"), stage, lpips)
    terms = objective(network, hq, lq, *_draws())
    with torch.no_grad():
        expected_mse = (
            (upsample(lq, 4) - hq).square().mean()
        )  # an answer of zero means "the residual is zero": x0 = y0
        expected_lpips = lpips(upsample(lq, 4).clamp(-1, 1), hq).mean()
    torch.testing.assert_close(terms.mse, expected_mse)
    torch.testing.assert_close(terms.lpips, expected_lpips)
    torch.testing.assert_close(terms.total.detach(), 2 * expected_mse + 3 * expected_lpips)
    terms.total.backward()
    assert network.residual.grad is not None
    assert network.residual.grad.abs().sum() > 0


def test_lattice_is_that_of_the_decoded_prediction() -> None:
    hq, lq = _pictures()
    stage = PixelUnshuffle(4)
    pattern = 0.2 * torch.randn((1, 48, 1, 1), generator=torch.Generator().manual_seed(3)).expand(
        2, 48, 16, 16
    )
    terms = Objective(_model(), LossConfig(lattice=5.0), stage)(_Oracle(pattern), hq, lq, *_draws())
    predicted = upsample(lq, 4) - stage.decode(pattern)
    parts = lattice(predicted, 4).mean(), screen(predicted, 4) / 2, 10 * beads(predicted, 4)
    assert min(parts) > 0.01
    torch.testing.assert_close(terms.lattice, sum(parts))
    torch.testing.assert_close(terms.total.detach(), terms.mse + 5 * sum(parts))


def test_lpips_sees_the_pictures_from_the_corner(lpips: Lpips) -> None:
    hq, lq = _pictures()
    network = _Oracle(torch.zeros(2, 48, 16, 16))
    objective = Objective(_model(), LossConfig(lpips=1.0, lpips_net="squeeze"), PixelUnshuffle(4), lpips)
    with torch.no_grad():
        terms = objective(network, hq, lq, *_draws(), corner=(3, 1))
        expected = lpips(upsample(lq, 4).clamp(-1, 1)[..., 3:, 1:], hq[..., 3:, 1:]).mean()
    torch.testing.assert_close(terms.lpips, expected)


@pytest.mark.parametrize("wrong", [{"lattice": -1.0}, {"lpips_corners": 0}, {"lpips_corners": 17}])
def test_coefficients_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError,
        match=r"loss.lattice must not be negative and loss.lpips_corners must lie in \[1, 16\], got",
    ):
        LossConfig(**wrong)


def test_objective_without_its_lpips_network_is_refused() -> None:
    with pytest.raises(ValueError, match="no LPIPS network"):
        Objective(_model(), LossConfig(lpips=1.0), PixelUnshuffle(4))


def test_first_stage_config_knows_its_latent() -> None:
    assert (FirstStageConfig().factor, FirstStageConfig().channels) == (4, 3)
    stage = FirstStageConfig(kind="pixel_unshuffle", unshuffle_factor=2)
    assert (stage.factor, stage.channels) == (2, 12)
