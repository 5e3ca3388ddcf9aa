"""Metrics: what one server counts, in the text format of Prometheus.

Two families: our own `moa_*`, and the `vllm:*` names that load balancers and stock dashboards read; beside them those of HTTP routes and of
the process. docs/metrics.md lists all of them.

Belongs to the event loop. The engine thread hands over immutable snapshots and plain counts (routing.py, state.py); a scrape reads the
latest and never asks the engine. Only names of the base and of loaded adapters become labels; everything else is `other`, so no client can
make a series.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from prometheus_client import Metric, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from moa_serve.adapter.cache import AdapterCache
from moa_serve.adapter.manifest import Manifest
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.engine import Engine, TokenEvent
from moa_serve.engine.pressure import MemoryWatch
from moa_serve.engine.shadow import ShadowScore
from moa_serve.engine.watchdog import Watchdog
from moa_serve.metrics.drift import Profile
from moa_serve.metrics.experts import ExpertsUse
from moa_serve.metrics.family import Family, Shown, Wanted, text_of
from moa_serve.metrics.http import HttpMetrics
from moa_serve.metrics.record import RequestRecord, timings
from moa_serve.metrics.registered import Registered
from moa_serve.metrics.requests import RequestMetrics
from moa_serve.metrics.routing import FAMILIES as ROUTING
from moa_serve.metrics.routing import OTHER, RoutingMetrics
from moa_serve.metrics.shadow import ShadowMetrics, ShadowUse
from moa_serve.metrics.state import STATE, Adapters, Now, State
from moa_serve.metrics.vllm import VLLM_STATE, VllmRequests
from moa_serve.model.counters import expert_names

__all__ = ["OTHER", "Adapters", "ExpertsUse", "Metrics", "RequestRecord", "timings"]

LOADED = "ok"
"""The `result` of a load that published its adapter; any other names what went wrong."""


class Metrics:
    """
    Args:
        base_name: what the base is served as: its label.
        max_model_len: served context in tokens: the end of the length histograms.
        named_adapters: adapters with latency and token series of their own (370 lines each), the first that are loaded; the rest: `other`.
        grid_adapters: adapters whose router metrics have a series for each layer and expert.
        has_vllm: show the `vllm:*` names too.
    """

    def __init__(
        self, base_name: str, *, max_model_len: int = 8192, grid_adapters: int = 8, named_adapters: int = 64, has_vllm: bool = True
    ) -> None:
        self._base_name, self._named_adapters = base_name, named_adapters
        self._names: set[str] = set()
        self._registered = Registered()
        self._requests, self._http = RequestMetrics(self._registered), HttpMetrics(self._registered)
        self._shadow = ShadowMetrics(self._registered)
        self._vllm = VllmRequests(self._registered, max_model_len) if has_vllm else None
        self._state = State(base_name)
        self._shown: tuple[Shown[Now], ...] = STATE + VLLM_STATE if has_vllm else STATE
        self._routing = RoutingMetrics(grid_adapters)
        self._process = ProcessCollector(registry=None)
        # One thread for all pages: the C library keeps for each that has written one what that took, a megabyte for 8,000 series.
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="metrics")

    def attach(self, engine: AsyncEngine, adapters: Adapters, cache: AdapterCache | None = None) -> None:
        """Watch an engine, the adapters it serves and the host memory they are in; before the engine starts."""
        self._state.attach(engine, adapters, cache)
        engine.on_step = self.on_step

    def watch(
        self,
        watchdog: Watchdog,
        memory: MemoryWatch,
        is_ready: Callable[[], bool],
        threshold_scales: Callable[[], Mapping[str, float]],
    ) -> None:
        """Show what these see; where a server runs."""
        self._state.watch(watchdog, memory, is_ready, threshold_scales)

    def on_step(self, engine: Engine, events: list[TokenEvent]) -> None:
        """In the engine thread."""
        self._state.publish(engine)
        self._routing.publish(engine, events)

    # -- what happens; called in the event loop

    def observe_request(self, record: RequestRecord) -> None:
        """A request has ended, in whatever way; once for each."""
        label = self._label(record.adapter, record.model)
        self._requests.observe(record, label)
        if self._vllm is not None:
            self._vllm.observe(record, label)

    def observe_pick(self, adapter: str) -> None:
        """An adapter was picked for a request whose model was `auto`."""
        self._requests.observe_pick(self._label(adapter, self._base_name))

    def observe_unread(self) -> None:
        """A request was refused for want of a place before anybody looked for whom it was."""
        self._requests.observe_unread(OTHER)

    def observe_tokens(self, adapter: str | None, gaps_seconds: Sequence[float]) -> None:
        """Seconds between one token of a stream and the next."""
        label = self._label(adapter, self._base_name)
        self._requests.observe_gaps(label, gaps_seconds)
        if self._vllm is not None:
            self._vllm.observe_gaps(label, gaps_seconds)

    def begin_shadow(self, adapter: str) -> None:
        """An answer of this adapter is sampled: its series begin at 0, so that `rate` misses no addition."""
        self._shadow.begin(self._label(adapter, OTHER))

    def observe_shadow(self, adapter: str, revision: str, score: ShadowScore) -> None:
        """An answer was scored by the shadow check; its adapter is loaded."""
        self._shadow.observe(self._label(adapter, OTHER), score)
        self._shadow.add(adapter, revision, score)

    def observe_shadow_skipped(self, adapter: str, reason: str) -> None:
        """A sampled answer was not scored; `reason` is a word of ours."""
        self._shadow.observe_skipped(self._label(adapter, OTHER), reason)

    def observe_response(self, status: int) -> None:
        """An HTTP response of any kind was begun."""
        self._http.responses.labels(str(status)).inc()

    def observe_http(self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int) -> None:
        """An HTTP request has ended; `handler` is the template of its route."""
        self._http.observe(handler, method, status, seconds, request_bytes, response_bytes)

    def registry_trouble(self, kind: str) -> None:
        """One of `REGISTRY_TROUBLE` happened to the registry's state."""
        self._requests.observe_trouble(kind)

    def adapter_loaded(
        self, name: str, revision: str | None, seconds: float, source: str, result: str, *, manifest: Manifest | None = None
    ) -> None:
        """An adapter was loaded, or could not be.

        Args:
            manifest: whose profile tells how its routers behave in training.
            source: who asked: a word of ours, such as lazy or explicit.
            result: "ok", or a word of ours for why not; then `name` gets no series.
        """
        is_loaded = result == LOADED
        self._requests.observe_load(seconds, source, result, name if is_loaded else None)
        if self._vllm is not None and is_loaded:
            self._vllm.observe_load(seconds)
        if is_loaded and revision is not None:
            if len(self._names) < self._named_adapters:
                self._names.add(name)
            profile, experts = (None, ()) if manifest is None else (Profile.of(manifest), expert_names(manifest))
            self._routing.loaded(name, revision, profile, experts)
        else:
            self._routing.sweep()  # what its self-test counted; a scrape would, but nobody may ask for one

    def adapter_unloaded(self, name: str) -> None:
        """A name is gone: its series go too."""
        self._names.discard(name)
        self._registered.forget(name)
        self._shadow.forget(name)
        self._routing.unloaded(name)

    def _label(self, adapter: str | None, model: str) -> str:
        if adapter is None:
            return model if model == self._base_name or model in self._names else OTHER
        return adapter if adapter in self._names else OTHER

    # -- who asks

    def experts(self, name: str) -> ExpertsUse | None:
        """What an adapter's routers did since it was loaded; None where it was not read yet."""
        return self._routing.experts(name)

    def shadow(self, name: str, revision: str) -> ShadowUse | None:
        """What the shadow check has found of a revision; None where it has scored nothing."""
        return self._shadow.use(name, revision)

    @property
    def families(self) -> list[Family]:
        """All that can be on the page."""
        process = [Family(_headed(metric), metric.type, metric.documentation) for metric in self._process.collect()]
        return [*self._registered.families, *(shown.family for shown in self._shown), *(shown.family for shown in ROUTING), *process]

    def render(self, names: Collection[str] | None = None) -> tuple[bytes, str]:
        """The page, and its content type: text format 0.0.4, which every Prometheus reads.

        Args:
            names: of the families, or of their series, that are wanted; None for all.
        """
        wanted = Wanted(names)
        return self._render_now(wanted) + self._registered.text(wanted), CONTENT_TYPE_PLAIN_0_0_4

    async def page(self, names: Collection[str] | None = None) -> tuple[bytes, str]:
        """The same for a server at work: the counters of requests, most of the page and a tenth of a second of it, are written in a thread,
        for they have locks of their own."""
        wanted = Wanted(names)
        now = self._render_now(wanted)
        text = await asyncio.get_running_loop().run_in_executor(self._writer, self._registered.text, wanted)
        return now + text, CONTENT_TYPE_PLAIN_0_0_4

    def _render_now(self, wanted: Wanted) -> bytes:
        now = self._state.look()
        state = "" if now is None else text_of(self._shown, now, wanted)
        return (state + self._routing.render(wanted)).encode() + self._render_process(wanted)

    def _render_process(self, wanted: Wanted) -> bytes:
        if wanted.names is not None and not any(name.startswith("process_") for name in wanted.names):
            return b""
        return generate_latest(_These([metric for metric in self._process.collect() if _headed(metric) in wanted]))


class _These:
    """What `generate_latest` takes."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        yield from self._metrics


def _headed(metric: Metric) -> str:
    """Its name as the page has it."""
    return f"{metric.name}_total" if metric.type == "counter" else metric.name
