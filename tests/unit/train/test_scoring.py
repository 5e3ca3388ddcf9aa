"""Scores: the authors' rules on crafted texts, which rows are taken, and how certain a number is."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moa_serve.errors import DataInvalid
from moa_serve.train.data import Example, Kind
from moa_serve.train.scoring import (
    Estimate,
    Verdict,
    chance,
    estimate,
    judge_likelihood,
    judge_text,
    majority,
    paired_difference,
    read_task,
    rows_by_scorer,
    scorers_of,
    subset,
)
from moa_serve.train.tasks import LETTERS

NUMBERED = Example("choice", answer="answer2", choices=("a1", "a2", "a3"), gold=1, labels=("answer1", "answer2", "answer3"), output="x")
CLOZE = Example("choice", answer="In the wood.", choices=("at sea", "In the wood.", "here"), gold=1, output="In the wood.")
LETTER = Example("letter", answer="D", choices=("1", "2", "3", "4", "5"), gold=3, labels=LETTERS, output="x")
TEXT = Example("text", answer="Bonjour!", output="Bonjour!")


def math_row(answer: str, output: str = "x") -> Example:
    return Example("math", answer=answer, output=output)


# -- generated text


@pytest.mark.parametrize(
    ("example", "text", "prediction", "is_right"),
    [
        (math_row("576.0"), "24 * 24 = 576. The answer is 576.", 576, True),
        (math_row("1,250"), "1250", 1250, True),
        (math_row("1250"), "so 1,250 dollars", 1250, True),
        (math_row("0.6667"), "2/3 = 0.666", 0.666, True),
        (math_row("0.6667"), "2/3 = 0.665", 0.665, False),
        (math_row("5"), "5, or is it 6", 6, False),
        (math_row("5"), "five", None, False),
        (math_row("-15"), "it is -15", -15, True),
        (LETTER, "4. The answer is (D).", "D", True),
        (LETTER, "Answer: D", "A", False),
        (LETTER, "d", None, False),
        (NUMBERED, "the correct answer is answer2", "answer2", True),
        (NUMBERED, "answer1, no, answer2", "answer1", False),
        (NUMBERED, "answer5", "answer5", False),
        (NUMBERED, "Answer2", None, False),
        (CLOZE, "\n in  the WOOD \nand more", 1, True),
        (CLOZE, "Here!", 2, False),
        (CLOZE, "in the wood, I think", None, False),
        (CLOZE, "", None, False),
    ],
)
def test_a_text_is_judged_as_the_authors_do(example: Example, text: str, prediction: Any, is_right: bool) -> None:
    verdict = judge_text(example, text)
    assert (verdict.prediction, bool(verdict.value), verdict.is_answered) == (prediction, is_right, prediction is not None)


def test_a_free_text_is_right_where_its_first_line_is_the_answer() -> None:
    assert judge_text(TEXT, " bonjour \nand so on") == Verdict(1.0)
    assert judge_text(TEXT, "Bonjour, monsieur") == Verdict(0.0)
    assert judge_text(TEXT, "\n\n") == Verdict(0.0, is_answered=False)


# -- likelihood


def test_the_most_likely_choice_counts_and_by_byte_it_may_be_another() -> None:
    verdict = judge_likelihood(CLOZE, [-7.0, -8.0, -9.0])  # 6, 12 and 4 bytes
    assert (verdict.value, verdict.prediction, verdict.per_byte) == (0.0, 0, True)
    verdict = judge_likelihood(CLOZE, [-2.0, -1.9, -0.1])
    assert (verdict.value, verdict.prediction, verdict.per_byte) == (0.0, 2, False)
    verdict = judge_likelihood(CLOZE, [-2.0, -1.9, -2.1])
    assert (verdict.value, verdict.prediction, verdict.per_byte) == (1.0, 1, True)


def test_of_two_equal_choices_both_are_right() -> None:
    """AQuA and SIQA have such rows; which of two equal texts comes first is no knowledge."""
    example = Example("choice", answer="x", choices=("x", "y", "x"), gold=2, output="x")
    verdict = judge_likelihood(example, [-1.0, -2.0, -1.0])
    assert (verdict.value, verdict.prediction, verdict.per_byte) == (1.0, 0, True)
    assert judge_text(example, "x") == Verdict(1.0, prediction=2)


# -- which scorer


@pytest.mark.parametrize(
    ("example", "auto", "generation", "likelihood"),
    [
        (math_row("5"), {"generation"}, {"generation"}, {"loss"}),
        (math_row("5", output=""), {"generation"}, {"generation"}, set()),
        (LETTER, {"generation"}, {"generation"}, {"likelihood"}),
        (NUMBERED, {"generation", "likelihood"}, {"generation"}, {"likelihood"}),
        (CLOZE, {"likelihood"}, {"generation"}, {"likelihood"}),
        (TEXT, {"generation"}, {"generation"}, {"loss"}),
        (Example("text", output="x"), {"loss"}, set(), {"loss"}),
        (Example("chat", messages=((),)), {"loss"}, set(), {"loss"}),  # type: ignore[arg-type]
    ],
)
def test_every_kind_has_its_scorers(example: Example, auto: set[str], generation: set[str], likelihood: set[str]) -> None:
    assert scorers_of(example, "auto") == auto
    assert scorers_of(example, "generation") == generation
    assert scorers_of(example, "likelihood") == likelihood
    assert scorers_of(example, "both") == generation | likelihood


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "test.json").write_text(json.dumps(rows))
    return folder


def test_a_task_that_cannot_be_scored_as_asked_says_so(tmp_path: Path) -> None:
    task = read_task(write(tmp_path / "free", [{"instruction": "a", "output": "b"}]), "authors")
    with pytest.raises(DataInvalid, match="no row can be scored by generation; use --scorer likelihood"):
        rows_by_scorer(task, "generation")
    assert {scorer: len(rows) for scorer, rows in rows_by_scorer(task, "auto").items()} == {"loss": 1}


# -- rows


def test_a_subset_is_fixed_by_its_seed_and_smaller_ones_lie_in_larger_ones() -> None:
    examples = [Example("math", row=row) for row in range(200)]

    def rows(limit: int | None, seed: int) -> list[int]:
        return [example.row for example in subset(examples, limit, seed)]

    assert rows(8, 0) == [15, 44, 46, 87, 99, 147, 185, 192], "published numbers hang on this choice"
    assert rows(8, 0) == rows(8, 0) == sorted(rows(8, 0))
    assert rows(8, 1) != rows(8, 0)
    assert {*rows(8, 0)} < {*rows(50, 0)} < {*rows(None, 0)} == {*range(200)}
    assert rows(1000, 0) == list(range(200))


def test_a_task_is_named_by_folder_and_file_and_knows_its_size(tmp_path: Path) -> None:
    rows = [{"instruction": str(i), "output": "b", "answer": i} for i in range(5)]
    task = read_task(write(tmp_path / "sums", rows), "authors", limit=2, seed=3)
    assert (task.name, task.num_rows, len(task.examples), len(task.digest)) == ("sums/test", 5, 2, 64)
    assert task.path == str(tmp_path / "sums" / "test.json")


# -- how certain


@pytest.mark.parametrize("num_right", [0, 1, 30, 100])
def test_the_standard_error_of_a_share(num_right: int) -> None:
    found = estimate([1.0] * num_right + [0.0] * (100 - num_right), [1] * 100)
    assert found is not None
    share = num_right / 100
    assert found.value == pytest.approx(share)
    assert found.standard_error == pytest.approx(math.sqrt(share * (1 - share) / 100))


def test_a_loss_is_by_token_and_its_standard_error_is_that_of_simulation() -> None:
    """A mean of rows' means would let an answer of one token count as much as one of a hundred."""
    random = np.random.default_rng(0)
    tokens = random.integers(1, 40, size=(2000, 50))
    nats = tokens * random.normal(2.0, 0.3, size=tokens.shape)
    found = [estimate(row.tolist(), weight.tolist()) for row, weight in zip(nats, tokens, strict=True)]
    values = [one.value for one in found if one]
    errors = [one.standard_error for one in found if one]
    assert values[0] == pytest.approx(nats[0].sum() / tokens[0].sum())
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)
    assert estimate([0.0], [0]) is None


def verdicts(*values: float) -> list[Verdict]:
    return [Verdict(value) for value in values]


def test_a_difference_is_taken_row_by_row() -> None:
    base = verdicts(*[1, 0] * 50)
    better = verdicts(*[1, 0] * 40, *[1, 1] * 10)
    found = paired_difference(better, base)
    assert found is not None
    assert found.value == pytest.approx(0.1)
    assert found.standard_error == pytest.approx(math.sqrt(0.1 * 0.9 / 100))
    assert found.is_beyond_chance
    apart = paired_difference(verdicts(*[1] * 10, *[0] * 90), verdicts(*[0] * 90, *[1] * 10))
    assert apart is not None
    assert (apart.value, apart.is_beyond_chance) == (0.0, False)
    assert apart.standard_error == pytest.approx(math.sqrt(0.2 / 100))


@pytest.mark.parametrize(("value", "expected"), [(2.1, True), (-2.1, True), (2.0, False), (0.0, False)])
def test_beyond_chance_is_more_than_two_standard_errors(value: float, expected: bool) -> None:
    assert Estimate(value, 1.0).is_beyond_chance == expected


def test_a_failed_loss_is_in_no_difference() -> None:
    own, base = [Verdict(4.0, 2), Verdict(0.0, 0)], [Verdict(6.0, 2), Verdict(9.0, 3)]
    assert paired_difference(own, base) == Estimate(-1.0, 0.0)


def choice(size: int, gold: int, kind: Kind = "choice") -> Example:
    return Example(kind, choices=tuple(map(str, range(size))), gold=gold)


def test_chance_and_majority() -> None:
    examples = [choice(4, 1), choice(4, 1), choice(4, 3), choice(2, 0)]
    assert chance(examples) == pytest.approx((3 / 4 + 1 / 2) / 4)
    assert majority(examples) == pytest.approx(0.5)
    assert (chance([math_row("5")]), majority([math_row("5")])) == (None, None)
    assert (chance([choice(2, 0), TEXT]), majority([choice(2, 0), TEXT])) == (None, None)
