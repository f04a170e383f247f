"""Shifted-window attention on convolutional feature maps (Liu et al., "Swin Transformer", ICCV 2021), as
ResShift's U-Net uses it.

Differences from the Swin of classification: GroupNorm over the map instead of LayerNorm over channels, 1x1
convolutions instead of linear layers outside the attention, and no residual around the whole layer
(`BasicLayer` replaces the feature map).

Shapes: B batch, C channels, H W the map, n windows in a picture, N = window^2 tokens in a window (row-major),
k heads.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from resshift.networks.config import MaskRule
from resshift.networks.convolution import pointwise
from resshift.networks.normalisation import GroupNorm32


@lru_cache(maxsize=64)
def shifted_window_mask(
    height: int,
    width: int,
    window: int,
    shift: int,
    rule: MaskRule = "released",
    device: torch.device | None = None,
) -> Tensor:
    """Return the additive mask of attention on a cyclically shifted map: 0, or -100 between tokens that must
    not attend to each other.

        swin      separates, on both axes, tokens that the shift brought together from opposite borders, as in
                  the Swin paper.
        released  is the mask of the released ResShift code, which cuts a channels-first map with
                  channels-last slices: only the windows of the last row get a mask, which separates their
                  right part from their left part. Weights trained with this mask need it.

    Args:
        height: Height of the map, a multiple of `window`.
        width: Width of the map, a multiple of `window`.
        window: Side of a window.
        shift: Number of positions by which the map was rolled, in (0, window).
        rule: One of the two masks above.
        device: Device of the mask. Masks are cached by size and device, because building one takes longer
            than the attention.

    Returns:
        (n, N, N) float32. All callers share it, so it must not be written to.
    """
    if rule == "swin":
        row_region = _region_of_each_position(height, window, shift)
        column_region = _region_of_each_position(width, window, shift)
        region = 3 * row_region[:, None] + column_region[None, :]
    else:
        in_last_row = torch.arange(height, device="cpu") >= height - window
        in_right_part = torch.arange(width, device="cpu") % window >= window - shift
        region = (in_last_row[:, None] & in_right_part[None, :]).long()
    tokens = rearrange(region, "(a h) (b w) -> (a b) (h w)", h=window, w=window)
    return torch.where(tokens[:, None, :] != tokens[:, :, None], -100.0, 0.0).to(device)


def _region_of_each_position(length: int, window: int, shift: int) -> Tensor:
    position = torch.arange(length, device="cpu")  # even inside `torch.device("meta")`: masks are cached
    return (position >= length - window).long() + (position >= length - shift).long()


def relative_position_index(window: int) -> Tensor:
    """Return the row of the table of biases for each pair of tokens of a window, (N, N) int64: 2 window - 1
    times the difference of their rows plus that of their columns, both counted from 1 - window.
    """
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = row.flatten(), column.flatten()
    return (rows[:, None] - rows + window - 1) * (2 * window - 1) + columns[:, None] - columns + window - 1


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows, with a learned bias for each relative position.

    Args:
        dim: Number of channels C.
        window: Side of a window.
        num_heads: Number of heads k, which must divide C.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, window: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self._kept: tuple[tuple[object, ...], Tensor | None, Tensor] | None = None
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, num_heads))
        self.register_buffer("relative_position_index", relative_position_index(window))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def position_bias(self) -> Tensor:
        """Return the bias of every pair of tokens, (k, N, N)."""
        return rearrange(self.relative_position_bias_table[self.relative_position_index], "i j k -> k i j")

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attend inside each window.

        Args:
            x: Feature map, (B, H, W, C); H and W are multiples of the window.
            mask: Additive mask, (n, N, N), or None.

        Returns:
            (B, H, W, C).
        """
        # Fused kernels take four axes. Without a mask all windows share one bias and become part of the
        # batch; with a mask each window has its own bias, and windows become part of the heads. Projections
        # act on positions, so windows and heads are cut at the same time.
        height, width = x.shape[1] // self.window, x.shape[2] // self.window
        sizes = {"k": self.num_heads, "h": self.window, "w": self.window, "a": height, "e": width}
        axes = "(b a e) k (h w) d" if mask is None else "b (a e k) (h w) d"
        q, k, v = rearrange(self.qkv(x), f"b (a h) (e w) (three k d) -> three {axes}", three=3, **sizes)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(mask, q.dtype))
        return self.proj(rearrange(attended, f"{axes} -> b (a h) (e w) (k d)", **sizes))

    def _bias(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return position bias plus mask, (1, k, N, N) or (1, n k, N, N). Without gradients it is kept for
        the next call with the same arguments, but not by a graph that is being traced, which it would break,
        and not in training: fused optimisers change the table without counting its version.
        """
        table = self.relative_position_bias_table
        traced = torch.compiler.is_compiling()
        if self.training and not traced:
            self._kept = None
        keeps = not (self.training or torch.is_grad_enabled() or traced or table.is_inference())
        # An inference tensor has no version counter.
        key = (dtype, table.device, table.data_ptr(), table._version) if keeps else None
        if key is not None and self._kept is not None and self._kept[0] == key and self._kept[1] is mask:
            return self._kept[2]
        bias = self.position_bias().to(dtype)[None]
        if mask is not None:
            bias = rearrange(bias + mask[:, None].to(dtype), "n k i j -> 1 (n k) i j")
        if key is not None:
            self._kept = (key, mask, bias)
        return bias


class SwinBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on windows rolled by `shift`.

    Args:
        dim: Number of channels C.
        num_heads: Number of heads of the attention.
        window: Side of a window.
        shift: Number of positions by which windows are rolled: 0, or half a window.
        mlp_ratio: Hidden channels of the MLP divided by C.
        mask_size: Side of the map whose mask is kept as a buffer, as in released checkpoints; masks of other
            sizes are cached.
        mask_rule: Rule of `shifted_window_mask`.
        dropout: Dropout probability inside the MLP.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        window: int,
        shift: int,
        mlp_ratio: float,
        mask_size: int,
        mask_rule: MaskRule = "released",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.window = window
        self.shift = shift
        self.mask_rule: MaskRule = mask_rule
        self.norm1 = GroupNorm32(32, dim)
        self.attn = WindowAttention(dim, window, num_heads)
        self.norm2 = GroupNorm32(32, dim)
        self.mlp = _Mlp(dim, int(dim * mlp_ratio), dropout)
        if shift:
            self.register_buffer(
                "attn_mask", shifted_window_mask(mask_size, mask_size, window, shift, mask_rule).clone()
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> the same shape; H and W are multiples of the window."""
        h = _normalised(self.norm1, x)
        mask = None
        if self.shift:
            h = torch.roll(h, (-self.shift, -self.shift), dims=(1, 2))
            # In a graph that is being traced the sizes may be symbols, which no cache can hold.
            of_size = (
                shifted_window_mask.__wrapped__ if torch.compiler.is_compiling() else shifted_window_mask
            )
            mask = of_size(x.shape[1], x.shape[2], self.window, self.shift, self.mask_rule, x.device)
        h = self.attn(h, mask)
        x = x + (torch.roll(h, (self.shift, self.shift), dims=(1, 2)) if self.shift else h)
        return x + self.mlp(_normalised(self.norm2, x))


def _normalised(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Apply a GroupNorm to (B, H, W, C)."""
    return norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class _Mlp(nn.Module):
    """Two 1x1 convolutions with a GELU between them on (B, H, W, C), named as in released checkpoints."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1)
        self.fc2 = nn.Conv2d(hidden, dim, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.dropout(F.gelu(pointwise(self.fc1, x)))
        return self.dropout(pointwise(self.fc2, h))


class _ChannelProjection(nn.Module):
    """A 1x1 convolution on (B, H, W, C), named as in released checkpoints."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return pointwise(self.proj, x)


class BasicLayer(nn.Module):
    """Project to `embed_dim`, run `depth` Swin blocks (every second one shifted), project back. There is no
    residual around the layer.

    Args:
        channels: Number of channels C of the feature map.
        embed_dim: Number of channels inside the blocks.
        num_heads: Number of heads of the attention.
        depth: Number of blocks.
        window: Side of a window.
        map_size: Side of the map at the training resolution. If it is not larger than the window, the window
            is the whole map and nothing is shifted; this is fixed at construction and holds for every input
            size, as in released weights.
        mlp_ratio: Hidden channels of the MLPs divided by `embed_dim`.
        mask_rule: Rule of `shifted_window_mask`.
        dropout: Dropout probability inside the MLPs.
    """

    def __init__(
        self,
        *,
        channels: int,
        embed_dim: int,
        num_heads: int,
        depth: int,
        window: int,
        map_size: int,
        mlp_ratio: float = 4.0,
        mask_rule: MaskRule = "released",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        shift = window // 2 if map_size > window else 0
        self.window = min(window, map_size)
        self.patch_embed = _ChannelProjection(channels, embed_dim)
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim=embed_dim,
                num_heads=num_heads,
                window=self.window,
                shift=shift if i % 2 else 0,
                mlp_ratio=mlp_ratio,
                mask_size=map_size,
                mask_rule=mask_rule,
                dropout=dropout,
            )
            for i in range(depth)
        )
        self.patch_unembed = _ChannelProjection(embed_dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape.

        Raises:
            ValueError: H or W is not a multiple of the window.
        """
        if x.shape[-2] % self.window or x.shape[-1] % self.window:
            raise ValueError(
                f"a {x.shape[-2]}x{x.shape[-1]} map cannot be cut into {self.window}x{self.window} windows"
            )
        x = self.patch_embed(x.permute(0, 2, 3, 1))
        for block in self.blocks:
            x = block(x)
        return self.patch_unembed(x).permute(0, 3, 1, 2)
