"""The routing of an answer's tokens as they are drawn: what `route` says of the same tokens afterwards, and nothing else changes for it."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, TINY, random_adapter, write_base, write_family
from native_tools import SETS

from moa_serve import LLM, Routing, SamplingParams
from moa_serve.adapter.manifest import Manifest
from moa_serve.engine.engine import TokenEvent
from moa_serve.engine.request import Request, Sequence
from moa_serve.engine.routing import TokenRouting, expert_names, has_thresholds
from moa_serve.engine.runner import StepOutput
from moa_serve.model.batch import ForwardBatch, RoutingTrace

ROUTED = [family for family in FAMILIES if random_adapter(family)[0].router.site != "none"]
BACKENDS = [("native", "bfloat16"), ("native", "float32"), ("torch", "float32")]
TIGHT = {"max_num_seqs": 6, "max_batch_tokens": 12, "max_mixed_prefill_tokens": 5, "num_slots": 2}
with_backends = pytest.mark.parametrize(("backend", "dtype"), BACKENDS, ids=lambda part: part)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("routing")
    return {"base": write_base(root / "base")} | {family: write_family(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> Iterator[Callable[..., LLM]]:
    """One LLM with all families for each backend and dtype."""
    made: dict[tuple[str, str], LLM] = {}

    def get(backend: str, dtype: str) -> LLM:
        if (backend, dtype) not in made:
            made[backend, dtype] = open_llm(folders, backend, dtype)
        return made[backend, dtype]

    yield get
    for llm in made.values():
        llm.close()


def open_llm(folders: dict[str, Path], backend: str, dtype: str, **options: Any) -> LLM:
    if backend == "native" and not SETS:
        pytest.skip("the native library is not built")
    names = {name: folder for name, folder in folders.items() if name != "base"}
    where = {"backend": backend, "device": "cpu", "dtype": dtype}
    return LLM(folders["base"], adapters=names, **where, **({"kv_cache_bytes": 2**22} | options))


def draw(length: int, seed: int) -> tuple[int, ...]:
    drawn = random.Random(seed)
    return tuple(drawn.randrange(TINY["vocab_size"]) for _ in range(length))


def ask(llm: LLM, prompt: tuple[int, ...], name: str | None, *, routing: bool = True, max_tokens: int = 6, **more: Any) -> Request:
    revision, manifest = llm._resolve(name)
    params = SamplingParams(**({"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": 2} | more.pop("params", {})))
    pooled = manifest is not None and manifest.is_pooled
    return Request(prompt, params, revision, is_pooled=pooled, return_routing=routing and name is not None, **more)


def answers(llm: LLM, requests: list[Request]) -> tuple[list[Sequence], list[list[TokenEvent]]]:
    """The sequences, all in one batch as far as there is room, and the events of each."""
    events: dict[Sequence, list[TokenEvent]] = {}
    with llm._exclusive():
        sequences = [llm._engine.add(request) for request in requests]
        while llm._engine.has_work:
            for event in llm._engine.step():
                assert event.error is None, event.error
                events.setdefault(event.sequence, []).append(event)
    for request in requests:
        llm._engine.collected.pop(request.request_id, None)
    return sequences, [events[sequence] for sequence in sequences]


def words_of(event: TokenEvent) -> Any:
    assert event.routing is not None
    assert event.routing.words is not None
    return event.routing.words


def expected_words(manifest: Manifest, routing: Routing, place: int) -> Any:
    """What the event of the token behind `place` must carry, put together from the public `Routing`."""
    names = expert_names(manifest)
    weights = [routing.weights[layer, place, : len(experts)] for layer, experts in enumerate(names)]
    selected = [routing.selected[layer, place, : len(experts)].float() for layer, experts in enumerate(names)]
    thresholds: list[Any] = []
    if has_thresholds(manifest):
        assert routing.threshold is not None
        thresholds = [routing.threshold[layer, place][None] for layer, experts in enumerate(names) if experts]
    return torch.cat(weights + selected + thresholds).numpy()


@with_backends
@pytest.mark.parametrize("family", ROUTED)
def test_it_is_what_route_says_of_the_token_before(opened: Callable[..., LLM], family: str, backend: str, dtype: str) -> None:
    """A place too early or too late, another layer's columns or gates instead of weights would show; natively it is equal bit by bit."""
    llm = opened(backend, dtype)
    prompt = draw(9, seed=len(family))
    _, manifest = llm._resolve(family)
    assert manifest is not None
    (_,), (events,) = answers(llm, [ask(llm, prompt, family)])
    tokens = [event.token_id for event in events if event.token_id is not None]
    assert len(tokens) == 6
    # Of instance level the weights are the prompt's alone, and the same for every token.
    routing = llm.route(prompt if manifest.is_pooled else (*prompt, *tokens), adapter=family)
    for index, event in enumerate(events):
        place = len(prompt) - 1 + (0 if manifest.is_pooled else index)
        expected = expected_words(manifest, routing, place)
        found = words_of(event)
        assert found.dtype == np.float32
        if backend == "native":
            assert np.array_equal(found, expected)
        else:
            np.testing.assert_allclose(found, expected, atol=1e-5)


@with_backends
def test_asking_changes_no_number_of_anybody(opened: Callable[..., LLM], backend: str, dtype: str) -> None:
    """Tokens and log-probabilities of every row of a mixed batch, natively bit by bit; and it does not split the prefix cache."""
    llm = opened(backend, dtype)
    names: list[str | None] = [*FAMILIES, None]
    jobs = [(draw(3 + 5 * (place % 4), seed=place), name) for place, name in enumerate(names)]
    runs: list[Any] = []
    for asking in (lambda _: False, lambda _: True, lambda place: place % 2 == 0):
        is_routed = [asking(place) and name in ROUTED for place, name in enumerate(names)]
        salt = f"run {len(runs)}"  # nobody's pages: the steps are the same
        requests = [ask(llm, prompt, name, routing=routed, salt=salt) for (prompt, name), routed in zip(jobs, is_routed, strict=True)]
        _, found = answers(llm, requests)
        for events, routed in zip(found, is_routed, strict=True):
            assert all((event.routing is not None) == routed for event in events)
        runs.append([[(event.token_id, event.logprob) for event in events] for events in found])
    assert runs[0] == runs[1] == runs[2]
    prompt = draw(40, seed=1)
    sequences = [answers(llm, [ask(llm, prompt, "sparse_fn", routing=routed)])[0][0] for routed in (False, True, True, False)]
    assert [sequence.num_cached for sequence in sequences] == [0, 32, 32, 32]


@with_backends
@pytest.mark.parametrize("family", ["soft", "sparse_const", "instance", "mola_layerwise", "nested_hydra"])
def test_hits_chunks_and_preemption_lose_and_double_nothing(
    folders: dict[str, Path], opened: Callable[..., LLM], family: str, backend: str, dtype: str
) -> None:
    """A token's routing is told once, whatever became of its row; the last token of a prompt is computed even where all of it was kept."""
    roomy = opened(backend, dtype)
    prompts = [draw(length, seed=length) for length in (1, 3, 16, 17, 20, 33)]
    alone = [answers(roomy, [ask(roomy, prompt, family, max_tokens=45)])[1][0] for prompt in prompts]
    again, hits = answers(roomy, [ask(roomy, prompt, family, max_tokens=45) for prompt in prompts])
    assert [sequence.num_cached for sequence in again] == ([0] * 6 if family == "instance" else [0, 0, 0, 16, 16, 32])
    page = roomy._engine.model.bytes_per_block(16)
    with open_llm({"base": folders["base"], family: folders[family]}, backend, dtype, kv_cache_bytes=9 * page, **TIGHT) as tight:
        _, anew = answers(tight, [ask(tight, prompt, family, max_tokens=45) for prompt in prompts])
        assert tight._engine.num_preemptions > 0
    for found in (hits, anew):
        for events, expected in zip(found, alone, strict=True):
            assert [event.token_id for event in events] == [event.token_id for event in expected]
            for event, other in zip(events, expected, strict=True):
                np.testing.assert_allclose(words_of(event), words_of(other), rtol=0, atol=0 if backend == "native" else 1e-5)


@with_backends
@pytest.mark.parametrize("options", [{}, TIGHT], ids=["roomy", "tight"])
def test_evaluations_add_up_to_what_the_metrics_count(
    folders: dict[str, Path], opened: Callable[..., LLM], backend: str, dtype: str, options: dict[str, Any]
) -> None:
    """Mixed adapters and tiles, chunks, hits, and rows that are computed anew: all that was computed is somebody's, once."""
    page_bytes = opened(backend, dtype)._engine.model.bytes_per_block(16)
    names = ["sparse_fn", "partial", "mola_layerwise", "soft"]
    chosen = {"base": folders["base"]} | {name: folders[name] for name in names}
    if options:
        options = options | {"kv_cache_bytes": 9 * page_bytes}
    with open_llm(chosen, backend, dtype, **options) as llm:
        for name in names:
            llm._engine.forget_routing(str(llm._resolve(name)[0]))  # of the self-test
        jobs = [(draw(5 + 11 * (place % 4), seed=place), name) for place, name in enumerate(names * 3)]
        base = [ask(llm, draw(20, seed=50 + place), None) for place in range(2)]
        sequences, found = answers(llm, [ask(llm, prompt, name, max_tokens=40) for prompt, name in jobs] + base)
        again, more = answers(llm, [ask(llm, prompt, name) for prompt, name in jobs])
        assert (llm._engine.num_preemptions > 0) == bool(options)
        assert options or any(sequence.num_cached for sequence in again)
        of_adapter: dict[str | None, list[TokenRouting]] = {}
        for sequence, events in zip([*sequences, *again], found + more, strict=True):
            if (last := events[-1].routing) is not None:
                of_adapter.setdefault(sequence.request.adapter, []).append(last)
        for name in names:
            revision = str(llm._resolve(name)[0])
            totals = llm._engine.routing_totals(revision)
            assert totals is not None
            assert sum(one.num_tokens for one in of_adapter[revision]) == totals.tokens
            assert sum(one.num_evaluations for one in of_adapter[revision]) == totals.computed.sum()
            is_sparse = backend == "native" and name not in ("soft", "partial")
            assert (totals.computed.sum() < totals.tokens * sum(map(len, totals.experts))) or not is_sparse


@with_backends
def test_a_prompt_leaves_no_traces(opened: Callable[..., LLM], monkeypatch: pytest.MonkeyPatch, backend: str, dtype: str) -> None:
    """A long prompt's would be megabytes a step; and adapters that nobody asks about are not looked into."""
    llm = opened(backend, dtype)
    seen: list[RoutingTrace | None] = []
    outputs: list[StepOutput] = []
    forward, run = llm._engine.model.forward, llm._engine._runner.run

    def watched(batch: ForwardBatch, attention: Any) -> Any:
        logits = forward(batch, attention)
        seen.append(batch.trace)
        return logits

    def watched_run(work: Any) -> StepOutput:
        outputs.append(run(work))
        return outputs[-1]

    monkeypatch.setattr(llm._engine.model, "forward", watched)
    monkeypatch.setattr(llm._engine._runner, "run", watched_run)
    answers(llm, [ask(llm, draw(500, seed=1), "soft", max_tokens=4), ask(llm, draw(30, seed=2), "molora", routing=False, max_tokens=4)])
    traces = [trace for trace in seen if trace is not None]
    assert traces
    assert all(len(trace.segments) <= 1 for trace in traces)
    assert [len(segment.words) for trace in traces for segment in trace.segments.values()].count(1) == 4
    assert sum(len(segment.words) for trace in traces for segment in trace.segments.values()) == 4
    assert sum(routing.num_tokens for output in outputs for routing in output.token_routing.values()) == 503
    seen.clear()
    answers(llm, [ask(llm, draw(5, seed=1), name, routing=False) for name in ROUTED])
    assert seen
    assert set(seen) == {None}


@with_backends
def test_a_row_that_only_scores_tells_what_was_computed_and_no_token(opened: Callable[..., LLM], backend: str, dtype: str) -> None:
    llm = opened(backend, dtype)
    _, (events,) = answers(llm, [ask(llm, draw(20, seed=3), "soft", max_tokens=0, prompt_logprobs=0)])
    (event,) = events
    assert event.routing is not None
    assert (event.token_id, event.routing.words, event.routing.num_tokens) == (None, None, 20)
    assert event.routing.num_evaluations == 20 * 27


@with_backends
def test_who_scores_its_prompt_gets_both(opened: Callable[..., LLM], backend: str, dtype: str) -> None:
    llm = opened(backend, dtype)
    prompt = draw(20, seed=4)
    (_,), (plain,) = answers(llm, [ask(llm, prompt, "sparse_fn")])
    (_,), (both,) = answers(llm, [ask(llm, prompt, "sparse_fn", prompt_logprobs=1, collect_routing=True)])
    for one, other in zip(plain, both, strict=True):
        assert one.token_id == other.token_id
        np.testing.assert_allclose(words_of(one), words_of(other), rtol=0, atol=0 if backend == "native" else 1e-5)


@with_backends
def test_a_step_that_had_to_be_divided_tells_the_same(
    opened: Callable[..., LLM], inject: Callable[..., None], backend: str, dtype: str
) -> None:
    """Memory was short: the step is computed in two halves, and nothing is counted for the one that failed."""
    llm = opened(backend, dtype)
    requests = [ask(llm, draw(6, seed=place), "sparse_const") for place in range(4)]
    _, expected = answers(llm, requests)
    inject({"at": "forward", "raise": "MemoryError"})
    _, found = answers(llm, [ask(llm, tuple(request.prompt_ids), "sparse_const") for request in requests])
    for events, others in zip(found, expected, strict=True):
        assert [event.token_id for event in events] == [event.token_id for event in others]
        for event, other in zip(events, others, strict=True):
            np.testing.assert_allclose(words_of(event), words_of(other), rtol=0, atol=0 if backend == "native" else 1e-5)
        assert events[-1].routing is not None
        assert events[-1].routing.num_tokens == 6 + 5
