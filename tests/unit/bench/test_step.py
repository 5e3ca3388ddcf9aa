"""The numbers of `bench step`: what is counted, what is compared with what, what is refused."""

import json
from typing import Any

import pytest
from families import TINY

from moa_serve.bench import goals
from moa_serve.bench.goals import Judged
from moa_serve.bench.step import Plan, measure, read_bandwidth, step_weights
from moa_serve.bench.timing import Spread
from moa_serve.config import ModelConfig
from moa_serve.errors import InvalidRequest
from moa_serve.model.backend import Backend


def test_the_bytes_of_a_step() -> None:
    """By hand: Q and O 32x32, K and V 16x32, three FFN linears 48x32, three layers, and a head of 96x32."""
    weights = 3 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 96 * 32
    assert weights == 26_112
    config = ModelConfig.from_hf(TINY)
    assert step_weights(config) == weights


def test_a_measurement_has_sensible_numbers(fresh_model: Backend) -> None:
    plan = Plan(rows=(1, 8), prefills=(32,), families=("molora", "soft_moa_no_prompt"), rounds=1, inner_steps=1, context=16)
    report = measure(fresh_model, plan, bandwidth=lambda: 1e15)
    found: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    sizes = found["sizes"]
    assert [(size["rows"], size["tokens"]) for size in sizes] == [(1, 1), (8, 1), (1, 32)]
    one = {"base", "control", "soft_moa", "sparse_moa", "molora", "soft_moa_no_prompt"}
    assert [set(size["cases"]) - one for size in sizes] == [set(), {"soft_moa_mixed", "sparse_moa_mixed", "sparse_moa_apart"}, set()]
    for size in sizes:
        base = size["cases"]["base"]
        assert base["to_base"]["median"] == 1
        assert base["selected_share"] is None
        assert size["cases"]["soft_moa"]["selected_share"] == 1
        assert 0 < size["cases"]["sparse_moa"]["selected_share"] < 1
        assert base["tokens_per_second"] == pytest.approx(1e3 * size["rows"] * size["tokens"] / base["ms"]["median"])
        assert {"control", "sparse_to_soft", "sparse_to_soft_no_prompt"} <= set(size["ratios"])
        assert ("sparse_to_soft_ticks" in size["ratios"]) == (fresh_model.name == "native")
        assert (size["cases"]["soft_moa"]["adapter_ticks"] is None) == (fresh_model.name == "torch")
    assert [size["cases"]["soft_moa"]["to_base"]["goal"] for size in sizes] == [1.06, 1.08, 1.10]
    assert sizes[0]["cases"]["molora"]["to_base"]["goal"] is None
    assert ["bandwidth_share" in size["ratios"] for size in sizes] == [True, False, False]
    assert sizes[0]["ratios"]["bandwidth_share"]["is_met"] is False
    assert ["together_to_apart" in size["ratios"] for size in sizes] == [False, True, False]
    cases, mixed = sizes[1]["cases"], sizes[1]["ratios"]["sparse_mixed_throughput"]
    expected = cases["sparse_moa_mixed"]["tokens_per_second"] / cases["sparse_moa"]["tokens_per_second"]
    assert (mixed["median"], mixed["goal"]) == (pytest.approx(expected), 0.87)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"families": ("vera",)}, "families|family is 'vera'"),
        ({"families": ("soft_moa",)}, "must be one of"),
        ({"rows": (8, 0)}, "rows has 0"),
        ({"rows": ()}, "rows are missing"),
        ({"prefills": (1,)}, "prefills has 1"),
        ({"rounds": 0}, "rounds is 0"),
        ({"num_adapters": 1}, "num_adapters is 1"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Plan(**wrong)


def test_a_goal_is_the_most_or_the_least() -> None:
    found = Spread(0.9, 0.8, 1.0)
    assert Judged(found).is_met is None
    assert Judged(found, 0.9).is_met is True
    assert Judged(found, 0.89).is_met is False
    assert Judged(found, 0.89, is_floor=True).is_met is True
    assert Judged(found, 0.91, is_floor=True).to_json() == {"median": 0.9, "low": 0.8, "high": 1.0, "goal": 0.91, "is_met": False}


def test_goals_are_those_of_the_backend_and_the_size() -> None:
    assert [goals.against_authors("native", rows) for rows in (1, 2, 8, 16)] == [5, None, 5, 5]
    assert [goals.against_authors("torch", rows) for rows in (1, 8)] == [2.5, None]
    assert [goals.against_transformers("native", rows) for rows in (1, 8, 16)] == [3.5, 4, None]
    assert goals.against_transformers("torch", 1) is None
    assert [goals.mixed_throughput(weights) for weights in (135_000_000, 1_200_000_000)] == [0.87, 0.95]


def test_memory_gives_some_bytes() -> None:
    assert read_bandwidth() > 1e7
