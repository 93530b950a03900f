"""What a server counts, for Prometheus (`GET /metrics`)."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from relook.trace import Event, Finished, LookTaken

if TYPE_CHECKING:
    from relook.perceive.engine import Engine

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters and histograms of one app, and the engine's own numbers (`relook_engine_*`)."""

    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        registry.register(_EngineNumbers(engine))
        self.requests = Counter(
            "relook_requests", "Requests, by path and status", ["path", "status"], registry=registry
        )
        self.tokens = Counter(
            "relook_tokens", "Tokens: of prompts, reused of these, and of answers", ["kind"], registry=registry
        )
        self.positions = Counter("relook_lm_positions", "Positions run by the language model", registry=registry)
        self.looks = Counter("relook_looks", "Looks taken, by kind", ["kind"], registry=registry)
        self.first_token = Histogram(
            "relook_time_to_first_token_seconds", "From request to the first text, look or call", buckets=SECONDS,
            registry=registry,
        )  # fmt: skip
        self.per_token = Histogram(
            "relook_decode_seconds_per_token", "Of an answer's tokens, on the mean", buckets=TOKEN_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.whole = Histogram("relook_request_seconds", "From request to end", buckets=SECONDS, registry=registry)

    @contextmanager
    def answering(self, began: float) -> Iterator[Watch]:
        """Measure an answer to a request that came at `began` (`perf_counter`): its events go through the `Watch`."""
        watch = Watch(self, began)
        try:
            yield watch
        finally:
            self.whole.observe(time.perf_counter() - watch.began)


class Watch:
    """Counts the events of one answer."""

    def __init__(self, metrics: Metrics, began: float):
        self.metrics, self.began, self.started = metrics, began, False

    def saw(self, event: Event) -> None:
        metrics = self.metrics
        if not self.started:
            self.started = True
            metrics.first_token.observe(time.perf_counter() - self.began)
        if isinstance(event, LookTaken) and event.look.problem is None:
            metrics.looks.labels(event.look.kind).inc()
        elif isinstance(event, Finished):
            usage = event.answer.usage
            metrics.tokens.labels("prompt").inc(usage.sequence_length - usage.generated_tokens)
            metrics.tokens.labels("cached").inc(usage.cached_tokens)
            metrics.tokens.labels("completion").inc(usage.generated_tokens)
            metrics.positions.inc(usage.lm_positions)
            if usage.generated_tokens and "decode" in usage.seconds:
                metrics.per_token.observe(usage.seconds["decode"] / usage.generated_tokens)


class CountRequests:
    """Middleware that counts responses by route and status."""

    def __init__(self, app: Any, metrics: Metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        async def counted(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, counted if scope["type"] == "http" else send)


class _EngineNumbers:
    """The engine's `stats()`, read whenever somebody asks."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterable[Metric]:
        for name, value in self.engine.stats().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(f"relook_engine_{name}", f"The engine's {name.replace('_', ' ')}", value=value)
