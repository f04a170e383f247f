"""Shapes of the networks, apart from the networks, so that describing a model does not import torch."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

MaskRule = Literal["released", "swin"]


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class UNetConfig:
    """Shape of the U-Net. The defaults are realsr-x4.

    `attention_resolutions` are the sides of the feature maps, at the training size `image_size`, that get a
    Swin layer. `lq_size` is the side of the low-quality picture that belongs to a latent of side
    `image_size`; if it is larger, a small strided extractor reduces the picture to the size of the latent.
    `shift_mask` is "released" for weights trained by the released code and "swin" for new training
    (`resshift.networks.swin.shifted_window_mask`). `pixel_head_channels` adds two convolutions at the size of
    the picture after the output (`resshift.networks.unet.PixelHead`); 0 adds none. They need a latent that is
    an unshuffled picture, out_channels = 3 f^2.
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
    def unshuffle_factor(self) -> int:
        """f, if the latent is a picture of three channels that was unshuffled by f."""
        return math.isqrt(self.out_channels // 3)

    @property
    def lq_ratio(self) -> int:
        """Side of the low-quality picture divided by the side of the latent."""
        return self.lq_size // self.image_size


@dataclass(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid"))
class VQConfig:
    """Shape of a VQ autoencoder. The defaults are VQ-f4 (55,322,782 parameters)."""

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
