"""Configuration of an endpoint: the `args` of its application in serve/config.yaml.

Unknown names and values out of range are refused before anything starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass

from pipelines.bulk.settings import BulkSettings
from resshift.images import ImageLimits
from resshift.images.sandbox import DecoderLimits

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)


def _check_positive(where: str, values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None and value <= 0:
            raise ValueError(f"{where}.{name} must be positive, got {value}")


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class KeySettings:
    """An API key.

    Fields:
        name: Name of the holder; jobs belong to it.
        sha256: Of the key, 64 hexadecimal digits.
        requests_per_minute, megapixels_per_minute: Limits of requests and of input pixels; null: none.
    """

    name: str
    sha256: str
    requests_per_minute: float | None = None
    megapixels_per_minute: float | None = None

    def __post_init__(self) -> None:
        if not self.name or not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(
                "a key needs a name and sha256, 64 hexadecimal digits of lower case: see python -m serve "
                "--new-key NAME"
            )
        quotas = {
            "requests_per_minute": self.requests_per_minute,
            "megapixels_per_minute": self.megapixels_per_minute,
        }
        _check_positive(f"key {self.name}", quotas)


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class LimitSettings:
    """Limits of an endpoint. Those of bodies are of each gateway, the line is shared by all.

    Fields:
        body_mb: Largest body of one request.
        body_s: Longest time that a body may take to arrive.
        bodies_mb: Largest size of the bodies of all requests that wait or are worked on.
        megapixels, max_side_px, decode_s, decode_memory_mb: Limits of a picture; the first two are checked on
        its header. output_megapixels: Of a result. in_flight: pictures that are decoded, upscaled or encoded
        at a time; null: what the replicas that run take (`ongoing` each), and two for each gateway. ongoing:
        what a replica takes at a time. queue: pictures that wait for that. timeout_s:
        for an answer, when the request has no `X-Request-Timeout`. max_timeout_s: the longest that a request
        may ask for.
    """

    body_mb: float = 64
    body_s: float = 30
    bodies_mb: float = 512
    megapixels: float = 25
    max_side_px: int = 65_500
    decode_s: float = 20
    decode_memory_mb: int | None = None
    output_megapixels: float = 400
    in_flight: int | None = None
    ongoing: int = 2
    queue: int = 32
    timeout_s: float = 60
    max_timeout_s: float = 600

    def __post_init__(self) -> None:
        _check_positive(
            "limits",
            {
                name: getattr(self, name)
                for name in self.__dataclass_fields__
                if name not in ("queue", "decode_memory_mb")
            },
        )
        if self.queue < 0:
            raise ValueError(f"limits.queue must be at least 0, got {self.queue}")

    def slots(self, num_replicas: int, num_gateways: int) -> int:
        """Return how many pictures may be worked on at a time."""
        return self.in_flight or self.ongoing * max(1, num_replicas) + 2 * num_gateways

    @property
    def max_body_bytes(self) -> int:
        return int(self.body_mb * 1e6)

    def decoder(self) -> DecoderLimits:
        """Return the limits of the decoder."""
        sizes = ImageLimits(
            max_pixels=max(1, int(self.megapixels * 1e6)),
            max_side_px=self.max_side_px,
            max_bytes=self.max_body_bytes,
        )
        return DecoderLimits(images=sizes, seconds=self.decode_s, memory_mb=self.decode_memory_mb)


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class JobSettings:
    """Settings of jobs.

    Fields:
        sources, targets: Prefixes (folders, s3://bucket/prefix) inside which bulk jobs may read and write;
            none: no bulk jobs.
        state: Folder or prefix for the records of jobs and for pictures that are answered later; empty:
            $RESSHIFT_CACHE/serve. All machines that the job keeper may run on must see it.
        running: Number of jobs that run at a time, of each kind.
        waiting: Number of jobs that may wait.
        keep_hours: Hours for which records and results of ended jobs are kept.
        replicas: Largest number of replicas that a bulk job keeps busy; null: what the cluster can have.
        bulk: Settings of bulk jobs, as with `--set` of jobs/upscale.py.
    """

    sources: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    state: str = ""
    running: int = 2
    waiting: int = 100
    keep_hours: float = 24
    replicas: int | None = None
    bulk: BulkSettings = field(default_factory=BulkSettings)

    def __post_init__(self) -> None:
        _check_positive(
            "jobs",
            {
                "running": self.running,
                "waiting": self.waiting,
                "keep_hours": self.keep_hours,
                "replicas": self.replicas,
            },
        )


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class GatewaySettings:
    """How many gateways there are: they read, decode and answer, on CPUs.

    Fields:
        low, high: Smallest and largest number; high null: one for every eight CPUs that the cluster can have.
        num_cpus: CPUs that one reserves; it also decodes in two processes.
        target: Requests at a gateway, waiting or worked on, above which another one is started.
    """

    low: int = 1
    high: int | None = None
    num_cpus: float = 0.5
    target: int = 16

    def __post_init__(self) -> None:
        if self.low < 1 or (self.high is not None and self.high < self.low) or self.target < 1:
            raise ValueError(
                f"gateways need 1 <= low <= high and 1 <= target, got {self.low}, {self.high}, {self.target}"
            )


@dataclass(frozen=True, kw_only=True, slots=True, config=_STRICT)
class ServeSettings:
    """All settings of an endpoint.

    Fields:
        models: Names of the models; the first is the default. Each is an application of its own, see
            `serve.replica`.
        sleeping: Names of the models that may have no replicas (low 0): the first request after a pause waits
            for one to start.
        keys: API keys; without any, the endpoint answers only its own machine.
        behind_proxy: Without keys, whether to answer what a proxy on this machine hands on: whoever reaches
            the proxy may then use the endpoint.
        faces: File of a face detector on every machine (YuNet's ONNX file: a path, s3:// or hf://), for the
            option of this name; empty: requests cannot ask for it.
        cors: Origins (https://photos.example.org) whose pages may call the endpoint, or "*"; keys are needed.
        access_log: File to which each gateway appends a JSON line for every request; "-" is standard output,
            empty none.
        gateways: How many gateways there are.
    """

    models: tuple[str, ...] = ("tiny-x4",)
    sleeping: tuple[str, ...] = ()
    keys: tuple[KeySettings, ...] = ()
    behind_proxy: bool = False
    faces: str = ""
    cors: tuple[str, ...] = ()
    access_log: str = ""
    limits: LimitSettings = field(default_factory=LimitSettings)
    gateways: GatewaySettings = field(default_factory=GatewaySettings)
    jobs: JobSettings = field(default_factory=JobSettings)

    def __post_init__(self) -> None:
        if not self.models or len(set(self.models)) < len(self.models):
            raise ValueError(f"models must be at least one and different from each other, got {self.models}")
        if not set(self.sleeping) <= set(self.models):
            raise ValueError(f"sleeping must be some of models, {self.models}, got {self.sleeping}")
        if len({key.name for key in self.keys}) < len(self.keys):
            raise ValueError("two keys have the same name")
        for origin in self.cors:
            if origin != "*" and not re.fullmatch(r"https?://[^/*\s]+", origin):
                raise ValueError(f"cors must hold origins such as https://photos.example.org, got {origin!r}")
        if self.cors and not self.keys:
            raise ValueError("cors needs keys: without any, no page of another site may use the endpoint")


def parse(args: Mapping[str, Any]) -> ServeSettings:
    """Return the settings of `args`.

    Raises:
        pydantic.ValidationError: What is wrong, and where.
    """
    return TypeAdapter(ServeSettings).validate_python(dict(args))
