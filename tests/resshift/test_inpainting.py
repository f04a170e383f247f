"""Holes: what is known comes back, what a hole hides is not looked at, tiles see their part of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from resshift.config import Sampling
from resshift.images import ImageError, Picture
from resshift.images.masks import with_mask
from resshift.networks.autoencoder import PixelUnshuffle
from resshift.networks.holes import fill_holes
from resshift.presets import tiny_x4_swin
from resshift.sampler import network_denoiser, sample
from resshift.tiles.batching import Batcher
from resshift.tiles.noise import NoiseField
from resshift.training.step import build_network
from resshift.upscaler import Upscaler
from tests.holes import box, conv_hole_config, hole_config, hole_model


@pytest.fixture(scope="module", params=[hole_config, conv_hole_config], ids=["swin", "convolutions"])
def model(request: pytest.FixtureRequest) -> Upscaler:
    return hole_model(request.param())


def noise_picture(height: int, width: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    return rng.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


@pytest.mark.parametrize(
    ("size", "channels", "dtype", "tile_px"),
    [
        ((40, 52), 3, np.uint8, None),
        ((70, 45), 3, np.uint8, 32),
        ((33, 9), 1, np.uint8, None),
        ((40, 52), 3, np.uint16, 32),
        ((9, 5), 4, np.uint8, None),
    ],
)
def test_known_pixels_come_back_and_the_hole_is_filled(
    model: Upscaler, size: tuple[int, int], channels: int, dtype: type, tile_px: int | None
) -> None:
    source, hole = noise_picture(*size, channels, dtype), box(*size)
    if channels == 4:
        source[..., 3] = 255 - source[..., 3] % 2  # hardly transparent
    result = model(source, mask=hole, steps=2, tile_px=tile_px)
    assert result.dtype == dtype
    assert result.shape == source.shape
    assert np.array_equal(result[~hole], source[~hole])
    assert (result[hole] != source[hole]).mean() > 0.9 * min(channels, 3) / channels


def test_every_level_survives_the_way_there_and_back(model: Upscaler) -> None:
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256, 1)
    hole = np.zeros((256, 256), np.bool_)
    hole[0, 0] = True
    assert np.array_equal(model(levels, mask=hole, steps=1)[~hole], levels[~hole])


@pytest.mark.parametrize("tile_px", [None, 32])
def test_colours_in_the_hole_change_nothing(model: Upscaler, tile_px: int | None) -> None:
    source, hole = noise_picture(50, 44, 4), box(50, 44)
    other = source.copy()
    other[hole] = noise_picture(50, 44, 4)[::-1][hole]
    results = [model(pixels, mask=hole, steps=2, tile_px=tile_px).tobytes() for pixels in (source, other)]
    assert results[0] == results[1]


def test_a_hole_may_be_given_as_a_picture_or_as_transparency(model: Upscaler) -> None:
    source, hole = noise_picture(24, 20), box(24, 20)
    expected = model(source, mask=hole)
    image = Image.fromarray(source)
    masks = [Image.fromarray(hole), Image.fromarray(np.uint8(255) * hole)]
    masks.append(Image.fromarray(np.dstack([source, np.uint8(255) * ~hole])))
    for mask in masks:
        assert np.array_equal(np.asarray(model(image, mask=mask)), expected)
    erased = np.dstack([source, np.uint8(255) * ~hole])
    result = model(Image.fromarray(erased))
    assert result.mode == "RGB"
    assert np.array_equal(np.asarray(result), expected)


@torch.no_grad()
@pytest.mark.parametrize("sampler", [None, "ddim"])
def test_a_picture_of_one_tile_is_the_chain_with_the_mask(model: Upscaler, sampler: str | None) -> None:
    """The sampler of the paper on whole planes, whose network agrees with the released one."""
    networks = model.chain.networks(sampler=sampler)
    config = networks.config
    lq = torch.rand((1, 3, 32, 64), generator=torch.Generator().manual_seed(0)) * 2 - 1
    mask = torch.where(torch.from_numpy(box(32, 64)), 1.0, -1.0)[None, None]
    asked = lq = torch.where(mask > 0, -1.0, lq)
    lq = fill_holes(lq, mask) if config.hole == "surroundings" else lq
    y0 = PixelUnshuffle(4).encode(lq)
    noise = NoiseField(5, "upscale", channels=48).for_latent(8, 16)
    network = networks.unet
    denoise = network_denoiser(network, lq, y0, networks.schedule, config.target, mask, config.latent_scaling)
    expected = PixelUnshuffle(4).decode(sample(denoise, y0, networks.schedule, noise, networks.sampler))
    found = model.upscale_tensor(asked, Sampling(seed=5, sampler=sampler), mask=mask)
    torch.testing.assert_close(found, expected.clamp(-1, 1), atol=2e-5, rtol=0)
    without = model.upscale_tensor(asked, Sampling(seed=5, sampler=sampler), mask=-torch.ones_like(mask))
    assert (without - found).abs().max() > 1e-3


class Residual(torch.nn.Module):
    """Answers "a quarter of the mask", pixel by pixel."""

    def forward(self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor) -> Tensor:
        return PixelUnshuffle(4).encode(mask.expand(-1, 3, -1, -1)) / 4


@pytest.mark.parametrize("size", [(5, 3), (45, 23), (90, 70)])
@pytest.mark.parametrize("tile_px", [None, 32])
def test_every_tile_sees_its_part_of_the_mask(size: tuple[int, int], tile_px: int | None) -> None:
    draw = torch.Generator().manual_seed(0)
    lq, mask = (torch.rand((1, n, *size), generator=draw) * 2 - 1 for n in (3, 1))
    up = Upscaler(hole_config(), Residual(), device="cpu")
    assert tile_px is None or size < (45, 23) or up.plan(*size, Sampling(tile_px=tile_px)).num_tiles > 1
    found = up.upscale_tensor(lq, Sampling(tile_px=tile_px), mask=mask)
    torch.testing.assert_close(found, (lq - mask / 4).clamp(-1, 1), atol=1e-5, rtol=0)


def test_pictures_that_share_calls_fill_their_own_holes(
    model: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Upscaler, "shares_calls", property(lambda self: True))
    pictures = list(_masked(2))
    alone = [model.upscale(picture, Sampling(steps=2)).pixels.tobytes() for picture in pictures]
    batcher = Batcher()
    futures = [batcher.submit(model.upscaling(picture, Sampling(steps=2))) for picture in pictures]
    while batcher.turn():
        pass
    assert [future.result().value.pixels.tobytes() for future in futures] == alone


def _masked(number: int) -> Iterator[Picture]:
    for i in range(number):
        mask = Picture(pixels=(np.uint8(255) * np.roll(box(24, 28), 5 * i, axis=0))[..., None])
        yield with_mask(Picture(pixels=noise_picture(24, 28)[:: 1 - 2 * i]), mask)


def test_a_result_of_another_size_shows_the_known_pixels_resized(model: Upscaler) -> None:
    pixels, hole = np.full((40, 40, 3), 90, np.uint8), np.zeros((40, 40), np.bool_)
    hole[4:12, 4:12] = True
    result = model(pixels, mask=hole, outscale=2)
    assert result.shape == (80, 80, 3)
    assert (result[32:] == 90).all()
    assert (result[12:20, 12:20] != 90).any()


def test_what_cannot_be_is_one_line(model: Upscaler) -> None:
    source = noise_picture(20, 20)
    with pytest.raises(ImageError, match="this model fills holes: the picture needs a mask"):
        model(source)
    with pytest.raises(ImageError, match="the mask is 10x20, and must be 20x20"):
        model(source, mask=box(20, 10))
    plain = Upscaler(tiny_x4_swin().model, build_network(tiny_x4_swin()), device="cpu")
    with pytest.raises(ValueError, match="custom fills no holes: a mask must not be given"):
        plain(source, mask=box(20, 20))
    lq = torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match=r"mask must be \(1, 1, 8, 8\), got None"):
        model.upscale_tensor(lq)
    with pytest.raises(ValueError, match=r"mask must be None, got \(1, 1, 8, 8\)"):
        plain.upscale_tensor(lq, mask=lq[:, :1])
    with pytest.raises(ValueError, match=r"mask must be \(20, 20\) bool, got \(20, 10\) bool"):
        replace(Picture(pixels=source), mask=box(20, 10))
