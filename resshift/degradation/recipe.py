"""Degradation recipes: all ranges and probabilities that `draw` draws from.

The real-world chain is the "high-order" model of Wang et al., "Real-ESRGAN", ICCVW 2021, with the numbers of
the official ResShift configurations, which differ from those of Real-ESRGAN (smaller kernels, a second order
with probability 1/2, weaker noise):

    blur 1, resize 1, noise 1, JPEG 1                   always
    blur 2 (sometimes), resize 2, noise 2               with probability `second_order_prob`
    resize to H / scale, sinc or nothing, JPEG 2        always; JPEG first or last with equal probability

The resize at the end shrinks every noise, so a network that was trained with this chain alone keeps noise of
the size of a pixel. `NOISE3` is such a noise: it is added after the last filter, before JPEG 2 if JPEG is
last, or after bicubic alone. Official training has none.

Faces follow Wang et al., "Towards Real-World Blind Face Restoration with Generative Facial Prior" (GFPGAN),
CVPR 2021, with the numbers of the official ResShift configuration: blur, shrink, noise, JPEG, enlarge to the
original size, and rarely convert both pictures of the pair to grey.

Deviation from the official code: there, scales, modes and branches are drawn once per batch; here, everything
is drawn for each sample from a generator of its own, so a sample does not depend on its batch. JPEG qualities
are integers, which the real codec requires.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from resshift.degradation.masks import MaskRecipe
from resshift.degradation.ranges import IntRange, Range, check_prob, check_probs, check_range, check_sizes

_RECORD = ConfigDict(extra="forbid", allow_inf_nan=False)
ON_DEVICE = ("realesrgan", "bicubic")  # kinds that `resshift.degradation.on_device` applies


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class KernelRecipe:
    """Distribution of blur kernels: a sinc filter with `sinc_prob`, otherwise one of six Gaussian types.

    Fields:
        size: (smallest, largest) side, both odd and both included.
        type_probs: Probabilities of iso, aniso, generalized_iso, generalized_aniso, plateau_iso and
            plateau_aniso.
        sigma: Range of the standard deviation along each axis, in pixels. The angle is uniform in [-pi, pi].
        beta_generalized, beta_plateau: Ranges of the shape parameter; half of the draws are from [low, 1] and
            half from [1, high].
        sinc_prob: Probability of a sinc filter.
        sinc_omega_small, sinc_omega_large, sinc_large_size: Ranges of the cut-off of kernels below
            `sinc_large_size` pixels, and of all larger ones.
    """

    size: IntRange
    type_probs: tuple[float, float, float, float, float, float] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sigma: Range
    beta_generalized: Range = (0.5, 4.0)
    beta_plateau: Range = (1.0, 2.0)
    sinc_prob: float = 0.1
    sinc_omega_small: Range = (math.pi / 3, math.pi)
    sinc_omega_large: Range = (math.pi / 5, math.pi)
    sinc_large_size: int = 13

    def __post_init__(self) -> None:
        check_sizes("size", self.size)
        check_probs("type_probs", self.type_probs)
        check_range("sigma", self.sigma, 1e-3)
        for name, beta in (("beta_generalized", self.beta_generalized), ("beta_plateau", self.beta_plateau)):
            if not 0 < beta[0] <= 1 <= beta[1]:
                raise ValueError(f"{name} = {beta}: must be (low, high) with 0 < low <= 1 <= high")
        check_prob("sinc_prob", self.sinc_prob)
        check_range("sinc_omega_small", self.sinc_omega_small, 1e-3, math.pi)
        check_range("sinc_omega_large", self.sinc_omega_large, 1e-3, math.pi)


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class ResizeRecipe:
    """Distribution of resizes: enlarge by U(1, high), shrink by U(low, 1) or keep the size; the three modes
    have equal probabilities.

    Fields:
        probs: Probabilities of enlarging, shrinking and keeping the size.
        factor: Range of the ratio of sides, (low, high) with low <= 1 <= high.
    """

    probs: tuple[float, float, float]
    factor: Range

    def __post_init__(self) -> None:
        check_probs("probs", self.probs)
        if not 0 < self.factor[0] <= 1 <= self.factor[1]:
            raise ValueError(f"factor = {self.factor}: must be (low, high) with 0 < low <= 1 <= high")


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class NoiseRecipe:
    """Distribution of noise: Gaussian or Poisson.

    Fields:
        gaussian_prob: Probability of Gaussian noise, otherwise Poisson.
        gaussian_sigma: Range of its deviation in 8-bit levels, at least 0.
        poisson_scale: Range of the scale of Poisson noise, at least 0.
        gray_prob: Probability that all channels have the same noise.
        correlated_prob: Probability that neighbouring pixels share part of their noise; 0 in official
            recipes.
    """

    gaussian_prob: float = 0.5
    gaussian_sigma: Range
    poisson_scale: Range
    gray_prob: float = 0.4
    correlated_prob: float = 0.0

    def __post_init__(self) -> None:
        check_prob("gaussian_prob", self.gaussian_prob)
        check_prob("gray_prob", self.gray_prob)
        check_prob("correlated_prob", self.correlated_prob)
        check_range("gaussian_sigma", self.gaussian_sigma, 0)
        check_range("poisson_scale", self.poisson_scale, 0)


# Of `noise3_prob`.
NOISE3 = NoiseRecipe(
    gaussian_sigma=(1.0, 30.0), poisson_scale=(0.1, 2.0), gray_prob=0.2, correlated_prob=0.25
)


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class FaceRecipe:
    """Degradation of faces: blur, shrink, Gaussian noise, JPEG, enlarge to the original size.

    Fields:
        shrink: Range of the factor that sides are divided by, at least 0.1.
        noise_sigma: Range of the deviation of the noise in 8-bit levels, at least 0.
        jpeg_quality: (lowest, highest) quality in 1 to 100, both included.
        gray_prob: Probability that both pictures of the pair become grey.
    """

    kernel: KernelRecipe = KernelRecipe(
        size=(41, 41), type_probs=(0.5, 0.5, 0.0, 0.0, 0.0, 0.0), sigma=(0.1, 15.0), sinc_prob=0.0
    )
    shrink: Range = (0.8, 32.0)
    noise_sigma: Range = (0.0, 20.0)
    jpeg_quality: IntRange = (30, 100)
    gray_prob: float = 0.01

    def __post_init__(self) -> None:
        check_range("shrink", self.shrink, 0.1)
        check_range("noise_sigma", self.noise_sigma, 0)
        check_range("jpeg_quality", self.jpeg_quality, 1, 100)
        check_prob("gray_prob", self.gray_prob)


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class DegradationRecipe:
    """All ranges and probabilities of a degradation. The defaults are those of official ResShift training.

    Fields:
        kind: "realesrgan" is the chain of the module docstring; "bicubic" is MATLAB's imresize alone; "face"
            follows `face`, and "inpainting" cuts the holes of `mask`. A kind ignores the fields of the
            others.
        scale: Side of the clean picture divided by the side of the low-quality one; 1 for inpainting.
        bicubic_share: Probability that a sample is degraded by bicubic alone instead of the chain (mixed
            training); 0 in official recipes.
        mild_share: Probability that the chain has the mild, first-order ranges of `imagenet_test_x4`; 0 in
            official recipes.
        camera_share: Probability that the chain has the ranges of `camera_x4`; 0 in official recipes. The
            three shares apply to the real-world chain only, and are 0 for other kinds.
        noise3_prob: Probability of noise that nothing shrinks (`NOISE3`), for every sample of the kinds
            "realesrgan" and "bicubic"; 0 in official recipes.
        second_order_prob, blur2_prob: Probabilities of the second order, and of blur in it.
        final_sinc_prob, final_sinc_size, final_sinc_omega: Probability and ranges of the last filter; sizes
            are odd, cut-offs in (0, pi].
        jpeg_last_prob: Probability of (resize, sinc, JPEG); otherwise (JPEG, resize, sinc).
        jpeg1_quality, jpeg2_quality: (lowest, highest) qualities in 1 to 100, both included.
    """

    kind: Literal["realesrgan", "bicubic", "face", "inpainting"]
    scale: int
    bicubic_share: float = 0.0
    mild_share: float = 0.0
    camera_share: float = 0.0
    noise3_prob: float = 0.0
    # The official configurations give the maxima 21 and 15, but sizes are drawn from range(3, 21, 2) and
    # range(3, 15, 2), which exclude the end.
    kernel1: KernelRecipe = KernelRecipe(size=(3, 19), sigma=(0.2, 3.0))
    resize1: ResizeRecipe = ResizeRecipe(probs=(0.2, 0.7, 0.1), factor=(0.15, 1.5))
    noise1: NoiseRecipe = NoiseRecipe(gaussian_sigma=(1.0, 30.0), poisson_scale=(0.05, 3.0))
    jpeg1_quality: IntRange = (30, 95)
    second_order_prob: float = 0.5
    blur2_prob: float = 0.8
    kernel2: KernelRecipe = KernelRecipe(size=(3, 13), sigma=(0.2, 1.5))
    resize2: ResizeRecipe = ResizeRecipe(probs=(0.3, 0.4, 0.3), factor=(0.3, 1.2))
    noise2: NoiseRecipe = NoiseRecipe(gaussian_sigma=(1.0, 25.0), poisson_scale=(0.05, 2.5))
    final_sinc_prob: float = 0.8
    final_sinc_size: IntRange = (3, 13)
    final_sinc_omega: Range = (math.pi / 3, math.pi)
    jpeg_last_prob: float = 0.5
    jpeg2_quality: IntRange = (30, 95)
    face: FaceRecipe = FaceRecipe()
    mask: MaskRecipe = MaskRecipe()

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"scale = {self.scale}: must be at least 1")
        if self.kind == "inpainting" and self.scale != 1:
            raise ValueError(f"scale = {self.scale}: must be 1 for inpainting")
        for name in (
            "bicubic_share",
            "mild_share",
            "camera_share",
            "noise3_prob",
            "second_order_prob",
            "blur2_prob",
            "final_sinc_prob",
            "jpeg_last_prob",
        ):
            check_prob(name, getattr(self, name))
        shares = {name: getattr(self, name) for name in ("bicubic_share", "mild_share", "camera_share")}
        told = ", ".join(f"{name} = {share}" for name, share in shares.items() if share)
        if self.kind != "realesrgan" and told:
            raise ValueError(f"{told}: must be 0 for a recipe of kind {self.kind}")
        if self.kind not in ON_DEVICE and self.noise3_prob:
            raise ValueError(f"noise3_prob = {self.noise3_prob}: must be 0 for a recipe of kind {self.kind}")
        if sum(shares.values()) > 1:
            raise ValueError(f"{told}: their sum must be at most 1")
        check_sizes("final_sinc_size", self.final_sinc_size)
        check_range("final_sinc_omega", self.final_sinc_omega, 1e-3, math.pi)
        check_range("jpeg1_quality", self.jpeg1_quality, 1, 100)
        check_range("jpeg2_quality", self.jpeg2_quality, 1, 100)


def realesrgan_x4() -> DegradationRecipe:
    """Return the training degradation of realsr-x4 (all official versions)."""
    return DegradationRecipe(kind="realesrgan", scale=4)


def realesrgan_x2() -> DegradationRecipe:
    """Return the training degradation of realsr-x2: that of realsr-x4 with scale 2."""
    return replace(realesrgan_x4(), scale=2)


def imagenet_test_x4() -> DegradationRecipe:
    """Return the degradation of the ImageNet-Test pairs (official degradation_testing_realesrgan.yaml), which
    is mild and of first order only.
    """
    kernel = KernelRecipe(
        size=(3, 11),  # 13 in the file, excluded as in training
        type_probs=(0.6, 0.4, 0.0, 0.0, 0.0, 0.0),
        sigma=(0.2, 0.8),
        beta_generalized=(1.0, 1.5),
        beta_plateau=(1.0, 1.2),
    )
    return DegradationRecipe(
        kind="realesrgan",
        scale=4,
        kernel1=kernel,
        resize1=ResizeRecipe(probs=(0.2, 0.7, 0.1), factor=(0.5, 1.5)),
        noise1=NoiseRecipe(gaussian_sigma=(1.0, 15.0), poisson_scale=(0.05, 0.3)),
        jpeg1_quality=(70, 95),
        second_order_prob=0.0,
        blur2_prob=0.2,
        kernel2=replace(kernel, size=(3, 5), sigma=(0.2, 0.5), sinc_prob=0.0),
        final_sinc_prob=0.2,
        final_sinc_size=(3, 5),
        jpeg2_quality=(80, 100),
    )


def camera_x4() -> DegradationRecipe:
    """Return the degradation of a picture of a camera or a phone, seen at its full size: blurred by the lens
    and sharpened again, with hardly any noise, and JPEG of good quality. Its numbers are of this project.

    The heavy chain has such a blur beside strong noise alone, so a network that was trained with it takes
    soft bricks, leaves or sand for noise.
    """
    recipe = realesrgan_x4()
    return replace(
        recipe,
        kernel1=replace(recipe.kernel1, size=(11, 25), sigma=(0.8, 4.0)),
        resize1=ResizeRecipe(probs=(0.2, 0.3, 0.5), factor=(0.7, 1.2)),
        noise1=NoiseRecipe(gaussian_sigma=(0.0, 4.0), poisson_scale=(0.0, 0.2)),
        jpeg1_quality=(90, 100),
        second_order_prob=0.0,
        final_sinc_size=(5, 13),  # overshoots at edges, as sharpening does
        jpeg2_quality=(75, 100),
    )


def bicubic_x4() -> DegradationRecipe:
    """Return MATLAB's bicubic alone. Official training keeps its result in float; here it is clipped and
    rounded to 8 bits, as in test sets.
    """
    return DegradationRecipe(kind="bicubic", scale=4)


def bicubic_x2() -> DegradationRecipe:
    """Return MATLAB's bicubic alone, with scale 2."""
    return replace(bicubic_x4(), scale=2)


def face() -> DegradationRecipe:
    """Return the training degradation of the face restoration model, for 512 x 512: the low-quality picture
    has the size of the clean one.
    """
    return DegradationRecipe(kind="face", scale=1)


def inpainting() -> DegradationRecipe:
    """Return the degradation of the inpainting models, for 256 x 256: irregular, box and outpainting masks
    with equal probabilities.
    """
    return DegradationRecipe(kind="inpainting", scale=1)
