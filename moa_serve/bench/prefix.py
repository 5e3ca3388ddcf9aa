"""`moa-serve bench prefix`: how long the first token takes where the beginning of a prompt is in the prefix cache, and where it is not.

One engine in this process, without HTTP, one request at a time. Every prompt has an end of its own; hits share the beginning.
"""

import itertools
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from moa_serve.bench import goals
from moa_serve.bench.engine_load import computed_by
from moa_serve.bench.goals import Judged
from moa_serve.bench.serve import Computed
from moa_serve.bench.synthetic import synthetic
from moa_serve.bench.timing import Spread, interleaved, ratio
from moa_serve.bench.workload import PAGE, num_pages, random_ids, refuse_beyond
from moa_serve.engine.engine import Engine, EngineOptions
from moa_serve.engine.request import Request, SamplingParams
from moa_serve.errors import InvalidRequest
from moa_serve.llm import new_model
from moa_serve.model.weights import Base

BASE, ADAPTER = "base", "soft_moa"  # the larger one of the paper's two families
MISS, CONTROL, HIT = "miss", "control", "hit"
_CASES = (MISS, CONTROL, HIT)
_ROOM = 8  # prompts that the cache has room for, beside those that hits share


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """
    Args:
        shared_tokens: at the beginning of a prompt, that a hit finds: full pages.
        own_tokens: behind them, that are computed in any case.
        rounds: in which every case has its turn.
    """

    shared_tokens: int = 512
    own_tokens: int = 16
    rounds: int = 15

    def __post_init__(self) -> None:
        for name, least in (("shared_tokens", PAGE), ("own_tokens", 1), ("rounds", 1)):
            if getattr(self, name) < least:
                raise InvalidRequest(f"{name} is {getattr(self, name)}, but must be at least {least}", param=name)
        if self.shared_tokens % PAGE:
            raise InvalidRequest(
                f"shared_tokens is {self.shared_tokens}, but pages have {PAGE} tokens; take a multiple", param="shared_tokens"
            )

    @property
    def num_tokens(self) -> int:
        return self.shared_tokens + self.own_tokens


@dataclass(frozen=True, slots=True)
class PrefixReport:
    """
    Args:
        first_token_ms: by model (the base, or with an adapter) and case; the control is another miss.
        ratios: of a hit to a miss and of the control to a miss, by model; and `crossed_tokens`, how many tokens a model found of what
            the other had left: none.
    """

    computed: Computed
    plan: Plan
    first_token_ms: Mapping[str, Mapping[str, Spread]]
    ratios: Mapping[str, Judged]

    def to_json(self) -> dict[str, Any]:
        times = {model: {case: spread.to_json() for case, spread in cases.items()} for model, cases in self.first_token_ms.items()}
        ratios = {name: judged.to_json() for name, judged in self.ratios.items()}
        return asdict(self.computed) | asdict(self.plan) | {"first_token_ms": times, "ratios": ratios}


def measure(base: Base, backend: str, plan: Plan, *, on_progress: Callable[[str], None] = lambda _: None) -> PrefixReport:
    """Measure hits and misses of the base and of an adapter.

    Args:
        base: the native backend takes its weights over.
        backend: native or torch.
        on_progress: gets a line for each part of the work.
    Raises:
        InvalidRequest: the base is not made for so many tokens.
    """
    refuse_beyond(base.config, plan.num_tokens + 1, f"prompts of {plan.num_tokens} tokens and one to generate", "shared_tokens")
    adapter = synthetic(ADAPTER, base.config, 0)
    with closing(new_model(backend, base)) as model:
        pages = 2 * (2 + _ROOM) * num_pages(plan.num_tokens + 1)  # half of them are kept for later requests
        options = EngineOptions(kv_cache_bytes=pages * model.bytes_per_block(PAGE), block_size=PAGE)
        engine = Engine(model, options, lease=lambda _: nullcontext(adapter), base_digest=base.digest)
        asked = _Asked(engine, plan)
        models = {BASE: None, ADAPTER: adapter.revision}
        on_progress(f"{plan.rounds} rounds of {len(models) * len(_CASES)} cases, and one to warm up")
        crossed = 0
        for revision in models.values():
            crossed += asked.first_token(revision, is_hit=True)[1]
        cases = {
            f"{name} {case}": partial(asked.seconds, revision, is_hit=case == HIT) for name, revision in models.items() for case in _CASES
        }
        times = interleaved(cases, plan.rounds)
        computed = computed_by(base.name, model)
    ratios = {"crossed_tokens": Judged(Spread(crossed, crossed, crossed), goals.CROSSED_TOKENS)}
    for name in models:
        ratios[f"{name} hit"] = Judged(ratio(times[f"{name} {HIT}"], times[f"{name} {MISS}"]), goals.HIT_TO_MISS)
        ratios[f"{name} control"] = Judged(ratio(times[f"{name} {CONTROL}"], times[f"{name} {MISS}"]))
    found = {name: {case: Spread.of([1e3 * spent for spent in times[f"{name} {case}"]]) for case in _CASES} for name in models}
    return PrefixReport(computed, plan, found, ratios)


class _Asked:
    """Requests for one token of made-up prompts, of which no two have the same end."""

    def __init__(self, engine: Engine, plan: Plan) -> None:
        self._engine, self._plan = engine, plan
        self._seeds = itertools.count(1)
        self._shared = self._drawn(plan.shared_tokens, seed=0)

    def _drawn(self, count: int, seed: int) -> list[int]:
        drawn: list[int] = random_ids(self._engine.model, 1, count, seed)[0].tolist()
        return drawn

    def first_token(self, revision: str | None, *, is_hit: bool) -> tuple[float, int]:
        """Seconds until it is there, and how many tokens of the prompt were found."""
        seed = next(self._seeds)
        prompt = self._drawn(self._plan.num_tokens, seed)
        if is_hit:
            prompt[: self._plan.shared_tokens] = self._shared
        request = Request(tuple(prompt), SamplingParams(max_tokens=1, temperature=0, ignore_eos=True), revision)
        start = time.perf_counter()
        sequence = self._engine.add(request)
        while self._engine.has_work:
            for event in self._engine.step():
                if event.error is not None:
                    raise event.error
        return time.perf_counter() - start, sequence.num_cached

    def seconds(self, revision: str | None, *, is_hit: bool) -> float:
        spent, num_found = self.first_token(revision, is_hit=is_hit)
        assert num_found == self._plan.shared_tokens * is_hit, "a hit that missed, or a miss that hit"
        return spent
