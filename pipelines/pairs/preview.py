"""A page of what a preset trains on: clean and degraded pictures side by side, with everything that was
drawn for each.

From shards these are the first pairs that the run would see; from a folder the same crop and degradation,
photos in the order of a hash of their names. One HTML file that loads nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.testset import choose
from pipelines.pages import Embedded, embed, render
from pipelines.pairs.maker import pair_of
from pipelines.pairs.order import stream
from pipelines.shards import sources
from pipelines.shards.parquet import read_manifest, row_groups
from pipelines.shards.pictures import Photo, read_pictures
from pipelines.shards.sources import Item
from resshift.config import RunConfig
from resshift.degradation.apply import Gray, Operation
from resshift.degradation.jpeg import Jpeg
from resshift.degradation.kernels import Blur, GaussianKernel, PulseKernel, SincKernel, kernel
from resshift.degradation.masks import Border, Box, Mask, Stroke
from resshift.degradation.noise import Noise
from resshift.degradation.resize import Resize
from resshift.images import ImageError, ImageLimits, Picture, encode
from resshift.pairs.training_pair import TrainingPair
from resshift.storage import StorageError


@dataclass(frozen=True, slots=True)
class Sample:
    """A photo and the pair it gives, or why it gives none."""

    key: str
    pair: TrainingPair | None
    problem: str = ""


def from_shards(root: str, config: RunConfig, num: int) -> Iterator[Sample]:
    """Yield the first pairs of a run.

    Raises:
        StorageError: The shards cannot be read.
        ValueError: There are none.
    """
    groups = row_groups(read_manifest(root))
    for piece in stream(groups, config.train.seed, config.train.batch_size, 0, num):
        photos = [photo for group in piece.groups for photo in read_pictures(root, group)]
        for source in piece.sources.tolist():
            yield _sample(photos[source], config, piece.epoch)


def from_photos(items: Sequence[Item], config: RunConfig, num: int) -> Iterator[Sample]:
    """Yield pairs of some photos; one that cannot be read is a sample with a problem."""
    for item in choose(items, config.train.seed)[:num]:
        try:
            yield _sample(Photo(item.key, sources.read(item, ImageLimits().max_bytes)), config, 0)
        except StorageError as error:
            yield Sample(item.key, None, f"{error.reason}: {error}")


def _sample(photo: Photo, config: RunConfig, epoch: int) -> Sample:
    key, seed = photo.key, config.train.seed
    try:
        return Sample(key, pair_of(photo, key, epoch, seed, config.data, config.degradation))
    except ImageError as error:
        return Sample(key, None, f"{error.reason}: {error}")


def preview_page(samples: Sequence[Sample], config: RunConfig, facts: dict[str, str]) -> str:
    """Render the page; write it as UTF-8.

    Args:
        samples: Samples in the order of the page.
        config: Configuration of the run whose pairs they are.
        facts: Facts that a reader needs to make the page again.
    """
    side_px, scale = config.data.crop_px, config.degradation.scale
    return render(
        "pairs/preview.html",
        title=f"Training pairs of {config.preset}",
        lead=f"Clean crops of {side_px} px and what the recipe makes of them, {side_px // scale} px, shown "
        "at the same size. Below each pair: what was drawn for it, in the order in which it is applied.",
        facts=facts,
        cards=[_card(sample) for sample in samples],
    )


def _card(sample: Sample) -> dict[str, Any]:
    """Return the values of a sample that the template shows."""
    if sample.pair is None:
        return {"key": sample.key, "problem": sample.problem}
    pair = sample.pair
    ops = () if pair.params is None else pair.params.ops  # a stored pair does not say what was drawn
    pictures = {"clean": pair.hq_u8, "degraded": pair.lq_u8} | (
        {} if pair.mask_u8 is None else {"mask": pair.mask_u8[..., None]}
    )
    return {
        "key": sample.key,
        "problem": "",
        "pictures": {what: _embed(pixels) for what, pixels in pictures.items()},
        "steps": [{"op": op.op, "text": describe(op), "kernel": _kernel(op)} for op in ops],
    }


def _embed(pixels: NDArray[np.uint8]) -> Embedded:
    height, width = pixels.shape[:2]
    return embed(encode(Picture(pixels=pixels), "png"), "image/png", width, height)


def _kernel(op: Operation) -> Embedded | None:
    if isinstance(op, Blur) and not isinstance(op.kernel, PulseKernel):
        return _embed(kernel_picture(op.kernel))
    return None


def describe(op: Operation) -> str:
    """Return the drawn parameters of one operation as one line."""
    match op:
        case Blur(kernel=GaussianKernel() as k):
            axes = (
                f"σ {k.sigma_x:.2f}"
                if k.sigma_x == k.sigma_y
                else f"σ {k.sigma_x:.2f}, {k.sigma_y:.2f} at {np.degrees(k.theta):.0f}°"
            )
            return f"{k.type.replace('_', ' ')} {k.size}×{k.size}, {axes}" + (
                "" if k.beta == 1 else f", β {k.beta:.2f}"
            )
        case Blur(kernel=SincKernel() as k):
            return f"sinc {k.size}×{k.size}, ω {k.omega:.2f}"
        case Blur():
            return "none"
        case Resize(mode="matlab_bicubic"):
            return "MATLAB bicubic to the final size"
        case Resize(of="lq", factor=1.0):
            return f"{op.mode} to the final size"
        case Resize():
            return f"{op.mode}, {op.factor:.3f} of the {'clean' if op.of == 'hq' else 'final'} side"
        case Noise():
            level = f"σ {op.level:.1f}/255" if op.kind == "gaussian" else f"scale {op.level:.2f}"
            return f"{op.kind}, {level}{', grey' if op.gray else ''}"
        case Jpeg():
            return f"quality {op.quality}"
        case Gray():
            return "both pictures"
        case Mask():
            names = {Stroke: "stroke", Box: "box", Border: "border"}
            kinds = [names[type(shape)] for shape in op.shapes]
            return ", ".join(
                f"{kinds.count(kind)} {kind}{'s' if kinds.count(kind) > 1 else ''}"
                for kind in dict.fromkeys(kinds)
            )


def kernel_picture(spec: GaussianKernel | SincKernel) -> NDArray[np.uint8]:
    """Return a kernel as a grey picture, (size, size, 1): black is 0 or below, white the largest weight,
    square root between.
    """
    weights = kernel(spec)
    return (np.sqrt(weights.clip(0, None) / weights.max()) * 255 + 0.5).astype(np.uint8)[..., None]
