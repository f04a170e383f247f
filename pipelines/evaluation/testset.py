"""Test sets: pairs of clean and degraded PNG files that can be made again, byte for byte.

    DST/gt/NAME.png, DST/lq/NAME.png     a pair; NAME is the key of the photo without its extension
    DST/mask/NAME.png                    255 in a hole, for inpainting
    DST/manifest.json                    the protocol; source, sha256 and drawn parameters of every picture

Which photos, their order and what happens to each are functions of (seed, key) and of the bytes of the photo:
not of the number of workers or of where the photos lie, so the manifest names no path. The bytes also need
the same versions of OpenCV, torch and zlib, and a like CPU: with AVX2 and with AVX-512 they were the same for
the x4 recipes (not for faces), without AVX2 or Intel's IPP they were others. Compare the sha256 in the
manifest.

`imagenet_test` follows Yue et al.: 3 000 photos of the validation set at random, the short side brought to
256 pixels (bilinear without antialias, as albumentations' SmallestMaxSize does), the central square, the mild
real-world chain. Which photos the authors' own shuffle chose is not reproduced.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass as record

from pipelines.cluster.map_tasks import results
from pipelines.shards import sources
from pipelines.shards.parquet import Reason
from pipelines.shards.sources import Item
from resshift import degradation, seeds, storage
from resshift.config import flatten
from resshift.degradation import DegradationRecipe
from resshift.devices import use_one_thread
from resshift.images import ImageError, ImageLimits, Picture, encode
from resshift.pairs.jpeg import decode_photo
from resshift.storage import StorageError

FORMAT = 1
Image = NDArray[np.uint8]
_ITEMS_PER_TASK = 32
RECIPES: dict[str, Callable[[], DegradationRecipe]] = {
    "imagenet-test-x4": degradation.imagenet_test_x4,
    "realesrgan-x4": degradation.realesrgan_x4,
    "realesrgan-x2": degradation.realesrgan_x2,
    "bicubic-x4": degradation.bicubic_x4,
    "bicubic-x2": degradation.bicubic_x2,
    "face": degradation.face,
    "inpainting": degradation.inpainting,
}


@record(frozen=True, kw_only=True, slots=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class SetProtocol:
    """How a test set is made.

    Fields:
        name: Name in the manifest.
        recipe: Recipe of the degradation.
        crop: Part of the picture: "square" brings the short side to `side_px` and takes the central square;
            "whole" keeps the picture, cut to a multiple of the scale.
        side_px: Side of the square in pixels.
        num: Most good pictures that are taken; None takes all.
        seed: Seed of the choice and of the degradation.
    """

    name: str
    recipe: DegradationRecipe
    crop: Literal["square", "whole"] = "square"
    side_px: int = 256
    num: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.side_px < 1 or self.side_px % self.recipe.scale:
            raise ValueError(
                f"side_px must be a positive multiple of the scale {self.recipe.scale}, got {self.side_px}"
            )
        if self.num is not None and self.num < 1:
            raise ValueError(f"num must be at least 1, got {self.num}")


def imagenet_test(num: int | None = 3000, seed: int = 0) -> SetProtocol:
    """ImageNet-Test: 3 000 pictures of the validation set, 256 pixels, mild real-world degradation x4."""
    return SetProtocol(name="imagenet-test", recipe=degradation.imagenet_test_x4(), num=num, seed=seed)


def bicubic_test(num: int | None = 3000, seed: int = 0) -> SetProtocol:
    """The clean pictures of `imagenet_test`, shrunk by MATLAB's bicubic x4."""
    return SetProtocol(name="bicubic", recipe=degradation.bicubic_x4(), num=num, seed=seed)


def folder_test(recipe: str, num: int | None = None, seed: int = 0) -> SetProtocol:
    """Whole pictures of any folder, degraded by any recipe of `RECIPES`.

    Raises:
        ValueError: There is no such recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; allowed: {', '.join(RECIPES)}")
    return SetProtocol(name=f"folder, {recipe}", recipe=RECIPES[recipe](), crop="whole", num=num, seed=seed)


def central_square(rgb: Image, side_px: int) -> Image:
    """Bring the short side to `side_px`, up or down (bilinear, not antialiased), and cut the central square:
    (side_px, side_px, 3).
    """
    height, width = rgb.shape[:2]
    ratio = side_px / min(height, width)
    size = (max(side_px, round(width * ratio)), max(side_px, round(height * ratio)))
    if size != (width, height):
        resized = cv2.resize(rgb.astype(np.float32), size, interpolation=cv2.INTER_LINEAR)
        rgb = (np.asarray(resized).clip(0, 255) + 0.5).astype(np.uint8)
    top, left = (size[1] - side_px) // 2, (size[0] - side_px) // 2
    return np.ascontiguousarray(rgb[top : top + side_px, left : left + side_px])


def make_pair(data: bytes, key: str, protocol: SetProtocol) -> dict[str, Any]:
    """Make one pair from the bytes of a photo; whatever is wrong with it becomes status, reason and message.

    Returns:
        The picture's entry in the manifest, and under "files" its encoded PNGs by folder.
    """
    entry: dict[str, Any] = {"key": storage.printable(key), "sha256_source": hashlib.sha256(data).hexdigest()}
    try:
        rgb = decode_photo(data)
    except ImageError as error:
        return entry | {"status": "failed", "reason": str(error.reason), "message": str(error)}
    scale = protocol.recipe.scale
    if protocol.crop == "whole":
        rgb = np.ascontiguousarray(rgb[: rgb.shape[0] // scale * scale, : rgb.shape[1] // scale * scale])
        if not rgb.size:
            return entry | {
                "status": "skipped",
                "reason": str(Reason.TOO_SMALL),
                "message": f"both sides must have {scale} pixels",
            }
    else:
        rgb = central_square(rgb, protocol.side_px)
    params = degradation.draw(seeds.philox(protocol.seed, "test set", entry["key"]), protocol.recipe)
    gt = degradation.target(rgb, params)
    lq = degradation.degrade(gt, params)
    mask = degradation.hole_mask(params, *lq.shape[:2])
    pictures = {"gt": gt, "lq": lq} | ({} if mask is None else {"mask": mask[..., None]})
    files = {folder: encode(Picture(pixels=pixels), "png") for folder, pixels in pictures.items()}
    sizes = {"width": gt.shape[1], "height": gt.shape[0]}
    hashes = {f"sha256_{folder}": hashlib.sha256(png).hexdigest() for folder, png in files.items()}
    drawn = {"params": json.loads(params.to_json())}
    return entry | {"status": "ok", "reason": "", "message": ""} | sizes | hashes | drawn | {"files": files}


def choose(items: Sequence[Item], seed: int) -> list[Item]:
    """Put the inputs in the order in which a test set takes them: a hash of seed and key, so other files in
    the source move none.
    """
    photos = [item for item in items if item.outcome is None or item.outcome[1] != Reason.ARCHIVE]
    return sorted(photos, key=lambda item: seeds.derive("test set order", seed, storage.printable(item.key)))


def write_pairs(items: Sequence[Item], root: str, protocol: SetProtocol) -> list[dict[str, Any]]:
    """Make and write some pairs; return their entries."""
    use_one_thread()  # Ray gives a task one CPU
    entries: list[dict[str, Any]] = []
    for item in items:
        name = _stem(item) + ".png"
        outcome = item.outcome
        try:
            data = b"" if outcome else sources.read(item, ImageLimits().max_bytes)
        except StorageError as error:
            data, outcome = b"", ("failed", str(error.reason), str(error))
        row: dict[str, Any]
        if outcome:
            row = {"key": storage.printable(item.key)} | dict(
                zip(("status", "reason", "message"), outcome, strict=True)
            )
        else:
            row = make_pair(data, item.key, protocol)
        for folder, png in row.pop("files", {}).items():
            storage.write_bytes(storage.join(root, f"{folder}/{name}"), png)
        entries.append(row | ({"name": name} if row["status"] == "ok" else {}))
    return entries


def write_testset(items: Sequence[Item], root: str, protocol: SetProtocol) -> Iterator[dict[str, Any]]:
    """Make a test set on the cluster and yield the entry of each picture, in their order; the manifest is
    written at the end.

    Pictures are taken in the order of `choose` until `protocol.num` of them are good; a bad one has an entry
    with its reason.

    Raises:
        ValueError: `root` holds a test set with another protocol.
    """
    check_same_set(root, protocol)
    waiting = _named_once(choose(items, protocol.seed))
    entries: list[dict[str, Any]] = []
    num_good, i_next = 0, 0
    while i_next < len(waiting) and (protocol.num is None or num_good < protocol.num):
        stop = len(waiting) if protocol.num is None else min(len(waiting), i_next + protocol.num - num_good)
        parts = [waiting[i : min(i + _ITEMS_PER_TASK, stop)] for i in range(i_next, stop, _ITEMS_PER_TASK)]
        for part in results(partial(write_pairs, root=root, protocol=protocol), parts, in_order=True):
            entries += part
            num_good += sum(entry["status"] == "ok" for entry in part)
            yield from part
        i_next = stop
    manifest = {
        "format": FORMAT,
        "protocol": TypeAdapter(SetProtocol).dump_python(protocol, mode="json"),
        "pictures": entries,
    }
    storage.write_bytes(storage.join(root, "manifest.json"), (json.dumps(manifest, indent=1) + "\n").encode())


def _named_once(items: Sequence[Item]) -> list[Item]:
    """Pairs are named without extension: of a.jpg and a.png only the first in order can be had."""
    seen: set[str] = set()
    named: list[Item] = []
    for item in items:
        stem = _stem(item)
        outcome = ("skipped", str(Reason.DUPLICATE_KEY), "another picture has this name without extension")
        named.append(replace(item, outcome=outcome) if stem in seen and item.outcome is None else item)
        seen.add(stem)
    return named


def _stem(item: Item) -> str:
    return posixpath.splitext(storage.printable(item.key))[0]


def check_same_set(root: str, protocol: SetProtocol) -> None:
    """Check that a directory holds no other test set.

    Raises:
        ValueError: It holds one; the message names what differs.
    """
    uri = storage.join(root, "manifest.json")
    if not storage.exists(uri):
        return
    ours = flatten(TypeAdapter(SetProtocol).dump_python(protocol, mode="json"))
    theirs = flatten(json.loads(storage.read_bytes(uri)).get("protocol", {}))
    differing = [
        f"{name}: {theirs.get(name)!r} -> {ours.get(name)!r}"
        for name in sorted(ours | theirs)
        if ours.get(name) != theirs.get(name)
    ]
    if differing:
        raise ValueError(f"{root} holds another test set; {'; '.join(differing)}")
