"""Measurement on a fixed set of pictures while a run trains, divided among all workers.

The set is `LQ_DIR:GT_DIR` (pairs by file name), or shards of `jobs/prepare.py` that training does not see,
degraded once and for all with the run's recipe. Each picture is the centre of what is there, of the size that
the network is trained on; its noise is a function of (seed, key), so two validations differ by the weights
alone and the number of workers changes nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from pipelines.evaluation.evaluate import bicubic_resized, folders_of, pair_up
from pipelines.pairs.photos import read_groups
from pipelines.shards.parquet import read_manifest, row_groups
from resshift import images, storage
from resshift.config import ConfigError, DataConfig, ValidationConfig
from resshift.degradation import DegradationRecipe
from resshift.images import ImageError, Picture
from resshift.metrics import psnr_ssim
from resshift.metrics.lpips import Lpips
from resshift.pairs.training_pair import make_pair

logger = logging.getLogger(__name__)
Image = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A held-out pair: low-quality (h, w, 3), truth (H, W, 3), and for inpainting the mask (h, w); uint8."""

    key: str
    lq_u8: Image
    hq_u8: Image
    mask_u8: Image | None = None


class Renderer(Protocol):
    """A learner that makes pictures from pairs with its averaged weights."""

    def render(self, batch: Mapping[str, Tensor], keys: Sequence[str]) -> Tensor:
        """Return pictures, (B, 3, H, W), about [-1, 1]. With sharded weights a collective operation."""
        ...


def held_out(source: str, limit: int, seed: int, data: DataConfig, recipe: DegradationRecipe) -> list[Held]:
    """Load the fixed set.

    Args:
        source: `LQ_DIR:GT_DIR`, or a directory of shards.
        limit: Largest number of pictures.
        seed: Seed of the degradation, for shards.
        data: Crop settings of the run.
        recipe: Degradation of the run.

    Raises:
        ConfigError: Nothing fits, or the source cannot serve this recipe.
    """
    lq_root, *rest = folders_of(source)
    if len(rest) > 1:
        raise ConfigError(f"--val must be LQ_DIR:GT_DIR or a directory of shards, got {source!r}")
    if rest and recipe.kind == "inpainting":
        raise ConfigError("--val LQ_DIR:GT_DIR has no masks; inpainting takes a directory of shards")
    found = (
        _from_folders(lq_root, rest[0], limit, data.crop_px, recipe.scale)
        if rest
        else _from_shards(lq_root, limit, seed, data, recipe)
    )
    if not found:
        raise ConfigError(
            f"no picture of {source} is large enough: {data.crop_px} x {data.crop_px} pixels after upscaling"
        )
    return found


def _from_folders(lq_root: str, gt_root: str, limit: int, crop_px: int, scale: int) -> list[Held]:
    try:
        pairs = pair_up(lq_root, gt_root)
    except ValueError as error:
        raise ConfigError(f"--val: {error}") from None
    found: list[Held] = []
    for pair in sorted(pairs, key=lambda pair: pair.key):
        try:
            lq, gt = (
                images.rgb_u8(images.decode(storage.read_bytes(uri)))
                for uri in (pair.lq_uri, pair.gt_uri or "")
            )
        except ImageError as error:
            logger.warning("validation picture %s is left out: %s", pair.key, error)
            continue
        if gt.shape[:2] != (lq.shape[0] * scale, lq.shape[1] * scale):
            logger.warning(
                "validation picture %s is left out: %s is not %d times %s",
                pair.key,
                gt.shape[:2],
                scale,
                lq.shape[:2],
            )
            continue
        side = crop_px // scale
        if min(lq.shape[:2]) >= side:
            top, left = (lq.shape[0] - side) // 2, (lq.shape[1] - side) // 2
            inside = (slice(top, top + side), slice(left, left + side))
            outside = tuple(slice(part.start * scale, part.stop * scale) for part in inside)
            found.append(Held(pair.key, lq[inside], gt[outside]))
        if len(found) == limit:
            break
    return found


def _from_shards(root: str, limit: int, seed: int, data: DataConfig, recipe: DegradationRecipe) -> list[Held]:
    found: list[Held] = []
    for group in row_groups(read_manifest(root)):
        for photo in read_groups(root, [group])[0]:
            if len(found) == limit:
                return found
            try:
                pair = make_pair(photo.data, photo.key, 0, seed, data, recipe)
            except ImageError as error:
                logger.warning("validation picture %s is left out: %s", photo.key, error)
            else:
                found.append(Held(photo.key, pair.lq_u8, pair.hq_u8, pair.mask_u8))
    return found


@dataclass(frozen=True, slots=True)
class Validated:
    """Means over the set, and pictures to look at: rows of low quality, result, truth."""

    means: dict[str, float]
    grid_u8: Image | None
    grid_png: bytes | None


class Validator:
    """Validates a learner on this worker's share of the set.

    Args:
        pictures: Pictures of the whole set.
        config: Settings of the validation.
        lpips: LPIPS, measured too when given.
        device: Device of the learner.
        rank: Rank of this worker.
        num_ranks: Number of workers.
        micro_batch: Number of pictures at a time.
        before_round: Function that is called before each round of pictures.
    """

    def __init__(
        self,
        pictures: Sequence[Held],
        config: ValidationConfig,
        lpips: Lpips | None,
        device: torch.device,
        rank: int,
        num_ranks: int,
        micro_batch: int,
        before_round: Callable[[], None] = lambda: None,
    ) -> None:
        if config.best == "lpips" and lpips is None:
            raise ConfigError("validation.best=lpips needs an LPIPS network: loss.lpips must not be 0")
        self.pictures = pictures
        self.config = config
        self.lpips = lpips
        self.device = device
        self.rank = rank
        self.num_ranks = num_ranks
        self.micro_batch = micro_batch
        self.before_round = before_round

    @property
    def higher_is_better(self) -> bool:
        return self.config.best != "lpips"

    def __call__(self, renderer: Renderer) -> Validated | None:
        """Render and measure; a collective operation. Returns None on all workers but the first."""
        # Every worker renders equally often, the last picture again where there is none left: sharded weights
        # are gathered together.
        rounds = -(-len(self.pictures) // (self.num_ranks * self.micro_batch))
        own: list[tuple[int, dict[str, float], Image | None]] = []
        for i_round in range(rounds):
            self.before_round()
            first = (i_round * self.num_ranks + self.rank) * self.micro_batch
            indices = [i for i in range(first, first + self.micro_batch) if i < len(self.pictures)]
            chosen = indices or [len(self.pictures) - 1]
            results = self._render(renderer, [self.pictures[i] for i in chosen])
            for i, result in zip(indices, results, strict=False):
                shown = images.from_tensor(result[None]) if i < self.config.grid else None
                own.append((i, self._measure(result, self.pictures[i].hq_u8), shown))
        gathered: list[Any] = [own]
        if self.num_ranks > 1:
            gathered = [None] * self.num_ranks
            dist.all_gather_object(gathered, own)
        if self.rank:
            return None
        return self._summary(sorted((item for part in gathered for item in part), key=lambda item: item[0]))

    def _render(self, renderer: Renderer, held: Sequence[Held]) -> list[Tensor]:
        batch = {"lq": np.stack([item.lq_u8 for item in held]), "hq": np.stack([item.hq_u8 for item in held])}
        masks = [item.mask_u8 for item in held if item.mask_u8 is not None]
        if masks:
            batch["mask"] = np.stack(masks)
        with torch.no_grad():
            tensors = {name: torch.from_numpy(value).to(self.device) for name, value in batch.items()}
            return list(renderer.render(tensors, [item.key for item in held]).float().clamp(-1, 1))

    def _measure(self, result: Tensor, hq_u8: Image) -> dict[str, float]:
        ours = images.from_tensor(result[None])
        y, y_hq = psnr_ssim.luma(ours), psnr_ssim.luma(hq_u8)
        # Equal pictures have an infinite PSNR; 100 dB keeps the mean readable, and is beyond what 8 bits can
        # show.
        figures = {
            "psnr_y": min(psnr_ssim.psnr(y, y_hq, self.config.border), 100.0),
            "ssim_y": psnr_ssim.ssim(y, y_hq, self.config.border),
        }
        if self.lpips is not None:
            with torch.no_grad():
                figures["lpips"] = float(self.lpips(result[None], images.to_tensor(hq_u8).to(self.device)))
        return figures

    def _summary(self, items: Sequence[tuple[int, dict[str, float], Image | None]]) -> Validated:
        means = {name: float(np.mean([figures[name] for _, figures, _ in items])) for name in items[0][1]}
        rows = [
            np.concatenate(
                [_as_large_as(self.pictures[i].lq_u8, shown), shown, self.pictures[i].hq_u8], axis=1
            )
            for i, _, shown in items
            if shown is not None
        ]
        if not rows:
            return Validated(means, None, None)
        grid = np.concatenate(rows, axis=0)
        return Validated(means, grid, images.encode(Picture(pixels=grid)))


def _as_large_as(lq_u8: Image, result: Image) -> Image:
    return lq_u8 if lq_u8.shape == result.shape else bicubic_resized(lq_u8, result.shape[0] / lq_u8.shape[0])
