"""`moa-serve bench swap`: what it costs that adapters share slots, and that they stand in slots that nobody uses.

Engines in this process get the same traffic in turn: with a slot for every adapter, with fewer slots than adapters, with fewer adapters,
and with the base alone. They compute with one model and one cache, so that they differ in nothing but their slots. Adapters are folders
that are read, published and leased through the real store. Each is packed once when it is loaded, as in a server, before anything is
counted; a swap then is a lease and what the backend does to put a known adapter into a slot.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.store import AdapterStore
from moa_serve.bench import goals
from moa_serve.bench.engine_load import computed_by, run_streams
from moa_serve.bench.goals import Judged
from moa_serve.bench.serve import Computed, Measured, Wave
from moa_serve.bench.synthetic import synthetic
from moa_serve.bench.timing import Spread, interleaved, ratio, seconds
from moa_serve.bench.workload import PAGE, num_pages, refuse_beyond
from moa_serve.engine.engine import Engine, EngineOptions
from moa_serve.engine.request import Request, SamplingParams
from moa_serve.errors import InvalidRequest
from moa_serve.llm import new_model
from moa_serve.model.backend import Backend, Cache
from moa_serve.model.cache import caching_in
from moa_serve.model.weights import Base

FAMILY = "soft_moa"  # the larger one of the paper's two
RESIDENT, CONTROL, SWAPPED, FEW, NONE, IDLE = "resident", "control", "swapped", "few", "base", "idle"
_WARMUPS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The traffic: what stream s asks for in its request k is adapter s + k * streams, counted round.

    With twice as many adapters as slots and a stream for each slot, every request so needs one that is in no slot, and always as many
    adapters are in a batch as with one for each slot: what differs is the swaps.

    Args:
        adapters, slots: of which the first is the larger.
        requests: of each stream, one after another; at least two, or there would be nothing to swap.
        max_tokens: of a request, in the mean: they spread by half of it, so that streams do not end together.
        rounds: in which every engine has its turn.
    """

    adapters: int = 16
    slots: int = 8
    streams: int = 8
    requests: int = 2
    prompt_tokens: int = 64
    max_tokens: int = 32
    rounds: int = 7

    def __post_init__(self) -> None:
        for name, least in (("slots", 1), ("streams", 1), ("requests", 2), ("prompt_tokens", 1), ("max_tokens", 4), ("rounds", 1)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name} is {getattr(self, name)}, but must be at least {least}", param=name)
        if self.adapters <= self.slots:
            raise InvalidRequest(
                f"adapters is {self.adapters} and slots {self.slots}, so that none would ever be swapped; take fewer slots",
                param="adapters",
            )

    @property
    def most_tokens(self) -> int:
        return self.max_tokens + self.max_tokens // 2

    @property
    def is_judged(self) -> bool:
        """More streams than slots wait for each other, which is no matter of how fast a swap is."""
        return self.streams <= self.slots


@dataclass(frozen=True, slots=True)
class SwapReport:
    """
    Args:
        measured: a wave a round of each engine.
        swaps: adapters that were put into slots, in the median wave of each engine.
        read_ms, pack_ms: of loading one adapter: its files read and validated, then put into the backend's layout for the first time.
        swap_ms: of putting a loaded adapter into a slot.
        ratios: of one engine to another.
    """

    computed: Computed
    plan: Plan
    measured: Sequence[Measured]
    swaps: Mapping[str, float]
    read_ms: Spread
    pack_ms: Spread
    swap_ms: Spread
    ratios: Mapping[str, Judged]

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self.computed),
            **asdict(self.plan),
            "measured": [one.to_json() | {"swaps": self.swaps[one.server]} for one in self.measured],
            "read_ms": self.read_ms.to_json(),
            "pack_ms": self.pack_ms.to_json(),
            "swap_ms": self.swap_ms.to_json(),
            "ratios": {name: judged.to_json() for name, judged in self.ratios.items()},
        }


def measure(base: Base, backend: str, plan: Plan, *, on_progress: Callable[[str], None] = lambda _: None) -> SwapReport:
    """Measure all engines under the plan's traffic.

    Args:
        base: the native backend takes its weights over.
        backend: native or torch.
        on_progress: gets a line for each part of the work.
    Raises:
        InvalidRequest: the base is not made for so many tokens.
    """
    asked = f"{plan.prompt_tokens} prompt tokens and up to {plan.most_tokens} to generate"
    refuse_beyond(base.config, plan.prompt_tokens + plan.most_tokens, asked, "prompt_tokens")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(prefix="moa-bench-")))
        with caching_in(folder / "cache"):
            model = stack.enter_context(closing(new_model(backend, base)))
        on_progress(f"making and loading {plan.adapters} adapters")
        library = _Library(base, model, folder / "adapters", plan.adapters)
        engines = _engines(base, model, library, plan)
        for engine in engines.values():
            engine.fill(plan)
        cases = {name: partial(engine.wave, plan) for name, engine in engines.items()}
        on_progress(f"{plan.rounds} rounds of {len(engines)} engines, and one to warm up")
        interleaved(cases, plan.rounds, warmups=_WARMUPS)
        return _report(base, model, library, engines, plan)


class _Library:
    """Made-up adapters in folders, loaded as a server loads its own."""

    def __init__(self, base: Base, model: Backend, folder: Path, count: int) -> None:
        self._store = AdapterStore(base.config, base_name=base.name, base_digest=base.digest, adapters_dir=folder)
        self.revisions: list[str] = []
        self._names: dict[str, str] = {}  # by revision
        self.read_seconds: list[float] = []
        self.pack_seconds: list[float] = []
        for index in range(count):
            name = f"made-up-{index}"
            made = synthetic(FAMILY, base.config, index)
            write_adapter(folder / name, made.manifest, made.tensors)
            self._load(name, model)

    def _load(self, name: str, model: Backend) -> None:
        start = time.perf_counter()
        adapter = self._store.read(name, AdapterSource(name))
        self.read_seconds.append(time.perf_counter() - start)
        self._store.publish(name, AdapterSource(name), adapter)
        self.pack_seconds.append(seconds(lambda: model.warm(adapter)))
        self.revisions.append(adapter.revision)
        self._names[adapter.revision] = name

    def lease(self, revision: str) -> AbstractContextManager[Adapter]:
        return self._store.lease(self._names[revision])


class _SharedModel:
    """A model that several engines compute with in turn. Between two waves none of them has anything in the cache."""

    def __init__(self, model: Backend) -> None:
        self._model = model
        self._cache: Cache | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def new_cache(self, num_blocks: int, block_size: int) -> Cache:
        if self._cache is None:
            self._cache = self._model.new_cache(num_blocks, block_size)
        return self._cache


@dataclass(eq=False, slots=True)
class _Slots:
    """An engine as one of those that are compared.

    Args:
        revisions: that its traffic asks for; empty for the base.
        standing: that are in its slots whether or not they are asked for.
    """

    engine: Engine
    revisions: Sequence[str]
    standing: Sequence[str]
    swap_seconds: list[float]  # that its leases took, whole: an engine leases an adapter while it puts it into a slot
    waves: list[Wave] = field(default_factory=list)
    swaps: list[int] = field(default_factory=list)  # in each wave

    def fill(self, plan: Plan) -> None:
        """Have the slots filled, and everything done once."""
        for revision in self.standing:
            run_streams(self.engine, [iter([_request(self.engine, plan, revision, 2, 0)])])

    def wave(self, plan: Plan) -> float:
        """Seconds of the next one, which is added to `waves`."""
        turn, num_swaps = len(self.waves), len(self.swap_seconds)
        indices = range(turn * plan.requests, (turn + 1) * plan.requests)  # on from the wave before, or what it left would be asked for
        streams = [[self._nth(plan, stream, index) for index in indices] for stream in range(plan.streams)]
        gc.collect()  # what making them left; from here on the collector runs as it does in a server's process
        spent, answers = run_streams(self.engine, [iter(requests) for requests in streams])
        self.waves.append(Wave.of(spent, answers))
        self.swaps.append(len(self.swap_seconds) - num_swaps)
        return spent

    def _nth(self, plan: Plan, stream: int, index: int) -> Request:
        """The same for all engines, but for its adapter."""
        place = stream + index * plan.streams
        revision = self.revisions[place % len(self.revisions)] if self.revisions else None
        drawn = random.Random(place)
        max_tokens = drawn.randint(plan.max_tokens - plan.max_tokens // 2, plan.most_tokens)
        return _request(self.engine, plan, revision, max_tokens, drawn.getrandbits(32))


def _request(engine: Engine, plan: Plan, revision: str | None, max_tokens: int, seed: int) -> Request:
    vocab_size = engine.model.config.vocab_size
    drawn = random.Random(seed)
    prompt = tuple(drawn.randrange(vocab_size) for _ in range(plan.prompt_tokens))
    return Request(prompt, SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True), revision)


def _engines(base: Base, model: Backend, library: _Library, plan: Plan) -> dict[str, _Slots]:
    shared = cast(Backend, _SharedModel(model))
    few = library.revisions[: plan.slots]
    pages = plan.streams * (num_pages(plan.prompt_tokens + plan.most_tokens) + 1)  # and one that a row that grows may need

    def engine(num_slots: int, asked: Sequence[str], standing: Sequence[str]) -> _Slots:
        swap_seconds: list[float] = []

        @contextmanager
        def lease(revision: str) -> Iterator[Adapter]:
            start = time.perf_counter()
            with library.lease(revision) as adapter:
                yield adapter
            swap_seconds.append(time.perf_counter() - start)

        usual = EngineOptions()
        options = EngineOptions(
            num_slots=num_slots,
            max_num_seqs=max(plan.streams, usual.max_num_seqs),
            max_batch_tokens=max(plan.streams, usual.max_batch_tokens),
            kv_cache_bytes=pages * model.bytes_per_block(PAGE),
            block_size=PAGE,
            prefix_cache=False,  # engines share one cache: what one of them left there is not there any more when its turn comes
        )
        return _Slots(Engine(shared, options, lease=lease, base_digest=base.digest), asked, standing, swap_seconds)

    every = library.revisions
    return {
        RESIDENT: engine(plan.adapters, every, every),
        CONTROL: engine(plan.adapters, every, every),
        SWAPPED: engine(plan.slots, every, few),
        FEW: engine(plan.slots, few, few),
        NONE: engine(plan.slots, (), ()),
        IDLE: engine(plan.slots, (), few),
    }


def _report(base: Base, model: Backend, library: _Library, engines: Mapping[str, _Slots], plan: Plan) -> SwapReport:
    measured = {name: Measured(name, plan.streams, one.waves[_WARMUPS:]) for name, one in engines.items()}

    def compare(figure: str, of: str, to: str, goal: float | None = None, *, is_floor: bool = True) -> Judged:
        values = [[getattr(wave, figure) for wave in measured[name].waves] for name in (of, to)]
        return Judged(ratio(*values), goal, is_floor)

    speed, gap = "tokens_per_second", "gap_p99_seconds"
    is_judged = plan.is_judged
    ratios = {
        "control_throughput": compare(speed, CONTROL, RESIDENT),
        "control_gap_p99": compare(gap, CONTROL, RESIDENT),
        "swap_gap_p99": compare(gap, SWAPPED, RESIDENT, goals.SWAP_GAP if is_judged else None, is_floor=False),
        "swap_throughput": compare(speed, SWAPPED, FEW, goals.SWAP_THROUGHPUT if is_judged else None),
        "idle_throughput": compare(speed, IDLE, NONE, goals.IDLE_THROUGHPUT),
    }
    return SwapReport(
        computed_by(base.name, model),
        plan,
        list(measured.values()),
        {name: statistics.median(one.swaps[_WARMUPS:]) for name, one in engines.items()},
        _milliseconds(library.read_seconds),
        _milliseconds(library.pack_seconds),
        _milliseconds(engines[SWAPPED].swap_seconds),
        ratios,
    )


def _milliseconds(values: Sequence[float]) -> Spread:
    return Spread.of([1e3 * value for value in values])
