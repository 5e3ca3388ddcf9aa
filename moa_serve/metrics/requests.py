"""Counters and histograms of requests, each label set an adapter's (or the base's). Belongs to the event loop.

Names, types, labels and buckets of `vllm:*` are vLLM's (vllm/v1/metrics/loggers.py), with `model_name` the served name, the adapter's
where there is one. Its latency buckets begin at 0.3 s, too coarse for a small model; `moa_*` has finer ones.
"""

import math
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from moa_serve.metrics.record import RequestRecord

# From a 135M model on a CPU (milliseconds) to an 8B one on a busy GPU.
LATENCY = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)
GAP = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
LOAD = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)

VLLM_TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
VLLM_GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
VLLM_LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
VLLM_N = (1, 2, 5, 10, 20)
REGISTRY_TROUBLE = ("state_not_understood", "write_failed")
ENGINE = "0"  # there is one engine; its vLLM label


def lengths(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to `limit`."""
    steps = [digit * 10**power for power in range(int(math.log10(max(limit, 1))) + 1) for digit in (1, 2, 5)]
    return [step for step in steps if step <= limit]


class RequestMetrics:
    def __init__(self, registry: CollectorRegistry, max_model_len: int) -> None:
        self._registry = registry
        self._by_adapter: list[tuple[Counter | Histogram | Gauge, str]] = []  # and the label that names the adapter
        sizes = lengths(max_model_len)
        histogram, counter = self._histogram, self._counter

        self._ttft = histogram("moa_time_to_first_token_seconds", "Arrival of a request to its first token.", LATENCY)
        self._gap = histogram("moa_inter_token_seconds", "One token of a stream to the next.", GAP)
        self._e2e = histogram("moa_request_seconds", "Arrival of a request to its end.", LATENCY)
        self._queue = histogram("moa_queue_seconds", "Arrival of a request to the step in which its first row began.", LATENCY)
        self._prompt = counter("moa_prompt_tokens", "Prompt tokens of requests that ran.")
        self._generated = counter("moa_generated_tokens", "Generated tokens.")
        self._cached = counter("moa_cached_tokens", "Prompt tokens that were not computed because they were cached.")
        self._ended = counter("moa_requests", "Requests by how they ended: stop, length, abort (the client left), error.", "finish_reason")
        self.responses = Counter("moa_http_responses", "HTTP responses of any kind.", ("status",), registry=registry)
        self.registry_trouble = Counter(
            "moa_registry_trouble", "State of the registry that could not be written, or not be understood.", ("kind",), registry=registry
        )
        for kind in REGISTRY_TROUBLE:
            self.registry_trouble.labels(kind)
        self._last_load = Gauge("moa_adapter_last_load_seconds", "The last load of each adapter.", ("adapter",), registry=registry)
        self._by_adapter.append((self._last_load, "adapter"))
        self._load = Histogram(
            "moa_adapter_load_seconds", "Reading, checking and trying an adapter.", ("source", "result"), buckets=LOAD, registry=registry
        )

        self._vllm_ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", VLLM_TTFT)
        self._vllm_gap = histogram("vllm:inter_token_latency_seconds", "One token of a stream to the next.", VLLM_GAP)
        self._vllm_tpot = histogram("vllm:request_time_per_output_token_seconds", "Decoding time of one token, by request.", VLLM_GAP)
        self._vllm_e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to end.", VLLM_LATENCY)
        self._vllm_queue = histogram("vllm:request_queue_time_seconds", "Arrival to first scheduling.", VLLM_LATENCY)
        self._vllm_inference = histogram("vllm:request_inference_time_seconds", "First scheduling to end.", VLLM_LATENCY)
        self._vllm_prefill = histogram("vllm:request_prefill_time_seconds", "First scheduling to first token.", VLLM_LATENCY)
        self._vllm_decode = histogram("vllm:request_decode_time_seconds", "First token to end.", VLLM_LATENCY)
        self._vllm_prompt_length = histogram("vllm:request_prompt_tokens", "Prompt tokens of each request.", sizes)
        self._vllm_generated_length = histogram("vllm:request_generation_tokens", "Generated tokens of each request.", sizes)
        self._vllm_max_tokens = histogram("vllm:request_params_max_tokens", "max_tokens of each request that has it.", sizes)
        self._vllm_n = histogram("vllm:request_params_n", "n of each request.", VLLM_N)
        self._vllm_prompt = counter("vllm:prompt_tokens", "Prompt tokens.")
        self._vllm_generated = counter("vllm:generation_tokens", "Generated tokens.")
        self._vllm_cached = counter("vllm:prompt_tokens_cached", "Prompt tokens that were cached.")
        self._vllm_ended = counter("vllm:request_success", "Requests that ran, by how they ended.", "finished_reason")
        self._vllm_load = Histogram("vllm:lora_adapter_load_seconds", "Loads of adapters.", ("engine",), buckets=LOAD, registry=registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(name, text, _labels(name), buckets=buckets, registry=self._registry)
        self._by_adapter.append((histogram, _labels(name)[0]))
        return histogram

    def _counter(self, name: str, text: str, *more: str) -> Counter:
        counter = Counter(name, text, (*_labels(name), *more), registry=self._registry)
        self._by_adapter.append((counter, _labels(name)[0]))
        return counter

    def observe(self, record: RequestRecord, label: str) -> None:
        """Count a request. Its times are observed where it ran: what was refused before would only make them look short."""
        self._ended.labels(label, record.finish_reason).inc()
        if record.scheduled is None:
            return
        for counter, count in (
            (self._prompt, record.prompt_tokens),
            (self._generated, record.completion_tokens),
            (self._cached, record.cached_tokens),
        ):
            counter.labels(label).inc(count)
        queue, e2e = max(0.0, record.scheduled - record.arrived), record.finished - record.arrived
        self._queue.labels(label).observe(queue)
        self._e2e.labels(label).observe(e2e)
        if record.first_token is not None:
            self._ttft.labels(label).observe(record.first_token - record.arrived)
        self._observe_vllm(record, label, queue, e2e)

    def observe_unread(self, label: str) -> None:
        self._ended.labels(label, "error").inc()

    def _observe_vllm(self, record: RequestRecord, label: str, queue: float, e2e: float) -> None:
        assert record.scheduled is not None
        series = (label, ENGINE)
        self._vllm_ended.labels(*series, record.finish_reason).inc()
        self._vllm_prompt.labels(*series).inc(record.prompt_tokens)
        self._vllm_generated.labels(*series).inc(record.completion_tokens)
        self._vllm_cached.labels(*series).inc(record.cached_tokens)
        self._vllm_queue.labels(*series).observe(queue)
        self._vllm_e2e.labels(*series).observe(e2e)
        self._vllm_inference.labels(*series).observe(record.finished - record.scheduled)
        self._vllm_prompt_length.labels(*series).observe(record.prompt_tokens)
        self._vllm_generated_length.labels(*series).observe(record.completion_tokens)
        self._vllm_n.labels(*series).observe(record.n)
        if record.max_tokens is not None:
            self._vllm_max_tokens.labels(*series).observe(record.max_tokens)
        if record.first_token is not None:
            decode = record.finished - record.first_token
            self._vllm_ttft.labels(*series).observe(record.first_token - record.arrived)
            self._vllm_prefill.labels(*series).observe(record.first_token - record.scheduled)
            self._vllm_decode.labels(*series).observe(decode)
            if record.completion_tokens > 1:
                self._vllm_tpot.labels(*series).observe(decode / (record.completion_tokens - 1))

    def observe_gaps(self, label: str, gaps_seconds: Iterable[float]) -> None:
        own, vllm = self._gap.labels(label), self._vllm_gap.labels(label, ENGINE)
        for gap in gaps_seconds:
            own.observe(gap)
            vllm.observe(gap)

    def observe_load(self, seconds: float, source: str, result: str, name: str | None) -> None:
        """`name` is None where nothing was loaded."""
        self._load.labels(source, result).observe(seconds)
        if name is not None:
            self._last_load.labels(name).set(seconds)
            self._vllm_load.labels(ENGINE).observe(seconds)

    def forget(self, name: str) -> None:
        """Remove every series of an adapter."""
        for metric, label in self._by_adapter:
            metric.remove_by_labels({label: name})


def _labels(metric: str) -> tuple[str, ...]:
    """The labels that say whose series it is; the adapter's comes first."""
    return ("model_name", "engine") if metric.startswith("vllm:") else ("adapter",)
