"""The router's figures for Prometheus, by version."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

from deploy.metrics import PREFIX as HOUSE
from deploy.metrics import SECONDS
from deploy.routing.health import Backend

PREFIX = f"{HOUSE}_router"
NOBODY = "none"  # the version of requests that no server answered


class RouterMetrics:
    """One router's registry. `backends` gives the servers of the table in force."""

    def __init__(self, backends: Callable[[], Iterable[Backend]]) -> None:
        self.registry = CollectorRegistry()
        self._backends = backends
        self.registry.register(self)
        self.requests = self._counter("requests", "Requests by the version that answered, and status", "version", "status")
        self.retries = self._counter("retries", "Attempts that were repeated elsewhere, by reason", "version", "reason")
        self.fallbacks = self._counter("fallbacks", "Requests that another version answered", "version", "answered_by")
        self.shadows = self._counter("shadow_requests", "Copies by status, or why there is none", "version", "status")
        self.shadow_seconds = self._histogram("shadow_seconds", "From a copy's start to its answer's end")
        self.first_byte = self._histogram("time_to_first_byte_seconds", "From a request's arrival to its answer's first bytes")
        self.duration = self._histogram("request_seconds", "From a request's arrival to its answer's end")
        self.reloads = self._counter("reloads", "Reloads of the table", "outcome")
        self.config_good = Gauge(f"{PREFIX}_config_good", "1: the table in force is that of the file; 0: the file is refused",
                                 registry=self.registry)  # fmt: skip
        self.config_good.set(1)

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """What the servers are doing, read when asked for."""
        names = ("version", "url")
        up = GaugeMetricFamily(f"{PREFIX}_backend_up", "1: requests are sent there", labels=names)
        running = GaugeMetricFamily(f"{PREFIX}_backend_requests", "Requests that it works on", labels=names)
        now = time.monotonic()
        for backend in self._backends():
            up.add_metric((backend.version, backend.url), float(backend.usable(now)))
            running.add_metric((backend.version, backend.url), backend.open)
        yield from (up, running)

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"{PREFIX}_{name}", help, labels, registry=self.registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", help, ["version"], buckets=SECONDS, registry=self.registry)
