"""Suggestion: which experts of an adapter its live traffic hardly uses, in a form that can be tried on that traffic and then be pruned.

What the routers did is experts.py, what can go is adapter/prune.py; the bound between used and hardly used is the caller's. A few
milliseconds of work, for a thread of its own.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import KINDS, Manifest
from moa_serve.adapter.prune import Unit, least_units, prune, units_of
from moa_serve.adapter.rules import MAX_NAMED, Router
from moa_serve.errors import InvalidRequest
from moa_serve.metrics.experts import ExpertsUse

UNUSED_SELECTED, UNUSED_WEIGHT = 0.01, 0.02


@dataclass(frozen=True, slots=True)
class Unused:
    expert: str
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Bound:
    """Use up to which an expert is suggested.

    Args:
        max_selected: share of tokens that kept it; where routers choose.
        max_weight: its mean weight; where every token keeps every expert. One of the two is None.
    """

    max_selected: float | None
    max_weight: float | None

    @property
    def limit(self) -> float:
        return self.max_selected or self.max_weight or 0.0

    @classmethod
    def of(cls, manifest: Manifest, max_selected: float | None, max_weight: float | None) -> "Bound":
        """For an adapter, with the defaults for what is None.

        Raises:
            InvalidRequest: one is given that says nothing of this adapter.
        """
        keeps_all = manifest.router.select.kind == "all"
        if keeps_all and max_selected is not None:
            raise InvalidRequest(f"max_selected says nothing of a {manifest.variant}, whose tokens keep every expert; give max_weight",
                                 param="max_selected")  # fmt: skip
        if not keeps_all and max_weight is not None:
            raise InvalidRequest(f"max_weight is for adapters whose tokens keep every expert; of a {manifest.variant} give max_selected",
                                 param="max_weight")  # fmt: skip
        if keeps_all:
            return cls(None, UNUSED_WEIGHT if max_weight is None else max_weight)
        return cls(UNUSED_SELECTED if max_selected is None else max_selected, None)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """
    Args:
        experts: that could go, in canonical order.
        disable: the same as entries of `moa.disable` and of `convert --prune`.
        bytes: that the adapter's tensors would lose.
        left_out: more experts within the bound, each layer's counted, than the routers can spare or the entries have room for.
    """

    max_selected: float | None
    max_weight: float | None
    experts: tuple[Unused, ...]
    disable: tuple[str, ...]
    bytes: int
    left_out: int


def suggest(adapter: Adapter, use: ExpertsUse, bound: Bound) -> Suggestion | None:
    """What could go; None while there were too few tokens to say so.

    An adapter whose experts are all within the bound keeps the one that is used most.
    """
    if use.dead is None:
        return None
    manifest = adapter.manifest
    found = _uses(use, is_of_weights=bound.max_selected is None)
    units = {unit: max(found[unit.layer, name] for name in unit.experts) for unit in units_of(manifest)}
    least_used = sorted(units, key=lambda unit: (units[unit], _place(unit.experts[0]), unit.layer))
    within = [unit for unit in least_used if units[unit] <= bound.limit]
    choice = _Choice(manifest, units)
    chosen = choice.fitting(within[:-1] if len(within) == len(units) else within)
    entries = tuple(choice.entries(chosen))
    saved = adapter.num_bytes - prune(manifest, entries, revision=adapter.revision).num_bytes(adapter.tensors) if entries else 0
    left_out = sum(len(unit.experts) for unit in within) - sum(len(unit.experts) for unit in chosen)
    return Suggestion(bound.max_selected, bound.max_weight, tuple(_unused(chosen)), entries, saved, left_out)


def _uses(use: ExpertsUse, *, is_of_weights: bool) -> Mapping[tuple[int, str], float]:
    return {
        (layer.layer, expert.name): (expert.weight if is_of_weights else expert.selected) or 0.0
        for layer in use.layers
        for expert in layer.experts
    }


def _place(name: str) -> tuple[int, int]:
    site, _, index = name.partition("/")
    return KINDS.index(site), int(index or 0)


class _Choice:
    """Which of the units that should go can go together, and their names."""

    def __init__(self, manifest: Manifest, units: Collection[Unit]) -> None:
        self._least = least_units(manifest)
        self._units = Counter(unit.router for unit in units)  # at each router
        self._members = Counter(unit.router for unit in units for _ in unit.experts)
        self._layers: dict[str, set[int]] = {}  # where experts of a name, or of a site, stand
        for unit in units:
            for name in unit.experts:
                for known in {name, name.partition("/")[0]}:
                    self._layers.setdefault(known, set()).add(unit.layer)

    def fitting(self, units: Sequence[Unit]) -> list[Unit]:
        """Of units in the order in which they should go, as many as the entries have room for, and as each router can spare."""
        fits, beyond = 0, len(units) + 1
        while beyond - fits > 1:
            tried = (fits + beyond) // 2
            if len(list(self.entries(self._spared(units[:tried])))) <= MAX_NAMED:
                fits = tried
            else:
                beyond = tried
        return self._spared(units[:fits])

    def _spared(self, units: Sequence[Unit]) -> list[Unit]:
        """Without the last ones at routers that would keep too few."""
        going: dict[Router, list[Unit]] = {}
        for unit in units:
            going.setdefault(unit.router, []).append(unit)
        spared = []
        for router, those in going.items():
            count = self._units[router]
            spared += those if len(those) == count else those[: max(0, count - self._least)]
        return spared

    def entries(self, units: Sequence[Unit]) -> Iterator[str]:
        """`Q@0-3` for experts that go in all of these layers where they stand; a linear whose experts go together by its own name."""
        going: dict[str, set[int]] = {}
        for unit in units:
            is_linear = unit.site != "layer" and len(unit.experts) == self._members[unit.router]
            for name in (unit.site,) if is_linear else unit.experts:
                going.setdefault(name, set()).add(unit.layer)
        for name in sorted(going, key=lambda name: (_place(name), "/" in name)):
            for is_going, run in itertools.groupby(sorted(self._layers[name]), key=going[name].__contains__):
                if is_going:
                    first, *rest = run
                    yield f"{name}@{first}-{rest[-1]}" if rest else f"{name}@{first}"


def _unused(units: Sequence[Unit]) -> Iterator[Unused]:
    layers: dict[str, list[int]] = {}
    for unit in units:
        for name in unit.experts:
            layers.setdefault(name, []).append(unit.layer)
    for name in sorted(layers, key=_place):
        yield Unused(name, tuple(sorted(layers[name])))
