"""What one forward step works on: a flat run of tokens of many sequences, each with its own adapter or none.

Built by the engine's runner (or by a test, or by the trainer) and passed down as an argument; nothing here is global. Host integers
describe the layout, so that a forward never asks a tensor for a number.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moa_serve.adapter.manifest import Manifest
from moa_serve.model.counters import RouterCounters
from moa_serve.model.moa import Routed


class PreparedAdapter(Protocol):
    """An adapter in the layout of the backend that computes it."""

    @property
    def manifest(self) -> Manifest: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def max_outputs(self) -> int:
        """Outputs of the layer routers, at most over layers."""
        ...


@dataclass(eq=False, slots=True)
class PooledRows:
    """Instance-level routing of one segment: weights are per sequence, from the mean over its prompt, and kept for its decode.

    Args:
        row_of_token: (t,) int64, the sequence of each token, counted inside the segment.
        spans: per sequence the tokens [a, b) of the segment that are its whole prompt, or None where `gates` is already known.
        gates: (n, L, E) float32; a forward writes the rows whose span is given.
    """

    row_of_token: Tensor
    spans: tuple[tuple[int, int] | None, ...]
    gates: Tensor

    @classmethod
    def of_whole(cls, lengths: Sequence[int], prompts: Sequence[int], adapter: PreparedAdapter, device: torch.device) -> "PooledRows":
        """Sequences of `lengths` tokens side by side, each with its prompt, the first `prompts` tokens of it: none is known yet."""
        sizes = torch.tensor(lengths, device=device)
        owner = torch.arange(len(lengths), device=device).repeat_interleave(sizes)
        starts = itertools.accumulate(lengths, initial=0)
        spans = tuple((start, start + prompt) for start, prompt in zip(starts, prompts, strict=False))
        return cls(owner, spans, torch.zeros(len(lengths), adapter.num_layers, adapter.max_outputs, device=device))


@dataclass(eq=False, slots=True)
class Segment:
    """The tokens [start, end) of a batch that share one adapter; its routers' words are added to `counters` where given."""

    start: int
    end: int
    adapter: PreparedAdapter
    pooled: PooledRows | None = None
    counters: RouterCounters | None = None


@dataclass(eq=False, slots=True)
class RoutingTrace:
    """What every router said in one step: `records[segment][layer][site]`, site 'layer', a target, PROMPT or P_ADAPTER.

    Only batches that somebody wants to look into carry one; the tensors are those of the forward, not copies.
    """

    records: dict[int, dict[int, dict[str, Routed]]] = field(default_factory=dict)

    def add(self, segment: int, layer: int, site: str, routed: Routed) -> None:
        self.records.setdefault(segment, {}).setdefault(layer, {})[site] = routed


Expert = Callable[[Tensor, Tensor | None, Routed | None], Tensor]  # (its input, the layer's gates, its own router's word) -> what it adds
Observer = Callable[[int, str, Expert, Tensor, Routed | None], None]  # (layer, site, expert, its input (t, ...), its own router's word)


@dataclass(eq=False, slots=True)
class ForwardBatch:
    """One step of the model.

    Args:
        token_ids: (T,) int64.
        positions: (T,) int64, place in the own sequence, from 0.
        segments: runs of tokens with an adapter, ascending; tokens outside every run are the base's alone.
        logit_rows: (N,) int64, the tokens whose logits are wanted; None for all of them.
        trace: filled by the forward where given.
        observer: called with every expert that is applied and what it reads, of each segment and layer in turn.
    """

    token_ids: Tensor
    positions: Tensor
    segments: tuple[Segment, ...] = ()
    logit_rows: Tensor | None = None
    trace: RoutingTrace | None = None
    observer: Observer | None = None
