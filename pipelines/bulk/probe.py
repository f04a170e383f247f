"""How fast a replica is, for the hours of a plan: as the ledger says, or measured before a first run.

The picture is made up, for what it shows does not change the time. It is a small one where a model is slow:
then the figure holds more of what a call costs beside its pixels.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import numpy as np
import ray

from pipelines import command
from pipelines.bulk.engine import replica_resources
from pipelines.bulk.settings import EngineSettings
from pipelines.bulk.stages import StageOptions, UpscaleOptions
from pipelines.bulk.worker import Replica, ReplicaOptions, Upscaled
from pipelines.cluster.admission import free
from pipelines.ledger.report import summarise
from resshift.images import Picture
from resshift.images.animation import Frames

_SIDES_PX = (64, 256)
_MOST_S = 10.0  # that the larger picture may take

logger = logging.getLogger(__name__)


def replica_speed(
    stages: StageOptions, settings: EngineSettings, most_replicas: int
) -> tuple[float | None, str]:
    """Return megapixels of input that a replica does in a second, and where that is from; or None, and why it
    is not known.

    Args:
        stages: Options of the job.
        settings: Settings of the replicas.
        most_replicas: Number of replicas that may share the cores of a machine.
    """
    known = summarise(stages.target, options=stages.target_s3)[0].replica_megapixels_per_s
    if known is not None:
        return known, "in the ledger"
    if stages.outputs.sampling.faces is not None:
        return None, "it depends on the faces in each picture"
    if not command.on_a_cluster():
        threads = max(1, (os.cpu_count() or 1) // most_replicas)
        return Probe(stages.outputs, threads).megapixels_per_s(), "measured here"
    command.connect_to_ray()
    num_gpus, threads = replica_resources(settings.num_gpus, most_replicas)
    has = free()
    if has["CPU"] < settings.num_cpus or has["GPU"] < num_gpus:
        return None, "no replica has room on the cluster now, to be measured"
    decorate: Any = ray.remote
    probe = decorate(num_cpus=settings.num_cpus, num_gpus=num_gpus)(Probe).remote(stages.outputs, threads)
    return ray.get(probe.megapixels_per_s.remote()), "measured on the cluster"


class Probe:
    """A replica that nobody else uses.

    Args:
        outputs: What a job makes.
        num_threads: See `Replica`.
    """

    def __init__(self, outputs: UpscaleOptions, num_threads: int) -> None:
        self._options = ReplicaOptions(
            model=outputs.model, identity=outputs.identity, sampling=outputs.sampling
        )
        self._fills_holes = outputs.masks is not None
        self._replica = Replica(outputs.model, outputs.identity, num_threads)

    def megapixels_per_s(self) -> float:
        """Return the speed; takes some ten seconds at most where the small picture takes less.

        Raises:
            RuntimeError: The model fails.
        """
        small, large = _SIDES_PX
        self._seconds(small)  # a first call is slower
        seconds = self._seconds(small)
        if seconds * (large / small) ** 2 > _MOST_S:
            return small**2 / seconds / 1e6
        return large**2 / self._seconds(large) / 1e6

    def _seconds(self, side_px: int) -> float:
        mask = np.zeros((side_px, side_px), bool)
        mask[: side_px // 4] = True
        pixels = np.full((side_px, side_px, 3), 128, np.uint8)
        picture = Picture(pixels=pixels, mask=mask if self._fills_holes else None)
        started = time.monotonic()
        for answer in self._replica.upscale(self._options, ["probe.png"], Frames((picture,))):
            if isinstance(answer, Upscaled) and answer.reason:
                raise RuntimeError(f"{answer.reason}: {answer.message}")
        return time.monotonic() - started
