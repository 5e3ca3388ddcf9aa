"""Decode steps on a GPU, recorded once and replayed: a step of hundreds of small operations else takes longer to call than to compute.

A CUDA graph is the step's operations with the addresses that they read and write. So a recorded step has inputs of its own, which a replay
copies the batch's into, and holds everything that it reads. It stands for one layout: as many rows and pages, the same adapters at the
same places; layouts that came a few times are recorded. All else is computed as it comes. Owned by the thread that computes.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from moa_serve.model.attention import PagedAttention
from moa_serve.model.batch import ForwardBatch
from moa_serve.model.memory import is_out_of_memory
from moa_serve.model.stacked import Part

logger = logging.getLogger(__name__)

RECORDED_AT = 4  # sightings of a layout: recording takes as long as a few steps
MOST = 16  # recorded layouts; each holds the inputs and logits of a step and its adapters' stacks; the rest shares its memory
_MOST_SEEN = 256

Parts = Callable[[ForwardBatch], list[Part]]
Compute = Callable[[ForwardBatch, list[Part], Any], Tensor]
Replay = Callable[[], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """A recorded step; `kept` is what it reads besides its inputs, which must outlive it."""

    inputs: list[Tensor]
    replay: Replay
    kept: Any


class Recorder(Protocol):
    def record(self, compute: Replay) -> Replay:
        """What repeats a computation on fixed inputs. Raises RuntimeError: it cannot be recorded."""
        ...

    def renew(self) -> None:
        """Nothing of what was recorded is left."""
        ...


class DecodeGraphs:
    """The steps of one model that are recorded; `recorder` is None for CUDA graphs."""

    def __init__(self, recorder: Recorder | None = None) -> None:
        self._recorder = recorder or CudaRecorder()
        self._steps: OrderedDict[Any, _Step] = OrderedDict()
        self._seen: OrderedDict[Any, int] = OrderedDict()
        self._is_broken = False

    def clear(self) -> None:
        """What was recorded reads memory that is to go, or would keep it."""
        self._steps.clear()
        self._seen.clear()
        self._recorder.renew()

    @property
    def num_recorded(self) -> int:
        return len(self._steps)

    def forward(self, batch: ForwardBatch, attention: Any, parts: Parts, compute: Compute) -> Tensor:
        """(N, V) float32. What a recorded step gives is overwritten by the next one.

        Args:
            parts: how a batch's adapters are applied.
            compute: the forward, with the parts of its batch. The model's own, and not kept: it holds the base.
        """
        if self._is_broken or not _is_decode(batch, attention):
            return compute(batch, parts(batch), attention)
        inputs = list(_inputs(batch, attention))
        key = _layout(batch, inputs)
        step = self._steps.get(key)
        if step is None:
            self._seen[key] = self._seen.pop(key, 0) + 1
            if len(self._seen) > _MOST_SEEN:
                self._seen.popitem(last=False)
            if self._seen[key] < RECORDED_AT or (step := self._recorded(batch, attention, inputs, parts, compute)) is None:
                return compute(batch, parts(batch), attention)
            self._steps[key] = step
            while len(self._steps) > MOST:
                left, _ = self._steps.popitem(last=False)
                self._seen.pop(left, None)  # else it would be recorded anew at its next sighting, and another one lost
        self._steps.move_to_end(key)
        for own, given in zip(step.inputs, inputs, strict=True):
            own.copy_(given)
        return step.replay()

    def _recorded(
        self, batch: ForwardBatch, attention: PagedAttention, inputs: list[Tensor], parts: Parts, compute: Compute
    ) -> _Step | None:
        own = [tensor.clone() for tensor in inputs]
        fixed_batch, fixed_attention = _with_inputs(batch, attention, iter(own))
        fixed_parts = parts(fixed_batch)
        try:
            replay = self._recorder.record(lambda: compute(fixed_batch, fixed_parts, fixed_attention))
        except RuntimeError as error:
            if _was_short_of_memory(error):  # the step itself may still fit, once what was recorded has gone
                self.clear()
                return None
            logger.warning("a decode step cannot be recorded as a CUDA graph; steps are computed one operation at a time", exc_info=True)
            self._is_broken = True
            self.clear()
            return None
        return _Step(own, replay, (fixed_batch, fixed_attention, fixed_parts))


def _was_short_of_memory(error: BaseException | None) -> bool:
    """Also where ending the capture failed because of it."""
    return error is not None and (is_out_of_memory(error) or _was_short_of_memory(error.__context__))


def _is_decode(batch: ForwardBatch, attention: Any) -> bool:
    """Whether the step has one token of each sequence, and nothing in it that asks a tensor for a number."""
    return (
        isinstance(attention, PagedAttention)
        and not attention.chunks
        and not attention.branched
        and batch.logit_rows is not None
        and batch.trace is None
        and batch.observer is None
        and not torch.is_grad_enabled()
        and all(segment.pooled is None or not any(segment.pooled.spans) for segment in batch.segments)
    )


def _inputs(batch: ForwardBatch, attention: PagedAttention) -> Iterator[Tensor]:
    """What differs from step to step, in the order of `_with_inputs`."""
    assert batch.logit_rows is not None
    yield from (batch.token_ids, batch.positions, batch.logit_rows, attention.places)
    for rows in attention.decode:
        yield from (rows.blocks, rows.mask)
        if rows.rows is not None:
            yield rows.rows
    for segment in batch.segments:
        if segment.pooled is not None:
            yield from (segment.pooled.row_of_token, segment.pooled.words)


def _with_inputs(batch: ForwardBatch, attention: PagedAttention, inputs: Iterator[Tensor]) -> tuple[ForwardBatch, PagedAttention]:
    token_ids, positions, logit_rows, places = (next(inputs) for _ in range(4))
    decode = []
    for rows in attention.decode:
        blocks, mask = next(inputs), next(inputs)
        decode.append(replace(rows, blocks=blocks, mask=mask, rows=None if rows.rows is None else next(inputs)))
    segments = []
    for segment in batch.segments:
        pooled = None if segment.pooled is None else replace(segment.pooled, row_of_token=next(inputs), words=next(inputs))
        segments.append(replace(segment, pooled=pooled))
    fixed = ForwardBatch(token_ids, positions, tuple(segments), logit_rows)
    return fixed, replace(attention, places=places, decode=decode)


def _layout(batch: ForwardBatch, inputs: list[Tensor]) -> Any:
    """Equal for steps that are the same operations on the same memory. A recorded step keeps its objects: their ids are nobody else's."""
    segments = tuple((segment.start, segment.end, id(segment.adapter), id(segment.counters), segment.rules) for segment in batch.segments)
    return tuple(tensor.shape for tensor in inputs), segments


class CudaRecorder:
    """Records on a stream of its own; all that it records shares one pool of memory, because one replay ends before the next begins."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def renew(self) -> None:
        self._pool = None  # torch takes no pool again whose graphs are all gone

    def record(self, compute: Replay) -> Replay:
        stream = self._stream = self._stream or _stream_for_products()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # Other threads may go on calling CUDA: what they do is not recorded.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                out = compute()
            finally:
                graph.capture_end()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


def _stream_for_products() -> torch.cuda.Stream:
    """A stream whose workspaces of cuBLAS are made: in a recording they would be taken from its pool."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's own annotation is missing
    with torch.cuda.stream(stream):
        for dtype in (torch.float32, torch.bfloat16):
            small = torch.zeros(16, 16, dtype=dtype, device="cuda")
            torch.mm(small, small)
    return stream
