"""The regression network: what it starts as, what it costs, and how far it sees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from resshift.networks.config import RegressionConfig
from resshift.networks.regression import RegressionNet
from resshift.training.losses import upsample

SMALL = RegressionConfig(channels=8, half_channels=12, blocks_before=1, half_blocks=1, blocks_after=1)


def picture(height: int, width: int) -> Tensor:
    return 2 * torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)) - 1


def trained(config: RegressionConfig = SMALL) -> RegressionNet:
    """Return a network whose last layer is no longer zero."""
    torch.manual_seed(0)
    network = RegressionNet(config).eval()
    torch.nn.init.normal_(network.head.weight, std=0.1)
    return network


@torch.no_grad()
def test_with_a_last_layer_of_zeros_it_is_bicubic_interpolation() -> None:
    lq = picture(9, 12)
    assert torch.equal(RegressionNet(SMALL)(lq), upsample(lq, 4))


@torch.no_grad()
def test_parameters_and_multiplications() -> None:
    network, side = RegressionNet(RegressionConfig()), 32
    assert sum(parameter.numel() for parameter in network.parameters()) == 890_064
    with FlopCounterMode(display=False) as counter:
        network(picture(side, side))
    assert counter.get_total_flops() == 2 * RegressionConfig().macs_per_lq_px * side**2
    assert RegressionConfig().macs_per_lq_px < 0.5e6


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (7, 8), (16, 9)])
@torch.no_grad()
def test_any_size(height: int, width: int) -> None:
    lq = picture(height, width)
    output = trained()(lq)
    assert output.shape == (1, 3, 4 * height, 4 * width)
    even = torch.nn.functional.pad(lq, (0, width % 2, 0, height % 2), mode="replicate")
    detail = trained()(even) - upsample(even, 4)
    torch.testing.assert_close(output - upsample(lq, 4), detail[..., : 4 * height, : 4 * width])


@torch.no_grad()
def test_a_shift_by_the_grid_of_the_half_branch_shifts_the_interior() -> None:
    network, reach, shift = trained(), SMALL.reach_px, 2
    lq = picture(2 * reach + 12, 2 * reach + 12)
    whole, shifted = network(lq), network(lq[..., shift:, shift:])
    inside, inside_shifted = (slice(4 * (reach + offset), -4 * reach) for offset in (shift, 0))
    torch.testing.assert_close(whole[..., inside, inside], shifted[..., inside_shifted, inside_shifted])


@pytest.mark.parametrize(
    "config",
    [SMALL, RegressionConfig(channels=4, half_channels=4, blocks_before=0, half_blocks=2, blocks_after=0)],
)
def test_nothing_beyond_its_reach_has_an_influence(config: RegressionConfig) -> None:
    """And something within it has: the figure is no larger than it must be."""
    network, reach = trained(config).double(), config.reach_px
    lq = picture(4 * reach, 4).double().requires_grad_()
    farthest = 0
    for row in (2 * reach, 2 * reach + 1):  # on both places of the half branch's grid
        (gradient,) = torch.autograd.grad(network(lq)[..., 4 * row : 4 * row + 4, :].square().sum(), lq)
        seen = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
        farthest = max(farthest, row - int(seen.min()), int(seen.max()) - row)
    assert farthest == reach


def test_impossible_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        RegressionConfig(channels=0)
    with pytest.raises(ValueError, match="must not be negative"):
        RegressionConfig(half_blocks=-1)
