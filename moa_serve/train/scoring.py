"""What an answer is worth: the authors' rules for generated text, likelihoods of choices, and how certain a score is. No model here.

A score is a sum over rows divided by a sum over rows: right answers by questions, or nats by tokens. Its standard error is that of such a
ratio, which for right and wrong answers is sqrt(p (1 - p) / n).
"""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Literal

from moa_serve.errors import DataInvalid
from moa_serve.train import tasks
from moa_serve.train.data import Example, data_digest, find_file, read_examples
from moa_serve.train.tasks import Form

Scorer = Literal["generation", "likelihood", "loss"]
SCORERS: tuple[Scorer, ...] = ("generation", "likelihood", "loss")
WANTED = ("auto", "generation", "likelihood", "both")
TOLERANCE = 0.001  # of a number, the authors'


@dataclass(frozen=True, slots=True)
class Task:
    """A data file to answer, or a part of it.

    Args:
        digest: sha256 of the file.
        num_rows: of the whole file.
        examples: those to answer, in the file's order.
    """

    name: str
    path: str
    form: Form
    digest: str
    num_rows: int
    examples: tuple[Example, ...]


def read_task(path: str | PathLike[str], form: Form, *, limit: int | None = None, seed: int = 0) -> Task:
    """A file, or a folder's test.json; `limit` rows of it, the same ones for equal seeds. Raises DataInvalid."""
    file = find_file(path, "test")
    examples = read_examples(file, form, needs_output=False)
    name = f"{file.resolve().parent.name}/{file.stem}"
    return Task(name, str(file), form, data_digest([file]), len(examples), tuple(subset(examples, limit, seed)))


def subset(examples: Sequence[Example], limit: int | None, seed: int) -> list[Example]:
    """The `limit` rows whose sha256 of "SEED:ROW" is smallest, in the file's order.

    A rule that needs no generator gives the same rows in every version and every language, and fewer rows are a part of more.
    """
    if limit is None or limit >= len(examples):
        return list(examples)
    chosen = sorted(examples, key=lambda example: hashlib.sha256(f"{seed}:{example.row}".encode()).digest())[:limit]
    return sorted(chosen, key=lambda example: example.row)


def scorers_of(example: Example, wanted: str) -> set[Scorer]:
    """How this row can be scored, as far as it is wanted.

    auto: mathematics and texts by generation; choices that are named by a label by generation, as the authors do, and by likelihood;
    choices in cloze form by likelihood; what has no gold answer by its loss.
    """
    possible: set[Scorer] = set()
    if example.answer is not None:
        possible.add("generation")
    if example.choices:
        possible.add("likelihood")
    elif example.output or example.messages:
        possible.add("loss")
    is_cloze = example.kind == "choice" and not example.labels
    chosen: dict[str, set[Scorer]] = {
        "auto": {"likelihood"} if is_cloze else {"generation", "likelihood"} if example.kind == "choice" else {"generation"},
        "generation": {"generation"},
        "likelihood": {"likelihood", "loss"},
        "both": set(SCORERS),
    }
    if wanted == "auto" and not possible & chosen["auto"]:
        return possible
    return possible & chosen[wanted]


def rows_by_scorer(task: Task, wanted: str) -> dict[Scorer, list[Example]]:
    """Raises DataInvalid: nothing in the task can be scored in this way."""
    rows = {scorer: [example for example in task.examples if scorer in scorers_of(example, wanted)] for scorer in SCORERS}
    if not any(rows.values()):
        other = "likelihood" if wanted == "generation" else "generation"
        raise DataInvalid(f"{task.path}: no row can be scored by {wanted}; use --scorer {other}", param="scorer")
    return {scorer: found for scorer, found in rows.items() if found}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one row.

    Args:
        value: 1 for a right answer and 0 for a wrong one; of a loss the sum over its tokens, in nats.
        weight: 1 for an answer; of a loss the number of its tokens, 0 where it ended in an error.
        prediction: a number, a letter, a label, or the index of a choice; None where none was found, or none is asked for.
        is_answered: whether there was anything to judge.
        per_byte: of choices compared by their likelihood, whether the right one also wins when each is divided by its bytes.
        error: why nothing was generated or scored. An answer then counts as wrong; a loss does not count at all.
    """

    value: float
    weight: int = 1
    prediction: str | int | float | None = None
    is_answered: bool = True
    per_byte: bool | None = None
    error: str | None = None


def judge_text(example: Example, text: str) -> Verdict:
    """A generated text against the gold answer; see `Example.kind`."""
    assert example.answer is not None
    if example.kind == "math":
        number = tasks.last_number(text)
        gold = float(example.answer.replace(",", ""))
        return _verdict(number, number is not None and abs(number - gold) <= TOLERANCE)
    if example.labels:
        found = tasks.label_pattern(example.labels).search(text)
        return _verdict(found[0] if found else None, found is not None and found[0] == example.answer)
    line = normalised(first_line(text))
    is_right = line == normalised(example.answer)
    if not example.choices:
        return Verdict(float(is_right), is_answered=bool(line))
    if is_right:  # of two choices with one text, the gold one is meant
        return _verdict(example.gold, True)
    return _verdict(next((i for i, choice in enumerate(example.choices) if normalised(choice) == line), None), False)


def _verdict(prediction: str | int | float | None, is_right: bool) -> Verdict:
    return Verdict(float(is_right), prediction=prediction, is_answered=prediction is not None)


def first_line(text: str) -> str:
    """The first line that is not blank."""
    return next((line for line in text.splitlines() if line.strip()), "")


def normalised(text: str) -> str:
    """Without differences of case, of spaces, and of the punctuation at the end."""
    return " ".join(text.casefold().split()).rstrip(" .,;:!?")


def judge_likelihood(example: Example, logprobs: Sequence[float]) -> Verdict:
    """The most likely choice against the gold one; equal texts are equally right."""
    assert example.gold is not None
    gold = example.choices[example.gold]
    best = max(range(len(logprobs)), key=logprobs.__getitem__)
    per_byte = max(range(len(logprobs)), key=lambda index: logprobs[index] / len(example.choices[index].encode()))
    return Verdict(float(example.choices[best] == gold), prediction=best, per_byte=example.choices[per_byte] == gold)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A score with its standard error."""

    value: float
    standard_error: float

    @property
    def is_beyond_chance(self) -> bool:
        """Whether it is more than two standard errors away from 0; of a difference."""
        return abs(self.value) > 2 * self.standard_error


def estimate(values: Sequence[float], weights: Sequence[float]) -> Estimate | None:
    """sum(values) / sum(weights), and the standard error of this ratio over its rows; None where nothing counts."""
    total = sum(weights)
    if not total:
        return None
    ratio = sum(values) / total
    return Estimate(ratio, math.sqrt(sum((v - ratio * w) ** 2 for v, w in zip(values, weights, strict=True))) / total)


def paired_difference(own: Sequence[Verdict], base: Sequence[Verdict]) -> Estimate | None:
    """By how much the scores of two differ, row by row: what both find easy or hard does not count as noise."""
    both = [(a, b) for a, b in zip(own, base, strict=True) if a.weight and b.weight]
    return estimate([a.value - b.value for a, b in both], [b.weight for _, b in both])


def chance(examples: Iterable[Example]) -> float | None:
    """Share of right answers of a blind guess; None where nothing is offered to choose from."""
    shares = [1 / len(example.choices) if example.choices else None for example in examples]
    known = [share for share in shares if share is not None]
    return sum(known) / len(known) if len(known) == len(shares) else None


def majority(examples: Sequence[Example]) -> float | None:
    """Share of right answers of who always takes the same place in the list; None where nothing is offered to choose from."""
    if not all(example.choices for example in examples):
        return None
    return max(Counter(example.gold for example in examples).values()) / len(examples)
