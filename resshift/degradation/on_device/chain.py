"""Clean pictures and records -> low-quality pictures, a batch at a time on one device.

    blur 1, resize 1, noise 1, JPEG 1
    blur 2, resize 2, noise 2           where they were drawn; a resize to the same size changes nothing
    resize 3, filter, JPEG 2            JPEG first or last
    noise 3                             before a JPEG that is last, or after bicubic alone

Every sample goes through every operation, and what was not drawn for it is dropped. The result equals
`resshift.degradation.degrade` up to the roundings of float32: tests/resshift/degradation/on_device states how
much that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from resshift.degradation.noise import normal_table
from resshift.degradation.on_device.blur import blur, kernels
from resshift.degradation.on_device.canvas import chosen, from_levels, to_levels
from resshift.degradation.on_device.jpeg import JpegTables, compress
from resshift.degradation.on_device.noise import add_noise, poisson_tables, random_levels
from resshift.degradation.on_device.plan import PULSE, Bounds, KernelPlan, Plan, decode
from resshift.degradation.on_device.resize import matlab_weights, resize
from resshift.degradation.recipe import DegradationRecipe


class _Tables(NamedTuple):
    """Constants on a device, 38 MB: tables of the noises, those of JPEG, and the matrix of `imresize`."""

    normal: Tensor
    poisson: Tensor
    jpeg: JpegTables
    matlab: Tensor


class DeviceDegradation:
    """Degrades batches of a recipe.

    Args:
        recipe: Recipe of a kind in `ON_DEVICE`, from which the records were drawn.
        side_px: Side of the clean pictures, a multiple of the scale.
    """

    def __init__(self, recipe: DegradationRecipe, side_px: int) -> None:
        self.recipe, self.side_px = recipe, side_px
        self.bounds = Bounds.of(recipe, side_px)
        self._tables: _Tables | None = None

    @torch.no_grad()
    def __call__(self, hq_u8: Tensor, records: Tensor) -> Tensor:
        """Return low-quality pictures; nothing waits for the host after the first call, which copies tables.

        Args:
            hq_u8: Clean pictures, (B, side_px, side_px, 3) uint8 on the device.
            records: Records from `plan.encode`, (B, PLAN_BYTES) uint8 on the same device.

        Returns:
            (B, side_px / scale, side_px / scale, 3) uint8.
        """
        tables = self._tables = self._tables or self._tables_on(hq_u8.device)
        plan = decode(records)
        # Half precision would round levels.
        with torch.autocast(hq_u8.device.type, enabled=False):
            hq = from_levels(hq_u8.permute(0, 3, 1, 2))
            lq = tables.matlab @ hq @ tables.matlab.mT
            sizes = torch.full_like(plan.chain, lq.shape[3], dtype=torch.int64)
            if self.recipe.kind != "bicubic":
                lq = chosen(plan.chain > 0, self._chain(hq, plan, tables), lq)
            if self.recipe.noise3_prob:
                (random,) = random_levels((plan.noise3,), lq.shape[3])
                lq = add_noise(lq, sizes, plan.noise3, random, tables.normal, tables.poisson)
            if self.recipe.kind != "bicubic":
                lq = chosen(plan.jpeg_last > 0, compress(lq, sizes, plan.quality2, tables.jpeg), lq)
            return to_levels(lq).to(torch.uint8).permute(0, 2, 3, 1).contiguous()

    def _tables_on(self, device: torch.device) -> _Tables:
        normal, poisson, matlab = (
            torch.from_numpy(table).to(device)
            for table in (normal_table(), poisson_tables(), matlab_weights(self.side_px, self.recipe.scale))
        )
        return _Tables(normal, poisson, JpegTables.on(device), matlab)

    def _kernels(self, plans: Sequence[KernelPlan]) -> list[Tensor]:
        """Return kernels of each plan, all made at once and cut to the side that a plan needs."""
        widest = max(self.bounds.kernels)
        margins = [(widest - side) // 2 for side in self.bounds.kernels]
        return [
            made[:, margin : widest - margin, margin : widest - margin]
            for made, margin in zip(kernels(plans, widest), margins, strict=True)
        ]

    def _chain(self, x: Tensor, plan: Plan, tables: _Tables) -> Tensor:
        """Return the pictures before the third noise and a JPEG that is last."""
        side = self.bounds.side_px
        plans = plan.kernel1, plan.kernel2, plan.kernel3
        of_pulses = [one.type == PULSE for one in plans]
        kernel1, kernel2, kernel3 = self._kernels(plans)
        small = self.side_px // self.recipe.scale
        size1, size2 = plan.size1.long(), plan.size2.long()
        size0, size3 = (torch.full_like(size1, size) for size in (self.side_px, small))
        random1, random2 = random_levels((plan.noise1, plan.noise2), side)
        laws = tables.normal, tables.poisson
        x = blur(x, size0, kernel1, of_pulses[0])
        x = resize(x, size0, size1, plan.mode1, side)
        x = add_noise(x, size1, plan.noise1, random1, *laws)
        x = compress(x, size1, plan.quality1, tables.jpeg)
        x = blur(x, size1, kernel2, of_pulses[1])
        x = resize(x, size1, size2, plan.mode2, side)
        x = add_noise(x, size2, plan.noise2, random2, *laws)
        x = chosen(plan.jpeg_last > 0, x, compress(x, size2, plan.quality2, tables.jpeg))
        x = resize(x, size2, size3, plan.mode3, small)
        return blur(x, size3, kernel3, of_pulses[2])
