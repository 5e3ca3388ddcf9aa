"""How things stand now: load, steps, adapters, slots; read at scrape time.

Belongs to the event loop, but for `publish`, which the engine thread calls.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Protocol

from moa_serve.adapter.cache import AdapterCache
from moa_serve.adapter.counts import TierCounts
from moa_serve.engine.async_engine import AsyncEngine, Load
from moa_serve.engine.engine import INCIDENTS, Engine
from moa_serve.engine.pressure import MemoryWatch
from moa_serve.engine.steps import STEP_ROWS, STEP_SECONDS, STEP_TOKENS, StepTimes
from moa_serve.engine.watchdog import LAG_SECONDS, Watchdog
from moa_serve.metrics.family import Family, Sample, Shown, one


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


class State:
    """Whom to look at, and what the engine thread has left."""

    def __init__(self, base_name: str) -> None:
        self.base_name = base_name
        self.engine: AsyncEngine | None = None
        self.adapters: Adapters | None = None
        self.cache: AdapterCache | None = None
        self.times = StepTimes()
        self.watchdog: Watchdog | None = None
        self.memory: MemoryWatch | None = None
        self.is_ready: Callable[[], bool] | None = None
        self.threshold_scales: Callable[[], Mapping[str, float]] | None = None
        self.in_use: frozenset[str | None] = frozenset()  # revisions in slots that rows used after the last step
        self.num_kept = self.looked_for = self.hit = 0

    def attach(self, engine: AsyncEngine, adapters: Adapters, cache: AdapterCache | None) -> None:
        self.engine, self.adapters, self.cache = engine, adapters, cache
        self.times = engine.time_steps()

    def watch(
        self,
        watchdog: Watchdog,
        memory: MemoryWatch,
        is_ready: Callable[[], bool],
        threshold_scales: Callable[[], Mapping[str, float]],
    ) -> None:
        self.watchdog, self.memory, self.is_ready = watchdog, memory, is_ready
        self.threshold_scales = threshold_scales

    def publish(self, engine: Engine) -> None:
        table = engine.slot_table
        self.in_use = frozenset(revision for index, revision in enumerate(table.revisions) if table.num_users(index))
        self.num_kept = engine.block_pool.num_kept
        self.looked_for, self.hit = engine.scheduler.num_queried_tokens, engine.scheduler.num_hit_tokens

    def look(self) -> "Now | None":
        """None before there is an engine."""
        return None if self.engine is None or self.adapters is None else Now(self, self.engine, self.adapters)


class Now:
    """What one scrape sees. Ten thousand adapters may be listed, so that is done once, and only where it is asked for."""

    def __init__(self, state: State, engine: AsyncEngine, adapters: Adapters) -> None:
        self.engine, self._adapters = engine, adapters
        self.base_name, self.times, self.cache = state.base_name, state.times, state.cache
        self.watchdog, self.memory, self.is_ready = state.watchdog, state.memory, state.is_ready
        self.threshold_scales = {} if state.threshold_scales is None else state.threshold_scales()
        self.in_use, self.looked_for, self.hit = state.in_use, state.looked_for, state.hit
        self.load: Load = engine.load
        self.incidents: Mapping[str, int] = engine.incidents
        pool, options = engine.engine.block_pool, engine.engine.options
        self.num_blocks = pool.num_blocks - 1  # one is padding
        self.has_prefix_cache, self.pages = pool.is_keeping, pool.times
        self.kept_ratio = state.num_kept / self.num_blocks
        self.block_size, self.num_slots, self.max_model_len = options.block_size, options.num_slots, engine.engine.max_model_len

    @cached_property
    def items(self) -> list[AdapterItem]:
        return list(self._adapters.items())

    @cached_property
    def loaded(self) -> list[AdapterItem]:
        return [item for item in self.items if item.revision is not None and item.state in ("loaded", "unloading")]

    @cached_property
    def in_slots(self) -> set[str]:
        """Revisions, those that were replaced and still run among them."""
        return {revision for revision in self.load.resident if revision is not None}

    @property
    def num_filled_slots(self) -> int:
        return len(self.in_slots)

    @property
    def tiers(self) -> Iterator[tuple[str, TierCounts]]:
        if self.cache is not None:
            yield "host", self.cache.counts
        yield "slot", self.engine.slot_counts


def _base_info(now: Now) -> Iterator[Sample]:
    yield (now.base_name, now.engine.engine.backend, str(now.max_model_len)), 1


def _incidents(now: Now) -> Iterator[Sample]:
    for kind in INCIDENTS:
        yield (kind,), now.incidents.get(kind, 0)


def _stalls(now: Now) -> Iterator[Sample]:
    if now.watchdog is not None:
        for limit, number in now.watchdog.num_stalls.items():
            yield (f"{limit:g}",), number


def _parts(now: Now) -> Iterator[Sample]:
    for part, seconds in now.times.part_seconds.items():
        yield (part,), seconds


def _by_state(now: Now) -> Iterator[Sample]:
    for state, number in sorted(Counter(str(item.state) for item in now.items).items()):
        yield (state,), number


def _states(now: Now) -> Iterator[Sample]:
    # Those that nobody has asked for are only counted: a folder may hold ten thousand.
    for item in now.items:
        if item.state != "available":
            yield (item.name, str(item.state)), 1


def _info(now: Now) -> Iterator[Sample]:
    for item in now.loaded:
        yield (item.name, item.revision or "", item.variant or ""), 1


def _resident(now: Now) -> Iterator[Sample]:
    for item in now.loaded:
        yield (item.name, "host"), item.bytes
        if item.revision in now.in_slots and item.bytes:  # how large one is that has left host memory, nobody knows
            yield (item.name, "slot"), item.bytes


def _leases(now: Now) -> Iterator[Sample]:
    for item in now.loaded:
        yield (item.name,), item.leases


def _evictions(now: Now) -> Iterator[Sample]:
    for tier, counts in now.tiers:
        for reason, number in counts.evictions.items():
            yield (tier, reason), number


def _memory_share(now: Now) -> float | None:
    return None if now.memory is None else now.memory.share


STATE: tuple[Shown[Now], ...] = (
    one("moa_requests_running", "gauge", "Rows that the engine computes.", lambda now: now.load.running),
    one("moa_requests_waiting", "gauge", "Rows that wait for a place.", lambda now: now.load.waiting),
    one("moa_kv_usage_ratio", "gauge", "Share of the KV cache that is held, 0 to 1.", lambda now: now.load.kv_usage),
    one("moa_streams_open", "gauge", "Rows whose client is still there, answered or not.", lambda now: now.engine.num_open),
    one("moa_engine_steps_total", "counter", "Steps of the engine.", lambda now: now.load.steps),
    one(
        "moa_ready",
        "gauge",
        "1 while new requests are taken, as GET /health/ready says, else 0.",
        lambda now: None if now.is_ready is None else int(now.is_ready()),
    ),
    Shown(
        Family(
            "moa_threshold_scale",
            "gauge",
            "What the thresholds of a request that came now would be multiplied by; other: of adapters without a factor of their own. No "
            "series where none is ever raised.",
            ("adapter",),
        ),
        lambda now: [((name,), scale) for name, scale in now.threshold_scales.items()],
    ),
    one("moa_engine_failed", "gauge", "1 once the engine thread has given up.", lambda now: int(now.engine.failure is not None)),
    one(
        "moa_preemptions_total",
        "counter",
        "Rows that lost their pages to older ones and were computed anew.",
        lambda now: now.load.preemptions,
    ),
    one(
        "moa_kv_kept_ratio",
        "gauge",
        "Share of the KV cache that nobody holds, but that is kept for requests that begin the same, 0 to 1.",
        lambda now: now.kept_ratio,
    ),
    one(
        "moa_prefix_cache_queries_total",
        "counter",
        "Prompt tokens of rows that were looked for in the prefix cache.",
        lambda now: now.looked_for,
    ),
    one("moa_prefix_cache_hits_total", "counter", "Prompt tokens of rows that were found there, and not computed.", lambda now: now.hit),
    Shown(
        Family("moa_base_info", "gauge", "1; the labels name the base, and what computes it.", ("model", "backend", "max_model_len")),
        _base_info,
    ),
    one("moa_step_seconds", "histogram", "Time of each step of the engine.", lambda now: now.times.seconds.copy(), STEP_SECONDS),
    one("moa_step_rows", "histogram", "Rows of each step.", lambda now: now.times.rows.copy(), STEP_ROWS),
    one("moa_step_tokens", "histogram", "Tokens of each step, of prompts and generated.", lambda now: now.times.tokens.copy(), STEP_TOKENS),
    Shown(
        Family(
            "moa_step_part_seconds_total",
            "counter",
            "Time of the timed steps by part: base (projections and norms), attention, router, experts, head, sampling, and other "
            "(scheduling and what else Python does). Over moa_steps_timed_total the mean.",
            ("part",),
        ),
        _parts,
    ),
    one(
        "moa_steps_timed_total",
        "counter",
        "Steps whose time was told by part: all of the native backend's; of the torch backend's one in some dozens, on a GPU fewer.",
        lambda now: now.times.num_timed,
    ),
    Shown(Family("moa_incidents_total", "counter", "What went wrong in the engine and was survived, by kind.", ("kind",)), _incidents),
    one(
        "moa_event_loop_lag_seconds",
        "histogram",
        "By how much a timer of the event loop came late, twenty times a second.",
        lambda now: None if now.watchdog is None else now.watchdog.lag.copy(),
        LAG_SECONDS,
    ),
    Shown(
        Family(
            "moa_event_loop_stalls_total", "counter", "Turns of the event loop that took longer than so many seconds.", ("longer_than",)
        ),
        _stalls,
    ),
    one(
        "moa_event_loop_longest_stall_seconds",
        "gauge",
        "The longest turn of the event loop above a quarter second.",
        lambda now: None if now.watchdog is None else now.watchdog.longest_stall_seconds,
    ),
    one(
        "moa_memory_used_ratio",
        "gauge",
        "Share of the memory limit that is in use, 0 to 1; new work is refused from 0.9 on.",
        _memory_share,
    ),
    Shown(Family("moa_adapters", "gauge", "Adapters by state.", ("state",)), _by_state),
    Shown(Family("moa_adapter_state", "gauge", "1; the state of each adapter that is more than available.", ("adapter", "state")), _states),
    Shown(Family("moa_adapter_info", "gauge", "1; what is loaded.", ("adapter", "revision", "variant")), _info),
    Shown(
        Family("moa_adapter_resident_bytes", "gauge", "Bytes of each loaded adapter by where it is: host, slot.", ("adapter", "tier")),
        _resident,
    ),
    Shown(Family("moa_adapter_leases", "gauge", "Requests that hold an adapter.", ("adapter",)), _leases),
    one("moa_adapter_slots", "gauge", "Adapters that one batch can mix.", lambda now: now.num_slots),
    one("moa_adapter_slots_filled", "gauge", "Slots that hold an adapter.", lambda now: now.num_filled_slots),
    Shown(
        Family(
            "moa_adapter_cache_hits_total",
            "counter",
            "Requests that found their adapter in host memory (host), and rows that found it in a slot when they began (slot).",
            ("tier",),
        ),
        lambda now: [((tier,), counts.hits) for tier, counts in now.tiers],
    ),
    Shown(
        Family(
            "moa_adapter_cache_misses_total",
            "counter",
            "Requests that waited until their adapter was read (host), and rows that had it brought into a slot (slot).",
            ("tier",),
        ),
        lambda now: [((tier,), counts.misses) for tier, counts in now.tiers],
    ),
    Shown(
        Family(
            "moa_adapter_evictions_total",
            "counter",
            "Adapters that left host memory or a slot: for room for another (capacity), because memory is short (pressure), unloaded, "
            "replaced by a newer revision, or failed: their self-test, or the engine.",
            ("tier", "reason"),
        ),
        _evictions,
    ),
    one(
        "moa_adapter_cache_bytes",
        "gauge",
        "Host memory of all adapters in it.",
        lambda now: None if now.cache is None else now.cache.num_bytes,
    ),
    one(
        "moa_adapter_cache_limit_bytes",
        "gauge",
        "Host memory that adapters may take.",
        lambda now: None if now.cache is None else now.cache.max_bytes,
    ),
)
