"""How things stand now: load, adapters, slots; read at scrape time.

Belongs to the event loop, but for `publish`, which the engine thread calls.
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.engine import INCIDENTS, Engine
from moa_serve.engine.pressure import MemoryWatch
from moa_serve.engine.watchdog import Watchdog

ENGINE = "0"
_Family = TypeVar("_Family", GaugeMetricFamily, CounterMetricFamily)


class AdapterItem(Protocol):
    """What is shown of one adapter, loaded or not."""

    @property
    def name(self) -> str: ...
    @property
    def state(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def variant(self) -> str | None: ...
    @property
    def bytes(self) -> int: ...
    @property
    def leases(self) -> int: ...
    @property
    def is_pinned(self) -> bool: ...


class Adapters(Protocol):
    """The registry, as far as metrics know it."""

    def items(self) -> Iterable[AdapterItem]: ...


class StateMetrics:
    """A collector: makes its families anew at each scrape, so nothing of an unloaded adapter stays."""

    def __init__(self, base_name: str) -> None:
        self._base_name = base_name
        self._engine: AsyncEngine | None = None
        self._adapters: Adapters | None = None
        self._watchdog: Watchdog | None = None
        self._memory: MemoryWatch | None = None
        self._slots: tuple[tuple[str, bool], ...] = ()  # (revision, in use) of each filled slot after the last step
        self._kept_ratio = 0.0
        self._looked_for = self._hit = 0  # prompt tokens in the prefix cache

    def attach(self, engine: AsyncEngine, adapters: Adapters) -> None:
        self._engine, self._adapters = engine, adapters
        pool, options = engine.engine.block_pool, engine.engine.options
        self._num_blocks = pool.num_held + pool.num_free
        self._has_prefix_cache = pool.is_keeping
        self._block_size, self._num_slots, self._max_model_len = options.block_size, options.num_slots, engine.engine.max_model_len

    def watch(self, watchdog: Watchdog, memory: MemoryWatch) -> None:
        self._watchdog, self._memory = watchdog, memory

    def publish(self, engine: Engine) -> None:
        table = engine.slot_table
        self._slots = tuple((revision, table.num_users(index) > 0) for index, revision in enumerate(table.revisions) if revision)
        self._kept_ratio = engine.block_pool.num_kept / self._num_blocks
        self._looked_for, self._hit = engine.scheduler.num_queried_tokens, engine.scheduler.num_hit_tokens

    def describe(self) -> Iterable[Metric]:
        """Nothing: a registry must not collect from a server that is not complete yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        if self._engine is None or self._adapters is None:
            return
        yield from self._load(self._engine)
        yield from self._incidents(self._engine)
        items = list(self._adapters.items())
        loaded = [item for item in items if item.revision is not None and item.state in ("loaded", "unloading")]
        yield from self._own_adapters(items, loaded)
        yield from self._vllm_adapters(loaded)

    def _load(self, engine: AsyncEngine) -> Iterator[Metric]:
        load, vllm = engine.load, {"model_name": self._base_name, "engine": ENGINE}
        # Load balancers take the first series of a gauge, so the vllm ones have one series each, whatever the adapters.
        for own, theirs, text, value in (
            ("moa_requests_running", "vllm:num_requests_running", "Rows that the engine computes.", load.running),
            ("moa_requests_waiting", "vllm:num_requests_waiting", "Rows that wait for a place.", load.waiting),
            ("moa_kv_usage_ratio", "vllm:kv_cache_usage_perc", "Share of the KV cache that is held, 0 to 1.", load.kv_usage),
        ):
            yield GaugeMetricFamily(own, text, value)
            yield _one(GaugeMetricFamily(theirs, text, labels=list(vllm)), vllm, value)
        yield GaugeMetricFamily("moa_streams_open", "Rows whose client is still there, answered or not.", engine.num_open)
        yield CounterMetricFamily("moa_engine_steps", "Steps of the engine.", load.steps)
        yield GaugeMetricFamily("moa_engine_failed", "1 once the engine thread has given up.", int(engine.failure is not None))
        text = "Rows that lost their pages to older ones and were computed anew."
        yield CounterMetricFamily("moa_preemptions", text, load.preemptions)
        yield _one(CounterMetricFamily("vllm:num_preemptions", text, labels=list(vllm)), vllm, load.preemptions)
        text = "Share of the KV cache that nobody holds, but that is kept for requests that begin the same, 0 to 1."
        yield GaugeMetricFamily("moa_kv_kept_ratio", text, self._kept_ratio)
        for name, text, number in (
            ("prefix_cache_queries", "Prompt tokens of rows that were looked for in the prefix cache.", self._looked_for),
            ("prefix_cache_hits", "Prompt tokens of rows that were found there, and not computed.", self._hit),
        ):
            yield CounterMetricFamily(f"moa_{name}", text, number)
            yield _one(CounterMetricFamily(f"vllm:{name}", text, labels=list(vllm)), vllm, number)
        config = {
            "block_size": str(self._block_size),
            "num_gpu_blocks": str(self._num_blocks),
            "enable_prefix_caching": str(self._has_prefix_cache),
            "engine": ENGINE,
        }
        yield _one(GaugeMetricFamily("vllm:cache_config_info", "Size of the KV cache.", labels=list(config)), config, 1)
        base = {"model": self._base_name, "max_model_len": str(self._max_model_len)}
        yield _one(GaugeMetricFamily("moa_base_info", "The base that is served.", labels=list(base)), base, 1)

    def _incidents(self, engine: AsyncEngine) -> Iterator[Metric]:
        incidents = CounterMetricFamily("moa_incidents", "What went wrong in the engine and was survived, by kind.", labels=["kind"])
        for kind in INCIDENTS:
            incidents.add_metric([kind], engine.incidents.get(kind, 0))
        yield incidents
        if self._watchdog is not None:
            text = "Turns of the event loop that took longer than so many seconds."
            stalls = CounterMetricFamily("moa_event_loop_stalls", text, labels=["longer_than"])
            for limit, number in self._watchdog.num_stalls.items():
                stalls.add_metric([f"{limit:g}"], number)
            yield stalls
            longest = self._watchdog.longest_stall_seconds
            yield GaugeMetricFamily(
                "moa_event_loop_longest_stall_seconds", "The longest turn of the event loop above a quarter second.", longest
            )
        if self._memory is not None and self._memory.share is not None:
            text = "Share of the memory limit that is in use, 0 to 1; new work is refused from 0.9 on."
            yield GaugeMetricFamily("moa_memory_used_ratio", text, self._memory.share)

    def _own_adapters(self, items: list[AdapterItem], loaded: list[AdapterItem]) -> Iterator[Metric]:
        # Ten thousand adapters may lie in the folder: those that nobody has asked for are only counted.
        count = GaugeMetricFamily("moa_adapters", "Adapters by state.", labels=["state"])
        for state, number in sorted(Counter(str(item.state) for item in items).items()):
            count.add_metric([state], number)
        yield count
        states = GaugeMetricFamily("moa_adapter_state", "State of each adapter that is more than available.", labels=["adapter", "state"])
        for item in items:
            if item.state != "available":
                states.add_metric([item.name, str(item.state)], 1)
        yield states
        info = GaugeMetricFamily("moa_adapter_info", "What is loaded.", labels=["adapter", "revision", "variant"])
        resident = GaugeMetricFamily("moa_adapter_resident_bytes", "Bytes by where they are.", labels=["adapter", "tier"])
        leases = GaugeMetricFamily("moa_adapter_leases", "Rows that hold an adapter.", labels=["adapter"])
        in_slots = {revision for revision, _ in self._slots}
        for item in loaded:
            info.add_metric([item.name, item.revision or "", item.variant or ""], 1)
            leases.add_metric([item.name], item.leases)
            resident.add_metric([item.name, "host"], item.bytes)
            if item.revision in in_slots:
                resident.add_metric([item.name, "slot"], item.bytes)
        yield from (info, resident, leases)
        yield GaugeMetricFamily("moa_adapter_slots", "Adapters that one batch can mix.", self._num_slots)
        filled = sum(item.revision in in_slots for item in loaded)
        yield GaugeMetricFamily("moa_adapter_slots_filled", "Slots that hold an adapter.", filled)

    def _vllm_adapters(self, loaded: list[AdapterItem]) -> Iterator[Metric]:
        in_use = {revision for revision, is_used in self._slots if is_used}
        in_slots = {revision for revision, _ in self._slots}
        running = sorted(item.name for item in loaded if item.leases and item.revision in in_use)
        waiting = sorted(item.name for item in loaded if item.leases and item.revision not in in_use)
        labels = {
            "max_lora": str(self._num_slots),
            "running_lora_adapters": ",".join(running),
            "waiting_lora_adapters": ",".join(waiting),
        }
        # The series with the greatest value counts as the latest, hence the time; the one before is gone, so it cannot be taken for it.
        text = "Adapters that run and wait; the value is the Unix time of the scrape."
        yield _one(GaugeMetricFamily("vllm:lora_requests_info", text, labels=list(labels)), labels, time.time())
        # vLLM calls its tiers gpu and cpu; ours are a slot of the engine, wherever that computes, and host memory.
        names = ["engine", "adapter_name", "level", "pinned"]
        resident = GaugeMetricFamily("vllm:lora_adapter_loaded", "Where each adapter is.", labels=names)
        for item in loaded:
            pinned = str(item.is_pinned).lower()
            if item.bytes:  # else it left memory and is read again when asked for
                resident.add_metric([ENGINE, item.name, "cpu", pinned], 1)
            if item.revision in in_slots:
                resident.add_metric([ENGINE, item.name, "gpu", "false"], 1)  # a pin holds host memory
        yield resident
        engine = {"engine": ENGINE}
        for name, text, value in (
            ("vllm:num_gpu_loaded_lora_adapters", "Adapters in slots.", sum(item.revision in in_slots for item in loaded)),
            ("vllm:num_cpu_loaded_lora_adapters", "Adapters in host memory.", sum(item.bytes > 0 for item in loaded)),
            ("vllm:max_gpu_lora_adapters", "Slots.", self._num_slots),
        ):
            yield _one(GaugeMetricFamily(name, text, labels=list(engine)), engine, value)


def _one(family: _Family, labels: dict[str, str], value: float) -> _Family:
    family.add_metric(list(labels.values()), value)
    return family
