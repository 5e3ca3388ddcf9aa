"""Running totals of what an adapter's routers decided, kept on the device and added to without a synchronisation.

Rows are layers, columns a layer's experts in canonical order (those of `Routing`). Owned by the engine thread; others read snapshots.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moa_serve.adapter.manifest import KINDS, Manifest


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTotals:
    """A snapshot. `tokens` went through every router; `selected` and `gate_sum` (L, E) count and add up what was kept of them.

    `experts` are the names of the columns, layer by layer; empty where the adapter has no router.
    """

    tokens: int
    selected: npt.NDArray[np.float64]
    gate_sum: npt.NDArray[np.float64]
    experts: tuple[tuple[str, ...], ...] = ()


Word = tuple[int, str, int]  # a router: its layer, its site, and how many outputs it has


@dataclass(frozen=True, slots=True)
class Counted:
    """Of one router: the cells [first, first + len(outputs)) of its layer's row, and the output that each counts."""

    first: int
    outputs: tuple[int, ...]


def counted_outputs(manifest: Manifest) -> list[dict[str, Counted]]:
    """Per layer, the routers that are counted, by site ("layer" or a target); routers inside nested experts are not."""
    layers: list[dict[str, Counted]] = []
    for index in range(manifest.base.num_layers):
        plan, counted = manifest.layer(index), {}
        if manifest.router.site == "layer":
            counted["layer"] = Counted(0, plan.columns)
        elif manifest.router.site == "linear":
            first = 0
            for site in KINDS:
                if count := len(plan.at(site)):
                    counted[site] = Counted(first, tuple(range(count)))
                    first += count
        layers.append(counted)
    return layers


class RouterCounters:
    """Totals of one adapter revision; for an adapter without routers only its tokens are counted.

    `selected` and `gate_sum` (L, E) float64 are added to by the forward, through `add` or, on the CPU, in place.
    """

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        plans = [manifest.layer(layer) for layer in range(manifest.base.num_layers)]
        names = tuple(tuple(expert.name for expert in plan.experts) for plan in plans)
        self._experts = names if manifest.router.site != "none" else ()
        self._counted = counted_outputs(manifest)
        self._places: dict[tuple[Word, ...], tuple[torch.Tensor, torch.Tensor]] = {}  # one in serving: every step asks the same routers
        shape = (len(plans), max(len(plan.experts) for plan in plans))
        self.selected = torch.zeros(shape, dtype=torch.float64, device=device)
        self.gate_sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, words: tuple[Word, ...], selected: torch.Tensor, gates: torch.Tensor) -> None:
        """Count what routers said of some tokens; those inside nested experts are not counted.

        Args:
            words: the routers.
            selected, gates: (n,), sums over the tokens of their outputs, side by side in that order.
        """
        places = self._places.get(words)
        if places is None:
            places = self._places[words] = self._places_of(words)
        outputs, cells = places
        self.selected.view(-1).index_add_(0, cells, selected[outputs].double())
        self.gate_sum.view(-1).index_add_(0, cells, gates[outputs].double())

    def _places_of(self, words: tuple[Word, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the counted outputs: where they stand among all outputs, and their cells."""
        outputs: list[int] = []
        cells: list[int] = []
        start, width, device = 0, self.selected.shape[1], self.selected.device
        for layer, site, size in words:
            if counted := self._counted[layer].get(site):
                outputs += [start + output for output in counted.outputs]
                cells += range(layer * width + counted.first, layer * width + counted.first + len(counted.outputs))
            start += size
        return torch.tensor(outputs, dtype=torch.int64, device=device), torch.tensor(cells, dtype=torch.int64, device=device)

    def state(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """What `restore` takes, to go on counting where an interrupted training run stopped."""
        return self.tokens, self.selected, self.gate_sum

    def restore(self, state: tuple[int, torch.Tensor, torch.Tensor]) -> None:
        device = self.selected.device
        self.tokens, self.selected, self.gate_sum = state[0], state[1].to(device), state[2].to(device)

    def snapshot(self) -> RoutingTotals:
        return RoutingTotals(self.tokens, self.selected.cpu().numpy().copy(), self.gate_sum.cpu().numpy().copy(), self._experts)
