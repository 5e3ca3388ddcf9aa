"""What the routers of each adapter decided, as counters by layer and expert.

The engine thread publishes running totals by revision; a scrape takes what was added since the last one and gives it to a series: the
adapter's own, while it is among the busiest (the grid), else `other`. So every addition is counted once, no counter ever falls, and a sum
over adapters of `rate()` stays right when an adapter moves between the grid and `other`. Who is in the grid is decided once a minute; who
leaves it is shown, unchanged, for one more minute, so that every scraper sees its last value. A reload or an unload ends an adapter's
series; what it had is then seen as the reset of a counter.

Written as text here, and not as samples of the client library: 8 adapters of 30 layers and 9 experts are 6,500 lines, and no token moves
while they are written (2 ms this way, above 50 ms that way). Belongs to the event loop, but for `publish`, which the
engine thread calls.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moa_serve.engine.engine import Engine, TokenEvent
from moa_serve.metrics.drift import Experts, Profile, Recent, divergence
from moa_serve.metrics.experts import ExpertsUse, use_of
from moa_serve.metrics.family import Family, Wanted
from moa_serve.model.counters import RoutingTotals

OTHER = "other"
PUBLISH_SECONDS = 0.2  # between two snapshots of one revision: on a GPU each one waits for the device
DECIDE_SECONDS = 60.0
DEAD_TOKENS = 1000  # that an expert must have been passed over by
_ALL = Wanted()

Counts = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class _Layout:
    """The label sets of one arrangement of experts: its cells are the experts of all layers, one after the other."""

    cells: list[str]  # `layer="0",expert="Q"`
    layers: list[str]  # `layer="0"`, of those that have experts
    layer_rows: npt.NDArray[np.intp]  # and where they stand in the engine's totals
    place: tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]  # of each cell in the engine's (L, E) totals


@lru_cache(maxsize=256)
def _layout(experts: Experts) -> _Layout:
    places = [(layer, column, name) for layer, names in enumerate(experts) for column, name in enumerate(names)]
    return _Layout(
        [f'layer="{layer}",expert="{name}"' for layer, _, name in places],
        [f'layer="{layer}"' for layer, names in enumerate(experts) if names],
        np.array([layer for layer, names in enumerate(experts) if names], dtype=np.intp),
        (np.array([layer for layer, _, _ in places], dtype=np.intp), np.array([column for _, column, _ in places], dtype=np.intp)),
    )


class _Sums:
    """What one label has counted: of each cell the tokens that met the expert, that it was computed for, that kept it, and its weights;
    of each layer the tokens and their thresholds."""

    def __init__(self, cells: list[str], layers: list[str]) -> None:
        self.cells, self.layers = cells, layers
        self.met, self.computed, self.selected, self.gate_sum = (np.zeros(len(cells)) for _ in range(4))
        self.tokens, self.thresholds = np.zeros(len(layers)), np.zeros(len(layers))

    @classmethod
    def of(cls, experts: Experts) -> "_Sums":
        layout = _layout(experts)
        return cls(layout.cells, layout.layers)

    @classmethod
    def join(cls, parts: list["_Sums"]) -> "_Sums":
        """The sum over adapters with different experts."""
        cells = {label: index for index, label in enumerate(dict.fromkeys(label for part in parts for label in part.cells))}
        layers = {label: index for index, label in enumerate(dict.fromkeys(label for part in parts for label in part.layers))}
        joined = cls(list(cells), list(layers))
        for part in parts:
            where = [cells[label] for label in part.cells]
            joined.met[where] += part.met
            joined.computed[where] += part.computed
            joined.selected[where] += part.selected
            joined.gate_sum[where] += part.gate_sum
            where = [layers[label] for label in part.layers]
            joined.tokens[where] += part.tokens
            joined.thresholds[where] += part.thresholds
        return joined

    def add(self, more: RoutingTotals) -> None:
        layout = _layout(more.experts)
        self.met += more.tokens
        self.tokens += more.tokens
        self.thresholds += more.thresholds[layout.layer_rows]
        self.computed += more.computed[layout.place]
        self.selected += more.selected[layout.place]
        self.gate_sum += more.gate_sum[layout.place]


@dataclass(eq=False, slots=True)
class _Adapter:
    revision: str
    own: _Sums | None = None  # what it counted while in the grid
    seen: RoutingTotals | None = None  # given to a series already
    seen_altered: RoutingTotals | None = None  # likewise, of requests with routing options
    activity: float = 0.0  # tokens lately
    profile: Profile | None = None  # what its routers did in training
    experts: Experts = ()  # that its routers weigh, as far as its manifest says
    recent: Recent = field(default_factory=Recent)
    clock: Callable[[], float] = time.monotonic

    @property
    def drift(self) -> float | None:
        """None where there is nothing to compare, or too little."""
        if self.seen is None or self.profile is None:
            return None
        trained, lately = self.profile.aligned(self.seen.experts), self.recent.shares(self.clock())
        return None if trained is None or lately is None else divergence(trained, lately)

    @property
    def num_dead(self) -> int | None:
        """Experts that no token has kept yet; None while that says nothing."""
        if self.seen is None or self.seen.tokens < DEAD_TOKENS:
            return None
        return int((self.seen.selected[_layout(self.seen.experts).place] == 0).sum())

    def note(self, more: RoutingTotals, seconds: float) -> None:
        """Keep for the drift what was added."""
        if self.profile is not None:
            kept = more.gate_sum if self.profile.is_of_weights else more.selected
            self.recent.add(more.tokens, kept[_layout(more.experts).place], seconds)


class RoutingMetrics:
    """
    Args:
        grid_adapters: adapters with series of their own.
        clock: monotonic seconds.
    """

    def __init__(self, grid_adapters: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._grid_adapters, self._clock = grid_adapters, clock
        # By revision; the engine thread puts whole values in, the loop takes them out. Drift and dead experts are of the adapter's own way
        # alone: requests whose options have its routers choose otherwise are counted apart.
        self._totals: dict[str, RoutingTotals] = {}
        self._altered: dict[str, RoutingTotals] = {}
        self._published: dict[str, float] = {}  # the engine thread's
        self._adapters: dict[str, _Adapter] = {}  # by name, in the order of loading
        self._grid: set[str] = set()
        self._leaving: set[str] = set()
        self._decided = clock()
        self._other: dict[Experts, _Sums] = {}

    # -- the engine thread's side

    def publish(self, engine: Engine, events: list[TokenEvent]) -> None:
        """Snapshot the revisions of a step that has just run; always at the end of a request, so that what is idle is up to date."""
        now, due = self._clock(), set()
        for event in events:
            revision = event.sequence.request.adapter
            if revision is None or revision in due:
                continue
            if event.finish_reason is not None or now - self._published.get(revision, -PUBLISH_SECONDS) >= PUBLISH_SECONDS:
                due.add(revision)
        for revision in due:
            totals = engine.routing_totals(revision)
            if totals is not None:
                self._totals[revision] = totals
            altered = engine.altered_totals(revision)
            if altered is not None:
                self._altered[revision] = altered
            self._published[revision] = now

    # -- the loop's side

    def loaded(self, name: str, revision: str, profile: Profile | None = None, experts: Experts = ()) -> None:
        known = self._adapters.get(name)
        if known is not None and known.revision == revision:
            return
        if known is not None:
            self.unloaded(name)
        if all(other.revision != revision for other in self._adapters.values()):
            self._drop(revision)  # of its self-test, which is no traffic
        self._adapters[name] = _Adapter(revision, profile=profile, experts=experts, clock=self._clock)
        if len(self._grid) < self._grid_adapters:
            self._grid.add(name)

    def unloaded(self, name: str) -> None:
        if name not in self._adapters:
            return
        self._settle()  # its last tokens may belong to `other`, which stays
        was_owner = self._owner(self._adapters[name].revision) is self._adapters[name]
        gone = self._adapters.pop(name)
        self._grid.discard(name)
        self._leaving.discard(name)
        heir = next((other for other in self._adapters.values() if other.revision == gone.revision), None)
        if heir is None:
            self._drop(gone.revision)
            self._published.pop(gone.revision, None)
        elif was_owner:  # another name of the revision, for which its totals count from now on: not all that is in them
            heir.seen, heir.recent, heir.activity = gone.seen, gone.recent, gone.activity
            heir.seen_altered = gone.seen_altered

    def _owner(self, revision: str) -> _Adapter:
        """Of several names of one revision the first, for which its totals count."""
        return next(adapter for adapter in self._adapters.values() if adapter.revision == revision)

    def sweep(self) -> None:
        """Let go of revisions that no name has: of a self-test, or of what was replaced."""
        for revision in {*self._totals, *self._altered, *self._published} - {adapter.revision for adapter in self._adapters.values()}:
            self._drop(revision)
            self._published.pop(revision, None)

    def _drop(self, revision: str) -> None:
        self._totals.pop(revision, None)
        self._altered.pop(revision, None)

    def _settle(self) -> None:
        """Give what was added since the last time to the series that it belongs to."""
        self.sweep()
        owners: dict[str, str] = {}
        for name, adapter in self._adapters.items():
            # Two names of one revision share its totals; they count for the one that was loaded first.
            if owners.setdefault(adapter.revision, name) != name:
                continue
            totals, altered = self._totals.get(adapter.revision), self._altered.get(adapter.revision)
            if (more := _more(totals, adapter.seen)) is not None:
                adapter.note(more, self._clock())
                adapter.seen = totals
                self._add(name, adapter, more)
            if (more := _more(altered, adapter.seen_altered)) is not None:
                adapter.seen_altered = altered
                self._add(name, adapter, more)

    def _add(self, name: str, adapter: _Adapter, more: RoutingTotals) -> None:
        adapter.activity += more.tokens
        if more.experts:
            self._series(name, adapter, more.experts).add(more)
        else:
            self._grid.discard(name)  # without a router there is nothing to show: its place is another's

    def _series(self, name: str, adapter: _Adapter, experts: Experts) -> _Sums:
        if name not in self._grid:
            return self._other.setdefault(experts, _Sums.of(experts))
        adapter.own = adapter.own or _Sums.of(experts)
        return adapter.own

    def _decide(self) -> None:
        """Who is in the grid from now on: the busiest, and of equals who is in it already. Empty places are filled at once."""
        if self._clock() - self._decided < DECIDE_SECONDS:
            rest = sorted((name for name in self._routed() if name not in self._grid), key=self._rank)
            self._grid.update(rest[: self._grid_adapters - len(self._grid)])
            return
        self._decided = self._clock()
        busiest = set(sorted(self._routed(), key=self._rank)[: self._grid_adapters])
        self._leaving, self._grid = self._grid - busiest, busiest
        for adapter in self._adapters.values():
            adapter.activity /= 2

    def _routed(self) -> list[str]:
        """Those that have a router, as far as it is known yet."""
        return [name for name, adapter in self._adapters.items() if adapter.seen is None or adapter.seen.experts]

    def _rank(self, name: str) -> tuple[float, bool]:
        return -self._adapters[name].activity, name not in self._grid

    # -- who asks

    def experts(self, name: str) -> ExpertsUse | None:
        """What an adapter's routers did since its revision was loaded, in the grid or not; None where the name is not loaded."""
        adapter = self._adapters.get(name)
        if adapter is None:
            return None
        self._settle()
        owner = self._owner(adapter.revision)
        experts = owner.seen.experts if owner.seen is not None else adapter.experts
        return use_of(name, adapter.revision, experts, owner.seen, adapter.profile, owner.drift, has_dead=owner.num_dead is not None)

    # -- the scrape

    def render(self, wanted: Wanted = _ALL) -> str:
        """The families as text, each with its header."""
        if not any(routed.family.name in wanted for routed in FAMILIES):
            return ""
        self._settle()
        self._decide()
        shown = list(self._shown())
        lines: list[str] = []
        for routed in FAMILIES:
            name = routed.family.name
            if name not in wanted:
                continue
            lines += routed.family.header
            if isinstance(routed, _OfSums):
                for adapter, sums in shown:
                    lines += routed.samples(name, f'adapter="{adapter}"', sums)
            else:
                values = [(adapter, routed.value(self._adapters[adapter])) for adapter, _ in shown if adapter != OTHER]
                lines += [f'{name}{{adapter="{adapter}"}} {value!r}' for adapter, value in values if value is not None]
        return "".join(f"{line}\n" for line in lines)

    def _shown(self) -> Iterator[tuple[str, _Sums]]:
        for name, adapter in self._adapters.items():
            if name in self._grid or name in self._leaving:
                seen = adapter.seen or adapter.seen_altered
                if adapter.own is None and seen is not None and seen.experts:
                    adapter.own = _Sums.of(seen.experts)  # new in the grid: shown from 0, so that no addition is lost
                if adapter.own is not None:
                    yield name, adapter.own
        if self._other:
            yield OTHER, _Sums.join(list(self._other.values()))


def _more(totals: RoutingTotals | None, before: RoutingTotals | None) -> RoutingTotals | None:
    """What was added; None where nothing was."""
    if totals is None or totals is before:
        return None
    # With fewer tokens than before the engine dropped the revision and began anew.
    return totals if before is None or totals.tokens < before.tokens else totals.since(before)


def _cells(values: Callable[[_Sums], Counts]) -> Callable[[str, str, _Sums], list[str]]:
    def samples(name: str, label: str, sums: _Sums) -> list[str]:
        return [f"{name}{{{label},{cell}}} {value!r}" for cell, value in zip(sums.cells, values(sums).tolist(), strict=True)]

    return samples


def _layers(values: Callable[[_Sums], Counts]) -> Callable[[str, str, _Sums], list[str]]:
    def samples(name: str, label: str, sums: _Sums) -> list[str]:
        return [f"{name}{{{label},{layer}}} {value!r}" for layer, value in zip(sums.layers, values(sums).tolist(), strict=True)]

    return samples


def _per_token(name: str, label: str, sums: _Sums) -> list[str]:
    return [f"{name}_sum{{{label}}} {float(sums.selected.sum())!r}", f"{name}_count{{{label}}} {float(sums.tokens.sum())!r}"]


def _evaluations(name: str, label: str, sums: _Sums) -> list[str]:
    return [f"{name}{{{label}}} {float(sums.met.sum())!r}"]


def _skipped(name: str, label: str, sums: _Sums) -> list[str]:
    return [f"{name}{{{label}}} {float((sums.met - sums.computed).sum())!r}"]


@dataclass(frozen=True, slots=True)
class _OfSums:
    """A family, and its lines for one label: an adapter's, or `other`."""

    family: Family
    samples: Callable[[str, str, _Sums], list[str]]


@dataclass(frozen=True, slots=True)
class _OfAdapter:
    """A gauge of each adapter in the grid."""

    family: Family
    value: Callable[[_Adapter], float | None]


def _counter(name: str, text: str, samples: Callable[[str, str, _Sums], list[str]], *labels: str) -> _OfSums:
    return _OfSums(Family(name, "counter", text, ("adapter", *labels)), samples)


def _of_adapter(name: str, text: str, value: Callable[[_Adapter], float | None]) -> _OfAdapter:
    return _OfAdapter(Family(name, "gauge", text, ("adapter",)), value)


FAMILIES: tuple[_OfSums | _OfAdapter, ...] = (
    _counter("moa_router_tokens_total", "Tokens that went through the routers of a layer.", _layers(lambda sums: sums.tokens), "layer"),
    _counter(
        "moa_router_threshold_total",
        "Sum over tokens of the score that an expert had to reach in a layer; over moa_router_tokens_total the mean threshold. 0 where "
        "nothing has to be reached. Requests with routing options count with what they had to reach.",
        _layers(lambda sums: sums.thresholds),
        "layer",
    ),
    _counter("moa_expert_selected_total", "Tokens that kept an expert.", _cells(lambda sums: sums.selected), "layer", "expert"),
    _counter(
        "moa_expert_computed_total",
        "Tokens that an expert was computed for. The torch backend computes every expert for every token; the others leave out whom "
        "no token kept, each token by itself or, with AMX and on the triton backend, up to 16 neighbours together (there of its second "
        "factor alone).",
        _cells(lambda sums: sums.computed),
        "layer",
        "expert",
    ),
    _counter(
        "moa_expert_weight_total",
        "Sum of the weights of an expert over the tokens that kept it.",
        _cells(lambda sums: sums.gate_sum),
        "layer",
        "expert",
    ),
    _OfSums(
        Family(
            "moa_experts_per_token", "summary", "Experts that a token keeps in a layer: the sum, and the tokens times layers.", ("adapter",)
        ),
        _per_token,
    ),
    _counter("moa_expert_evaluations_total", "Tokens times the experts that stand in their way.", _evaluations),
    _counter(
        "moa_expert_evaluations_skipped_total",
        "Those of moa_expert_evaluations_total that were not computed; 0 with the torch backend.",
        _skipped,
    ),
    _of_adapter(
        "moa_router_drift",
        "How far routing is from the profile in the adapter's manifest, 0 to 1: the mean over experts of JS(p, q) = H((p+q)/2) - "
        "(H(p)+H(q))/2 in bits, H(p) = -p log2 p - (1-p) log2(1-p), where p is the share of tokens that kept the expert (its mean weight, "
        "where all are kept) in training and q lately: a token counts for half after ten minutes. From 500 tokens on.",
        lambda adapter: adapter.drift,
    ),
    _of_adapter(
        "moa_dead_experts",
        "Experts, over all layers, that no token has kept since the adapter was loaded. From 1,000 tokens on.",
        lambda adapter: adapter.num_dead,
    ),
)
