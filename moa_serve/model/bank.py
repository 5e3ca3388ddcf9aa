"""Adapters on the device, one a slot: the bytes beside engine.pools.SlotTable, which decides who has which slot.

A slot is filled before the step that first uses it and read by the forward only; owned by the engine thread.
"""

import torch

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import TARGETS
from moa_serve.config import ModelConfig, linear_shape
from moa_serve.model.backend import Backend, PreparedAdapter

_RANK, _PARALLEL, _PROMPT = 8, 16, 10  # of the adapter that a slot is counted as: the paper's sizes


def bytes_per_slot(config: ModelConfig, dtype: torch.dtype) -> int:
    """What an adapter in a slot takes, to plan with before one is known: LoRA at every linear, a parallel adapter and a prompt.

    A larger one is no mistake; an empty slot takes nothing.
    """
    lora = sum(_RANK * sum(linear_shape(config, target)) for target in TARGETS)
    return config.num_layers * (lora + (2 * _PARALLEL + _PROMPT) * config.hidden_size) * dtype.itemsize


class AdapterBank:
    """`num_slots` places for adapters that are ready to compute."""

    def __init__(self, model: Backend, num_slots: int) -> None:
        self._model = model
        self._slots: list[PreparedAdapter | None] = [None] * num_slots

    def upload(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into the layout that the model computes with."""
        self._slots[slot] = self._model.prepare(adapter, slot)

    def clear(self, slot: int) -> None:
        self._slots[slot] = None

    def __getitem__(self, slot: int) -> PreparedAdapter:
        prepared = self._slots[slot]
        assert prepared is not None, f"slot {slot} is read before it is filled"
        return prepared
