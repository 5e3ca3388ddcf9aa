"""The paper's tasks as they stand in its files: numbered choices, lettered choices, MAWPS equations. Text in, text out; no files.

The files are those of https://github.com/DCDmllm/MoA (datasets/), in the form of LLM-Adapters (arXiv 2304.01933).
"""

import re
from dataclasses import dataclass
from typing import Literal

Form = Literal["authors", "cloze"]

LETTERS = ("A", "B", "C", "D", "E")  # of AQuA
_NUMBERED = {"answer": 5, "solution": 2, "option": 2, "ending": 4}  # word -> how many the authors' scorer knows
_QUESTIONS = (
    "Please choose the correct answer to the question:",
    "Please choose the correct solution to the question:",
    "Please choose the correct answer to fill in the blank to complete the given sentence:",
    "Please choose the correct ending to complete the given sentence:",
    "Please answer the following question with true or false, question:",
)
_FORMAT = re.compile(r"\s*Answer format:\s*(\S+)\s*$")
_LETTERED = "Answer Choices:"
_NUMBER = re.compile(r"-?\d+\.?\d*")
_EQUATION = re.compile(r"\d+\.?\d*|[A-Za-z]+|[-+*/()=]")


class Unparsed(ValueError):
    """A row looks like one of these tasks and is not; the message says how, without the row."""


@dataclass(frozen=True, slots=True)
class Choices:
    """A question and what one may answer.

    Args:
        question: without the choices and without the sentence that asks to choose.
        labels: what names the choices in an answer: answer1 answer2, A B, true false.
        texts: what each of them stands for.
    """

    question: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]


def parse_choices(instruction: str) -> Choices | None:
    """The choices of an instruction; None where it offers none.

    Raises:
        Unparsed: it does offer some, but not in the way that we know.
    """
    if found := _FORMAT.search(instruction):
        return _numbered(instruction[: found.start()], tuple(found[1].split("/")))
    if _LETTERED in instruction:
        question, _, offered = instruction.rpartition(_LETTERED)
        return Choices(question.strip(), LETTERS, _between(offered, [f"({letter})" for letter in LETTERS])[1])
    return None


def _numbered(text: str, labels: tuple[str, ...]) -> Choices:
    if labels == ("true", "false"):
        return Choices(_question(text), labels, labels)
    word = labels[0].rstrip("0123456789")
    if word not in _NUMBERED or labels != tuple(f"{word}{i}" for i in range(1, len(labels) + 1)) or len(labels) > _NUMBERED[word]:
        raise Unparsed(f"the answer format {'/'.join(labels)!r} is none that is known")
    question, texts = _between(text, [f"{label.capitalize()}:" for label in labels])
    return Choices(_question(question), labels, texts)


def _between(text: str, marks: list[str]) -> tuple[str, tuple[str, ...]]:
    """(what stands before the first mark, what follows each of them). Each mark stands once, else a choice could be cut in two."""
    for mark in marks:
        if (count := text.count(mark)) != 1:
            raise Unparsed(f"{mark!r} stands in it {count} times instead of once")
    any_mark = re.compile("|".join(map(re.escape, marks)))
    if any_mark.findall(text) != marks:
        raise Unparsed(f"{' '.join(marks)} are not in order")
    head, *parts = any_mark.split(text)
    texts = tuple(part.strip() for part in parts)
    if not all(texts):
        raise Unparsed(f"nothing stands behind {marks[texts.index('')]!r}")
    return head, texts


def _question(text: str) -> str:
    text = text.strip()
    for start in _QUESTIONS:
        text = text.removeprefix(start)
    return text.strip()


def label_pattern(labels: tuple[str, ...]) -> re.Pattern[str]:
    """What the authors' scorer looks for: every label that a task has, also those that this row does not offer."""
    word = labels[0].rstrip("0123456789")
    known = [f"{word}{i}" for i in range(1, _NUMBERED[word] + 1)] if word in _NUMBERED else labels
    return re.compile("|".join(map(re.escape, known)))


def last_number(text: str) -> float | None:
    """The authors' rule for mathematics: the last number of a text, without thousands' commas."""
    found = _NUMBER.findall(text.replace(",", ""))
    return float(found[-1]) if found else None


def format_number(value: float) -> str:
    """Ten significant digits, no exponent, no zeros behind the point: 5, 0.75, 1236666.67, 1.833333333."""
    text = f"{value:.10g}"
    if "e" in text:
        text = f"{value:.10f}"
        text = text.rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def format_equation(equation: str) -> str:
    """One way to write MAWPS's equations: `X=((22.0-14.0)/4.0)` becomes `x = (22 - 14) / 4`.

    Raises:
        Unparsed: it holds what no equation has.
    """
    if _EQUATION.sub("", equation).strip():
        raise Unparsed(f"the equation {equation!r} cannot be read")
    sides = [_spaced(_EQUATION.findall(side)) for side in equation.split("=")]
    return " = ".join(sides)


def _spaced(tokens: list[str]) -> str:
    while _is_enclosed(tokens):
        tokens = tokens[1:-1]
    text = ""
    for before, token in zip(["(", *tokens], tokens, strict=False):
        if token in "+-*/" and before not in "(+-*/":
            text += f" {token} "
        elif token in "+-*/()":  # a sign, or a bracket
            text += token
        else:
            text += token.lower() if token.isalpha() else format_number(float(token))
    return text


def _is_enclosed(tokens: list[str]) -> bool:
    """Whether one pair of brackets stands around all of it."""
    if len(tokens) < 2 or tokens[0] != "(" or tokens[-1] != ")":
        return False
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token == "(") - (token == ")")
        if depth == 0 and index < len(tokens) - 1:
            return False
    return True
