"""The whole degradation: official statistics, purity, every branch, and each operation's own claims."""

from __future__ import annotations

import io
import json
import math
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any, TypeVar

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import ks_2samp

from resshift.degradation import (
    DegradationParams,
    DegradationRecipe,
    apply,
    bicubic_x4,
    camera_x4,
    degrade,
    draw,
    face,
    imagenet_test_x4,
    imresize,
    inpainting,
    realesrgan_x2,
    realesrgan_x4,
)
from resshift.degradation.jpeg import Jpeg, compress, to_u8
from resshift.degradation.kernels import Blur, PulseKernel, SincKernel
from resshift.degradation.noise import Noise
from resshift.degradation.recipe import NoiseRecipe, ResizeRecipe
from resshift.degradation.resize import Resize, resize
from resshift.seeds import philox

pytestmark = pytest.mark.usefixtures("one_thread")

Load = Callable[[str], dict[str, np.ndarray]]
T = TypeVar("T")
RECIPES = {"train_x4": realesrgan_x4(), "test_x4": imagenet_test_x4()}
COLUMNS = ("psnr", "mean_shift", "mean", "std", "laplacian_std")


def draws(recipe: DegradationRecipe, num_draws: int, purpose: str = "draws") -> list[DegradationParams]:
    return [draw(philox("test", purpose, i), recipe) for i in range(num_draws)]


def picture(height: int, width: int) -> NDArray[np.uint8]:
    coarse = philox("test", "picture").random((max(2, height // 8), max(2, width // 8), 3), dtype=np.float32)
    return to_u8(resize(coarse, height, width, "bicubic"))


# JPEG arithmetic of ITU-T T.81 with the quirks of DiffJPEG: real-valued tables, the luminance table
# transposed, chroma averaged 2 x 2 and repeated. It stands for the official codec in the comparison of
# statistics, and is itself checked against the official arrays below.
LUMA_TABLE = np.array(
    [
        [16, 11, 10, 16, 24, 40, 51, 61],
        [12, 12, 14, 19, 26, 58, 60, 55],
        [14, 13, 16, 24, 40, 57, 69, 56],
        [14, 17, 22, 29, 51, 87, 80, 62],
        [18, 22, 37, 56, 68, 109, 103, 77],
        [24, 35, 55, 64, 81, 104, 113, 92],
        [49, 64, 78, 87, 103, 121, 120, 101],
        [72, 92, 95, 98, 112, 100, 103, 99],
    ]
)
CHROMA_TABLE = np.full((8, 8), 99.0)
CHROMA_TABLE[:4, :4] = [[17, 18, 24, 47], [18, 21, 26, 66], [24, 26, 56, 99], [47, 66, 99, 99]]
TO_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]])
TO_RGB = np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]])
WAVES = np.sqrt(np.where(np.arange(8) == 0, 1, 2) / 8)[:, None] * np.cos(
    (2 * np.arange(8) + 1) * np.arange(8)[:, None] * math.pi / 16
)


def test_rounding_is_half_to_even_and_clips() -> None:
    values = np.array([[-1e6, -0.4, 0, 0.5 / 255, 1.5 / 255, 2.5 / 255, 1, 1.3, 1e6]])
    for image in (values, values.astype(np.float32)):
        np.testing.assert_array_equal(to_u8(image), [[0, 0, 0, 0, 2, 2, 255, 255, 255]])


def quantised(plane: NDArray[np.float64], table: NDArray[np.float64]) -> NDArray[np.float64]:
    height, width = plane.shape
    blocks = plane.reshape(height // 8, 8, width // 8, 8).transpose(0, 2, 1, 3) - 128
    coefficients = np.rint(WAVES @ blocks @ WAVES.T / table) * table
    return (WAVES.T @ coefficients @ WAVES + 128).transpose(0, 2, 1, 3).reshape(height, width)


def diffjpeg(image: NDArray[np.float32], quality: float) -> NDArray[np.float32]:
    height, width = image.shape[:2]
    factor = max((5000 / quality if quality < 50 else 200 - 2 * quality) / 100, 1e-9)
    padded = np.pad(np.clip(image, 0, 1) * 255.0, ((0, -height % 16), (0, -width % 16), (0, 0)))
    ycc = np.asarray(padded @ TO_YCC.T + [0, 128, 128], dtype=np.float64)
    chroma = ycc.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2, 3).mean(axis=(1, 3))
    blue, red = (
        quantised(chroma[..., i], CHROMA_TABLE * factor).repeat(2, axis=0).repeat(2, axis=1) for i in (1, 2)
    )
    rgb = np.stack([quantised(ycc[..., 0], LUMA_TABLE.T * factor), blue - 128, red - 128], axis=-1) @ TO_RGB.T
    return (np.clip(rgb, 0, 255) / 255).astype(np.float32)[:height, :width]


def statistics(lq_u8: NDArray[np.uint8], reference: NDArray[np.float64]) -> list[float]:
    lq = lq_u8.astype(np.float32) / 255
    laplacian = cv2.Laplacian(lq, -1)[1:-1, 1:-1]
    psnr = -10 * math.log10(((lq - reference) ** 2).mean())
    return [
        psnr,
        lq.mean() - reference.mean(),
        float(lq.mean()),
        float(lq.std(ddof=1)),
        float(laplacian.std(ddof=1)),
    ]


def assert_same_distribution(ours: NDArray[np.float64], official: NDArray[np.float64], name: str) -> None:
    standard_error = math.sqrt(ours.var() / len(ours) + official.var() / len(official))
    z = (ours.mean() - official.mean()) / standard_error
    result: Any = ks_2samp(ours, official)
    p = float(result.pvalue)
    assert abs(z) < 3 or p > 1e-3, (
        f"{name}: {ours.mean():.5g} against {official.mean():.5g}, {z:.1f} standard errors, KS p = {p:.2g}"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_statistics_against_official(name: str, parity: Load) -> None:
    arrays = parity("degradation_statistics")
    hq_u8, official = arrays["image_u8"], arrays[name]
    reference = imresize(hq_u8 / 255, 0.25)
    ours = np.array(
        [statistics(degrade(hq_u8, params), reference) for params in draws(RECIPES[name], 200, "statistics")]
    )
    # The real codec smooths chroma: on this picture std and laplacian std are lower (README-degradation.md).
    for i in range(3):
        assert_same_distribution(ours[:, i], official[:, i], f"{name} {COLUMNS[i]}")


def official_resized(
    image: NDArray[np.float32], op: Resize, hq_shape: tuple[int, int], scale: int
) -> NDArray[np.float32]:
    """Resize as official code does: the first by a factor, which spaces the samples by 1 / factor; the others
    to a size.
    """
    nchw = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].contiguous()
    if op.of == "hq":
        out = F.interpolate(nchw, scale_factor=op.factor, mode=op.mode)
    else:
        out = F.interpolate(
            nchw, size=tuple(int(side / scale * op.factor) for side in hq_shape), mode=op.mode
        )
    return np.ascontiguousarray(out[0].permute(1, 2, 0).numpy())


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_statistics_without_the_two_deviations_against_official(
    name: str, parity: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays = parity("degradation_statistics")
    hq_u8, official = arrays["image_u8"], arrays[name]
    reference = imresize(hq_u8 / 255, 0.25)
    monkeypatch.setattr(apply, "compress", diffjpeg)
    monkeypatch.setattr(apply, "_resized", official_resized)
    ours = np.array(
        [statistics(degrade(hq_u8, params), reference) for params in draws(RECIPES[name], 200, "statistics")]
    )
    for i, column in enumerate(COLUMNS):
        assert_same_distribution(ours[:, i], official[:, i], f"{name} {column}")


@pytest.mark.parametrize("quality", [10.0, 30.0, 50.0, 75.5, 95.0])
def test_jpeg_is_near_official_diffjpeg(quality: float, parity: Load) -> None:
    arrays = parity("degradation_ops")
    luma = np.array([0.299, 0.587, 0.114])
    for chw, official_chw in zip(arrays["smooth"], arrays[f"jpeg_q{quality}"], strict=True):
        image, official = (np.ascontiguousarray(x.transpose(1, 2, 0)) for x in (chw, official_chw))
        np.testing.assert_allclose(diffjpeg(image, quality), official, rtol=0, atol=2e-6)
        out = compress(image, round(quality))
        ours, theirs = (np.sqrt((((x - image) @ luma) ** 2).mean()) for x in (out, official))
        # same loss within 20 % (the luminance table is transposed there, tables are integers here); half a
        # level is 8-bit rounding
        assert abs(ours - theirs) < 0.2 * theirs + 0.5 / 255
        assert abs(float((out - official).mean())) < 1 / 255


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_jpeg_equals_pillow_at_420(quality: int) -> None:
    image_u8 = picture(50, 70)
    buffer = io.BytesIO()
    Image.fromarray(image_u8).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    expected = np.asarray(Image.open(buffer)).astype(np.int16)
    out = to_u8(compress(image_u8.astype(np.float32) * np.float32(1 / 255), quality)).astype(np.int16)
    assert (
        np.abs(out - expected).max() <= 2
    )  # two builds of libjpeg-turbo may round the inverse transform differently


def test_jpeg_subsamples_chroma_at_every_quality() -> None:
    stripes = np.zeros((32, 32, 3), dtype=np.float32)
    stripes[:, ::2, 0] = 1.0
    stripes[:, 1::2, 2] = 1.0
    assert np.abs(compress(stripes, 100) - stripes).mean() > 0.2


@pytest.mark.parametrize("recipe", [realesrgan_x4(), realesrgan_x2(), imagenet_test_x4(), bicubic_x4()])
def test_degrade_is_pure_and_survives_json(recipe: DegradationRecipe) -> None:
    hq_u8 = picture(64, 96)
    before = hq_u8.copy()
    for params in draws(recipe, 30, "pure"):
        lq_u8 = degrade(hq_u8, params)
        stored = DegradationParams.from_json(params.to_json())
        assert stored == params
        assert pickle.loads(pickle.dumps(params)) == params
        assert degrade(np.asfortranarray(hq_u8), stored).tobytes() == lq_u8.tobytes()
        assert (lq_u8.dtype, lq_u8.shape) == (np.uint8, (64 // recipe.scale, 96 // recipe.scale, 3))
    np.testing.assert_array_equal(hq_u8, before)


def test_samples_do_not_depend_on_the_order_of_drawing() -> None:
    keys = [f"n{i:08d}" for i in range(40)]
    forward = {key: draw(philox(7, "degrade", 0, key), realesrgan_x4()) for key in keys}
    backward = {key: draw(philox(7, "degrade", 0, key), realesrgan_x4()) for key in reversed(keys)}
    assert forward == backward
    assert len({params.to_json() for params in forward.values()}) == len(keys)


def ops_of(params: DegradationParams, op_type: type[T]) -> list[T]:
    return [op for op in params.ops if isinstance(op, op_type)]


def share(hits: list[bool], probability: float) -> None:
    """The share of hits is within four standard deviations of its probability."""
    assert (
        abs(sum(hits) / len(hits) - probability)
        <= 4 * math.sqrt(probability * (1 - probability) / len(hits)) + 1e-12
    )


# Numbers of the official configuration files, written out again: a swapped or mistyped range in recipe.py
# must not agree with itself.
OFFICIAL = {
    "train_x4": {
        "resize1": (0.15, 1.5, 0.2, 0.7),
        "noise1": (1.0, 30.0, 0.05, 3.0),
        "jpeg1": (30, 95),
        "second": 0.5,
        "sinc": 0.8,
        "sinc_size": 13,
        "jpeg2": (30, 95),
    },
    "test_x4": {
        "resize1": (0.5, 1.5, 0.2, 0.7),
        "noise1": (1.0, 15.0, 0.05, 0.3),
        "jpeg1": (70, 95),
        "second": 0.0,
        "sinc": 0.2,
        "sinc_size": 5,
        "jpeg2": (80, 100),
    },
}


def assert_fills(values: list[float], low: float, high: float) -> None:
    """Values cover [low, high] uniformly: ends nearly reached, mean in the middle."""
    assert low <= min(values) < low + 0.05 * (high - low)
    assert high - 0.05 * (high - low) < max(values) <= high
    assert abs(np.mean(values) - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * len(values))


@pytest.mark.parametrize("name", RECIPES)
def test_draw_follows_the_official_numbers(name: str) -> None:
    all_params = draws(RECIPES[name], 2000, "official")
    expected: dict[str, Any] = dict(OFFICIAL[name])
    low, high, up_prob, down_prob = expected["resize1"]
    first = [ops_of(params, Resize)[0] for params in all_params]
    share([op.factor > 1 for op in first], up_prob)
    share([op.factor < 1 for op in first], down_prob)
    assert_fills([op.factor for op in first if op.factor > 1], 1, high)
    assert_fills([op.factor for op in first if op.factor < 1], low, 1)
    assert {op.of for op in first} == {"hq"}
    gaussian_low, gaussian_high, poisson_low, poisson_high = expected["noise1"]
    noise = [ops_of(params, Noise)[0] for params in all_params]
    share([op.kind == "gaussian" for op in noise], 0.5)
    share([op.gray for op in noise], 0.4)
    assert_fills([op.level for op in noise if op.kind == "gaussian"], gaussian_low, gaussian_high)
    assert_fills([op.level for op in noise if op.kind == "poisson"], poisson_low, poisson_high)
    assert_fills([ops_of(params, Jpeg)[0].quality for params in all_params], *expected["jpeg1"])
    assert_fills([ops_of(params, Jpeg)[1].quality for params in all_params], *expected["jpeg2"])
    share([len(ops_of(params, Noise)) == 2 for params in all_params], expected["second"])
    share([isinstance(params.ops[-1], Jpeg) for params in all_params], 0.5)
    last = [ops_of(params, Blur)[-1].kernel for params in all_params]
    share([isinstance(k, SincKernel) for k in last], expected["sinc"])
    assert {k.size for k in last if isinstance(k, SincKernel)} == set(range(3, expected["sinc_size"] + 1, 2))
    assert_fills([k.omega for k in last if isinstance(k, SincKernel)], math.pi / 3, math.pi)
    for op in (ops_of(params, Resize)[-1] for params in all_params):
        assert (op.of, op.factor) == ("lq", 1.0)
    for i_resize in (0, -1):
        modes = [ops_of(params, Resize)[i_resize].mode for params in all_params]
        for mode in ("area", "bilinear", "bicubic"):
            share([m == mode for m in modes], 1 / 3)


def test_second_order_follows_the_official_numbers() -> None:
    second = [params for params in draws(realesrgan_x4(), 4000, "second") if len(ops_of(params, Noise)) == 2]
    share([len(ops_of(params, Blur)) == 3 for params in second], 0.8)
    resizes = [ops_of(params, Resize)[1] for params in second]
    assert {op.of for op in resizes} == {"lq"}
    share([op.factor > 1 for op in resizes], 0.3)
    share([op.factor < 1 for op in resizes], 0.4)
    assert_fills([op.factor for op in resizes if op.factor > 1], 1.0, 1.2)
    assert_fills([op.factor for op in resizes if op.factor < 1], 0.3, 1.0)
    noise = [ops_of(params, Noise)[1] for params in second]
    assert_fills([op.level for op in noise if op.kind == "gaussian"], 1.0, 25.0)
    assert_fills([op.level for op in noise if op.kind == "poisson"], 0.05, 2.5)
    share([op.gray for op in noise], 0.4)


def test_operations_come_in_the_official_order() -> None:
    orders = Counter(" ".join(op.op for op in params.ops) for params in draws(realesrgan_x4(), 400, "order"))
    start, second = "blur resize noise jpeg", ["", " resize noise", " blur resize noise"]
    ends = [" resize blur jpeg", " jpeg resize blur"]
    assert set(orders) == {start + middle + end for middle in second for end in ends}


@pytest.mark.slow
def test_every_branch_is_reached_and_runs() -> None:
    hq_u8, tiny_u8 = picture(32, 48), picture(4, 8)
    reached: set[object] = set()
    for params in draws(realesrgan_x4(), 400, "branches"):
        for op in params.ops:
            match op:
                case Blur():
                    reached.add(op.kernel.type)
                case Resize():
                    reached.add((op.of, op.mode, int(np.sign(op.factor - 1))))
                case Noise():
                    reached.add((op.kind, op.gray))
                case Jpeg():
                    reached.add("jpeg")
                case _:
                    pytest.fail(f"the real-world chain has no {op.op}")
        assert degrade(hq_u8, params).shape == (8, 12, 3)
        assert degrade(tiny_u8, params).shape == (1, 2, 3)
    kernel_types = {
        "iso",
        "aniso",
        "generalized_iso",
        "generalized_aniso",
        "plateau_iso",
        "plateau_aniso",
        "sinc",
        "pulse",
    }
    resizes = {
        (of, mode, sign)
        for of in ("hq", "lq")
        for mode in ("area", "bilinear", "bicubic")
        for sign in (-1, 0, 1)
    }
    noises = {(kind, gray) for kind in ("gaussian", "poisson") for gray in (False, True)}
    assert reached == kernel_types | resizes | noises | {"jpeg"}


def test_bicubic_equals_imresize_rounded(parity: Load) -> None:
    hq_u8 = parity("degradation_statistics")["image_u8"]
    (params,) = draws(bicubic_x4(), 1)
    expected = to_u8(imresize(hq_u8 / 255, 0.25)).astype(np.int16)
    difference = np.abs(degrade(hq_u8, params).astype(np.int16) - expected)
    assert (
        difference.max() <= 1
    )  # float32 against float64 may differ where a value lies half way between two levels
    assert (difference > 0).mean() < 1e-3


def test_bicubic_share_mixes_and_leaves_the_other_samples() -> None:
    real, bicubic = draws(realesrgan_x4(), 800), draws(bicubic_x4(), 1)[0]
    mixed = draws(replace(realesrgan_x4(), bicubic_share=0.25), 800)
    share([params == bicubic for params in mixed], 0.25)
    assert all(a == b for a, b in zip(mixed, real, strict=True) if a != bicubic)
    assert set(draws(replace(realesrgan_x4(), bicubic_share=1.0), 20)) == {bicubic}
    assert bicubic not in real


def test_mild_share_mixes_the_chain_of_the_test_set_in() -> None:
    """Sample by sample: what the seed gives with the one recipe or with the other; and what a share does not
    touch stays.
    """
    real, mild, bicubic = (
        draws(realesrgan_x4(), 800),
        draws(imagenet_test_x4(), 800),
        draws(bicubic_x4(), 1)[0],
    )
    mixed = draws(replace(realesrgan_x4(), bicubic_share=0.25, mild_share=0.5), 800)
    share([params == bicubic for params in mixed], 0.25)
    share([params == wanted for params, wanted in zip(mixed, mild, strict=True)], 0.5)
    share([params == wanted for params, wanted in zip(mixed, real, strict=True)], 0.25)
    more = draws(replace(realesrgan_x4(), bicubic_share=0.4, mild_share=0.5), 800)
    share([params == bicubic for params in more], 0.4)
    assert all(b in (a, bicubic) for a, b in zip(mixed, more, strict=True))
    assert draws(replace(realesrgan_x2(), mild_share=1.0), 1)[0].scale == 2


def test_camera_share_mixes_blur_without_noise_in_and_leaves_the_other_samples() -> None:
    before = replace(realesrgan_x4(), bicubic_share=0.2, mild_share=0.3)
    plain, camera = draws(before, 800), draws(camera_x4(), 800)
    mixed = draws(replace(before, camera_share=0.25), 800)
    share([params == wanted for params, wanted in zip(mixed, camera, strict=True)], 0.25)
    assert all(b in (a, c) for a, b, c in zip(plain, mixed, camera, strict=True))
    assert draws(replace(realesrgan_x2(), camera_share=1.0), 1)[0].scale == 2


def test_the_camera_blurs_more_than_mild_and_has_less_noise_than_heavy() -> None:
    """On an edge between two even halves: pixels that the edge takes, and deviation in an even half."""
    edge = np.full((256, 256, 3), 60, np.uint8)
    edge[:, 128:] = 200

    def seen(recipe: DegradationRecipe) -> tuple[float, float]:
        lqs = [degrade(edge, params).astype(float) for params in draws(recipe, 60)]
        slopes = [np.abs(np.diff(lq[8:56].mean((0, 2)))) for lq in lqs]
        widths = [float(slope.sum() / slope.max()) for slope in slopes]
        return float(np.median(widths)), float(np.median([lq[:, :24].std((0, 1)).mean() for lq in lqs]))

    (camera_px, camera_noise), (mild_px, _), (_, heavy_noise) = map(
        seen, (camera_x4(), imagenet_test_x4(), realesrgan_x4())
    )
    assert mild_px < 1.6 < 1.8 < camera_px
    assert camera_noise < 2 < 3 < heavy_noise


def test_noise3_is_added_after_everything_but_the_last_jpeg() -> None:
    """So it has the law it was drawn with. Nothing else of a sample changes."""
    weak = NoiseRecipe(gaussian_prob=1, gaussian_sigma=(1, 10), poisson_scale=(0, 0), gray_prob=0)
    recipe = replace(realesrgan_x4(), bicubic_share=0.3, second_order_prob=0.0, noise1=weak)
    plain = draws(recipe, 800)
    noisy = draws(replace(recipe, noise3_prob=1.0), 800)
    grey = np.full((256, 256, 3), 128, dtype=np.uint8)
    noises: list[Noise] = []
    for before, after in zip(plain, noisy, strict=True):
        is_last = not isinstance(before.ops[-1], Jpeg)
        position = len(before.ops) - (not is_last)
        noise3 = after.ops[position]
        assert isinstance(noise3, Noise)
        assert (*after.ops[:position], *after.ops[position + 1 :]) == before.ops
        noises.append(noise3)
        is_white = noise3.kind == "gaussian" and not (noise3.gray or noise3.correlated)
        if is_last and is_white and len(noises) < 60:
            added = degrade(grey, after).astype(float) - degrade(grey, before)
            assert added.std() == pytest.approx(noise3.level, rel=0.05, abs=0.5)
            assert abs((added * np.roll(added, 1, 0)).mean()) < 0.05 * added.var()
    share([noise.correlated for noise in noises], 0.25)
    share([noise.gray for noise in noises], 0.2)
    some = draws(replace(recipe, noise3_prob=0.3), 800)
    share([params == other for params, other in zip(some, noisy, strict=True)], 0.3)
    share([params == other for params, other in zip(some, plain, strict=True)], 0.7)


@pytest.mark.parametrize("shape", [(64, 66, 3), (62, 64, 3), (64, 64), (64, 64, 4), (64, 64, 1), (0, 64, 3)])
def test_bad_shapes_raise_and_name_them(shape: tuple[int, ...]) -> None:
    (params,) = draws(realesrgan_x4(), 1)
    with pytest.raises(ValueError, match=rf"{shape[0]}.*{shape[1]}"):
        degrade(np.zeros(shape, dtype=np.uint8), params)


def test_bad_dtype_and_inconsistent_operations_raise() -> None:
    (params,) = draws(realesrgan_x4(), 1)
    with pytest.raises(ValueError, match="float32"):
        degrade(np.zeros((64, 64, 3), dtype=np.float32), params)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="end at 64x64 pixels: must end at 16x16"):
        degrade(
            np.zeros((64, 64, 3), dtype=np.uint8),
            DegradationParams(scale=4, ops=(Blur(kernel=PulseKernel()),)),
        )


def test_parameters_are_frozen_and_strict() -> None:
    (params,) = draws(realesrgan_x4(), 1)
    with pytest.raises(FrozenInstanceError):
        params.scale = 2  # pyright: ignore[reportAttributeAccessIssue]
    document = json.loads(params.to_json())
    for change in (
        {"scale": 0},
        {"extra": 1},
        {"ops": [{"op": "sharpen"}]},
        {"ops": [{"op": "jpeg", "quality": 0}]},
    ):
        with pytest.raises(ValueError, match="validation error"):
            DegradationParams.from_json(json.dumps(document | change))


def test_impossible_recipes_raise_and_name_the_value() -> None:
    with pytest.raises(ValueError, match=r"bicubic_share = 1\.5"):
        replace(realesrgan_x4(), bicubic_share=1.5)
    with pytest.raises(ValueError, match=r"mild_share = 0\.5: must be 0 for a recipe of kind inpainting"):
        replace(inpainting(), mild_share=0.5)
    with pytest.raises(ValueError, match=r"noise3_prob = 0\.5: must be 0 for a recipe of kind face"):
        replace(face(), noise3_prob=0.5)
    with pytest.raises(
        ValueError, match=r"bicubic_share = 0\.6, camera_share = 0\.5: their sum must be at most 1"
    ):
        replace(realesrgan_x4(), bicubic_share=0.6, camera_share=0.5)
    with pytest.raises(ValueError, match=r"jpeg1_quality = \(95\.?0?, 30"):
        replace(realesrgan_x4(), jpeg1_quality=(95, 30))
    with pytest.raises(ValueError, match="both kernel sizes must be odd"):
        replace(realesrgan_x4().kernel1, size=(3, 20))
    with pytest.raises(ValueError, match="sum to 1"):
        replace(realesrgan_x4().kernel1, type_probs=(0.5, 0.5, 0.5, 0.0, 0.0, 0.0))
    with pytest.raises(ValueError, match="low <= 1 <= high"):
        ResizeRecipe(probs=(0.2, 0.7, 0.1), factor=(1.2, 1.5))
    with pytest.raises(ValueError, match="gaussian_sigma"):
        NoiseRecipe(gaussian_sigma=(30.0, 1.0), poisson_scale=(0.05, 3.0))
    with pytest.raises(ValueError, match="realesrgan"):
        DegradationRecipe(kind="gaussian", scale=4)  # pyright: ignore[reportArgumentType]


def test_recipes_pickle_and_compare() -> None:
    assert pickle.loads(pickle.dumps(realesrgan_x4())) == realesrgan_x4()
    assert realesrgan_x2() == replace(realesrgan_x4(), scale=2)
    assert imagenet_test_x4() != realesrgan_x4()
