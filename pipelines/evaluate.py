"""How good a model is: upscale low-quality pictures, compare with the truth and with bicubic upsampling, per picture and on average.

The bicubic baseline is MATLAB's imresize of the 8-bit picture, clipped and rounded. Metrics are those of `resshift.metrics` on 8-bit
pictures, and LPIPS with the trunk that the caller names; LPIPS values of different trunks cannot be compared.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import ActorPoolStrategy

from pipelines.capacity import has_gpus
from pipelines.page import Card
from resshift import images, metrics, seeds, storage
from resshift.degradation import imresize
from resshift.images import ImageError, Picture
from resshift.losses import Lpips
from resshift.storage import StorageError
from resshift.upscaler import Upscaler

Image = NDArray[np.uint8]
FIGURES = ("psnr_y", "ssim_y", "psnr_rgb", "lpips")
_LABELS = {"psnr_y": "PSNR-Y", "ssim_y": "SSIM-Y", "psnr_rgb": "PSNR-RGB", "lpips": "LPIPS"}
_UNITS = {"psnr_y": "{:.2f} dB", "ssim_y": "{:.4f}", "psnr_rgb": "{:.2f} dB", "lpips": "{:.4f}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateOptions:
    """What is evaluated and how; stands in every report."""

    model: str
    seed: int = 0
    tile_px: int | None = None
    border: int = 0
    lpips_net: str | None = None
    lpips_trunk: str | None = None


@dataclass(frozen=True, slots=True)
class Pair:
    """A low-quality picture and, when there is one, its truth."""

    key: str
    lq_uri: str
    gt_uri: str | None


def pair_up(lq_root: str, gt_root: str | None) -> list[Pair]:
    """Match pictures of two trees by their path without extension.

    Raises:
        ValueError: nothing to evaluate, a picture without its truth, or two with the same name; the message names them.
    """
    lq = _by_stem(lq_root)
    if not lq:
        raise ValueError(f"no files under {lq_root}")
    if gt_root is None:
        return [Pair(stem, uri, None) for stem, uri in lq.items()]
    gt = _by_stem(gt_root)
    missing = sorted(lq.keys() - gt.keys())
    if missing:
        raise ValueError(f"{len(missing)} pictures of {lq_root} have no truth in {gt_root}: {', '.join(missing[:5])}")
    return [Pair(stem, uri, gt[stem]) for stem, uri in lq.items()]


def _by_stem(root: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in storage.list_entries(root):
        stem = posixpath.splitext(storage.printable(entry.key))[0]
        if stem in found:
            raise ValueError(f"{found[stem]} and {entry.uri} have the same name without extension")
        found[stem] = entry.uri
    return found


def rgb_u8(picture: Picture) -> Image:
    """Return the pixels as (H, W, 3) uint8."""
    pixels = picture.pixels if picture.pixels.dtype == np.uint8 else (picture.pixels / 257 + 0.5).astype(np.uint8)
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def bicubic_resized(rgb: Image, scale: float) -> Image:
    """MATLAB's imresize of an 8-bit picture, clipped and rounded: (H, W, 3) uint8 -> (H scale, W scale, 3) uint8."""
    resized = imresize(rgb.astype(np.float64), scale)
    return (resized.clip(0, 255) + 0.5).astype(np.uint8)


def compare(result: Image, gt: Image, border: int, lpips: Lpips | None) -> dict[str, float]:
    """Return the figures of one picture against the truth; without LPIPS when there is no trunk.

    Raises:
        ValueError: sizes differ.
    """
    y_result, y_gt = metrics.luma(result), metrics.luma(gt)
    figures = {
        "psnr_y": metrics.psnr(y_result, y_gt, border),
        "ssim_y": metrics.ssim(y_result, y_gt, border),
        "psnr_rgb": metrics.psnr(result, gt, border),
    }
    if lpips is not None:
        with torch.inference_mode():
            figures["lpips"] = float(lpips(images.to_tensor(result), images.to_tensor(gt)))
    return figures


class EvaluateStage:
    """A replica: loads the model and the LPIPS trunk once, then evaluates pair after pair."""

    def __init__(self, options: EvaluateOptions, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.options = options
        self.upscaler = Upscaler.from_pretrained(options.model)
        self.lpips = Lpips(options.lpips_net, options.lpips_trunk) if options.lpips_net else None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        pair = Pair(**json.loads(row["pair"]))
        record: dict[str, Any] = {"key": pair.key, "status": "ok", "reason": "", "message": ""}
        empty = dict.fromkeys(("lq", "bicubic", "ours", "gt"), b"")
        try:
            values, pictures = self._evaluate(pair)
        except (ImageError, StorageError) as error:
            record |= {"status": "failed", "reason": str(error.reason), "message": str(error)}
            return {"record": json.dumps(record)} | empty
        except Exception:
            # The boundary of the stage: one picture must not end the report. The traceback is kept in the row.
            record |= {"status": "failed", "reason": "evaluate_error", "message": traceback.format_exc(limit=-4)}
            return {"record": json.dumps(record)} | empty
        return {"record": json.dumps(record | values)} | empty | pictures

    def _evaluate(self, pair: Pair) -> tuple[dict[str, Any], dict[str, bytes]]:
        lq = rgb_u8(images.decode(storage.read_bytes(pair.lq_uri)))
        started = time.monotonic()
        seed = seeds.derive(self.options.seed, "picture", pair.key)
        ours = self.upscaler(lq, seed=seed, tile_px=self.options.tile_px)
        values: dict[str, Any] = {"seconds": time.monotonic() - started, "width": ours.shape[1], "height": ours.shape[0]}
        bicubic = bicubic_resized(lq, self.upscaler.scale)
        pictures = {"lq": lq, "bicubic": bicubic, "ours": ours}
        if pair.gt_uri is not None:
            gt = rgb_u8(images.decode(storage.read_bytes(pair.gt_uri)))
            values["bicubic"] = compare(bicubic, gt, self.options.border, self.lpips)
            values["ours"] = compare(ours, gt, self.options.border, self.lpips)
            pictures["gt"] = gt
        return values, {name: images.encode(Picture(pixels=pixels)) for name, pixels in pictures.items()}


def evaluate(pairs: Sequence[Pair], options: EvaluateOptions, replicas: int = 1) -> Iterator[tuple[dict[str, Any], dict[str, bytes]]]:
    """Evaluate with Ray Data and yield (record, encoded pictures) of each pair."""
    gpus = int(has_gpus())
    threads = 1 if gpus else max(1, (os.cpu_count() or 1) // replicas)
    items = [{"pair": json.dumps({name: getattr(pair, name) for name in ("key", "lq_uri", "gt_uri")})} for pair in pairs]
    stage: Any = EvaluateStage  # Ray's types do not know classes with constructor arguments
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
        stage,
        fn_constructor_kwargs={"options": options, "num_threads": threads},
        compute=ActorPoolStrategy(size=replicas),
        num_gpus=gpus,
    )
    for row in dataset.iter_rows():
        yield json.loads(row["record"]), {name: row[name] for name in ("lq", "bicubic", "ours", "gt")}


def averages(records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return {"bicubic": {figure: mean}, "ours": {...}} over the pictures that have figures."""
    result: dict[str, dict[str, float]] = {}
    for method in ("bicubic", "ours"):
        rows = [record[method] for record in records if method in record]
        result[method] = {name: float(np.mean([row[name] for row in rows])) for name in FIGURES if rows and name in rows[0]}
    return result


def to_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Return one line a picture: key, status, reason, size, seconds, and every figure for bicubic and ours."""
    columns = ["key", "status", "reason", "width", "height", "seconds"]
    columns += [f"{name}_{method}" for name in FIGURES for method in ("bicubic", "ours")]
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        flat = {f"{name}_{method}": value for method in ("bicubic", "ours") for name, value in record.get(method, {}).items()}
        writer.writerow(dict(record) | flat)
    return out.getvalue()


def shown(name: str, value: float) -> str:
    """Return a figure with its unit."""
    return _UNITS[name].format(value)


def summary_table(means: Mapping[str, Mapping[str, float]]) -> list[list[str]]:
    """Return a table with a header row, one line a figure: bicubic and ours."""
    names = [name for name in FIGURES if name in means.get("ours", {})]
    return [["", "bicubic", "ours"]] + [[_LABELS[n], shown(n, means["bicubic"][n]), shown(n, means["ours"][n])] for n in names]


def card(record: Mapping[str, Any], pictures: Mapping[str, bytes], name: str | None = None) -> Card:
    """Return the picture's card for the page."""
    figures = {_LABELS[n]: (shown(n, record["bicubic"][n]), shown(n, record["ours"][n])) for n in FIGURES if n in record.get("ours", {})}
    return Card(
        name=name or str(record["key"]),
        lq=pictures["lq"],
        bicubic=pictures["bicubic"],
        ours=pictures["ours"],
        gt=pictures["gt"] or None,
        figures=figures,
        note=f"{record['seconds']:.1f} s",
    )
