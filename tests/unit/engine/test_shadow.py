"""The shadow check of an answer: its numbers are those of the definition, and an engine that does it is no other engine afterwards."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import BACKENDS, computing
from engines import PROMPT, ask, events_of, is_idle, until, with_engine
from families import write_base, write_family
from native_tools import SETS

from moa_serve import LLM
from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.importers import read_adapter
from moa_serve.adapter.rules import RoutingOptions, rules_for
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.request import Request, SamplingParams
from moa_serve.engine.runner import Work
from moa_serve.engine.shadow import LOGIT_BYTES, MAX_SCORED, ROWS, ShadowSample, ShadowScore, compare, cut, dense_rules
from moa_serve.errors import Overloaded
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base
from moa_serve.native.model import NativeModel

SPARSE = ("sparse_fn", "sparse_const", "mola_layerwise", "adamole")
LONG = tuple(1 + 7 * index % 90 for index in range(150))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shadow")
    write_base(place / "base")
    for family in (*SPARSE, "soft", "instance", "lora"):
        write_family(place / family, family)
    return place


@pytest.fixture(params=["torch", pytest.param("native", marks=pytest.mark.skipif(not SETS, reason="no native library"))])
def backend(request: pytest.FixtureRequest) -> Any:
    return Transformer if request.param == "torch" else NativeModel


def adapter_of(folder: Path, family: str) -> Adapter:
    return read_adapter(AdapterSource(folder / family), load_base(folder / "base", dtype=torch.float32).config)


def sample_of(adapter: Adapter, prompt: tuple[int, ...], answer: tuple[int, ...], options: RoutingOptions | None = None) -> ShadowSample:
    rules = rules_for(options, adapter.manifest)
    is_sparse, dense = dense_rules(rules, options, adapter.manifest)
    assert is_sparse
    token_ids, num_scored = cut(prompt, answer, vocab_size=96, most=512)
    return ShadowSample("a", adapter.revision, rules, dense, token_ids, num_scored)


async def logits_of(engine: AsyncEngine, sample: ShadowSample, adapter: Adapter) -> list[torch.Tensor]:
    streams = [engine.open(request, adapter) for request in sample.requests()]
    ended = [await events_of(stream) for stream in streams]
    assert [events[-1].finish_reason for events in ended] == ["length"] * 2
    return [torch.cat(stream.collected.logits) for stream in streams if stream.collected]


@pytest.mark.parametrize("options", [None, RoutingOptions(threshold={"scale": 0.5}), RoutingOptions(top_k=2, disable=["Q"])], ids=str)
@pytest.mark.parametrize("family", SPARSE)
def test_the_numbers_are_those_of_the_definition(folder: Path, backend: Any, family: str, options: RoutingOptions | None) -> None:
    """Scored in short steps behind a long prompt, and compared in pieces: the same as two forwards of the whole and three formulas."""
    if options is not None and options.scale is not None and family == "mola_layerwise":
        pytest.skip("has no threshold to scale")
    adapter = adapter_of(folder, family)
    sample = sample_of(adapter, LONG[:100], LONG[100:], options)
    assert sample.num_scored == 50

    async def body(engine: AsyncEngine) -> None:
        sparse, dense = await logits_of(engine, sample, adapter)
        scored = sample.token_ids[-50:]
        parts = [compare(sparse[at : at + ROWS], dense[at : at + ROWS], scored[at : at + ROWS]) for at in range(0, 50, ROWS)]
        score = sum((part for part in parts if part), ShadowScore())
        disabled = {} if options is None else {"disable": options.disable}
        asked = None if options is None else {"threshold": options.threshold, "top_k": options.top_k, **disabled}
        name = "native" if backend is NativeModel else "torch"
        with LLM(folder / "base", adapters={"a": folder / family}, dtype="float32", kv_cache_bytes=2**21, **computing(name)) as llm:
            p, q = (llm.logits(LONG, adapter="a", moa=moa)[99:149].double().softmax(-1) for moa in (asked, {"mode": "soft", **disabled}))
        chosen = torch.tensor(LONG[100:])[:, None]
        assert score.tokens == 50
        assert score.gap == pytest.approx(float((p.gather(-1, chosen) / q.gather(-1, chosen)).log().abs().sum()), rel=1e-4, abs=1e-4)
        assert score.kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-4, abs=1e-4)
        assert score.flips == int((p.argmax(-1) != q.argmax(-1)).sum()) > 0
        await until(lambda: is_idle(engine))

    with_engine(folder / "base", body, make_model=backend)


def test_who_has_left_nothing_out_is_not_asked(folder: Path) -> None:
    """Of a soft adapter, of one that a request had soft, of plain LoRA; nor of an instance-level one, whose weights are of its prompt."""
    soft, sparse = RoutingOptions(mode="soft"), adapter_of(folder, "sparse_fn").manifest
    for family in ("soft", "instance", "lora"):
        assert not dense_rules(None, None, adapter_of(folder, family).manifest)[0]
    assert not dense_rules(rules_for(soft, sparse), soft, sparse)[0]
    ablated = RoutingOptions(mode="soft", disable=["Q"])
    assert not dense_rules(rules_for(ablated, sparse), ablated, sparse)[0]
    top = RoutingOptions(top_k=2)
    dense = adapter_of(folder, "soft").manifest
    assert dense_rules(rules_for(top, dense), top, dense) == (True, None)


@pytest.mark.parametrize(
    ("prompt", "answer", "most", "kept", "scored"),
    [(5, 3, 100, 8, 3), (5, 200, 1000, 205, MAX_SCORED), (90, 50, 100, 100, 10), (100, 5, 100, 0, 0), (5, 0, 100, 0, 0)],
)
def test_what_is_kept_of_an_answer_is_bounded(prompt: int, answer: int, most: int, kept: int, scored: int) -> None:
    token_ids, num_scored = cut(range(prompt), range(answer), vocab_size=96, most=most)
    assert (len(token_ids), num_scored) == (kept, scored)
    _, few = cut(range(prompt), range(10**4), vocab_size=10**6, most=10**5)
    assert 2 * few * 10**6 * 4 <= LOGIT_BYTES


def test_what_is_not_finite_has_no_score() -> None:
    good = torch.randn(3, 9)
    for worst in (torch.nan, torch.inf):
        bad = good.clone()
        bad[1, 4] = worst
        assert compare(good, bad, [1, 2, 3]) is None
        assert compare(bad, good, [1, 2, 3]) is None
    assert compare(good, good, [1, 2, 3]) == ShadowScore(tokens=3)
    banned = good.clone()
    banned[:, 5] = -torch.inf  # a token that can never be: no probability, and no NaN
    assert compare(banned, banned, [1, 2, 3]) == ShadowScore(tokens=3)


def test_who_comes_has_the_next_step_and_the_same_tokens(folder: Path, backend: Any) -> None:
    adapter = adapter_of(folder, "sparse_fn")
    sample = sample_of(adapter, LONG * 2, LONG[:30])

    async def body(engine: AsyncEngine) -> None:
        alone = await events_of(engine.open(ask(12, adapter), adapter))
        steps = recorded(engine)
        streams = [engine.open(request, adapter) for request in sample.requests()]
        await until(lambda: len(steps) >= 2)
        begun = len(steps)
        real = engine.open(ask(12, adapter), adapter)
        assert [stream.is_closed for stream in streams] == [True, True]
        with pytest.raises(Overloaded):
            engine.open(sample.requests()[0], adapter)
        events = await events_of(real)
        first = next(index for index, rows in enumerate(steps) if real.request.request_id in rows)
        assert first <= begun + 1, "it waits for the step that runs, and for no other"
        assert all(rows == {real.request.request_id} for rows in steps[first:])
        assert [event.token_id for event in events] == [event.token_id for event in alone]
        assert [[event.finish_reason for event in await events_of(stream)] for stream in streams] == [["abort"]] * 2
        await until(lambda: is_idle(engine))
        assert not engine.engine.collected

    with_engine(folder / "base", body, make_model=backend)


def recorded(engine: AsyncEngine) -> list[set[str]]:
    """Which requests each step from now on computes."""
    steps: list[set[str]] = []
    run: Callable[[Work], Any] = engine.engine._runner.run

    def noted(work: Work) -> Any:
        steps.append({sequence.request.request_id for sequence, _ in work})
        return run(work)

    engine.engine._runner.run = noted  # type: ignore[method-assign]
    return steps


def test_it_is_no_traffic(folder: Path) -> None:
    """Neither the routers' words nor the slot, the rows or the pages of a shadow may be taken for a client's."""
    adapter = adapter_of(folder, "sparse_fn")
    sample = sample_of(adapter, LONG, LONG[:30])

    async def body(engine: AsyncEngine) -> None:
        await events_of(engine.open(ask(20, adapter, prompt=PROMPT * 10), adapter))
        await until(lambda: is_idle(engine))

        def counted() -> tuple[Any, ...]:
            inner = engine.engine
            totals, altered = inner.routing_totals(adapter.revision), inner.altered_totals(adapter.revision)
            assert totals is not None
            pages = (inner.block_pool.num_kept, inner.scheduler.num_queried_tokens, inner.scheduler.num_hit_tokens)
            return totals.tokens, totals.computed.tolist(), altered, pages, engine.slot_counts.hits, engine.slot_counts.misses

        before, loads = counted(), []
        engine.on_step = lambda *_: loads.append(engine.load)
        idle = engine.idle_seconds
        scoring = asyncio.ensure_future(logits_of(engine, sample, adapter))
        await until(lambda: bool(loads))
        assert engine.num_open == 0
        await scoring
        assert {(load.running, load.waiting) for load in loads} == {(0, 0)}
        assert engine.idle_seconds > idle
        await until(lambda: is_idle(engine))
        assert counted() == before
        assert before[3][0] > 0, "there were pages that could have been found"

    with_engine(folder / "base", body)


@pytest.mark.filterwarnings("ignore")
def test_a_shadow_that_fails_costs_its_adapter_nothing(folder: Path, inject: Callable[..., None], backend: Any) -> None:
    """Nobody was answered wrongly: clients of the adapter are served on, where a request of theirs that failed so would end that."""
    adapter = adapter_of(folder, "sparse_fn")
    sample = sample_of(adapter, PROMPT, PROMPT)

    async def body(engine: AsyncEngine) -> None:
        inject({"at": "forward", "raise": "RuntimeError", "times": 2})  # the step, and then the first of its two runs by itself
        streams = [engine.open(request, adapter) for request in sample.requests()]
        ended = [(await events_of(stream))[-1] for stream in streams]
        assert any(event.error is not None for event in ended)
        assert engine.incidents["forward_error"] > 0
        assert len(await events_of(engine.open(ask(3, adapter), adapter))) == 3
        await until(lambda: is_idle(engine))
        assert not engine.engine.collected
        inject({"at": "forward", "raise": "RuntimeError"})
        assert (await events_of(engine.open(ask(3, adapter), adapter)))[-1].error is not None
        assert engine.engine._faulty == {adapter.revision}

    with_engine(folder / "base", body, make_model=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_collected_from_a_place_on(folder: Path, backend: str) -> None:
    """The smallest thing that the engine had to learn for it: those of the places that are asked for, whatever the chunks."""
    with LLM(folder / "base", dtype="float32", kv_cache_bytes=2**21, max_batch_tokens=32, **computing(backend)) as llm:
        whole = llm.logits(LONG)
        for place in (0, 1, 31, 32, 149):
            request = Request(LONG, SamplingParams(max_tokens=0), collect_logits=True, collect_from=place)
            sequence = llm._engine.add(request)
            while sequence.finish_reason is None:
                llm._engine.step()
            found = torch.cat(llm._engine.collected.pop(request.request_id).logits)
            torch.testing.assert_close(found.cpu(), whole[place:].cpu(), rtol=1e-4, atol=1e-4)
