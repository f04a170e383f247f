"""U-Net of convolutions for chains whose latent is an unshuffled picture.

Levels work at the size of the latent, at half of it, and so on; there is neither normalisation nor attention.
So an output depends only on its neighbourhood, whatever the rest of the picture holds, and tiles that overlap
agree. Statistics of a whole picture, as group normalisation takes them, differ from tile to tile.

With `ConvUNetConfig.regression` the chain starts from y0 = encode(g(lq)), the estimate of a regression
network, instead of bicubic interpolation (as in UPSR, CVPR 2025), and the U-Net adds what g cannot know. g is
the part `regression` of the network, frozen.

The last layer starts at zero. With `Target.RESIDUAL` an untrained network therefore predicts x0 = y0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resshift.networks.config import HALVING, ConvUNetConfig, Padding, UNetConfig
from resshift.networks.regression import RegressionNet, ResidualBlock, keep_variance
from resshift.networks.unet import UNetSwin


def _blocks(channels: int, number: int, padding: Padding) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(channels, padding) for _ in range(number)))


class ConvUNet(nn.Module):
    """U-Net of convolutions, see the module."""

    def __init__(self, config: ConvUNetConfig) -> None:
        super().__init__()
        self.config = config
        # True: the backward pass computes the activations of each level again instead of keeping them.
        self.checkpoint_activations = False
        widths, outer, padding = config.channels, config.channels[:-1], config.padding
        seen = config.in_channels + config.cond_channels
        self.stem = nn.Conv2d(seen, widths[0], 3, padding=1, padding_mode=padding)
        self.times = nn.Embedding(config.steps, widths[0]) if config.steps > 1 else None
        self.before = nn.ModuleList(
            _blocks(width, number, padding)
            for width, number in zip(widths, config.blocks_before, strict=True)
        )
        self.shrink = nn.ModuleList(
            nn.Conv2d(fine, coarse, HALVING, stride=HALVING)
            for fine, coarse in zip(outer, widths[1:], strict=True)
        )
        self.enlarge = nn.ModuleList(
            nn.Conv2d(coarse, fine * HALVING**2, 1) for fine, coarse in zip(outer, widths[1:], strict=True)
        )
        self.after = nn.ModuleList(
            _blocks(width, number, padding) for width, number in zip(outer, config.blocks_after, strict=True)
        )
        self.head = nn.Conv2d(widths[0], config.out_channels, 3, padding=1, padding_mode=padding)
        keep_variance(self)
        self.regression = None if config.regression is None else RegressionNet(config.regression)
        if self.regression is not None:
            self.regression.requires_grad_(False)
        if self.times is not None:
            nn.init.zeros_(self.times.weight)

    def forward(self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the target of the chain.

        Args:
            x: Scaled x_t, (B, in_channels, h, w); sides are multiples of `config.size_multiple`.
            t: Step indices in [0, steps), int64 (B,).
            lq: The low-quality picture in [-1, 1], (B, 3, r h, r w) with r = `config.lq_ratio`; if
                `config.sees_y0` with y0 after it, (B, 3 + in_channels, h, w).
            mask: 1 in a hole and -1 where the picture is kept, (B, 1, r h, r w); required if
                `config.cond_mask`.

        Returns:
            (B, out_channels, h, w).
        """
        if (mask is not None) != self.config.cond_mask:
            raise ValueError(f"this network {'needs a' if mask is None else 'takes no'} mask")
        seen = lq if mask is None else torch.cat((lq, mask), dim=1)
        features = self.stem(torch.cat((x, F.pixel_unshuffle(seen, self.config.lq_ratio)), dim=1))
        if self.times is not None:
            features = features + self.times(t)[:, :, None, None]
        skips: list[Tensor] = []
        for blocks, shrink in zip(self.before, self.shrink, strict=False):
            skips.append(self._run(blocks, features))
            features = shrink(skips[-1])
        features = self._run(self.before[-1], features)
        for enlarge, blocks in zip(reversed(self.enlarge), reversed(self.after), strict=True):
            features = self._run(blocks, skips.pop() + F.pixel_shuffle(enlarge(features), HALVING))
        return self.head(features)

    def _run(self, blocks: nn.Module, x: Tensor) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(blocks, x, use_reentrant=False)
        return blocks(x)


def from_one_step(network: ConvUNet, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights of a U-Net of one step as those of a chain that sees y0, else `weights` as they are.

    The first network has y0 where the second has x_t. So its filters of y0 are moved, those of x_t begin at
    zero, as do the times: until it is trained the chain predicts at every step what the first one predicts.
    """
    stem, config = weights.get("stem.weight"), network.config
    if stem is None or not config.sees_y0 or stem.shape[1] + config.in_channels != network.stem.in_channels:
        return weights
    of_y0, of_lq = stem.split((config.in_channels, stem.shape[1] - config.in_channels), dim=1)
    times = {} if network.times is None else {"times.weight": torch.zeros_like(network.times.weight)}
    return {**weights, **times, "stem.weight": torch.cat((torch.zeros_like(of_y0), of_lq, of_y0), dim=1)}


def build_unet(config: UNetConfig | ConvUNetConfig) -> UNetSwin | ConvUNet:
    """Return the U-Net of a model, with its initial weights."""
    return ConvUNet(config) if isinstance(config, ConvUNetConfig) else UNetSwin(config)
