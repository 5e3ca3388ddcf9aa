"""`moa-serve bench metrics`: what it costs a decode step that it is counted, and what a scrape a second adds.

One engine in this process, without HTTP, whose rows decode with as many adapters. Step by step it runs as it is (none), with its metrics
attached (attached), and as it is again (control), so that whatever slows the machine slows all three; then it runs attached while a thread
reads the whole page every second (scraped). What a step calls is timed by itself as well, for a step wavers by more than that.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from moa_serve.adapter.adapter import Adapter
from moa_serve.bench import goals
from moa_serve.bench.engine_load import computed_by
from moa_serve.bench.goals import Judged
from moa_serve.bench.serve import Computed
from moa_serve.bench.synthetic import synthetic
from moa_serve.bench.timing import Spread, ratio
from moa_serve.bench.workload import PAGE, num_pages, random_ids, refuse_beyond
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.engine import Engine, EngineOptions
from moa_serve.engine.request import Request, SamplingParams, Sequence
from moa_serve.errors import InvalidRequest
from moa_serve.llm import new_model
from moa_serve.metrics import Metrics, RequestRecord
from moa_serve.model.weights import Base

NONE, ATTACHED, SCRAPED, CONTROL = "none", "attached", "scraped", "control"
_BY_TURNS = (NONE, ATTACHED, CONTROL)
_WARMUPS = 1
SCRAPE_EVERY_SECONDS = 1.0
_SWITCH_INTERVAL_SECONDS = 0.0005  # as a server has it
_MEASURED_SECONDS = 1.0  # of one case in a round, about: a scrape falls into each
_CALLS = 2000  # of the hooks, for their own time


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """
    Args:
        rows: that decode, each with an adapter of its own.
        context: tokens of their prompts.
        rounds: in which every case has its turn.
        inner_steps: steps of each case in a round; None for about a second.
    """

    rows: int = 8
    context: int = 64
    rounds: int = 30
    inner_steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "context", "rounds"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} is {getattr(self, name)}, but must be at least 1", param=name)


@dataclass(frozen=True, slots=True)
class MetricsReport:
    """
    Args:
        step_ms: by case.
        ratios: of a case to `none`, by the clock and, as `attached_cpu`, of the processor's time, of which others take nothing; and
            `hooks`, of a step's calls alone to the step, both of the processor's time.
        hooks_us: microseconds of these calls, of the processor's time.
        scrape_ms: milliseconds of the whole page, of `page_lines` lines.
    """

    computed: Computed
    plan: Plan
    inner_steps: int
    step_ms: Mapping[str, Spread]
    ratios: Mapping[str, Judged]
    hooks_us: Spread
    scrape_ms: Spread
    page_lines: int

    def to_json(self) -> dict[str, Any]:
        return (
            asdict(self.computed)
            | asdict(self.plan)
            | {
                "inner_steps": self.inner_steps,
                "step_ms": {name: spread.to_json() for name, spread in self.step_ms.items()},
                "ratios": {name: judged.to_json() for name, judged in self.ratios.items()},
                "hooks_us": self.hooks_us.to_json(),
                "scrape_ms": self.scrape_ms.to_json(),
                "page_lines": self.page_lines,
            }
        )


def measure(base: Base, backend: str, plan: Plan, *, on_progress: Callable[[str], None] = lambda _: None) -> MetricsReport:
    """Measure all cases.

    Args:
        base: the native backend takes its weights over.
        backend: native or torch.
        on_progress: gets a line for each part of the work.
    Raises:
        InvalidRequest: the base is not made for so many tokens.
    """
    refuse_beyond(base.config, plan.context + 1, f"prompts of {plan.context} tokens and one to generate", "context")
    on_progress(f"making {plan.rows} adapters")
    adapters = [synthetic("soft_moa", base.config, seed) for seed in range(plan.rows)]
    with closing(new_model(backend, base)) as model, _switching_as_a_server():
        room = min(base.config.max_position, plan.context + 4096)
        options = EngineOptions(
            max_num_seqs=plan.rows,
            max_batch_tokens=max(256, plan.rows),
            num_slots=plan.rows,
            kv_cache_bytes=plan.rows * num_pages(room) * model.bytes_per_block(PAGE),
            max_model_len=room,
            prefix_cache=False,
        )
        by_revision = {adapter.revision: adapter for adapter in adapters}
        loop_side = AsyncEngine(
            lambda _: Engine(model, options, lease=lambda revision: nullcontext(by_revision[revision]), base_digest=base.digest)
        )
        watched = _Watched(loop_side, adapters, plan)
        steps = plan.inner_steps or watched.steps_for(_MEASURED_SECONDS, (room - plan.context - 2) // len(_BY_TURNS))
        on_progress(f"{plan.rounds} rounds of {len(_BY_TURNS) + 1} cases of {steps} steps, and one to warm up")
        times: dict[str, list[float]] = {}
        for turn in range(-_WARMUPS, plan.rounds):
            found = watched.by_turns(steps, turn) | {SCRAPED: watched.scraped(steps)}
            for name, spent in found.items() if turn >= 0 else ():
                times.setdefault(name, []).append(spent)
        hooks = watched.hook_seconds(plan.rounds)
        scrapes, lines = watched.scrape_seconds(plan.rounds)
        computed = computed_by(base.name, model)
    ratios = {
        ATTACHED: Judged(ratio(times[ATTACHED], times[NONE]), goals.METRICS_TO_NONE),
        SCRAPED: Judged(ratio(times[SCRAPED], times[NONE])),
        CONTROL: Judged(ratio(times[CONTROL], times[NONE])),
        _cpu(ATTACHED): Judged(ratio(times[_cpu(ATTACHED)], times[_cpu(NONE)]), goals.METRICS_TO_NONE),
        _cpu(CONTROL): Judged(ratio(times[_cpu(CONTROL)], times[_cpu(NONE)])),
        "hooks": Judged(ratio(hooks, times[_cpu(NONE)]), goals.METRICS_TO_NONE - 1),
    }
    return MetricsReport(
        computed,
        plan,
        steps,
        {name: Spread.of([1e3 * spent for spent in times[name]]) for name in (NONE, ATTACHED, SCRAPED, CONTROL)},
        ratios,
        Spread.of([1e6 * spent for spent in hooks]),
        Spread.of([1e3 * spent for spent in scrapes]),
        lines,
    )


def _cpu(case: str) -> str:
    return f"{case}_cpu"


@contextmanager
def _switching_as_a_server() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@dataclass(frozen=True, slots=True)
class _Item:
    """What the page says of a made-up adapter."""

    name: str
    revision: str
    bytes: int
    state: str = "loaded"
    variant: str = "soft_moa"
    leases: int = 1
    is_pinned: bool = False


class _Watched:
    """An engine whose metrics can be taken off, with all series that so many adapters have."""

    def __init__(self, loop_side: AsyncEngine, adapters: list[Adapter], plan: Plan) -> None:
        self._engine, self._plan = loop_side.engine, plan
        self._revisions = [adapter.revision for adapter in adapters]
        self._prompts = random_ids(self._engine.model, plan.rows, plan.context, 1).tolist()
        self._items = [_Item(f"adapter-{number}", adapter.revision, adapter.num_bytes) for number, adapter in enumerate(adapters)]
        self._metrics = Metrics("base", max_model_len=self._engine.max_model_len, grid_adapters=plan.rows)
        self._metrics.attach(loop_side, self)
        self._times = self._engine.times
        for item, adapter in zip(self._items, adapters, strict=True):
            self._metrics.adapter_loaded(item.name, item.revision, 0.1, "lazy", "ok", manifest=adapter.manifest)
            self._metrics.observe_request(_record(item.name))
            self._metrics.observe_tokens(item.name, [0.01])
        self._spent = 0.0  # in `on_step`, of one measurement
        self._hooks: list[float] = []  # the same a step, of each measurement with metrics and without scrapes

    def items(self) -> list[_Item]:
        return self._items

    def steps_for(self, seconds: float, most: int) -> int:
        """So many steps take about so long."""
        return max(1, min(most, round(seconds / max(self.by_turns(min(8, most), 0)[NONE], 1e-6))))

    def by_turns(self, steps: int, turn: int) -> dict[str, float]:
        """Seconds of a decode step by case, over `steps` of each, by the clock and of the processor; each turn has another order."""
        spent = dict.fromkeys([*_BY_TURNS, *map(_cpu, _BY_TURNS)], 0.0)
        self._spent = 0.0
        with self._decoding():
            for number in range(steps):
                for place in range(len(_BY_TURNS)):
                    case = _BY_TURNS[(turn + number + place) % len(_BY_TURNS)]
                    cpu = time.process_time()
                    spent[case] += self._step(is_attached=case == ATTACHED)
                    spent[_cpu(case)] += time.process_time() - cpu
        self._hooks.append(self._spent / steps)
        return {case: total / steps for case, total in spent.items()}

    def scraped(self, steps: int) -> float:
        """Seconds of a decode step with metrics, over `steps`, while they are read."""
        with self._decoding(), self._scraping():
            return sum(self._step(is_attached=True) for _ in range(steps)) / steps

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """All rows are behind their prompts; they end with it."""
        rows = [self._add(prompt, revision) for prompt, revision in zip(self._prompts, self._revisions, strict=True)]
        try:
            while not all(row.num_generated for row in rows):
                self._step(is_attached=False)
            yield
        finally:
            for row in rows:
                self._engine.end(row, "abort")

    def _add(self, prompt: list[int], revision: str) -> Sequence:
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=None)
        return self._engine.add(Request(tuple(prompt), params, revision))

    def _step(self, *, is_attached: bool) -> float:
        """Seconds that it took."""
        self._engine.times = self._times if is_attached else None
        start = time.perf_counter()
        events = self._engine.step()
        if is_attached:
            behind = time.thread_time()
            self._metrics.on_step(self._engine, events)
            self._spent += time.thread_time() - behind
        spent = time.perf_counter() - start
        for event in events:
            if event.error is not None:
                raise event.error
        return spent

    @contextmanager
    def _scraping(self) -> Iterator[None]:
        is_over = threading.Event()

        def scrape() -> None:
            while not is_over.wait(SCRAPE_EVERY_SECONDS / 2):
                self._metrics.render()
                if is_over.wait(SCRAPE_EVERY_SECONDS / 2):
                    return

        thread = threading.Thread(target=scrape, name="scrape")
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def hook_seconds(self, rounds: int) -> list[float]:
        """Of what a step calls, by itself: what follows the step as it was in the rounds, for it takes snapshots by the clock, and the rest
        in a loop, for it is short."""
        assert self._times is not None, "metrics were attached"
        found = []
        for behind in self._hooks[-rounds:]:
            start = time.thread_time()
            for _ in range(_CALLS):
                self._times.begin(self._engine.model)
                self._times.sampled(0.0)
                self._times.end(self._engine.model, self._plan.rows, self._plan.rows)
            found.append((time.thread_time() - start) / _CALLS + behind)
        return found

    def scrape_seconds(self, rounds: int) -> tuple[list[float], int]:
        """Of a whole page each, and its lines."""
        found, page = [], b""
        for _ in range(rounds):
            start = time.perf_counter()
            page, _ = self._metrics.render()
            found.append(time.perf_counter() - start)
        return found, page.count(b"\n")


def _record(name: str) -> RequestRecord:
    return RequestRecord(
        model=name,
        adapter=name,
        revision=None,
        request_id="bench",
        endpoint="completions",
        prompt_tokens=64,
        completion_tokens=32,
        cached_tokens=0,
        longest_completion=32,
        finish_reason="length",
        arrived=0.0,
        scheduled=0.01,
        first_token=0.05,
        finished=0.5,
        n=1,
        max_tokens=32,
        status=200,
    )
