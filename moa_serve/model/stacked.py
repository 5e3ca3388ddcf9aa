"""Several adapters of one layout, as one: their tensors side by side, so that a step applies them in one product each.

A step of eight tenants' decoding rows would else be eight times the small products of one, and each costs more to call than to compute.
The mathematics stays moa.py's: its modules take (S, T) tokens where they have S adapters' weights. Owned by the thread that computes.
"""

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moa_serve.adapter.rules import RoutingRules
from moa_serve.model.batch import RoutingTrace, Segment, SegmentTrace, TracedRouter
from moa_serve.model.counters import Word
from moa_serve.model.moa import JoinedLora, LoraExperts, MoaLayer, MoaWeights, Routed
from moa_serve.model.ops import on_device

JOINED = {"QKV": ("Q", "K", "V"), "GATE_UP": ("GATE", "UP")}  # base linears that are one product, in the order of their rows
MOST_TOKENS = 16  # of a segment that is put beside others; a longer one's products are worth their calls
_MOST_STACKS = 2  # kept: that of the decoding rows, and that of a step with others between


def join(weights: MoaWeights) -> None:
    """Make `weights.joined` and `weights.layout`."""
    weights.joined = [None if layer is None else _joined(layer) for layer in weights.layers]
    weights.layout = hashlib.sha256(repr(_outline(weights.joined)).encode()).hexdigest()


def _joined(layer: MoaLayer) -> MoaLayer:
    """The layer with one LoRA for linears that the base has in one, where the layer's router or nobody weighs them.

    Its own first factors become views of the joined one: nothing is held twice.
    """
    linears, joined = dict(layer.linears), {}
    for name, targets in JOINED.items():
        found = [linears[target] for target in targets if target in linears]
        columns = [lora.mixture.column for lora in found]
        is_plain = all(lora.mixture.router is None and lora.a_row is None for lora in found)
        if len(found) == len(targets) and is_plain and len({column is None for column in columns}) == 1:
            joined[name] = _join(found)
            for target in targets:
                del linears[target]
    return dataclasses.replace(layer, linears=linears, joined=joined)


def _join(found: Sequence[LoraExperts]) -> JoinedLora:
    a = torch.cat([lora.a for lora in found])
    columns = [lora.mixture.column for lora in found for _ in lora.a if lora.mixture.column is not None]
    first = 0
    for lora in found:
        lora.a = a[first : first + len(lora.a)]
        first += len(lora.a)
    column = torch.tensor(columns, dtype=torch.int64, device=a.device) if columns else None
    return JoinedLora(a, [lora.b for lora in found], torch.cat([lora.scale for lora in found]), column)


def _outline(part: Any) -> Any:
    """What must be equal for two adapters' layers to stand side by side: all but the numbers of their weights."""
    if isinstance(part, Tensor):
        return tuple(part.tolist()) if part.dtype == torch.int64 else tuple(part.shape)
    if isinstance(part, list):
        return tuple(map(_outline, part))
    if isinstance(part, dict):
        return tuple((key, _outline(value)) for key, value in part.items())
    if dataclasses.is_dataclass(part):
        return (type(part).__name__, *(_outline(getattr(part, field.name)) for field in dataclasses.fields(part)))
    return part


def stack(parts: Sequence[Any]) -> Any:
    """Layers of one layout as one, whose weights have a leading dimension S: (S, a, b) of matrices and (S, 1, n) of vectors."""
    first = parts[0]
    if isinstance(first, Tensor):
        if first.dtype == torch.int64:
            return first
        return torch.stack(list(parts)) if first.dim() > 1 else torch.stack(list(parts))[:, None]
    if isinstance(first, list):
        return [stack(entries) for entries in zip(*parts, strict=True)]
    if isinstance(first, dict):
        return {key: stack([part[key] for part in parts]) for key in first}
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        fields = {field.name: stack([getattr(part, field.name) for part in parts]) for field in dataclasses.fields(first)}
        return type(first)(**fields)
    return first


class Stacks:
    """The stacked layers of the adapters that decode together; made anew when one joins or leaves them, and kept for the steps between."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, ...], tuple[list[MoaWeights], list[MoaLayer | None]]] = {}

    def layers(self, adapters: list[MoaWeights]) -> list[MoaLayer | None]:
        key = tuple(map(id, adapters))  # those of the kept are alive, so no other has their ids
        found = self._kept.pop(key, None)
        if found is None:
            while len(self._kept) >= _MOST_STACKS:
                del self._kept[next(iter(self._kept))]
            found = (adapters, [stack(layers) for layers in zip(*map(_served, adapters), strict=True)])
        self._kept[key] = found
        return found[1]


@dataclass(eq=False, slots=True)
class Part:
    """Tokens of a step that are computed together with adapters' weights: a segment's, or those of S segments side by side.

    Args:
        segments: with their numbers in the batch.
        layers: of the adapter, or stacked.
        rows: tokens of the batch, all of a run.
        take: (S, T) int64, a batch's tokens, padded with the segment's first; None where `rows` are one segment's, or S of one length.
        put: (n,), (n,) int64: the places in the flat (S * T) that are no padding, and the tokens of the batch that they are.
        heard: what routers said, to be counted; None where that is not wanted.
    """

    segments: list[tuple[int, Segment]]
    layers: list[MoaLayer | None]
    rows: slice
    take: Tensor | None = None
    put: tuple[Tensor, Tensor] | None = None
    heard: list[tuple[Word, Routed]] | None = field(default_factory=list)

    @property
    def rules(self) -> RoutingRules | None:
        """Of its one segment; those of segments side by side have none."""
        return self.segments[0][1].rules

    @property
    def num_stacked(self) -> int:
        """S; 0 where nothing is stacked."""
        return len(self.segments) if len(self.segments) > 1 else 0

    def of(self, x: Tensor) -> Tensor:
        """Its tokens of a batch's (T, ...): (t, ...), or (S, t, ...) of the stacked."""
        if self.take is not None:
            return x[self.take]
        own = x[self.rows]
        return own.view(self.num_stacked, -1, *own.shape[1:]) if self.num_stacked else own

    def add(self, delta: Tensor, out: Tensor) -> Tensor:
        """A batch's out (T, ...) and on top what the part's tokens get; `out` itself is written to where no gradient flows."""
        if self.put is not None:
            places, tokens = self.put
            out[tokens] += delta.flatten(0, 1)[places].to(out.dtype)
            return out
        if self.num_stacked:
            delta = delta.flatten(0, 1)
        if not torch.is_grad_enabled():
            out[self.rows].add_(delta)
            return out
        # Training: adding in place to a slice would copy all of `out`'s gradient back and forth for every expert.
        if len(delta) == len(out):
            return out + delta
        return torch.cat((out[: self.rows.start], out[self.rows] + delta, out[self.rows.stop :]))

    def hear(self, layer: int, site: str, routed: Routed) -> None:
        if self.heard is not None:
            self.heard.append(((layer, site, routed.gates.shape[-1]), routed))

    def tell(self, trace: RoutingTrace) -> None:
        """Hand on what was heard of the tokens that are wanted; every expert is computed for every token."""
        wanted = [(index, *found, trace.wanted(found[0], found[1].end - found[1].start)) for index, found in enumerate(self.segments)]
        if not self.heard or all(tokens is None for *_, tokens in wanted):
            return
        words = self._words()
        routers = _traced(tuple(word for word, _ in self.heard))
        for index, number, segment, tokens in wanted:
            if tokens is not None:
                own = words[index] if self.num_stacked else words
                evaluations = None
                if segment.counters is not None:
                    evaluations = torch.full((segment.end - segment.start,), segment.counters.num_experts, dtype=torch.int32)
                trace.segments[number] = SegmentTrace(own[tokens], routers, evaluations)

    def _words(self) -> Tensor:
        """(T, W) or (S, T, W): rows of a trace."""
        pieces: list[Tensor] = []
        for _, routed in self.heard or ():
            threshold = routed.scores.new_zeros(*routed.scores.shape[:-1], 1) if routed.threshold is None else routed.threshold
            pieces += (routed.scores, threshold, routed.selected.float(), routed.gates)
        return torch.cat(pieces, dim=-1).detach()

    def count(self) -> None:
        """Add what was heard to the segments' counters: once a step, because in each layer it would cost as much as an expert."""
        counters = [segment.counters for _, segment in self.segments]
        if not self.heard or not any(counters):
            return
        heard, self.heard = self.heard, []  # a recorded step's parts are computed more than once
        words = tuple(word for word, _ in heard)
        selected = torch.cat([routed.selected for _, routed in heard], dim=-1)  # (T, all routers' outputs), or (S, T, ...)
        gates = torch.cat([routed.gates.detach() for _, routed in heard], dim=-1)
        gates = torch.where(gates.isfinite(), gates, 0.0)  # one row that overflows must not turn the totals into NaN for good
        thresholds = None
        if any(routed.threshold is not None for _, routed in heard):
            none = gates.new_zeros(*gates.shape[:-1], 1)
            limits = [none if routed.threshold is None else routed.threshold.detach() for _, routed in heard]
            thresholds = torch.cat(limits, dim=-1)  # (T, routers), or (S, T, routers)
            thresholds = torch.where(thresholds.isfinite(), thresholds, 0.0)
        for index, (_, segment) in enumerate(self.segments):
            if segment.counters is not None:
                own = (index, slice(segment.end - segment.start)) if self.num_stacked else slice(None)
                own_thresholds = None if thresholds is None else thresholds[own].sum(0)
                segment.counters.add(words, segment.end - segment.start, selected[own].sum(0), gates[own].sum(0), own_thresholds)


@functools.lru_cache(maxsize=256)
def _traced(words: tuple[Word, ...]) -> tuple[TracedRouter, ...]:
    """Where routers' words stand in a row, one after the other."""
    starts = itertools.accumulate((3 * outputs + 1 for _, _, outputs in words), initial=0)
    return tuple(TracedRouter(layer, site, start, outputs) for (layer, site, outputs), start in zip(words, starts, strict=False))


def _is_like_others(segment: Segment) -> bool:
    """Whether it may stand beside others: it is short, and its routers follow their adapter's own rules, token by token."""
    return segment.pooled is None and segment.rules is None and segment.end - segment.start <= MOST_TOKENS


def _served(adapter: MoaWeights) -> list[MoaLayer | None]:
    return adapter.layers if adapter.joined is None else adapter.joined


def parts_of(segments: Sequence[Segment], stacks: Stacks | None, device: torch.device) -> list[Part]:
    """How a step's adapters are applied: without a `stacks` each as it was built, every segment by itself; with one, joined, and
    segments of few tokens, whose adapters are of one layout, together. `device` is the batch's."""
    together: dict[str, tuple[list[tuple[int, Segment]], list[MoaWeights]]] = {}
    parts = []
    for number, segment in enumerate(segments):
        adapter = segment.adapter
        assert isinstance(adapter, MoaWeights), "the torch backend computes what it prepared"
        if stacks is None or adapter.layout is None or not _is_like_others(segment):
            layers = adapter.layers if stacks is None else _served(adapter)
            parts.append(Part([(number, segment)], layers, slice(segment.start, segment.end)))
        else:
            group, adapters = together.setdefault(adapter.layout, ([], []))
            group.append((number, segment))
            adapters.append(adapter)
    return parts + [_together(group, adapters, stacks, device) for group, adapters in together.values()]


def _together(group: list[tuple[int, Segment]], adapters: list[MoaWeights], stacks: Stacks | None, device: torch.device) -> Part:
    if stacks is None or len(group) == 1:
        return Part(group, _served(adapters[0]), slice(group[0][1].start, group[0][1].end))
    layers = stacks.layers(adapters)
    counts = [segment.end - segment.start for _, segment in group]
    rows = slice(group[0][1].start, group[-1][1].end)
    if len(set(counts)) == 1 and rows.stop - rows.start == sum(counts):
        return Part(group, layers, rows)
    most = max(counts)
    tokens = [list(range(segment.start, segment.end)) for _, segment in group]
    places = [index * most + place for index, count in enumerate(counts) for place in range(count)]
    take, put, flat = (
        on_device(np.array(ids), device)
        for ids in ([own + own[:1] * (most - len(own)) for own in tokens], places, list(itertools.chain.from_iterable(tokens)))
    )
    return Part(group, layers, rows, take, (put, flat))
