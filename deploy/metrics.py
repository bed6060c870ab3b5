"""The server's figures for Prometheus: what the engine holds now, and what clients waited for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

PREFIX = "llm_builder"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SPEEDS = (1, 2, 5, 10, 20, 30, 50, 75, 100, 150, 200, 300, 500)  # tokens a second
GAUGES = {
    "queue": ("waiting", "Requests that wait for a row"),
    "batch": ("running", "Sequences that run together"),
    "rows": ("rows", "Sequences that can run together"),
    "cached_tokens": ("cached_tokens", "Tokens whose keys and values are held for running sequences"),
}
COUNTERS = {
    "steps": ("steps", "Decoding steps"),
    "prompt_tokens": ("prompt_tokens", "Tokens of prompts read; its rate is tokens a second"),
    "generated_tokens": ("generated_tokens", "Tokens generated; its rate is tokens a second"),
    "draft_tokens": ("draft_tokens", "Tokens guessed by the draft"),
    "accepted_draft_tokens": ("accepted_tokens", "Guessed tokens that were answered; their share is the acceptance rate"),
}


class Metrics:
    """One server's registry."""

    def __init__(self, engine) -> None:
        self.registry = CollectorRegistry()
        self._engine = engine
        self.registry.register(self)
        self.requests = Counter(f"{PREFIX}_requests", "Requests by endpoint and status", ["endpoint", "status"],
                                registry=self.registry)  # fmt: skip
        self.first_token = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token", SECONDS)
        self.between_tokens = self._histogram("inter_token_seconds", "Between two tokens of an answer", SECONDS)
        self.duration = self._histogram("request_seconds", "From a request's arrival to its last token", SECONDS)
        self.speed = self._histogram("answer_tokens_per_second", "Tokens a second of each answer after its first", SPEEDS)

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """The engine's own figures, read when asked for."""
        stats = self._engine.stats()
        for name, (field, help) in GAUGES.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", help, value=getattr(stats, field))
        for name, (field, help) in COUNTERS.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", help, value=getattr(stats, field))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, help: str, buckets: tuple) -> Histogram:
        return Histogram(f"{PREFIX}_{name}", help, buckets=buckets, registry=self.registry)


class Watch:
    """The times of one request's answers, as its outputs arrive."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._metrics, self._arrived = metrics, arrived
        self._any = False
        self._first: dict[int, float] = {}
        self._last: dict[int, float] = {}
        self._tokens: dict[int, int] = {}

    def output(self, answer: int, tokens: int, now: float, finished: bool) -> None:
        """`tokens` more of answer number `answer` arrived at time `now`."""
        if tokens:
            if not self._any:
                self._metrics.first_token.observe(now - self._arrived)
                self._any = True
            if answer in self._last:
                self._metrics.between_tokens.observe((now - self._last[answer]) / tokens)
            self._first.setdefault(answer, now)
            self._last[answer] = now
            self._tokens[answer] = self._tokens.get(answer, 0) + tokens
        if finished and self._tokens.get(answer, 0) > 1 and self._last[answer] > self._first[answer]:
            self._metrics.speed.observe((self._tokens[answer] - 1) / (self._last[answer] - self._first[answer]))

    def done(self, now: float) -> None:
        """All answers have ended."""
        self._metrics.duration.observe(now - self._arrived)
