"""How far what an adapter's routers do lately is from what they did in training, as one number; and what that number is.

Each expert of each layer is a coin: the share of tokens that keep it, or, where every token keeps every expert, its mean weight. Two coins
p and q differ by their Jensen-Shannon divergence in bits, JS(p, q) = H((p + q) / 2) - (H(p) + H(q)) / 2 with
H(p) = -p log2 p - (1 - p) log2(1 - p): 0 for equal ones, 1 for a coin that always and one that never falls. The drift is the mean over all
experts of all layers (Lin, 1991). Unlike Kullback and Leibler's, it is finite where an expert was never kept in training.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moa_serve.adapter.manifest import Manifest

HALF_LIFE_SECONDS = 600.0  # after which a token counts for half
MIN_TOKENS = 500.0  # fewer say nothing yet

Shares = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """`shares` by layer and expert's name, 0 to 1: of tokens that kept it, or its mean weight (`is_of_weights`)."""

    shares: tuple[Mapping[str, float], ...]
    is_of_weights: bool

    @classmethod
    def of(cls, manifest: Manifest) -> "Profile | None":
        """None where the manifest has none that can be read: that object is the author's, and no reason to refuse an adapter."""
        layers = (manifest.profile or {}).get("layers")
        if not isinstance(layers, list) or len(layers) != manifest.base.num_layers:
            return None
        is_of_weights = manifest.router.select.kind == "all"
        shares = [_shares(layer, "weight" if is_of_weights else "selected") for layer in layers]
        return None if any(layer is None for layer in shares) else cls(tuple(layer for layer in shares if layer is not None), is_of_weights)

    def aligned(self, experts: Sequence[Sequence[str]]) -> Shares | None:
        """(cells,) one layer's experts after the other; None where it is of other experts."""
        if len(experts) != len(self.shares) or any(
            name not in layer for layer, names in zip(self.shares, experts, strict=True) for name in names
        ):
            return None
        return np.array([layer[name] for layer, names in zip(self.shares, experts, strict=True) for name in names])


def _shares(layer: Any, kind: str) -> dict[str, float] | None:
    if layer is None:
        return {}
    if not isinstance(layer, dict):
        return None
    found: dict[str, float] = {}
    for name, use in layer.items():
        share = use.get(kind) if isinstance(use, dict) else None
        if not isinstance(share, int | float) or not 0 <= share <= 1:
            return None
        found[name] = float(share)
    return found


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
        weight = math.exp2((self._since - seconds) / HALF_LIFE_SECONDS)
        self.sums, self.tokens = self.sums * weight + sums, self.tokens * weight + tokens
        self._since = seconds

    @property
    def shares(self) -> Shares | None:
        """(cells,); None where there were too few tokens."""
        return np.clip(self.sums / self.tokens, 0.0, 1.0) if self.tokens >= MIN_TOKENS else None


def divergence(p: Shares, q: Shares) -> float:
    """Mean Jensen-Shannon divergence of coins, in bits."""
    return float(np.mean(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2)) if len(p) else 0.0


def _entropy(p: Shares) -> Shares:
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(x > 0, -x * np.log2(x), 0.0) for x in (p, 1 - p)]
    return terms[0] + terms[1]
