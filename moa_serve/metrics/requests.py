"""Counters and histograms of requests, each label set an adapter's (or the base's). Belongs to the event loop."""

from collections.abc import Sequence

from moa_serve.engine.steps import STEP_SECONDS
from moa_serve.metrics.record import RequestRecord
from moa_serve.metrics.registered import Registered

# From a 135M model on a CPU (milliseconds) to an 8B one on a busy GPU.
LATENCY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
LOAD = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
REGISTRY_TROUBLE = ("state_not_understood", "write_failed")


class RequestMetrics:
    def __init__(self, registered: Registered) -> None:
        counter, histogram, whose = registered.counter, registered.histogram, "adapter"
        self._ttft = histogram("moa_time_to_first_token_seconds", "Arrival of a request to its first token.", LATENCY, whose)
        self._gap = histogram("moa_inter_token_seconds", "One token of a stream to the next.", STEP_SECONDS, whose)
        self._e2e = histogram("moa_request_seconds", "Arrival of a request to its end.", LATENCY, whose)
        self._queue = histogram("moa_queue_seconds", "Arrival of a request to the step in which its first row began.", LATENCY, whose)
        self._prompt = counter("moa_prompt_tokens", "Prompt tokens of requests that ran.", whose)
        self._generated = counter("moa_generated_tokens", "Generated tokens.", whose)
        self._cached = counter("moa_cached_tokens", "Prompt tokens that were not computed because they were cached.", whose)
        self._ended = counter(
            "moa_requests", "Requests by how they ended: stop, length, abort (the client left), error.", whose, "finish_reason"
        )
        self._raised = counter(
            "moa_raised_threshold_requests", "Requests that came under pressure, so that their experts had to reach more.", whose
        )
        self._picks = counter("moa_auto_picks", "Requests for the model `auto` that the adapter was picked for.", whose)
        self._trouble = counter("moa_registry_trouble", "State of the registry that could not be written, or not be understood.", "kind")
        for kind in REGISTRY_TROUBLE:
            self._trouble.labels(kind)
        self._last_load = registered.gauge("moa_adapter_last_load_seconds", "The last load of each adapter.", whose)
        self._load = histogram("moa_adapter_load_seconds", "Reading, checking and trying an adapter.", LOAD, "source", "result")

    def observe(self, record: RequestRecord, label: str) -> None:
        """Count a request. Its times are observed where it ran: what was refused before would only make them look short."""
        self._ended.labels(label, record.finish_reason).inc()
        if record.threshold_scale is not None:
            self._raised.labels(label).inc()
        if record.scheduled is None:
            return
        for counter, count in (
            (self._prompt, record.prompt_tokens),
            (self._generated, record.completion_tokens),
            (self._cached, record.cached_tokens),
        ):
            counter.labels(label).inc(count)
        self._queue.labels(label).observe(max(0.0, record.scheduled - record.arrived))
        self._e2e.labels(label).observe(record.finished - record.arrived)
        if record.first_token is not None:
            self._ttft.labels(label).observe(record.first_token - record.arrived)

    def observe_pick(self, label: str) -> None:
        self._picks.labels(label).inc()

    def observe_unread(self, label: str) -> None:
        self._ended.labels(label, "error").inc()

    def observe_gaps(self, label: str, gaps_seconds: Sequence[float]) -> None:
        series = self._gap.labels(label)
        for gap in gaps_seconds:
            series.observe(gap)

    def observe_load(self, seconds: float, source: str, result: str, name: str | None) -> None:
        """`name` is None where nothing was loaded."""
        self._load.labels(source, result).observe(seconds)
        if name is not None:
            self._last_load.labels(name).set(seconds)

    def observe_trouble(self, kind: str) -> None:
        self._trouble.labels(kind).inc()
