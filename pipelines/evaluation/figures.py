"""What is measured of a picture: against the truth where there is one, and by itself.

PSNR and SSIM are those of `resshift.metrics.psnr_ssim`, on 8-bit pictures; LPIPS is measured with the trunk
that the caller names, and values of different trunks cannot be compared. NIQE needs its parameters. ST-LPIPS
(shift-tolerant LPIPS, AlexNet; Ghildyal and Liu, ECCV 2022) is that of the package stlpips-pytorch when the
user has installed it; no model here is trained with it. CLIP-IQA and MUSIQ are those of pyiqa: its licence
(PolyForm Noncommercial) keeps it out of everything that is installed with this package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from resshift import images
from resshift.metrics import psnr_ssim
from resshift.metrics.lpips import Lpips
from resshift.metrics.niqe import Niqe

Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Figure:
    """How a figure is shown, and which way is better."""

    label: str
    format: str
    higher_is_better: bool

    def shown(self, value: float) -> str:
        """Return a value with its unit."""
        return self.format.format(value)

    def difference(self, value: float) -> str:
        """Return a difference with sign and unit."""
        return self.format.replace("{:", "{:+").format(value)


FIGURES = {
    "psnr_y": Figure("PSNR-Y", "{:.2f} dB", True),
    "ssim_y": Figure("SSIM-Y", "{:.4f}", True),
    "psnr_rgb": Figure("PSNR-RGB", "{:.2f} dB", True),
    "ssim_rgb": Figure("SSIM-RGB", "{:.4f}", True),
    "lpips": Figure("LPIPS", "{:.4f}", False),
    "psnr_hole": Figure("PSNR in the hole", "{:.2f} dB", True),
    "lpips_hole": Figure("LPIPS in the hole", "{:.4f}", False),
    "st_lpips": Figure("ST-LPIPS", "{:.4f}", False),
    "niqe": Figure("NIQE", "{:.2f}", False),
    "clipiqa": Figure("CLIPIQA", "{:.4f}", True),
    "musiq": Figure("MUSIQ", "{:.2f}", True),
}
USER_INSTALLED = ("st_lpips", "clipiqa", "musiq")


class Judge:
    """Measures pictures; loads what it needs once.

    Args:
        border: Number of pixels cut from all sides before PSNR, SSIM and NIQE are measured.
        lpips_net: Trunk of LPIPS; None leaves LPIPS out.
        lpips_trunk: File with the weights of the trunk.
        niqe_parameters: File of `resshift.metrics.niqe`; None leaves NIQE out.
        user_installed: Figures that packages of the user measure: some of `USER_INSTALLED`.

    Raises:
        ImportError: A package is missing; the message names it and its licence.
    """

    def __init__(
        self,
        border: int = 0,
        lpips_net: str | None = None,
        lpips_trunk: str | None = None,
        niqe_parameters: str | None = None,
        user_installed: tuple[str, ...] = (),
    ) -> None:
        self.border = border
        self.lpips = Lpips(lpips_net, lpips_trunk) if lpips_net else None
        self.niqe = Niqe(niqe_parameters) if niqe_parameters else None
        self.st_lpips = _st_lpips() if "st_lpips" in user_installed else None
        self.from_pyiqa = {name: _from_pyiqa(name) for name in user_installed if name != "st_lpips"}

    def __call__(
        self, result: Image, gt: Image | None, hole: NDArray[np.bool_] | None = None
    ) -> dict[str, float]:
        """Return the figures of a picture, (H, W, 3) uint8; those that need the truth are left out without
        it.

        With a hole, (H, W), there are also PSNR (RGB) of its pixels and LPIPS averaged over it.

        NIQE is left out of pictures that are too small or too flat for it.

        Raises:
            ValueError: Picture and truth differ in size, or nothing is left inside the border.
        """
        figures: dict[str, float] = {}
        if gt is not None:
            figures |= against_truth(result, gt, self.border)
            for name, distance in (("lpips", self.lpips), ("st_lpips", self.st_lpips)):
                if distance is not None:
                    with torch.inference_mode():
                        figures[name] = float(distance(images.to_tensor(result), images.to_tensor(gt)))
            if hole is not None:
                figures["psnr_hole"] = psnr_ssim.psnr(result[hole][None], gt[hole][None])
                if self.lpips is not None:
                    with torch.inference_mode():
                        distances = self.lpips.at_pixels(images.to_tensor(result), images.to_tensor(gt))
                    figures["lpips_hole"] = float(distances[0, torch.from_numpy(hole)].mean())
        if self.niqe is not None and (distance := self.niqe(result, self.border)) is not None:
            figures["niqe"] = distance
        return figures | {name: call(result) for name, call in self.from_pyiqa.items()}


def against_truth(result: Image, gt: Image, border: int = 0) -> dict[str, float]:
    """Return PSNR and SSIM on luma and on RGB.

    Raises:
        ValueError: The sizes differ.
    """
    luma = psnr_ssim.luma(result), psnr_ssim.luma(gt)
    return {
        "psnr_y": psnr_ssim.psnr(*luma, border),
        "ssim_y": psnr_ssim.ssim(*luma, border),
        "psnr_rgb": psnr_ssim.psnr(result, gt, border),
        "ssim_rgb": psnr_ssim.ssim(result, gt, border),
    }


def _st_lpips() -> torch.nn.Module:
    try:
        from stlpips_pytorch import stlpips  # pyright: ignore[reportMissingImports]  # the user's
    except ImportError as error:
        raise ImportError(
            f"st_lpips needs the package stlpips-pytorch and what it imports ({error}): pip install "
            "stlpips-pytorch torchsummary ipython"
        ) from error
    network: Any = stlpips.LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    return network.eval().requires_grad_(False)


def _from_pyiqa(name: str) -> Callable[[Image], float]:
    try:
        import pyiqa  # pyright: ignore[reportMissingImports]  # never a dependency: see the module docstring
    except ImportError as error:
        raise ImportError(
            f"{name} needs the package pyiqa, whose licence forbids commercial use; if that suits you: pip "
            "install pyiqa"
        ) from error
    metric: Any = pyiqa.create_metric(name, device="cpu")

    def measure(result: Image) -> float:
        with torch.inference_mode():
            return float(metric(images.to_tensor(result) / 2 + 0.5))

    return measure
