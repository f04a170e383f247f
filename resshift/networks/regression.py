"""Regression network: a small network that estimates the high-quality picture, trained for PSNR.

It is blind: one set of weights for bicubic, mild and heavy degradation. Most layers work at the size of the
low-quality picture. A branch at half that size has twice the channels: a 3x3 convolution there costs as many
multiplications, has four times the parameters and sees twice as far, which noise and JPEG blocks need. The
output is bicubic interpolation plus a correction, computed at the size of the input and brought to the size
of the output by pixel shuffle.

There is no normalisation and no statistic of the whole picture. An output pixel depends only on the input
within `RegressionConfig.reach_px`, so tiles that overlap by twice as much give the same result as the whole
picture.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from resshift.networks.config import HALVING, Padding, RegressionConfig


class ResidualBlock(nn.Module):
    """x + conv(SiLU(conv(x))), 3x3.

    Args:
        channels: Channels of x.
        padding: What the convolutions see around x: "zeros" or "replicate".
    """

    def __init__(self, channels: int, padding: Padding = "zeros") -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, padding_mode=padding)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, padding_mode=padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same."""
        return x + self.second(F.silu(self.first(x)))


def keep_variance(network: nn.Module) -> None:
    """Initialise convolutions so that each keeps the variance of its input. A residual block starts near the
    identity, and a last layer that is called `head` at zero.
    """
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            gain = {"head": 0.0, "second": 0.2}.get(name.rpartition(".")[2], 1.0)
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=gain * fan_in**-0.5)
            nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]  # it has one


class RegressionNet(nn.Module):
    """Regression network. Its last layer starts at zero, so an untrained network is bicubic interpolation."""

    def __init__(self, config: RegressionConfig) -> None:
        super().__init__()
        self.config = config
        width, half_width = config.channels, config.half_channels
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.before = nn.Sequential(*(ResidualBlock(width) for _ in range(config.blocks_before)))
        self.shrink = nn.Conv2d(width, half_width, HALVING, stride=HALVING)
        self.coarse = nn.Sequential(*(ResidualBlock(half_width) for _ in range(config.half_blocks)))
        self.enlarge = nn.Conv2d(half_width, width * HALVING**2, 1)
        self.after = nn.Sequential(*(ResidualBlock(width) for _ in range(config.blocks_after)))
        self.head = nn.Conv2d(width, 3 * config.scale**2, 3, padding=1)
        keep_variance(self)

    def forward(self, lq: Tensor) -> Tensor:
        """Return the enlarged picture.

        Args:
            lq: (B, 3, h, w) in [-1, 1], of any size; an odd side is extended by its last row or column.

        Returns:
            (B, 3, scale h, scale w), nominally in [-1, 1], not clamped.
        """
        height, width = lq.shape[-2:]
        even = F.pad(lq, (0, width % HALVING, 0, height % HALVING), mode="replicate")
        fine = self.before(self.stem(even))
        coarse = self.coarse(self.shrink(fine))
        features = self.after(fine + F.pixel_shuffle(self.enlarge(coarse), HALVING))
        scale = self.config.scale
        detail = F.pixel_shuffle(self.head(features), scale)[..., : scale * height, : scale * width]
        return F.interpolate(lq, scale_factor=scale, mode="bicubic") + detail
