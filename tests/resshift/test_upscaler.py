"""Picture in, picture out, with networks whose answer is known."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from resshift import weights
from resshift.config import ModelConfig, Sampling
from resshift.images import Picture, scaled
from resshift.models import PIXELS, WeightsError
from resshift.networks.autoencoder import VectorQuantizer, VQAutoencoder
from resshift.networks.config import ConvUNetConfig, FirstStageConfig, UNetConfig, VQConfig
from resshift.networks.conv_unet import build_unet
from resshift.presets import test_x4 as toy_preset
from resshift.presets import tiny_x4_swin
from resshift.resize.bicubic import upsample
from resshift.sampler import network_denoiser, sample
from resshift.tiles.noise import NoiseField
from resshift.training.step import build_network
from resshift.upscaler import Upscaler

Load = Callable[[str], dict[str, np.ndarray]]
Fill = Callable[[nn.Module], nn.Module]
Settle = Callable[[VectorQuantizer, np.ndarray], None]
BIGGEST = np.iinfo(np.uint16).max


class ZeroResidual(nn.Module):
    """Answers "the residual is zero": the result must be the bicubic upsampling, whatever the noise."""

    def forward(self, x: Tensor, t: Tensor, lq: Tensor, mask: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


@pytest.fixture
def bicubic() -> Upscaler:
    return Upscaler(tiny_x4_swin().model, ZeroResidual(), device="cpu")


@pytest.fixture(scope="module")
def toy() -> Upscaler:
    return Upscaler(toy_preset().model, build_network(toy_preset()), device="cpu")


def rgb(height: int, width: int, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(height * 1000 + width).integers(
        0, np.iinfo(dtype).max, (height, width, 3), dtype, endpoint=True
    )


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 31), (64, 64), (65, 130), (140, 50)])
@pytest.mark.parametrize("tile_px", [None, 32])
def test_zero_residual_is_bicubic_for_any_size(
    size: tuple[int, int], tile_px: int | None, bicubic: Upscaler
) -> None:
    lq = torch.from_numpy(rgb(*size)).permute(2, 0, 1)[None].float() / 127.5 - 1
    out = bicubic.upscale_tensor(lq, Sampling(tile_px=tile_px))
    assert out.shape == (1, 3, size[0] * 4, size[1] * 4)
    expected = upsample(lq, 4).clamp(-1, 1)
    # The last two columns and rows see the reflection instead of a repeated edge: padding is part of the
    # method.
    inside = (..., slice(0, -8), slice(0, -8))
    torch.testing.assert_close(out[inside], expected[inside], atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_arrays_keep_their_kind(dtype: type, channels: int, bicubic: Upscaler) -> None:
    shape = (9, 7) if channels == 0 else (9, 7, channels)
    out = bicubic(np.full(shape, 77 if dtype is np.uint8 else 20_000, dtype))
    assert out.dtype == dtype
    assert out.shape == (36, 28, *shape[2:])
    assert set(np.unique(out)) == {
        77 if dtype is np.uint8 else 20_000
    }  # a flat picture stays flat, alpha too


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "P", "1", "I;16"])
def test_pil_images_come_back_as_pil_images(mode: str, bicubic: Upscaler) -> None:
    image = (
        Image.new(mode, (6, 5), 1 if mode in ("1", "P") else None)
        if mode != "I;16"
        else Image.new("I;16", (6, 5), 900)
    )
    out = bicubic(image)
    assert isinstance(out, Image.Image)
    assert out.size == (24, 20)
    assert ("A" in out.getbands()) == ("A" in mode)


def test_16_bit_is_not_reduced_to_8(bicubic: Upscaler) -> None:
    image = np.full((16, 16, 3), 12_345, np.uint16)
    assert np.all(bicubic(image) == 12_345)


def test_a_cascade_is_the_model_over_its_own_result(bicubic: Upscaler) -> None:
    """x10 of an x4 model: x2.5 first, then all of x4."""
    picture = Picture(pixels=rgb(10, 6))
    told: list[float] = []
    found = bicubic.upscale(picture, Sampling(outscale=10, cascade=True), told.append)
    first = bicubic.upscale(picture, Sampling(outscale=2.5))
    assert np.array_equal(found.pixels, bicubic.upscale(first).pixels)
    assert found.notes == ("x10 is 2 passes of the model's x4",)
    assert told == sorted(told)
    assert told[-1] == pytest.approx(1)
    plain = bicubic.upscale(picture, Sampling(outscale=10)).pixels
    assert plain.shape == found.pixels.shape
    assert not np.array_equal(plain, found.pixels)
    for outscale in (1.5, 4):  # within the model's scale there is one pass
        results = [bicubic.upscale(picture, Sampling(outscale=outscale, cascade=one)) for one in (True, None)]
        assert np.array_equal(results[0].pixels, results[1].pixels)


def test_passes_of_a_cascade_have_noise_of_their_own_and_the_size_is_met(toy: Upscaler) -> None:
    source = rgb(7, 5)
    results = [toy(source, seed=seed, outscale=4.7, cascade=True) for seed in (0, 0, 1)]
    assert results[0].shape == (scaled(7, 4.7), scaled(5, 4.7), 3)
    assert results[0].tobytes() == results[1].tobytes() != results[2].tobytes()
    first = toy.upscale(Picture(pixels=source), Sampling(outscale=4.7 / 4))
    assert not np.array_equal(toy.upscale(first, Sampling(outscale=4)).pixels, results[0][:32, :24])


def x2_models() -> list[ModelConfig]:
    """Unshuffled pixels by two with a Swin U-Net, the same with convolutions, and latents of a quarter of the
    size, whose condition is twice as large as they are: the construction of realsr-x2-s4.
    """
    base = toy_preset().model
    by_two = FirstStageConfig(kind="pixel_unshuffle", unshuffle_factor=2)
    swin = replace(base.unet, in_channels=12, out_channels=12)
    convolutions = ConvUNetConfig(
        in_channels=12, out_channels=12, channels=(8, 8), blocks_before=(1, 1), blocks_after=(1,), steps=4
    )
    large = replace(base.unet, lq_size=16)
    return [
        replace(base, scale=2, first_stage=by_two, unet=swin),
        replace(base, scale=2, first_stage=by_two, unet=convolutions),
        replace(base, scale=2, unet=large),
    ]


@pytest.mark.parametrize("config", x2_models(), ids=["swin", "convolutions", "large-condition"])
@pytest.mark.parametrize("tile_px", [None, 32])
def test_zero_residual_of_an_x2_model_is_bicubic(config: ModelConfig, tile_px: int | None) -> None:
    lq = torch.rand((1, 3, 45, 70), generator=torch.Generator().manual_seed(0)) * 2 - 1
    up = Upscaler(config, ZeroResidual(), device="cpu")
    found = up.upscale_tensor(lq, Sampling(tile_px=tile_px))
    whole = upsample(lq, 2).clamp(-1, 1)
    # Beyond the picture there is its reflection, which bicubic interpolation alone does not see.
    torch.testing.assert_close(found[..., :84, :134], whole[..., :84, :134], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("config", x2_models(), ids=["swin", "convolutions", "large-condition"])
def test_an_x2_picture_of_one_tile_is_the_chain(config: ModelConfig) -> None:
    torch.manual_seed(0)
    network = build_unet(config.unet)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    up = Upscaler(config, network, device="cpu")
    lq = torch.rand((1, 3, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    networks = up.chain.networks()
    y0 = networks.encode(upsample(lq, 2))
    noise = NoiseField(3, "upscale", channels=y0.shape[1]).for_latent(y0.shape[2], y0.shape[3])
    denoise = network_denoiser(
        network,
        lq,
        y0,
        networks.schedule,
        config.target,
        latent=config.latent_scaling,
        sees_y0=config.unet.sees_y0,
    )
    expected = networks.decode(sample(denoise, y0, networks.schedule, noise))
    torch.testing.assert_close(
        up.upscale_tensor(lq, Sampling(seed=3)), expected.clamp(-1, 1), atol=2e-5, rtol=0
    )
    result = up(rgb(9, 7), outscale=4, cascade=True)
    assert result.shape == (36, 28, 3)


@pytest.mark.parametrize(
    ("outscale", "size"), [(2.5, (25, 18)), (1, (10, 7)), (4, (40, 28)), (6, (60, 42)), (0.01, (1, 1))]
)
def test_outscale_sets_the_size(outscale: float, size: tuple[int, int], bicubic: Upscaler) -> None:
    assert bicubic(rgb(10, 7), outscale=outscale).shape[:2] == size


def test_seed_decides_the_pixels(toy: Upscaler) -> None:
    image = rgb(20, 12)
    assert np.array_equal(toy(image, seed=3), toy(image, seed=3))
    assert not np.array_equal(toy(image, seed=3), toy(image, seed=4))


def test_steps_shorten_the_chain(toy: Upscaler) -> None:
    image = rgb(20, 24)
    seen: list[int] = []
    hook = toy.chain.unet.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1][0])))
    try:
        results = {steps: toy(image, steps=steps) for steps in (None, 4, 2, 1)}
    finally:
        hook.remove()
    assert seen == [3, 2, 1, 0] * 2 + [3, 1] + [3]
    assert np.array_equal(results[None], results[4])
    assert not np.array_equal(results[None], results[2])
    assert np.array_equal(results[1], toy(image, steps=1))


@pytest.mark.slow
def test_result_does_not_depend_on_the_tile_batch(toy: Upscaler) -> None:
    image = rgb(40, 56)
    one, many = (toy(image, tile_px=16, tile_batch=n) for n in (1, 5))
    assert (
        np.abs(one.astype(int) - many.astype(int)).max() <= 1
    )  # kernels may sum in another order for another batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outscale": 0}, "outscale"),
        ({"outscale": 17.0}, "outscale"),
        ({"outscale": "2"}, r"outscale must be a number in \(0, 16\], got '2'"),
        ({"tile_px": 4}, "tile_px must be at least 8"),
        ({"tile_batch": 0}, "tile_batch"),
        ({"steps": 5}, "steps must lie in 1 to 4 for this model, got 5"),
        ({"steps": 0}, "steps must lie in 1 to 4"),
    ],
)
def test_bad_options_are_named(options: dict[str, float], message: str, toy: Upscaler) -> None:
    with pytest.raises(ValueError, match=message):
        toy(rgb(8, 8), **options)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_bad_arrays_are_named(image: np.ndarray, toy: Upscaler) -> None:
    with pytest.raises(ValueError, match="an array must be"):
        toy(image)


def test_a_path_is_not_an_image(toy: Upscaler) -> None:
    with pytest.raises(ValueError, match=r"got str: a file is opened with PIL\.Image\.open"):
        toy("photo.png")  # pyright: ignore[reportArgumentType, reportCallIssue]


@pytest.mark.slow
@torch.no_grad()
def test_whole_composition_against_official(parity: Load, recipe_weights: Fill, settle_ties: Settle) -> None:
    """The e2e fixture again, now through the composition users call: padding, bicubic, VQ, four steps,
    quantised decoding, clamp.
    """
    arrays = parity("e2e_x4_64")
    stage_config = FirstStageConfig(vq=VQConfig(ch=32, n_embed=256))
    config = ModelConfig(unet=UNetConfig(model_channels=32, swin_embed_dim=64), first_stage=stage_config)
    vq = recipe_weights(VQAutoencoder(stage_config.vq))
    assert isinstance(vq, VQAutoencoder)
    up = Upscaler(config, recipe_weights(build_unet(config.unet)), vq, device="cpu", dtype="float32")
    settle_ties(vq.quantize, arrays["idx"])
    generator = torch.Generator().manual_seed(700)
    out = up.upscale_tensor(
        torch.from_numpy(arrays["lq"]), noise=lambda step: torch.randn((1, 3, 64, 64), generator=generator)
    )
    torch.testing.assert_close(
        out, torch.from_numpy(arrays["out"]).float(), atol=2e-3, rtol=0
    )  # stored as float16


def test_model_directory_round_trip(tmp_path: Path, toy: Upscaler) -> None:
    weights.save_model(tmp_path / "model", "toy", toy.chain.config, toy.chain.unet)
    image = rgb(10, 10)
    for source in (tmp_path / "model", tmp_path / "model" / "model.safetensors"):
        loaded = Upscaler.from_pretrained(source, device="cpu")
        assert loaded.name == "toy"
        assert np.array_equal(loaded(image), toy(image))


def test_a_weight_file_is_complete_in_itself(tmp_path: Path, toy: Upscaler) -> None:
    weights.save_model(tmp_path / "model", "toy", toy.chain.config, toy.chain.unet)
    alone = (tmp_path / "model" / "model.safetensors").rename(tmp_path / "alone.safetensors")
    assert Upscaler.from_pretrained(alone, device="cpu").config == toy.chain.config


def test_identity_changes_with_whatever_changes_pixels(
    tmp_path: Path, toy: Upscaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = build_network(replace(toy_preset(), train=replace(toy_preset().train, seed=1)))
    slower = replace(toy.chain.config, schedule=replace(toy.chain.config.schedule, steps=3))
    for name, config, unet in (
        ("a", toy.chain.config, toy.chain.unet),
        ("b", toy.chain.config, other),
        ("c", slower, toy.chain.unet),
        ("d", toy.chain.config, toy.chain.unet),
    ):
        weights.save_model(tmp_path / name, "toy", config, unet)
    identities = [Upscaler.from_pretrained(tmp_path / name, device="cpu").identity for name in "abcd"]
    assert len(set(identities)) == 3
    assert identities[0] == identities[3]
    monkeypatch.setattr("resshift.models.files.PIXELS", PIXELS + 1)  # another version of the code
    assert Upscaler.from_pretrained(tmp_path / "a", device="cpu").identity != identities[0]


def test_a_model_may_be_named_with_the_precision_it_computes_in(tmp_path: Path, toy: Upscaler) -> None:
    weights.save_model(tmp_path / "a", "toy", toy.chain.config, toy.chain.unet)
    plain, half = (
        Upscaler.from_pretrained(f"{tmp_path}/a{suffix}", device="cpu") for suffix in ("", "@bfloat16")
    )
    assert (plain.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    assert (plain.name, half.name) == ("toy", "toy@bfloat16")
    assert half.identity != plain.identity  # outputs of one job never come from both
    assert Upscaler.from_pretrained(tmp_path / "a", device="cpu", dtype="bfloat16").identity == half.identity
    assert (
        Upscaler.from_pretrained(f"{tmp_path}/a@bfloat16", device="cpu", dtype="float32").dtype
        == torch.float32
    )
    with pytest.raises(WeightsError, match="no model"):
        Upscaler.from_pretrained(f"{tmp_path}/a@float8", device="cpu")
    weights.save_model(
        tmp_path / "a@float16", "toy", toy.chain.config, toy.chain.unet
    )  # a path that is there is that path
    assert Upscaler.from_pretrained(tmp_path / "a@float16", device="cpu").dtype == torch.float32


def test_unknown_model_lists_those_that_exist() -> None:
    with pytest.raises(WeightsError, match=r"no model 'tiny-x5'.*realsr-x4-s4"):
        Upscaler.from_pretrained("tiny-x5")


def test_published_weights_need_their_licence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RESSHIFT_CACHE", str(tmp_path))
    monkeypatch.delenv("RESSHIFT_ACCEPT_LICENCE", raising=False)
    with pytest.raises(WeightsError, match=r"S-Lab.*RESSHIFT_ACCEPT_LICENCE"):
        Upscaler.from_pretrained("realsr-x4-s4")


def test_bare_weight_file_must_say_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "mine.pth"
    torch.save({"out.0.weight": torch.zeros(3)}, path)
    with pytest.raises(WeightsError, match="no architecture that spandrel knows"):
        Upscaler.from_pretrained(path)
    with pytest.raises(WeightsError, match="do not fit"):
        Upscaler.from_pretrained(path, preset_name="tiny-x4-swin")


def test_nothing_of_a_picture_stays_behind(toy: Upscaler) -> None:
    """Cycles of references would keep pictures and windows until the cyclic collector comes, which counts
    objects and not bytes.
    """
    gc.disable()
    try:
        image = rgb(20, 20)
        picture = weakref.ref(image)
        toy(image)
        del image
        assert picture() is None
    finally:
        gc.enable()
