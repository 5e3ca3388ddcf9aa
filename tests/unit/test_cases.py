"""docs/reliability.md says which tests prove which case; a table that nobody compares is soon a wish."""

from typing import Any

import pytest
from cases import ALL, DOCUMENT, Row, collected, documented, problems, written


def test_the_document_and_the_suite_agree() -> None:
    """`python -m tests.cases --write` mends what has only moved."""
    assert problems(documented(DOCUMENT.read_text()), collected()) == []


def rows(**changes: str) -> dict[int, Row]:
    return {number: Row(number, "x", changes.get(f"n{number}", "a.py")) for number in ALL}


TESTS: dict[int, set[str]] = {number: {"a.py::test"} for number in ALL}


@pytest.mark.parametrize(
    ("found", "tests", "says"),
    [
        ({number: row for number, row in rows().items() if number != 7}, TESTS, "case 7 has no row"),
        (rows(), {number: names for number, names in TESTS.items() if number != 7}, "case 7 is proved by no test"),
        (rows(n7="open: not built"), TESTS, "case 7 is said to be open"),
        (rows(n7="b.py"), TESTS, "case 7 is proved by a.py, but the document says b.py"),
        (rows(), TESTS | {200: {"a.py::test"}}, "case 200 is no case"),
    ],
)
def test_every_disagreement_is_found(found: Any, tests: Any, says: str) -> None:
    assert problems(rows(), TESTS) == []
    (problem,) = problems(found, tests)
    assert problem.startswith(says)


def test_writing_keeps_what_is_open() -> None:
    text = "| 1 | x | y | old.py |\n| 2 | x | y | open: not built |\n"
    assert written(text, {1: {"b.py::t", "a.py::t"}}) == "| 1 | x | y | a.py, b.py |\n| 2 | x | y | open: not built |\n"
