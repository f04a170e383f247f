"""Blur kernels of the Real-ESRGAN degradation, from their closed formulas.

With p = (x, y) the offset from the centre in pixels (x to the right, y downwards), Sigma = U diag(sigma_x^2,
sigma_y^2) U^T, U = [[cos theta, -sin theta], [sin theta, cos theta]] and q = p^T Sigma^-1 p:

    Gaussian             k(p) ~ exp(-q / 2)
    generalised Gaussian k(p) ~ exp(-q^beta / 2)      (Gaussian at beta = 1, sharper below 1, flatter above)
    plateau              k(p) ~ 1 / (1 + q^beta)
    sinc                 k(p) ~ omega J1(omega r) / (2 pi r),  r = |p|,  k(0) = omega^2 / (4 pi)
    pulse                k(p) = 1 at the centre, else 0

Every kernel is sampled at the pixel centres and divided by its sum. J1 is the Bessel function of the first
kind and order one: the sinc kernel is the ideal low-pass filter with a circular pass band of radius omega
rad/pixel, truncated to size x size, and causes ringing.

References: Wang et al., "Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data",
ICCVW 2021 (blur and sinc sections); Liu, Zhang and Liu, "Estimating Generalized Gaussian Blur Kernels for
Out-of-Focus Image Deblurring", IEEE TCSVT 2021.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Annotated, Literal, cast

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

_RECORD = ConfigDict(extra="forbid", allow_inf_nan=False)

_NEGLIGIBLE = 1e-6  # as a part of the sum, which is 1
_FOURIER_TAPS = 130  # cv2.filter2D has the same limit
# Above this size torch's transforms are faster than those of cv2.filter2D: equal at 140 x 140, a third of the
# time at 256 x 256.
_LARGE_PIXELS = 1 << 14

GaussianType = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]


def _check_size(size: int) -> None:
    if size < 1 or size % 2 == 0:
        raise ValueError(f"kernel size {size}: must be odd and at least 1")


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class GaussianKernel:
    """A Gaussian, generalised Gaussian or plateau kernel. Types with `iso` need sigma_x == sigma_y; `iso` and
    `aniso` need beta == 1.
    """

    type: GaussianType
    size: int
    sigma_x: float
    sigma_y: float
    theta: float = 0.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        _check_size(self.size)
        if min(self.sigma_x, self.sigma_y, self.beta) <= 0:
            raise ValueError(
                f"sigma_x {self.sigma_x}, sigma_y {self.sigma_y}, beta {self.beta}: all must be above 0"
            )
        if self.type in ("iso", "generalized_iso", "plateau_iso") and self.sigma_x != self.sigma_y:
            raise ValueError(
                f"kernel type {self.type} with sigma_x {self.sigma_x} and sigma_y {self.sigma_y}: must be "
                "equal"
            )
        if self.type in ("iso", "aniso") and self.beta != 1:
            raise ValueError(f"kernel type {self.type} with beta {self.beta}: must be 1")


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class SincKernel:
    """A circular low-pass filter with cut-off `omega` in rad/pixel, in (0, pi]."""

    type: Literal["sinc"] = "sinc"
    size: int
    omega: float

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 < self.omega <= math.pi:
            raise ValueError(f"omega {self.omega}: must be in (0, pi]")


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class PulseKernel:
    """The kernel of the identity."""

    type: Literal["pulse"] = "pulse"
    size: int = 1

    def __post_init__(self) -> None:
        _check_size(self.size)


KernelSpec = Annotated[GaussianKernel | SincKernel | PulseKernel, Field(discriminator="type")]


@dataclass(frozen=True, kw_only=True, slots=True, config=_RECORD)
class Blur:
    """One operation of a degradation: correlation with a kernel; borders are reflected without repeating the
    edge pixel.
    """

    op: Literal["blur"] = "blur"
    kernel: KernelSpec


def _offsets(size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    axis = np.arange(size, dtype=np.float64) - size // 2
    return axis[None, :], axis[:, None]  # x along the columns, y along the rows


def _gaussian(spec: GaussianKernel) -> NDArray[np.float64]:
    x, y = _offsets(spec.size)
    cos, sin = math.cos(spec.theta), math.sin(spec.theta)
    # U^T p is the offset in coordinates along the two axes of the ellipse.
    q = ((cos * x + sin * y) / spec.sigma_x) ** 2 + ((-sin * x + cos * y) / spec.sigma_y) ** 2
    if spec.type in ("plateau_iso", "plateau_aniso"):
        return 1.0 / (1.0 + q**spec.beta)
    return np.exp(-0.5 * q**spec.beta)


def _sinc(spec: SincKernel) -> NDArray[np.float64]:
    x, y = _offsets(spec.size)
    r = np.hypot(x, y)
    i_centre = spec.size // 2
    r[i_centre, i_centre] = 1.0  # replaced below by the limit of J1(omega r) / r at r -> 0
    bessel_j1 = cast("Callable[[Tensor], Tensor]", torch.special.bessel_j1)  # pyright: ignore[reportUnknownMemberType]  # untyped in torch
    j1 = bessel_j1(torch.as_tensor(spec.omega * r))
    k = spec.omega * j1.numpy() / (2 * math.pi * r)
    k[i_centre, i_centre] = spec.omega**2 / (4 * math.pi)
    return k


def kernel(spec: GaussianKernel | SincKernel | PulseKernel) -> NDArray[np.float32]:
    """Return the kernel of a specification, (size, size) float32 with sum 1."""
    match spec:
        case GaussianKernel():
            k = _gaussian(spec)
        case SincKernel():
            k = _sinc(spec)
        case PulseKernel():
            k = np.zeros((spec.size, spec.size))
            k[spec.size // 2, spec.size // 2] = 1.0
    return (k / k.sum()).astype(np.float32)


def blur(image: NDArray[np.float32], spec: GaussianKernel | SincKernel | PulseKernel) -> NDArray[np.float32]:
    """Correlate every channel of an (H, W, 3) picture with a kernel; borders are reflected (101), the range
    is not clipped.

    The result equals the full sum within 3e-6 of the range: taps that add up to less than 1e-6 are left out.
    """
    if isinstance(spec, PulseKernel):
        return image
    if spec.type == "iso":
        # exp(-(x^2 + y^2) / 2 sigma^2) is a product of two profiles.
        profile = np.exp(-0.5 * (_offsets(spec.size)[0] / spec.sigma_x) ** 2)
        profile = _without_negligible((profile / profile.sum()).astype(np.float32))
        return _correlate(_correlate(image, profile), profile.T)
    k = kernel(spec)
    return _correlate(image, k if spec.type == "sinc" else _without_negligible(k))


def _without_negligible(k: NDArray[np.float32]) -> NDArray[np.float32]:
    """Drop taps that add up to less than `_NEGLIGIBLE`: the kernel is cut to the remaining taps, and dropped
    taps between them become zero.

    This saves half of the products of a training kernel. It also removes denormal numbers, whose products
    take a hundred times as long.
    """
    kept = k > _NEGLIGIBLE / k.size
    # Kernels are symmetric about their centre, so the margins at opposite sides are equal.
    i_margin, j_margin = int(kept.any(axis=1).argmax()), int(kept.any(axis=0).argmax())
    return (k * kept)[i_margin : k.shape[0] - i_margin, j_margin : k.shape[1] - j_margin]


def _correlate(image: NDArray[np.float32], k: NDArray[np.float32]) -> NDArray[np.float32]:
    """Correlate with a kernel that is symmetric about its centre, by a sum over the taps that are not zero or
    in Fourier space.
    """
    height, width = image.shape[:2]
    if k.size < _FOURIER_TAPS or height * width < _LARGE_PIXELS:
        return np.asarray(cv2.filter2D(image, -1, k, borderType=cv2.BORDER_REFLECT_101), dtype=np.float32)
    i_radius, j_radius = k.shape[0] // 2, k.shape[1] // 2
    padded = cv2.copyMakeBorder(image, i_radius, i_radius, j_radius, j_radius, cv2.BORDER_REFLECT_101)
    # Only sums without wrap-around are kept, so the transform need not be longer than the padded picture. MKL
    # is fastest at multiples of 32.
    rows, columns = (32 * cv2.getOptimalDFTSize(-(-side // 32)) for side in padded.shape[:2])
    spectrum = torch.fft.rfft2(torch.from_numpy(padded).permute(2, 0, 1), s=(rows, columns))
    spectrum *= _transfer_function(torch.from_numpy(k), rows, columns)
    out = torch.fft.irfft2(spectrum, s=(rows, columns))[
        :, i_radius : i_radius + height, j_radius : j_radius + width
    ]
    return out.permute(1, 2, 0).contiguous().numpy()


def _transfer_function(k: Tensor, rows: int, columns: int) -> Tensor:
    """Return sum_ij k_ij cos(a_u i + b_v j), the transform of a kernel about its centre, at the frequencies
    of `rfft2`.

    The transform of a symmetric kernel is real; computed as two products of small matrices it takes a third
    of the time.
    """
    (cos_a, sin_a), (cos_b, sin_b) = (
        _waves(k.shape[0], rows, rows),
        _waves(k.shape[1], columns, columns // 2 + 1),
    )
    return cos_a @ (k @ cos_b.T) - sin_a @ (k @ sin_b.T)


@functools.lru_cache(maxsize=128)
def _waves(num_taps: int, length: int, num_frequencies: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of 2 pi u i / length for the offsets i of the taps, (num_frequencies, num_taps)
    each.
    """
    angles = 2 * math.pi / length * np.outer(np.arange(num_frequencies), np.arange(num_taps) - num_taps // 2)
    return torch.from_numpy(np.cos(angles).astype(np.float32)), torch.from_numpy(
        np.sin(angles).astype(np.float32)
    )
