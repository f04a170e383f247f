"""A plain loop, the baseline of the fast one: eager float32, nothing cached, nothing fused, one tile after
the other.

It is a straightforward first version: group norm, activation and convolution as three passes, attention as
two matrix products and a softmax, masks built at every call, a nearest-code search over one table, tiles of
one fixed side (128 px) that overlap by an eighth and are blended at every step, all planes in memory.
Weights, noise and mathematics are those of the fast loop. Convolutions are stored channels-last, as in
training, so that the comparison does not profit from a slow layout.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import product
from unittest import mock

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from resshift.networks import swin
from resshift.networks.autoencoder import VectorQuantizer
from resshift.networks.convolution import Conv3x3
from resshift.resize.bicubic import upsample
from resshift.sampler import network_denoiser, sample
from resshift.tiles.chain import Networks
from resshift.tiles.noise import NoiseField
from resshift.tiles.plan import AxisTiles, TilePlan, reflected


def fixed_axis(length: int, tile: int, multiple: int) -> AxisTiles:
    """Return evenly spaced tiles of one side length; a short axis is one tile."""
    overlap = tile // 8
    if length <= tile:
        extended = -(-length // multiple) * multiple
        return AxisTiles(extended, extended, (0,))
    count = -(-(length - overlap) // (tile - overlap))
    return AxisTiles(length, tile, tuple(round(i * (length - tile) / (count - 1)) for i in range(count)))


def fixed_plan(height: int, width: int, tile: int, multiple: int) -> TilePlan:
    """Return the tiles of the plain loop."""
    return TilePlan(fixed_axis(height, tile, multiple), fixed_axis(width, tile, multiple))


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1) @ v


def _nearest(self: VectorQuantizer, z: Tensor) -> Tensor:
    codes, flat = self.embedding.weight, rearrange(z, "b c h w -> (b h w) c")
    table = flat.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * flat @ codes.T
    return table.argmin(1).reshape(z.shape[0], *z.shape[2:])


def make_plain(*networks: object) -> None:
    """Convert networks to the plain form: no transformed weights."""
    for network in networks:
        if isinstance(network, nn.Module):
            for module in network.modules():
                if isinstance(module, Conv3x3):
                    module.transformed = None


@contextmanager
def plain_layers() -> Generator[None]:
    """Run the layers in their plain form, without caches between calls."""
    with (
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        mock.patch.object(VectorQuantizer, "nearest", _nearest),
        mock.patch.object(swin, "shifted_window_mask", swin.shifted_window_mask.__wrapped__),
    ):
        yield


def blend(function: Callable[..., Tensor], planes: list[Tensor], plan: TilePlan, scale: int = 1) -> Tensor:
    """Call the function on every tile of the planes and blend the results at `scale` pixels per position."""
    out: Tensor | None = None
    for (i_row, top), (i_column, left) in product(
        enumerate(plan.rows.starts), enumerate(plan.columns.starts)
    ):
        tiles: list[Tensor] = []
        for plane in planes:
            ratio = plane.shape[2] // plan.rows.length
            rows, columns = (
                slice(at * ratio, (at + side) * ratio)
                for at, side in ((top, plan.rows.tile), (left, plan.columns.tile))
            )
            tiles.append(plane[..., rows, columns].contiguous())
        result = function(*tiles)
        if out is None:
            out = result.new_zeros(1, result.shape[1], plan.rows.length * scale, plan.columns.length * scale)
        weight = torch.outer(plan.rows.weights(i_row, scale), plan.columns.weights(i_column, scale)).to(
            result
        )
        out[
            ..., top * scale : top * scale + result.shape[2], left * scale : left * scale + result.shape[3]
        ] += result * weight
    assert out is not None
    return out


@torch.inference_mode()
def upscale(networks: Networks, lq: Tensor, plan: TilePlan, seed: int) -> Tensor:
    """Upscale (1, 3, h, w) in [-1, 1] to (1, 3, h scale, w scale), clamped, with networks in plain form."""
    config = networks.config
    ratio, size, factor = config.unet.lq_ratio, lq.shape[-2:], networks.first_stage.factor
    lq = lq[
        ...,
        reflected(size[0], plan.rows.length * ratio)[:, None],
        reflected(size[1], plan.columns.length * ratio),
    ]
    with plain_layers():
        large = upsample(lq, config.scale)
        y0 = networks.encode(large) if networks.unshuffles else blend(networks.encode, [large], plan)
        noise = NoiseField(seed, "upscale", channels=y0.shape[1]).for_latent(
            y0.shape[2], y0.shape[3], lq.device
        )

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            def tile(x_tile: Tensor, y_tile: Tensor, lq_tile: Tensor) -> Tensor:
                one = network_denoiser(
                    networks.unet,
                    lq_tile,
                    y_tile,
                    networks.schedule,
                    config.target,
                    latent=config.latent_scaling,
                )
                return one(x_tile, t)

            return blend(tile, [x_t, y0, lq], plan)

        latent = sample(denoise, y0, networks.schedule, noise)
        out = (
            networks.decode(latent) if networks.unshuffles else blend(networks.decode, [latent], plan, factor)
        )
    return out[..., : size[0] * config.scale, : size[1] * config.scale].clamp(-1, 1)
