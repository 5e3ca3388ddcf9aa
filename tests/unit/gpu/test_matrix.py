"""Steps that are hard on the fused form, in Triton's interpreter, against the definition: mixtures, rules, sizes, overflows."""

import math
from typing import Any

import pytest
import torch
from families import lora, parallel, prompt
from gpu_steps import SMALL, Pair, Text, an_adapter, manifest, manifest_of, random_tensors

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.gpu import rules as gpu_rules
from moa_serve.gpu.layout import SlotShape

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter's numpy, about what is not finite
LAYERS = [0, 1]
ONE = SMALL | {"num_hidden_layers": 1}


def of_families(*families: str, config: dict[str, Any] = SMALL, seed: int = 1) -> dict[str, Adapter]:
    return {family: an_adapter(manifest_of(family, config), seed) for family in families}


def whole(*texts: Text) -> list[tuple[Text, int]]:
    return [(text, text.num_prompt) for text in texts]


# -- mixed batches


@pytest.mark.parametrize(
    "families",
    [
        ("soft", "sparse_const", "partial", "prompt"),
        ("sparse_fn", "nested_hydra", "lora"),
        ("instance", "unipeft", "parallel_adapter", "composition_nested"),
        ("molora", "hydralora", "mola_layerwise", "adamole"),
    ],
    ids=" ".join,
)
def test_families_side_by_side_each_in_its_slot(families: tuple[str, ...]) -> None:
    """Prompts, decoding rows and the base alone in one step; nobody reads another's slot, rules, words or totals."""
    config = SMALL if "partial" in families or "mola_layerwise" in families else ONE
    pair = Pair(of_families(*families, config=config), config, num_slots=len(families) + 1)
    texts = [pair.text(name, 2 + index % 2, seed=index) for index, name in enumerate([None, *families])]
    pair.step(whole(*texts))
    later = pair.text(families[-1], 3, seed=9)
    pair.step([*((text, 1) for text in texts), (later, 3)])


@pytest.mark.parametrize("slot", [0, 1, 4, 15])
def test_a_slot_is_as_good_as_another(slot: int) -> None:
    """Rows, tables and rules of the last slot end where the buffers do."""
    adapters = of_families("sparse_fn", config=ONE)
    pair = Pair(adapters, ONE, num_slots=slot + 1)
    pair.put("sparse_fn", adapters["sparse_fn"], slot)
    text = pair.text("sparse_fn", 3)
    pair.step(whole(text))
    pair.step([(text, 1)])


def test_slots_may_be_further_apart_than_an_int32_counts() -> None:
    """All slots' second factors are more than 2^31 numbers for some twenty adapters of MoLoRA's size on a base of 8 billion."""
    adapters = of_families("lora", config=ONE)
    pair = Pair(adapters, ONE, num_slots=3)
    bank, apart = pair.fused.bank, 2**30
    huge = torch.empty(2 * apart + bank.matrices[0].numel())  # reserved, and only touched where something is read or written
    bank.matrices = huge.as_strided(bank.matrices.shape, (apart, *bank.matrices.stride()[1:]))
    pair.put("lora", adapters["lora"], 2)
    pair.step(whole(pair.text("lora", 1)))


def test_a_slot_keeps_nothing_of_the_one_before() -> None:
    """Wide after narrow and narrow after wide: rows, tables, prompt, rules of options, and where the totals are."""
    adapters = of_families("nested_hydra", "adamole", "soft_softmax", config=ONE)
    pair = Pair({"a": adapters["soft_softmax"]}, ONE, shape=SlotShape.union(SlotShape.of(a.manifest) for a in adapters.values()))
    for name in ("nested_hydra", "adamole", "soft_softmax", "adamole"):
        pair.put("a", adapters[name], 0)
        pair.step(whole(pair.text("a", 2), pair.text("a", 1, moa={"threshold": 0.4})))


def test_a_long_chunk_beside_decoding_rows_of_the_same_adapter() -> None:
    """More tokens than a chunk of a kernel takes, behind keys that are cached."""
    pair = Pair(of_families("nested_hydra", config=ONE), ONE)
    long, short = pair.text("nested_hydra", 40), pair.text("nested_hydra", 1)
    pair.step([(long, 3), (short, 1)])
    pair.step([(short, 1), (long, 18)])
    pair.step([(long, 1), (short, 1)])


def test_the_base_alone_and_wanted_rows() -> None:
    """No adapter's rows are multiplied, and only wanted rows have logits."""
    pair = Pair(of_families("soft", config=ONE), ONE)
    text, other = pair.text(None, 3), pair.text(None, 2)
    pair.step(whole(text, other), logit_rows=[4, 2, 4])
    pair.step([(text, 1), (other, 1)], logit_rows=[])


# -- rules

ROUTED: dict[str, list[dict[str, Any]]] = {
    "soft": [{"threshold": 0.5}, {"top_k": 2}, {"disable": ["PROMPT", "Q@0"], "top_k": 3, "force": ["V"]}],
    "soft_softmax": [{"threshold": 0.1, "force": ["P_ADAPTER"]}, {"top_k": 1}],
    "sparse_fn": [{"mode": "soft"}, {"threshold": {"scale": 1.5}}, {"threshold": {"scale": 0.0}}, {"top_k": 2, "force": ["DOWN@0"]},
                  {"disable": ["*"]}],
    "sparse_const": [{"mode": "soft", "disable": ["O"]}, {"threshold": 1.0}, {"threshold": {"scale": 0.5}, "top_k": 4}],
    "nested_hydra": [{"threshold": 0.6, "force": ["PROMPT"]}, {"mode": "soft"}],
    "instance": [{"threshold": 0.5}, {"top_k": 2, "disable": ["Q"]}],
    "unipeft": [{"threshold": 0.5, "force": ["Q", "V", "DOWN"]}, {"disable": ["P_ADAPTER", "PROMPT"]}],
    "molora": [{"threshold": 0.3}, {"top_k": 1}, {"disable": ["Q/1", "V"]}],
    "hydralora": [{"top_k": 2, "force": ["K/3"]}, {"disable": ["UP@0"]}],
    "mola_layerwise": [{"mode": "soft"}, {"top_k": 1}, {"threshold": 0.4, "disable": ["DOWN/0"]}],
    "adamole": [{"mode": "soft"}, {"threshold": 0.25}, {"threshold": {"scale": 2.0}, "top_k": 2}, {"disable": ["GATE"]}],
    "partial": [{"threshold": {"scale": 0.5}}, {"force": ["Q"]}],
}  # fmt: skip


@pytest.mark.parametrize("family", ROUTED)
def test_rows_of_one_adapter_under_different_rules(family: str) -> None:
    """Every option of routing, in one step with the adapter's own way; and when they decode, where weights are known by then."""
    config = SMALL if family == "partial" else ONE
    pair = Pair(of_families(family, config=config), config)
    texts = [pair.text(family, 1 + index % 2, moa=moa, seed=index) for index, moa in enumerate([None, *ROUTED[family]])]
    pair.step(whole(*texts))
    if family in ("instance", "unipeft"):
        pair.step([(text, 1) for text in texts])


def test_there_is_room_for_any_number_of_kinds_of_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that has more than there are rows for, and later ones that take rows of options that nobody has any more."""
    monkeypatch.setattr(gpu_rules, "NUM_OPTIONS", 2)
    pair = Pair(of_families("sparse_const", config=ONE), ONE)
    texts = [pair.text("sparse_const", 1, moa={"threshold": 0.1 + 0.15 * index}, seed=index) for index in range(5)]
    pair.step(whole(*texts[:2]))
    pair.step([(texts[0], 1), *whole(texts[2])])
    pair.step([(texts[1], 1), (texts[0], 1), (texts[2], 1), *whole(*texts[3:])])
    pair.step([(text, 1) for text in reversed(texts)])


# -- sizes


def many_experts(count: int, select: dict[str, Any], variant: str, finalise: str) -> Manifest:
    router = {"site": "linear", "input": "linear", "activation": "softmax", "select": select, "finalise": finalise}
    return manifest(ONE, variant, router, [lora(f"Q/{index}", layers=[0], rank=1) for index in range(count)])


@pytest.mark.parametrize("moa", [None, {"disable": ["Q/63", "Q/0"]}, {"top_k": 3, "force": ["Q/63"]}, {"threshold": 0.02}], ids=str)
def test_sixty_four_experts(moa: dict[str, Any] | None) -> None:
    """The last one's bit is the sign of the number that has them."""
    pair = Pair({"a": an_adapter(many_experts(64, {"kind": "top_k", "k": 60}, "mola", "renormalise"))}, ONE)
    pair.step(whole(pair.text("a", 2, moa=moa)))


def test_every_layer_has_its_own_number_of_experts() -> None:
    """One, two, three and none; what a wider layer said must not be read in a narrower one."""
    config = SMALL | {"num_hidden_layers": 4}
    router = {"site": "linear", "input": "linear", "activation": "softmax", "select": {"kind": "top_k", "k": 1}, "finalise": "renormalise"}
    layers = [[2], [0, 2], [0, 2, 3]]
    experts = [lora(f"{target}/{2 - place}", layers=layers[place], rank=3 - place) for target in ("DOWN",) for place in range(3)]
    pair = Pair({"a": an_adapter(manifest(config, "mola", router, experts))}, config)
    text = pair.text("a", 2)
    pair.step(whole(text))
    pair.step([(text, 1)])


@pytest.mark.parametrize(
    ("rank", "length", "size", "more"),
    [
        (1, 1, 1, {"head_dim": 6, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_bias": True}),
        (3, 10, 5, {"head_dim": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "mlp_bias": True, "tie_word_embeddings": False}),
        (17, 17, 3, {"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 2048}),
        (2, 16, 16, {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": False}),
    ],
    ids=str,
)
def test_sizes_and_bases(rank: int, length: int, size: int, more: dict[str, Any]) -> None:
    """No size fills its tile; biases and norms as the families of bases have them; a row's keys shared out to several programs."""
    config = ONE | more
    experts = [lora(target, rank=rank, layers=[0]) for target in ("Q", "K", "V", "O", "UP", "GATE", "DOWN")]
    experts += [prompt(length=length, layers=[0]), parallel(size=size, layers=[0])]
    router = {"site": "layer", "input": "residual", "bias": rank % 2 == 0, "select": {"kind": "constant", "threshold": 0.4}}
    pair = Pair({"a": an_adapter(manifest(config, "sparse_moa", router, experts))}, config)
    text, base = pair.text("a", 3), pair.text(None, 2)
    pair.step(whole(base, text))
    pair.step([(text, 1), (base, 1)])


def test_a_tile_is_not_the_whole_row() -> None:
    """Columns beyond one program's, in the residual stream and in the feed-forward, and the first program alone says what routers say."""
    config = ONE | {"hidden_size": 136, "intermediate_size": 260}
    pair = Pair(of_families("nested_hydra", config=config), config)
    pair.step(whole(pair.text("nested_hydra", 1)))


def test_a_router_without_hidden_units_says_its_bias() -> None:
    manifest_ = manifest(
        SMALL, "soft_moa", {"site": "layer", "input": "normed", "net": "swiglu", "hidden": [0, 4]}, [lora("Q", layers=LAYERS)]
    )
    pair = Pair({"a": an_adapter(manifest_)})
    pair.step(whole(pair.text("a", 2)))


# -- edges of a choice, and what is not finite


@pytest.mark.parametrize(("bias", "kept"), [(0.0, 2), (-1e-6, 0), (50.0, 2), (-200.0, 0)])
def test_a_score_equal_to_its_threshold_is_kept(bias: float, kept: int) -> None:
    """`>=`, with exactly one half for a zero; and nothing at all, or everything, kept."""
    made = manifest(
        ONE, "sparse_moa", {"site": "layer", "input": "residual", "select": {"kind": "constant", "threshold": 0.5}},
        [lora("Q", layers=[0]), parallel(layers=[0])],
    )  # fmt: skip
    tensors = random_tensors(made)
    tensors["layers.0.router.weight"].zero_()
    tensors["layers.0.router.bias"].fill_(bias)
    pair = Pair({"a": an_adapter(made, tensors=tensors)}, ONE)
    pair.step(whole(pair.text("a", 2)))
    assert pair.ours.counters["a", False].selected.sum() == 2 * kept


def test_of_equal_scores_the_first_are_kept() -> None:
    made = manifest_of("mola_layerwise", ONE)
    tensors = random_tensors(made)
    for name, tensor in tensors.items():
        if ".router." in name:
            tensor.zero_()
    pair = Pair({"a": an_adapter(made, tensors=tensors)}, ONE)
    pair.step(whole(pair.text("a", 2), pair.text("a", 1, moa={"top_k": 1})))


def overflowing(made: Manifest, *names: str) -> Adapter:
    """Finite weights that overflow in use."""
    tensors = random_tensors(made)
    for name in names:
        tensors[name].fill_(3e38)
    return an_adapter(made, tensors=tensors)


@pytest.mark.parametrize("family", ["soft", "molora", "instance"])
def test_what_overflows_in_one_slot_is_nobody_elses(family: str) -> None:
    """Rows of the same step and the same products; its totals stay numbers; and nothing is left for the slot's next adapter."""
    made = manifest_of(family, ONE)
    names = [name for name in made.expected_tensors() if name.endswith(("lora_A", "down.weight", "router.weight", ".w1.weight"))]
    adapters = of_families("soft", config=ONE) | {"bad": overflowing(made, *names)}
    healthy, pair = Pair(adapters, ONE), Pair(adapters, ONE)
    expected = healthy.alone(whole(healthy.text("soft", 2), healthy.text(None, 1)))
    found = pair.alone(whole(pair.text("soft", 2), pair.text("bad", 2), pair.text(None, 1)))
    assert not bool(found[2:4].isfinite().all())
    torch.testing.assert_close(found[[0, 1, 4]], expected, atol=1e-5, rtol=1e-5)
    counters = pair.ours.counters["bad", False]
    assert all(bool(getattr(counters, name).isfinite().all()) for name in ("selected", "gate_sum", "thresholds", "computed"))
    pair.put("bad", adapters["soft"], 1)
    torch.testing.assert_close(pair.alone(whole(pair.text("bad", 2))), expected[:2], atol=1e-5, rtol=1e-5)


def test_one_row_of_nan_stays_one_row() -> None:
    """Its neighbours in the chunk are of the same adapter, and its totals stay numbers."""
    config = ONE
    pair = Pair(of_families("sparse_fn", config=config), config)
    expected = pair.step(whole(*(pair.text("sparse_fn", 1, seed=index) for index in range(3))))
    texts = [pair.text("sparse_fn", 1, seed=index) for index in range(3)]
    texts[1].tokens[0] = 19
    pair.fused.weights.embed[19] = math.nan
    found = pair.alone(whole(*texts))
    assert bool(found[1].isnan().all())
    torch.testing.assert_close(found[[0, 2]][:, :19], expected[[0, 2]][:, :19], atol=1e-5, rtol=1e-5)
    assert bool(pair.ours.counters["sparse_fn", False].gate_sum.isfinite().all())


def test_an_expert_that_is_not_kept_may_overflow() -> None:
    """0 * inf is NaN: what a router leaves out is not multiplied by its 0."""
    made = manifest_of("sparse_const", ONE)
    names = [name for name in made.expected_tensors() if ".router." not in name and not name.endswith(("rows", "gate"))]
    tensors = random_tensors(made)
    for name in names:
        if name.endswith(("lora_A", "lora_B", "up.weight")):
            tensors[name].mul_(1e38)
    for name in made.expected_tensors():
        if name.endswith("router.w2.bias"):
            tensors[name].fill_(-50)
    pair = Pair({"a": an_adapter(made, tensors=tensors)}, ONE)
    assert bool(pair.alone(whole(pair.text("a", 2))).isfinite().all())


# -- instance level, and adapters that fit into no slot


@pytest.mark.parametrize("family", ["instance", "unipeft"])
def test_prompts_beside_rows_whose_weights_are_known(family: str) -> None:
    """In one segment; and a sequence that is computed again in chunks keeps what its whole prompt has said."""
    pair = Pair(of_families(family))
    one, two = pair.text(family, 5), pair.text(family, 3, seed=1)
    pair.step(whole(one))
    pair.step([(one, 1), *whole(two)])
    pair.step([(two, 1), (one, 1)])
    one.computed = 0
    pair.step([(one, 2), (two, 1)])
    pair.step([(one, 5), (two, 1)])


@pytest.mark.parametrize("family", ["instance", "unipeft", "sparse_fn"])
def test_branches_have_the_weights_of_their_prompt(family: str) -> None:
    """What is computed behind a prompt in the same step is no part of the mean, and still weighed by it."""
    pair = Pair(of_families(family))
    text, other = pair.text(family, 3, branches=[2, 1]), pair.text(family, 2, seed=3)
    pair.step([(other, 2), (text, 6)])


def test_layers_without_experts_have_no_weights_to_keep() -> None:
    """A sequence takes its instance-level weights along, and what an earlier step left in memory is none of them."""
    made = manifest(SMALL, "soft_moa_instance", {"site": "layer", "input": "pooled"}, [lora("Q", layers=[1]), lora("V", layers=[1])])
    pair = Pair({"pooled": an_adapter(made)} | of_families("soft"))
    pair.step(whole(pair.text("soft", 3)))
    pair.step(whole(pair.text("pooled", 3)))


def test_adapters_too_large_for_a_slot_are_computed_apart() -> None:
    """Among others, with traces, totals, instance-level weights, options and branches."""
    adapters = of_families("sparse_fn", "instance", "molora", config=ONE)
    pair = Pair(adapters, ONE, shape=SlotShape.of(adapters["sparse_fn"].manifest))
    texts = [
        pair.text("instance", 2),
        pair.text(None, 2, seed=1),
        pair.text("molora", 2, branches=[2, 1]),
        pair.text("molora", 1, moa={"top_k": 1}),
        pair.text("sparse_fn", 3),
    ]
    work = [(text, text.num_prompt + sum(end - start for start, end in text.branches)) for text in texts]
    pair.step(work)
    texts.pop(2)
    pair.step([(text, 1) for text in texts], logit_rows=[3, 0])
    pair.step([(texts[0], 1), (texts[2], 1)])
