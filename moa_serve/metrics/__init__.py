"""Metrics: what one server counts, in the text format of Prometheus.

Two families: our own `moa_*`, and the `vllm:*` names that load balancers and stock dashboards read.

Belongs to the event loop. The engine thread hands over immutable snapshots (routing.py, state.py); a scrape reads the latest and never asks
the engine. Only names of the base and of loaded adapters become labels; everything else is `other`, so no client can make a series.
"""

import asyncio
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from moa_serve.adapter.manifest import Manifest
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.engine import Engine, TokenEvent
from moa_serve.engine.pressure import MemoryWatch
from moa_serve.engine.watchdog import Watchdog
from moa_serve.metrics.drift import Profile
from moa_serve.metrics.record import RequestRecord, timings
from moa_serve.metrics.requests import RequestMetrics
from moa_serve.metrics.routing import OTHER, RoutingMetrics
from moa_serve.metrics.state import Adapters, StateMetrics

__all__ = ["OTHER", "Adapters", "Metrics", "RequestRecord", "timings"]

LOADED = "ok"
"""The `result` of a load that published its adapter; any other names what went wrong."""


class Metrics:
    """
    Args:
        base_name: what the base is served as: its label.
        max_model_len: served context in tokens: the end of the length histograms.
        named_adapters: adapters with latency and token series of their own (350 lines each), the first that are loaded; the rest: `other`.
        grid_adapters: adapters whose router metrics have a series for each layer and expert.
    """

    def __init__(self, base_name: str, *, max_model_len: int = 8192, grid_adapters: int = 8, named_adapters: int = 64) -> None:
        self._base_name, self._named_adapters = base_name, named_adapters
        self._registry = CollectorRegistry()
        self._names: set[str] = set()
        self._requests = RequestMetrics(self._registry, max_model_len)
        self._state = StateMetrics(base_name)
        self._routing = RoutingMetrics(grid_adapters)
        self._now = CollectorRegistry()  # how things stand, which the loop changes: read there
        self._now.register(self._state)
        ProcessCollector(registry=self._now)

    def attach(self, engine: AsyncEngine, adapters: Adapters) -> None:
        """Watch an engine and the adapters it serves; before the engine starts."""
        self._state.attach(engine, adapters)
        engine.on_step = self._on_step

    def watch(self, watchdog: Watchdog, memory: MemoryWatch) -> None:
        """Show what these two see; where a server runs."""
        self._state.watch(watchdog, memory)

    def _on_step(self, engine: Engine, events: list[TokenEvent]) -> None:
        """In the engine thread."""
        self._state.publish(engine)
        self._routing.publish(engine, events)

    # -- what happens; called in the event loop

    def observe_request(self, record: RequestRecord) -> None:
        """A request has ended, in whatever way; once for each."""
        self._requests.observe(record, self._label(record.adapter, record.model))

    def observe_unread(self) -> None:
        """A request was refused for want of a place before anybody looked for whom it was."""
        self._requests.observe_unread(OTHER)

    def observe_tokens(self, adapter: str | None, gaps_seconds: Iterable[float]) -> None:
        """Seconds between one token of a stream and the next."""
        self._requests.observe_gaps(self._label(adapter, self._base_name), gaps_seconds)

    def observe_response(self, status: int) -> None:
        """An HTTP response of any kind was begun."""
        self._requests.responses.labels(str(status)).inc()

    def registry_trouble(self, kind: str) -> None:
        """One of `REGISTRY_TROUBLE` happened to the registry's state."""
        self._requests.registry_trouble.labels(kind).inc()

    def adapter_loaded(
        self, name: str, revision: str | None, seconds: float, source: str, result: str, *, manifest: Manifest | None = None
    ) -> None:
        """An adapter was loaded, or could not be.

        Args:
            manifest: whose profile tells how its routers behave in training.
            source: who asked: a word of ours, such as lazy or explicit.
            result: "ok", or a word of ours for why not; then `name` gets no series.
        """
        self._requests.observe_load(seconds, source, result, name if result == LOADED else None)
        if result == LOADED and revision is not None:
            if len(self._names) < self._named_adapters:
                self._names.add(name)
            self._routing.loaded(name, revision, None if manifest is None else Profile.of(manifest))

    def adapter_unloaded(self, name: str) -> None:
        """A name is gone: its series go too."""
        self._names.discard(name)
        self._requests.forget(name)
        self._routing.unloaded(name)

    def _label(self, adapter: str | None, model: str) -> str:
        if adapter is None:
            return model if model == self._base_name or model in self._names else OTHER
        return adapter if adapter in self._names else OTHER

    # -- the scrape

    def render(self) -> tuple[bytes, str]:
        """The page, and its content type: text format 0.0.4, which every Prometheus reads."""
        return self._render_now() + self._render_counted(), CONTENT_TYPE_PLAIN_0_0_4

    async def page(self) -> tuple[bytes, str]:
        """The same for a server at work: the counters of requests, most of the page and a tenth of a second of it, are written in a thread,
        for they have locks of their own."""
        return self._render_now() + await asyncio.to_thread(self._render_counted), CONTENT_TYPE_PLAIN_0_0_4

    def _render_now(self) -> bytes:
        return generate_latest(_WithoutCreated(self._now)) + self._routing.render().encode()

    def _render_counted(self) -> bytes:
        return generate_latest(_WithoutCreated(self._registry))


class _WithoutCreated:
    """A registry without the `_created` series, which double the lines of counters and which the text format does not have."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        for metric in self._registry.collect():
            metric.samples = [sample for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
