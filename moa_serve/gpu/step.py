"""What a step's kernels read besides weights and slots, made on the host and copied at once: chunks of tokens, places in the cache.

A `StepBuffers` stands at fixed addresses, so that a recorded step finds the next step's numbers there. Owned by the engine thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moa_serve.gpu.kernels import CHUNK, CHUNK_FIELDS
from moa_serve.gpu.rules import RuleTable
from moa_serve.gpu.slots import SlottedAdapter
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch, Segment

Run = tuple[int, int, int, int, bool, int]
"""[start, end) of the tokens, slot or -1, row of the rules, whether their layer gates are given, row of the counters or -1."""


def runs_of(batch: ForwardBatch, spans: Sequence[CachedSpan], rules: RuleTable) -> tuple[list[Run], list[Segment]]:
    """The batch's tokens in runs of one kind, and the segments whose counters have a row, in its order. `spans` cover the tokens."""
    runs: list[Run] = []
    counted: list[Segment] = []
    in_use: set[int] = set()
    end = 0
    for segment in batch.segments:
        adapter = segment.adapter
        assert isinstance(adapter, SlottedAdapter), "the batch has adapters that stand in slots only"
        if segment.start > end:
            runs.append((end, segment.start, -1, 0, False, -1))
        row = rules.row(adapter.slot, adapter.manifest, segment.rules, in_use)
        counters = -1
        if segment.counters is not None:
            counters = len(counted)
            counted.append(segment)
        for first, last, is_given in _given_runs(segment, spans):
            runs.append((first, last, adapter.slot, row, is_given, counters))
        end = segment.end
    total = sum(span.count for span in spans)
    if end < total:
        runs.append((end, total, -1, 0, False, -1))
    return runs, counted


def _given_runs(segment: Segment, spans: Sequence[CachedSpan]) -> list[tuple[int, int, bool]]:
    """A segment's tokens in runs whose layer gates are given, or not: those of prompts whose mean is still to be taken."""
    if segment.pooled is None:
        return [(segment.start, segment.end, False)]
    found: list[tuple[int, int, bool]] = []
    own = [span for span in spans if segment.start <= span.start < segment.end]
    for span, prompt in zip(own, segment.pooled.spans, strict=True):
        is_given = prompt is None
        if found and found[-1][2] == is_given:
            found[-1] = (found[-1][0], span.start + span.count, is_given)
        else:
            found.append((span.start, span.start + span.count, is_given))
    return found


def chunks_of(runs: Sequence[Run]) -> np.ndarray:
    """(chunks, 8) int32 of runs, at most `CHUNK` tokens each, as kernels.py has the fields."""
    rows = [
        (start, min(CHUNK, last - start), slot, rule, given, counters, 0, 0)
        for first, last, slot, rule, given, counters in runs
        for start in range(first, last, CHUNK)
    ]
    return np.array(rows, dtype=np.int32).reshape(-1, CHUNK_FIELDS)


@dataclass(eq=False, slots=True)
class StepBuffers:
    """Numbers of a step of up to T tokens.

    Args:
        token_ids, positions: (T,) int64.
        chunks: (C, 8) int32; those that are not used have no tokens.
        places: (T,) int32, block * block_size + offset in the cache; -1 where nothing is to be kept.
        lengths: (T,) int32, tokens that a row of one token attends to; 0: it is none.
        slots: (T,) int32. tables: (T, M) int32, a row's pages.
        counters: (segments, 4) int64, addresses of their totals.
        given: (L, T, 2 E) float32, layer gates and scores where they are given.
        logit_rows: (N,) int64.
    """

    token_ids: Tensor
    positions: Tensor
    chunks: Tensor
    places: Tensor
    lengths: Tensor
    slots: Tensor
    tables: Tensor
    counters: Tensor
    given: Tensor
    logit_rows: Tensor

    @classmethod
    def new(
        cls, tokens: int, chunks: int, width: int, given: tuple[int, int], num_rows: int, device: torch.device, *, has_given: bool = True
    ) -> "StepBuffers":
        layers, gates = given

        def ints(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            ints(tokens, dtype=torch.int64),
            ints(tokens, dtype=torch.int64),
            ints(chunks, CHUNK_FIELDS),
            ints(tokens),
            ints(tokens),
            ints(tokens),
            ints(tokens, width),
            ints(max(chunks, 1), 4, dtype=torch.int64),
            torch.zeros(layers, tokens if has_given else 0, gates, device=device),
            ints(num_rows, dtype=torch.int64),
        )

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class HostNumbers:
    """The same on the host, of one step: (chunks, 8), and of its tokens places, lengths, slots, tables (T, used pages); int32."""

    chunks: np.ndarray
    places: np.ndarray
    lengths: np.ndarray
    slots: np.ndarray
    tables: np.ndarray
    counters: np.ndarray


def host_numbers(runs: Sequence[Run], counted: Sequence[Segment], spans: Sequence[CachedSpan], block_size: int) -> HostNumbers:
    """`spans` cover the tokens in their order."""
    total = sum(span.count for span in spans)
    places, lengths, slots = (np.zeros(total, dtype=np.int32) for _ in range(3))
    rows = [span for span in spans if span.count == 1]
    width = max((-(-(span.computed + 1) // block_size) for span in rows), default=1)
    tables = np.zeros((total, width), dtype=np.int32)
    for first, last, slot, *_ in runs:
        slots[first:last] = slot
    for span in spans:
        index = np.arange(span.computed, span.computed + span.count)
        table = np.asarray(span.blocks, dtype=np.int32)
        places[span.start : span.start + span.count] = table[index // block_size] * block_size + index % block_size
        if span.count == 1:
            used = -(-(span.computed + 1) // block_size)
            lengths[span.start] = span.computed + 1
            tables[span.start, :used] = table[:used]
    addresses = np.array([[tensor.data_ptr() for tensor in _totals(segment)] for segment in counted], dtype=np.int64).reshape(-1, 4)
    return HostNumbers(chunks_of(runs), places, lengths, slots, tables, addresses)


def _totals(segment: Segment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counters = segment.counters
    assert counters is not None, "only segments with counters are counted"
    return counters.selected, counters.gate_sum, counters.computed, counters.thresholds
