"""Evaluation through the engine: many adapters in one batch score as each would alone, and one that breaks takes nobody with it."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import TINY, raw_manifest, write_base, write_family, write_overflowing, write_tokenizer

from moa_serve import LLM
from moa_serve.adapter.manifest import Manifest
from moa_serve.errors import DataInvalid, InvalidRequest
from moa_serve.train.data import Example, Turn
from moa_serve.train.evaluate import Evaluation, Round
from moa_serve.train.prompts import encode, encode_prompt, encode_response
from moa_serve.train.scoring import Estimate, Task, paired_difference
from moa_serve.train.variations import Variation, ablations

WITH_TEXT: dict[str, Any] = TINY | {"vocab_size": 259, "eos_token_id": 2, "max_position_embeddings": 400}
ADAPTERS = [None, "sparse", "pooled", "plain"]
LABELS = ("answer1", "answer2")


def choice(row: int, *texts: str, gold: int = 0, **more: Any) -> Example:
    return Example("choice", f"Question {row}?", output=texts[gold], answer=texts[gold], choices=texts, gold=gold, row=row, **more)


CLOZE = tuple(choice(row, "red", "green, or so", "blue sky", gold=row % 3, where=f"row {row}") for row in range(6))
SUMS = tuple(Example("math", f"{row} and {row}?", output=f"It is {2 * row}", answer=str(2 * row), row=row) for row in range(4))
CHATS = tuple(Example("text", f"Say {row}", output="a" * (row + 1), row=row) for row in range(3))


def task(examples: Sequence[Example], name: str = "made/test") -> Task:
    return Task(name, f"{name}.json", "cloze", "0" * 64, len(examples), tuple(examples))


def manifest_of(family: str) -> Manifest:
    return Manifest.parse(raw_manifest(family, WITH_TEXT))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_base(tmp_path_factory.mktemp("base"), WITH_TEXT)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def llm(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    root = tmp_path_factory.mktemp("adapters")
    families = {"sparse": "sparse_fn", "pooled": "instance", "plain": "lora"}
    adapters = {name: write_family(root / name, family, config=WITH_TEXT) for name, family in families.items()}
    with LLM(base, adapters=adapters, device="cpu", kv_cache_bytes=2**23, max_num_seqs=7, prefix_cache=False) as made:
        yield made


def run(llm: LLM, adapters: Sequence[str | None], *tasks: Task, **more: Any) -> list[Round]:
    return list(Evaluation(llm, tasks, adapters, **({"max_tokens": 6} | more)).run())


# -- mixed and alone


def test_all_in_one_batch_is_each_one_alone(llm: LLM) -> None:
    """The tables of a run with many adapters stand beside those of runs with one."""
    tasks = (task(CLOZE, "colours/test"), task(SUMS, "sums/test"), task(CHATS, "texts/test"))
    mixed = run(llm, ADAPTERS, *tasks, scorer="both")
    assert [(found.task.name, found.scorer) for found in mixed] == [
        ("colours/test", "generation"),
        ("colours/test", "likelihood"),
        ("sums/test", "generation"),
        ("sums/test", "loss"),
        ("texts/test", "loss"),
    ]
    for index, adapter in enumerate(ADAPTERS):
        for together, alone in zip(mixed, run(llm, [adapter], *tasks, scorer="both"), strict=True):
            (own,) = alone.scores
            found = together.scores[index]
            assert (found.adapter, found.num_tokens, own.against_base) == (adapter, own.num_tokens, None)
            assert [verdict.prediction for verdict in found.verdicts] == [verdict.prediction for verdict in own.verdicts]
            assert [verdict.value for verdict in found.verdicts] == pytest.approx([verdict.value for verdict in own.verdicts], abs=1e-3)
            assert (found.usage is None) == (own.usage is None) == (adapter in (None, "plain"))
            if found.usage is not None and own.usage is not None:
                assert found.usage.experts_per_token == pytest.approx(own.usage.experts_per_token, abs=0.02)


def test_all_variations_in_one_batch_are_each_one_alone(llm: LLM) -> None:
    """Rows of one adapter with many rules share steps: none may choose by a neighbour's."""
    others = {
        "sparse": [*ablations("kinds", manifest_of("sparse_fn")), *ablations("layers", manifest_of("sparse_fn"))[1:]],
        "pooled": [Variation("given", "a threshold", {"threshold": 0.5}), Variation("given", "one", {"top_k": 1})],
    }
    tasks = (task(CLOZE, "colours/test"), task(SUMS, "sums/test"))
    mixed = run(llm, ADAPTERS, *tasks, scorer="both", variations=others)
    expected = [("sparse", one) for one in (None, *others["sparse"])] + [("pooled", one) for one in (None, *others["pooled"])]
    for together in mixed:
        assert [(score.adapter, score.variation) for score in together.scores] == [(None, None), *expected, ("plain", None)]
    assert any(score.verdicts != mixed[1].scores[1].verdicts for score in mixed[1].scores[2:9]), "the variations matter"
    for index, (adapter, variation) in enumerate(expected, start=1):
        if variation is None:
            continue
        for together, alone in zip(mixed, run(llm, [adapter], *tasks, scorer="both", variations={adapter: [variation]}), strict=True):
            plain, own = alone.scores
            found = together.scores[index]
            assert (plain.against_own, found.num_tokens) == (None, own.num_tokens)
            assert [verdict.prediction for verdict in found.verdicts] == [verdict.prediction for verdict in own.verdicts]
            assert [verdict.value for verdict in found.verdicts] == pytest.approx([verdict.value for verdict in own.verdicts], abs=1e-3)
            assert found.against_own == own.against_own == paired_difference(own.verdicts, plain.verdicts)
            assert found.usage is not None
            assert own.usage is not None
            assert found.usage.experts_per_token == pytest.approx(own.usage.experts_per_token, abs=0.02)


def test_a_variation_has_the_routing_of_its_own_tokens(llm: LLM) -> None:
    """Told for all options of an adapter together, a sweep would have one share for all of its points."""
    asked: list[dict[str, Any]] = [{"disable": ["PROMPT", "Q"]}, {"top_k": 2}, {"mode": "soft"}]
    variations = {"sparse": [Variation("given", str(number), moa) for number, moa in enumerate(asked)]}
    (row,) = run(llm, ["sparse"], task(CHATS[:1]), scorer="likelihood", variations=variations)
    assert llm.tokenizer is not None
    encoded = encode(CHATS[0], llm.tokenizer, max_length=400, eos_token_id=2)
    assert encoded is not None
    for score in row.scores:
        moa = None if score.variation is None else score.variation.moa
        selected = llm.route(encoded.token_ids[:-1], adapter="sparse", moa=moa).selected
        assert score.usage is not None
        assert score.usage.experts_per_token == pytest.approx(float(selected.sum()) / (len(encoded.token_ids) - 1) / 3, abs=1e-3)
        assert 0 <= score.usage.not_computed <= score.usage.not_selected + 1e-9
    assert row.scores[3].usage is not None
    assert row.scores[3].usage.not_selected == 0


def test_adapters_differ_and_are_held_against_the_base(llm: LLM) -> None:
    (found,) = run(llm, ADAPTERS, task(CHATS), scorer="likelihood")
    base, *others = found.scores
    assert base.against_base is None
    for score in others:
        assert score.against_base is not None
        assert score.score is not None
        assert base.score is not None
        assert score.against_base.value == pytest.approx(score.score.value - base.score.value)
        assert abs(score.against_base.value) > 0.01
    assert all(score.against_base is None for score in run(llm, ["sparse"], task(CHATS))[0].scores)


# -- what is computed


def test_a_likelihood_is_that_of_the_logits(llm: LLM) -> None:
    (found,) = run(llm, ["sparse"], task(CLOZE), scorer="likelihood")
    assert llm.tokenizer is not None
    for example, verdict in zip(CLOZE, found.scores[0].verdicts, strict=True):
        prompt = encode_prompt(example, llm.tokenizer)
        sums = []
        for text in example.choices:
            ids = encode_response(text, llm.tokenizer)
            logits = llm.logits(prompt + ids, adapter="sparse")[len(prompt) - 1 : -1]
            sums.append(float(logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None]).sum()))
        best = max(range(3), key=sums.__getitem__)
        assert (verdict.prediction, bool(verdict.value)) == (best, best == example.gold)


def test_a_loss_is_that_of_training(llm: LLM) -> None:
    """Of the response and its end, by token over all rows."""
    (found,) = run(llm, ["sparse"], task(CHATS), scorer="likelihood")
    assert llm.tokenizer is not None
    nats, count = 0.0, 0
    for example in CHATS:
        encoded = encode(example, llm.tokenizer, max_length=400, eos_token_id=2)
        assert encoded is not None
        assert encoded.token_ids[-1] == 2
        logprobs = llm.logits(encoded.token_ids, adapter="sparse").log_softmax(-1)
        places = [index for index, is_target in enumerate(encoded.is_target) if is_target]
        nats -= sum(float(logprobs[index - 1, encoded.token_ids[index]]) for index in places)
        count += len(places)
    score = found.scores[0].score
    assert score is not None
    assert score.value == pytest.approx(nats / count, abs=1e-4)


def test_only_the_assistants_turns_of_a_chat_are_in_its_loss(tmp_path: Path) -> None:
    write_base(tmp_path, WITH_TEXT)
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    example = Example("chat", messages=(Turn("user", "a"), Turn("assistant", "bc"), Turn("user", "d"), Turn("assistant", "e")))
    with LLM(tmp_path, device="cpu") as llm:
        (found,) = run(llm, [None], task([example]))
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode("user: a</s>assistant: bc</s>user: d</s>assistant: e</s>", parse_special=True)
        logprobs = llm.logits(ids).log_softmax(-1)
        ends = [index for index, token_id in enumerate(ids) if token_id == 2]
        learned = [*range(ends[0] + 1 + len("assistant: "), ends[1] + 1), *range(ends[2] + 1 + len("assistant: "), ends[3] + 1)]
        expected = -sum(float(logprobs[index - 1, ids[index]]) for index in learned)
        assert (found.scorer, found.scores[0].verdicts[0].weight) == ("loss", len("bc") + 1 + len("e") + 1)
        assert found.scores[0].verdicts[0].value == pytest.approx(expected, abs=1e-3)


def test_chance_is_told_where_one_can_guess(llm: LLM) -> None:
    generated, compared = run(llm, [None], task(CLOZE), scorer="both")
    assert (generated.chance, generated.majority) == (None, None), "nobody guesses a text by chance"
    assert compared.chance == pytest.approx(1 / 3)
    assert compared.majority == pytest.approx(1 / 3)
    named = [replace(example, labels=LABELS, answer="answer1") for example in CLOZE]
    assert run(llm, [None], task(named), scorer="generation")[0].chance == pytest.approx(1 / 3)


def test_progress_counts_every_question_under_every_adapter(llm: LLM) -> None:
    evaluation = Evaluation(llm, (task(CLOZE), task(SUMS)), ADAPTERS, scorer="auto", max_tokens=4)
    seen: list[tuple[str, int]] = []
    list(evaluation.run(lambda what, done: seen.append((what, done))))
    assert evaluation.num_pairs == (len(CLOZE) + len(SUMS)) * len(ADAPTERS) == seen[-1][1]
    assert [done for _, done in seen] == sorted(done for _, done in seen)
    assert {done for _, done in seen} == set(range(41))
    assert [what for what, _ in seen][:: len(seen) - 1] == ["made/test, likelihood", "made/test, generation"]


def test_each_task_has_the_routing_of_its_own_tokens(llm: LLM) -> None:
    """Totals that only grow would mix the tasks of a run, and the self-test into the first of them."""
    tasks = task(CLOZE, "a/test"), task(CHATS, "b/test")
    together = [found.scores[0].usage for found in run(llm, ["sparse"], *tasks, scorer="likelihood")]
    apart = [run(llm, ["sparse"], one, scorer="likelihood")[0].scores[0].usage for one in tasks]
    for ours, other in zip(together, apart, strict=True):
        assert ours is not None
        assert other is not None
        assert ours.experts_per_token == pytest.approx(other.experts_per_token, abs=1e-3)
        assert ours.not_selected == pytest.approx(1 - ours.experts_per_token / 9)
        assert 0.01 < ours.not_selected < 0.99
    assert llm.tokenizer is not None
    (row,) = run(llm, ["sparse"], task(CHATS[:1]), scorer="likelihood")
    encoded = encode(CHATS[0], llm.tokenizer, max_length=400, eos_token_id=2)
    assert encoded is not None
    selected = llm.route(encoded.token_ids[:-1], adapter="sparse").selected
    usage = row.scores[0].usage
    assert usage is not None
    assert usage.experts_per_token == pytest.approx(float(selected.sum()) / (len(encoded.token_ids) - 1) / 3, abs=1e-3)


# -- what goes wrong


def test_a_base_without_a_tokenizer_cannot_read_questions(tmp_path: Path) -> None:
    with LLM(write_base(tmp_path / "mute"), device="cpu") as llm, pytest.raises(InvalidRequest, match="the base mute has no tokenizer"):
        Evaluation(llm, [task(CLOZE)], [None])


def test_a_row_beyond_the_context_is_named(llm: LLM) -> None:
    long = replace(CLOZE[0], instruction="a" * 300, where="colours.json, row 7")
    with pytest.raises(
        DataInvalid, match=r"colours.json, row 7: 4\d\d tokens of prompt and 12 of answer are more than the served context of 400"
    ):
        run(llm, [None], task([CLOZE[0], long]))
    with pytest.raises(DataInvalid, match="row 7: is longer than the served context of 400 tokens"):
        run(llm, [None], task([replace(long, kind="text", choices=(), answer=None)]))


def test_an_adapter_that_overflows_loses_its_own_answers(tmp_path: Path) -> None:
    """One NaN in hours of work must not cost the others' answers. After three of them the adapter is out of service, as when it serves."""
    config = WITH_TEXT | {"hidden_size": 264}  # more than there are tokens, so that an adapter can tell one from all others
    write_base(tmp_path / "base", config)
    write_tokenizer(tmp_path / "base")
    with LLM(tmp_path / "base", device="cpu") as llm:
        assert llm.tokenizer is not None
        (token,) = llm.tokenizer.encode("%", parse_special=False)
        write_overflowing(tmp_path / "hot", config, token=token)
        write_family(tmp_path / "good", "lora", config=config)
        for name in ("hot", "good"):
            llm.load_adapter(name, tmp_path / name)
        hot = replace(CLOZE[2], instruction="Question %?")
        rows = [CLOZE[0], hot, CLOZE[1]]
        adapters = [None, "hot", "good"]
        seen: list[int] = []
        evaluation = Evaluation(llm, [task(rows)], adapters, scorer="both", max_tokens=4)
        rounds = list(evaluation.run(lambda what, done: seen.append(done)))
        for found in rounds:
            base, bad, good = found.scores
            assert [verdict.error is not None for verdict in bad.verdicts] == [False, True, False]
            assert "gave NaN or infinity" in bad.errors[0]
            assert (bad.num_unanswered >= 1, bad.verdicts[1].value, len(base.errors + good.errors)) == (True, 0.0, 0)
        assert seen[-1] == evaluation.num_pairs
        texts = [replace(CHATS[0], instruction="%"), CHATS[1]]
        (found,) = run(llm, adapters, task(texts))
        bad = found.scores[1]
        assert ([verdict.weight for verdict in bad.verdicts], len(bad.errors)) == ([0, 3], 1)
        assert bad.score == Estimate(bad.verdicts[1].value / 3, 0.0)
        assert bad.against_base == Estimate((bad.verdicts[1].value - found.scores[0].verdicts[1].value) / 3, 0.0)

        (found,) = run(llm, adapters, task(rows), scorer="likelihood")
        assert found.scores[0] == rounds[1].scores[0]
        assert found.scores[2] == rounds[1].scores[2]
        assert [verdict.value for verdict in found.scores[1].verdicts] == [0.0] * 3
        assert all("out of service" in error for error in found.scores[1].errors)
        (found,) = run(llm, adapters, task(texts))
        assert (found.scores[1].score, found.scores[1].against_base) == (None, None)
