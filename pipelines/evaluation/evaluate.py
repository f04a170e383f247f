"""How good a model is: upscale low-quality pictures on Ray, beside bicubic upsampling and perhaps another
model, and measure each result.

The bicubic baseline is MATLAB's imresize of the 8-bit picture, clipped and rounded. Beside a model that fills
holes stands Telea's method instead ("An Image Inpainting Technique Based on the Fast Marching Method", 2004).
Figures are those of
`pipelines.evaluation.figures`. A record of a picture is a function of its bytes, the models and the options:
every replica computes on one CPU thread, so its numbers do not depend on how many there are, or on one of
them being lost on the way.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import posixpath
import re
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import cv2
import numpy as np
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from pipelines.cluster.capacity import has_gpus, reachable
from pipelines.cluster.granted import granted_device
from pipelines.evaluation.figures import Image, Judge
from pipelines.evaluation.results import METHODS, Method, Record, versions
from resshift import images, seeds, storage
from resshift.config import Sampling
from resshift.degradation import imresize
from resshift.images import ImageError, ImageReason, Picture
from resshift.images.identify import identify, is_named_as_picture, read_head
from resshift.images.masks import with_mask
from resshift.models import ModelFiles
from resshift.storage import Entry, StorageError
from resshift.upscaler import Upscaler

_logger = logging.getLogger(__name__)
_MOST_REPLICAS_ON_CPUS = 8  # each holds the models and torch: 1 GB
# How names of one scene differ in published sets: 0801x4 and 0801 (DIV2K), img_001_SRF_4_LR and _HR (Set5,
# Set14, BSD100), Canon_011_LR4 and Canon_011_HR (RealSR), DSC_1_x1 and DSC_1_x4 (DRealSR).
_RESOLUTION = re.compile(r"((_SRF_\d+)?_(LR|HR|LQ|GT)\d*|_?x\d+)$", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """What is evaluated and how; stands in every report."""

    model: str
    against: str | None = None
    sampling: Sampling = Sampling()
    border: int = 0
    lpips_net: str | None = None
    lpips_trunk: str | None = None
    niqe_parameters: str | None = None
    user_installed: tuple[str, ...] = ()

    def judge(self) -> Judge:
        """Return what measures."""
        return Judge(self.border, self.lpips_net, self.lpips_trunk, self.niqe_parameters, self.user_installed)


def facts_of(options: EvaluateOptions, model: ModelFiles, other: ModelFiles | None) -> dict[str, Any]:
    """Return what summary.json says besides figures, and what two reports that are merged have in common.

    Args:
        options: Options of the evaluation.
        model: Files of `options.model`.
        other: Files of `options.against`, if there is one.
    """
    names = {
        "bicubic": "Telea" if model.fills_holes else "bicubic",
        "ours": model.name,
        "against": other.name if other else "",
    }
    if other is not None and other.name == model.name:
        names |= {"ours": options.model, "against": str(options.against)}
    return {
        "model": {
            "name": model.name,
            "identity": model.identity(),
            "scale": model.config.scale,
            "steps": model.config.steps,
        },
        "against": {"name": other.name, "identity": other.identity()} if other else None,
        "names": names,
        "settings": {
            "seed": options.sampling.seed,
            "steps": options.sampling.steps,
            "sampler": options.sampling.sampler,
            "fidelity": options.sampling.fidelity,
            "tile_px": options.sampling.tile_px,
            "border": options.border,
            "lpips_net": options.lpips_net,
            "user_installed": options.user_installed,
        },
        "versions": versions(),
    }


def folders_of(source: str) -> list[str]:
    """Return the places of `LQ_DIR[:GT_DIR[:MASK_DIR]]`."""
    return re.split(r":(?!//)", source)  # the colon of s3:// separates nothing


@dataclass(frozen=True, slots=True)
class PictureSet:
    """Low-quality pictures and, when there are any, the trees with their truths and their masks."""

    name: str
    lq_root: str
    gt_root: str | None
    mask_root: str | None = None

    @classmethod
    def parse(cls, text: str) -> PictureSet:
        """Read `[NAME=]LQ_DIR[:GT_DIR[:MASK_DIR]]`; the name is by default the last part of LQ_DIR.

        Raises:
            ValueError: There are more than three places.
        """
        named = re.fullmatch(r"([\w.-]+)=(.+)", text)
        lq_root, *rest = folders_of(named[2] if named else text)
        if len(rest) > 2 or not lq_root:
            raise ValueError(f"a test set is [NAME=]LQ_DIR[:GT_DIR[:MASK_DIR]], got {text!r}")
        name = named[1] if named else lq_root.rstrip("/").rsplit("/", 1)[-1]
        return cls(name, lq_root, *(rest or [None]))


@dataclass(frozen=True, slots=True)
class Pair:
    """A low-quality picture of a test set and, when there are any, its truth and its mask."""

    key: str
    lq_uri: str
    gt_uri: str | None
    set: str = ""
    mask_uri: str | None = None


def pairs_of(sets: Sequence[PictureSet]) -> list[Pair]:
    """Return all pairs of all test sets.

    Raises:
        ValueError: As for `pair_up`, or two sets have one name.
    """
    names = [one.name for one in sets]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two test sets are called {name!r}: name them, NAME=LQ_DIR:GT_DIR")
    return [
        replace(pair, set=one.name)
        for one in sets
        for pair in pair_up(one.lq_root, one.gt_root, one.mask_root)
    ]


def pair_up(lq_root: str, gt_root: str | None, mask_root: str | None = None) -> list[Pair]:
    """Match pictures of the trees by their path without extension; one that has no such partner, by what is
    left of it without the sign of its resolution, as test sets are published (`_RESOLUTION`).

    Raises:
        ValueError: There are no pictures, one has no truth or no mask, or two have the same name; the message
            names them.
    """
    lq = _by_stem(lq_root)
    if not lq:
        raise ValueError(f"no files under {lq_root}")
    trees = {
        what: _by_stem(root) for what, root in (("truth", gt_root), ("mask", mask_root)) if root is not None
    }
    for what, tree in trees.items():
        tree |= _by_name_of_scene(lq.keys() - tree.keys(), tree)
        if missing := sorted(lq.keys() - tree.keys()):
            root = gt_root if what == "truth" else mask_root
            raise ValueError(
                f"{len(missing)} pictures of {lq_root} have no {what} in {root}: {', '.join(missing[:5])}"
            )
    gt, masks = trees.get("truth", {}), trees.get("mask", {})
    return [Pair(stem, uri, gt.get(stem), mask_uri=masks.get(stem)) for stem, uri in lq.items()]


def _by_stem(root: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in storage.list_entries(root):
        if not is_named_as_picture(entry.key) and not _is_picture(entry):
            _logger.info("left out of %s, as it is no picture: %s", root, storage.printable(entry.key))
            continue
        stem = posixpath.splitext(storage.printable(entry.key))[0]
        if stem in found:
            raise ValueError(f"{found[stem]} and {entry.uri} have the same name without extension")
        found[stem] = entry.uri
    return found


def _by_name_of_scene(stems: Iterable[str], tree: Mapping[str, str]) -> dict[str, str]:
    """Return the files of a tree that stems belong to, where only one has that name without a resolution."""
    scenes: dict[str, list[str]] = {}
    for stem, uri in tree.items():
        scenes.setdefault(_RESOLUTION.sub("", stem), []).append(uri)
    named = ((stem, scenes.get(_RESOLUTION.sub("", stem), [])) for stem in stems)
    return {stem: uris[0] for stem, uris in named if len(uris) == 1}


def _is_picture(entry: Entry) -> bool:
    try:
        identify(read_head(functools.partial(storage.read_first_bytes, entry.uri)))
    except ImageError as error:
        return error.reason is ImageReason.UNSUPPORTED_FORMAT
    return True


def bicubic_resized(rgb: Image, scale: float) -> Image:
    """MATLAB's imresize of an 8-bit picture, clipped and rounded: (H, W, 3) uint8 -> (H scale, W scale, 3)
    uint8.
    """
    resized = imresize(rgb.astype(np.float64), scale)
    return (resized.clip(0, 255) + 0.5).astype(np.uint8)


def telea_filled(rgb: Image, hole: NDArray[np.bool_]) -> Image:
    """Fill a hole from its edge inwards: (H, W, 3) and (H, W) -> (H, W, 3)."""
    return np.asarray(cv2.inpaint(rgb, hole.astype(np.uint8), 5, cv2.INPAINT_TELEA), np.uint8)


class _SizeMismatch(ValueError):
    """The truth is not as many times larger as the model makes it."""


def _failed(pair: Pair, reason: str, message: str) -> Record:
    return {"set": pair.set, "key": pair.key, "status": "failed", "reason": reason, "message": message}


class EvaluateStage:
    """A replica: loads models and metrics once, then evaluates pair after pair."""

    def __init__(self, options: EvaluateOptions) -> None:
        torch.set_num_threads(1)  # another number sums in another order
        self.options = options
        device = granted_device()
        self.upscaler = Upscaler.from_pretrained(options.model, device=device)
        self.other = Upscaler.from_pretrained(options.against, device=device) if options.against else None
        self.judge = options.judge()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        pair = Pair(**json.loads(row["pair"]))
        pictures: dict[str, bytes] = dict.fromkeys(("lq", *METHODS, "gt"), b"")
        try:
            record, made = self._evaluate(pair)
            pictures |= made
        except (ImageError, StorageError) as error:
            record = _failed(pair, str(error.reason), str(error))
        except _SizeMismatch as error:
            record = _failed(pair, "size_mismatch", str(error))
        except Exception:
            # The boundary of the stage: one picture must not end the report. The record keeps the traceback.
            record = _failed(pair, "evaluate_error", traceback.format_exc(limit=-4))
        return {"record": json.dumps(record)} | pictures

    def _evaluate(self, pair: Pair) -> tuple[Record, dict[str, bytes]]:
        lq = images.rgb_u8(images.decode(storage.read_bytes(pair.lq_uri)))
        gt = None if pair.gt_uri is None else images.rgb_u8(images.decode(storage.read_bytes(pair.gt_uri)))
        (height, width), scale = lq.shape[:2], self.upscaler.scale
        if gt is not None and gt.shape[:2] != (scale * height, scale * width):
            expected = f"{width}x{height} times {scale} is {scale * width}x{scale * height}"
            raise _SizeMismatch(f"the truth is {gt.shape[1]}x{gt.shape[0]}, and {expected}")
        picture = Picture(pixels=lq)
        if pair.mask_uri is not None:
            picture = with_mask(picture, images.decode(storage.read_bytes(pair.mask_uri)))
        hole, asked = picture.mask, self.options.sampling
        sampling = replace(asked, seed=seeds.derive(asked.seed, "picture", pair.key))
        started = time.monotonic()
        ours = self.upscaler.upscale(picture, sampling).pixels
        record: Record = {
            "set": pair.set,
            "key": pair.key,
            "status": "ok",
            "reason": "",
            "message": "",
            "seconds": time.monotonic() - started,
            "width": ours.shape[1],
            "height": ours.shape[0],
            "device": self.upscaler.device.type,
        }
        baseline = bicubic_resized(lq, scale) if hole is None else telea_filled(lq, hole)
        results: dict[Method, Image] = {"bicubic": baseline, "ours": ours}
        if self.other is not None:
            results["against"] = self.other.upscale(picture, replace(sampling, steps=None)).pixels
        for method, result in results.items():
            record[method] = self.judge(result, gt, hole if scale == 1 else None)
        pictures = {"lq": lq} | results | ({} if gt is None else {"gt": gt})
        return record, {name: images.encode(Picture(pixels=pixels)) for name, pixels in pictures.items()}


def default_replicas(num_pairs: int) -> int:
    """Return how many replicas the connected cluster has room for: one a GPU, or one a CPU of this machine up
    to eight.
    """
    gpus = int(reachable().get("GPU", 0))
    return max(1, min(num_pairs, gpus or min(os.cpu_count() or 1, _MOST_REPLICAS_ON_CPUS)))


def evaluate(
    pairs: Sequence[Pair], options: EvaluateOptions, replicas: int = 1
) -> Iterator[tuple[Record, dict[str, bytes]]]:
    """Evaluate with Ray Data and yield (record, encoded pictures) of each pair, in no order."""
    items = [{"pair": json.dumps(asdict(pair))} for pair in pairs]
    stage: Any = EvaluateStage  # Ray's types do not know classes with constructor arguments
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        stage,
        fn_constructor_kwargs={"options": options},
        compute=ActorPoolStrategy(size=replicas),
        num_gpus=int(has_gpus()),
    )
    for row in dataset.iter_rows():
        yield json.loads(row["record"]), {name: row[name] for name in ("lq", *METHODS, "gt")}
