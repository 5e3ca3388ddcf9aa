"""Instance-level routing in the fused step: weights from the mean of a prompt, and weights that are known already."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from moa_serve.gpu.layout import SlotLayout
from moa_serve.gpu.slots import SlottedAdapter
from moa_serve.gpu.workspace import Low
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import Segment


@dataclass(frozen=True, slots=True)
class Pooled:
    """Sequences in a slot whose layer router reads the mean of their prompts.

    Args:
        spans: of each [start, end) of its prompt, and the end of all its tokens: branches stand behind the prompt.
    """

    slot: int
    spans: tuple[tuple[int, int, int], ...]

    def average(self, low: Low, layout: SlotLayout) -> None:
        """The mean of products is the product of the mean: every token of a prompt gets it, and those that are computed with it.

        Of partial sums the first gets it.
        """
        first = self.slot * low.slot + layout.sections["QKV"].gate
        rows = slice(first, first + layout.parts * layout.gate_rows)
        for start, end, last in self.spans:
            mean = low.first[:, start:end, rows].sum(0).mean(0)
            own = low.first[:, start:last, rows]
            own.zero_()
            own[0] = mean


def pooled_of(segments: Sequence[Segment], spans: Sequence[CachedSpan]) -> list[Pooled]:
    """Of each segment with prompts whose mean is still to be taken; `spans` cover the batch's tokens."""
    found = []
    counts = {span.start: span.count for span in spans}
    for segment in segments:
        if segment.pooled is not None and any(segment.pooled.spans):
            assert isinstance(segment.adapter, SlottedAdapter), "the batch has adapters that stand in slots only"
            prompts = [(segment.start + span[0], segment.start + span[1]) for span in segment.pooled.spans if span is not None]
            found.append(Pooled(segment.adapter.slot, tuple((start, end, start + counts[start]) for start, end in prompts)))
    return found


def give(given: Tensor, segments: Sequence[Segment], width: int) -> None:
    """Write layer gates and scores that sequences have already, `width` numbers each, to their tokens' places in given (L, T, 2 width)."""
    for segment in segments:
        if (pooled := segment.pooled) is not None:
            words = pooled.words[pooled.row_of_token].permute(1, 0, 2, 3)  # (L, t, 2, E)
            outputs = words.shape[3]
            given[:, segment.start : segment.end, :outputs] = words[:, :, 0]
            given[:, segment.start : segment.end, width : width + outputs] = words[:, :, 1]
