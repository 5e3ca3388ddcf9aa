"""The base's four products of a layer: how they are multiplied, and the weights that they read with slots' rows behind them."""

import torch
from torch import Tensor

from moa_serve.gpu.layout import PRODUCTS, SlotLayout
from moa_serve.model.weights import BaseWeights

ATTRIBUTES = {"QKV": "qkv", "O": "o", "GATE_UP": "gate_up", "DOWN": "down"}
"""Of model.weights.LayerWeights, by product."""


def multiply(inputs: Tensor, weight: Tensor, out: Tensor) -> None:
    """out (M, N) float32 = inputs (M, K) times weight (N, K), added up in float32 and not rounded."""
    if inputs.dtype == torch.float32:
        torch.mm(inputs, weight.T, out=out)
    elif inputs.device.type == "cpu":  # torch has no such product there; widened numbers have the same one
        torch.mm(inputs.float(), weight.float().T, out=out)
    else:
        torch.ops.aten.mm.dtype_out(inputs, weight.T, torch.float32, out=out)


def placed(
    weights: BaseWeights, layout: SlotLayout, num_slots: int, gathers: bool
) -> tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """By product, the weights that each layer's reads, and all slots' rows.

    Where these do not stand apart, they stand behind the base's, which `weights` are views of then. No more than a layer is twice.
    """
    found: dict[str, list[Tensor]] = {product: [] for product in PRODUCTS}
    rows: dict[str, list[Tensor]] = {product: [] for product in PRODUCTS}
    for layer in weights.layers:
        for product, name in ATTRIBUTES.items():
            old = getattr(layer, name)
            base, further = len(old), num_slots * layout.sections[product].rows
            if gathers:
                found[product].append(old)
                rows[product].append(old.new_zeros(further, old.shape[1]))
                continue
            new = old.new_zeros(base + further, old.shape[1])
            new[:base] = old
            setattr(layer, name, new[:base])
            found[product].append(new)
            rows[product].append(new[base:])
            del old
        if weights.embed.is_cuda and not gathers:
            torch.cuda.empty_cache()  # what a layer leaves is too small for the next one's
    return found, rows
