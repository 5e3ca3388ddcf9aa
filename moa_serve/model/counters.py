"""Running totals of what an adapter's routers decided, kept on the device and added to without a synchronisation.

Rows are layers, columns a layer's experts in canonical order (those of `Routing`). Owned by the engine thread; others read snapshots.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moa_serve.adapter.manifest import Manifest


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTotals:
    """A snapshot. `tokens` went through every router; `selected` and `gate_sum` (L, E) count and add up what was kept of them.

    `computed` (L, E) are the tokens that an expert was computed for, at least those that kept it. `thresholds` (L,) adds up what a
    score had to reach, the mean over a layer's routers; 0 where nothing has to be reached. `experts` are the names of the columns,
    layer by layer; empty where the adapter has no router.
    """

    tokens: int
    selected: npt.NDArray[np.float64]
    gate_sum: npt.NDArray[np.float64]
    computed: npt.NDArray[np.float64]
    thresholds: npt.NDArray[np.float64]
    experts: tuple[tuple[str, ...], ...] = ()

    def since(self, before: "RoutingTotals") -> "RoutingTotals":
        """What was added after an earlier snapshot."""
        return RoutingTotals(
            self.tokens - before.tokens,
            self.selected - before.selected,
            self.gate_sum - before.gate_sum,
            self.computed - before.computed,
            self.thresholds - before.thresholds,
            self.experts,
        )


Word = tuple[int, str, int]  # a router: its layer, its site, and how many outputs it has


@dataclass(frozen=True, slots=True)
class Counted:
    """Of one router: the cells [first, first + len(outputs)) of its layer's row, and the output that each counts."""

    first: int
    outputs: tuple[int, ...]


def counted_outputs(manifest: Manifest) -> list[dict[str, Counted]]:
    """Per layer, the routers that are counted, by site ("layer" or a target); routers inside nested experts are not."""
    layers: list[dict[str, Counted]] = [{} for _ in range(manifest.base.num_layers)]
    for router in manifest.routers:
        counted = layers[router.layer]
        first = sum(len(before.outputs) for before in counted.values())
        counted[router.site] = Counted(first, router.outputs)
    return layers


def expert_names(manifest: Manifest) -> tuple[tuple[str, ...], ...]:
    """Of the experts that routers weigh, layer by layer; empty where the adapter has no router."""
    if manifest.router.site == "none":
        return ()
    return tuple(tuple(expert.name for expert in manifest.layer(layer).experts) for layer in range(manifest.base.num_layers))


class RouterCounters:
    """Totals of one adapter revision; for an adapter without routers only its tokens are counted.

    `selected`, `gate_sum`, `computed` (L, E) and `thresholds` (L,), float64, are added to by the forward, through `add` or, on the CPU,
    in place.
    """

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        plans = [manifest.layer(layer) for layer in range(manifest.base.num_layers)]
        self._experts = expert_names(manifest)
        self._counted = counted_outputs(manifest)
        self._places: dict[tuple[Word, ...], _Places] = {}  # one in serving: every step asks the same routers
        shape = (len(plans), max(len(plan.experts) for plan in plans))
        self.selected = torch.zeros(shape, dtype=torch.float64, device=device)
        self.gate_sum, self.computed = torch.zeros_like(self.selected), torch.zeros_like(self.selected)
        self.thresholds = torch.zeros(len(plans), dtype=torch.float64, device=device)
        self.tokens = 0

    @property
    def num_experts(self) -> int:
        """Whose evaluations are counted, over all layers."""
        return sum(map(len, self._experts))

    def add(
        self, words: tuple[Word, ...], num_tokens: int, selected: torch.Tensor, gates: torch.Tensor, thresholds: torch.Tensor | None = None
    ) -> None:
        """Count what routers said of some tokens, for which every expert was computed; those inside nested experts are not counted.

        Args:
            words: the routers.
            selected, gates: (n,), sums over the tokens of their outputs, side by side in that order.
            thresholds: (words,), sums over the tokens; None where nothing had to be reached.
        """
        places = self._places.get(words)
        if places is None:
            places = self._places[words] = self._places_of(words)
        self.selected.view(-1).index_add_(0, places.cells, selected[places.outputs].double())
        self.gate_sum.view(-1).index_add_(0, places.cells, gates[places.outputs].double())
        self.computed.view(-1)[places.cells] += num_tokens
        if thresholds is not None:
            self.thresholds.index_add_(0, places.layers, thresholds[places.words].double() * places.shares)

    def _places_of(self, words: tuple[Word, ...]) -> "_Places":
        outputs: list[int] = []
        cells: list[int] = []
        heard: list[tuple[int, int, float]] = []
        start, width, device = 0, self.selected.shape[1], self.selected.device
        for number, (layer, site, size) in enumerate(words):
            if counted := self._counted[layer].get(site):
                outputs += [start + output for output in counted.outputs]
                cells += range(layer * width + counted.first, layer * width + counted.first + len(counted.outputs))
                heard.append((number, layer, 1.0 / len(self._counted[layer])))
            start += size
        return _Places(
            outputs=torch.tensor(outputs, dtype=torch.int64, device=device),
            cells=torch.tensor(cells, dtype=torch.int64, device=device),
            words=torch.tensor([number for number, *_ in heard], dtype=torch.int64, device=device),
            layers=torch.tensor([layer for _, layer, _ in heard], dtype=torch.int64, device=device),
            shares=torch.tensor([share for *_, share in heard], dtype=torch.float64, device=device),
        )

    def state(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """What `restore` takes, to go on counting where an interrupted training run stopped."""
        return self.tokens, self.selected, self.gate_sum

    def restore(self, state: tuple[int, torch.Tensor, torch.Tensor]) -> None:
        device = self.selected.device
        self.tokens, self.selected, self.gate_sum = state[0], state[1].to(device), state[2].to(device)

    def snapshot(self) -> RoutingTotals:
        selected, gate_sum, computed, thresholds = (
            part.cpu().numpy().copy() for part in (self.selected, self.gate_sum, self.computed, self.thresholds)
        )
        return RoutingTotals(self.tokens, selected, gate_sum, computed, thresholds, self._experts)


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Of the counted outputs: where they stand among all outputs, and their cells. Of the counted routers: which of the words they are,
    their layers, and their shares of the layer's mean."""

    outputs: torch.Tensor
    cells: torch.Tensor
    words: torch.Tensor
    layers: torch.Tensor
    shares: torch.Tensor
