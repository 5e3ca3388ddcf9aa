"""What ablations and sweeps ask of an adapter: every expert has its turn, and everything that is asked can be had."""

import pytest
from families import FAMILIES, TINY, lora, raw_manifest

from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RoutingOptions, RoutingRules, rules_for
from moa_serve.errors import InvalidRequest
from moa_serve.train.variations import Variation, ablations, check_ablation, given, sweep

ROUTED = [family for family in FAMILIES if FAMILIES[family][1]["site"] != "none"]


def manifest_of(family: str, **more: object) -> Manifest:
    return Manifest.parse(raw_manifest(family) | more)


def rules_of(variation: Variation, manifest: Manifest) -> RoutingRules:
    found = rules_for(RoutingOptions.of(variation.moa), manifest)
    assert found is not None, f"{variation.name} is the adapter's own way"
    return found


def names(found: list[Variation]) -> list[str]:
    return [variation.name for variation in found]


@pytest.mark.parametrize("family", ROUTED)
def test_everything_that_is_asked_can_be_had_and_nothing_twice(family: str) -> None:
    """A line that is refused would end a run of hours; one that says what another says would be noise."""
    manifest = manifest_of(family)
    for found in (ablations("experts", manifest), ablations("layers", manifest), ablations("layers:2", manifest), sweep(manifest)):
        assert len(found) >= 2
        assert len(set(names(found))) == len({rules_of(variation, manifest) for variation in found}) == len(found)


def test_kinds_are_those_of_the_paper_and_the_two_sides() -> None:
    manifest = manifest_of("soft")
    assert {variation.name: variation.moa["disable"] for variation in ablations("kinds", manifest)} == {
        "without LoRA": ["Q", "K", "V", "O", "UP", "GATE", "DOWN"],
        "without PROMPT": ["PROMPT"],
        "without P_ADAPTER": ["P_ADAPTER"],
        "without attention": ["Q", "K", "V", "PROMPT", "O"],
        "without FFN": ["UP", "GATE", "DOWN", "P_ADAPTER"],
    }
    assert names(ablations("kinds", manifest_of("molora"))) == ["without attention", "without FFN"]


def test_experts_that_share_a_weight_go_together() -> None:
    """UniPEFT: to leave out one of them alone is refused by the engine, in the midst of a run."""
    found = ablations("experts", manifest_of("unipeft"))
    assert names(found) == ["without Q, V, DOWN", "without PROMPT, P_ADAPTER"]
    assert names(ablations("kinds", manifest_of("unipeft"))) == ["without LoRA", "without PROMPT, P_ADAPTER"]
    for variation in found:
        rules_of(variation, manifest_of("unipeft"))


def test_the_experts_of_a_linear_go_one_by_one_and_all_of_them_by_its_name() -> None:
    """More names than an option may have: all experts of a side are more than 64 in an adapter of 16 at each linear."""
    many = [lora(f"{target}/{index}") for target in ("Q", "K", "V", "O", "UP", "DOWN") for index in range(17)]
    manifest = manifest_of("molora", experts=many)
    sides = {variation.name: variation.moa["disable"] for variation in ablations("kinds", manifest)}
    assert sides == {"without attention": ["Q", "K", "V", "O"], "without FFN": ["UP", "DOWN"]}
    one_by_one = ablations("experts", manifest)
    assert (len(one_by_one), one_by_one[1].moa) == (102, {"disable": ["Q/1"]})
    assert len({rules_of(variation, manifest) for variation in one_by_one}) == 102


def test_layers_are_cut_from_the_first_to_the_last() -> None:
    manifest = manifest_of("soft")
    assert names(ablations("layers", manifest)) == ["without layer 0", "without layer 1", "without layer 2"]
    assert names(ablations("layers:2", manifest)) == ["without layers 0-1", "without layer 2"]
    assert names(ablations("layers", manifest_of("partial"))) == ["without layer 0", "without layer 2"], "layer 1 has no experts"


def test_a_sweep_has_what_the_adapter_has() -> None:
    soft, sparse, mola = sweep(manifest_of("soft")), sweep(manifest_of("sparse_fn")), sweep(manifest_of("mola_layerwise"))
    assert [variation.moa["top_k"] for variation in soft if variation.group == "top-k"] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert {variation.group for variation in soft} == {"constant threshold", "top-k"}, "it is soft, and has no threshold to scale"
    assert {variation.group for variation in sparse} == {"soft", "own threshold scaled", "constant threshold", "top-k"}
    assert [variation.moa["top_k"] for variation in mola if variation.group == "top-k"] == [3, 1], "2 is its own"
    assert [variation.moa["top_k"] for variation in sweep(manifest_of("unipeft")) if variation.group == "top-k"] == [1]


def test_options_are_named_as_they_were_given() -> None:
    manifest = manifest_of("soft")
    assert given({"threshold": {"constant": 0.5}, "top_k": 2}, manifest).name == "threshold constant 0.5, top_k 2"
    assert given({"disable": ["PROMPT", "Q@1"]}, manifest).name == "disable PROMPT Q@1"
    with pytest.raises(InvalidRequest, match=r"moa.top_k is 12"):
        given({"top_k": 12}, manifest)


@pytest.mark.parametrize("wanted", ["kind", "layers:0", "layers:", "layers:x", "", "experts:2"])
def test_an_unknown_ablation_is_named(wanted: str) -> None:
    with pytest.raises(InvalidRequest, match="but must be kinds, experts, layers, or layers:N") as caught:
        check_ablation(wanted)
    assert caught.value.param == "ablate"


def test_an_adapter_without_a_router_has_nothing_to_leave_out() -> None:
    with pytest.raises(InvalidRequest, match="ablate needs an adapter with a router, but all experts of a composition always count"):
        ablations("kinds", manifest_of("composition"))
    with pytest.raises(InvalidRequest, match="sweep needs an adapter with a router, but all experts of a lora always count"):
        sweep(manifest_of("lora"))
    only_q = manifest_of("soft", experts=[lora("Q")])
    with pytest.raises(InvalidRequest, match="ablate kinds leaves nothing of this soft_moa"):
        ablations("kinds", only_q)
    assert len(ablations("layers", only_q)) == TINY["num_hidden_layers"]
