"""Shards of finished pairs with what a teacher made of them, from shards of photos.

The teacher is any model that `Upscaler` loads, and it is asked once for each pair: training then reads three
encoded pictures instead of a photo (`data.taught`). A pair is that of a run with the same preset, settings
and seed in its epochs 0 to `passes` - 1; its key is that of the photo with the epoch.

    taught.json     the teacher, and the sides of the pairs; written before the manifest

A shard of photos and a pass are one task and one shard of pairs, which carries the fingerprint of both, so a
run that is repeated makes what is missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.cluster.map_tasks import results
from pipelines.shards.parquet import (
    SCHEMA,
    TAUGHT_SCHEMA,
    RowGroup,
    Shard,
    ShardSummary,
    existing_shard,
    read_manifest,
    row_groups,
    write_shard_file,
)
from pipelines.shards.pictures import read_pictures
from pipelines.shards.prepare import finish
from resshift import storage
from resshift.config import ConfigError, RunConfig, from_dict, to_dict
from resshift.devices import use_one_thread
from resshift.images import ImageError, Picture, encode
from resshift.models import locate_model
from resshift.pairs.training_pair import make_pair
from resshift.progress import Progress, shown
from resshift.storage import StorageError, StorageReason
from resshift.upscaler import Upscaler

FACTS = "taught.json"
_ROWS, _BYTES = 16, 4 << 20  # of a row group, as `pipelines.shards.build.ShardOptions`


@dataclass(frozen=True, slots=True)
class TeachTask:
    """A shard of pairs.

    Fields:
        name: Name of its file.
        groups: Row groups of photos.
        epoch: Epoch whose pairs they become.
        fingerprint: Of everything that its bytes follow from.
    """

    name: str
    groups: tuple[RowGroup, ...]
    epoch: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Lesson:
    """What tasks share, as plain values: workers may run another process image.

    Fields:
        source, root: Shards of photos, and where those of pairs go.
        config: Configuration of the run whose pairs they are, as `config.to_dict` gives it.
        teacher: Address of the teacher.
        device: Device of the teacher.
        keep_bicubic: Whether the truth takes the place of the teacher's picture of a pair that is degraded by
            bicubic alone.
    """

    source: str
    root: str
    config: dict[str, Any]
    teacher: str
    device: str
    keep_bicubic: bool


def teacher_identity(teacher: str, config: RunConfig) -> str:
    """Return the identity of a teacher for the pairs of a run.

    Raises:
        ConfigError: It has another scale, or the pairs have holes.
        WeightsError: It is not there.
    """
    found = locate_model(teacher)
    if found.config.scale != config.model.scale:
        raise ConfigError(
            f"a teacher for preset {config.preset} must have scale {config.model.scale}, got {teacher} with "
            f"scale {found.config.scale}"
        )
    if config.degradation.kind == "inpainting" or found.fills_holes:
        raise ConfigError(f"pairs with holes cannot be taught, got preset {config.preset} and {teacher}")
    return found.identity()


def plan(
    shards: Sequence[ShardSummary],
    config: RunConfig,
    identity: str,
    passes: int,
    *,
    keep_bicubic: bool = False,
) -> list[TeachTask]:
    """Return the tasks, one for each shard of photos and pass."""
    values = to_dict(config)
    of_pairs = [values["data"], values["degradation"], values["train"]["seed"], identity]
    of_pairs += ["keep_bicubic"] * keep_bicubic
    tasks: list[TeachTask] = []
    for epoch in range(passes):
        for shard in sorted(shards, key=lambda shard: shard.name):
            groups = tuple(row_groups([shard]))
            described = json.dumps([shard.fingerprint, [g.duplicates for g in groups], epoch, of_pairs])
            digest = hashlib.sha256(described.encode()).hexdigest()[:16]
            if groups:
                tasks.append(TeachTask(f"shard-{len(tasks):05d}.parquet", groups, epoch, digest))
    return tasks


def teach_shard(task: TeachTask, lesson: Lesson) -> Shard:
    """Make a shard of pairs and write it in one piece; one that is there is left as it is."""
    existing = existing_shard(lesson.root, task.name, task.fingerprint)
    if existing is not None:
        return existing
    if lesson.device == "cpu":
        use_one_thread()  # Ray gives a task one CPU
    rows = _rows(task, lesson)
    return write_shard_file(lesson.root, task.name, task.fingerprint, rows, _ROWS, _BYTES, TAUGHT_SCHEMA)


@lru_cache(maxsize=1)
def _teacher(address: str, device: str) -> Upscaler:
    """Return a teacher that a process keeps for its next shard."""
    return Upscaler.from_pretrained(address, device=device)


def _rows(task: TeachTask, lesson: Lesson) -> Iterator[dict[str, Any]]:
    config, teacher = from_dict(RunConfig, lesson.config), _teacher(lesson.teacher, lesson.device)
    crop, seed = config.data, config.train.seed
    for group in task.groups:
        for photo in read_pictures(lesson.source, group):
            row: dict[str, Any] = dict.fromkeys(SCHEMA.names)
            row |= {"key": f"{photo.key}#{task.epoch}", "label": "", "reason": "", "message": ""}
            try:
                pair = make_pair(photo.data, photo.key, task.epoch, seed, crop, config.degradation)
            except ImageError as error:
                yield row | {"status": "failed", "reason": str(error.reason), "message": str(error)}
                continue
            keeps = lesson.keep_bicubic and pair.params is not None and pair.params.is_bicubic
            hq, lq, taught = (
                encode(Picture(pixels=np.asarray(pixels)), "png")
                for pixels in (pair.hq_u8, pair.lq_u8, pair.hq_u8 if keeps else teacher(pair.lq_u8))
            )
            yield row | {
                "status": "ok",
                "width": crop.crop_px,
                "height": crop.crop_px,
                "mode": "RGB",
                "size_bytes": len(hq),
                "sha256": hashlib.sha256(hq + lq).hexdigest(),
                "bytes": hq,
                "lq": lq,
                "taught": taught,
            }


def teach(
    source: str,
    root: str,
    config: RunConfig,
    teacher: str,
    *,
    passes: int = 1,
    keep_bicubic: bool = False,
    num_gpus: float = 0.0,
) -> tuple[pa.Table, int]:
    """Make the shards of pairs that are missing on the cluster, then status and manifest.

    Args:
        source: Shards of photos.
        root: Where the pairs go.
        config: Configuration of the run whose pairs they are.
        teacher: Address of the teacher.
        passes: Number of pairs of each photo.
        keep_bicubic: See `Lesson`.
        num_gpus: GPUs of a task; 0 computes on CPUs.

    Returns:
        The status of every pair, and how many shards were there already.

    Raises:
        ConfigError: The teacher does not fit, or `root` holds pairs of another one.
    """
    identity = teacher_identity(teacher, config)
    facts = {"teacher": identity, "scale": config.model.scale, "crop_px": config.data.crop_px}
    if (known := taught_facts(root)) not in (None, facts):
        raise ConfigError(f"{root} holds pairs of another teacher or size: {known} instead of {facts}")
    storage.write_bytes(storage.join(root, FACTS), (json.dumps(facts, indent=1) + "\n").encode())
    lesson = Lesson(source, root, to_dict(config), teacher, "cuda" if num_gpus else "cpu", keep_bicubic)
    tasks = plan(read_manifest(source), config, identity, passes, keep_bicubic=keep_bicubic)
    done: list[Shard] = []
    with shown(Progress("pairs", sum(group.num_ok for task in tasks for group in task.groups))) as progress:
        for shard in results(partial(teach_shard, lesson=lesson), tasks, num_gpus=num_gpus):
            done.append(shard)
            if shard.reused:
                progress.before += shard.status.num_rows
                continue
            for status in shard.status["status"].to_pylist():
                progress.add(status)
    return finish(done, source, root), sum(shard.reused for shard in done)


def taught_facts(root: str) -> dict[str, Any] | None:
    """Return the teacher and the sides of the pairs of a data set; None if it holds photos."""
    try:
        return json.loads(storage.read_bytes(storage.join(root, FACTS)))
    except StorageError as error:
        if error.reason is StorageReason.MISSING:
            return None
        raise


def check_pairs(root: str, config: RunConfig) -> None:
    """Check that a run can be trained on the pairs or photos of a data set.

    Raises:
        ConfigError: It needs pairs and there are photos, or pairs of another scale or smaller ones; or it
            would degrade pairs on a device.
    """
    facts = taught_facts(root)
    if facts is None:
        if config.data.taught:
            raise ConfigError(
                f"data.taught={config.data.taught:g} needs shards with a teacher's pictures, which "
                f"jobs/teach.py makes of {root}"
            )
        return
    if facts["scale"] != config.model.scale or facts["crop_px"] < config.data.crop_px:
        raise ConfigError(
            f"{root} holds pairs of scale {facts['scale']} and {facts['crop_px']} pixels, got model.scale="
            f"{config.model.scale} and data.crop_px={config.data.crop_px}"
        )
    if config.data.degrade_on == "device":
        raise ConfigError(f"{root} holds pairs that are degraded already, data.degrade_on must be cpu")
    if config.degradation.kind == "inpainting":
        raise ConfigError(f"{root} holds pairs without holes, got preset {config.preset}")
