"""Convolutions as matrix products: 1x1 convolutions as one product, 3x3 convolutions with a quarter of the
multiplications.

A 1x1 convolution is one matrix product. On CPUs PyTorch may use slower algorithms, some of which depend on
the number of threads.

3x3 convolutions use Winograd's F(4x4, 3x3) (Lavin and Gray, CVPR 2016):

    Y = A^T [ (G g G^T) * (B^T d B) ] A

computes a 4x4 patch of the result from a 6x6 patch d and a 3x3 kernel g. Over all channels the product in the
middle is 36 matrix products, and A and B are one matrix product each, so everything runs in PyTorch's BLAS
and needs no compiler. The map is processed in bands that stay in the cache. The group normalisation and the
SiLU before the convolution are applied to each band as it is read, so neither makes a map of its own.

Errors are about ten times those of the direct sum (6e-5 instead of 1e-5 for outputs of size 4): transforms
are computed in float64 and applied in float32.

Only modules that `prepare` was called on use it, in float32, on a CPU, without gradients. Elsewhere the
direct convolution of cuDNN or oneDNN, which is as fast or faster (with AMX or tensor cores), is used; so it
is in a graph that is being traced, which other tools have kernels for.

Shapes: B batch, C and K channels in and out, H W the map, n tiles of 4x4 in a band.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resshift.networks.normalisation import affine_of, norm_silu

# Interpolation at 0, 1, -1, 2, -2 and infinity.
_B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))

# Wider kernels are used on the coarsest maps, which have too few tiles to make up for weights that are four
# times as large. Below 128 to 64 channels, moving the patches takes the time that the products save.
_MAX_CHANNELS, _MIN_PRODUCT = 512, 128 * 64
# Number of values of one matrix of a band, and bounds of its number of tiles: 1 MiB in float32, and no matrix
# product of fewer than 64 rows.
_BAND_VALUES, _MIN_TILES, _MAX_TILES = 16_384, 64, 512


def pointwise(conv: nn.Module, x: Tensor) -> Tensor:
    """Apply a 1x1 convolution to (B, H, W, C) -> (B, H, W, K)."""
    assert isinstance(conv, nn.Conv2d)
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution on (B, C, H, W); a matrix product on a CPU without gradients."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W)."""
        if input.device.type == "cpu" and not torch.is_grad_enabled():
            return pointwise(self, input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return super().forward(input)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution with zero padding and stride 1. `prepare` gives it transformed weights, which are not
    part of its state.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.transformed: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K, H, W)."""
        if _usable(self, input):
            return _convolve(input, self, None, None)
        return super().forward(input)


def norm_silu_conv(
    norm: nn.GroupNorm,
    conv: Conv3x3,
    x: Tensor,
    modulation: tuple[Tensor, Tensor] | None = None,
    dropout: nn.Module | None = None,
) -> Tensor:
    """Return conv(silu(norm(x) * (1 + scale) + shift)), the half of every residual block.

    Args:
        norm: Normalisation over the channels of x.
        conv: Convolution after the activation.
        x: Feature map, (B, C, H, W).
        modulation: Scale and shift, (B, C, 1, 1) each; None is zero for both.
        dropout: Dropout before the convolution; it has no effect without gradients.
    """
    if _usable(conv, x):
        return _convolve(x, conv, norm, modulation)
    h = norm_silu(norm, x, modulation)
    return conv(h if dropout is None else dropout(h))


def prepare(module: nn.Module) -> int:
    """Transform the weights of every convolution that becomes faster, and return the size of the transformed
    weights in bytes. Call it again whenever weights change.
    """
    size_bytes = 0
    for conv in module.modules():
        if isinstance(conv, Conv3x3) and _gains(conv.in_channels, conv.out_channels):
            conv.transformed = _transformed(conv.weight)
            size_bytes += conv.transformed.nbytes
    return size_bytes


def _gains(in_channels: int, out_channels: int) -> bool:
    return max(in_channels, out_channels) <= _MAX_CHANNELS and in_channels * out_channels >= _MIN_PRODUCT


def _usable(conv: Conv3x3, x: Tensor) -> bool:
    return (
        conv.transformed is not None
        and x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


def _transformed(weight: Tensor) -> Tensor:
    """G g G^T of (K, C, 3, 3) -> (36, C, K) float32."""
    matrix = torch.tensor(_G, dtype=torch.float64)
    weight = weight.detach().double().cpu()
    return (
        torch.einsum("ai,kcij,bj->abck", matrix, weight, matrix)
        .reshape(36, weight.shape[1], weight.shape[0])
        .float()
        .contiguous()
    )


def _squared(matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """Return the transform of both axes of a patch as one matrix for the patch in row-major order."""
    one_axis = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one_axis, one_axis).float()


_PATCH_IN, _PATCH_OUT = _squared(_B), _squared(_A)


def _convolve(
    x: Tensor, conv: Conv3x3, norm: nn.GroupNorm | None, modulation: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Convolve picture by picture, so that no result depends on the other pictures of the batch."""
    out = torch.empty((x.shape[0], conv.out_channels, *x.shape[2:]), memory_format=torch.channels_last)
    for i, picture in enumerate(x.contiguous(memory_format=torch.channels_last)):
        rows = picture.permute(1, 2, 0)  # (H, W, C), contiguous
        affine = None
        if norm is not None:
            scale_shift = (
                None if modulation is None else (modulation[0][i].flatten(), modulation[1][i].flatten())
            )
            affine = affine_of(norm, rows, scale_shift)
        _convolve_rows(rows, conv, affine, out[i].permute(1, 2, 0))
    return out


def _convolve_rows(rows: Tensor, conv: Conv3x3, affine: tuple[Tensor, Tensor] | None, out: Tensor) -> None:
    """(H, W, C) -> `out` (H, W, K), band by band."""
    assert conv.transformed is not None
    height, width, channels = rows.shape
    across, down = -(-width // 4), -(-height // 4)
    tiles = min(max(_BAND_VALUES // max(channels, conv.out_channels), _MIN_TILES), _MAX_TILES)
    step = max(1, tiles // across)
    stride = (4 * across + 2) * channels
    for first in range(0, down, step):
        n = min(step, down - first)
        top, bottom = max(0, 4 * first - 1), min(height, 4 * (first + n) + 1)
        band = rows[top:bottom]
        if affine is not None:
            band = F.silu(torch.addcmul(affine[1], band, affine[0]), inplace=True)
        padded = rows.new_zeros((4 * n + 2, 4 * across + 2, channels))
        padded[top - 4 * first + 1 : bottom - 4 * first + 1, 1 : width + 1] = band
        patches = padded.as_strided(
            (6, 6, n, across, channels), (stride, channels, 4 * stride, 4 * channels, 1)
        ).reshape(36, -1)
        products = torch.bmm((_PATCH_IN @ patches).view(36, n * across, channels), conv.transformed)
        tiled = (
            (_PATCH_OUT @ products.view(36, -1)).view(4, 4, n, across, -1).permute(2, 0, 3, 1, 4)
        )  # (n, 4, across, 4, K)
        if conv.bias is not None:
            tiled = tiled + conv.bias
        end = min(height, 4 * (first + n))
        out[4 * first : end] = tiled.reshape(4 * n, 4 * across, -1)[: end - 4 * first, :width]
