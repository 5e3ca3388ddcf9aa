"""The fused step in Triton's interpreter, against the authors' numbers and against the definition."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from goldens import Golden, goldens
from kernel_device import DEVICE, MARKS
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.importers import read_adapter
from moa_serve.gpu.layout import SlotShape
from moa_serve.gpu.model import FusedTransformer
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch, PooledRows, PreparedAdapter, RoutingTrace, Segment
from moa_serve.model.counters import RouterCounters
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

pytestmark = MARKS
PAGE = 16
LATER = 4  # tokens of a golden row that its decode starts from the end
ROWS, STEPS = 2, 1  # of a golden folder; an interpreted program takes milliseconds


class Rows:
    """Sequences of one adapter on one model, step after step, each with two pages of its own."""

    def __init__(self, model: Any, adapter: Adapter | None, prompts: Sequence[Sequence[int]], slot: int | None = None) -> None:
        self.model, self.adapter, self.prompts = model, adapter, prompts
        self.prepared: PreparedAdapter | None = None if adapter is None else model.prepare(adapter, slot)
        self.cache = model.new_cache(2 * len(prompts) + 1, PAGE)
        self.cache.zero(range(2 * len(prompts) + 1))
        self.words: Tensor | None = None
        self.done = 0
        self.counters = None if adapter is None else RouterCounters(adapter.manifest, DEVICE)
        self.trace: RoutingTrace | None = None

    def step(self, count: int) -> Tensor:
        """(rows, count, V): logits of the next tokens of all rows."""
        rows, start = len(self.prompts), self.done
        ids = torch.tensor([prompt[start : start + count] for prompt in self.prompts], device=DEVICE).flatten()
        positions = torch.arange(start, start + count, device=DEVICE).repeat(rows)
        spans = [CachedSpan(row * count, count, start, [2 * row + 1, 2 * row + 2]) for row in range(rows)]
        segments: tuple[Segment, ...] = ()
        pooled = None
        if self.prepared is not None:
            if self.prepared.manifest.is_pooled:
                pooled = PooledRows.of_whole([count] * rows, [count] * rows, self.prepared, DEVICE)
                if self.words is not None:
                    pooled = PooledRows(pooled.row_of_token, (None,) * rows, self.words)
            segments = (Segment(0, rows * count, self.prepared, pooled, self.counters),)
        self.trace = RoutingTrace() if segments else None
        batch = ForwardBatch(ids, positions, segments, trace=self.trace)
        with torch.inference_mode():
            logits = self.model.forward(batch, self.cache.attention(spans))
        if pooled is not None:
            self.words = pooled.words
        self.done += count
        out: Tensor = logits.cpu().view(rows, count, -1)
        return out


@contextmanager
def golden_models(golden: Golden) -> Iterator[tuple[FusedTransformer, Transformer, Adapter]]:
    base = load_base(golden.base, device=DEVICE, dtype=torch.float32)
    adapter = read_adapter(golden.source, base.config)
    fused = FusedTransformer(base.config, base.weights, num_slots=3, shape=SlotShape.of(adapter.manifest), max_tokens=64)
    yield fused, Transformer(base.config, load_base(golden.base, device=DEVICE, dtype=torch.float32).weights), adapter
    fused.close()


@pytest.mark.parametrize("golden", goldens(), ids=lambda golden: golden.name)
def test_prefill_and_decode_give_the_authors_numbers(golden: Golden) -> None:
    """Every family through the fused form: logits, what each router says, and the totals, with keys and values that its kernels wrote."""
    with golden_models(golden) as (fused, definition, adapter):
        ours, theirs = (Rows(model, adapter, golden.prompts[:ROWS], slot=1) for model in (fused, definition))
        first = len(golden.prompts[0]) - LATER
        for count, expected in (
            (first, golden.expected["decode.prefill_logits"][:ROWS]),
            *((1, golden.expected["decode.step_logits"][:ROWS, step : step + 1]) for step in range(STEPS)),
        ):
            found = ours.step(count)
            torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
            torch.testing.assert_close(found, theirs.step(count), atol=2e-4, rtol=1e-4)
            _same_words(ours.trace, theirs.trace)
        assert ours.counters is not None
        assert theirs.counters is not None
        for name in ("selected", "gate_sum", "thresholds"):
            torch.testing.assert_close(getattr(ours.counters, name), getattr(theirs.counters, name), atol=1e-3, rtol=1e-5)
        assert (ours.counters.computed <= theirs.counters.computed).all()
        assert (ours.counters.computed >= ours.counters.selected).all()


def _same_words(ours: RoutingTrace | None, theirs: RoutingTrace | None) -> None:
    assert ours is not None
    assert theirs is not None
    assert ours.records.keys() == theirs.records.keys()
    for segment, layers in theirs.records.items():
        for layer, routers in layers.items():
            assert ours.records[segment][layer].keys() == routers.keys()
            for site, routed in routers.items():
                own = ours.records[segment][layer][site]
                assert torch.equal(own.selected, routed.selected), (layer, site)
                for name in ("scores", "gates"):
                    torch.testing.assert_close(getattr(own, name), getattr(routed, name), atol=2e-5, rtol=1e-4)
