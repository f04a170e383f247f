"""Each operation on pictures of different sizes, with different parameters, against that of the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from resshift import seeds
from resshift.degradation import jpeg as cpu_jpeg
from resshift.degradation import kernels as cpu_kernels
from resshift.degradation import noise as cpu_noise
from resshift.degradation import resize as cpu_resize
from resshift.degradation.apply import DegradationParams
from resshift.degradation.jpeg import Jpeg
from resshift.degradation.kernels import Blur, GaussianKernel, KernelSpec, PulseKernel, SincKernel
from resshift.degradation.noise import Noise
from resshift.degradation.on_device import jpeg, noise, resize
from resshift.degradation.on_device.blur import blur, kernels
from resshift.degradation.on_device.philox import random_u16
from resshift.degradation.on_device.plan import MODES, PULSE, Plan, decode, encode
from resshift.degradation.resize import Resize

pytestmark = pytest.mark.usefixtures("one_thread")

SIDE = 40
SIDES = (40, 33, 16, 7, 1)
Image = NDArray[np.float32]


def textures(num: int, low: float = 0.0, high: float = 1.0) -> list[Image]:
    """Pictures between noise and a soft gradient."""
    rng = np.random.default_rng(num)
    found: list[Image] = []
    for i in range(num):
        picture = cv2.GaussianBlur(rng.random((SIDE, SIDE, 3), np.float32), (0, 0), 0.1 + 0.4 * (i % 8))
        picture = (picture - picture.min()) / (picture.max() - picture.min())
        found.append((low + (high - low) * picture).astype(np.float32))
    return found


def canvases(pictures: Sequence[Image], sides: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Lay the corners of pictures on canvases of which the rest would show in a sum."""
    laid = np.full((len(pictures), SIDE, SIDE, 3), 0.77, np.float32)
    for canvas, picture, side in zip(laid, pictures, sides, strict=True):
        canvas[:side, :side] = picture[:side, :side]
    return torch.from_numpy(laid).permute(0, 3, 1, 2).contiguous(), torch.tensor(sides)


def differences(found: Tensor, expected: Sequence[Image]) -> float:
    """Return the largest difference within the pictures."""
    pictures = found.permute(0, 2, 3, 1).numpy()
    return max(
        float(np.abs(one[: len(other), : len(other)] - other).max())
        for one, other in zip(pictures, expected, strict=True)
    )


def corners(pictures: Sequence[Image], sides: Sequence[int]) -> list[Image]:
    return [
        np.ascontiguousarray(picture[:side, :side]) for picture, side in zip(pictures, sides, strict=True)
    ]


def plan_of(kernels: Sequence[KernelSpec] = (), noises: Sequence[Noise] = (), num: int | None = None) -> Plan:
    """Records whose first blur and first noise are these."""
    num = num or max(len(kernels), len(noises))
    records: list[NDArray[np.uint8]] = []
    for i in range(num):
        ops = (
            Blur(kernel=kernels[i] if kernels else PulseKernel()),
            Resize(of="hq", factor=1, mode="area"),
            noises[i] if noises else Noise(kind="gaussian", level=1, gray=False, seed=0),
            Jpeg(quality=50),
            Jpeg(quality=50),
            Resize(of="lq", factor=1, mode="area"),
            Blur(kernel=PulseKernel()),
        )
        records.append(encode(DegradationParams(scale=4, ops=ops), SIDE))
    return decode(torch.from_numpy(np.stack(records)))


KERNELS: list[KernelSpec] = [
    GaussianKernel(type="iso", size=9, sigma_x=2.0, sigma_y=2.0),
    GaussianKernel(type="iso", size=21, sigma_x=0.2, sigma_y=0.2),
    GaussianKernel(type="aniso", size=13, sigma_x=0.5, sigma_y=3.0, theta=0.7),
    GaussianKernel(type="generalized_iso", size=7, sigma_x=1.0, sigma_y=1.0, beta=0.5),
    GaussianKernel(type="generalized_aniso", size=21, sigma_x=3.0, sigma_y=1.0, theta=-2.0, beta=4.0),
    GaussianKernel(type="plateau_iso", size=15, sigma_x=1.5, sigma_y=1.5, beta=1.9),
    GaussianKernel(type="plateau_aniso", size=5, sigma_x=2.5, sigma_y=0.3, theta=3.0, beta=1.1),
    SincKernel(size=21, omega=0.7),
    SincKernel(size=3, omega=3.1),
]


@pytest.mark.parametrize("side", SIDES)
def test_blur_is_that_of_the_cpu(side: int) -> None:
    """Also where the kernel is larger than the picture, which is then reflected several times."""
    pictures = textures(len(KERNELS))
    sides = [side] * len(KERNELS)
    (kernel,) = kernels([plan_of(KERNELS).kernel1], 21)
    found = blur(*canvases(pictures, sides), kernel, torch.zeros(len(KERNELS), dtype=torch.bool))
    expected = [
        cpu_kernels.blur(picture, spec)
        for picture, spec in zip(corners(pictures, sides), KERNELS, strict=True)
    ]
    assert differences(found, expected) < 1e-5


def test_a_pulse_changes_nothing() -> None:
    laid, sides = canvases(textures(2), (40, 7))
    plan = plan_of(num=2).kernel1
    (kernel,) = kernels([plan], 5)
    assert torch.equal(blur(laid, sides, kernel, plan.type == PULSE), laid)
    assert differences(blur(laid, sides, kernel, plan.type != PULSE), corners(textures(2), (40, 7))) < 1e-6


@pytest.mark.parametrize("mode", MODES)
def test_resizes_are_those_of_the_cpu(mode: Any) -> None:
    """Enlarged, shrunk and left, each picture to another size."""
    sizes = [(16, 40), (7, 33), (40, 7), (40, 6), (33, 32), (20, 40), (40, 10), (16, 16), (1, 5), (9, 1)]
    sides, to_sides = zip(*sizes, strict=True)
    pictures = textures(len(sizes))
    laid, at = canvases(pictures, sides)
    index = torch.full((len(sizes),), float(MODES.index(mode)))
    found = resize.resize(laid, at, torch.tensor(to_sides), index, SIDE)
    expected = [
        cpu_resize.resize(picture, side, side, mode)
        for picture, side in zip(corners(pictures, sides), to_sides, strict=True)
    ]
    assert differences(found, expected) < 1e-5
    assert torch.equal(found[7, :, :16, :16], laid[7, :, :16, :16])


@pytest.mark.parametrize("scale", [2, 4])
def test_the_matrix_of_matlab_is_imresize(scale: int) -> None:
    picture = textures(1)[0]
    matrix = torch.from_numpy(resize.matlab_weights(SIDE, scale))
    found = (matrix @ torch.from_numpy(picture).permute(2, 0, 1) @ matrix.mT).permute(1, 2, 0)
    np.testing.assert_allclose(found, cpu_resize.imresize(picture, 1 / scale), rtol=0, atol=1e-6)


def test_random_numbers_are_those_of_numpy() -> None:
    names = [("degradation-noise", i) for i in range(4)]
    keys = np.array([seeds.derive(*name).to_bytes(16, "little") for name in names], "S16")
    words = torch.from_numpy(np.frombuffer(keys.tobytes(), np.int64).reshape(4, 2).T.copy())
    found = random_u16(words, 101).numpy()
    for row, name in zip(found, names, strict=True):
        expected = seeds.philox(*name).bit_generator.random_raw(26).view(np.uint16)[:101]
        np.testing.assert_array_equal(row, expected)


@pytest.mark.parametrize("span", [(0.0, 1.0), (0.4, 0.42)])
def test_noise_is_that_of_the_cpu(span: tuple[float, float]) -> None:
    """Of pictures with many levels and with few, which means few photons."""
    laws: list[tuple[Literal["gaussian", "poisson"], float]] = [
        ("gaussian", 20.0),
        ("poisson", 2.0),
        ("gaussian", 0.0),
    ]
    noises = [
        Noise(kind=kind, level=level, gray=gray, seed=int(100 * level) + gray)
        for kind, level in laws
        for gray in (False, True)
    ]
    sides = (40, 33, 40, 33, 7, 1)
    pictures = textures(len(sides), *span)
    laid, at = canvases(pictures, sides)
    plan = plan_of(noises=noises)
    random, _ = noise.random_levels((plan.noise1, plan.noise2), SIDE)
    tables = torch.from_numpy(cpu_noise.normal_table()), torch.from_numpy(noise.poisson_tables())
    found = noise.add_noise(laid, at, plan.noise1, random, *tables)
    expected = [
        cpu_noise.add_noise(picture, one)
        for picture, one in zip(corners(pictures, sides), noises, strict=True)
    ]
    assert differences(found, expected) < 1e-6
    assert float((found - laid).abs().max()) > 0.05
    assert torch.equal(noise.add_noise(laid, at, plan.noise2, random, *tables), laid)


def test_jpeg_is_that_of_the_codec_level_for_level() -> None:
    """Any size, also of a few pixels and odd ones, at any quality."""
    rng = np.random.default_rng(5)
    sides = [*range(1, 41, 2), 40, 2, 4, 6]
    pictures = textures(len(sides), -0.1, 1.1)
    qualities = rng.integers(1, 101, len(sides))
    laid, at = canvases(pictures, sides)
    tables = jpeg.JpegTables.on(torch.device("cpu"))
    found = jpeg.compress(laid, at, torch.from_numpy(qualities).double(), tables)
    expected = [
        cpu_jpeg.compress(picture, int(quality))
        for picture, quality in zip(corners(pictures, sides), qualities, strict=True)
    ]
    assert differences(found, expected) == 0


def test_a_planted_fault_of_jpeg_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chroma that is not smoothed is another picture."""
    monkeypatch.setattr(
        jpeg, "_doubled", lambda chroma, _: chroma.repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    with pytest.raises(AssertionError):
        test_jpeg_is_that_of_the_codec_level_for_level()
