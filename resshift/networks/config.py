"""Shapes of the networks, apart from the networks, so that describing a model does not import torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

MaskRule = Literal["released", "swin"]
Padding = Literal["zeros", "replicate"]
HALVING = 2  # side of a feature map at full size / side of one at half size
# Sides of tiles for networks whose reach is not known, in pixels: the smallest shows hardly more than its
# edges, and beyond the longest tiles save little work and cost memory.
_LEAST_TILE_PX, _LONGEST_TILE_PX, _LONGEST_DISCOURAGED_PX = 16, 256, 512


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class UNetConfig:
    """Shape of the U-Net. The defaults are realsr-x4.

    Fields:
        image_size: Side of the latent in training.
        in_channels, out_channels: Channels of the latent.
        model_channels, channel_mult: Channels of a level are `model_channels` times its factor, a multiple of
            32; a level has half the sides of the one before.
        num_res_blocks: Number of residual blocks of each level; one number for all.
        attention_resolutions: Sides of the feature maps, at the size `image_size`, that get a Swin layer.
        num_head_channels, swin_embed_dim, swin_depth: Channels of a head, channels and blocks of a Swin
            layer; swin_embed_dim is a multiple of 32 and of num_head_channels.
        window_size: Side of the windows of attention.
        mlp_ratio: Hidden channels of a Swin block over its channels.
        shift_mask: "released" for weights trained by the released code, "swin" for new training
            (`resshift.networks.swin.shifted_window_mask`).
        cond_lq, cond_mask: Whether the network sees the low-quality picture, and the mask of holes.
        lq_size: Side of the low-quality picture that belongs to a latent of side `image_size`, times a power
            of two; if it is larger, a strided extractor reduces the picture to the size of the latent.
        dropout: Share of activations that are left out in training, in [0, 1).
        pixel_head_channels: Channels of two convolutions at the size of the picture behind the output
            (`resshift.networks.unet.PixelHead`); 0 adds none. They need a latent that is an unshuffled
            picture, out_channels = 3 f^2.
    """

    image_size: int = 64
    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 160
    channel_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int | tuple[int, ...] = 2
    attention_resolutions: tuple[int, ...] = (64, 32, 16, 8)
    num_head_channels: int = 32
    swin_embed_dim: int = 192
    swin_depth: int = 2
    window_size: int = 8
    mlp_ratio: float = 4.0
    shift_mask: MaskRule = "released"
    cond_lq: bool = True
    cond_mask: bool = False
    lq_size: int = 64
    dropout: float = 0.0
    pixel_head_channels: int = 0

    def __post_init__(self) -> None:
        levels = len(self.channel_mult)
        if not levels:
            raise ValueError("model.channel_mult must name at least one level")
        if not isinstance(self.num_res_blocks, int) and len(self.num_res_blocks) != levels:
            raise ValueError(
                f"model.num_res_blocks must be one number or {levels} numbers, got {self.num_res_blocks}"
            )
        if any(self.model_channels * mult % 32 for mult in self.channel_mult) or self.swin_embed_dim % 32:
            raise ValueError(
                "model.model_channels x channel_mult and swin_embed_dim must be multiples of 32 "
                f"(GroupNorm has 32 groups), got {self.model_channels} x {self.channel_mult} and "
                f"{self.swin_embed_dim}"
            )
        if self.swin_embed_dim % self.num_head_channels:
            raise ValueError(
                f"model.swin_embed_dim ({self.swin_embed_dim}) must be a multiple of num_head_channels "
                f"({self.num_head_channels})"
            )
        if self.image_size % self.size_multiple and self.image_size >= self.size_multiple:
            raise ValueError(
                f"model.image_size must be a multiple of {self.size_multiple}, got {self.image_size}"
            )
        ratio = self.lq_size / self.image_size
        if ratio < 1 or not math.log2(ratio).is_integer():
            raise ValueError(
                f"model.lq_size must be image_size times a power of two ({self.image_size}, "
                f"{2 * self.image_size}, ...), got {self.lq_size}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must lie in [0, 1), got {self.dropout}")
        if self.pixel_head_channels and (
            self.pixel_head_channels < 0 or 3 * self.unshuffle_factor**2 != self.out_channels
        ):
            raise ValueError(
                "model.unet.pixel_head_channels must be 0, or positive with out_channels = 3 f^2 for an "
                f"integer f, got {self.pixel_head_channels} with {self.out_channels} out_channels"
            )
        if self.cond_mask and not self.cond_lq:
            raise ValueError(
                "model.cond_mask needs cond_lq: the mask is concatenated to the low-quality picture"
            )

    @property
    def res_blocks(self) -> tuple[int, ...]:
        """Number of residual blocks of each level."""
        return (
            (self.num_res_blocks,) * len(self.channel_mult)
            if isinstance(self.num_res_blocks, int)
            else self.num_res_blocks
        )

    @property
    def size_multiple(self) -> int:
        """Number that the sides of the latent must be multiples of, so that every level with attention can be
        cut into whole windows.
        """
        deepest = len(self.channel_mult) - 1
        multiple = 2**deepest
        for i_level in range(deepest + 1):
            side = self.image_size >> i_level
            if side in self.attention_resolutions or i_level == deepest:  # the middle always attends
                multiple = max(multiple, min(self.window_size, side) << i_level)
        return multiple

    @property
    def smallest_tile(self) -> int:
        """Side of the smallest tile, in positions of the latent."""
        return self.size_multiple

    @property
    def sees_y0(self) -> bool:
        """Whether y0 is a part of the condition."""
        return False

    @property
    def unshuffle_factor(self) -> int:
        """f, if the latent is a picture of three channels that was unshuffled by f."""
        return math.isqrt(self.out_channels // 3)

    @property
    def lq_ratio(self) -> int:
        """Side of the low-quality picture divided by the side of the latent."""
        return self.lq_size // self.image_size


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class VQConfig:
    """Shape of a VQ autoencoder. The defaults are VQ-f4 (55,322,782 parameters).

    Fields:
        ch, ch_mult: Channels of a level are `ch`, a multiple of 32, times its factor; a level has half the
            sides of the one before, so f = 2^(levels - 1).
        num_res_blocks: Number of residual blocks of each level; one number for all.
        z_channels, embed_dim: Channels of the latent before and after quantisation.
        n_embed: Number of codes.
    """

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int | tuple[int, ...] = 2
    z_channels: int = 3
    embed_dim: int = 3
    n_embed: int = 8192

    def __post_init__(self) -> None:
        if self.ch % 32:
            raise ValueError(
                f"first_stage.vq.ch must be a multiple of 32 (GroupNorm has 32 groups), got {self.ch}"
            )
        if not isinstance(self.num_res_blocks, int) and len(self.num_res_blocks) != len(self.ch_mult):
            raise ValueError(
                f"first_stage.vq.num_res_blocks must be one number or {len(self.ch_mult)}, got "
                f"{self.num_res_blocks}"
            )

    @property
    def res_blocks(self) -> tuple[int, ...]:
        """Number of residual blocks of each level."""
        return (
            (self.num_res_blocks,) * len(self.ch_mult)
            if isinstance(self.num_res_blocks, int)
            else self.num_res_blocks
        )


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class FirstStageConfig:
    """Choice of the first stage: a VQ autoencoder of shape `vq`, or pixel-unshuffle by `unshuffle_factor`.
    The other field is ignored.

    Fields:
        kind: Which of the two.
        unshuffle_factor: Pixels along a side of a position, at least 1.
    """

    kind: Literal["vq", "pixel_unshuffle"] = "vq"
    vq: VQConfig = VQConfig()
    unshuffle_factor: int = 4

    def __post_init__(self) -> None:
        if self.unshuffle_factor < 1:
            raise ValueError(f"first_stage.unshuffle_factor must be at least 1, got {self.unshuffle_factor}")

    @property
    def factor(self) -> int:
        """f: number of pixels along a side of one latent position."""
        return 2 ** (len(self.vq.ch_mult) - 1) if self.kind == "vq" else self.unshuffle_factor

    @property
    def channels(self) -> int:
        """Z: number of latent channels."""
        return self.vq.embed_dim if self.kind == "vq" else 3 * self.unshuffle_factor**2


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class RegressionConfig:
    """Shape of the network.

    Args:
        channels: number of channels at the size of the low-quality picture.
        half_channels: number of channels at half that size.
        blocks_before: number of residual blocks at full size before the branch at half size.
        half_blocks: number of residual blocks at half size.
        blocks_after: number of residual blocks at full size after the sum of both branches.
        scale: side of the output divided by the side of the input.
    """

    channels: int = 48
    half_channels: int = 96
    blocks_before: int = 2
    half_blocks: int = 3
    blocks_after: int = 6
    scale: int = 4

    def __post_init__(self) -> None:
        if min(self.channels, self.half_channels, self.scale) < 1:
            raise ValueError(
                f"channels {self.channels}, half_channels {self.half_channels}, scale {self.scale}: "
                "must be at least 1"
            )
        if min(self.blocks_before, self.half_blocks, self.blocks_after) < 0:
            raise ValueError("blocks_before, half_blocks and blocks_after must not be negative")

    @property
    def reach_px(self) -> int:
        """Distance in low-quality pixels beyond which an input pixel has no influence on an output pixel.

        Each 3x3 convolution adds one pixel of its map, halving adds the other pixel of a pair; bicubic
        interpolation alone needs two.
        """
        full = 2 + 2 * (self.blocks_before + self.blocks_after)
        return max(2, full + HALVING * 2 * self.half_blocks + HALVING - 1)

    @property
    def size_multiple(self) -> int:
        """Number that corners of tiles are multiples of, so that all tiles halve the picture on one grid."""
        return HALVING

    @property
    def wants_whole(self) -> bool:
        """Whether tiles change what the network makes of a picture: beyond its reach it sees nothing."""
        return False

    @property
    def smallest_tile_px(self) -> int:
        """Side of the smallest tile, in input pixels. Tiles share twice the reach with each neighbour, so all
        of this one is shared; smaller ones would compute little but context.
        """
        return 4 * self.reach_px // HALVING * HALVING

    @property
    def longest_tile_px(self) -> int:
        """Longest side of a tile unless told otherwise, in input pixels: an eighth is shared."""
        return 16 * self.reach_px // HALVING * HALVING

    @property
    def steps(self) -> int:
        """Number of steps that options may ask for: this network is called once."""
        return 1

    @property
    def macs_per_lq_px(self) -> float:
        """Number of multiplications per low-quality pixel in the convolutions, for even sides."""
        full = 2 * (self.blocks_before + self.blocks_after) * self.channels**2
        half = 2 * self.half_blocks * self.half_channels**2 / HALVING**2
        ends = 3 * self.channels + self.channels * 3 * self.scale**2
        between = 2 * self.channels * self.half_channels
        return 9 * (full + half + ends) + between


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class ConvUNetConfig:
    """Shape of the U-Net of convolutions (`resshift.networks.conv_unet`); the defaults are tiny-x4.

    Fields:
        in_channels, out_channels: Channels of the latent, 3 f^2.
        channels: Channels of each level; a level has half the sides of the one before.
        blocks_before: Number of residual blocks of each level on the way down.
        blocks_after: The same on the way up, for every level but the last.
        steps: Number of times that the network tells apart.
        lq_ratio: Side of the low-quality picture divided by the side of the latent: the scale of the latent
            divided by that of the model. The network sees the picture unshuffled to the size of the latent.
        cond_mask: Whether it sees the mask of holes beside the picture.
        padding: What convolutions see around a picture: zeros, or the nearest of its values ("replicate").
            The latter look like more of the same picture, so tiles agree.
        regression: Shape of the regression network g whose estimate the chain starts from, y0 =
            encode(g(lq)), instead of bicubic interpolation. Its weights are the tensors `regression.*` of the
            U-Net, and they are frozen. With more than one step the U-Net sees y0 beside x_t.
    """

    in_channels: int = 48
    out_channels: int = 48
    channels: tuple[int, ...] = (48, 112, 192)
    blocks_before: tuple[int, ...] = (3, 3, 3)
    blocks_after: tuple[int, ...] = (5, 3)
    steps: int = 1
    lq_ratio: int = 1
    cond_mask: bool = False
    padding: Padding = "zeros"
    regression: RegressionConfig | None = None

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if not levels or len(self.blocks_before) != levels or len(self.blocks_after) != levels - 1:
            raise ValueError(
                "model.unet needs blocks_before for each level and blocks_after for all but the last, got "
                f"channels {self.channels}, blocks_before {self.blocks_before} and blocks_after "
                f"{self.blocks_after}"
            )
        if min(*self.channels, self.steps, self.lq_ratio, self.in_channels, self.out_channels) < 1:
            raise ValueError("model.unet: channels, steps and lq_ratio must be at least 1")

    @property
    def size_multiple(self) -> int:
        """Number that the sides of the latent must be multiples of."""
        return HALVING ** (len(self.channels) - 1)

    @property
    def smallest_tile(self) -> int:
        """Side of the smallest tile, in positions of the latent: smaller ones show hardly more than edges."""
        return 8 * self.size_multiple

    @property
    def sees_y0(self) -> bool:
        """Whether y0 is a part of the condition; with one step x_T is y0, except for its noise."""
        return self.steps > 1

    @property
    def cond_channels(self) -> int:
        """Number of channels of the condition."""
        seen = (3 + self.cond_mask) * self.lq_ratio**2
        return seen + (self.in_channels if self.sees_y0 else 0)

    @property
    def macs_per_position(self) -> float:
        """Number of multiplications per position of the latent in the convolutions of the U-Net."""
        ends = 9 * self.channels[0] * (self.in_channels + self.cond_channels + self.out_channels)
        total = float(ends)
        for i, width in enumerate(self.channels):
            blocks = self.blocks_before[i] + (*self.blocks_after, 0)[i]
            total += 18 * blocks * width**2 / HALVING ** (2 * i)
        for i, (fine, coarse) in enumerate(zip(self.channels, self.channels[1:], strict=False)):
            total += 2 * fine * coarse / HALVING ** (2 * i)
        return total


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class ForeignConfig:
    """What must be known of a network that another package reads (`resshift.networks.foreign`).

    Args:
        architecture: Name of the architecture as spandrel has it, for example "ESRGAN".
        scale: side of the output divided by the side of the input; 1 for restoration.
        size_multiple: number that the sides of its input are multiples of, in pixels.
        smallest_px: smallest side of its input, in pixels; a multiple of `size_multiple`.
        tiling: "discouraged" where it uses statistics of the whole picture, so that tiles may differ visibly.
        supports_half: whether it computes in float16.
        supports_bfloat16: whether it computes in bfloat16.
    """

    architecture: str
    scale: int
    size_multiple: int = 1
    smallest_px: int = 0
    tiling: Literal["supported", "discouraged"] = "supported"
    supports_half: bool = False
    supports_bfloat16: bool = False

    def __post_init__(self) -> None:
        if min(self.scale, self.size_multiple) < 1 or self.smallest_px < 0:
            raise ValueError(
                f"scale {self.scale} and size_multiple {self.size_multiple} must be at least 1 and "
                f"smallest_px {self.smallest_px} not negative"
            )

    @property
    def smallest_tile_px(self) -> int:
        """Side of the smallest tile that the network can compute, in input pixels."""
        multiple = self.size_multiple
        return -(-max(self.smallest_px, _LEAST_TILE_PX) // multiple) * multiple

    @property
    def longest_tile_px(self) -> int:
        """Longest side of a tile unless told otherwise, in input pixels."""
        longest = _LONGEST_TILE_PX if self.tiling == "supported" else _LONGEST_DISCOURAGED_PX
        return max(self.smallest_tile_px, longest // self.size_multiple * self.size_multiple)

    @property
    def reach_px(self) -> int | None:
        """Distance beyond which an input pixel has no influence; not known of networks of others."""
        return None

    @property
    def wants_whole(self) -> bool:
        """Whether the network uses statistics of the whole picture, so that tiles may differ visibly."""
        return self.tiling == "discouraged"

    @property
    def precisions(self) -> tuple[str, ...]:
        """Precisions in which the network computes."""
        supported = {"bfloat16": self.supports_bfloat16, "float16": self.supports_half}
        return ("float32", *(name for name, does in supported.items() if does))

    @property
    def steps(self) -> int:
        """Number of steps that options may ask for: this network is called once."""
        return 1
