"""Choices of a prompt are scored as if each stood behind it alone, while the prompt is computed once and everything shares a batch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from backends import exact
from families import FAMILIES, TINY, write_base, write_family, write_tokenizer
from native_tools import overflow
from tokenizers.processors import TemplateProcessing

from moa_serve import LLM, ChoiceScore, SamplingParams
from moa_serve.engine.engine import Collected
from moa_serve.engine.request import Request
from moa_serve.engine.scheduler import SchedulerOutput
from moa_serve.errors import AdapterNonfiniteOutput, ContextLengthExceeded, InvalidRequest, MoaError
from moa_serve.model.attention import PagedAttention
from moa_serve.model.batch import ForwardBatch
from moa_serve.model.transformer import Transformer

PROMPTS = [[5, 17, 80], [3], [44, 44, *range(9, 40)]]
CHOICES = [[[7, 8, 9], [7], [50, 51], [7, 8, 10, 11, 12]], [[1], [2]], [[60, 61], [60, 62], [30] * 20]]
POOLED = ("instance", "unipeft")
OPTIONS: dict[str, Any] = {"device": "cpu", "kv_cache_bytes": 2**21}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    return {family: write_family(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def llm(base: Path, folders: dict[str, Path]) -> Iterator[LLM]:
    with LLM(base, adapters=folders, **OPTIONS) as made:
        yield made


def pages(base: Path, count: int, device: str = "cpu") -> int:
    """Bytes of so many pages of the cache."""
    with LLM(base, **OPTIONS | exact(device)) as llm:
        return count * llm._engine.model.bytes_per_block(16)


def logprobs(scores: list[list[ChoiceScore]]) -> list[float]:
    return [value for row in scores for score in row for value in score.token_logprobs]


def assert_same(one: list[list[ChoiceScore]], other: list[list[ChoiceScore]], tolerance: float = 3e-5) -> None:
    assert [[score.token_ids for score in row] for row in one] == [[score.token_ids for score in row] for row in other]
    np.testing.assert_allclose(logprobs(one), logprobs(other), rtol=0, atol=tolerance)


def assert_clean(llm: LLM) -> None:
    engine = llm._engine
    assert (engine.block_pool.num_held, engine.slot_table.num_busy, engine.collected, engine.has_work) == (0, 0, {}, False)


def echoed(llm: LLM, ids: list[int], adapter: str | None) -> list[float]:
    """Log-probabilities of ids[1:] as `prompt_logprobs` tells them."""
    revision, manifest = llm._resolve(adapter)
    pooled = manifest is not None and manifest.is_pooled
    request = Request(ids, SamplingParams(max_tokens=0), revision, is_pooled=pooled, prompt_logprobs=0)
    llm._engine.add(request)
    while llm._engine.has_work:
        llm._engine.step()
    return [one.logprob for one in llm._engine.collected.pop(request.request_id).prompt_logprobs]


# -- the numbers


@pytest.mark.parametrize("name", [None, *(family for family in FAMILIES if family not in POOLED)])
def test_a_choice_has_the_logprobs_of_prompt_and_choice_in_one_text(llm: LLM, name: str | None) -> None:
    for prompt, choices, scores in zip(PROMPTS, CHOICES, llm.score_choices(PROMPTS, CHOICES, adapter=name), strict=True):
        assert [list(score.token_ids) for score in scores] == choices
        for choice, score in zip(choices, scores, strict=True):
            np.testing.assert_allclose(score.token_logprobs, echoed(llm, prompt + choice, name)[len(prompt) - 1 :], rtol=0, atol=1e-4)
            assert score.logprob == pytest.approx(sum(score.token_logprobs))


@pytest.mark.parametrize("name", [None, *FAMILIES])
def test_a_choice_has_the_logprobs_of_its_generation(llm: LLM, name: str | None) -> None:
    """Instance-level adapters above all: weighed by the mean over prompt and choices, they would be another adapter than the one served."""
    for prompt in PROMPTS:
        params = [SamplingParams(temperature=1.5, seed=seed, max_tokens=1 + seed, logprobs=0) for seed in range(5)]
        written = llm.generate([prompt] * 5, params, adapter=name)
        (scores,) = llm.score_choices([prompt], [[completion.token_ids for completion in written]], adapter=name)
        for completion, score in zip(written, scores, strict=True):
            assert completion.logprobs is not None
            np.testing.assert_allclose(score.token_logprobs, [one.logprob for one in completion.logprobs], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [None, *FAMILIES])
def test_a_choice_sees_nothing_of_the_others(llm: LLM, name: str | None) -> None:
    """A mask that is off by one lets a choice read its neighbour, and the scores depend on the order in a data file."""
    prompt, choices = PROMPTS[0], CHOICES[0]
    together = llm.score_choices([prompt], [choices], adapter=name)
    assert_same([[one for choice in choices for one in llm.score_choices([prompt], [[choice]], adapter=name)[0]]], together)
    assert_same([llm.score_choices([prompt], [choices[::-1]], adapter=name)[0][::-1]], together)
    crowds = [[[90] * 7, *choices, [91], [92, 93]], [[*range(7)], *choices, [4], [5, 6]]]
    one, other = (llm.score_choices([prompt], [crowd], adapter=name)[0][1:-2] for crowd in crowds)
    assert_same([one], together)
    assert one == other, "to the last bit: the same shapes, and other tokens in the other choices"


def test_one_batch_of_all_adapters_gives_each_its_own_scores(base: Path, folders: dict[str, Path], device: str) -> None:
    """Room for two adapters of many, a budget below some prompts, pages for a few rows: everything waits, swaps or runs alone."""
    names = [name for name in (None, *folders) for _ in PROMPTS]
    prompts, choices = PROMPTS * (len(folders) + 1), CHOICES * (len(folders) + 1)
    with LLM(base, adapters=folders, **OPTIONS | exact(device)) as roomy:
        alone = [roomy.score_choices([prompt], [ends], adapter=name)[0] for prompt, ends, name in zip(prompts, choices, names, strict=True)]
        assert_same(roomy.score_choices(prompts, choices, adapter=names), alone)
    tight: dict[str, Any] = {"num_slots": 2, "max_num_seqs": 6, "max_batch_tokens": 24, "kv_cache_bytes": pages(base, 6, device)}
    with LLM(base, adapters=folders, **OPTIONS | tight | exact(device)) as llm:
        assert_same(llm.score_choices(prompts, choices, adapter=names), alone)
        assert_clean(llm)


def test_choices_that_overflow_a_type_do_not_sum_to_infinity(base: Path) -> None:
    """JSON has no infinity, and a sum of it compares equal with every other one."""
    with LLM(base, backend="torch", **OPTIONS) as llm:
        assert isinstance(llm._engine.model, Transformer)
        llm._engine.model.weights.head[7].fill_(3e30)
        ((score,),) = llm.score_choices([[1]], [[[8]]])
        assert score.logprob == -9999.0


# -- what it costs


def test_the_prompt_is_computed_once_and_no_logits_too_many(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a vocabulary of 100,000 the last projection of a prompt costs as much as the prompt, and nobody reads it."""
    forward, seen = llm._engine.model.forward, []

    def counting(batch: ForwardBatch, attention: PagedAttention) -> torch.Tensor:
        assert batch.logit_rows is not None
        seen.append((len(batch.token_ids), len(batch.logit_rows)))
        return forward(batch, attention)

    monkeypatch.setattr(llm._engine.model, "forward", counting)
    llm.score_choices(PROMPTS[2:], CHOICES[2:])
    assert seen == [(33 + 1 + 1 + 19, 1 + 1 + 1 + 19)]


def test_router_counters_count_each_token_once(base: Path, folders: dict[str, Path]) -> None:
    with LLM(base, adapters={"a": folders["soft"]}, **OPTIONS) as llm:
        revision = llm._store.get("a").revision
        llm._engine.forget_routing(revision)
        llm.score_choices(PROMPTS[:1], CHOICES[:1], adapter="a")
        totals = llm._engine.routing_totals(revision)
        assert totals is not None
        assert totals.tokens == 3 + 2 + 0 + 1 + 4
        assert totals.selected.tolist() == [[10.0] * 9] * 3


# -- beside generation, and when something fails


@pytest.mark.parametrize("name", [None, "soft", "instance"])
def test_scores_survive_failed_steps_and_preemption(llm: LLM, base: Path, folders: dict[str, Path], name: str | None) -> None:
    """It starts over: a half-finished try must leave nothing in the scores, nor in the row that runs beside."""
    prompt, choices = PROMPTS[2], [[60] * 9, [61, 62, 63, 64]]
    (expected,) = llm.score_choices([prompt], [choices], adapter=name)
    (beside,) = llm.generate([[1] * 10], SamplingParams(temperature=0, max_tokens=60))
    options = OPTIONS | {"kv_cache_bytes": pages(base, 6), "max_batch_tokens": 32}
    with LLM(base, adapters={name: folders[name]} if name else {}, **options) as tight:
        engine = tight._engine
        writing = engine.add(Request([1] * 10, SamplingParams(temperature=0, max_tokens=60)))
        engine.step()
        request = tight._scoring_request(prompt, choices, name)
        scoring = engine.add(request)
        advance = engine.scheduler.advance
        failures: list[int] = []

        def failing(output: SchedulerOutput) -> None:
            if not scoring.num_preemptions and any(sequence is scoring for sequence, _ in output.chunks):
                failures.append(1)  # what was collected before is not counted twice
                assert len(failures) < 100, "nothing was preempted"
                raise RuntimeError("no step today")
            advance(output)

        engine.scheduler.advance = failing  # type: ignore[method-assign]
        while engine.has_work:
            try:
                engine.step()
            except RuntimeError:
                assert scoring.num_computed == 0
        assert failures
        assert scoring.num_preemptions == 1
        assert writing.token_ids[10:] == beside.token_ids
        collected: Collected = engine.collected.pop(request.request_id)
        found = [ChoiceScore(ids, sum(each), tuple(each)) for ids, each in zip(request.branches, collected.branch_logprobs, strict=True)]
        assert_same([found], [expected])
        assert_clean(tight)


@pytest.mark.parametrize("name", [None, "soft", "instance"])
def test_scoring_beside_generation_changes_neither(llm: LLM, name: str | None) -> None:
    expected = llm.score_choices(PROMPTS, CHOICES, adapter=name)
    params = SamplingParams(temperature=0, max_tokens=12)
    alone = [completion.token_ids for completion in llm.generate(PROMPTS, params, adapter=name)]
    engine, (revision, manifest) = llm._engine, llm._resolve(name)
    pooled = manifest is not None and manifest.is_pooled
    writing = [engine.add(Request(prompt, params, revision, is_pooled=pooled)) for prompt in PROMPTS]
    for _ in range(3):
        engine.step()
    requests = [llm._scoring_request(prompt, ends, name) for prompt, ends in zip(PROMPTS, CHOICES, strict=True)]
    for request in requests:
        engine.add(request)
    while engine.has_work:
        engine.step()
    assert [sequence.token_ids[sequence.num_prompt :] for sequence in writing] == alone
    found = [engine.collected.pop(request.request_id).branch_logprobs for request in requests]
    np.testing.assert_allclose([x for row in found for one in row for x in one], logprobs(expected), rtol=0, atol=3e-5)
    assert_clean(llm)


def test_an_adapter_that_overflows_is_an_error_and_no_score(base: Path, folders: dict[str, Path]) -> None:
    """NaN compares false with everything: the first choice would win every question."""
    with LLM(base, adapters={"bad": folders["lora"]}, **OPTIONS) as llm:
        llm.generate([[1]], SamplingParams(max_tokens=1), adapter="bad")  # its slot is filled now
        slot = llm._engine.slot_table.find(llm._store.get("bad").revision)
        assert slot is not None
        overflow(llm._engine._bank[slot])
        with pytest.raises(AdapterNonfiniteOutput, match="prompt 1 of 3"):
            llm.score_choices(PROMPTS, CHOICES, adapter=[None, "bad", None])
        assert_clean(llm)
        assert llm.score_choices(PROMPTS, CHOICES)


@pytest.mark.parametrize("what", ["generate", "score_choices"])
def test_progress_is_told_prompt_by_prompt(llm: LLM, what: str) -> None:
    """And who is told may raise (Ctrl-C lands anywhere): nothing stays behind."""
    told: list[int] = []

    def run(on_finished: Any) -> list[Any]:
        if what == "generate":
            params = [SamplingParams(temperature=0, max_tokens=count) for count in (5, 1, 3)]
            return list(llm.generate(PROMPTS, params, on_finished=on_finished))
        return list(llm.score_choices(PROMPTS, CHOICES, on_finished=on_finished))

    assert run(told.append) == run(None)
    assert told == [1, 2, 3]

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    assert_clean(llm)


def test_progress_of_a_stop_string_counts_once(tmp_path: Path) -> None:
    """It ends between two steps, where the engine tells of no end."""
    with LLM(write_base(tmp_path, TINY | {"vocab_size": 259}), **OPTIONS) as plain:
        assert plain.tokenizer is None
    write_tokenizer(tmp_path)
    told: list[int] = []
    with LLM(tmp_path, **OPTIONS) as llm:
        params = SamplingParams(temperature=0, max_tokens=8, logit_bias={40: 100.0}, stop=(llm.tokenizer.decode([40]),))  # type: ignore[union-attr]
        completions = llm.generate([[1], [2]], params, on_finished=told.append)
    assert [completion.finish_reason for completion in completions] == ["stop"] * 2
    assert told == [1, 2]


# -- what may be asked


def test_text_is_encoded_on_each_side_by_itself(tmp_path: Path) -> None:
    """A choice that began with a start of text of its own would be scored as the beginning of another document."""
    write_base(tmp_path, TINY | {"vocab_size": 259})
    write_tokenizer(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    with LLM(tmp_path, **OPTIONS) as llm:
        assert llm.tokenizer is not None
        prompt, choice = llm.tokenizer.encode("2 + 2 =", parse_special=True), llm.tokenizer.encode(" 4", parse_special=True)
        assert prompt[0] == choice[0] == 1
        by_text = llm.score_choices(["2 + 2 ="], [[" 4", " 5</s>"]])
        assert by_text[0][0].token_ids == tuple(choice[1:])
        assert by_text[0][1].token_ids[-1] == 2
        assert_same(llm.score_choices([prompt], [[score.token_ids for score in by_text[0]]]), by_text, 0)


def test_arrays_are_ids_and_no_prompts_are_no_work(llm: LLM) -> None:
    expected = llm.score_choices([[5, 17]], [[[7, 8]]])
    assert llm.score_choices([np.array([5, 17])], [[torch.tensor([7, 8])]]) == expected  # type: ignore[list-item]
    assert llm.score_choices([], []) == []


MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "one string": ({"prompts": "hello", "choices": []}, "prompts", "list"),
    "text without a tokenizer": ({"prompts": ["a"], "choices": [[[1]]]}, "prompts", "tokenizer"),
    "a choice of text without a tokenizer": ({"prompts": [[1]], "choices": [["a"]]}, "choices", "tokenizer"),
    "empty prompt": ({"prompts": [[]], "choices": [[[1]]]}, "prompt", "empty"),
    "too few lists of choices": ({"prompts": [[1], [2]], "choices": [[[1]]]}, "choices", "each of the 2 prompts"),
    "no list of choices": ({"prompts": [[1]], "choices": "a"}, "choices", "list"),
    "one text for choices": ({"prompts": [[1]], "choices": ["a"]}, "choices", "list of at least one"),
    "no choices": ({"prompts": [[1], [2]], "choices": [[[1]], []]}, "choices", "prompt 1 of 2: .*at least one"),
    "ids for choices": ({"prompts": [[1]], "choices": [[1, 2]]}, "choices", "type int"),
    "empty choice": ({"prompts": [[1], [2]], "choices": [[[1]], [[1], []]]}, "choices", "prompt 1 of 2: a choice is empty"),
    "id beyond the vocabulary": ({"prompts": [[1], [2]], "choices": [[[1]], [[1], [5, 96]]]}, "choices", "prompt 1 of 2: .*96.*95"),
    "negative id": ({"prompts": [[1]], "choices": [[[-1]]]}, "choices", "-1"),
    "unknown adapter": ({"prompts": [[1]], "choices": [[[1]]], "adapter": "x"}, "adapter", "'x'"),
    "too few adapters": ({"prompts": [[1], [2]], "choices": [[[1]]] * 2, "adapter": [None]}, "adapter", "1 entries"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_by_field_before_anything_runs(llm: LLM, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, param, match = MISTAKES[case]
    with monkeypatch.context() as patch:
        patch.setattr(llm._engine, "step", None)
        with pytest.raises(MoaError, match=match) as caught:
            llm.score_choices(**arguments)
    assert caught.value.param == param
    assert_clean(llm)


def test_the_limits_are_named_and_can_be_used_up(base: Path) -> None:
    """A step of unbounded size is memory of unbounded size: (choices, V) numbers of 4 bytes."""
    options = OPTIONS | {"max_model_len": 40, "max_scored_tokens": 60}
    with LLM(base, **options) as llm:
        llm.score_choices([[1] * 30], [[[2] * 10, [3] * 10, [4] * 10]])
        with pytest.raises(ContextLengthExceeded, match="served context of 40; shorten the prompt") as caught:
            llm.score_choices([[1] * 30], [[[2], [2] * 11]])
        assert caught.value.param == "choices"
        with pytest.raises(ContextLengthExceeded) as caught:
            llm.score_choices([[1] * 40], [[[2]]])
        assert caught.value.param == "prompt"
        with pytest.raises(ContextLengthExceeded, match=r"61 tokens.*max_scored_tokens allows 60; score fewer choices"):
            llm.score_choices([[1] * 30], [[[2] * 10, [3] * 10, [4] * 10, [5]]])
    with LLM(base, **OPTIONS | {"max_model_len": 40, "kv_cache_bytes": pages(base, 3)}) as llm:
        llm.score_choices([[1] * 30], [[[2] * 9, [3] * 9]])
        with pytest.raises(ContextLengthExceeded, match="kv_cache_bytes allows 48"):
            llm.score_choices([[1] * 30], [[[2] * 10, [3] * 9]])
        assert_clean(llm)


def test_the_longest_prompt_of_an_instance_level_adapter_holds_here_too(base: Path, folders: dict[str, Path]) -> None:
    with LLM(base, adapters={"a": folders["instance"]}, max_instance_prompt=20, **OPTIONS) as llm:
        llm.score_choices([[1] * 20], [[[2] * 10, [3]]], adapter="a")
        with pytest.raises(InvalidRequest, match="max_instance_prompt"):
            llm.score_choices([[1] * 21], [[[2]]], adapter="a")


def test_a_closed_llm_scores_nothing(base: Path) -> None:
    llm = LLM(base, **OPTIONS)
    llm.close()
    with pytest.raises(MoaError, match="closed"):
        llm.score_choices([[1]], [[[1]]])
