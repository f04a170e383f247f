"""The U-Net with Swin layers that predicts x0 from the scaled x_t, the step and the low-quality picture.

Keys of `state_dict()` are those of the released checkpoints, so weights need no conversion in either
direction (118,593,583 parameters for realsr-x4). Groups of blocks are numbered as they are there:
`input_blocks.0` is the first convolution, followed for each level by its residual blocks and a downsampling;
`output_blocks` mirror them with skip connections.

Shapes: B batch, Z latent channels, h w the latent, h_lq w_lq the low-quality picture (the size of the latent
for x4 with a first stage of f = 4).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resshift.networks.config import UNetConfig
from resshift.networks.convolution import Conv1x1, Conv3x3, norm_silu_conv
from resshift.networks.normalisation import GroupNorm32, norm_silu
from resshift.networks.swin import BasicLayer


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Return [cos(t f_k) | sin(t f_k)], f_k = 10000^(-k / (dim // 2)); an odd dim is padded with a zero.

    Args:
        t: Step indices, (B,).
        dim: Number of values of the embedding.

    Returns:
        (B, dim) float32.
    """
    half = dim // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angle = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angle.cos(), angle.sin()], dim=1), (0, dim % 2))


class ResBlock(nn.Module):
    """Two normalised 3x3 convolutions with a residual; the step's embedding scales and shifts the second
    normalisation.
    """

    def __init__(self, in_channels: int, out_channels: int, embed_channels: int, dropout: float) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            GroupNorm32(32, in_channels), nn.SiLU(), Conv3x3(in_channels, out_channels)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed_channels, 2 * out_channels))
        last = Conv3x3(out_channels, out_channels)
        for parameter in last.parameters():
            nn.init.zeros_(parameter)  # a new block starts as the identity, or as its 1x1 skip connection
        self.out_layers = nn.Sequential(GroupNorm32(32, out_channels), nn.SiLU(), nn.Dropout(dropout), last)
        self.skip_connection = (
            nn.Identity() if in_channels == out_channels else Conv1x1(in_channels, out_channels)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """(B, C_in, h, w), (B, E) -> (B, C_out, h, w)."""
        norm_in, conv_in = cast(GroupNorm32, self.in_layers[0]), cast(Conv3x3, self.in_layers[2])
        norm_out, conv_out = cast(GroupNorm32, self.out_layers[0]), cast(Conv3x3, self.out_layers[3])
        h = norm_silu_conv(norm_in, conv_in, x)
        scale, shift = self.emb_layers(embedding).to(h.dtype)[:, :, None, None].chunk(2, dim=1)
        h = norm_silu_conv(norm_out, conv_out, h, (scale, shift), dropout=self.out_layers[2])
        return self.skip_connection(x) + h if torch.is_grad_enabled() else h.add_(self.skip_connection(x))


class Downsample(nn.Module):
    """Halve the sides by a strided 3x3 convolution with symmetric padding."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double the sides by nearest neighbour and a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class TimestepEmbedSequential(nn.Sequential):
    """Layers that run in turn; residual blocks also receive the embedding of the step."""

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, embedding) if isinstance(layer, ResBlock) else layer(x)
        return x


class PixelHead(nn.Module):
    """Convolutions at the size of the picture, which add detail that crosses the borders of positions.

        output + unshuffle(conv(silu(conv(silu(shuffle(conv(h)))))))

    The shuffle is that of ESPCN (Shi et al., CVPR 2016). Convolutions after it use the same weights for all
    f x f pixels of a position and see across its borders; without them every pixel of a position is computed
    by weights of its own. The last convolution starts at zero.

    Args:
        in_channels: Number of channels of h, the activations before the network's last convolution.
        channels: Number of channels at the size of the picture.
        factor: Pixels along a side of one latent position, f.
    """

    def __init__(self, in_channels: int, channels: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.features = Conv3x3(in_channels, channels * factor**2)
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)
        self.last = nn.Conv2d(channels, 3, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, h: Tensor, output: Tensor) -> Tensor:
        """(B, C, h, w), (B, 3 f^2, h, w) -> (B, 3 f^2, h, w)."""
        pixels = F.silu(F.pixel_shuffle(self.features(h), self.factor))  # (B, channels, f h, f w)
        return output + F.pixel_unshuffle(self.last(F.silu(self.inner(pixels))), self.factor)


class UNetSwin(nn.Module):
    """Predict x0 (or another target) from the scaled x_t, the step, the low-quality picture and, for
    inpainting, a mask.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        # True: the backward pass computes the activations of each group of layers again instead of keeping
        # them.
        self.checkpoint_activations = False
        base = config.model_channels
        embed_channels = 4 * base
        self.time_embed = nn.Sequential(
            nn.Linear(base, embed_channels), nn.SiLU(), nn.Linear(embed_channels, embed_channels)
        )

        cond_channels = (3 + config.cond_mask) if config.cond_lq else 0
        if config.lq_ratio > 1 and config.cond_lq:
            self.feature_extractor, cond_channels = _feature_extractor(cond_channels, config.lq_ratio)
        else:
            self.feature_extractor = nn.Identity()

        def swin_layer(channels: int, side: int) -> BasicLayer:
            return BasicLayer(
                channels=channels,
                embed_dim=config.swin_embed_dim,
                num_heads=config.swin_embed_dim // config.num_head_channels,
                depth=config.swin_depth,
                window=config.window_size,
                map_size=side,
                mlp_ratio=config.mlp_ratio,
                mask_rule=config.shift_mask,
                dropout=config.dropout,
            )

        channels = base * config.channel_mult[0]
        side = config.image_size
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(config.in_channels + cond_channels, channels, 3, padding=1))]
        )
        skip_channels = [channels]
        last_level = len(config.channel_mult) - 1
        for i_level, (mult, num_blocks) in enumerate(
            zip(config.channel_mult, config.res_blocks, strict=True)
        ):
            for i_block in range(num_blocks):
                layers: list[nn.Module] = [ResBlock(channels, base * mult, embed_channels, config.dropout)]
                channels = base * mult
                if side in config.attention_resolutions and i_block == 0:
                    layers.append(swin_layer(channels, side))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skip_channels.append(channels)
            if i_level < last_level:
                self.input_blocks.append(TimestepEmbedSequential(Downsample(channels, channels)))
                skip_channels.append(channels)
                side //= 2

        self.middle_block = TimestepEmbedSequential(
            ResBlock(channels, channels, embed_channels, config.dropout),
            swin_layer(channels, side),
            ResBlock(channels, channels, embed_channels, config.dropout),
        )

        self.output_blocks = nn.ModuleList()
        for i_level in range(last_level, -1, -1):
            out_channels = base * config.channel_mult[i_level]
            for i_block in range(config.res_blocks[i_level] + 1):
                layers = [
                    ResBlock(channels + skip_channels.pop(), out_channels, embed_channels, config.dropout)
                ]
                channels = out_channels
                if side in config.attention_resolutions and i_block == 0:
                    layers.append(swin_layer(channels, side))
                if i_level and i_block == config.res_blocks[i_level]:
                    layers.append(Upsample(channels))
                    side *= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            GroupNorm32(32, channels), nn.SiLU(), nn.Conv2d(channels, config.out_channels, 3, padding=1)
        )
        self.pixel_head = (
            PixelHead(channels, config.pixel_head_channels, config.unshuffle_factor)
            if config.pixel_head_channels
            else None
        )

    def forward(self, x: Tensor, t: Tensor, lq: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Predict the target.

        Args:
            x: Scaled noisy latent, (B, Z, h, w); h and w are multiples of `config.size_multiple`.
            t: Step indices in [0, T), (B,).
            lq: low-quality picture in [-1, 1], (B, 3, h_lq, w_lq) with h_lq = h * config.lq_ratio; required
                if `cond_lq`.
            mask: 1 in a hole and -1 where the picture is kept, (B, 1, h_lq, w_lq); required if `cond_mask`.

        Returns:
            (B, out_channels, h, w).

        Raises:
            ValueError: A condition is missing, unexpected, or of the wrong shape.
        """
        embedding = self.time_embed(timestep_embedding(t, self.config.model_channels))  # (B, E)
        condition = self._condition(x, lq, mask)
        h = x if condition is None else torch.cat([x, self.feature_extractor(condition.to(x.dtype))], dim=1)
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            h = self._run(stage, h, embedding)
            skips.append(h)
        h = self._run(self.middle_block, h, embedding)
        for stage in self.output_blocks:
            h = self._run(stage, torch.cat([h, skips.pop()], dim=1), embedding)
        norm, _, conv = self.out
        h = norm_silu(cast(GroupNorm32, norm), h)
        return conv(h) if self.pixel_head is None else self.pixel_head(h, conv(h))

    def _run(self, stage: nn.Module, x: Tensor, embedding: Tensor) -> Tensor:
        if self.checkpoint_activations and torch.is_grad_enabled():
            return checkpoint(stage, x, embedding, use_reentrant=False)
        return stage(x, embedding)

    def _condition(self, x: Tensor, lq: Tensor | None, mask: Tensor | None) -> Tensor | None:
        config = self.config
        if (
            x.ndim != 4
            or x.shape[1] != config.in_channels
            or x.shape[2] % config.size_multiple
            or x.shape[3] % config.size_multiple
        ):
            raise ValueError(
                f"x must be (B, {config.in_channels}, h, w) with h and w multiples of "
                f"{config.size_multiple}, got {tuple(x.shape)}"
            )
        for name, value, needed, channels in (
            ("lq", lq, config.cond_lq, 3),
            ("mask", mask, config.cond_mask, 1),
        ):
            if (value is not None) != needed:
                raise ValueError(
                    f"this network {'needs' if needed else 'takes no'} {name}, got "
                    f"{'nothing' if value is None else 'one'}"
                )
            expected = (x.shape[0], channels, x.shape[2] * config.lq_ratio, x.shape[3] * config.lq_ratio)
            if value is not None and tuple(value.shape) != expected:
                raise ValueError(
                    f"{name} must have shape {expected} for x of shape {tuple(x.shape)}, got "
                    f"{tuple(value.shape)}"
                )
        if lq is None:
            return None
        return lq if mask is None else torch.cat([lq, mask], dim=1)


def _feature_extractor(in_channels: int, ratio: int) -> tuple[nn.Sequential, int]:
    """Return strided convolutions of 16, 32, 64, ... channels that reduce the condition by `ratio`, and their
    number of output channels.
    """
    layers: list[nn.Module] = []
    width = 16
    for _ in range(int(math.log2(ratio))):
        layers += [nn.Conv2d(in_channels, width, 3, padding=1), nn.SiLU(), Downsample(width, 2 * width)]
        in_channels = width = 2 * width
    return nn.Sequential(*layers), width
