"""The loss is that of the served model, and its gradient that of the definition."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import random_adapter
from torch import Tensor
from training import RECIPES, examples, manifest_for, tiny_base

from moa_serve import LLM
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.rules import RouterRule
from moa_serve.config import ModelConfig
from moa_serve.model.attention import CausalAttention, PaddedCausalAttention
from moa_serve.model.batch import ForwardBatch, Segment
from moa_serve.model.counters import RouterCounters
from moa_serve.model.moa import Affine, LinearNet, Mixture, Routed, Router, scaled
from moa_serve.model.ops import _rms_norm, rms_norm
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import Base
from moa_serve.train.batches import TokenBatch
from moa_serve.train.objective import CheckpointedTransformer, Objective, trainable
from moa_serve.train.prompts import Encoded
from moa_serve.train.recipe import fresh_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("base")


@pytest.fixture(scope="module")
def base(folder: Path) -> Base:
    return tiny_base(folder)


def noisy(base: Base, name: str, seed: int = 5) -> dict[str, Tensor]:
    """Tensors that are no identity, as if trained for a while."""
    generator = torch.Generator().manual_seed(seed)
    fresh = fresh_tensors(manifest_for(base, RECIPES[name]), seed)
    return {key: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for key, tensor in fresh.items()}


def objective_for(base: Base, name: str, tensors: dict[str, Tensor], tau: float | None = 0.1, *, checkpointing: bool = False) -> Objective:
    model = (CheckpointedTransformer if checkpointing else Transformer)(base.config, base.weights)
    return Objective(model, manifest_for(base, RECIPES[name]), tensors, straight_through=tau)


def batch_of(rows: list[Encoded]) -> TokenBatch:
    return TokenBatch.of(rows, torch.device("cpu"))


@pytest.mark.parametrize("name", RECIPES)
def test_the_loss_is_that_of_served_logits(name: str, base: Base, folder: Path, tmp_path: Path) -> None:
    """What is trained is what is served: no second way to compute an adapter. Instance-level weights come from the prompt in both."""
    tensors, rows = noisy(base, name), examples(3)
    loss = objective_for(base, name, trainable(tensors)).loss(batch_of(rows)).item()
    write_adapter(tmp_path / "a", manifest_for(base, RECIPES[name]), tensors)
    with LLM(folder, adapters={"a": tmp_path / "a"}, backend="torch") as llm:
        served = 0.0
        for row in rows:
            prompt = row.is_target.index(True)
            scores = llm.score_choices([row.token_ids[:prompt]], [[row.token_ids[prompt:]]], adapter="a")
            served -= scores[0][0].logprob
            if name not in ("instance", "unipeft"):  # there, logits of a whole text are those of a whole prompt
                logits = llm.logits(row.token_ids, adapter="a")[prompt - 1 : -1]
                expected = -F.cross_entropy(logits, torch.tensor(row.token_ids[prompt:]), reduction="sum").item()
                assert scores[0][0].logprob == pytest.approx(expected, abs=1e-3)
    assert loss == pytest.approx(served, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_every_tensor_learns(name: str, base: Base) -> None:
    """A factor without a gradient would stay at its random start in silence."""
    tensors = trainable(noisy(base, name))
    objective_for(base, name, tensors).loss(batch_of(examples(6))).backward()  # type: ignore[no-untyped-call]
    silent = [key for key, tensor in tensors.items() if tensor.grad is None or not bool(tensor.grad.any())]
    assert silent == []


@pytest.mark.parametrize("name", RECIPES)
def test_the_gradient_is_the_losses_slope(name: str, base: Base) -> None:
    """Along a random direction; where a selection is hard, of the last tensors only, that no selection can hear of."""
    tensors, batch = noisy(base, name), batch_of(examples(4))
    leaves = trainable(tensors)
    objective_for(base, name, leaves, None).loss(batch).backward()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    is_hard = RECIPES[name].variant in ("sparse_moa", "mola", "adamole")
    last = ("layers.2.DOWN", "layers.2.P_ADAPTER")
    along = {
        key: torch.zeros(t.shape)
        if is_hard and not (key.startswith(last) and ".router" not in key)
        else torch.randn(t.shape, generator=generator)
        for key, t in tensors.items()
    }
    step = 2e-3

    @torch.no_grad()
    def at(distance: float) -> float:
        moved = {key: tensor + distance * along[key] for key, tensor in tensors.items()}
        return objective_for(base, name, moved, None).loss(batch).item()

    slope = sum(float((leaf.grad * along[key]).sum()) for key, leaf in leaves.items() if leaf.grad is not None)
    assert slope == pytest.approx((at(step) - at(-step)) / (2 * step), rel=0.05, abs=0.3)


@pytest.mark.parametrize("name", ["soft", "sparse_prompt", "instance", "unipeft", "molora", "nested_molora"])
def test_checkpointing_changes_no_gradient(name: str, base: Base) -> None:
    tensors, batch = noisy(base, name), batch_of(examples(4))
    plain, checkpointed = trainable(tensors), trainable(tensors)
    counters = [RouterCounters(manifest_for(base, RECIPES[name]), torch.device("cpu")) for _ in range(2)]
    objective_for(base, name, plain).loss(batch, counters=counters[0]).backward()  # type: ignore[no-untyped-call]
    again = objective_for(base, name, checkpointed, checkpointing=True)
    again.loss(batch, counters=counters[1]).backward()  # type: ignore[no-untyped-call]
    for key in tensors:
        torch.testing.assert_close(plain[key].grad, checkpointed[key].grad)
    assert counters[0].tokens == counters[1].tokens == batch.num_tokens
    assert (counters[0].snapshot().selected == counters[1].snapshot().selected).all()  # the second forward is not counted


@pytest.mark.parametrize("name", ["soft", "sparse", "instance", "molora"])
def test_filling_changes_neither_loss_nor_gradient(name: str, base: Base) -> None:
    tensors, rows = noisy(base, name), examples(5)
    plain, filled = trainable(tensors), trainable(tensors)
    losses = []
    for leaves, fill in ((plain, 1), (filled, 64)):
        loss = objective_for(base, name, leaves).loss(TokenBatch.of(rows, torch.device("cpu"), fill=fill))
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for key in tensors:
        torch.testing.assert_close(plain[key].grad, filled[key].grad, rtol=1e-3, atol=1e-4)


def test_padded_attention_is_causal_attention_with_its_gradient() -> None:
    lengths = (5, 1, 9)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(15, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2))
    spans = [(0, 5), (5, 6), (6, 15)]
    grad = torch.randn(15, 4, 8, generator=generator)
    expected, padded = CausalAttention(spans)(0, q, k, v), PaddedCausalAttention(lengths, torch.device("cpu"))(0, q, k, v)
    torch.testing.assert_close(padded, expected)
    for ours, theirs in zip(torch.autograd.grad(padded, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_frozen_norms_gradient_is_autograds() -> None:
    x = (3 * torch.randn(7, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    weight, grad = torch.linspace(-1, 2, 16), torch.linspace(-2, 2, 112).view(7, 16)
    assert torch.equal(rms_norm(x, weight, 1e-5), _rms_norm(x, weight, 1e-5)[0])
    ours, theirs = (torch.autograd.grad(f, x, grad)[0] for f in (rms_norm(x, weight, 1e-5), _rms_norm(x, weight, 1e-5)[0]))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("family", ["soft", "sparse_fn", "molora"])
def test_a_segment_that_is_not_the_whole_batch_differentiates_too(family: str, tmp_path: Path) -> None:
    """Out of place with gradients, in place without: the same numbers."""
    from families import TINY, write_base

    from moa_serve.model.build import build
    from moa_serve.model.weights import load_base

    base = load_base(write_base(tmp_path / "base"), dtype=torch.float32)
    assert base.config == ModelConfig.from_hf(TINY)
    manifest, tensors = random_adapter(family)
    model, ids = Transformer(base.config, base.weights), torch.arange(3, 12)

    def logits(values: dict[str, Tensor]) -> Tensor:
        adapter = build(manifest, values, base.weights, base.config, torch.float32)
        batch = ForwardBatch(ids, torch.arange(9), (Segment(2, 7, adapter),))
        return model.forward(batch, CausalAttention([(0, 2), (2, 7), (7, 9)]))

    leaves = trainable(tensors)
    out = logits(leaves)
    with torch.inference_mode():
        torch.testing.assert_close(out.detach(), logits(tensors), rtol=0, atol=1e-4)
    out[:2].sum().backward(retain_graph=True)  # type: ignore[no-untyped-call]
    assert not any(bool(leaf.grad.any()) for leaf in leaves.values() if leaf.grad is not None), "rows of the base alone teach nothing"
    out.sum().backward()  # type: ignore[no-untyped-call]
    assert any(bool(leaf.grad.any()) for leaf in leaves.values() if leaf.grad is not None)


# -- thresholds


def threshold_router(tau: float | None) -> tuple[Router, Tensor, Tensor]:
    """A router of two experts on a single input of 1: scores sigmoid(0.2) and sigmoid(-1), threshold sigmoid(0)."""
    weight = torch.tensor([[0.2], [-1.0]]).requires_grad_()
    limit = torch.zeros(1, 1).requires_grad_()
    rule = RouterRule(threshold=1.0, is_function=True)
    return Router(LinearNet(Affine(weight, None)), False, rule, Affine(limit, None), straight_through=tau), weight, limit


def test_the_straight_through_estimator_is_its_formula() -> None:
    """Forward hard; backward dg = [s >= t] ds + s * sigmoid'((s - t) / tau) / tau * (ds - dt), also of an expert that is not selected."""
    tau = 0.1
    router, weight, limit = threshold_router(tau)
    routed = router(torch.ones(1, 1))
    s, t = torch.tensor([0.2, -1.0]).sigmoid(), torch.tensor(0.5)
    assert torch.equal(routed.gates, torch.where(s >= t, s, 0.0)[None])
    assert routed.selected.tolist() == [[True, False]]
    routed.gates.sum().backward()  # type: ignore[no-untyped-call]
    soft = ((s - t) / tau).sigmoid()
    slope = s * soft * (1 - soft) / tau
    torch.testing.assert_close(weight.grad[:, 0], ((s >= t).float() + slope) * s * (1 - s))  # type: ignore[index]
    torch.testing.assert_close(limit.grad[0, 0], -(slope.sum() * t * (1 - t)))  # type: ignore[index]


def test_the_authors_gradient_leaves_thresholds_alone() -> None:
    """`>=` has no slope: neither the threshold nor an unselected expert's router row hears of the loss."""
    router, weight, limit = threshold_router(None)
    router(torch.ones(1, 1)).gates.sum().backward()  # type: ignore[no-untyped-call]
    assert limit.grad is None
    assert weight.grad is not None
    assert weight.grad[0, 0] != 0
    assert weight.grad[1, 0] == 0


def test_a_nested_expert_that_is_not_kept_is_heard_in_training_and_not_asked_in_serving() -> None:
    """Its router would else learn from the tokens that kept it alone, and its threshold could never fall again."""
    mixture, inner = Mixture(column=0), torch.tensor([[0.25, 0.75]])
    outer = torch.tensor([[0.0]]).requires_grad_()
    weights = mixture.expert_weights(outer, Routed(inner, None, inner > 0, inner))
    assert weights is not None
    assert weights.tolist() == [[0.0, 0.0]]
    (grad,) = torch.autograd.grad((weights * torch.tensor([[4.0, 8.0]])).sum(), outer)
    assert grad.tolist() == [[7.0]]
    broken = torch.full((1, 2), torch.inf)
    assert mixture.expert_weights(outer.detach(), Routed(broken, None, inner > 0, broken)).tolist() == [[0.0, 0.0]]  # type: ignore[union-attr]


def test_serving_does_not_know_the_estimator() -> None:
    router, _, _ = threshold_router(0.1)
    plain, _, _ = threshold_router(None)
    with torch.inference_mode():
        assert torch.equal(router(torch.ones(3, 1)).gates, plain(torch.ones(3, 1)).gates)


def test_an_expert_that_is_not_kept_is_selected_away_when_serving_and_heard_when_training() -> None:
    values, weight = torch.tensor([[torch.inf], [2.0]]), torch.tensor([[0.0], [0.5]])
    assert scaled(values, weight).tolist() == [[0.0], [1.0]]
    learned = weight.clone().requires_grad_()
    scaled(torch.tensor([[3.0], [2.0]]), learned).sum().backward()  # type: ignore[no-untyped-call]
    assert learned.grad is not None
    assert learned.grad.tolist() == [[3.0], [2.0]]
