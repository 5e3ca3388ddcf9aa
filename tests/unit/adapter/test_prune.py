"""Pruning: a pruned adapter is the whole one with the same experts disabled, and what cannot be that is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS, computing
from families import FAMILIES, TINY, random_adapter, raw_manifest, write_base, write_family

from moa_serve import LLM, SamplingParams
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.prune import prune, units_of
from moa_serve.errors import InvalidRequest

PROMPT = [5, 17, 80, 3, 44, 44, 9]
LAYERS = range(TINY["num_hidden_layers"])

CASES: dict[str, tuple[str, list[str], int]] = {
    # name: family, what goes, and how many experts that are, each layer's counted
    "one expert": ("soft", ["PROMPT"], 3),
    "of some layers": ("soft", ["Q@0-1", "P_ADAPTER@2", "GATE@1"], 4),
    "a whole layer": ("soft", ["*@1"], 9),
    "all but one": ("soft", ["*@0-1", "Q@2", "K@2", "V@2", "O@2", "UP@2", "GATE@2", "DOWN@2", "PROMPT@2"], 26),
    "below a threshold function": ("sparse_fn", ["O", "V@1-2", "*@0"], 13),
    "below a constant, narrower routers": ("sparse_const", ["K@0", "UP@1", "DOWN@2", "P_ADAPTER"], 6),
    "of a prompt": ("instance", ["V", "*@2"], 11),
    "a kind of UniPEFT": ("unipeft", ["Q@0", "V@0", "DOWN@0", "PROMPT@1", "P_ADAPTER@1"], 5),
    "nested": ("nested_molora", ["V", "P_ADAPTER@0"], 4),
    "nested, HydraLoRA": ("nested_hydra", ["K@1", "PROMPT", "P_ADAPTER@2"], 5),
    "where few stand": ("partial", ["DOWN@0-2", "PROMPT"], 3),
    "softmax, in the midst": ("soft_softmax", ["K", "PROMPT@1"], 4),
    "softmax, the last": ("soft_softmax", ["P_ADAPTER", "DOWN@0", "Q@2", "*@1"], 13),
    "MoLA": ("mola_layerwise", ["Q/0@1", "GATE/1@1", "GATE/0@2", "GATE/2@2", "DOWN@2", "Q@0"], 10),
    "linears of MoLoRA": ("molora", ["Q@0", "DOWN@1-2"], 12),
    "linears of HydraLoRA": ("hydralora", ["K", "UP@0"], 16),
    "linears of AdaMoLE": ("adamole", ["GATE@1", "Q/0@0", "Q/1@0", "Q/2@0", "Q/3@0"], 8),
}
ROUNDS = ("softmax, the last", "MoLA")  # the same formula, but a sum in another order or over fewer outputs


def name_of(case: str) -> str:
    return case.replace(" ", "-").replace(",", "")


@pytest.fixture(scope="module", params=BACKENDS)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    root = tmp_path_factory.mktemp("pruned")
    adapters = {family: write_family(root / family, family) for family in {family for family, *_ in CASES.values()}}
    for case, (family, entries, _) in CASES.items():
        manifest, tensors = random_adapter(family)
        pruned = prune(manifest, entries, revision="r")
        adapters[name_of(case)] = root / name_of(case)
        write_adapter(root / name_of(case), pruned.manifest, pruned.tensors(tensors))
    with LLM(write_base(root / "base"), adapters=adapters, dtype="float32", kv_cache_bytes=2**22, **computing(request.param)) as made:
        yield made


@pytest.mark.parametrize("case", CASES)
def test_a_pruned_adapter_is_the_whole_one_with_those_experts_disabled(llm: LLM, case: str) -> None:
    """Else whoever tried the suggestion on live traffic tried something else than what is then served."""
    family, entries, _ = CASES[case]
    asked = {"disable": entries}
    found, expected = llm.logits(PROMPT, adapter=name_of(case)), llm.logits(PROMPT, adapter=family, moa=asked)
    if llm.backend == "native" and case not in ROUNDS:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)  # logits reach 20
    assert (found - llm.logits(PROMPT, adapter=family)).abs().max() > 1e-3, "the experts must matter, or this test shows nothing"
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    (mine,) = llm.generate([PROMPT], params, adapter=name_of(case))
    (theirs,) = llm.generate([PROMPT], params, adapter=family, moa=asked)
    assert mine.token_ids == theirs.token_ids


@pytest.mark.parametrize("case", CASES)
def test_what_goes_is_gone_from_manifest_and_tensors(case: str) -> None:
    family, entries, count = CASES[case]
    manifest, tensors = random_adapter(family)
    pruned = prune(manifest, entries, revision="r")
    assert len(pruned.removed) == count == experts(manifest) - experts(pruned.manifest)
    left = pruned.tensors(tensors)
    assert {name: tuple(tensor.shape) for name, tensor in left.items()} == pruned.manifest.expected_tensors()
    assert pruned.num_bytes(tensors) == sum(tensor.nbytes for tensor in left.values()) < sum(tensor.nbytes for tensor in tensors.values())


def experts(manifest: Manifest) -> int:
    return sum(len(manifest.layer(layer).experts) for layer in LAYERS)


ONE_BY_ONE = [family for family in FAMILIES if FAMILIES[family][1]["site"] != "none" and family != "mola_layerwise"]


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_one_after_the_other_is_as_all_at_once(family: str) -> None:
    """Else columns or rows would be lost on the way. No expert is in no unit."""
    whole, tensors = random_adapter(family)
    units = units_of(whole)
    members = sorted((unit.layer, name) for unit in units for name in unit.experts)
    assert members == sorted((layer, expert.name) for layer in LAYERS for expert in whole.layer(layer).experts)
    names = {name for unit in units if unit.layer == 2 for name in units[-1].experts}
    at_once = prune(whole, ["*@0", *(f"{name}@2" for name in names)], revision="r")
    going = [unit for unit in units if set(unit.experts) <= {name for layer, name in at_once.removed if layer == unit.layer}]
    left, manifest = tensors, whole
    for unit in going:
        step = prune(manifest, [f"{name}@{unit.layer}" for name in unit.experts], revision="r")
        left, manifest = step.tensors(left), step.manifest
    assert manifest.expected_tensors() == at_once.manifest.expected_tensors()
    assert [manifest.layer(layer) for layer in LAYERS] == [at_once.manifest.layer(layer) for layer in LAYERS]
    expected = at_once.tensors(tensors)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in left.items())


def test_the_manifest_keeps_what_stays_true() -> None:
    raw = raw_manifest("mola_layerwise") | {"training": {"steps": 3}, "description": "mine", "license": "free"}
    names = [[expert.name for expert in Manifest.parse(raw).layer(layer).experts] for layer in LAYERS]
    use = [{name: {"weight": round(0.01 * (layer + int(name[-1])), 2), "selected": 1.0} for name in names[layer]} for layer in LAYERS]
    whole = Manifest.parse(raw | {"profile": {"num_tokens": 7, "layers": use}})
    pruned = prune(whole, ["Q/0@1", "*@0"], revision="abc").manifest
    assert (pruned.description, pruned.license, pruned.defaults) == ("mine", "free", None)
    assert pruned.training == {"steps": 3, "pruned": [{"revision": "abc", "experts": ["*@0", "Q/0@1"]}]}
    assert pruned.profile is not None
    assert (pruned.profile["num_tokens"], pruned.profile["layers"][0], pruned.profile["layers"][2]) == (7, None, use[2])
    renamed = {f"Q/{index - 1}": use[1][f"Q/{index}"] for index in (1, 2)}
    assert pruned.profile["layers"][1] == renamed | {name: told for name, told in use[1].items() if name[0] != "Q"}
    again = prune(pruned, ["Q@1"], revision="def").manifest
    assert again.training is not None
    assert [step["revision"] for step in again.training["pruned"]] == ["abc", "def"]


def test_a_profile_of_another_form_is_left_alone() -> None:
    strange: list[Any] = [{"layers": 3}, {"layers": [1, 2, 3]}, {"by": "me"}]
    for profile in strange:
        whole = Manifest.parse(raw_manifest("soft") | {"profile": profile})
        assert prune(whole, ["Q"], revision="r").manifest.profile == profile


BAD: dict[str, tuple[str, list[str], str]] = {
    "everything": ("soft", ["*"], "every expert of the adapter"),
    "nothing": ("soft", [], "names no expert"),
    "no such expert": ("soft", ["Q/0"], "prune has 'Q/0', but there is no such expert"),
    "no such layer": ("soft", ["Q@3"], "layers go from 0 to 2"),
    "an inner expert": ("nested_hydra", ["K.0"], "prune has 'K.0'"),
    "half of a shared weight": ("unipeft", ["Q"], "share a weight with V, DOWN: name all"),
    "one of MoLoRA's": ("molora", ["Q/1@0"], "prune has 1 of the 4 experts at Q of layer 0, but in a molora what each of them weighs"),
    "one of HydraLoRA's": ("hydralora", ["K/1"], "remove all with 'K@0', or none"),
    "one of AdaMoLE's": ("adamole", ["Q/0@2"], "in a adamole"),
    "fewer than MoLA keeps": ("mola_layerwise", ["Q/0@1", "Q/1@1"], "leaves 1 of the experts at Q of layer 1, but its router keeps 2"),
    "no router": ("composition", ["Q"], "all experts of a composition always count"),
    "too many entries": ("soft", [f"Q@{index}" for index in range(65)], "at most 64"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_the_same_is_refused(case: str) -> None:
    """An adapter that answers otherwise than the disabled one that was tried would be worse than none."""
    family, entries, part = BAD[case]
    with pytest.raises(InvalidRequest) as caught:
        prune(Manifest.parse(raw_manifest(family)), entries, revision="r")
    assert caught.value.param == "prune"
    assert part in str(caught.value)


def test_a_pruned_folder_is_plain_json(tmp_path: Path) -> None:
    """Places of experts that are the default ones are not written down."""
    manifest, tensors = random_adapter("soft")
    pruned = prune(manifest, ["PROMPT@0"], revision="r")
    write_adapter(tmp_path / "new", pruned.manifest, pruned.tensors(tensors))
    written = json.loads((tmp_path / "new" / "adapter.json").read_text())
    assert not any("column" in expert for expert in written["experts"])
    assert next(expert["layers"] for expert in written["experts"] if expert["name"] == "PROMPT") == [1, 2]
