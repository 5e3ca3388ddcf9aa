"""What a step's kernels read besides weights and slots, made on the host and copied at once: chunks of tokens, places in the cache.

A `StepBuffers` stands at fixed addresses, so that a recorded step finds the next step's numbers there. Owned by the engine thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
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


@dataclass(frozen=True, slots=True, eq=False)
class StepBuffers:
    """Numbers of a step of T tokens, of which N rows are alone in their sequence's step: they decode.

    Args:
        token_ids, positions: (T,) int64.
        chunks: (C, 8) int32; those that are not used have no tokens.
        places: (T,) int32, block * block_size + offset in the cache; -1 where nothing is to be kept.
        rows: (N,) int64, which tokens decode; None where all do.
        lengths, slots: (N,) int32, tokens that a row attends to, its own included (0: it is none), and its slot or -1.
        tables: (N, M) int32, a row's pages, padded with 0.
        counters: (segments, 4) int64, addresses of their totals.
        given: (L, T, 2 E) float32, layer gates and scores where they are given; (0,) where nowhere.
        logit_rows: (n,) int64.
    """

    token_ids: Tensor
    positions: Tensor
    chunks: Tensor
    places: Tensor
    rows: Tensor | None
    lengths: Tensor
    slots: Tensor
    tables: Tensor
    counters: Tensor
    given: Tensor
    logit_rows: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class HostNumbers:
    """The same on the host, of one step; int32, and int64 where addresses and rows are.

    Args:
        rows: (N,), the tokens that decode. longer: the other spans. their_chunks: the chunks of these.
    """

    chunks: np.ndarray
    places: np.ndarray
    rows: np.ndarray
    lengths: np.ndarray
    slots: np.ndarray
    tables: np.ndarray
    counters: np.ndarray
    longer: list[CachedSpan]
    their_chunks: np.ndarray


def host_numbers(runs: Sequence[Run], counted: Sequence[Segment], spans: Sequence[CachedSpan], block_size: int) -> HostNumbers:
    """`spans` cover the tokens in their order."""
    total = sum(span.count for span in spans)
    places, slots = np.zeros(total, dtype=np.int32), np.zeros(total, dtype=np.int32)
    rows, longer = [span for span in spans if span.count == 1], [span for span in spans if span.count > 1]
    lengths = np.array([span.computed + 1 for span in rows], dtype=np.int32)
    width = int(-(-lengths.max(initial=1) // block_size))
    tables = np.zeros((len(rows), width), dtype=np.int32)
    for first, last, slot, *_ in runs:
        slots[first:last] = slot
    for span in spans:
        index = np.arange(span.computed, span.computed + span.count)
        table = np.asarray(span.blocks, dtype=np.int32)
        places[span.start : span.start + span.count] = table[index // block_size] * block_size + index % block_size
    for row, (span, length) in enumerate(zip(rows, lengths, strict=True)):
        used = -(-int(length) // block_size)
        tables[row, :used] = span.blocks[:used]
    starts = np.array([span.start for span in rows], dtype=np.int64)
    addresses = [[tensor.data_ptr() for tensor in _totals(segment)] for segment in counted]
    return HostNumbers(
        chunks=chunks_of(runs),
        places=places,
        rows=starts,
        lengths=lengths,
        slots=slots[starts],
        tables=tables,
        counters=np.array(addresses, dtype=np.int64).reshape(-1, 4),
        longer=longer,
        their_chunks=chunks_of([(span.start, span.start + span.count, int(slots[span.start]), 0, False, -1) for span in longer]),
    )


def _totals(segment: Segment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counters = segment.counters
    assert counters is not None, "only segments with counters are counted"
    return counters.selected, counters.gate_sum, counters.computed, counters.thresholds
