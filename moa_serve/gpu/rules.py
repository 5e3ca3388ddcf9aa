"""By which rules routers choose, as the kernels read them: a row for each slot, its adapter's own, and further rows for requests' options.

A chunk of tokens names its row. Rows of options are kept for steps to come and taken again, the one used least lately first; a step that
needs more than there are gets a larger table, which stands at other addresses. Owned by the engine thread.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RouterRule, RoutingRules
from moa_serve.gpu.layout import SlotLayout, aligned

NUM_OPTIONS = 256  # rows for options, at first
_FIELDS = 8


class RuleTable:
    """`ints` (rows, L, routers, 8) int64 and `thresholds` (rows, L, routers) float32."""

    def __init__(self, layout: SlotLayout, num_slots: int, device: torch.device) -> None:
        self._layout, self._num_slots = layout, num_slots
        self._known: OrderedDict[tuple[int, RoutingRules], int] = OrderedDict()
        self.generation = 0  # another one: the table stands elsewhere now
        self._allocate(NUM_OPTIONS, device)

    def _allocate(self, num_options: int, device: torch.device) -> None:
        shape = (self._num_slots + num_options, self._layout.config.num_layers, aligned(max(len(self._layout.routers), 1)))
        self.ints = torch.zeros(*shape, _FIELDS, dtype=torch.int64, device=device)
        self.thresholds = torch.zeros(shape, device=device)

    @property
    def num_bytes(self) -> int:
        return self.ints.nbytes + self.thresholds.nbytes

    @property
    def stride(self) -> int:
        """Of a row, in rules."""
        return self.thresholds[0].numel()

    def fill(self, slot: int, manifest: Manifest) -> None:
        """Another adapter's own rules stand in the slot's row; options of the one before mean nothing now."""
        self._known = OrderedDict((key, row) for key, row in self._known.items() if key[0] != slot)
        self._write(slot, manifest, None)

    def row(self, slot: int, manifest: Manifest, rules: RoutingRules | None, in_use: set[int]) -> int:
        """The row of these rules in a slot; `in_use` are rows of this step, which stay, and the row is added to them."""
        if rules is None:
            return slot
        row = self._known.pop((slot, rules), None)
        if row is None:
            row = self._free_row(in_use)
            self._write(row, manifest, rules)
        self._known[slot, rules] = row
        in_use.add(row)
        return row

    def _free_row(self, in_use: set[int]) -> int:
        taken = set(self._known.values()) | in_use
        rows = range(self._num_slots, len(self.thresholds))
        if len(taken) < len(rows):
            return next(row for row in rows if row not in taken)
        key = next((key for key, row in self._known.items() if row not in in_use), None)
        if key is not None:
            return self._known.pop(key)
        ints, thresholds = self.ints, self.thresholds
        self._allocate(2 * len(rows), ints.device)
        self.generation += 1
        self.ints[: len(ints)], self.thresholds[: len(thresholds)] = ints, thresholds
        return rows.stop

    def _write(self, row: int, manifest: Manifest, rules: RoutingRules | None) -> None:
        ints, thresholds = torch.zeros(self.ints.shape[1:], dtype=torch.int64), torch.zeros(self.thresholds.shape[1:])
        for layer, plan in enumerate(manifest.plans):
            for number, site in enumerate(self._layout.routers):
                own = RouterRule()
                if manifest.router.site == "layer" and site == "layer":
                    own = RouterRule.of(manifest.router.select, plan.num_outputs)
                elif manifest.router.site == "linear" and site != "layer":
                    own = RouterRule.of(manifest.router.select, max(len(plan.at(site)), 1))
                rule = own if rules is None else rules.get(layer, site) or own
                ints[layer, number, :7] = _numbers(rule)
                thresholds[layer, number] = rule.threshold or 0.0
        self.ints[row].copy_(ints)
        self.thresholds[row].copy_(thresholds)


def _numbers(rule: RouterRule) -> Tensor:
    signed = [bits - (1 << 64) if bits >> 63 else bits for bits in (rule.disabled, rule.forced)]
    return torch.tensor(
        [rule.threshold is not None, rule.is_function, rule.subtracts, rule.top_k, rule.renormalises, *signed], dtype=torch.int64
    )
