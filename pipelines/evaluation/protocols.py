"""Frozen ways to measure, and what papers report for them.

A protocol fixes the border and names the trunk of LPIPS, because figures depend on both. The pictures are the
user's: `jobs/testset.py` makes those of ImageNet-Test.

Published figures are those of the papers' own tables (the PSNR and SSIM of ImageNet-Test are on luma, LPIPS
is AlexNet's). Users who ran released models again found them within the tolerance below, not to the third
digit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True, slots=True)
class Anchor:
    """What a paper reports.

    Fields:
        method: Name of the method as readers know it.
        source: Paper and table.
        figures: Reported figures by their names in `pipelines.evaluation.figures.FIGURES`.
        preset: Our name of that very model, whose figures should be these; None for other models.
    """

    method: str
    source: str
    figures: Mapping[str, float]
    preset: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """How a test set is measured; `pictures` is how many the published figures are means of."""

    name: str
    pictures: int | None
    border: int = 0
    lpips_net: str = "alex"
    anchors: tuple[Anchor, ...] = ()

    def measured_with(self, lpips_net: str | None) -> Protocol:
        """Return the protocol without published LPIPS when it is measured with another trunk, whose values
        mean something else.
        """
        if lpips_net == self.lpips_net:
            return self
        figures = [
            {name: value for name, value in anchor.figures.items() if name != "lpips"}
            for anchor in self.anchors
        ]
        return replace(
            self,
            anchors=tuple(
                replace(anchor, figures=kept) for anchor, kept in zip(self.anchors, figures, strict=True)
            ),
        )


# How far a run of the same weights may be from a paper and still count as the same.
TOLERANCE = {"psnr_y": 0.15, "ssim_y": 0.01, "lpips": 0.008, "clipiqa": 0.015, "musiq": 0.8}

_RSD = "RSD, table 16"
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        # 3,000 validation photos, centre crop of 256, the mild Real-ESRGAN degradation, 64 -> 256.
        Protocol(
            name="imagenet-test",
            pictures=3000,
            anchors=(
                Anchor(
                    method="ResShift-15",
                    source="ResShift (NeurIPS 2023), table 3",
                    figures={
                        "psnr_y": 25.01,
                        "ssim_y": 0.677,
                        "lpips": 0.231,
                        "clipiqa": 0.592,
                        "musiq": 53.660,
                    },
                    preset="realsr-x4-s15",
                ),
                Anchor(
                    method="SinSR",
                    source=_RSD,
                    figures={
                        "psnr_y": 24.56,
                        "ssim_y": 0.657,
                        "lpips": 0.221,
                        "clipiqa": 0.611,
                        "musiq": 53.357,
                    },
                ),
                Anchor(
                    method="Real-ESRGAN",
                    source=_RSD,
                    figures={
                        "psnr_y": 24.04,
                        "ssim_y": 0.665,
                        "lpips": 0.254,
                        "clipiqa": 0.523,
                        "musiq": 52.538,
                    },
                ),
            ),
        ),
        # RealSR at full size, x4.
        Protocol(
            name="realsr",
            pictures=100,
            anchors=(
                Anchor(
                    method="ResShift-15",
                    source="RSD, table 1",
                    figures={
                        "psnr_y": 26.49,
                        "ssim_y": 0.754,
                        "lpips": 0.360,
                        "clipiqa": 0.5958,
                        "musiq": 59.873,
                    },
                    preset="realsr-x4-s15",
                ),
            ),
        ),
        # MATLAB bicubic x4 of any pictures; classical super-resolution cuts the scale from every side.
        Protocol(name="bicubic-x4", pictures=None, border=4),
    )
}


@dataclass(frozen=True, slots=True)
class Reproduction:
    """Whether a figure of a released model is the published one."""

    published: float
    measured: float
    tolerance: float

    @property
    def agrees(self) -> bool:
        return abs(self.measured - self.published) <= self.tolerance


def reproduced(protocol: Protocol, model: str, means: Mapping[str, float]) -> dict[str, Reproduction]:
    """Compare the means of a released model with what its paper says; empty for every other model."""
    return {
        name: Reproduction(published, means[name], TOLERANCE[name])
        for anchor in protocol.anchors
        if anchor.preset == model
        for name, published in anchor.figures.items()
        if name in means and name in TOLERANCE
    }
