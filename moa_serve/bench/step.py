"""`moa-serve bench step`: what a step of the model costs with each family of adapters, as ratios to the base's own, taken in one run.

At the level of the model: a batch goes in and logits come out, by whatever backend is given; scheduler, sampler and HTTP are not in it.
Cores and threads are the caller's affair. Absolute times are shown and not judged.
"""

import ctypes
import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moa_serve.adapter.manifest import TARGETS
from moa_serve.bench import goals
from moa_serve.bench.goals import Judged
from moa_serve.bench.synthetic import FAMILIES, SPARE_TOKENS, made_up
from moa_serve.bench.timing import Spread, interleaved, ratio, seconds
from moa_serve.bench.workload import CONTEXT, PAGE, Pages, Workload, has_goals, num_pages, selected_share, steps_for, wait_for
from moa_serve.config import ModelConfig, linear_shape
from moa_serve.errors import InvalidRequest
from moa_serve.model.backend import Backend, PreparedAdapter
from moa_serve.native import library as lib
from moa_serve.native.packing import INT8_GROUP

ROWS, PREFILL = (1, 2, 4, 8, 16, 32), 256
ALWAYS = ("soft_moa", "sparse_moa")  # what every run measures, one adapter and several
OTHERS = tuple(family for family in FAMILIES if family not in ALWAYS)
_BASE, _CONTROL, _MIXED, _APART, _READING = "base", "control", "_mixed", "sparse_moa_apart", "reading"
_PLAIN = "base_bfloat16"
WARMUPS = 1  # rounds that do not count

Bandwidth = Callable[[], float]  # bytes/s that memory gives, measured by the call


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Args:
        rows: sequences that decode one token each, behind `context` of theirs; one size of batch after the other.
        prefills: tokens of one sequence that is prefilled.
        families: of `OTHERS`, one adapter of each beside the Soft and the Sparse MoA.
        num_adapters: in a mixed batch, which there is from as many rows on.
        rounds: in which every case has its turn.
        inner_steps: steps of one measurement; None for about a tenth of a second.
    """

    rows: tuple[int, ...] = ROWS
    prefills: tuple[int, ...] = (PREFILL,)
    families: tuple[str, ...] = ("soft_moa_no_prompt",)
    num_adapters: int = goals.MIXED_ADAPTERS
    rounds: int = 15
    inner_steps: int | None = None
    context: int = CONTEXT

    def __post_init__(self) -> None:
        for family in self.families:
            if family not in OTHERS:
                raise InvalidRequest(f"family is {family!r}, but must be one of {', '.join(OTHERS)}", param="families")
        for field, least in (("rows", 1), ("prefills", 2)):
            for size in getattr(self, field):
                if size < least:
                    raise InvalidRequest(f"{field} has {size}, but must be at least {least}", param=field)
        for field, least in (("num_adapters", 2), ("rounds", 1), ("context", 1)):
            if getattr(self, field) < least:
                raise InvalidRequest(f"{field} is {getattr(self, field)}, but must be at least {least}", param=field)
        if not self.rows:
            raise InvalidRequest("rows are missing; name a number of sequences, as 1,8", param="rows")

    @property
    def has_mixed(self) -> bool:
        return max(self.rows) >= self.num_adapters


@dataclass(frozen=True, slots=True)
class CaseTiming:
    """One case at one size.

    Args:
        ms: milliseconds a step.
        to_base: its step over the base's.
        selected_share: of the routers' choices in this step; None without a router.
        adapter_ticks: median ticks of the time stamp counter in routers and experts a step; None where the backend does not count them.
    """

    ms: Spread
    to_base: Judged
    tokens_per_second: float
    selected_share: float | None
    adapter_ticks: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"to_base": self.to_base.to_json()}


@dataclass(frozen=True, slots=True)
class SizeTiming:
    """All cases at one size: `rows` sequences of `tokens` new tokens.

    Args:
        cpu_share: of the time, that the process had a core (n cores count n); well below the number of threads, something else ran too.
    """

    rows: int
    tokens: int
    inner_steps: int
    cpu_share: float
    cases: Mapping[str, CaseTiming]
    ratios: Mapping[str, Judged]

    def to_json(self) -> dict[str, Any]:
        shape = {"rows": self.rows, "tokens": self.tokens, "inner_steps": self.inner_steps, "cpu_share": self.cpu_share}
        cases = {name: case.to_json() for name, case in self.cases.items()}
        return shape | {"cases": cases, "ratios": {name: found.to_json() for name, found in self.ratios.items()}}


@dataclass(frozen=True, slots=True)
class StepReport:
    backend: str
    dtype: str
    threads: int
    plan: Plan
    sizes: Sequence[SizeTiming]

    def to_json(self) -> dict[str, Any]:
        plan = {name: getattr(self.plan, name) for name in ("context", "rounds", "num_adapters")}
        run: dict[str, Any] = {"backend": self.backend, "dtype": self.dtype, "threads": self.threads}
        return run | plan | {"sizes": [size.to_json() for size in self.sizes]}


def step_weights(config: ModelConfig) -> int:
    """Of the base that a step reads, of however many rows: all linears and the head. Embeddings and norms hardly count."""
    layer = sum(math.prod(linear_shape(config, target)) for target in TARGETS)
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def weight_bytes(model: Backend) -> float:
    """Of one of them; in eight bits with its share of a scale and a minimum."""
    return 1 + 4 / INT8_GROUP if model.base_dtype == "int8" else model.dtype.itemsize


def num_threads(model: Backend) -> int:
    """That the backend computes with; torch's own number where it has none of its own."""
    return int(getattr(model, "threads", None) or torch.get_num_threads())


_PROBE_FLOATS = 2**26  # 256 MiB
_PROBES = 16  # of a GPU, one behind the other: one alone would be as much the call as the reading


@functools.cache
def _much_memory(device: torch.device) -> Tensor:
    return torch.ones(_PROBE_FLOATS, device=device)  # ones, because untouched zeros would all be one page


def read_bandwidth(threads: int = 1, device: torch.device | None = None) -> float:
    """Bytes/s at which so many threads add up 256 MiB with the processor's widest loads; with numpy where there is no native library.

    numpy's is a lower bound of what memory gives, so that shares of it come out too high. On a GPU torch adds them up.
    """
    if device is not None and device.type == "cuda":
        return _PROBES * _much_memory(device).nbytes / seconds(partial(_add_up, _much_memory(device)))
    parts = _much_memory(torch.device("cpu")).chunk(threads)
    read = _reader()
    with ThreadPoolExecutor(threads) as pool:
        return sum(part.nbytes for part in parts) / seconds(lambda: list(pool.map(read, parts)))


def _add_up(memory: Tensor) -> None:
    for _ in range(_PROBES):
        total = memory.sum()
    wait_for(total)


def _reader() -> Callable[[Tensor], object]:
    try:
        best = lib.instruction_sets()[0].encode()
    except lib.NativeUnavailable:
        return lambda part: part.numpy().view(np.int64).max()
    probe = lib.library().moa_probe_read
    return lambda part: probe(best, part.data_ptr(), len(part), ctypes.c_float())


def measure(
    model: Backend,
    plan: Plan,
    *,
    plain: Backend | None = None,
    bandwidth: Bandwidth | None = None,
    on_progress: Callable[[str], None] = lambda _: None,
) -> StepReport:
    """Measure every case of the plan.

    Args:
        model: without a cache yet; it has one afterwards.
        plain: the base of `model`, which keeps it in eight bits, in bfloat16, likewise without a cache.
        bandwidth: probe of this process's memory, called once a round at one row; None for `read_bandwidth` by as many threads.
        on_progress: gets a line for each part of the work.
    """
    prefill = max((num_pages(tokens) * PAGE for tokens in plan.prefills), default=0)
    on_progress("filling the cache and making adapters")
    probe = partial(read_bandwidth, num_threads(model), model.device) if bandwidth is None else bandwidth
    pages = Pages(model, [plan.context] * max(plan.rows), spare=max(SPARE_TOKENS, prefill))
    beside = None if plain is None else Pages(plain, [plan.context] * max(plan.rows), spare=prefill)
    bank = _Bank(pages, plan)
    sizes = []
    for rows, tokens in [*((rows, 1) for rows in plan.rows), *((1, tokens) for tokens in plan.prefills)]:
        on_progress(f"decoding {rows} rows" if tokens == 1 else f"prefilling {tokens} tokens")
        sizes.append(_measure_size(pages, beside, bank, plan, rows, tokens, probe))
    return StepReport(model.name, model.base_dtype, num_threads(model), plan, sizes)


class _Bank:
    """The adapters of a run, ready to compute, and which rows of a batch have which."""

    def __init__(self, pages: Pages, plan: Plan) -> None:
        def ready(family: str, seed: int) -> PreparedAdapter:
            return pages.model.prepare(made_up(pages, family, seed))

        count = plan.num_adapters if plan.has_mixed else 1
        self.several = {family: [ready(family, seed) for seed in range(count)] for family in ALWAYS}
        self._single = {family: ready(family, 0) for family in plan.families}
        self._num_mixed = plan.num_adapters

    def cases(self, rows: int, tokens: int) -> dict[str, list[PreparedAdapter | None]]:
        """The adapter of each row, by case."""
        cases: dict[str, list[PreparedAdapter | None]] = {_BASE: [None] * rows, _CONTROL: [None] * rows}
        for family, adapters in self.several.items():
            cases[family] = [adapters[0]] * rows
            if tokens == 1 and rows >= self._num_mixed:
                cases[family + _MIXED] = [adapters[row * self._num_mixed // rows] for row in range(rows)]
        for family, adapter in self._single.items():
            cases[family] = [adapter] * rows
        return cases


class Clock:
    """Times steps of a model; notes how much of a core they had and, where the backend counts them, the ticks of the adapters' own part."""

    def __init__(self, model: Backend) -> None:
        self._ticks: Callable[[], Mapping[str, int]] | None = getattr(model, "ticks", None)
        self._adapter_ticks: dict[str, list[float]] = {}
        self._cpu_shares: list[float] = []

    def measurement(self, name: str, work: Sequence[Workload], steps: int) -> Callable[[], float]:
        """Seconds of one of `steps` times all of `work`."""

        def repeated() -> None:
            for _ in range(steps):
                for one in work:
                    one.run()

        def measured() -> float:
            if self._ticks is not None:
                self._ticks()  # they count from call to call
            cpu = time.process_time()
            spent = seconds(repeated)
            self._cpu_shares.append((time.process_time() - cpu) / spent)
            if self._ticks is not None:
                parts = self._ticks()
                self._adapter_ticks.setdefault(name, []).append((parts["router"] + parts["experts"]) / steps)
            return spent / steps

        return measured

    @property
    def cpu_share(self) -> float:
        return statistics.median(self._cpu_shares)

    def adapter_ticks(self) -> dict[str, list[float]]:
        """By case, of the rounds that count; empty where the backend does not count them."""
        return {name: values[WARMUPS:] for name, values in self._adapter_ticks.items()}

    def timing(
        self, name: str, times: Sequence[float], base: Sequence[float], tokens: int, share: float | None, goal: float | None
    ) -> CaseTiming:
        """Of the case `name`: its seconds and the base's, round by round, for a step of so many new tokens."""
        ticks = self.adapter_ticks().get(name)
        return CaseTiming(
            Spread.of([1e3 * value for value in times]),
            Judged(ratio(times, base), goal),
            tokens / statistics.median(times),
            share,
            None if ticks is None else statistics.median(ticks),
        )


def _measure_size(pages: Pages, beside: Pages | None, bank: _Bank, plan: Plan, rows: int, tokens: int, bandwidth: Bandwidth) -> SizeTiming:
    model = pages.model
    work = {name: [Workload(pages, adapters, tokens=tokens)] for name, adapters in bank.cases(rows, tokens).items()}
    if rows == plan.num_adapters and tokens == 1:
        work[_APART] = [Workload(pages, [adapter], first_row=row) for row, adapter in enumerate(bank.several["sparse_moa"])]
    if beside is not None:
        work[_PLAIN] = [Workload(beside, [None] * rows, tokens=tokens)]
    shares = {name: selected_share(own[0].trace()) for name, own in work.items()}
    steps = plan.inner_steps or steps_for(work[_BASE][0].run)
    clock = Clock(model)
    cases = {name: clock.measurement(name, own, steps) for name, own in work.items()}
    if rows == tokens == 1:
        cases[_READING] = lambda: step_weights(model.config) * weight_bytes(model) / bandwidth()
    times = interleaved(cases, plan.rounds, warmups=WARMUPS)
    goal = goals.adapter_to_base(rows, tokens) if has_goals(model) else None
    timings = {
        name: clock.timing(name, times[name], times[_BASE], rows * tokens, shares[name], goal if name in ALWAYS else None) for name in work
    }
    return SizeTiming(rows, tokens, steps, clock.cpu_share, timings, _ratios(times, clock.adapter_ticks(), plan, model))


def _ratios(times: Mapping[str, Sequence[float]], ticks: Mapping[str, Sequence[float]], plan: Plan, model: Backend) -> dict[str, Judged]:
    """Of one case to another, as far as both were measured. A throughput's ratio is the times' the other way round."""
    found: dict[str, Judged] = {}

    def compare(
        name: str, values: Mapping[str, Sequence[float]], of: str, to: str, goal: float | None = None, *, is_floor: bool = False
    ) -> None:
        if of in values and to in values:
            found[name] = Judged(ratio(values[of], values[to]), goal if has_goals(model) else None, is_floor)

    soft, sparse = ALWAYS
    compare("control", times, _CONTROL, _BASE)
    for prefix, suffix in (("", ""), ("mixed_", _MIXED)):
        compare(f"{prefix}sparse_to_soft", times, sparse + suffix, soft + suffix, goals.SPARSE_TO_SOFT)
        compare(f"{prefix}sparse_to_soft_ticks", ticks, sparse + suffix, soft + suffix, goals.SPARSE_TO_SOFT_TICKS)
    compare("sparse_to_soft_no_prompt", times, sparse, "soft_moa_no_prompt", goals.SPARSE_TO_SOFT)
    compare("sparse_to_soft_no_prompt_ticks", ticks, sparse, "soft_moa_no_prompt", goals.SPARSE_TO_SOFT_TICKS)
    is_judged = plan.num_adapters == goals.MIXED_ADAPTERS
    floor = goals.mixed_throughput(step_weights(model.config)) if is_judged else None
    compare("soft_mixed_throughput", times, soft, soft + _MIXED, floor, is_floor=True)
    compare("sparse_mixed_throughput", times, sparse, sparse + _MIXED, floor, is_floor=True)
    compare("together_to_apart", times, _APART, sparse + _MIXED, goals.TOGETHER_TO_APART if is_judged else None, is_floor=True)
    compare("int8_to_bfloat16", times, _BASE, _PLAIN, goals.INT8_TO_BFLOAT16 if _READING in times else None)
    compare("bandwidth_share", times, _READING, _BASE, goals.BANDWIDTH_SHARE, is_floor=True)
    return found
