"""The manifest: which tensors and how many parameters follow from it, and what it refuses."""

from typing import Any

import pytest
from support import llama_8b_config, tiny_config, tiny_manifest

from moa_serve.adapter.manifest import BaseShape, Manifest
from moa_serve.errors import AdapterConfigInvalid, AdapterMismatch

_SWIGLU = {"net": "swiglu"}


@pytest.mark.parametrize(
    ("variant", "options", "count"),
    [
        ("lora", {"rank": 16}, 23_068_672),
        ("molora", {"rank": 8, "num_experts": 8}, 100_139_008),
        ("hydralora", {"rank": 8, "num_experts": 8}, 45_088_768),
        ("mola", {"rank": 8, "num_experts": 8}, 100_140_288),
        ("adamole", {"rank": 8, "num_experts": 8}, 101_123_488),
        ("soft_moa", {"rank": 8, "prompt_length": 10, "parallel_size": 16, "router": _SWIGLU | {"hidden": 28}}, 24_520_288),
        ("sparse_moa", {"rank": 8, "parallel_size": 16, "router": _SWIGLU | {"hidden": 24}}, 22_289_120),
    ],
)
def test_parameter_counts_are_the_papers(variant: str, options: dict[str, Any], count: int) -> None:
    """Counts that differ from the published ones would mean other tensors than the authors trained."""
    assert tiny_manifest(llama_8b_config(), variant, **options).num_parameters == count


def test_tensors_of_every_kind_have_the_documented_names() -> None:
    """The names are the file format: a change here breaks every adapter on disk."""
    manifest = tiny_manifest(tiny_config(), "sparse_moa", targets=("Q",), prompt_length=3, parallel_size=5, layers=[1])
    assert manifest.expected_tensors() == {
        "layers.1.router.weight": (3, 16),
        "layers.1.router.bias": (3,),
        "layers.1.router.threshold.weight": (1, 16),
        "layers.1.router.threshold.bias": (1,),
        "layers.1.Q.lora_A": (4, 16),
        "layers.1.Q.lora_B": (16, 4),
        "layers.1.PROMPT.rows": (3, 16),
        "layers.1.PROMPT.gate": (2,),
        "layers.1.P_ADAPTER.down.weight": (5, 16),
        "layers.1.P_ADAPTER.down.bias": (5,),
        "layers.1.P_ADAPTER.up.weight": (16, 5),
        "layers.1.P_ADAPTER.up.bias": (16,),
    }


def test_every_field_of_another_base_is_named() -> None:
    """An adapter on the wrong base may fit by shape alone and answer nonsense."""
    manifest = tiny_manifest(tiny_config(), "lora")
    with pytest.raises(AdapterMismatch) as caught:
        manifest.check_base(tiny_config(hidden_size=32, vocab_size=64))
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["base.hidden_size", "base.vocab_size"]


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("experts.0.rank", {"rank": 0}),
        ("experts.0.rank", {"rank": 513}),
        ("experts.0.alpha", {"alpha": 1e4}),
        ("experts.0.alpha", {"alpha": float("nan")}),
        ("experts.0.layers", {"layers": [1, 0]}),
        ("experts.0.layers", {"layers": [2_000_000_000]}),
        ("experts", {"layers": [0, 2]}),
        ("experts.0.colour", {"colour": "red"}),
    ],
)
def test_wrong_expert_is_refused(field: str, change: dict[str, Any]) -> None:
    """Sizes from a file allocate memory: each is bounded before anything is built."""
    expert = {"name": "Q", "kind": "lora", "target": "Q", "layers": [0], "rank": 4, "alpha": 4} | change
    base = BaseShape.of(tiny_config()).model_dump()
    with pytest.raises(AdapterConfigInvalid) as caught:
        Manifest.parse({"format": "moa-adapter/1", "base": base, "variant": "lora", "router": {"site": "none"}, "experts": [expert]})
    assert (caught.value.param or "") == field
