"""Figures of one gateway for Prometheus, at `/metrics`. Replicas and bulk jobs export theirs through Ray on
every node.

resshift_http_requests_total{route,status}   resshift_phase_seconds{phase}   resshift_megapixels_total{side}
resshift_in_flight   resshift_waiting   resshift_body_bytes   resshift_ready{model}   resshift_replicas{model}
resshift_gateways
resshift_own_memory_bytes   process_resident_memory_bytes and others of the process

The resident memory of a process of Ray counts what it has read of the node's object store, which is the
store's, and bounded by its size. `resshift_own_memory_bytes` is what the gateway itself holds.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from resshift.allocator import knows_own_bytes, own_bytes

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """The collectors, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "resshift_http_requests", "Requests answered", ("route", "status"), registry=self.registry
        )
        self.megapixels = Counter(
            "resshift_megapixels", "Megapixels upscaled", ("side",), registry=self.registry
        )
        self.phases = Histogram(
            "resshift_phase_seconds",
            "Seconds of a picture",
            ("phase",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "resshift_in_flight", "Pictures being decoded, upscaled or encoded", registry=self.registry
        )
        self.waiting = Gauge("resshift_waiting", "Pictures in line", registry=self.registry)
        self.body_bytes = Gauge("resshift_body_bytes", "Bytes of requests in memory", registry=self.registry)
        self.ready = Gauge(
            "resshift_ready",
            "1 when a forward pass came through in the last seconds",
            ("model",),
            registry=self.registry,
        )
        self.gateways = Gauge(
            "resshift_gateways",
            "Gateways that share the line, as this one counts them",
            registry=self.registry,
        )
        self.replicas = Gauge("resshift_replicas", "Replicas that run", ("model",), registry=self.registry)

        if knows_own_bytes():
            own = Gauge(
                "resshift_own_memory_bytes",
                "Resident memory without files and the object store",
                registry=self.registry,
            )
            own.set_function(own_bytes)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self.registry)
