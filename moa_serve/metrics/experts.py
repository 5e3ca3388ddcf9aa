"""ExpertsUse: what one adapter's routers did with live tokens since its revision was loaded, beside what they did in training."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moa_serve.metrics.drift import Experts, Profile
from moa_serve.model.counters import RoutingTotals


@dataclass(frozen=True, slots=True)
class TrainedUse:
    """Of an expert in training; None where the profile does not tell."""

    weight: float | None
    selected: float | None


@dataclass(frozen=True, slots=True)
class ExpertUse:
    """Of all tokens, 0 to 1; None before the first.

    Args:
        weight: the sum of its weights over the tokens that kept it, over all tokens.
        selected, computed: share of tokens that kept it, and that it was computed for.
    """

    name: str
    weight: float | None
    selected: float | None
    computed: float | None
    profile: TrainedUse | None


@dataclass(frozen=True, slots=True)
class LayerUse:
    """`threshold` is the mean of what a score had to reach; None where nothing has to be reached, or before the first token."""

    layer: int
    threshold: float | None
    experts: tuple[ExpertUse, ...]


@dataclass(frozen=True, slots=True)
class DeadExpert:
    layer: int
    expert: str


@dataclass(frozen=True, slots=True)
class ExpertsUse:
    """
    Args:
        layers: all, also those without experts; empty where the adapter has no router.
        skipped: share of expert evaluations that were left out; None before the first token.
        drift: as moa_router_drift. dead: experts that no token has kept; None while that says nothing, as with moa_dead_experts.
    """

    adapter: str
    revision: str
    tokens: int
    layers: tuple[LayerUse, ...]
    skipped: float | None
    drift: float | None
    dead: tuple[DeadExpert, ...] | None


def use_of(
    adapter: str,
    revision: str,
    experts: Experts,
    totals: RoutingTotals | None,
    profile: Profile | None,
    drift: float | None,
    *,
    has_dead: bool,
) -> ExpertsUse:
    """
    Args:
        experts: that its routers weigh.
        totals: None before the first token.
        has_dead: there were tokens enough to say which experts are dead.
    """
    tokens = 0 if totals is None else totals.tokens
    trained = _trained(experts, profile)
    layers, dead = [], []
    computed = met = 0.0
    for layer, names in enumerate(experts):
        uses = []
        for column, name in enumerate(names):
            if totals is None or not tokens:
                uses.append(ExpertUse(name, None, None, None, next(trained)))
                continue
            cell = (layer, column)
            weight, selected, done = (float(counts[cell]) for counts in (totals.gate_sum, totals.selected, totals.computed))
            uses.append(ExpertUse(name, weight / tokens, selected / tokens, done / tokens, next(trained)))
            computed, met = computed + done, met + tokens
            if has_dead and not selected:
                dead.append(DeadExpert(layer, name))
        threshold = float(totals.thresholds[layer]) / tokens if totals is not None and tokens else 0.0
        layers.append(LayerUse(layer, threshold or None, tuple(uses)))
    skipped = 1 - computed / met if met else None
    return ExpertsUse(adapter, revision, tokens, tuple(layers), skipped, drift, tuple(dead) if has_dead else None)


def _trained(experts: Experts, profile: Profile | None) -> Iterator[TrainedUse | None]:
    """Of each cell."""
    uses = None if profile is None else profile.uses(experts)
    if uses is None:
        yield from (None for names in experts for _ in names)
        return
    for weight, selected in zip(*(values.tolist() for values in uses), strict=True):
        yield TrainedUse(None if math.isnan(weight) else weight, None if math.isnan(selected) else selected)
