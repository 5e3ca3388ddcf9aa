"""Adapters on the device, one a slot: the bytes beside engine.pools.SlotTable, which decides who has which slot.

A slot is filled before the step that first uses it and read by the forward only; owned by the engine thread.
"""

from collections.abc import Mapping

from torch import Tensor

from moa_serve.adapter.manifest import Manifest
from moa_serve.model.build import build
from moa_serve.model.moa import MoaWeights
from moa_serve.model.transformer import Transformer


class AdapterBank:
    """`num_slots` places for adapters that are ready to compute."""

    def __init__(self, model: Transformer, num_slots: int) -> None:
        self._model = model
        self._slots: list[MoaWeights | None] = [None] * num_slots

    def upload(self, slot: int, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        """Stack the adapter's tensors on the base's device, in the base's dtype."""
        model = self._model
        self._slots[slot] = build(manifest, tensors, model.weights, model.config, model.dtype)

    def clear(self, slot: int) -> None:
        self._slots[slot] = None

    def __getitem__(self, slot: int) -> MoaWeights:
        weights = self._slots[slot]
        assert weights is not None, f"slot {slot} is read before it is filled"
        return weights
