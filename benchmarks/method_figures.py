"""Draw the figures of docs/method.md from the code of the method.

    python benchmarks/method_figures.py            writes docs/method-schedule.svg and docs/method-chain.png

The schedule: eta_t for powers p and numbers of steps T, and the noise kappa sqrt(eta_t) for values of kappa.
The chain: a made picture x0, its x_t for T = 4 at two values of kappa, and y0, which is its bicubic
enlargement after a reduction by four.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import cv2
import numpy as np
import record
import torch
from numpy.typing import NDArray
from synthetic_photos import synthetic_photo
from torch import Tensor

from resshift import images, seeds
from resshift.degradation import imresize
from resshift.diffusion import q_sample
from resshift.resize.bicubic import upsample
from resshift.schedule import ShiftSchedule

SCHEDULE, CHAIN = record.ROOT / "docs/method-schedule.svg", record.ROOT / "docs/method-chain.png"
SIDE_PX = 96
_COLOURS = ("#1b6ca8", "#c2571a", "#2e7d32", "#7b3fa0")
_WIDTH, _HEIGHT, _LEFT, _TOP = 300, 200, 50, 30


def curves() -> list[tuple[str, dict[str, tuple[list[float], list[float]]]]]:
    """Return the panels: title, and {label: (t / T, values)}."""
    by_power = {f"p = {power}, T = 15": ShiftSchedule.released(15, power=power) for power in (0.3, 0.6, 1.0)}
    by_power |= {"p = 0.3, T = 4": ShiftSchedule.released(4)}
    by_kappa = {f"kappa = {kappa}": ShiftSchedule.released(15, kappa) for kappa in (0.5, 1.0, 2.0)}
    return [
        ("eta_t", {label: (_times(one), one.eta.tolist()) for label, one in by_power.items()}),
        (
            "kappa sqrt(eta_t)",
            {label: (_times(one), one.noise_std.tolist()) for label, one in by_kappa.items()},
        ),
    ]


def _times(schedule: ShiftSchedule) -> list[float]:
    return (np.arange(1, schedule.steps + 1) / schedule.steps).tolist()


def schedule_svg() -> str:
    """Return the figure of the schedule."""
    panels = "".join(_panel(i, *panel) for i, panel in enumerate(curves()))
    width, height = 2 * (_WIDTH + 2 * _LEFT), _HEIGHT + 2 * _TOP + 20
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="12">\n<rect width="{width}" height="{height}" fill="white"/>\n{panels}</svg>\n'
    )


def _panel(i: int, title: str, lines: dict[str, tuple[list[float], list[float]]]) -> str:
    left, highest = _LEFT + i * (_WIDTH + 2 * _LEFT), max(max(values) for _, values in lines.values())

    def points(times: Sequence[float], values: Sequence[float]) -> list[tuple[float, float]]:
        return [
            (round(left + _WIDTH * t, 1), round(_TOP + _HEIGHT * (1 - value / highest), 1))
            for t, value in zip(times, values, strict=True)
        ]

    out = [
        f'<rect x="{left}" y="{_TOP}" width="{_WIDTH}" height="{_HEIGHT}" fill="none" stroke="#999"/>',
        f'<text x="{left}" y="{_TOP - 10}">{title}</text>',
        f'<text x="{left + _WIDTH}" y="{_TOP + _HEIGHT + 18}" text-anchor="end">t / T</text>',
        f'<text x="{left - 6}" y="{_TOP + 4}" text-anchor="end">{highest:.2f}</text>',
        f'<text x="{left - 6}" y="{_TOP + _HEIGHT}" text-anchor="end">0</text>',
    ]
    for j, (label, (times, values)) in enumerate(lines.items()):
        found, colour = points(times, values), _COLOURS[j]
        path = " ".join(f"{x},{y}" for x, y in found)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        out += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in found]
        out.append(f'<text x="{left + 10}" y="{_TOP + 18 + 15 * j}" fill="{colour}">{label}</text>')
    return "\n".join(out) + "\n"


def chain_pictures() -> NDArray[np.uint8]:
    """Return the figure of the chain: a row for each kappa, x0, x_1 ... x_4 and y0 from left to right."""
    photo = images.decode(synthetic_photo(3, SIDE_PX, SIDE_PX)).pixels
    x0 = images.to_tensor(photo)
    small = imresize(photo.astype(np.float64), 0.25).clip(0, 255).round().astype(np.uint8)
    y0 = upsample(images.to_tensor(small), 4)
    return np.concatenate([_row(x0, y0, kappa) for kappa in (0.5, 2.0)])


def _row(x0: Tensor, y0: Tensor, kappa: float) -> NDArray[np.uint8]:
    schedule = ShiftSchedule.released(4, kappa)
    shown = [x0]
    for i in range(schedule.steps):
        noise = torch.from_numpy(seeds.philox("figure", i).standard_normal(tuple(x0.shape))).float()
        shown.append(q_sample(x0, y0, torch.tensor([i]), noise, schedule))
    return np.concatenate([images.from_tensor(one) for one in (*shown, y0)], axis=1)


def main() -> int:
    """Write both figures."""
    SCHEDULE.write_text(schedule_svg())
    cv2.imwrite(str(CHAIN), images.swap_red_blue(chain_pictures()), [cv2.IMWRITE_PNG_COMPRESSION, 9])
    print(f"wrote {SCHEDULE} and {CHAIN}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
