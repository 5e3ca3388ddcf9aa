"""The torch definition of every family against a naive loop over tokens, heads and experts."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, TINY, base_tensors, random_adapter, raw_manifest, write_base
from naive import NaiveModel
from torch import Tensor

from moa_serve.adapter.manifest import Select, SelectAdaMole, SelectConstant, SelectThresholdFn, SelectTopK
from moa_serve.adapter.rules import RouterRule
from moa_serve.model.attention import CausalAttention
from moa_serve.model.batch import ForwardBatch, PooledRows, RoutingTrace, Segment
from moa_serve.model.build import build
from moa_serve.model.moa import Affine, LinearNet, Router, scaled
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

PROMPT = [5, 17, 80, 3, 44, 44, 9]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    base = load_base(write_base(tmp_path_factory.mktemp("base")), dtype=torch.float32)
    return Transformer(base.config, base.weights)


def forward(model: Transformer, family: str | None, ids: list[int], trace: RoutingTrace | None = None) -> Tensor:
    count = len(ids)
    segments: tuple[Segment, ...] = ()
    if family is not None:
        manifest, tensors = random_adapter(family)
        weights = build(manifest, tensors, model.weights, model.config, model.dtype)
        pooled = None
        if manifest.is_pooled:
            pooled = PooledRows.of_whole([count], [count], weights, model.device)
        segments = (Segment(0, count, weights, pooled),)
    batch = ForwardBatch(torch.tensor(ids), torch.arange(count), segments, trace=trace)
    return model.forward(batch, CausalAttention([(0, count)]))


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_equals_the_naive_loop(model: Transformer, family: str) -> None:
    """A wrong column, scale, order or threshold moves these logits by whole units."""
    _, tensors = random_adapter(family)
    naive = NaiveModel(TINY, base_tensors(TINY), raw_manifest(family), tensors)
    expected = naive.logits(PROMPT).float()
    torch.testing.assert_close(forward(model, family, PROMPT), expected, atol=2e-4, rtol=1e-4)
    assert (expected - forward(model, None, PROMPT)).abs().max() > 0.1, "the adapter must matter, or this test shows nothing"


def test_base_equals_the_naive_loop(model: Transformer) -> None:
    expected = NaiveModel(TINY, base_tensors(TINY), None, {}).logits(PROMPT).float()
    torch.testing.assert_close(forward(model, None, PROMPT), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["soft", "sparse_fn", "sparse_const", "instance", "nested_hydra", "partial"])
def test_gates_equal_the_naive_loop_and_unselected_ones_are_exactly_zero(model: Transformer, family: str) -> None:
    manifest, tensors = random_adapter(family)
    naive = NaiveModel(TINY, base_tensors(TINY), raw_manifest(family), tensors)
    naive.logits(PROMPT)
    trace = RoutingTrace()
    forward(model, family, PROMPT, trace)
    zeros = 0
    for layer in range(model.config.num_layers):
        plan = manifest.layer(layer)
        if not plan.experts:
            continue
        gates = trace.records[0][layer]["layer"].gates
        for token in range(len(PROMPT)):
            for expert, column in zip(plan.experts, plan.columns, strict=True):
                expected = naive.gates[layer, token][expert.name]
                assert float(gates[token, column]) == pytest.approx(expected, abs=2e-5)
                assert (float(gates[token, column]) == 0) == (expected == 0)
                zeros += expected == 0
    assert zeros > 0 or manifest.router.select.kind == "all"


def router(select: Select, logits: list[float], threshold: float | None = None) -> Router:
    """One that answers `logits` to x = 1, and `threshold` before its sigmoid."""
    net = LinearNet(Affine(torch.tensor(logits)[:, None], None))
    function = None if threshold is None else Affine(torch.tensor([[threshold]]), None)
    return Router(net, select.kind in ("top_k", "adamole"), RouterRule.of(select, len(logits)), function)


def test_a_weight_equal_to_the_threshold_is_kept() -> None:
    """`>=` and not `>`; a zero logit must give exactly one half."""
    routed = router(SelectConstant(threshold=0.5), [0.0, -1e-6, 3.0])(torch.ones(1, 1))
    assert routed.selected.tolist() == [[True, False, True]]
    assert routed.gates[0, 0] == 0.5
    assert routed.gates[0, 1] == 0.0


def test_a_kept_weight_is_unchanged_and_not_reduced_by_the_threshold() -> None:
    routed = router(SelectThresholdFn(max_threshold=0.8), [1.0, -4.0], threshold=0.0)(torch.ones(1, 1))
    assert routed.threshold is not None
    assert float(routed.threshold) == pytest.approx(0.4)
    assert routed.gates[0, 0] == torch.tensor(1.0).sigmoid()
    assert routed.gates[0, 1] == 0.0


def test_of_equal_scores_top_k_keeps_the_first_ones() -> None:
    routed = router(SelectTopK(k=2), [1.0, 1.0, 1.0, 1.0])(torch.ones(3, 1))
    assert routed.selected.tolist() == [[True, True, False, False]] * 3
    assert routed.gates[0].tolist() == [0.5, 0.5, 0.0, 0.0]


def test_adamole_without_an_expert_above_its_threshold_gives_zeros_and_not_nan() -> None:
    routed = router(SelectAdaMole(), [0.0, 0.0], threshold=100.0)(torch.ones(1, 1))
    assert routed.gates.tolist() == [[0.0, 0.0]]
    assert not routed.selected.any()


def test_what_is_not_kept_is_selected_away_even_if_it_is_not_finite() -> None:
    """0 * NaN is NaN: one tenant's overflow would reach everyone behind the same product."""
    values = torch.tensor([[float("nan"), float("inf"), 2.0]])
    assert scaled(values, torch.tensor([[0.0, 0.0, 0.5]])).tolist() == [[0.0, 0.0, 1.0]]


def test_bfloat16_base_still_routes_in_float32(tmp_path: Path) -> None:
    base = load_base(write_base(tmp_path), dtype=torch.bfloat16)
    model = Transformer(base.config, base.weights)
    trace = RoutingTrace()
    assert forward(model, "sparse_fn", PROMPT, trace).dtype == torch.float32
    routed = trace.records[0][0]["layer"]
    assert routed.scores.dtype == torch.float32
    assert routed.gates.dtype == torch.float32


@pytest.mark.parametrize("stacked", [(), (3,)], ids=["one", "stacked"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_product_in_parts_is_the_product(stacked: tuple[int, ...], has_bias: bool) -> None:
    """How a GPU computes routers; rows of a batch are a slice."""
    torch.manual_seed(0)
    bias = torch.randn(*stacked, 1, 7) if stacked else torch.randn(7)
    affine = Affine(torch.randn(*stacked, 7, 64), bias if has_bias else None)
    x = torch.randn(*stacked, 9, 64)[..., 2:7, :]
    torch.testing.assert_close(affine._in_parts(x), affine(x), atol=2e-5, rtol=1e-5)
