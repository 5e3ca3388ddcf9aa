"""What the tests of the native backend share: whether it is here, its instruction sets, and a look into an adapter's blob."""

import ctypes
import shutil
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from moa_serve.model.batch import PreparedAdapter
from moa_serve.model.moa import MoaWeights
from moa_serve.native import library as lib
from moa_serve.native import packing
from moa_serve.native.program import NativeAdapter

Struct = TypeVar("Struct", bound=ctypes.Structure)


def available_sets() -> list[str]:
    """Instruction sets to test, best first; none where there is no compiler, so that nothing was built."""
    try:
        return lib.instruction_sets()
    except lib.NativeUnavailable:
        assert shutil.which("g++") is None, "there is a compiler, so the native library must be here: pip install -e ."
        return []


SETS = available_sets()


def element(dtype: torch.dtype) -> int:
    return lib.BFLOAT16 if dtype == torch.bfloat16 else lib.FLOAT32


def structs(blob: Tensor, kind: type[Struct], at: int, count: int) -> list[Struct]:
    array: Any = (kind * count).from_buffer_copy(blob.numpy().tobytes(), at) if count else []
    return list(array)


def overflow(prepared: PreparedAdapter) -> None:
    """Let the first layer's V expert of an adapter in its slot have finite weights that overflow in use, on either backend."""
    if isinstance(prepared, MoaWeights):
        layer = prepared.layers[0]
        assert layer is not None
        layer.linears["V"].b.fill_(3e38)
        return
    assert isinstance(prepared, NativeAdapter)
    dtype = torch.bfloat16 if head(prepared).dtype == lib.BFLOAT16 else torch.float32
    for layer_index, _, group, struct in experts(prepared):
        if layer_index == 0 and group.target == lib.TARGETS["V"]:
            end = struct.b_at + struct.rank * packing.PANEL * dtype.itemsize
            prepared.blob[struct.b_at : end].view(dtype).fill_(3e38)


def a_tensor(prepared: PreparedAdapter) -> Tensor:
    """One that lives as long as what stands in the slot."""
    if isinstance(prepared, NativeAdapter):
        return prepared.blob
    assert isinstance(prepared, MoaWeights)
    layer = prepared.layers[0]
    assert layer is not None
    return next(iter(layer.linears.values())).a


def head(adapter: NativeAdapter) -> lib.AdapterStruct:
    return structs(adapter.blob, lib.AdapterStruct, 0, 1)[0]


def plans(adapter: NativeAdapter) -> list[lib.LayerPlanStruct]:
    found = head(adapter)
    return structs(adapter.blob, lib.LayerPlanStruct, found.layers_at, found.num_layers)


def routers(adapter: NativeAdapter) -> Iterator[tuple[int, int, lib.RouterStruct]]:
    """(layer, place in the blob, struct) of every router."""
    for layer, plan in enumerate(plans(adapter)):
        size = ctypes.sizeof(lib.RouterStruct)
        for number, struct in enumerate(structs(adapter.blob, lib.RouterStruct, plan.routers_at, plan.router_end[lib.NUM_STAGES - 1])):
            yield layer, plan.routers_at + number * size, struct


def experts(adapter: NativeAdapter) -> Iterator[tuple[int, int, lib.GroupStruct, lib.ExpertStruct]]:
    """(layer, place in the blob, its group, struct) of every expert."""
    for layer, plan in enumerate(plans(adapter)):
        for group in structs(adapter.blob, lib.GroupStruct, plan.groups_at, plan.shrink_end[lib.NUM_STAGES - 1]):
            for number, struct in enumerate(structs(adapter.blob, lib.ExpertStruct, group.experts_at, group.num_experts)):
                yield layer, group.experts_at + number * ctypes.sizeof(lib.ExpertStruct), group, struct
