"""The pixel head, which no released network has; the rest of the U-Net is held to the released one in
test_parity.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional as F

from resshift.config import ModelConfig
from resshift.networks.config import FirstStageConfig, UNetConfig
from resshift.networks.unet import PixelHead, UNetSwin
from resshift.presets import tiny_x4_swin
from resshift.training.lattice import unevenness


def small(pixel_head_channels: int) -> UNetConfig:
    config = tiny_x4_swin().model.unet
    assert isinstance(config, UNetConfig)
    return replace(
        config,
        model_channels=32,
        num_res_blocks=1,
        swin_embed_dim=32,
        pixel_head_channels=pixel_head_channels,
    )


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn((2, 48, 16, 8), generator=generator),
        torch.tensor([0, 0]),
        torch.randn((2, 3, 16, 8), generator=generator),
    )


def test_a_network_begins_as_the_one_without_a_head() -> None:
    torch.manual_seed(0)
    plain, headed = UNetSwin(small(0)), UNetSwin(small(8))
    found = headed.load_state_dict(plain.state_dict(), strict=False)
    assert {key.split(".")[0] for key in found.missing_keys} == {"pixel_head"}
    assert not found.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(headed(*inputs()), plain(*inputs()), rtol=0, atol=0)


def test_a_head_of_shifts_moves_pixels_across_the_border_of_a_position() -> None:
    """`features` repeats the activations and `last` takes the pixel to the left, so the sum is known at every
    pixel.
    """
    head = PixelHead(in_channels=16, channels=1, factor=4)
    for parameter in head.parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        head.features.weight[range(16), range(16), 1, 1] = 1
        head.inner.weight[0, 0, 1, 1] = 1
        head.last.weight[:, 0, 1, 0] = torch.tensor([1.0, 2.0, 3.0])
        h, output = torch.randn((1, 16, 5, 6)), torch.randn((1, 48, 5, 6))
        made = F.pixel_shuffle(head(h, output), 4)
        pixels = F.pad(F.silu(F.silu(F.pixel_shuffle(h, 4))), (1, 0))[..., :-1]
    torch.testing.assert_close(
        made, F.pixel_shuffle(output, 4) + torch.cat([pixels, 2 * pixels, 3 * pixels], 1)
    )


def test_behind_the_shuffle_every_pixel_has_the_same_weights() -> None:
    """What the head makes of a texture that does not know the lattice does not know it either, whatever its
    weights.
    """
    torch.manual_seed(1)
    head = PixelHead(in_channels=16, channels=1, factor=4)
    for parameter in (*head.inner.parameters(), *head.last.parameters()):
        nn.init.normal_(parameter)
    with torch.no_grad():
        head.features.weight.zero_()
        head.features.weight[range(16), range(16), 1, 1] = 1
        nn.init.zeros_(head.features.bias)  # type: ignore[arg-type]
        texture = torch.randn((1, 1, 1024, 1024))
        made = F.pixel_shuffle(head(F.pixel_unshuffle(texture, 4), torch.zeros(1, 48, 256, 256)), 4)
    assert float(unevenness(made / made.abs().max(), 4)) < 1e-3


@pytest.mark.slow
def test_a_traced_network_is_one_graph_with_the_same_result() -> None:
    """Keeping biases and masks between calls would break the graph at every attention."""
    torch.manual_seed(0)
    network, graphs = UNetSwin(small(8)).eval().requires_grad_(False), list[GraphModule]()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.05)  # new residual blocks add nothing

    def keep(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, backend=keep)
    with torch.inference_mode():
        expected = network(*inputs())
        result = compiled(*inputs())
    assert len(graphs) == 1
    assert float(expected.std()) > 0.01
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("channels", [-1, 8])
def test_a_head_needs_an_unshuffled_picture(channels: int) -> None:
    with pytest.raises(
        ValueError, match=r"pixel_head_channels must be 0, or positive with out_channels = 3 f\^2.*got"
    ):
        UNetConfig(pixel_head_channels=channels, out_channels=8 if channels > 0 else 48)
    with pytest.raises(
        ValueError, match=r"pixel_head_channels needs first_stage.kind=pixel_unshuffle, got 8 with vq"
    ):
        ModelConfig(unet=UNetConfig(pixel_head_channels=8), first_stage=FirstStageConfig())
