"""`moa-serve bench options`: what routing options cost a decode step that mixes them, and what they save where all rows ask for the same.

A step computes rows of one adapter together where they have one rule; every other rule is a run of its own. So two questions, all of it in
one interleaved run at the level of the model: rows with k rules that select what the adapter's own way selects, and every way of
`train.variations.sweep`. Tokens are random, so what is selected in a step is told beside its time. Timed as in step.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RoutingOptions, RoutingRules, rules_for
from moa_serve.bench.step import WARMUPS, Clock, num_threads
from moa_serve.bench.timing import Spread, interleaved, ratio
from moa_serve.bench.workload import CONTEXT, Pages, Workload, refuse_beyond, selected_share, steps_for
from moa_serve.errors import InvalidRequest
from moa_serve.model.backend import Backend, PreparedAdapter
from moa_serve.train.variations import sweep

ROWS, RULES = (1, 8, 32), (1, 2, 8, 32)
OWN, CONTROL, BASE = "its own way", "control", "base alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to measure.

    Args:
        rows: sequences that decode one token each, behind `context` of theirs; one size of batch after the other.
        rules: different ones in a batch; as many as there are rows at most.
        is_swept: every way of a sweep has its turn, too.
        rounds: in which every case has its turn.
        inner_steps: steps of one measurement; None for about a tenth of a second.
    """

    rows: tuple[int, ...] = ROWS
    rules: tuple[int, ...] = RULES
    is_swept: bool = True
    rounds: int = 15
    inner_steps: int | None = None
    context: int = CONTEXT

    def __post_init__(self) -> None:
        for field in ("rows", "rules"):
            values = getattr(self, field)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise InvalidRequest(f"{field} must be different numbers of at least 1, not {', '.join(map(str, values))}", param=field)
        for field in ("rounds", "context"):
            if getattr(self, field) < 1:
                raise InvalidRequest(f"{field} is {getattr(self, field)}, but must be at least 1", param=field)


@dataclass(frozen=True, slots=True)
class CaseTiming:
    """One case at one number of rows.

    Args:
        ms: milliseconds a step.
        to_own: its step over that of the adapter's own way.
        selected_share: of the routers' choices in this step; None without a router.
    """

    ms: Spread
    to_own: Spread
    selected_share: float | None


@dataclass(frozen=True, slots=True)
class SizeTiming:
    """All cases at one number of rows. `cpu_share`: as in step.py."""

    rows: int
    cpu_share: float
    cases: Mapping[str, CaseTiming]


@dataclass(frozen=True, slots=True)
class OptionsReport:
    """Of one adapter, `variant` its family."""

    backend: str
    dtype: str
    threads: int
    variant: str
    plan: Plan
    sizes: Sequence[SizeTiming]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(model: Backend, adapter: Adapter, plan: Plan, *, on_progress: Callable[[str], None] = lambda _: None) -> OptionsReport:
    """Measure every case of the plan.

    Args:
        model: without a cache yet; it has one afterwards.
        on_progress: gets a line for each part of the work.
    Raises:
        InvalidRequest: the adapter has no router, or the base is not made for so long a context.
    """
    manifest = adapter.manifest
    ways = sweep(manifest)
    refuse_beyond(model.config, plan.context + 1, f"{plan.context} tokens of context and one that is decoded", "context")
    pages = Pages(model, [plan.context] * max(plan.rows))
    prepared = model.prepare(adapter)
    swept = {way.name: _rules(way.moa, manifest) for way in ways} if plan.is_swept else {}
    sizes = []
    for rows in plan.rows:
        on_progress(f"decoding {rows} rows")
        sizes.append(_measure_size(pages, prepared, swept, plan, rows))
    return OptionsReport(model.name, model.base_dtype, num_threads(model), manifest.variant, plan, sizes)


def _measure_size(pages: Pages, adapter: PreparedAdapter, swept: Mapping[str, RoutingRules | None], plan: Plan, rows: int) -> SizeTiming:
    own = Workload(pages, [adapter] * rows)
    work = {OWN: own, CONTROL: own, BASE: Workload(pages, [None] * rows)}
    for count in plan.rules:
        if count <= rows:
            mixed = [same_choice(adapter.manifest, row * count // rows) for row in range(rows)]
            work[f"{count} rule{'s' * (count > 1)}, same choice"] = Workload(pages, [adapter] * rows, rules=mixed)
    work |= {name: Workload(pages, [adapter] * rows, rules=[rules] * rows) for name, rules in swept.items()}
    steps = plan.inner_steps or steps_for(own.run)
    clock = Clock(pages.model)
    times = interleaved({name: clock.measurement(name, [one], steps) for name, one in work.items()}, plan.rounds, warmups=WARMUPS)
    cases = {
        name: CaseTiming(Spread.of([1e3 * value for value in times[name]]), ratio(times[name], times[OWN]), selected_share(one.trace()))
        for name, one in work.items()
    }
    return SizeTiming(rows, clock.cpu_share, cases)


def same_choice(manifest: Manifest, number: int) -> RoutingRules | None:
    """A rule that differs from the adapter's own and from those of other numbers, and selects the same, but for scores within rounding."""
    if manifest.router.select.kind in ("constant", "threshold_fn", "adamole"):
        return _rules({"threshold": {"scale": 1 + (number + 1) * 1e-6}}, manifest)
    return _rules({"threshold": {"constant": (number + 1) * 1e-9}}, manifest)


def _rules(moa: Mapping[str, Any], manifest: Manifest) -> RoutingRules | None:
    return rules_for(RoutingOptions.of(moa), manifest)
