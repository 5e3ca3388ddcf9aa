"""The numbers of `bench growth`: what is varied, what is divided by what, what is refused."""

import json
from typing import Any

import pytest

from moa_serve.bench.growth import ROWS, Plan, measure
from moa_serve.errors import InvalidRequest
from moa_serve.model.backend import Backend

ALL = {"rows": (1, 9), "context": (20, 33), "adapters": (1, 8), "experts": (2, 3), "active": (0, 50, 100)}


def test_one_thing_is_varied_at_a_time(fresh_model: Backend) -> None:
    report = measure(fresh_model, Plan(values=ALL, rounds=1, inner_steps=1))
    found: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    varied = {growth["thing"]: {point["value"]: point["cases"] for point in growth["points"]} for growth in found["varied"]}
    assert list(varied) == list(ALL)
    whole = {"base", "control", "soft_moa", "sparse_moa"}
    cases = {thing: {value: set(of) for value, of in points.items()} for thing, points in varied.items()}
    assert cases["rows"] == {1: whole, 9: whole}
    assert cases["context"] == {20: whole, 33: whole}
    fixed = {None: {"base", "control"}}
    assert cases["adapters"] == fixed | {value: {"soft_moa", "sparse_moa"} for value in (1, 8)}
    assert cases["experts"] == fixed | {value: {"molora", "hydralora", "mola"} for value in (2, 3)}
    both = {None: {"base", "control", "base 1 row", "control 1 row"}}
    assert cases["active"] == both | {value: {"sparse_moa", "sparse_moa 1 row"} for value in (0, 50, 100)}

    for thing, points in varied.items():
        for value, of in points.items():
            for name, case in of.items():
                base = "base 1 row" if name.endswith("1 row") else "base"
                ms, first = case["ms"]["median"], points.get(None, points[ALL[thing][0]])[base]["ms"]["median"]
                assert case["to_base"]["median"] == pytest.approx(ms / of.get(base, points.get(None, {}).get(base))["ms"]["median"])
                assert case["to_first"]["median"] == pytest.approx(ms / first)
                rows = 1 if name.endswith("1 row") else value if thing == "rows" else ROWS
                assert case["tokens_per_second"] == pytest.approx(1e3 * rows / ms)
                if name.startswith(("base", "control")) or fresh_model.name == "torch":
                    assert case["adapter_part"] is None
                else:
                    own, start = case["adapter_ticks"], points[ALL[thing][0]][name]["adapter_ticks"]
                    assert case["adapter_part"]["median"] == pytest.approx(own / start)

    shares = {value: of["sparse_moa"]["selected_share"] for value, of in varied["active"].items() if value is not None}
    assert (shares[0], shares[100]) == (0, 1)
    assert 0.2 < shares[50] < 0.8
    assert varied["experts"][3]["mola"]["selected_share"] == pytest.approx(2 / 3)
    goals = {value: of["soft_moa"]["to_base"]["goal"] for value, of in varied["adapters"].items() if value is not None}
    assert goals == {1: 1.08, 8: None}
    assert varied["rows"][1]["sparse_moa"]["to_base"]["goal"] == 1.06


def test_a_batch_has_as_many_adapters_as_it_says(fresh_model: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter eight times would cost what one does."""
    counts = set()
    forward = fresh_model.forward

    def counted(batch: Any, attention: Any) -> Any:
        if len(batch.token_ids) == ROWS:
            counts.add(len({id(segment.adapter) for segment in batch.segments}))
        return forward(batch, attention)

    monkeypatch.setattr(fresh_model, "forward", counted)
    measure(fresh_model, Plan(values={"adapters": (2, 4)}, rounds=1, inner_steps=1))
    assert counts == {0, 2, 4}


def test_a_longer_context_than_the_bases_is_refused(fresh_model: Backend) -> None:
    with pytest.raises(InvalidRequest, match="context has 512, but the base was made for 512"):
        measure(fresh_model, Plan(values={"context": (128, 512)}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "nothing is varied"),
        ({"rows": ()}, "nothing is varied"),
        ({"threads": (1,)}, "'threads' cannot be varied"),
        ({"rows": (0, 1)}, "rows has 0, but must be from 1"),
        ({"adapters": (1, 9)}, "adapters has 9, but must be from 1 to 8"),
        ({"experts": (1,)}, "experts has 1"),
        ({"active": (50, 101)}, "active has 101, but must be from 0 to 100"),
        ({"context": (64, 64)}, "context has a value twice"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Plan(values=values)
