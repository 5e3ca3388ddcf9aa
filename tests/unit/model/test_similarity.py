"""Similarity of experts: CKA against its definition, and every family's outputs against a naive loop that knows no stacked tensors."""

import itertools
import math
from typing import Any

import pytest
import torch
from families import FAMILIES, TINY, base_tensors, random_adapter, raw_manifest, write_base
from naive import ORDER, NaiveModel
from torch import Tensor

from moa_serve.model.build import build
from moa_serve.model.similarity import (
    ACROSS,
    MAX_TOKENS,
    Similarity,
    expert_similarity,
    linear_cka,
    mean_absolute_cosine,
    mean_over_layers,
    place_of,
)
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base

PROMPTS = [[5, 17, 80, 3, 44, 44, 9], [61, 2, 33, 90, 7]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Transformer:
    base = load_base(write_base(tmp_path_factory.mktemp("base")), dtype=torch.float32)
    return Transformer(base.config, base.weights)


class OutputsOfEach(NaiveModel):
    """Keeps what every expert adds to each token alone and with the weight 1: `outputs[layer][name]` is a list over tokens."""

    def __init__(self, family: str) -> None:
        super().__init__(TINY, base_tensors(TINY), raw_manifest(family), random_adapter(family)[1])
        self.outputs: dict[int, dict[str, list[Tensor]]] = {}

    def keep(self, layer: int, name: str, output: Tensor) -> None:
        self.outputs.setdefault(layer, {}).setdefault(name, []).append(output)

    def lora(self, layer: int, target: str, u: Tensor, weights: dict[str, float]) -> Tensor:
        prefix = f"layers.{layer}.{target}"
        for expert in self.experts(layer):
            if expert["name"].split("/")[0] != target:
                continue
            if "inner" in expert:
                for index in range(expert["inner"]["num_experts"]):
                    self.keep(layer, f"{target}.{index}", self.one_lora(f"{prefix}.{index}", prefix, expert, u, 1.0))
            else:
                self.keep(layer, expert["name"], self.one_lora(f"layers.{layer}.{expert['name']}", prefix, expert, u, 1.0))
        return super().lora(layer, target, u, weights)

    def parallel(self, layer: int, m: Tensor, weights: dict[str, float]) -> Tensor:
        prefix = f"layers.{layer}.P_ADAPTER"
        for expert in self.experts(layer):
            if expert["name"] != "P_ADAPTER":
                continue
            if "inner" not in expert:
                self.keep(layer, "P_ADAPTER", super().parallel(layer, m, {}))
                continue
            for index in range(expert["inner"]["num_experts"]):
                low = self.affine(f"{prefix}.down" if f"{prefix}.down.weight" in self.t else f"{prefix}.{index}.down", m)
                self.keep(layer, f"P_ADAPTER.{index}", self.affine(f"{prefix}.{index}.up", low * torch.sigmoid(low)))
        return super().parallel(layer, m, weights)

    def prompt(self, layer: int, q: list[Tensor], n: Tensor, weights: dict[str, float]) -> list[Tensor]:
        for expert in self.experts(layer):
            if expert["name"] != "PROMPT":
                continue
            if "inner" not in expert:
                self.keep(layer, "PROMPT", torch.cat(super().prompt(layer, q, n, {})))
                continue
            for index in range(expert["inner"]["num_experts"]):
                self.keep(layer, f"PROMPT.{index}", self.one_prompt(layer, q, index, expert["length"]))
        return super().prompt(layer, q, n, weights)

    def one_prompt(self, layer: int, q: list[Tensor], index: int, length: int) -> Tensor:
        """The rows of one inner expert, in the softmax over all of them."""
        rows, gate = self.t[f"layers.{layer}.PROMPT.rows"], self.t[f"layers.{layer}.PROMPT.gate"]
        heads, group = [], len(q) // TINY["num_key_value_heads"]
        for head, query in enumerate(q):
            kv = slice(head // group * len(query), (head // group + 1) * len(query))
            keys, values = (rows @ self.base[f"model.layers.{layer}.self_attn.{part}_proj.weight"][kv].T for part in ("k", "v"))
            share = (keys @ query / math.sqrt(len(query))).softmax(0)
            own = slice(index * length, (index + 1) * length)
            heads.append(gate[head] * (share[own] @ values[own]))
        return torch.cat(heads)


def naive_outputs(family: str) -> list[dict[str, Tensor]]:
    """By layer and expert (T, d) float64 over all tokens of PROMPTS but their first ones."""
    layers: list[dict[str, list[Tensor]]] = [{} for _ in range(TINY["num_hidden_layers"])]
    for prompt in PROMPTS:
        naive = OutputsOfEach(family)
        naive.logits(prompt)
        for layer, experts in naive.outputs.items():
            for name, tokens in experts.items():
                layers[layer].setdefault(name, []).extend(tokens[1:])
    return [{name: torch.stack(tokens) for name, tokens in experts.items()} for experts in layers]


def song_hsic(x: Tensor, y: Tensor) -> float:
    """Song et al. 2012, equation 5, sum by sum."""
    n = len(x)
    grams = [(z @ z.T).tolist() for z in (x, y)]
    k, l = ([[0.0 if i == j else gram[i][j] for j in range(n)] for i in range(n)] for gram in grams)  # noqa: E741
    trace = sum(k[i][j] * l[j][i] for i in range(n) for j in range(n))
    totals = sum(map(sum, k)) * sum(map(sum, l)) / ((n - 1) * (n - 2))
    mixed = 2 / (n - 2) * sum(sum(a) * sum(b) for a, b in zip(k, l, strict=True))
    return (trace + totals - mixed) / (n * (n - 3))


def naive_cka(x: Tensor, y: Tensor) -> float:
    return song_hsic(x, y) / math.sqrt(song_hsic(x, x) * song_hsic(y, y))


def unit(x: Tensor) -> Tensor:
    return torch.stack([row / math.sqrt(float(row @ row)) for row in x])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the two measures


def test_cka_equals_its_definition_for_outputs_of_any_width() -> None:
    outputs = [normal(12, 5), normal(12, 9, seed=1) + 3, normal(12, 5) @ normal(5, 2, seed=2)]
    found = linear_cka(outputs)
    for i, j in itertools.product(range(3), repeat=2):
        assert float(found[i, j]) == pytest.approx(naive_cka(outputs[i], outputs[j]), abs=1e-12)


def test_cka_does_not_see_rotation_scale_and_shift() -> None:
    x = normal(40, 8)
    rotation = torch.linalg.qr(normal(8, 8, seed=1)).Q
    found = linear_cka([x, 7 * x @ rotation + 100])
    torch.testing.assert_close(found, torch.ones(2, 2, dtype=torch.float64))


def test_cka_of_unrelated_outputs_is_about_0_at_every_width() -> None:
    """The biased estimator would say 0.2 for the wide ones."""
    found = linear_cka([normal(300, width, seed=width) for width in (2, 16, 64, 65)])
    assert (found - torch.eye(4)).abs().max() < 0.05


def test_outputs_that_tell_no_token_apart_have_no_cka() -> None:
    x, constant = normal(10, 4), normal(1, 4).expand(10, 4)
    found = linear_cka([x, constant, torch.zeros(10, 3)])
    assert found.isnan().tolist() == [[False, True, True], [True] * 3, [True] * 3]
    assert linear_cka([x[:3], x[:3]]).isnan().all(), "three tokens have no unbiased estimate"


def test_mean_absolute_cosine_equals_a_loop_and_leaves_out_tokens_without_output() -> None:
    x, y = normal(6, 4), normal(6, 4, seed=1)
    y[2] = 0
    found = mean_absolute_cosine([x, y, torch.zeros(6, 4)])
    cosines = [abs(float(a @ b)) / math.sqrt(float(a @ a) * float(b @ b)) for a, b in zip(x, y, strict=True) if b.any()]
    assert float(found[0, 1]) == pytest.approx(sum(cosines) / 5)
    assert [float(found[0, 0]), float(found[1, 1])] == pytest.approx([1, 1])
    assert found[2].isnan().all()


# -- experts of adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_compared_as_in_a_naive_loop(model: Transformer, family: str) -> None:
    """What each expert adds before the router's weight, in every family and for inner experts; first tokens and lengths do not count."""
    manifest, tensors = random_adapter(family)
    weights = build(manifest, tensors, model.weights, model.config, model.dtype)
    found, num_tokens = expert_similarity(model, weights, PROMPTS)
    assert num_tokens == sum(map(len, PROMPTS)) - len(PROMPTS)
    for layer, expected in zip(found, naive_outputs(family), strict=True):
        if layer is None:
            assert not expected
            continue
        assert sorted(layer.experts) == sorted(expected)
        assert layer.experts == sorted(layer.experts, key=lambda name: ORDER.index(place_of(name)))
        for (i, a), (j, b) in itertools.combinations_with_replacement(enumerate(layer.experts), 2):
            x, y = unit(expected[a]), unit(expected[b])
            assert float(layer.cka[i, j]) == pytest.approx(naive_cka(x, y), abs=2e-3), (a, b)
            if place_of(a) == place_of(b):
                assert float(layer.cosine[i, j]) == pytest.approx(float((x * y).sum(1).abs().mean()), abs=1e-3), (a, b)
            else:
                assert layer.cosine[i, j].isnan()


def test_two_equal_experts_are_a_collapse(model: Transformer) -> None:
    manifest, tensors = random_adapter("molora")
    for name in tensors:
        if ".Q/1." in name:
            tensors[name] = tensors[name.replace("Q/1", "Q/0")] * (2 if name.endswith("B") else 1)
    found, _ = expert_similarity(model, build(manifest, tensors, model.weights, model.config, model.dtype), [list(range(40))])
    layer = found[0]
    assert layer is not None
    assert [float(layer.cka[0, 1]), float(layer.cosine[0, 1])] == pytest.approx([1, 1], abs=1e-4)
    assert layer.collapse["Q"].cka > layer.collapse["V"].cka


def test_a_long_text_is_cut(model: Transformer) -> None:
    manifest, tensors = random_adapter("lora")
    weights = build(manifest, tensors, model.weights, model.config, model.dtype)
    _, num_tokens = expert_similarity(model, weights, [[1] * 10, [], [2, 3] * MAX_TOKENS, [4] * 10])
    assert num_tokens == MAX_TOKENS - 2


# -- numbers for places and layers


def similarity(experts: list[str], cka: list[list[float]], cosine: Any = math.nan) -> Similarity:
    values = torch.tensor(cka, dtype=torch.float64)
    return Similarity(experts, values, torch.full_like(values, cosine))


def test_collapse_is_the_mean_over_pairs_of_different_experts() -> None:
    found = similarity(["Q/0", "Q/1", "V/0"], [[1, 0.8, 0.1], [0.8, 1, 0.3], [0.1, 0.3, 1]], 0.5)
    assert found.places == ["Q", "V"]
    assert {place: value.cka for place, value in found.collapse.items()} == pytest.approx({"Q": 0.8, ACROSS: 0.2})
    assert found.collapse["Q"].cosine == 0.5
    assert found.between("V", "Q").cka == pytest.approx(0.2)
    assert math.isnan(found.between("V", "V").cka)
    assert similarity(["PROMPT"], [[1]]).collapse == {}


def test_layers_are_averaged_where_a_pair_can_be_compared() -> None:
    nan = math.nan
    first = similarity(["Q", "P_ADAPTER"], [[1, 0.2], [0.2, 1]])
    second = similarity(["Q", "V", "P_ADAPTER"], [[1, 0.5, 0.4], [0.5, 1, nan], [0.4, nan, 1]])
    mean = mean_over_layers([first, None, second])
    assert mean.experts == ["Q", "V", "P_ADAPTER"]
    assert mean.cka[0].tolist() == pytest.approx([1, 0.5, 0.3])
    assert mean.cka[1, 2].isnan()
