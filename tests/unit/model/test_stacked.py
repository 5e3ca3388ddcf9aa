"""Adapters side by side in one product, against each by itself."""

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from backends import ON_GPU, computing
from families import FAMILIES, TINY, random_adapter, write_base
from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.model.attention import CausalAttention
from moa_serve.model.batch import ForwardBatch, RoutingTrace, Segment
from moa_serve.model.build import build
from moa_serve.model.counters import RouterCounters
from moa_serve.model.moa import MoaWeights
from moa_serve.model.stacked import MOST_TOKENS, parts_of
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

STACKED = [family for family in FAMILIES if not random_adapter(family)[0].is_pooled]
Rows = Sequence[tuple[MoaWeights | None, int]]


@pytest.fixture(scope="module", params=["torch", ON_GPU[0]])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    device = computing(request.param)["device"]
    base = load_base(write_base(tmp_path_factory.mktemp("base")), device=device, dtype=torch.float32)
    return Transformer(base.config, base.weights)


def prepared(model: Transformer, family: str, seed: int) -> MoaWeights:
    manifest, tensors = random_adapter(family, seed)
    return model.prepare(Adapter(manifest, tensors, f"{family}-{seed}", "test"))


def forward(model: Transformer, rows: Rows, trace: RoutingTrace | None = None) -> tuple[Tensor, list[Segment]]:
    """Logits of sequences of so many tokens each, every one with its adapter or none; the tokens are those of their place."""
    segments, start = [], 0
    spans = []
    for adapter, count in rows:
        if adapter is not None:
            segments.append(Segment(start, start + count, adapter, None, RouterCounters(adapter.manifest, model.device)))
        spans.append((start, start + count))
        start += count
    ids = torch.cat([(torch.arange(count) * 7 + 11 * place + 3) % TINY["vocab_size"] for place, (_, count) in enumerate(rows)])
    positions = torch.cat([torch.arange(count) for _, count in rows])
    with torch.inference_mode():
        batch = ForwardBatch(ids.to(model.device), positions.to(model.device), tuple(segments), trace=trace)
        return model.forward(batch, CausalAttention(spans)), segments


def alone(model: Transformer, rows: Rows, place: int) -> tuple[Tensor, list[Segment], RoutingTrace]:
    """The same with the adapter of one place only."""
    trace = RoutingTrace()
    logits, segments = forward(model, [(adapter if index == place else None, count) for index, (adapter, count) in enumerate(rows)], trace)
    start = sum(count for _, count in rows[:place])
    return logits[start : start + rows[place][1]], segments, trace


@pytest.mark.parametrize("counts", [(1, 1, 1), (3, 1, 2)])
@pytest.mark.parametrize("family", STACKED)
def test_side_by_side_equals_alone(model: Transformer, family: str, counts: tuple[int, ...]) -> None:
    """A slice of another tenant's, a wrong scale or a counted pad would show; base rows stand between the tenants'."""
    rows: list[tuple[MoaWeights | None, int]] = [(prepared(model, family, seed), count) for seed, count in enumerate(counts, 1)]
    rows.insert(1, (None, 2))
    trace = RoutingTrace()
    logits, segments = forward(model, rows, trace)
    assert len(parts_of(segments, model._stacks, model.device)) == 1, "this test is about stacked adapters"
    start = number = 0
    for place, (adapter, count) in enumerate(rows):
        if adapter is not None:
            own, (segment,), own_trace = alone(model, rows, place)
            torch.testing.assert_close(logits[start : start + count], own, atol=2e-5, rtol=1e-5)
            counters, expected = segments[number].counters, segment.counters
            assert counters is not None
            assert expected is not None
            torch.testing.assert_close(counters.selected, expected.selected)
            torch.testing.assert_close(counters.gate_sum, expected.gate_sum, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(counters.computed, expected.computed)
            torch.testing.assert_close(counters.thresholds, expected.thresholds, atol=1e-5, rtol=1e-5)
            for layer, sites in own_trace.records.get(0, {}).items():
                for site, routed in sites.items():
                    assert torch.equal(trace.records[number][layer][site].selected, routed.selected)
                    torch.testing.assert_close(trace.records[number][layer][site].gates, routed.gates)
            number += 1
        start += count


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_products_equal_the_definition(model: Transformer, family: str) -> None:
    manifest, tensors = random_adapter(family)
    if manifest.is_pooled:
        pytest.skip("instance-level weights come from the engine")
    definition = build(manifest, tensors, model.weights, model.config, model.dtype)
    assert definition.joined is None
    torch.testing.assert_close(
        forward(model, [(prepared(model, family, 1), 5)])[0], forward(model, [(definition, 5)])[0], atol=2e-5, rtol=1e-5
    )


def test_only_what_fits_stands_side_by_side(model: Transformer) -> None:
    """Another layout, or a long prompt, computes by itself beside those that decode together, and the result is the same."""
    soft, sparse = [prepared(model, "soft", seed) for seed in (1, 2, 3)], prepared(model, "sparse_fn", 1)
    rows: list[tuple[MoaWeights | None, int]] = [(soft[0], 1), (sparse, 1), (soft[1], 2), (soft[2], MOST_TOKENS + 1)]
    logits, segments = forward(model, rows)
    groups = sorted([number for number, _ in part.segments] for part in parts_of(segments, model._stacks, model.device))
    assert groups == [[0, 2], [1], [3]]
    start = 0
    for place, (_, count) in enumerate(rows):
        torch.testing.assert_close(logits[start : start + count], alone(model, rows, place)[0], atol=2e-5, rtol=1e-5)
        start += count


def test_a_swapped_adapter_is_seen_in_the_next_step(model: Transformer) -> None:
    """Stacks are kept between steps; a stale one would serve a tenant who has left."""
    first, second, third = (prepared(model, "soft", seed) for seed in (1, 2, 3))
    forward(model, [(first, 1), (second, 1)])
    swapped = forward(model, [(first, 1), (third, 1)])[0]
    torch.testing.assert_close(swapped[1:], alone(model, [(first, 1), (third, 1)], 1)[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(
        forward(model, [(second, 1), (first, 1)])[0][1:], alone(model, [(None, 1), (first, 1)], 1)[0], atol=2e-5, rtol=1e-5
    )


def test_a_forgotten_adapter_is_freed(model: Transformer) -> None:
    adapters = [prepared(model, "soft", seed) for seed in (1, 2)]
    forward(model, [(adapter, 1) for adapter in adapters])
    gone = weakref.ref(adapters[0].layers[0].linears["Q"].b)  # type: ignore[union-attr]
    model.forget("soft-1")
    del adapters
    gc.collect()
    assert gone() is None


def test_an_overflow_stays_in_its_own_rows(model: Transformer) -> None:
    """One tenant's infinity must not reach a batch mate through the product that they share."""
    adapters = [prepared(model, "lora", seed) for seed in (1, 2)]
    expected = forward(model, [(adapter, 1) for adapter in adapters])[0]
    manifest, tensors = random_adapter("lora", 1)
    huge = {name: tensor * 1e30 for name, tensor in tensors.items()}
    broken = model.prepare(Adapter(manifest, huge, "huge", "test"))
    logits = forward(model, [(broken, 1), (adapters[1], 1)])[0]
    assert not logits[0].isfinite().all()
    assert torch.equal(logits[1], expected[1])
