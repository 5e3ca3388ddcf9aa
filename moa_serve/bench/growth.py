"""`moa-serve bench growth`: how what a decode step costs grows with rows, context, adapters, experts and the share of them that is active.

One thing is varied, and the others stay where they are: 8 rows, 128 tokens of context, one adapter. All values of one thing take turns in
one run, so that each can be divided by the first. Timed as in step.py, at the level of the model.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from moa_serve.bench import goals
from moa_serve.bench.step import ALWAYS, WARMUPS, CaseTiming, Clock, num_threads
from moa_serve.bench.synthetic import FAMILIES, SPARE_TOKENS, made_up, of_recipe, synthetic, tuned
from moa_serve.bench.timing import Spread, interleaved, ratio
from moa_serve.bench.workload import CONTEXT, Pages, Workload, selected_share, steps_for
from moa_serve.errors import InvalidRequest
from moa_serve.model.backend import Backend, PreparedAdapter

ROWS = 8  # where they are not what is varied
EXPERT_FAMILIES = ("molora", "hydralora", "mola")  # any number of experts at each linear; of mola's, two are active
VALUES: dict[str, tuple[int, ...]] = {
    "rows": (1, 2, 4, 8),
    "context": (128, 512, 1024, 2048, 4096),
    "adapters": (1, 2, 4, 8),
    "experts": (2, 4, 8, 16),
    "active": (0, 25, 50, 75, 100),
}
"""What is varied: sequences that decode, tokens before the decoded one, different adapters in a batch, experts at each linear, and the
percentage of a Sparse MoA's experts that is selected."""

_LIMITS = {"rows": (1, 256), "context": (1, 2**20), "adapters": (1, ROWS), "experts": (2, 64), "active": (0, 100)}
_BASE, _CONTROL = "base", "control"
_ALONE = "1 row"  # behind the name of a case: an expert that no row of a batch wants is skipped, and of one row there are many

Cases = dict[int | None, dict[str, Workload]]  # by value; None for what does not change with it


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Args:
        values: of each thing to vary, one of `VALUES`; the first one is what the others are divided by.
        rounds: in which every case has its turn.
        inner_steps: steps of one measurement; None for about a tenth of a second.
    """

    values: Mapping[str, tuple[int, ...]] = field(default_factory=lambda: dict(VALUES))
    rounds: int = 15
    inner_steps: int | None = None

    def __post_init__(self) -> None:
        if not self.values or not all(self.values.values()):
            raise InvalidRequest(f"nothing is varied; give values of one of {', '.join(VALUES)}")
        for thing, values in self.values.items():
            if thing not in VALUES:
                raise InvalidRequest(f"{thing!r} cannot be varied, but {', '.join(VALUES)} can")
            least, most = _LIMITS[thing]
            for value in values:
                if not least <= value <= most:
                    raise InvalidRequest(f"{thing} has {value}, but must be from {least} to {most}", param=thing)
            if len(set(values)) < len(values):
                raise InvalidRequest(f"{thing} has a value twice: {', '.join(map(str, values))}", param=thing)
        if self.rounds < 1:
            raise InvalidRequest(f"rounds is {self.rounds}, but must be at least 1", param="rounds")


@dataclass(frozen=True, slots=True)
class Grown:
    """One case at one value.

    Args:
        to_first: its step over the base's at the first value.
        adapter_part: ticks of its routers and experts over the same at the first value; None without, or where the backend does not count.
    """

    timing: CaseTiming
    to_first: Spread
    adapter_part: Spread | None

    def to_json(self) -> dict[str, Any]:
        part = None if self.adapter_part is None else self.adapter_part.to_json()
        return self.timing.to_json() | {"to_first": self.to_first.to_json(), "adapter_part": part}


@dataclass(frozen=True, slots=True)
class Growth:
    """All that was measured of one thing.

    Args:
        points: cases by value; under None what does not change with it.
        cpu_share: of the time, that the process had a core (n cores count n).
    """

    thing: str
    points: Mapping[int | None, Mapping[str, Grown]]
    cpu_share: float

    def to_json(self) -> dict[str, Any]:
        points = [{"value": value, "cases": {name: one.to_json() for name, one in cases.items()}} for value, cases in self.points.items()]
        return {"thing": self.thing, "cpu_share": self.cpu_share, "points": points}


@dataclass(frozen=True, slots=True)
class GrowthReport:
    backend: str
    dtype: str
    threads: int
    plan: Plan
    grown: Sequence[Growth]

    def to_json(self) -> dict[str, Any]:
        run: dict[str, Any] = {"backend": self.backend, "dtype": self.dtype, "threads": self.threads, "rounds": self.plan.rounds}
        return run | {"rows": ROWS, "context": CONTEXT, "varied": [growth.to_json() for growth in self.grown]}


def measure(model: Backend, plan: Plan, *, on_progress: Callable[[str], None] = lambda _: None) -> GrowthReport:
    """Measure every value of everything that the plan varies.

    Args:
        model: without a cache yet; it has one afterwards.
        on_progress: gets a line for each part of the work.
    Raises:
        InvalidRequest: the base is not made for so long a context.
    """
    longest, most = (max((usual, *plan.values.get(thing, ()))) for thing, usual in (("context", CONTEXT), ("rows", ROWS)))
    if longest >= model.config.max_position:
        raise InvalidRequest(
            f"context has {longest}, but the base was made for {model.config.max_position} tokens, the decoded one included",
            param="context",
        )
    on_progress(f"filling the cache with {ROWS} sequences of {longest} tokens")
    pages = Pages(model, [longest] * ROWS + [CONTEXT] * (most - ROWS), spare=SPARE_TOKENS)
    bank = _Bank(pages)
    grown = []
    for thing, values in plan.values.items():
        on_progress(f"varying {thing}: {', '.join(map(str, values))}")
        grown.append(_measure_thing(model, thing, bank.cases(thing, values), plan))
    return GrowthReport(model.name, model.base_dtype, num_threads(model), plan, grown)


class _Bank:
    """Adapters, made when they are first wanted, and the steps that are compared."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._made: dict[tuple[str, int], PreparedAdapter] = {}

    def cases(self, thing: str, values: Sequence[int]) -> Cases:
        if thing == "rows":
            return {value: self._one_adapter(value, CONTEXT) for value in values}
        if thing == "context":
            return {value: self._one_adapter(ROWS, value) for value in values}
        of = {"adapters": self._adapters, "experts": self._experts, "active": self._active}[thing]
        fixed = self._base(ROWS, CONTEXT)
        if thing == "active":
            fixed |= {f"{name} {_ALONE}": work for name, work in self._base(1, CONTEXT).items()}
        return {None: fixed} | {value: of(value) for value in values}

    def _base(self, rows: int, context: int) -> dict[str, Workload]:
        return {name: self._work([None] * rows, context) for name in (_BASE, _CONTROL)}

    def _one_adapter(self, rows: int, context: int) -> dict[str, Workload]:
        return self._base(rows, context) | {family: self._work([self._usual(family, 0)] * rows, context) for family in ALWAYS}

    def _adapters(self, count: int) -> dict[str, Workload]:
        """The rows shared out among so many adapters."""
        return {family: self._work([self._usual(family, row * count // ROWS) for row in range(ROWS)]) for family in ALWAYS}

    def _experts(self, count: int) -> dict[str, Workload]:
        model = self._pages.model
        recipes = {family: replace(FAMILIES[family], num_experts=(count,)) for family in EXPERT_FAMILIES}
        return {name: self._work([model.prepare(of_recipe(recipe, model.config, 0))] * ROWS) for name, recipe in recipes.items()}

    def _active(self, percent: int) -> dict[str, Workload]:
        model = self._pages.model
        adapter = model.prepare(tuned(self._pages, synthetic("sparse_moa", model.config, 0), share=percent / 100))
        return {"sparse_moa": self._work([adapter] * ROWS), f"sparse_moa {_ALONE}": self._work([adapter])}

    def _usual(self, family: str, seed: int) -> PreparedAdapter:
        """In the paper's sizes and, where it is sparse, with its share of active experts."""
        if (family, seed) not in self._made:
            self._made[family, seed] = self._pages.model.prepare(made_up(self._pages, family, seed))
        return self._made[family, seed]

    def _work(self, adapters: Sequence[PreparedAdapter | None], context: int = CONTEXT) -> Workload:
        return Workload(self._pages, adapters, context=context)


def _measure_thing(model: Backend, thing: str, cases: Cases, plan: Plan) -> Growth:
    clock = Clock(model)
    named = {_key(name, value): work for value, works in cases.items() for name, work in works.items()}
    steps = {key: plan.inner_steps or steps_for(work.run) for key, work in named.items()}
    times = interleaved({key: clock.measurement(key, [work], steps[key]) for key, work in named.items()}, plan.rounds, warmups=WARMUPS)
    ticks = clock.adapter_ticks()
    first_value = next(value for value in cases if value is not None)
    points: dict[int | None, dict[str, Grown]] = {}
    for value, works in cases.items():
        points[value] = {}
        for name, work in works.items():
            own, base = times[_key(name, value)], _base_of(name)
            to_base = times[_key(base, value if base in works else None)]
            to_first = times[_key(base, next(iter(cases)))]
            is_judged = name.split(" ")[0] in ALWAYS and (thing != "adapters" or value == 1)
            goal = goals.adapter_to_base(work.num_tokens, 1) if is_judged else None
            timing = clock.timing(_key(name, value), own, to_base, work.num_tokens, selected_share(work.trace()), goal)
            has_part = bool(work.batch.segments) and _key(name, value) in ticks
            part = ratio(ticks[_key(name, value)], ticks[_key(name, first_value)]) if has_part else None
            points[value][name] = Grown(timing, ratio(own, to_first), part)
    return Growth(thing, points, clock.cpu_share)


def _base_of(name: str) -> str:
    """The base of a case has as many rows."""
    return _BASE + name[name.index(" ") :] if " " in name else _BASE


def _key(name: str, value: int | None) -> str:
    return f"{name} {value}"
