"""The chain by rows of tiles equals the chain on whole planes up to rounding; where its windows lie changes
no byte.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resshift.config import ModelConfig, Sampling
from resshift.images import Picture, from_tensor, scaled, to_tensor
from resshift.networks.autoencoder import VQAutoencoder
from resshift.networks.config import FirstStageConfig, UNetConfig, VQConfig
from resshift.networks.unet import UNetSwin
from resshift.presets import test_x4 as toy_preset
from resshift.resize.bicubic import RowResampler, upsample
from resshift.sampler import network_denoiser, trajectory
from resshift.schedule import Sampler
from resshift.tiles.batching import alone
from resshift.tiles.chain import row_chain, window_bytes
from resshift.tiles.colour_fix import WaveletFix
from resshift.tiles.noise import NoiseField
from resshift.tiles.plan import TilePlan, reflected
from resshift.tiles.window import Allocate, RowBuffer, in_file, in_memory
from resshift.training.step import build_network
from resshift.upscaler import Upscaler

Network = TypeVar("Network", bound=nn.Module)
SIZES = [(1, 1), (9, 40), (45, 23)]
CPU = torch.device("cpu")


def toy() -> Upscaler:
    return Upscaler(toy_preset().model, awake(build_network(toy_preset())), device="cpu")


def toy_vq() -> Upscaler:
    unet = UNetConfig(
        image_size=8,
        lq_size=8,
        model_channels=32,
        channel_mult=(1, 1),
        num_res_blocks=1,
        swin_embed_dim=32,
        swin_depth=2,
    )
    config = ModelConfig(
        unet=unet, first_stage=FirstStageConfig(vq=VQConfig(ch=32, num_res_blocks=1, n_embed=64))
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Upscaler(
            config, awake(UNetSwin(unet)), awake(VQAutoencoder(config.first_stage.vq)), device="cpu"
        )


def awake(network: Network) -> Network:
    """New residual blocks end in zeros, with which a picture would not depend on what lies beside it."""
    for i, parameter in enumerate(network.parameters()):
        if not parameter.any():
            with torch.no_grad():
                parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(i))
    return network


def picture(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def tensor_of(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 127.5 - 1


def blended(function: Callable[..., Tensor], planes: list[Tensor], plan: TilePlan, scale: int = 1) -> Tensor:
    """Every tile of whole planes in turn: the definition that the rows must equal."""
    out = torch.zeros(0)
    for (i_row, top), (i_column, left) in product(
        enumerate(plan.rows.starts), enumerate(plan.columns.starts)
    ):
        spans = [
            (slice(top * f, (top + plan.rows.tile) * f), slice(left * f, (left + plan.columns.tile) * f))
            for f in (1, scale)
        ]
        ratios = [plane.shape[2] // plan.rows.length for plane in planes]
        tiles = [
            plane[..., top * r : (top + plan.rows.tile) * r, left * r : (left + plan.columns.tile) * r]
            for plane, r in zip(planes, ratios, strict=True)
        ]
        result = function(*tiles)
        if not out.numel():
            out = torch.zeros(1, result.shape[1], plan.rows.length * scale, plan.columns.length * scale)
        weight = torch.outer(plan.rows.weights(i_row, scale), plan.columns.weights(i_column, scale)).float()
        out[(..., *spans[1])] += result * weight
    return out


@torch.inference_mode()
def on_whole_planes(
    up: Upscaler, lq: Tensor, plan: TilePlan, seed: int, sampler: Sampler = Sampler.POSTERIOR
) -> list[Tensor]:
    """Encode, sample and decode with every latent whole in memory: what each step predicts, not clamped."""
    size = lq.shape[-2:]
    lq = lq[..., reflected(size[0], plan.rows.length)[:, None], reflected(size[1], plan.columns.length)]
    networks = up.chain.networks()
    large = upsample(lq, 4)
    y0 = networks.encode(large) if networks.unshuffles else blended(networks.encode, [large], plan)
    noise = NoiseField(seed, "upscale", channels=y0.shape[1]).for_latent(y0.shape[2], y0.shape[3])

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        def tile(x_tile: Tensor, y_tile: Tensor, lq_tile: Tensor) -> Tensor:
            return network_denoiser(
                up.chain.unet,
                lq_tile,
                y_tile,
                up.chain.schedule,
                up.chain.config.target,
                latent=up.chain.config.latent_scaling,
            )(x_tile, t)

        return blended(tile, [x_t, y0, lq], plan)

    def decoded(latent: Tensor) -> Tensor:
        out = networks.decode(latent) if networks.unshuffles else blended(networks.decode, [latent], plan, 4)
        return out[..., : size[0] * 4, : size[1] * 4]

    steps = trajectory(denoise, y0, up.chain.schedule, noise, sampler)
    return [decoded(step.x0_pred) for step in steps]


@pytest.mark.slow
@pytest.mark.parametrize("make", [toy, toy_vq])
@pytest.mark.parametrize("size", SIZES)
def test_rows_of_tiles_equal_whole_planes(make: Callable[[], Upscaler], size: tuple[int, int]) -> None:
    up = make()
    lq, plan = tensor_of(picture(*size)), up.plan(*size, Sampling(tile_px=16))
    assert plan.num_tiles > 1 or max(size) <= 16
    out = up.upscale_tensor(lq, Sampling(seed=3, tile_px=16))
    # Elementwise results may differ in the last bit with the shape of the plane; a missing row or neighbour
    # would show as 0.01 and more.
    planes = on_whole_planes(up, lq, plan, 3)
    torch.testing.assert_close(out, planes[-1].clamp(-1, 1), atol=2e-5, rtol=0)
    # What the steps before predicted, as pictures: all with the colours of the input, and quantised.
    shown = up.trajectory(picture(*size), Sampling(seed=3, tile_px=16))
    assert len(shown) == len(planes) == up.config.steps
    for one, plane in zip(shown, planes, strict=True):
        fixed = WaveletFix(size[0], 4).push(plane[0], lq[0]).clamp(-1, 1)
        assert np.abs(one.astype(int) - from_tensor(fixed, np.uint8)).max() <= 1
    assert np.array_equal(shown[-1], up(picture(*size), seed=3, tile_px=16))


@pytest.mark.slow
@pytest.mark.parametrize("steps", [None, 2])
def test_rows_of_tiles_without_noise_after_the_first_step_equal_whole_planes(steps: int | None) -> None:
    up = toy()
    lq, sampling = tensor_of(picture(9, 40)), Sampling(seed=3, steps=steps, sampler="ddim", tile_px=16)
    plan = up.plan(9, 40, sampling)
    assert plan.num_tiles > 1
    out = up.upscale_tensor(lq, sampling)
    if steps is None:
        planes = on_whole_planes(up, lq, plan, 3, Sampler.DDIM)
        torch.testing.assert_close(out, planes[-1].clamp(-1, 1), atol=2e-5, rtol=0)
    assert not torch.equal(out, up.upscale_tensor(lq, replace(sampling, sampler=None)))
    assert not torch.equal(out, up.upscale_tensor(lq, replace(sampling, seed=4)))
    one = replace(sampling, steps=1)
    assert torch.equal(up.upscale_tensor(lq, one), up.upscale_tensor(lq, replace(one, sampler="posterior")))


def result_of(up: Upscaler, lq: Tensor, seed: int, allocate: Allocate) -> Tensor:
    """What the chain emits, without the extension of the picture: (3, 4 h, 4 w), not clamped."""
    height, width = lq.shape[-2:]
    bands: list[Tensor] = []
    with torch.inference_mode():
        alone(
            row_chain(
                up.chain.networks(),
                up.plan(height, width, Sampling(tile_px=16)),
                (height, width),
                read=lambda top, bottom: lq[0, :, top:bottom],
                noise=NoiseField(seed, "upscale", channels=up.chain.first_stage.channels).window,
                emit=lambda rows: bands.append(rows.clone()),
                allocate=allocate,
                batch=1,
            )
        )
    return torch.cat(bands, 1)[:, : 4 * height, : 4 * width]


@pytest.mark.slow
@pytest.mark.parametrize("make", [toy, toy_vq])
def test_windows_in_files_change_no_byte(make: Callable[[], Upscaler]) -> None:
    up, lq = make(), tensor_of(picture(45, 20))
    assert torch.equal(result_of(up, lq, 0, in_memory(CPU)), result_of(up, lq, 0, in_file))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outscale", "channels", "dtype"), [(None, 3, np.uint8), (2.5, 3, np.uint16), (8, 1, np.uint8)]
)
def test_a_picture_is_the_chain_with_the_colours_of_the_input_resized(
    outscale: float | None, channels: int, dtype: type
) -> None:
    """Row by row in one, at once in the other."""
    up, pixels = toy(), picture(34, 20, channels, dtype)
    lq, factor = to_tensor(pixels), outscale or 4
    fixed = WaveletFix(34, 4).push(result_of(up, lq, 2, in_memory(CPU)), lq[0]).clamp(-1, 1)
    fixed = fixed.mean(0, keepdim=True) if channels == 1 else fixed
    resized = RowResampler(136, 80, scaled(34, factor), scaled(20, factor)).push(fixed)
    result = up.upscale(Picture(pixels=pixels), Sampling(seed=2, outscale=outscale, tile_px=16))
    assert np.array_equal(result.pixels, from_tensor(resized, dtype))


def test_a_tall_picture_needs_no_more_windows() -> None:
    up = toy()
    networks = up.chain.networks()
    sizes = [window_bytes(networks, up.plan(height, 60, Sampling(tile_px=16))) for height in (400, 4000)]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("make", [toy, toy_vq])
@pytest.mark.parametrize("is_finished", [True, False])
def test_windows_go_when_a_run_ends_without_the_garbage_collector(
    make: Callable[[], Upscaler], is_finished: bool
) -> None:
    """In a cycle they would stay until the collector comes: gigabytes in a replica after ten pictures."""
    up, alive = make(), list[weakref.ref[Tensor]]()

    def allocate(shape: tuple[int, ...]) -> tuple[Tensor, None]:
        values = torch.zeros(shape)
        alive.append(weakref.ref(values))
        return values, None

    lq, noise = tensor_of(picture(20, 12))[0], NoiseField(0, channels=up.chain.first_stage.channels).window
    gc.disable()
    try:
        work = row_chain(
            up.chain.networks(),
            up.plan(20, 12, Sampling(tile_px=16)),
            (20, 12),
            read=lambda top, bottom: lq[:, top:bottom],
            noise=noise,
            emit=lambda _: None,
            allocate=allocate,
            batch=1,
        )
        if is_finished:
            alone(work)
        else:
            next(work)
            work.close()
        del work
        assert len(alive) > 4
        assert [one() for one in alive if one() is not None] == []
    finally:
        gc.enable()


def test_a_window_moves_down_and_starts_with_zeros() -> None:
    for allocate in (in_memory(CPU), in_file):
        window = RowBuffer(2, 100, 3, 8, allocate)
        plane = torch.arange(600.0).view(2, 100, 3)
        for top in range(0, 96, 4):
            window.discard(top - 4)
            window.extend(top + 4)
            assert not window.read(top, top + 4).any()
            window.write(top, 0, plane[:, top : top + 4])
            window.add(top, 2, torch.ones(2, 4, 1))
            expected = plane[:, max(0, top - 4) : top + 4, 1:3].clone()
            expected[..., 1] += 1
            assert torch.equal(window.read(max(0, top - 4), top + 4, 1, 3), expected)
        with pytest.raises(ValueError, match="not all within"):
            window.read(10, 12)
        with pytest.raises(ValueError, match="not all within"):
            window.write(99, 0, plane[:, :1])
        with pytest.raises(ValueError, match="do not fit"):
            window.extend(100)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to tell what is resident")
def test_of_a_window_in_a_file_no_more_is_resident_than_one_channel_of_a_rectangle() -> None:
    resident: list[int] = []

    def watched(shape: tuple[int, ...]) -> tuple[Tensor, Callable[[], None]]:
        values, release = in_file(shape)

        def release_watched() -> None:
            lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
            resident.append(
                sum(int(line[1]) for line in lines if line[0] in ("RssFile:", "RssShmem:")) // 1024
            )
            release()

        return values, release_watched

    window = RowBuffer(16, 256, 16_384, 256, watched)  # 256 MiB
    window.extend(256)
    before = resident[-1]
    window.write(0, 0, torch.ones(16, 256, 64))
    assert window.read(0, 256, 128, 192).sum() == 0
    window.add(0, 32, torch.ones(16, 256, 64))
    assert window.read(0, 256, 0, 96).sum() == 16 * 256 * 128
    # A page is mapped with its neighbours, 64 KiB: at most every row of a channel, 16 MiB.
    assert max(resident) - before <= 24


@pytest.mark.parametrize("columns", [3, 70_000])
def test_a_window_that_is_wide_moves_as_one_that_is_narrow(columns: int) -> None:
    window = RowBuffer(
        2, 64, columns, 24, in_memory(CPU)
    )  # 70,000 columns are moved 14 rows at a time, and move by fewer than they are
    plane = torch.arange(64.0)[None, :, None].expand(2, 64, columns)
    for top in range(0, 64, 4):
        window.discard(top - 18)
        window.extend(top + 4)
        window.write(top, 0, plane[:, top : top + 4])
        first = max(0, top - 18)
        assert torch.equal(window.read(first, top + 4), plane[:, first : top + 4])


@pytest.mark.slow
def test_tiles_of_another_model_do_not_share_windows() -> None:
    """Two pictures in turn through one object give what each gives alone."""
    up = toy()
    first, second = picture(40, 20), picture(20, 40)
    alone = toy()(second, tile_px=16)
    up(first, tile_px=16)
    assert np.array_equal(up(second, tile_px=16), alone)
    assert replace(up.config) == up.config
