"""The U-Net of convolutions: what it starts as, what it costs, how it depends on its place."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from resshift.networks.config import ConvUNetConfig, Padding
from resshift.networks.conv_unet import ConvUNet

SMALL = ConvUNetConfig(channels=(8, 12, 16), blocks_before=(1, 1, 1), blocks_after=(1, 1), steps=2)


def inputs(side: int, config: ConvUNetConfig = SMALL) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, side, side, generator=generator)
    lq = torch.randn(2, config.cond_channels, side, side, generator=generator)
    return x, torch.zeros(2, dtype=torch.int64), lq


def trained(config: ConvUNetConfig = SMALL) -> ConvUNet:
    """Return a network without layers of zeros."""
    torch.manual_seed(0)
    network = ConvUNet(config).eval()
    torch.nn.init.normal_(network.head.weight, std=0.1)
    assert network.times is not None
    torch.nn.init.normal_(network.times.weight)
    return network


@torch.no_grad()
def test_it_starts_with_a_residual_of_zero() -> None:
    assert not ConvUNet(SMALL)(*inputs(8)).any()


@torch.no_grad()
def test_parameters_and_multiplications() -> None:
    config, side = ConvUNetConfig(), 32
    network = ConvUNet(config)
    assert sum(parameter.numel() for parameter in network.parameters()) == 3_939_296
    with FlopCounterMode(display=False) as counter:
        network(*(value[:1] for value in inputs(side, config)))
    assert counter.get_total_flops() == 2 * config.macs_per_position * side**2


@torch.no_grad()
def test_the_time_matters_only_to_a_network_of_several_steps() -> None:
    x, t, lq = inputs(8)
    network = trained()
    assert not torch.equal(network(x, t, lq), network(x, t + 1, lq))
    assert "times.weight" not in ConvUNet(ConvUNetConfig()).state_dict()


@torch.no_grad()
def test_the_rest_of_the_picture_changes_nothing() -> None:
    """Other content beyond the reach of the network: there is no statistic of the whole."""
    network = trained()
    x, t, lq = inputs(96)
    other = x.clone()
    other[..., 72:] = 5
    before, after = network(x, t, lq), network(other, t, lq)
    torch.testing.assert_close(before[..., :24], after[..., :24], rtol=0, atol=0)
    assert not torch.equal(before[..., 68:72], after[..., 68:72])


@torch.no_grad()
@pytest.mark.parametrize(("padding", "is_even"), [("replicate", True), ("zeros", False)])
def test_even_areas_stay_even_up_to_the_edge(padding: Padding, is_even: bool) -> None:
    """Of one level: with more, the pattern of the coarser positions is cut off at the edge."""
    config = replace(SMALL, channels=(8,), blocks_before=(3,), blocks_after=(), padding=padding)
    x, t, lq = inputs(1)
    result = trained(config)(x.expand(-1, -1, 16, 16), t, lq.expand(-1, -1, 16, 16))
    assert torch.allclose(result, result[..., :1, :1].expand_as(result), rtol=0, atol=1e-5) == is_even


@torch.no_grad()
def test_a_shift_by_its_grid_shifts_the_interior() -> None:
    network, shift = trained(), SMALL.size_multiple
    x, t, lq = inputs(96)
    whole = network(x, t, lq)
    shifted = network(x[..., shift:], t, lq[..., shift:])
    torch.testing.assert_close(shifted[..., 40:48], whole[..., 40 + shift : 48 + shift])


@torch.no_grad()
def test_a_finer_picture_and_its_mask_are_seen_pixel_by_pixel() -> None:
    """Every pixel of the picture and of the mask has filters of its own; one changes what is near."""
    torch.manual_seed(0)
    network = ConvUNet(
        replace(
            SMALL, channels=(8,), blocks_before=(1,), blocks_after=(), steps=1, lq_ratio=4, cond_mask=True
        )
    )
    torch.nn.init.normal_(network.head.weight, std=0.1)
    draw = torch.Generator().manual_seed(0)
    x, lq, mask = (torch.randn(1, n, s, s, generator=draw) for n, s in ((48, 16), (3, 64), (1, 64)))
    t, found = torch.zeros(1, dtype=torch.int64), set[bytes]()
    before = network(x, t, lq, mask)
    for i, at in itertools.product(range(4), itertools.product(range(4), repeat=2)):
        both = torch.cat((lq, mask), dim=1)
        both[0, i, 32 + at[0], 32 + at[1]] += 1
        change = network(x, t, both[:, :3], both[:, 3:]) - before
        assert change[..., 8, 8].any()
        assert not change[..., :4, :].any()
        found.add(change.numpy().tobytes())
    assert len(found) == 4 * 16


def test_a_mask_is_given_to_networks_that_see_it() -> None:
    with pytest.raises(ValueError, match="takes no mask"):
        trained()(*inputs(8), torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="needs a mask"):
        ConvUNet(replace(SMALL, cond_mask=True))(*inputs(8))


@pytest.mark.parametrize(
    "change",
    [{"channels": ()}, {"blocks_before": (1, 1)}, {"blocks_after": (1,)}, {"steps": 0}, {"lq_ratio": 0}],
)
def test_shapes_that_cannot_be_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"model\.unet"):
        ConvUNetConfig(**change)  # pyright: ignore[reportArgumentType]
