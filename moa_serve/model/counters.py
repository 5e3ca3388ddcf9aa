"""Running totals of what an adapter's routers decided, kept on the device and added to without a synchronisation.

Rows are layers, columns a layer's experts in canonical order (those of `Routing`). Owned by the engine thread; others read snapshots.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from moa_serve.adapter.manifest import KINDS, Manifest
from moa_serve.model.moa import Routed


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTotals:
    """A snapshot. `tokens` went through every router; `selected` and `gate_sum` (L, E) count and add up what was kept of them.

    `experts` are the names of the columns, layer by layer; empty where the adapter has no router.
    """

    tokens: int
    selected: npt.NDArray[np.float64]
    gate_sum: npt.NDArray[np.float64]
    experts: tuple[tuple[str, ...], ...] = ()


class RouterCounters:
    """Totals of one adapter revision; for an adapter without routers only its tokens are counted."""

    def __init__(self, manifest: Manifest, device: torch.device) -> None:
        plans = [manifest.layer(layer) for layer in range(manifest.base.num_layers)]
        at_layer, at_linear = manifest.router.site == "layer", manifest.router.site == "linear"
        names = tuple(tuple(expert.name for expert in plan.experts) for plan in plans)
        self._experts = names if at_layer or at_linear else ()
        self._columns = [torch.tensor(plan.columns, dtype=torch.int64, device=device) if at_layer else None for plan in plans]
        self._offsets: list[dict[str, int]] = []
        for plan in plans:
            counts = {site: len(plan.at(site)) for site in KINDS}
            starts = np.cumsum([0, *counts.values()]).tolist()
            self._offsets.append({"layer": 0} if at_layer else dict(zip(counts, starts, strict=False)) if at_linear else {})
        shape = (len(plans), max(len(plan.experts) for plan in plans))
        self._selected = torch.zeros(shape, dtype=torch.float64, device=device)
        self._gate_sum = torch.zeros(shape, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, layer: int, site: str, routed: Routed) -> None:
        """Count one router's word on some tokens; those inside nested experts are not counted."""
        offset = self._offsets[layer].get(site)
        if offset is None:
            return
        # One row that overflows must not turn the totals into NaN for good.
        gates = routed.gates.detach()
        selected, gates = routed.selected.sum(0), torch.where(gates.isfinite(), gates, 0.0).sum(0)
        columns = self._columns[layer]
        if columns is not None:
            selected, gates = selected[columns], gates[columns]
        self._selected[layer, offset : offset + len(selected)] += selected
        self._gate_sum[layer, offset : offset + len(gates)] += gates

    def state(self) -> tuple[int, torch.Tensor, torch.Tensor]:
        """What `restore` takes, to go on counting where an interrupted training run stopped."""
        return self.tokens, self._selected, self._gate_sum

    def restore(self, state: tuple[int, torch.Tensor, torch.Tensor]) -> None:
        device = self._selected.device
        self.tokens, self._selected, self._gate_sum = state[0], state[1].to(device), state[2].to(device)

    def snapshot(self) -> RoutingTotals:
        return RoutingTotals(self.tokens, self._selected.cpu().numpy().copy(), self._gate_sum.cpu().numpy().copy(), self._experts)
