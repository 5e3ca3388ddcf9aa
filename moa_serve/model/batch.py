"""What one forward step works on: a flat run of tokens of many sequences, each with its own adapter or none.

Built by the engine's runner (or by a test, or by the trainer) and passed down as an argument; nothing here is global. Host integers
describe the layout, so that a forward never asks a tensor for a number.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RoutingRules
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
        spans: per sequence the tokens [a, b) of the segment that are its whole prompt, or None where its words are already known.
        words: (n, L, 2, E) float32: the gates, and the scores before selection; a forward writes the rows whose span is given.
    """

    row_of_token: Tensor
    spans: tuple[tuple[int, int] | None, ...]
    words: Tensor

    @classmethod
    def shape(cls, num_sequences: int, adapter: PreparedAdapter) -> tuple[int, int, int, int]:
        """Of `words`."""
        return num_sequences, adapter.num_layers, 2, adapter.max_outputs

    @classmethod
    def of_whole(cls, lengths: Sequence[int], prompts: Sequence[int], adapter: PreparedAdapter, device: torch.device) -> "PooledRows":
        """Sequences of `lengths` tokens side by side, each with its prompt, the first `prompts` tokens of it: none is known yet."""
        sizes = torch.tensor(lengths, device=device)
        owner = torch.arange(len(lengths), device=device).repeat_interleave(sizes)
        starts = itertools.accumulate(lengths, initial=0)
        spans = tuple((start, start + prompt) for start, prompt in zip(starts, prompts, strict=False))
        return cls(owner, spans, torch.zeros(cls.shape(len(lengths), adapter), device=device))


@dataclass(eq=False, slots=True)
class Segment:
    """The tokens [start, end) of a batch that share one adapter and its `rules`; its routers' words are added to `counters` where given."""

    start: int
    end: int
    adapter: PreparedAdapter
    pooled: PooledRows | None = None
    counters: RouterCounters | None = None
    rules: RoutingRules | None = None


@dataclass(frozen=True, slots=True)
class TracedRouter:
    """Where a router's words stand in a token's row of a trace: scores (E), threshold (0 where there is none), selected (E) as 1 and 0,
    gates (E).

    `site` is 'layer', a target, PROMPT or P_ADAPTER.
    """

    layer: int
    site: str
    start: int
    outputs: int


@dataclass(eq=False, slots=True)
class SegmentTrace:
    """What the routers said of some tokens of a segment.

    Args:
        words: (n, W) float32, a row for each of the tokens.
        routers: where the words of each stand in a row; always the same of one adapter.
        evaluations: (t,) int32, of all tokens of the segment: the experts that were computed for each, over all layers, as its counters
            have them; None where it has no counters.
    """

    words: Tensor
    routers: tuple[TracedRouter, ...]
    evaluations: Tensor | None = None

    def layers(self, rows: slice = slice(None)) -> dict[int, dict[str, Routed]]:
        """layer -> site -> what its router said of the tokens in `rows`: views."""
        found: dict[int, dict[str, Routed]] = {}
        words = self.words[rows]
        for router in self.routers:
            own = words[:, router.start : router.start + 3 * router.outputs + 1]
            scores, threshold, selected, gates = torch.split(own, [router.outputs, 1, router.outputs, router.outputs], dim=1)
            routed = Routed(scores, threshold, selected != 0, gates)
            found.setdefault(router.layer, {})[router.site] = routed
        return found


@dataclass(eq=False, slots=True)
class RoutingTrace:
    """What the routers said in one step of the tokens that somebody wants to look into. Only batches of which some are carry one.

    Args:
        tokens: by the segment's number (n,) int64, which of its tokens, counted inside it, ascending; a segment that is left out is not
            looked into. None: all tokens of all segments.
        segments: filled by the forward.
    """

    tokens: Mapping[int, Tensor] | None = None
    segments: dict[int, SegmentTrace] = field(default_factory=dict)

    def wanted(self, number: int, num_tokens: int) -> Tensor | None:
        """Which tokens of a segment of so many are wanted; None where it is not looked into."""
        return torch.arange(num_tokens) if self.tokens is None else self.tokens.get(number)

    @property
    def records(self) -> dict[int, dict[int, dict[str, Routed]]]:
        """segment -> layer -> site -> what its router said."""
        return {number: segment.layers() for number, segment in self.segments.items()}


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
