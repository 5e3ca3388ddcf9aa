"""Totals of routing, against the routing itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES, write_base, write_family
from native_tools import SETS

from moa_serve import LLM, SamplingParams

PROMPTS = [[5, 17, 80, 3], [44, 44, 9]]


@pytest.mark.parametrize("backend", ["torch", *(["native"] if SETS else [])])
@pytest.mark.parametrize("family", FAMILIES)
def test_totals_are_the_sums_of_what_was_routed(family: str, backend: str, tmp_path: Path) -> None:
    """A scrape must be able to say which expert acted how often, whatever the family."""
    adapters = {"a": write_family(tmp_path / "a", family)}
    with LLM(write_base(tmp_path / "base"), adapters=adapters, backend=backend, device="cpu", kv_cache_bytes=2**20) as llm:
        revision = llm._store.get("a").revision
        assert llm._engine.routing_totals(revision) is None, "the self-test is not traffic"
        completions = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=3), adapter="a")
        totals = llm._engine.routing_totals(revision)
        assert totals is not None
        computed = [prompt + completion.token_ids[:-1] for prompt, completion in zip(PROMPTS, completions, strict=True)]
        assert totals.tokens == sum(map(len, computed))
        if llm._resolve("a")[1].router.site == "none":  # type: ignore[union-attr]
            assert not totals.selected.any()
            return
        if llm._resolve("a")[1].is_pooled:  # type: ignore[union-attr]
            return  # routing a completion pools over other tokens than generating it did
        routings = [llm.route(ids, adapter="a") for ids in computed]
        np.testing.assert_array_equal(totals.selected, sum(r.selected.sum(1).double().numpy() for r in routings))
        cells = np.array([[float(column < len(names)) for column in range(totals.computed.shape[1])] for names in totals.experts])
        if backend == "torch":
            np.testing.assert_array_equal(totals.computed, totals.tokens * cells)
        if routings[0].threshold is not None:
            thresholds = sum(r.threshold.double().sum(1).numpy() for r in routings if r.threshold is not None)
            np.testing.assert_allclose(totals.thresholds, thresholds, rtol=1e-5)
        np.testing.assert_allclose(totals.gate_sum, sum(r.gates.double().sum(1).numpy() for r in routings), rtol=1e-4, atol=1e-4)


def test_options_that_are_looked_into_are_counted_by_themselves(tmp_path: Path) -> None:
    """One sum over all options would tell nobody what his own did; and the adapter's own figures must hold neither."""
    asked: list[dict[str, Any]] = [{"top_k": 1}, {"top_k": 3}, {"mode": "soft"}]
    adapters = {"a": write_family(tmp_path / "a", "sparse_fn")}
    params = SamplingParams(temperature=0, max_tokens=3)
    with LLM(write_base(tmp_path / "base"), adapters=adapters, device="cpu", kv_cache_bytes=2**20) as llm:
        for moa in asked[:2]:
            before = llm.routing_totals("a", moa)
            assert before is not None
            assert before.tokens == 0
        llm.generate([PROMPTS[0]] * 4, params, adapter="a", moa=[*asked, None])
        own, one, three = llm.routing_totals("a"), *(llm.routing_totals("a", moa) for moa in asked[:2])
        rest = llm._engine.altered_totals(llm._store.get("a").revision)
        assert own is not None
        assert one is not None
        assert three is not None
        assert rest is not None
        tokens = len(PROMPTS[0]) + 2
        assert [totals.tokens for totals in (own, one, three, rest)] == [tokens] * 4
        assert one.selected.sum() <= tokens * 3 < three.selected.sum() <= tokens * 9
        assert rest.selected.sum() == tokens * 27
        llm._engine = llm._engine.rebuilt()
        llm.generate([PROMPTS[0]], params, adapter="a", moa=asked[0])
        again = llm.routing_totals("a", asked[0])
        assert again is not None
        assert again.tokens == 2 * tokens
        llm.unload_adapter("a")
        llm.load_adapter("a", tmp_path / "a")
        fresh = llm.routing_totals("a", asked[0])
        assert fresh is not None
        assert fresh.tokens == 0
