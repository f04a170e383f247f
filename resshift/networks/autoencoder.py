"""First stages: they turn a picture in [-1, 1] into the latent that the chain runs on, and back.

`VQAutoencoder` is the VQGAN of latent diffusion (Esser et al., CVPR 2021; Rombach et al., CVPR 2022), f4 and
f8 as released: `encode` gives the continuous latent *before* quantisation, `decode` quantises first.
`PixelUnshuffle` rearranges pixels and has no parameters: the same chain without an autoencoder. A first stage
owns the scale of its latent; no caller multiplies by one.

Shapes: B batch, H W picture, Z latent channels, f the factor, h = H / f and w = W / f.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from resshift.networks.config import FirstStageConfig, VQConfig
from resshift.networks.convolution import Conv3x3, norm_silu_conv
from resshift.networks.normalisation import GroupNorm32, norm_silu


class FirstStage(Protocol):
    """The interface of a first stage."""

    factor: int
    channels: int

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> latent (B, Z, h, w)."""
        ...

    def decode(self, z: Tensor) -> Tensor:
        """Latent (B, Z, h, w) -> (B, 3, H, W), about [-1, 1] and not clamped."""
        ...


class PixelUnshuffle(nn.Module):
    """Space to depth: each f x f patch becomes 3 f^2 channels. Exactly invertible, no parameters."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.channels = 3 * factor**2

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 3 f^2, h, w), channel order (c, dy, dx)."""
        return F.pixel_unshuffle(x, self.factor)

    def decode(self, z: Tensor) -> Tensor:
        """The inverse of `encode`."""
        return F.pixel_shuffle(z, self.factor)


class _ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.conv2 = Conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = norm_silu_conv(self.norm1, self.conv1, x)
        h = norm_silu_conv(self.norm2, self.conv2, h)
        shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return shortcut + h if torch.is_grad_enabled() else h.add_(shortcut)


class _Attention(nn.Module):
    """Single-head attention over all positions of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(layer(h), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class _Downsample(nn.Module):
    """Halve the sides. The zero padding is on the right and the bottom only: released weights need it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class _Level(nn.Module):
    """Residual blocks of one resolution; the layer that changes it is attached under its released name."""

    downsample: _Downsample | None
    upsample: _Upsample | None

    def __init__(self, in_channels: int, out_channels: int, num_blocks: int) -> None:
        super().__init__()
        # True: the backward pass computes the activations of each block again instead of keeping them.
        self.checkpoint_activations = False
        self.downsample = self.upsample = None
        self.block = nn.ModuleList(
            _ResnetBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(num_blocks)
        )

    def forward(self, x: Tensor) -> Tensor:
        recompute = self.checkpoint_activations and torch.is_grad_enabled()
        for block in self.block:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return x


class _Middle(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.block_1 = _ResnetBlock(channels, channels)
        self.attn_1 = _Attention(channels)
        self.block_2 = _ResnetBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Encoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.ch
        for i_level, (width, num_blocks) in enumerate(zip(widths, config.res_blocks, strict=True)):
            level = _Level(channels, width, num_blocks)
            channels = width
            if i_level < len(widths) - 1:
                level.downsample = _Downsample(channels)
            self.down.append(level)
        self.mid = _Middle(channels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if isinstance(level, _Level) and level.downsample is not None:
                h = level.downsample(h)
        return self.conv_out(norm_silu(self.norm_out, self.mid(h)))


class _Decoder(nn.Module):
    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = [config.ch * mult for mult in config.ch_mult]
        channels = widths[-1]
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = _Middle(channels)
        levels: list[_Level] = []
        for i_level in range(len(widths) - 1, -1, -1):
            level = _Level(channels, widths[i_level], config.res_blocks[i_level] + 1)
            channels = widths[i_level]
            if i_level:
                level.upsample = _Upsample(channels)
            levels.insert(0, level)  # stored from fine to coarse, as released; run from coarse to fine
        self.up = nn.ModuleList(levels)
        self.norm_out = _norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if isinstance(level, _Level) and level.upsample is not None:
                h = level.upsample(h)
        return self.conv_out(norm_silu(self.norm_out, h))


class VectorQuantizer(nn.Module):
    """Replace each latent vector by its nearest code, `argmin_j |z - e_j|^2`."""

    # Number of latent vectors at a time: 8192 vectors and 8192 codes make a table of 256 MiB, whatever the
    # size of the picture.
    chunk = 8192

    def __init__(self, n_embed: int, embed_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_embed, embed_dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    def nearest(self, z: Tensor) -> Tensor:
        """Return the indices of the nearest codes, (B, embed_dim, h, w) -> int64 (B, h, w). Distances are
        float32.
        """
        codes = self.embedding.weight.float()
        flat = rearrange(z, "b c h w -> (b h w) c").float()
        with torch.autocast(z.device.type, enabled=False):
            # |z|^2 is the same for every code, so it is left out. A traced graph holds no loop whose length
            # depends on the size of the picture.
            parts = (flat,) if torch.compiler.is_compiling() else flat.split(self.chunk)
            nearest = [(codes.square().sum(1) - 2 * part @ codes.T).argmin(1) for part in parts]
        return torch.cat(nearest).reshape(z.shape[0], *z.shape[2:])

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise.

        Args:
            z: Latent, (B, embed_dim, h, w).

        Returns:
            z_q, of the shape of z, whose gradient passes straight through to z; and the indices, int64
            (B, h, w).
        """
        indices = self.nearest(z.detach())
        z_q = rearrange(self.embedding(indices), "b h w c -> b c h w").to(z.dtype)
        return z + (z_q - z).detach(), indices


class VQAutoencoder(nn.Module):
    """VQGAN with the released keys: 205 for f4, 285 for the f8 face model."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.factor = 2 ** (len(config.ch_mult) - 1)
        self.channels = config.embed_dim
        self.encoder = _Encoder(config)
        self.decoder = _Decoder(config)
        self.quantize = VectorQuantizer(config.n_embed, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        """Return the latent before quantisation.

        Args:
            x: Picture in [-1, 1], (B, 3, H, W); H and W are multiples of f.

        Returns:
            (B, embed_dim, h, w).

        Raises:
            ValueError: H or W is not a multiple of f.
        """
        if x.shape[-2] % self.factor or x.shape[-1] % self.factor:
            raise ValueError(
                f"sides must be multiples of {self.factor}, got a {x.shape[-2]}x{x.shape[-1]} picture"
            )
        return self.quant_conv(self.encoder(x))

    def checkpoint_decoder(self) -> None:
        """Let the backward pass through `decode` compute activations again instead of keeping them: at the
        size of the picture they are most of what a step with LPIPS holds.
        """
        for level in self.decoder.up:
            cast(_Level, level).checkpoint_activations = True

    def decode(self, z: Tensor, quantize: bool = True) -> Tensor:
        """Return the picture of a latent.

        Args:
            z: Latent, (B, embed_dim, h, w).
            quantize: Whether to replace z by its nearest codes first, as the decoder was trained.

        Returns:
            (B, 3, H, W), about [-1, 1], not clamped.
        """
        if quantize:
            z, _ = self.quantize(z)
        return self.decoder(self.post_quant_conv(z))


def build_first_stage(config: FirstStageConfig) -> VQAutoencoder | PixelUnshuffle:
    """Return the first stage that `config` names, with fresh weights."""
    return VQAutoencoder(config.vq) if config.kind == "vq" else PixelUnshuffle(config.unshuffle_factor)


def _norm(channels: int) -> GroupNorm32:
    return GroupNorm32(32, channels, eps=1e-6)  # 1e-5 in the U-Net: both as released
