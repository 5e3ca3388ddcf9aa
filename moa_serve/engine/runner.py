"""From a scheduler's decision to logits: builds the flat batch of a step and runs the model on it.

Order of tokens is the scheduler's, so each adapter's tokens are one run. Work is per sequence, never per token. Owned by the engine thread.
"""

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moa_serve.engine.request import Request, Sequence
from moa_serve.engine.routing import RoutedLayers, TokenRouting, has_thresholds, token_columns
from moa_serve.model.attention import CachedSpan
from moa_serve.model.backend import Backend, Cache, PreparedAdapter
from moa_serve.model.bank import AdapterBank
from moa_serve.model.batch import ForwardBatch, PooledRows, RoutingTrace, Segment, SegmentTrace
from moa_serve.model.counters import RouterCounters
from moa_serve.model.ops import on_device

Work = SequenceOf[tuple[Sequence, int]]  # a sequence and how many of its pending tokens this step computes


@dataclass(eq=False, slots=True)
class StepOutput:
    """`logits` (N, V) float32 belong to `sampling`, the sequences whose last token was computed; the rest single requests asked for."""

    sampling: list[Sequence]
    logits: Tensor
    collected_logits: list[tuple[Sequence, Tensor]] = field(default_factory=list)  # (n, V) float32 of the tokens in `_wanted`
    collected_routing: list[tuple[Sequence, RoutedLayers]] = field(default_factory=list)
    token_routing: dict[Sequence, TokenRouting] = field(default_factory=dict)  # of this step alone


@dataclass(eq=False, slots=True)
class _Layout:
    """Where each sequence's tokens stand in the flat batch: [starts[i], starts[i] + counts[i])."""

    work: Work
    starts: list[int]

    def runs(self) -> Iterator[tuple[int, int]]:
        """[first, last) of `work` for each run of sequences with one adapter and one way in which its routers choose."""
        first = 0
        for index in range(1, len(self.work) + 1):
            if index == len(self.work) or self.work[index][0].kind != self.work[first][0].kind:
                if self.work[first][0].slot is not None:
                    yield first, index
                first = index


def _draws(sequence: Sequence, count: int) -> bool:
    """Whether a token is drawn behind the next `count` ones."""
    return count == sequence.num_pending and sequence.request.params.max_tokens != 0


def _traced(sequence: Sequence, count: int) -> range:
    """Of which of the next `count` tokens the request wants to know the routing: of all, or of the one behind which it draws."""
    if sequence.request.collect_routing:
        return range(count)
    return range(count - 1, count) if sequence.request.return_routing and _draws(sequence, count) else range(0)


def _wanted(sequence: Sequence, count: int) -> range:
    """Which of the next `count` tokens' logits the request wants to look at: the prompt's, or those of its end and its branches."""
    if sequence.request.branches:
        return range(sequence.num_prompt - 1, count)
    if not sequence.wants_prompt_logits:
        return range(0)
    return range(max(0, sequence.request.collect_from - sequence.num_computed), min(count, sequence.num_prompt - sequence.num_computed))


def _positions(sequence: Sequence, count: int) -> np.ndarray:
    """Places of the next `count` tokens in their text: every branch goes on where the prompt ends."""
    places = np.arange(sequence.num_computed, sequence.num_computed + count)
    for start, end in _branch_spans(sequence):
        places[start:end] -= start - sequence.num_prompt
    return places


def _branch_spans(sequence: Sequence) -> Iterator[tuple[int, int]]:
    """[start, end) in `Sequence.token_ids` of what is computed of each branch."""
    end = sequence.num_prompt
    for branch in sequence.request.branches:
        start, end = end, end + len(branch) - 1
        yield start, end


class ModelRunner:
    def __init__(self, model: Backend, cache: Cache, bank: AdapterBank) -> None:
        self.model, self.cache, self.bank = model, cache, bank
        # By revision: they outlive the adapter's stay in a slot. Apart, those of requests that had its routers choose otherwise.
        self.counters: dict[str, RouterCounters] = {}
        self.altered: dict[str, RouterCounters] = {}
        self.apart: dict[tuple[str, bytes], RouterCounters] = {}  # of these, by revision and key, those of rules that somebody looks into
        self._columns: dict[tuple[str, bool], np.ndarray] = {}  # `token_columns` of a revision, without thresholds and with them

    def forget(self, revision: str) -> None:
        """The revision is gone for good."""
        self.counters.pop(revision, None)
        self.altered.pop(revision, None)
        self.apart = {kind: counters for kind, counters in self.apart.items() if kind[0] != revision}
        for with_thresholds in (False, True):
            self._columns.pop((revision, with_thresholds), None)

    @torch.inference_mode()
    def run(self, work: Work) -> StepOutput:
        """Compute `work`; keys and values are in the cache afterwards, and instance-level weights on their sequences."""
        starts = np.cumsum([0, *(count for _, count in work)]).tolist()
        layout = _Layout(work, starts)
        positions = [_positions(sequence, count) for sequence, count in work]
        token_ids: list[int] = []
        for sequence, count in work:
            token_ids += sequence.token_ids[sequence.num_computed : sequence.num_computed + count]
        trace = self._trace(layout)
        segments = [self._segment(layout, first, last) for first, last in layout.runs()]
        rows, sampling = self._logit_rows(layout)
        batch = ForwardBatch(
            self._tensor(np.array(token_ids)), self._tensor(np.concatenate(positions)), tuple(segments), self._tensor(rows), trace
        )
        spans = [self._span(sequence, start, count) for (sequence, count), start in zip(work, starts, strict=False)]
        logits = self.model.forward(batch, self.cache.attention(spans))
        self._keep_gates(layout, segments)
        for segment in segments:
            if segment.counters is not None:
                segment.counters.tokens += segment.end - segment.start
        return self._output(layout, logits, sampling, trace)

    def _trace(self, layout: _Layout) -> RoutingTrace | None:
        """Of every adapter whose routing somebody asks for, the tokens that he wants to know of; None where nobody asks."""
        tokens: dict[int, Tensor] = {}
        for number, (first, last) in enumerate(layout.runs()):
            if any(sequence.request.collect_routing or sequence.request.return_routing for sequence, _ in layout.work[first:last]):
                wanted = [
                    start - layout.starts[first] + np.array(_traced(sequence, count), dtype=np.int64)
                    for (sequence, count), start in zip(layout.work[first:last], layout.starts[first:last], strict=True)
                ]
                tokens[number] = self._tensor(np.concatenate(wanted))
        return RoutingTrace(tokens) if tokens else None

    def _tensor(self, array: np.ndarray) -> Tensor:
        return on_device(array.astype(np.int64, copy=False), self.model.device)

    def _span(self, sequence: Sequence, start: int, count: int) -> CachedSpan:
        has_branches = bool(sequence.request.branches) and count > sequence.num_prompt
        branches = tuple(_branch_spans(sequence)) if has_branches else ()
        return CachedSpan(start, count, sequence.num_computed, sequence.block_table, sequence.num_prompt, branches)

    def _segment(self, layout: _Layout, first: int, last: int) -> Segment:
        slot = layout.work[first][0].slot
        assert slot is not None
        adapter = self.bank[slot]
        start, end = layout.starts[first], layout.starts[last]
        pooled = self._pooled(layout, first, last, adapter) if adapter.manifest.is_pooled else None
        request = layout.work[first][0].request
        return Segment(start, end, adapter, pooled, self._counters_of(request, adapter), request.rules)

    def _counters_of(self, request: Request, adapter: PreparedAdapter) -> RouterCounters | None:
        if request.is_background:
            return None
        assert request.adapter is not None
        if request.rules is not None and (apart := self.apart.get((request.adapter, request.rules.key))) is not None:
            return apart
        kept = self.counters if request.rules is None else self.altered
        return kept.get(request.adapter) or kept.setdefault(request.adapter, RouterCounters(adapter.manifest, self.model.device))

    def _pooled(self, layout: _Layout, first: int, last: int, adapter: PreparedAdapter) -> PooledRows:
        group, origin = layout.work[first:last], layout.starts[first]
        words = torch.zeros(PooledRows.shape(len(group), adapter), dtype=torch.float32, device=self.model.device)
        spans: list[tuple[int, int] | None] = []
        for row, (sequence, count) in enumerate(group):
            if sequence.gates is None:
                assert sequence.num_computed == 0, "an instance-level prompt is prefilled whole"
                assert count >= sequence.num_prompt, "an instance-level prompt is prefilled whole"
                start = layout.starts[first + row] - origin
                spans.append((start, start + sequence.num_prompt))
            else:
                words[row] = sequence.gates
                spans.append(None)
        owner = np.repeat(np.arange(len(group)), [count for _, count in group])
        return PooledRows(self._tensor(owner), tuple(spans), words)

    def _keep_gates(self, layout: _Layout, segments: list[Segment]) -> None:
        """Instance-level weights live on their sequence: they survive preemption, after which the prompt may be recomputed in chunks."""
        for (first, last), segment in zip(layout.runs(), segments, strict=True):
            if segment.pooled is None:
                continue
            for row, (sequence, _) in enumerate(layout.work[first:last]):
                if sequence.gates is None:
                    sequence.gates = segment.pooled.words[row].clone()

    def _logit_rows(self, layout: _Layout) -> tuple[np.ndarray, list[Sequence]]:
        """Tokens whose logits are needed: the last of each sequence that will sample, then all of those that collect."""
        last, everything, sampling = [], [], []
        for (sequence, count), start in zip(layout.work, layout.starts, strict=False):
            if _draws(sequence, count):
                last.append(start + count - 1)
                sampling.append(sequence)
            if rows := _wanted(sequence, count):
                everything.append(start + np.array(rows))
        return np.concatenate([np.array(last, dtype=np.int64), *everything]), sampling

    def _output(self, layout: _Layout, logits: Tensor, sampling: list[Sequence], trace: RoutingTrace | None) -> StepOutput:
        output = StepOutput(sampling, logits[: len(sampling)])
        offset = len(sampling)
        for sequence, count in layout.work:
            if rows := _wanted(sequence, count):
                output.collected_logits.append((sequence, logits[offset : offset + len(rows)]))
                offset += len(rows)
        if trace is None:
            return output
        for number, (first, last) in enumerate(layout.runs()):
            if number in trace.segments:
                self._keep_trace(output, layout, first, last, trace.segments[number])
        return output

    def _keep_trace(self, output: StepOutput, layout: _Layout, first: int, last: int, trace: SegmentTrace) -> None:
        """Give the sequences [first, last) of `work`, which have one adapter, what each asked for."""
        group = layout.work[first:last]
        is_told = any(sequence.request.return_routing and _draws(sequence, count) for sequence, count in group)
        told = self._told(group[0][0], trace) if is_told else None
        end = 0
        for (sequence, count), start in zip(group, layout.starts[first:last], strict=True):
            place, begin = start - layout.starts[first], end
            end += len(_traced(sequence, count))
            if sequence.request.collect_routing:
                output.collected_routing.append((sequence, trace.layers(slice(begin, end))))
            if sequence.request.return_routing:
                assert trace.evaluations is not None, "every segment of a step has counters"
                num_evaluations = int(trace.evaluations[place : place + count].sum())
                words = told[end - 1].copy() if told is not None and _draws(sequence, count) else None
                output.token_routing[sequence] = TokenRouting(count, num_evaluations, words)

    def _told(self, sequence: Sequence, trace: SegmentTrace) -> np.ndarray:
        """(n, `token_columns`) of a trace of the sequence's adapter."""
        slot, revision = sequence.slot, sequence.request.adapter
        assert slot is not None
        assert revision is not None
        manifest = self.bank[slot].manifest
        key = (revision, has_thresholds(manifest, sequence.request.rules))
        columns = self._columns.get(key)
        if columns is None:
            columns = self._columns[key] = token_columns(manifest, trace.routers, with_thresholds=key[1])
        told: np.ndarray = trace.words[:, columns].cpu().numpy()
        return told
