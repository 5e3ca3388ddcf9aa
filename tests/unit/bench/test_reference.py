"""The yardstick computes the same numbers as what is served; else its ratio would say nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from training import RECIPES, manifest_for

from moa_serve.adapter.adapter import Adapter
from moa_serve.bench.reference import AuthorsWay, compare
from moa_serve.bench.workload import selected_share
from moa_serve.errors import InvalidRequest
from moa_serve.model.attention import CausalAttention
from moa_serve.model.backend import Backend
from moa_serve.model.batch import ForwardBatch, RoutingTrace, Segment
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import Base
from moa_serve.train.recipe import fresh_tensors

SOFT = ("soft", "soft_residual_all_targets", "lora_sigmoid_router")
SPARSE = ("sparse", "sparse_prompt", "sparse_constant")


def adapter_of(base: Base, name: str) -> Adapter:
    """Weights large enough that every wrong rule shows in the logits."""
    manifest = manifest_for(base, RECIPES[name])
    generator = torch.Generator().manual_seed(1)
    tensors = fresh_tensors(manifest, 0)
    noisy = {key: tensor + 0.3 * torch.randn(tensor.shape, generator=generator) for key, tensor in tensors.items()}
    return Adapter(manifest, noisy, name, "made up")


def folder_of(base: Base) -> Path:
    assert base.folder is not None
    return base.folder


def theirs(base: Base, name: str | None) -> AuthorsWay:
    if name is None:
        return AuthorsWay(folder_of(base), torch.float32)
    adapter = adapter_of(base, name)
    return AuthorsWay(folder_of(base), torch.float32, adapter.manifest, adapter.tensors)


def assert_agree(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def some_ids(base: Base, rows: int = 3, tokens: int = 11) -> Tensor:
    return torch.randint(0, base.config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(2))


def ours(base: Base, token_ids: Tensor, adapter: Adapter | None, trace: RoutingTrace | None = None) -> Tensor:
    """(B, T, V): each row a whole sequence, by the definition of attention."""
    model = Transformer(base.config, base.weights)
    rows, tokens = token_ids.shape
    segments = () if adapter is None else (Segment(0, rows * tokens, model.prepare(adapter)),)
    batch = ForwardBatch(token_ids.flatten(), torch.arange(tokens).repeat(rows), segments, trace=trace)
    with torch.inference_mode():
        logits = model.forward(batch, CausalAttention([(row * tokens, (row + 1) * tokens) for row in range(rows)]))
    return logits.view(rows, tokens, -1)


@pytest.mark.parametrize("name", [None, *SOFT, *SPARSE])
def test_it_gives_our_logits(base: Base, name: str | None) -> None:
    """The base alone, and every kind of expert and router that it knows."""
    token_ids = some_ids(base)
    expected = ours(base, token_ids, None if name is None else adapter_of(base, name))
    assert_agree(theirs(base, name).logits(token_ids), expected)


@pytest.mark.parametrize("name", SPARSE)
def test_the_sparse_ones_skip_experts_in_these_tests(base: Base, name: str) -> None:
    """Where everything is selected, a wrong threshold would not show."""
    trace = RoutingTrace()
    ours(base, some_ids(base), adapter_of(base, name), trace)
    assert 0.1 < (selected_share(trace) or 0) < 0.9


@pytest.mark.parametrize("name", [None, "soft", "sparse"])
def test_a_step_gives_the_next_token_of_a_prefill(base: Base, name: str | None) -> None:
    """And gives it again after `rewind`: every timed step sees the same context."""
    way, token_ids = theirs(base, name), some_ids(base)
    whole = way.logits(token_ids)
    assert_agree(way.prefill(token_ids[:, :-1]), whole[:, -2])
    way.rewind()
    for _ in range(2):
        assert_agree(way.step(token_ids[:, -1:]), whole[:, -1])
        way.rewind()


@pytest.mark.parametrize("name", ["molora", "soft_softmax", "nested_molora", "instance"])
def test_other_families_are_refused(base: Base, name: str) -> None:
    with pytest.raises(InvalidRequest, match="sparse_moa and soft_moa"):
        theirs(base, name)


@pytest.mark.parametrize("family", ["sparse_moa", "soft_moa"])
def test_a_comparison_has_sensible_numbers(fresh_model: Backend, family: str, tmp_path: Path) -> None:
    report = compare(fresh_model, tmp_path, family=family, rows=(1, 3), rounds=1, context=5)
    found = json.loads(json.dumps(report.to_json()))
    assert found["backend"] == fresh_model.name
    assert [size["rows"] for size in found["sizes"]] == [1, 3]
    first = found["sizes"][0]
    assert set(first["ms"]) == {"ours", "base", "control", "authors", "transformers"}
    assert first["adapter"]["median"] == pytest.approx(first["ms"]["authors"]["median"] / first["ms"]["ours"]["median"])
    assert first["adapter"]["goal"] == (2.5 if fresh_model.name == "torch" else 5)
    assert first["control"]["goal"] is None
    assert found["sizes"][1]["adapter"]["is_met"] is None


def test_what_cannot_be_compared_is_refused(base: Base) -> None:
    model = Transformer(base.config, base.weights)
    with pytest.raises(InvalidRequest, match="must be one of sparse_moa, soft_moa"):
        compare(model, folder_of(base), family="lora")
    with pytest.raises(InvalidRequest, match="rows"):
        compare(model, folder_of(base), rows=(1, 0))
    with pytest.raises(InvalidRequest, match="this base is qwen3"):
        compare(Transformer(replace(base.config, architecture="qwen3"), base.weights), folder_of(base))
