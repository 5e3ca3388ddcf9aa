"""Expert activity: what an adapter's routers did with the tokens of some prompts, as numbers.

`generate`, `inspect` and a training's profile count with it; shell/activity.py shows it. Owned by whoever adds to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moa_serve.engine.routing import Routing


@dataclass(frozen=True, slots=True)
class Use:
    """One expert in one layer: the mean of its router's output, and the share of tokens that selected it, both 0 to 1."""

    weight: float
    selected: float


class Activity:
    """Sums over tokens. Routers of one adapter only."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []
        self.num_tokens = 0
        self._weight: Tensor = torch.zeros(())
        self._selected: Tensor = torch.zeros(())

    def add(self, routing: Routing, num_tokens: int) -> None:
        """Count a prompt.

        Args:
            num_tokens: that it stands for: those of `routing`, or more where the weights of a prompt hold for its completion too.
        """
        self.names = routing.experts
        self.num_tokens += num_tokens
        self._weight = self._weight + routing.weights.double().mean(1) * num_tokens  # (L, E)
        self._selected = self._selected + routing.selected.double().mean(1) * num_tokens

    @classmethod
    def from_profile(cls, profile: Mapping[str, Any], experts: Sequence[Sequence[str]]) -> "Activity | None":
        """What a manifest's `profile` tells of the training's tokens, in the form of `to_json`; None where it has another form.

        Args:
            experts: names that each layer must have; a manifest is not to be trusted.
        """
        activity = cls()
        num_tokens, layers = profile.get("num_tokens"), profile.get("layers")
        if not isinstance(num_tokens, int) or num_tokens < 1 or not isinstance(layers, list) or len(layers) != len(experts):
            return None
        shape = (len(experts), max(map(len, experts)))
        weight, selected = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        for index, (layer, names) in enumerate(zip(layers, experts, strict=True)):
            if not isinstance(layer, dict) or layer.keys() != set(names):
                return None
            for column, name in enumerate(names):
                use = layer[name]
                if not isinstance(use, dict) or not all(_is_number(use.get(key)) and 0 <= use[key] <= 1 for key in ("weight", "selected")):
                    return None
                weight[index, column], selected[index, column] = use["weight"], use["selected"]
        activity.names, activity.num_tokens = [list(names) for names in experts], num_tokens
        activity._weight, activity._selected = weight * activity.num_tokens, selected * activity.num_tokens
        return activity

    @property
    def layers(self) -> list[dict[str, Use]]:
        """Each layer's experts in canonical order; empty where the adapter leaves the layer alone."""
        return [
            {
                name: Use(float(self._weight[layer, column]) / self.num_tokens, float(self._selected[layer, column]) / self.num_tokens)
                for column, name in enumerate(names)
            }
            for layer, names in enumerate(self.names)
        ]

    @property
    def is_sparse(self) -> bool:
        """Whether some token left some expert out."""
        return any(use.selected < 1 for layer in self.layers for use in layer.values())

    @property
    def experts_by_layer(self) -> list[float]:
        """How many experts of each layer a token selects, in the mean."""
        return [sum(use.selected for use in layer.values()) for layer in self.layers]

    @property
    def experts_per_token(self) -> tuple[float, float]:
        """(selected, all), each in the mean over tokens and over layers that have experts."""
        layers = [layer for layer in self.layers if layer]
        selected = sum(use.selected for layer in layers for use in layer.values())
        return selected / len(layers), sum(map(len, layers)) / len(layers)

    @property
    def skippable(self) -> float:
        """Share of expert evaluations that have the weight 0."""
        selected, total = self.experts_per_token
        return 1 - selected / total

    def to_json(self) -> dict[str, Any]:
        selected, total = self.experts_per_token
        return {
            "num_tokens": self.num_tokens,
            "experts_per_token": round(selected, 4),
            "num_experts": round(total, 4),
            "skippable": round(self.skippable, 4),
            "layers": [
                {name: {"weight": round(use.weight, 4), "selected": round(use.selected, 4)} for name, use in layer.items()}
                for layer in self.layers
            ],
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
