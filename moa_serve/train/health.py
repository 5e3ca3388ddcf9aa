"""Whether a router shares its work out: the two ways in which mixtures of experts fail, as numbers to watch while training.

Representation collapse (one expert does all, the others follow) and load imbalance: arXiv:2506.05928, section 1. Numbers in, numbers out.
"""

import itertools
from dataclasses import dataclass

import numpy as np

from moa_serve.model.counters import RoutingTotals

_IDLE = 0.01  # share of tokens below which an expert counts as idle


@dataclass(frozen=True, slots=True)
class RouterHealth:
    """Means over all routers of an adapter (one a layer, or one at each linear), from what their experts' gates added up to.

    Args:
        imbalance: coefficient of variation of the experts' loads; 0 is even, sqrt(E - 1) is all on one.
        entropy: of the loads, as a share of the highest possible; 1 is even, 0 is collapse on to one expert.
        dominant: share of the busiest expert.
        idle: share of the experts that less than 1 % of the tokens selected.
        skipped: share of (token, expert) pairs that were not selected.
    """

    imbalance: float
    entropy: float
    dominant: float
    idle: float
    skipped: float

    @classmethod
    def of(cls, totals: RoutingTotals) -> "RouterHealth | None":
        """None where there is no router with more than one expert, or no token."""
        if not totals.tokens:
            return None
        rows = []
        for layer, names in enumerate(totals.experts):
            sites = [name.partition("/")[0] if "/" in name else "layer" for name in names]
            for _, group in itertools.groupby(range(len(names)), key=lambda column: sites[column]):
                columns = list(group)
                if len(columns) > 1:
                    rows.append(_router(totals.gate_sum[layer, columns], totals.selected[layer, columns] / totals.tokens))
        return cls(*np.mean(rows, axis=0).tolist()) if rows else None


def _router(load: np.ndarray, selected: np.ndarray) -> tuple[float, float, float, float, float]:
    share = load / load.sum() if load.sum() > 0 else np.full(len(load), 1 / len(load))
    entropy = -sum(p * np.log(p) for p in share if p > 0) / np.log(len(share))
    return (
        float(share.std() / share.mean()),
        float(entropy),
        float(share.max()),
        float((selected < _IDLE).mean()),
        float(1 - selected.mean()),
    )
