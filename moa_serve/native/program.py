"""From an adapter that is ready to compute (model/moa.py) to one blob: its weights packed, and for every layer the list of what to do.

The blob holds no pointers, only offsets, so it can be kept on disk and used wherever it lies. A family is nothing here but the list that
comes out: routers by stage, groups of experts by stage, the prompt. Runs once, when an adapter is loaded.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RouterRule, RoutingRules
from moa_serve.model.batch import TracedRouter
from moa_serve.model.counters import counted_outputs
from moa_serve.model.moa import LoraExperts, Mixture, MoaLayer, MoaWeights, ParallelAdapter, PromptExpert, Router, SwigluNet
from moa_serve.native import library as lib
from moa_serve.native import packing

_ALIGNMENT = 64
_STAGE_OF = {"Q": 0, "K": 0, "V": 0, "PROMPT": 0, "O": 1, "UP": 2, "GATE": 2, "P_ADAPTER": 2, "DOWN": 3}
_MOST_TABLES = 128  # rules that an adapter keeps for steps to come
_CONSTANT = 0  # the gate column that is 1


@dataclass(eq=False, slots=True)
class NativeAdapter:
    """An adapter packed for the native step; what stands in a slot."""

    manifest: Manifest
    blob: Tensor  # (bytes,) uint8
    traced: tuple[TracedRouter, ...]
    trace_width: int
    tables: dict[RoutingRules, ctypes.Array[lib.RuleStruct]] = field(default_factory=dict)

    def rules(self, rules: RoutingRules) -> ctypes.Array[lib.RuleStruct]:
        """What a segment with these rules has for the library: one for each of the adapter's routers."""
        table = self.tables.pop(rules, None)
        if table is None:
            own = self.manifest.router
            table = (lib.RuleStruct * len(self.traced))()
            for number, router in enumerate(self.traced):
                is_inner = own.site == "layer" and router.site != "layer"
                plain = RouterRule() if is_inner else RouterRule.of(own.select, router.outputs)
                table[number] = rule_struct(rules.get(router.layer, router.site) or plain)
            while len(self.tables) >= _MOST_TABLES:
                self.tables.pop(next(iter(self.tables)))
        self.tables[rules] = table  # the one used last stands last
        return table

    @property
    def num_layers(self) -> int:
        return self.manifest.base.num_layers

    @property
    def max_outputs(self) -> int:
        return max(self.manifest.layer(index).num_outputs for index in range(self.num_layers))


class _Blob:
    """Bytes that grow, every part aligned; the head stands at 0, so that no part does."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, bytes | np.ndarray]] = []
        self.size = packing.padded(ctypes.sizeof(lib.AdapterStruct), _ALIGNMENT)

    def add(self, part: Tensor | bytes) -> int:
        raw = part if isinstance(part, bytes) else part.flatten().view(torch.uint8).numpy()
        place = self.size
        self._parts.append((place, raw))
        # A vector more than the part: kernels read whole vectors.
        self.size = packing.padded(place + len(raw) + _ALIGNMENT, _ALIGNMENT)
        return place

    def structs(self, items: Sequence[ctypes.Structure]) -> int:
        return self.add(b"".join(bytes(item) for item in items)) if items else 0

    def finish(self, head: lib.AdapterStruct) -> Tensor:
        head.num_bytes = self.size
        whole = torch.zeros(self.size, dtype=torch.uint8)
        view = whole.numpy()
        for place, raw in [(0, bytes(head)), *self._parts]:
            view[place : place + len(raw)] = np.frombuffer(raw, dtype=np.uint8) if isinstance(raw, bytes) else raw
        return whole


@dataclass(eq=False, slots=True)
class _Layer:
    """What has been laid out of one layer so far."""

    routers: list[tuple[int, lib.RouterStruct]] = field(default_factory=list)  # with their stage
    groups: list[tuple[int, int, lib.GroupStruct]] = field(default_factory=list)  # with input and output stage
    num_gates: int = 1
    num_coefficients: int = 0


class _Compiler:
    def __init__(self, weights: MoaWeights, dtype: torch.dtype, has_tiles: bool) -> None:
        self.weights, self.dtype, self.has_tiles = weights, dtype, has_tiles
        self.blob = _Blob()
        self.traced: list[TracedRouter] = []
        self.trace_width = self.scratch_width = self.most_prompt_rows = 0
        self.counted = counted_outputs(weights.manifest)

    def compile(self) -> NativeAdapter:
        layers = [_Layer() for _ in self.weights.layers]
        plans = [self._layer(index, layer, out) for index, (layer, out) in enumerate(zip(self.weights.layers, layers, strict=True))]
        head = lib.AdapterStruct(
            layers_at=self.blob.structs(plans),
            num_layers=len(plans),
            num_gates=max(layer.num_gates for layer in layers),
            num_coefficients=max(layer.num_coefficients for layer in layers) or packing.LANES,
            trace_width=self.trace_width,
            scratch_width=self.scratch_width,
            most_prompt_rows=self.most_prompt_rows,
            dtype=lib.BFLOAT16 if self.dtype == torch.bfloat16 else lib.FLOAT32,
        )
        return NativeAdapter(self.weights.manifest, self.blob.finish(head), tuple(self.traced), self.trace_width)

    def _layer(self, index: int, layer: MoaLayer | None, out: _Layer) -> lib.LayerPlanStruct:
        plan = lib.LayerPlanStruct()
        if layer is None:
            return plan
        if layer.router is not None:
            source = (
                lib.READS_POOLED if self.weights.manifest.is_pooled else lib.READS_RESIDUAL if layer.reads_residual else lib.READS_STAGE
            )
            self._router(index, "layer", layer.router, lib.STAGE_ATTENTION, source, out)
        for target, experts in layer.linears.items():
            self._lora(index, target, experts, out)
        if layer.prompt is not None:
            plan.prompt = self._prompt(index, layer.prompt, out)
        if layer.parallel is not None:
            self._parallel(index, layer.parallel, out)
        routers = sorted(out.routers, key=lambda item: item[0])
        # By input stage, and a parallel adapter, which is added a stage later, behind the others of its own.
        groups = sorted(out.groups, key=lambda item: (item[0], item[1]))
        plan.routers_at = self.blob.structs([struct for _, struct in routers])
        plan.groups_at = self.blob.structs([struct for *_, struct in groups])
        for stage in range(lib.NUM_STAGES):
            plan.router_end[stage] = sum(read <= stage for read, _ in routers)
            plan.shrink_end[stage] = sum(read <= stage for read, *_ in groups)
            plan.expand_end[stage] = sum(added <= stage for _, added, _ in groups)
        return plan

    def _outer(self, mixture: Mixture) -> int:
        """The layer router's outputs are the first gates behind the constant."""
        return _CONSTANT if mixture.column is None else 1 + mixture.column

    # -- routers

    def _router(self, index: int, site: str, router: Router, stage: int, source: int, out: _Layer) -> int:
        """Lay out a router; its first gate column."""
        net = router.net
        swiglu = isinstance(net, SwigluNet)
        parts = [net.w1, net.w3] if isinstance(net, SwigluNet) else [net.out]
        if router.threshold_fn is not None:
            parts.append(router.threshold_fn)
        rows = torch.cat([part.weight for part in parts]).float()
        bias = torch.cat([part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]).float()
        final = net.w2 if isinstance(net, SwigluNet) else net.out
        outputs, hidden = len(final.weight), len(net.w1.weight) if isinstance(net, SwigluNet) else 0
        is_exact = bool((rows == rows.bfloat16().float()).all())
        if is_exact and source == lib.READS_STAGE and self.has_tiles:
            row_format, place = lib.ROWS_TILES, packing.tiles(rows)
        else:
            row_format = lib.ROWS_BFLOAT16 if is_exact else lib.ROWS_FLOAT32
            place = packing.pad_columns(rows.bfloat16() if is_exact else rows)
        struct = lib.RouterStruct(
            rows_at=self.blob.add(place),
            row_bias_at=self.blob.add(bias),
            row_format=row_format,
            num_rows=len(rows),
            hidden=hidden,
            outputs=outputs,
            source=source,
            is_softmax=router.softmax,
            number=len(self.traced),
            rule=rule_struct(router.rule),
            first_gate=out.num_gates,
            trace_at=self.trace_width,
        )
        if swiglu:
            bias = torch.zeros(outputs) if final.bias is None else final.bias.float()
            struct.w2_at = self.blob.add(packing.pad_columns(final.weight.float(), packing.LANES))
            struct.w2_bias_at = self.blob.add(bias)
        if (cells := self.counted[index].get(site)) is not None:
            struct.first_counter, struct.num_counters = cells.first, len(cells.outputs)
            struct.counters_at = self.blob.add(torch.tensor(cells.outputs, dtype=torch.int32))
            struct.threshold_share = 1.0 / len(self.counted[index])
        self.traced.append(TracedRouter(index, site, self.trace_width, outputs))
        self.trace_width += 3 * outputs + 1
        room = packing.padded(len(rows), packing.LANES) + packing.LANES
        self.scratch_width = max(
            self.scratch_width,
            packing.TILE_TOKENS * room + packing.padded(outputs, packing.LANES) + packing.padded(hidden, packing.LANES) + packing.LANES,
        )
        first = out.num_gates
        out.num_gates += outputs + 1  # and the threshold
        out.routers.append((stage, struct))
        return first

    def _inner(self, index: int, site: str, mixture: Mixture, stage: int, out: _Layer) -> int | None:
        """First gate of the expert's own router; None where it has none."""
        return None if mixture.router is None else self._router(index, site, mixture.router, stage, lib.READS_STAGE, out)

    # -- experts

    def _lora(self, index: int, target: str, experts: LoraExperts, out: _Layer) -> None:
        stage = _STAGE_OF[target]
        first = self._inner(index, target, experts.mixture, stage, out)
        structs: list[lib.ExpertStruct] = []
        for number, (rows, columns, scale) in enumerate(_lora_parts(experts)):
            shared = structs[0].a_at if structs and experts.a_row is not None else None
            a, b = experts.a[rows], experts.b[:, columns]
            structs.append(self._expert(a, None, b, None, scale, experts.mixture, first, number, out, shared))
        shrink = lib.SHRINK_LINEAR if experts.a_row is None else lib.SHRINK_LINEAR_SHARED
        self._group(structs, shrink, target, stage, stage, out)

    def _parallel(self, index: int, experts: ParallelAdapter, out: _Layer) -> None:
        stage, mixture = lib.STAGE_FFN, experts.mixture
        first = self._inner(index, "P_ADAPTER", mixture, stage, out)
        bias = experts.down.bias
        assert bias is not None, "a parallel adapter has biases"
        structs: list[lib.ExpertStruct] = []
        for number, (rows, columns) in enumerate(_parallel_parts(experts)):
            shared = structs[0].a_at if structs and experts.down_row is not None else None
            down, up, up_bias = experts.down.weight[rows], experts.up[:, columns], experts.up_bias[number]
            structs.append(self._expert(down, bias[rows], up, up_bias, 1.0, mixture, first, number, out, shared))
        shrink = lib.SHRINK_SILU if experts.down_row is None else lib.SHRINK_SILU_SHARED
        self._group(structs, shrink, "DOWN", stage, lib.STAGE_DOWN, out)

    def _expert(
        self, a: Tensor, a_bias: Tensor | None, b: Tensor, out_bias: Tensor | None, scale: float,
        mixture: Mixture, first_inner: int | None, number: int, out: _Layer, a_at: int | None = None,
    ) -> lib.ExpertStruct:  # fmt: skip
        """`a_at`: where A stands already, for experts that share it."""
        rank = packing.padded(len(a), packing.per_lane(self.dtype))
        room = packing.padded(rank, packing.LANES)
        rows = packing.pad_rows(a, packing.per_lane(self.dtype))
        struct = lib.ExpertStruct(
            a_at=a_at or self.blob.add(packing.tiles(rows) if self.has_tiles else packing.pad_columns(rows).to(self.dtype)),
            b_at=self.blob.add(packing.pack(b, self.dtype, reduce_to=packing.per_lane(self.dtype))),
            scale=scale,
            rank=rank,
            outer=self._outer(mixture),
            inner=_CONSTANT if first_inner is None else first_inner + number,
            coefficients_at=out.num_coefficients,
        )
        if a_bias is not None:
            struct.a_bias_at = self.blob.add(packing.pad_columns(a_bias.float(), packing.LANES))
        if out_bias is not None:
            struct.out_bias_at = self.blob.add(packing.vector(out_bias))
        out.num_coefficients += room
        self.scratch_width = max(self.scratch_width, packing.TILE_TOKENS * room)
        return struct

    def _group(self, structs: list[lib.ExpertStruct], shrink: int, target: str, reads: int, adds: int, out: _Layer) -> None:
        group = lib.GroupStruct(self.blob.structs(structs), len(structs), shrink, lib.TARGETS[target])
        out.groups.append((reads, adds, group))

    def _prompt(self, index: int, prompt: PromptExpert, out: _Layer) -> lib.PromptStruct:
        first = self._inner(index, "PROMPT", prompt.mixture, lib.STAGE_ATTENTION, out)
        count = prompt.keys.shape[1]
        dtype = torch.bfloat16 if self.has_tiles else torch.float32
        owner = prompt.mixture.inner
        gates = torch.zeros(count, dtype=torch.int32) if first is None or owner is None else (first + owner).int()
        self.most_prompt_rows = max(self.most_prompt_rows, count)
        return lib.PromptStruct(
            self.blob.add(packing.key_pages(prompt.keys, dtype)),
            self.blob.add(packing.value_pages(prompt.values, dtype)),
            self.blob.add(prompt.head_gate.float()),
            self.blob.add(gates),
            count,
            self._outer(prompt.mixture),
        )


def rule_struct(rule: RouterRule) -> lib.RuleStruct:
    return lib.RuleStruct(
        disabled=rule.disabled,
        forced=rule.forced,
        has_threshold=rule.threshold is not None,
        is_function=rule.is_function,
        subtracts=rule.subtracts,
        top_k=rule.top_k,
        renormalises=rule.renormalises,
        threshold=rule.threshold or 0.0,
    )


def _lora_parts(experts: LoraExperts) -> list[tuple[slice, slice, float]]:
    """Of each expert its rows of A, its columns of B and its scale."""
    owner = experts.mixture.inner
    count = experts.b.shape[1]
    bounds = _bounds(None if owner is None else owner.tolist(), count)
    shared = slice(0, len(experts.a))
    return [
        (shared if experts.a_row is not None else slice(start, end), slice(start, end), float(experts.scale[start]))
        for start, end in bounds
    ]


def _parallel_parts(experts: ParallelAdapter) -> list[tuple[slice, slice]]:
    owner = experts.mixture.inner
    bounds = _bounds(None if owner is None else owner.tolist(), experts.up.shape[1])
    shared = slice(0, len(experts.down.weight))
    return [(shared if experts.down_row is not None else slice(start, end), slice(start, end)) for start, end in bounds]


def _bounds(owner: list[int] | None, count: int) -> list[tuple[int, int]]:
    """[start, end) of the columns of each expert; their owners ascend."""
    if owner is None:
        return [(0, count)]
    starts = [place for place in range(count) if place == 0 or owner[place] != owner[place - 1]]
    return list(zip(starts, [*starts[1:], count], strict=True))


def compile_adapter(weights: MoaWeights, dtype: torch.dtype, *, has_tiles: bool = False) -> NativeAdapter:
    """Pack an adapter.

    Args:
        weights: built in float32, so that each value is rounded once, here.
        dtype: of the experts' matrices. Routers are float32, and stand in bfloat16 where that holds them exactly.
        has_tiles: for an instruction set that multiplies tiles (`library.has_tiles`).
    """
    return _Compiler(weights, dtype, has_tiles).compile()
