"""How far what an adapter's routers do lately is from what they did in training, as one number; and what that number is.

Each expert of each layer is a coin: the share of tokens that keep it, or, where every token keeps every expert, its mean weight. Two coins
p and q differ by their Jensen-Shannon divergence in bits, JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 with
H(p) = -p log2 p - (1 - p) log2(1 - p): 0 for equal ones, 1 for a coin that always and one that never falls. The drift is the mean over all
experts of all layers (Lin, 1991). Unlike Kullback and Leibler's, it is finite where an expert was never kept in training.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_serve.adapter.manifest import Manifest

HALF_LIFE_SECONDS = 600.0  # after which a token counts for half
MIN_TOKENS = 500.0  # fewer say nothing yet

Shares = npt.NDArray[np.float64]
Experts = tuple[tuple[str, ...], ...]  # names of a layer's experts, layer by layer


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """What an adapter's routers did in training, of each expert of each layer, one after the other (cells).

    Args:
        selected, weight: (cells,) the share of tokens that kept it, and its mean weight, 0 to 1; NaN where only the other one is told.
        is_of_weights: every token keeps every expert, so that only the weights say something.
    """

    experts: Experts
    selected: Shares
    weight: Shares
    is_of_weights: bool

    @classmethod
    def of(cls, manifest: Manifest) -> "Profile | None":
        """None where the manifest has none that can be read: that object is the author's, and no reason to refuse an adapter."""
        layers = (manifest.profile or {}).get("layers")
        if not isinstance(layers, list) or len(layers) != manifest.base.num_layers:
            return None
        found = [{} if layer is None else layer for layer in layers]
        if not all(isinstance(layer, dict) and all(isinstance(use, dict) for use in layer.values()) for layer in found):
            return None
        uses = [use for layer in found for use in layer.values()]
        selected, weight = (np.array([_share(use.get(kind)) for use in uses]) for kind in ("selected", "weight"))
        is_of_weights = manifest.router.select.kind == "all"
        if np.isnan(weight if is_of_weights else selected).any():
            return None
        return cls(_same(tuple(tuple(map(str, layer)) for layer in found)), selected, weight, is_of_weights)

    def aligned(self, experts: Experts) -> Shares | None:
        """(cells,) of these experts, what they are compared by; None where it is of other experts."""
        places = _places(self.experts, experts)
        return None if places is None else (self.weight if self.is_of_weights else self.selected)[places]

    def uses(self, experts: Experts) -> tuple[Shares, Shares] | None:
        """(cells,) weight and selected of these experts; None where it is of others."""
        places = _places(self.experts, experts)
        return None if places is None else (self.weight[places], self.selected[places])


def _share(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and 0 <= value <= 1 else math.nan


@lru_cache(maxsize=256)
def _same(experts: Experts) -> Experts:
    """One object for all that are equal: ten thousand adapters have few layouts."""
    return experts


@lru_cache(maxsize=256)
def _places(known: Experts, wanted: Experts) -> npt.NDArray[np.intp] | None:
    """Where the cells of `wanted` stand among those of `known`; None where one is missing."""
    cells = ((layer, name) for layer, names in enumerate(known) for name in names)
    numbers = {cell: number for number, cell in enumerate(cells)}
    found = [numbers.get((layer, name), -1) for layer, names in enumerate(wanted) for name in names]
    return None if len(known) != len(wanted) or -1 in found else np.array(found, dtype=np.intp)


@dataclass(eq=False, slots=True)
class Recent:
    """What an adapter's routers did lately: sums in which a token counts for half after HALF_LIFE_SECONDS."""

    tokens: float = 0.0
    sums: Shares = field(default_factory=lambda: np.zeros(()))
    _since: float = 0.0

    def add(self, tokens: int, sums: Shares, seconds: float) -> None:
        """
        Args:
            tokens: that have come since the last time.
            sums: (cells,) of them, as `Profile.aligned`: those that kept each expert, or its weights.
            seconds: the time, by a clock that does not jump.
        """
        weight = self._fading(seconds)
        self.sums, self.tokens = self.sums * weight + sums, self.tokens * weight + tokens
        self._since = seconds

    def shares(self, seconds: float) -> Shares | None:
        """(cells,) at this time; None where there were too few tokens lately."""
        return np.clip(self.sums / self.tokens, 0.0, 1.0) if self.tokens * self._fading(seconds) >= MIN_TOKENS else None

    def _fading(self, seconds: float) -> float:
        return math.exp2((self._since - seconds) / HALF_LIFE_SECONDS)


def divergence(p: Shares, q: Shares) -> float:
    """Mean Jensen-Shannon divergence of coins, in bits."""
    return float(np.mean(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)) if len(p) else 0.0


def _entropy(p: Shares) -> Shares:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(x > 0, -x * np.log2(x), 0.0) for x in (p, 1 - p)]
    return terms[0] + terms[1]
