"""Recipes give the paper's adapters: their parameter counts, and tensors that change nothing before they are trained."""

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from support import llama_8b_config
from training import RECIPES, manifest_for, tiny_base

from moa_serve import LLM
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import VARIANTS, BaseShape
from moa_serve.engine.routing import unchanged_reason
from moa_serve.errors import InvalidRequest
from moa_serve.train.recipe import Recipe, fresh_tensors, manifest_of


@pytest.mark.parametrize(
    ("recipe", "count"),
    [
        (Recipe(variant="lora", rank=16), 23_068_672),
        (Recipe(variant="soft_moa"), 24_520_288),
        (Recipe(variant="sparse_moa"), 22_289_120),
        (Recipe(variant="molora"), 100_139_008),
        (Recipe(variant="hydralora"), 45_088_768),
        (Recipe(variant="mola"), 100_140_288),
        (Recipe(variant="adamole"), 101_123_488),
    ],
    ids=lambda value: value.variant if isinstance(value, Recipe) else "",
)
def test_the_defaults_are_the_papers_sizes(recipe: Recipe, count: int) -> None:
    """Trainable parameters for LLaMA-3.1-8B, as in the paper's tables (there in millions, two digits)."""
    assert manifest_of(recipe, BaseShape.of(llama_8b_config())).num_parameters == count


def test_every_variant_has_a_recipe() -> None:
    assert {recipe.variant for recipe in RECIPES.values()} == set(VARIANTS)


@pytest.mark.parametrize("name", RECIPES)
def test_a_fresh_adapter_is_the_identity(name: str, tmp_path: Path) -> None:
    """Training begins at the base: logits equal bit by bit. The authors' Hugging Face line begins with random output factors instead."""
    base = tiny_base(tmp_path / "base")
    manifest = manifest_for(base, RECIPES[name])
    tensors = fresh_tensors(manifest, seed=3)
    assert unchanged_reason(manifest, tensors, None) == "every output factor is zero, as in a fresh adapter"
    assert any(bool(tensor.any()) for tensor in tensors.values())
    write_adapter(tmp_path / "fresh", manifest, tensors)
    with LLM(tmp_path / "base", adapters={"fresh": tmp_path / "fresh"}, backend="torch") as llm:
        ids = [5, 9, 200, 31, 77]
        assert torch.equal(llm.logits(ids), llm.logits(ids, adapter="fresh"))


def test_fresh_tensors_depend_on_the_seed_alone(tmp_path: Path) -> None:
    manifest = manifest_for(tiny_base(tmp_path / "base"), RECIPES["soft"])
    one, same, other = (fresh_tensors(manifest, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_layerwise_mola_has_more_experts_in_higher_layers(tmp_path: Path) -> None:
    manifest = manifest_for(tiny_base(tmp_path / "base"), RECIPES["mola"])
    assert [len(manifest.layer(layer).at("Q")) for layer in range(3)] == [2, 3, 4]


def test_more_numbers_of_experts_than_layers_are_refused(tmp_path: Path) -> None:
    """Some of them would stand nowhere."""
    with pytest.raises(InvalidRequest, match="4 numbers, but the base has 3 layers"):
        manifest_for(tiny_base(tmp_path / "base"), Recipe(variant="mola", num_experts=(2, 2, 4, 4)))


def test_unipeft_has_a_gate_for_each_kind(tmp_path: Path) -> None:
    manifest = manifest_for(tiny_base(tmp_path / "base"), RECIPES["unipeft"])
    columns = dict(zip((expert.name for expert in manifest.layer(0).experts), manifest.layer(0).columns, strict=True))
    assert columns == {"Q": 0, "K": 0, "V": 0, "PROMPT": 1, "O": 0, "DOWN": 0, "P_ADAPTER": 2}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"variant": "soft"}, "variant"),
        ({"targets": ("Q", "Q")}, "targets"),
        ({"targets": ("q",)}, "targets"),
        ({"variant": "lora", "bottleneck": 8}, "bottleneck"),
        ({"variant": "molora", "prompt_length": 8}, "prompt_length"),
        ({"variant": "sparse_moa", "activation": "softmax"}, "activation"),
        ({"variant": "soft_moa", "threshold": "constant"}, "threshold"),
        ({"variant": "soft_moa", "max_threshold": 0.3}, "max_threshold"),
        ({"variant": "soft_moa", "num_experts": (4,)}, "num_experts"),
        ({"variant": "molora", "num_experts": (2, 4)}, "num_experts"),
        ({"variant": "molora", "top_k": 1}, "top_k"),
        ({"variant": "molora", "inner": "molora"}, "inner"),
        ({"variant": "prompt", "rank": 4}, "rank"),
        ({"variant": "lora", "router_net": "linear"}, "router_net"),
        ({"variant": "soft_moa_instance", "router_input": "residual"}, "router_input"),
        ({"variant": "soft_moa", "router_net": "linear", "router_hidden": 8}, "router_hidden"),
        ({"inner": "mola"}, "inner"),
        ({"router_net": "mlp"}, "router_net"),
        ({"variant": "sparse_moa", "threshold": "learned"}, "threshold"),
    ],
    ids=str,
)
def test_what_a_family_does_not_have_is_refused(given: dict[str, object], field: str) -> None:
    """An option that is accepted and ignored would be a result under a wrong name."""
    with pytest.raises(InvalidRequest) as caught:
        Recipe(**given)  # type: ignore[arg-type]
    assert caught.value.param == field
    assert field.replace("_", "-") in str(caught.value)


def test_no_field_escapes_the_rules() -> None:
    """A new field of Recipe needs a rule of its own: every one of them is either common or asked about."""
    recipe = Recipe()
    for item in fields(recipe):
        if item.name not in ("variant", "bottleneck", "prompt_length", "activation", "inner"):
            assert isinstance(recipe._uses(item.name), bool)
