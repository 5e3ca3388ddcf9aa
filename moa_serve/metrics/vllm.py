"""The `vllm:*` names that load balancers, benchmarks and stock dashboards read. Belongs to the event loop.

Names, types, labels and buckets are vLLM's (vllm/v1/metrics/loggers.py), with `model_name` the served name, the adapter's where there is
one. Its latency buckets begin at 0.3 s, too coarse for a small model; `moa_*` has finer ones. Left out is what has no meaning here:
`mm_cache_*` (there are no images), `external_*` (no cache outside the process), `estimated_*` (of a GPU's roofline),
`num_requests_waiting_by_reason`.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import Counter, Histogram

from moa_serve.engine.buckets import Distribution
from moa_serve.engine.page_times import PAGE_SECONDS, SAMPLED
from moa_serve.engine.steps import STEP_TOKENS
from moa_serve.metrics.family import Family, Sample, Shown
from moa_serve.metrics.record import RequestRecord
from moa_serve.metrics.registered import Registered
from moa_serve.metrics.requests import LOAD
from moa_serve.metrics.state import Now

TTFT = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
GAP = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
N = (1, 2, 5, 10, 20)
ENGINE = "0"  # there is one engine
_WHOSE = ("model_name", "engine")


def lengths(limit: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... up to `limit`."""
    steps = [digit * 10**power for power in range(int(math.log10(max(limit, 1))) + 1) for digit in (1, 2, 5)]
    return [step for step in steps if step <= limit]


class VllmRequests:
    """What is counted of requests under vLLM's names."""

    def __init__(self, registered: Registered, max_model_len: int) -> None:
        sizes = lengths(max_model_len)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return registered.histogram(f"vllm:{name}", text, buckets, *_WHOSE)

        def counter(name: str, text: str, *more: str) -> Counter:
            return registered.counter(f"vllm:{name}", text, *_WHOSE, *more)

        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT)
        self._gap = histogram("inter_token_latency_seconds", "One token of a stream to the next.", GAP)
        self._tpot = histogram("request_time_per_output_token_seconds", "Decoding time of one token, by request.", GAP)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to end.", LATENCY)
        self._queue = histogram("request_queue_time_seconds", "Arrival to first scheduling.", LATENCY)
        self._inference = histogram("request_inference_time_seconds", "First scheduling to end.", LATENCY)
        self._prefill = histogram("request_prefill_time_seconds", "First scheduling to first token.", LATENCY)
        self._decode = histogram("request_decode_time_seconds", "First token to end.", LATENCY)
        self._prompt_length = histogram("request_prompt_tokens", "Prompt tokens of each request.", sizes)
        self._generated_length = histogram("request_generation_tokens", "Generated tokens of each request.", sizes)
        self._longest = histogram("request_max_num_generation_tokens", "Generated tokens of each request's longest completion.", sizes)
        self._computed = histogram(
            "request_prefill_kv_computed_tokens",
            "Prompt tokens of each request that were computed, and not cached.",
            sizes,
        )
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens of each request that has it.", sizes)
        self._n = histogram("request_params_n", "n of each request.", N)
        self._prompt = counter("prompt_tokens", "Prompt tokens.")
        self._generated = counter("generation_tokens", "Generated tokens.")
        self._cached = counter("prompt_tokens_cached", "Prompt tokens that were cached.")
        self._by_source = counter(
            "prompt_tokens_by_source", "Prompt tokens by where they come from: local_compute, local_cache_hit.", "source"
        )
        self._ended = counter("request_success", "Requests that ran, by how they ended.", "finished_reason")
        self._load = registered.histogram("vllm:lora_adapter_load_seconds", "Loads of adapters.", LOAD, "engine")

    def observe(self, record: RequestRecord, label: str) -> None:
        """Count a request that ran."""
        if record.scheduled is None:
            return
        series = (label, ENGINE)
        computed = record.prompt_tokens - record.cached_tokens
        self._ended.labels(*series, record.finish_reason).inc()
        self._prompt.labels(*series).inc(record.prompt_tokens)
        self._generated.labels(*series).inc(record.completion_tokens)
        self._cached.labels(*series).inc(record.cached_tokens)
        self._by_source.labels(*series, "local_compute").inc(computed)
        self._by_source.labels(*series, "local_cache_hit").inc(record.cached_tokens)
        self._queue.labels(*series).observe(max(0.0, record.scheduled - record.arrived))
        self._e2e.labels(*series).observe(record.finished - record.arrived)
        self._inference.labels(*series).observe(record.finished - record.scheduled)
        self._prompt_length.labels(*series).observe(record.prompt_tokens)
        self._generated_length.labels(*series).observe(record.completion_tokens)
        self._longest.labels(*series).observe(record.longest_completion)
        self._computed.labels(*series).observe(computed)
        self._n.labels(*series).observe(record.n)
        if record.max_tokens is not None:
            self._max_tokens.labels(*series).observe(record.max_tokens)
        if record.first_token is not None:
            decode = record.finished - record.first_token
            self._ttft.labels(*series).observe(record.first_token - record.arrived)
            self._prefill.labels(*series).observe(record.first_token - record.scheduled)
            self._decode.labels(*series).observe(decode)
            if record.longest_completion > 1:
                self._tpot.labels(*series).observe(decode / (record.longest_completion - 1))

    def observe_gaps(self, label: str, gaps_seconds: Sequence[float]) -> None:
        series = self._gap.labels(label, ENGINE)
        for gap in gaps_seconds:
            series.observe(gap)

    def observe_load(self, seconds: float) -> None:
        self._load.labels(ENGINE).observe(seconds)


# -- how things stand


def _scheduler(
    name: str, kind: str, text: str, value: Callable[[Now], float | Distribution], buckets: tuple[float, ...] = ()
) -> Shown[Now]:  # fmt: skip
    """One series, whatever the adapters: of several, load balancers take the first."""
    return Shown(Family(f"vllm:{name}", kind, text, _WHOSE, buckets), lambda now: [((now.base_name, ENGINE), value(now))])


def _slots(name: str, text: str, value: Callable[[Now], float]) -> Shown[Now]:
    return Shown(Family(f"vllm:{name}", "gauge", text, ("engine",)), lambda now: [((ENGINE,), value(now))])


def _sleep_states(now: Now) -> Iterator[Sample]:
    for state in ("awake", "weights_offloaded", "discard_all"):
        yield (now.base_name, ENGINE, state), float(state == "awake")


def _cache_config(now: Now) -> Iterator[Sample]:
    yield (str(now.block_size), str(now.num_blocks), str(now.has_prefix_cache), ENGINE), 1


def _lora_requests(now: Now) -> Iterator[Sample]:
    leased = sorted((item.name, item.revision in now.in_use) for item in now.loaded if item.leases)
    running, waiting = (",".join(name for name, is_running in leased if is_running is wanted) for wanted in (True, False))
    # The series with the greatest value counts as the latest, hence the time; the one before is gone, so it cannot be taken for it.
    yield (str(now.num_slots), waiting, running), time.time()


def _residency(now: Now) -> Iterator[Sample]:
    # vLLM calls its tiers gpu and cpu; ours are a slot of the engine, wherever that computes, and host memory.
    for item in now.loaded:
        if item.bytes:  # else it left memory and is read again when asked for
            yield (ENGINE, item.name, "cpu", str(item.is_pinned).lower()), 1
        if item.revision in now.in_slots:
            yield (ENGINE, item.name, "gpu", "false"), 1  # a pin holds host memory


VLLM_STATE: tuple[Shown[Now], ...] = (
    _scheduler("num_requests_running", "gauge", "Rows that the engine computes.", lambda now: now.load.running),
    _scheduler("num_requests_waiting", "gauge", "Rows that wait for a place.", lambda now: now.load.waiting),
    _scheduler("kv_cache_usage_perc", "gauge", "Share of the KV cache that is held, 0 to 1.", lambda now: now.load.kv_usage),
    _scheduler(
        "num_preemptions_total",
        "counter",
        "Rows that lost their pages to older ones and were computed anew.",
        lambda now: now.load.preemptions,
    ),
    _scheduler(
        "prefix_cache_queries_total",
        "counter",
        "Prompt tokens of rows that were looked for in the prefix cache.",
        lambda now: now.looked_for,
    ),
    _scheduler("prefix_cache_hits_total", "counter", "Prompt tokens of rows that were found there, and not computed.", lambda now: now.hit),
    _scheduler(
        "prompt_tokens_recomputed_total",
        "counter",
        "Cached prompt tokens that were computed all the same: 0, for the page with a prompt's last token is never taken from the cache.",
        lambda now: 0,
    ),
    _scheduler(
        "corrupted_requests_total",
        "counter",
        "Rows that ended because their logits were NaN or infinity.",
        lambda now: sum(now.incidents.get(kind, 0) for kind in ("adapter_nonfinite", "base_nonfinite")),
    ),
    _scheduler("iteration_tokens_total", "histogram", "Tokens of each step.", lambda now: now.times.tokens.copy(), STEP_TOKENS),
    _scheduler(
        "kv_block_lifetime_seconds",
        "histogram",
        f"From handing out a KV page to giving up what it holds for another's room; of one page in {SAMPLED}.",
        lambda now: now.pages.lifetime.copy(),
        PAGE_SECONDS,
    ),
    _scheduler(
        "kv_block_idle_before_evict_seconds",
        "histogram",
        f"How long nobody had held such a page by then; of one page in {SAMPLED}.",
        lambda now: now.pages.idle.copy(),
        PAGE_SECONDS,
    ),
    _scheduler(
        "kv_block_reuse_gap_seconds",
        "histogram",
        f"From a row that began to hold a page to the next that found it in the prefix cache; of one page in {SAMPLED}.",
        lambda now: now.pages.reuse_gap.copy(),
        PAGE_SECONDS,
    ),
    Shown(Family("vllm:engine_sleep_state", "gauge", "1 for awake, which the engine always is.", (*_WHOSE, "sleep_state")), _sleep_states),
    Shown(
        Family(
            "vllm:cache_config_info",
            "gauge",
            "1; the labels have the size of the KV cache.",
            ("block_size", "num_gpu_blocks", "enable_prefix_caching", "engine"),
        ),
        _cache_config,
    ),
    Shown(
        Family(
            "vllm:lora_requests_info",
            "gauge",
            "Adapters that run and wait, separated by commas; the value is the Unix time of the scrape.",
            ("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        ),
        _lora_requests,
    ),
    Shown(
        Family(
            "vllm:lora_adapter_loaded",
            "gauge",
            "1 where an adapter is: level gpu is a slot of the engine, wherever that computes, cpu is host memory.",
            ("engine", "adapter_name", "level", "pinned"),
        ),
        _residency,
    ),
    _slots("num_gpu_loaded_lora_adapters", "Adapters in slots.", lambda now: now.num_filled_slots),
    _slots("num_cpu_loaded_lora_adapters", "Adapters in host memory.", lambda now: sum(item.bytes > 0 for item in now.loaded)),
    _slots("max_gpu_lora_adapters", "Slots.", lambda now: now.num_slots),
)
