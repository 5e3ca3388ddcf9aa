"""Routing options: what a request may say, what it means for an adapter, and that both backends do it, against a naive loop."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS, computing
from families import FAMILIES, TINY, base_tensors, lora, random_adapter, raw_manifest, write_base, write_family
from naive import NaiveModel

from moa_serve import LLM, SamplingParams
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import Manifest, RouterPlan
from moa_serve.adapter.rules import RouterRule, RoutingOptions, echo, rules_for
from moa_serve.engine.request import kv_root
from moa_serve.errors import InvalidRequest

PROMPT = [5, 17, 80, 3, 44, 44, 9]
ROUTED = [family for family in FAMILIES if FAMILIES[family][1]["site"] != "none"]
LAYERS = range(TINY["num_hidden_layers"])


@pytest.fixture(scope="module", params=BACKENDS)
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    root = tmp_path_factory.mktemp("rules")
    adapters = {family: write_family(root / family, family) for family in FAMILIES}
    with LLM(write_base(root / "base"), adapters=adapters, dtype="float32", kv_cache_bytes=2**22, **computing(request.param)) as made:
        yield made


def manifest_of(family: str) -> Manifest:
    return Manifest.parse(raw_manifest(family))


def on(layers: Any, *names: str) -> set[tuple[int, str]]:
    return {(layer, name) for layer in layers for name in names}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    # name: family, what is asked, and what the naive loop is told of experts
    "sparse as soft": ("sparse_fn", {"mode": "soft"}, {}),
    "half the threshold": ("sparse_fn", {"threshold": {"scale": 0.5}}, {}),
    "twice the threshold": ("sparse_fn", {"threshold": {"scale": 2.0}}, {}),
    "a constant": ("sparse_fn", {"threshold": 0.6}, {}),
    "a constant of a constant": ("sparse_const", {"threshold": {"constant": 0.7}}, {}),
    "a constant in a soft one": ("soft", {"threshold": 0.55}, {}),
    "top 2 of a soft one": ("soft", {"top_k": 2}, {}),
    "top 2 of a sparse one": ("sparse_fn", {"top_k": 2}, {}),
    "top 1 by softmax": ("soft_softmax", {"top_k": 1}, {}),
    "an expert less": ("soft", {"disable": ["PROMPT"]}, {"disable": on(LAYERS, "PROMPT")}),
    "some layers less": ("sparse_fn", {"disable": ["*@1", "Q@0-1"]}, {"disable": on([1], *FAMILIES and [
        "Q", "K", "V", "PROMPT", "O", "UP", "GATE", "DOWN", "P_ADAPTER"]) | on([0, 1], "Q")}),
    "forced": ("sparse_fn", {"force": ["P_ADAPTER", "V@0"]}, {"force": on(LAYERS, "P_ADAPTER") | on([0], "V")}),
    "forced before the largest": ("sparse_fn", {"force": ["K"], "top_k": 2}, {"force": on(LAYERS, "K")}),
    "instance": ("instance", {"threshold": 0.5, "disable": ["DOWN"]}, {"disable": on(LAYERS, "DOWN")}),
    "unipeft's kinds": ("unipeft", {"disable": ["Q", "V", "DOWN"]}, {"disable": on(LAYERS, "Q", "V", "DOWN")}),
    "molora": ("molora", {"top_k": 2}, {}),
    "hydralora": ("hydralora", {"disable": ["K/2", "O@2"]}, {"disable": on(LAYERS, "K/2") | on([2], "O/0", "O/1", "O/2", "O/3")}),
    "mola's k": ("mola_layerwise", {"top_k": 1}, {}),
    "mola as soft": ("mola_layerwise", {"mode": "soft"}, {}),
    "mola without its best": ("mola_layerwise", {"disable": ["Q/0"]}, {"disable": on(LAYERS, "Q/0")}),
    "mola forced": ("mola_layerwise", {"force": ["Q/1"], "threshold": 0.3}, {"force": on(LAYERS, "Q/1")}),
    "adamole as soft": ("adamole", {"mode": "soft"}, {}),
    "adamole, less": ("adamole", {"threshold": {"scale": 0.3}, "top_k": 2}, {}),
    "adamole, a constant": ("adamole", {"threshold": 0.2, "disable": ["Q/3"]}, {"disable": on(LAYERS, "Q/3")}),
    "nested": ("nested_hydra", {"threshold": {"scale": 1.5}, "disable": ["K"]}, {"disable": on(LAYERS, "K")}),
    "partial": ("partial", {"force": ["DOWN"], "threshold": 0.99}, {"force": on([0, 2], "DOWN")}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_options_are_the_naive_loop(llm: LLM, case: str) -> None:
    family, asked, told = CASES[case]
    _, tensors = random_adapter(family)
    naive = NaiveModel(TINY, base_tensors(TINY), raw_manifest(family), tensors, asked | told)
    expected = naive.logits(PROMPT).float()
    found = llm.logits(PROMPT, adapter=family, moa=asked)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)
    assert (found - llm.logits(PROMPT, adapter=family)).abs().max() > 1e-3, "the option must matter, or this test shows nothing"


@pytest.mark.parametrize("case", ["sparse as soft", "top 2 of a sparse one", "forced", "some layers less", "mola's k", "adamole, less"])
def test_routing_tells_what_the_options_kept(llm: LLM, case: str) -> None:
    family, asked, _ = CASES[case]
    own, changed = llm.route(PROMPT, adapter=family), llm.route(PROMPT, adapter=family, moa=asked)
    first = slice(None) if family == "sparse_fn" else slice(2)  # what the first routers of the first layer say is the adapter's own
    torch.testing.assert_close(own.weights[0, :, first], changed.weights[0, :, first], atol=1e-5, rtol=1e-4)
    assert torch.equal(changed.selected, changed.gates != 0)
    assert not torch.equal(own.selected, changed.selected)
    if "top_k" in asked:
        num_routers = 1 if family == "sparse_fn" else 3  # of a layer
        assert int(changed.selected.sum(-1).max()) <= asked["top_k"] * num_routers


@pytest.mark.parametrize("asked", [{"mode": "sparse"}, {"threshold": {"scale": 1.0}}, {"top_k": 9}, {"mode": "sparse", "top_k": 9}])
def test_an_explicit_default_is_the_adapters_own_way(asked: dict[str, Any]) -> None:
    """Equal requests share keys and values, however they are said."""
    assert rules_for(RoutingOptions.of(asked), manifest_of("sparse_fn")) is None


def test_what_does_the_same_has_one_key() -> None:
    manifest = manifest_of("sparse_fn")
    soft = rules_for(RoutingOptions(mode="soft"), manifest)
    assert soft is not None
    assert soft == rules_for(RoutingOptions(threshold=0.0), manifest) == rules_for(RoutingOptions(threshold={"scale": 0.0}), manifest)
    assert soft == rules_for(RoutingOptions(mode="soft", force=["Q"]), manifest)
    ranges = [rules_for(RoutingOptions(disable=names), manifest) for names in (["Q@0-2"], ["Q"], ["Q@0", "Q@1", "Q@2", "Q"])]
    assert len({found.key for found in ranges if found is not None}) == 1
    others = [
        rules_for(options, manifest) for options in (RoutingOptions(threshold=0.5), RoutingOptions(top_k=1), RoutingOptions(disable=["K"]))
    ]
    assert len({found.key for found in [soft, *ranges, *others] if found is not None}) == 5


def test_options_are_part_of_the_identity_of_keys_and_values(llm: LLM) -> None:
    """Else a prompt under other experts would find the pages of this one."""
    params = SamplingParams(temperature=0, max_tokens=4)
    prompt = [(5 * index) % TINY["vocab_size"] for index in range(40)]
    for _ in range(2):
        for asked in (None, {"mode": "soft"}, {"disable": ["V"]}):
            alone = llm.logits(prompt, adapter="sparse_fn", moa=asked)[-1].argmax()
            (completion,) = llm.generate([prompt], params, adapter="sparse_fn", moa=asked)
            assert completion.token_ids[0] == int(alone)
    assert kv_root("b", "f", "t", "r", {"rules": "a"}, "") != kv_root("b", "f", "t", "r", {}, "")


@pytest.mark.parametrize("family", ["sparse_fn", "soft", "instance", "mola_layerwise", "adamole", "nested_hydra"])
def test_an_option_never_changes_another_requests_tokens(llm: LLM, family: str) -> None:
    """Beside requests of the same adapter by its own rules and by others: the same tokens, and on the native backend the same bits."""
    prompts = [[(3 * index + row) % TINY["vocab_size"] for index in range(5 + row)] for row in range(8)]
    asked: list[dict[str, Any] | None] = [
        None,
        {"threshold": 0.3},
        {"disable": ["*@1"]},
        None,
        {"top_k": 1},
        {"mode": "soft"},
        None,
        {"top_k": 2},
    ]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=0)
    together = llm.generate(prompts, params, adapter=family, moa=asked)
    for prompt, options, completion in zip(prompts, asked, together, strict=True):
        (alone,) = llm.generate([prompt], params, adapter=family, moa=options)
        assert completion.token_ids == alone.token_ids
        if llm.backend == "native":
            assert completion.logprobs == alone.logprobs


def test_choices_are_scored_under_options(llm: LLM) -> None:
    choices = [[7, 9], [11]]
    (own,) = llm.score_choices([PROMPT], [choices], adapter="sparse_fn")
    soft, as_own = llm.score_choices([PROMPT] * 2, [choices] * 2, adapter="sparse_fn", moa=[{"mode": "soft"}, None])
    assert [score.logprob for score in as_own] == pytest.approx([score.logprob for score in own], abs=1e-5)
    rows = llm.logits(PROMPT, adapter="sparse_fn", moa={"mode": "soft"}).log_softmax(-1)
    assert soft[1].logprob == pytest.approx(float(rows[-1, 11]), abs=1e-4)


BAD: dict[str, tuple[str | None, dict[str, Any], str, str]] = {
    # name: family, what is asked, the parameter, a part of the message
    "no such mode": ("soft", {"mode": "hard"}, "moa.mode", "'soft' or 'sparse'"),
    "sparse without a threshold": ("soft", {"mode": "sparse"}, "moa.mode", "give moa.threshold or moa.top_k"),
    "soft with a threshold": ("soft", {"mode": "soft", "threshold": 0.5}, "moa.threshold", "leave one"),
    "soft with a top k": ("soft", {"mode": "soft", "top_k": 2}, "moa.top_k", "leave one"),
    "above 1": ("soft", {"threshold": 1.5}, "moa.threshold", "from 0 to 1"),
    "not a number": ("soft", {"threshold": float("nan")}, "moa.threshold", "from 0 to 1"),
    "a truth": ("soft", {"threshold": True}, "moa.threshold", "from 0 to 1"),
    "two thresholds": ("sparse_fn", {"threshold": {"scale": 1, "constant": 1}}, "moa.threshold", "one of"),
    "no threshold": ("sparse_fn", {"threshold": {}}, "moa.threshold", "one of"),
    "a scale of nothing": ("soft", {"threshold": {"scale": 2}}, "moa.threshold", "no threshold to scale"),
    "a scale too large": ("sparse_fn", {"threshold": {"scale": 101}}, "moa.threshold", "from 0 to 100"),
    "top 0": ("soft", {"top_k": 0}, "moa.top_k", "1 or more"),
    "top of more than there are": ("soft", {"top_k": 10}, "moa.top_k", "has 9 weights"),
    "an expert of another family": ("soft", {"disable": ["Q/0"]}, "moa.disable", "there are Q, K, V, PROMPT, O, UP, GATE, DOWN, P_ADAPTER"),
    "a small letter": ("soft", {"disable": ["q"]}, "moa.disable", "there are Q, K"),
    "an inner expert": ("nested_hydra", {"disable": ["K.0"]}, "moa.disable", "there are K, PROMPT"),
    "a layer too many": ("soft", {"force": ["Q@3"]}, "moa.force", "layers go from 0 to 2"),
    "a range that falls": ("soft", {"force": ["Q@2-1"]}, "moa.force", "first of a range"),
    "not in these layers": ("partial", {"disable": ["PROMPT@0-1"]}, "moa.disable", "no such expert in those layers"),
    "disabled and forced": ("soft", {"disable": ["Q"], "force": ["*@1"]}, "moa.force", "'Q' of layer 1"),
    "half of a shared weight": ("unipeft", {"disable": ["Q"]}, "moa.disable", "share a weight with V, DOWN"),
    "forced AdaMoLE": ("adamole", {"force": ["Q/0"]}, "moa.force", "AdaMoLE"),
    "text for a list": ("soft", {"disable": "Q"}, "moa.disable", "a list"),
    "too many": ("soft", {"disable": [f"Q@{index}" for index in range(65)]}, "moa.disable", "at most 64"),
    "no router": ("lora", {"mode": "soft"}, "moa.mode", "all experts of a lora always count"),
    "the base": (None, {"threshold": 0.0}, "moa.threshold", "the base alone has none"),
    "unknown": ("soft", {"treshold": 0.5}, "moa", "there are mode, threshold, top_k, disable, force"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named_with_what_there_is(case: str) -> None:
    family, asked, param, part = BAD[case]
    with pytest.raises(InvalidRequest) as caught:
        rules_for(RoutingOptions.of(asked), None if family is None else manifest_of(family))
    assert caught.value.param == param
    assert part in str(caught.value)


def test_nothing_asked_is_nothing_changed() -> None:
    said: list[dict[str, Any] | None] = [None, {}, {"mode": None, "disable": [], "top_k": None}]
    for nothing in said:
        assert RoutingOptions.of(nothing) is None
    assert rules_for(None, manifest_of("lora")) is None
    assert rules_for(None, None) is None


def test_pressure_raises_thresholds_that_nobody_set() -> None:
    sparse, soft = manifest_of("sparse_fn"), manifest_of("soft")
    raised = rules_for(None, sparse, pressure=1.5)
    assert raised == rules_for(RoutingOptions(threshold={"scale": 1.5}), sparse)
    assert rules_for(RoutingOptions(threshold=0.4), sparse, pressure=1.5) == rules_for(RoutingOptions(threshold=0.4), sparse)
    assert rules_for(RoutingOptions(mode="soft"), sparse, pressure=1.5) == rules_for(RoutingOptions(mode="soft"), sparse)
    assert rules_for(None, soft, pressure=1.5) is None
    assert rules_for(None, manifest_of("lora"), pressure=1.5) is None


def test_an_echo_says_the_mode_that_was_meant() -> None:
    soft, sparse = manifest_of("soft"), manifest_of("sparse_fn")
    assert echo(RoutingOptions(threshold=0.5, disable=["V", "Q", "Q"]), soft) == {
        "mode": "sparse", "threshold": {"constant": 0.5}, "disable": ["Q", "V"],
    }  # fmt: skip
    assert echo(RoutingOptions(disable=["Q"]), soft)["mode"] == "soft"
    assert echo(RoutingOptions(disable=["Q"]), sparse)["mode"] == "sparse"
    assert echo(RoutingOptions(threshold={"scale": 2}), sparse) == {"mode": "sparse", "threshold": {"scale": 2.0}}


@pytest.mark.parametrize("family", ROUTED)
def test_every_router_may_be_silenced(llm: LLM, family: str) -> None:
    """All experts disabled is the base, bit for bit on the native backend: nothing of an expert is left."""
    found, base = llm.logits(PROMPT, adapter=family, moa={"disable": ["*"]}), llm.logits(PROMPT)
    if llm.backend == "native":
        assert torch.equal(found, base)
    torch.testing.assert_close(found, base, atol=1e-5, rtol=1e-5)


def test_64_outputs_fit_into_the_bits() -> None:
    router = RouterPlan.of(0, "Q", 64, ((f"Q/{index}", index) for index in range(64)))
    assert RouterRule(disabled=1 << 63).plain(router).disabled == 1 << 63
    assert router.bits["Q"] == router.used == router.all_outputs == 2**64 - 1


def test_outputs_that_weigh_nothing_are_no_candidates_and_make_no_difference() -> None:
    """As in some of the authors' files: column 0 and 3 of four are used."""
    raw = raw_manifest("sparse_fn")
    manifest = Manifest.parse(raw | {"experts": [lora("Q", column=0), lora("V", column=3)]})
    assert rules_for(RoutingOptions(top_k=2), manifest) is None
    one = rules_for(RoutingOptions(top_k=1), manifest)
    assert one is not None
    assert {rule.disabled for rule in one.rules.values()} == {0b0110}
    with pytest.raises(InvalidRequest, match="has 2 weights"):
        rules_for(RoutingOptions(top_k=3), manifest)


def test_nothing_left_is_one_rule_however_it_is_said() -> None:
    manifest = manifest_of("sparse_fn")
    ways: list[dict[str, Any]] = [
        {"disable": ["*"]},
        {"disable": ["*"], "threshold": 0.3},
        {"disable": ["*"], "mode": "soft"},
        {"disable": ["*@0-1", "*@2"], "top_k": 2},
    ]
    assert len({found.key for asked in ways if (found := rules_for(RoutingOptions.of(asked), manifest)) is not None}) == 1
    adamole = manifest_of("adamole")
    assert rules_for(RoutingOptions(threshold=0.0), adamole) == rules_for(RoutingOptions(threshold={"scale": 0}), adamole)
    assert rules_for(RoutingOptions(threshold=0.5), manifest) == rules_for(RoutingOptions(threshold=0.5 + 1e-12), manifest), "one float32"


def test_many_entries_cost_no_more_than_they_are_worth() -> None:
    """Of an adapter with a router at each of seven linears: 64 entries that name all of it take no ten times as long as one."""
    experts = [
        lora(f"{target}/{index}", layers=list(LAYERS)) for target in ("Q", "K", "V", "O", "UP", "GATE", "DOWN") for index in range(16)
    ]
    manifest = Manifest.parse(raw_manifest("mola_layerwise") | {"experts": experts})
    assert len(manifest.routers) == 7 * len(LAYERS)

    def seconds(entries: list[str]) -> float:
        times = []
        for attempt in range(5):
            options = RoutingOptions(disable=entries, threshold=0.1 + attempt / 100)  # never asked before
            started = time.perf_counter()
            rules_for(options, manifest)
            times.append(time.perf_counter() - started)
        return min(times)

    many = [f"{target}/{index}@0-{layer}" for target in ("Q", "K") for index in range(10) for layer in LAYERS][:64]
    assert seconds(many) < 10 * seconds(["Q/0"])


def test_a_threshold_is_told_where_a_request_has_one(llm: LLM) -> None:
    """Also of an adapter that has none itself; and none is told where the request has none, though the adapter would."""
    given = llm.route(PROMPT, adapter="soft", moa={"threshold": 0.55})
    assert given.threshold is not None
    assert torch.equal(given.threshold, torch.full_like(given.threshold, 0.55))
    assert torch.equal(given.selected, given.weights >= 0.55)
    assert llm.route(PROMPT, adapter="sparse_fn", moa={"mode": "soft"}).threshold is None
    instance = llm.route(PROMPT, adapter="instance", moa={"threshold": 0.55, "top_k": 3})
    own = llm.route(PROMPT, adapter="instance")
    torch.testing.assert_close(instance.weights[0], own.weights[0], rtol=1e-5, atol=1e-6)
    assert instance.threshold is not None
    assert not torch.equal(instance.weights, instance.gates)


def test_thresholds_are_counted_as_they_were(llm: LLM) -> None:
    """Apart from those of the adapter's own way, and alike on all backends."""
    revision, _ = llm._resolve("soft")
    assert revision is not None
    before = llm._engine.altered_totals(revision)
    llm.logits(PROMPT, adapter="soft", moa={"threshold": 0.55})
    after = llm._engine.altered_totals(revision)
    assert after is not None
    more = after if before is None else after.since(before)
    assert more.thresholds.tolist() == pytest.approx([0.55 * len(PROMPT)] * len(LAYERS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_client_cannot_put_an_adapter_out_of_service_by_what_he_has_it_keep(backend: str, tmp_path: Path) -> None:
    """An expert that the adapter never keeps may overflow: that is seen by who forces it, and by nobody else."""
    manifest, tensors = random_adapter("sparse_fn")
    for layer in LAYERS:
        tensors[f"layers.{layer}.router.bias"][-1] = -30.0  # P_ADAPTER
        tensors[f"layers.{layer}.P_ADAPTER.down.bias"].fill_(10.0)
        tensors[f"layers.{layer}.P_ADAPTER.up.weight"].fill_(3e38)
    write_adapter(tmp_path / "trap", manifest, tensors)
    params = SamplingParams(temperature=0, max_tokens=2)
    with LLM(
        write_base(tmp_path / "base"), adapters={"trap": tmp_path / "trap"}, kv_cache_bytes=2**22, dtype="float32", **computing(backend)
    ) as llm:
        (own,) = llm.generate([PROMPT], params, adapter="trap")
        for moa in ({"mode": "soft"}, {"force": ["P_ADAPTER"]}, {"threshold": 0.0}, {"mode": "soft"}):
            (completion,) = llm.generate([PROMPT], params, adapter="trap", moa=moa)
            assert completion.finish_reason == "error"
            assert "routing options" in str(completion.error)
        (again,) = llm.generate([PROMPT], params, adapter="trap")
        assert again.token_ids == own.token_ids
