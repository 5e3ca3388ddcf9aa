"""Some of a batch's sequences as a batch of their own: those of adapters that are too large for a slot are computed apart."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch, RoutingTrace
from moa_serve.model.ops import on_device


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some of a batch's sequences as a batch of their own.

    Args:
        rows: of the whole batch's logits, those of this part, in its order.
        numbers: of its segments in the whole batch.
    """

    batch: ForwardBatch
    spans: list[CachedSpan]
    rows: Tensor
    numbers: list[int]

    @classmethod
    def of(cls, batch: ForwardBatch, spans: Sequence[CachedSpan], chosen: np.ndarray, wanted: np.ndarray, device: torch.device) -> "Part":
        """
        Args:
            chosen: tokens of whole sequences, ascending. wanted: all tokens whose logits are wanted.
        """
        place = {int(token): index for index, token in enumerate(chosen)}
        numbers = [number for number, segment in enumerate(batch.segments) if segment.start in place]
        segments = [
            replace(batch.segments[number], start=place[batch.segments[number].start], end=place[batch.segments[number].end - 1] + 1)
            for number in numbers
        ]
        rows = np.array([row for row, token in enumerate(wanted) if int(token) in place], dtype=np.int64)
        own = np.array([place[int(wanted[row])] for row in rows], dtype=np.int64)
        trace = None
        if batch.trace is not None:
            tokens = batch.trace.tokens
            kept = None if tokens is None else {index: tokens[number] for index, number in enumerate(numbers) if number in tokens}
            trace = RoutingTrace(kept)
        index = on_device(chosen, device)
        inner = ForwardBatch(batch.token_ids[index], batch.positions[index], tuple(segments), on_device(own, device), trace)
        return cls(
            inner, [replace(span, start=place[span.start]) for span in spans if span.start in place], on_device(rows, device), numbers
        )
