"""Which case of docs/reliability.md is proved by which tests: `python -m tests.cases`.

    python -m tests.cases            the table: case, what it is, tests; exit code 1 where document and tests disagree
    python -m tests.cases --write    bring the last column of the document up to date

A test says what it proves with `@pytest.mark.case(57)`; cases that nobody proves yet are said to be open in the document, with the reason.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "reliability.md"
ALL = range(1, 92)
OPEN = "open: "  # how the last column of a case begins that no test proves
_ROW = re.compile(r"^\| (\d+) \| (.*) \| *([^|]*?) *\|$", re.M)
_MARK = "case-of-test "


@dataclass(frozen=True, slots=True)
class Row:
    """One case as the document has it."""

    number: int
    text: str
    tests: str

    @property
    def is_open(self) -> bool:
        return self.tests.startswith(OPEN)


class Collector:
    """A plugin of pytest that prints what each collected test proves."""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for marker in item.iter_markers("case"):
                for number in marker.args:
                    name = item.nodeid.split("[")[0].removeprefix("tests/")
                    print(f"{_MARK}{number} {name}")  # noqa: T201


class Numbered(Protocol):
    """A row of a table of bad input."""

    @property
    def case(self) -> int: ...


def numbered(rows: Iterable[Numbered]) -> list[Any]:
    """Parameters of a test, each of which proves its own case."""
    return [pytest.param(row, marks=pytest.mark.case(row.case), id=str(row)) for row in rows]


def collected() -> dict[int, set[str]]:
    """Tests by case, as `file::function`; of the whole suite, in a process of its own."""
    command = [sys.executable, "-m", "tests.cases", "--collect"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found: dict[int, set[str]] = {}
    for line in done.stdout.splitlines():
        if line.startswith(_MARK):
            number, name = line.removeprefix(_MARK).split(" ", 1)
            found.setdefault(int(number), set()).add(name)
    return found


def documented(text: str) -> dict[int, Row]:
    return {int(number): Row(int(number), words, tests) for number, words, tests in _ROW.findall(text)}


def shown(tests: Iterable[str]) -> str:
    """Test files, as the last column has them."""
    return ", ".join(sorted({test.split("::")[0] for test in tests}))


def problems(rows: Mapping[int, Row], tests: Mapping[int, set[str]]) -> list[str]:
    """Every disagreement between the document and the suite."""
    found = [f"case {number} has no row" for number in ALL if number not in rows]
    found += [f"case {number} is no case" for number in (*rows, *tests) if number not in ALL]
    for number, row in rows.items():
        names = tests.get(number, set())
        if row.is_open and names:
            found.append(f"case {number} is said to be open, but is proved by {shown(names)}")
        elif not row.is_open and not names:
            found.append(f"case {number} is proved by no test; mark one, or say why not with '{OPEN}...'")
        elif names and row.tests != shown(names):
            found.append(f"case {number} is proved by {shown(names)}, but the document says {row.tests}")
    return found


def written(text: str, tests: Mapping[int, set[str]]) -> str:
    """The document with the column of tests as it is now; open cases that nobody proves keep their reason."""

    def line(match: re.Match[str]) -> str:
        number, words, old = match.groups()
        names = tests.get(int(number))
        return f"| {number} | {words} | {shown(names) if names else old} |"

    return _ROW.sub(line, text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cases", description="Which test proves which case of docs/reliability.md.")
    parser.add_argument("--write", action="store_true", help="bring the document's column of tests up to date")
    parser.add_argument("--collect", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.collect:
        return int(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider", str(ROOT / "tests")], plugins=[Collector()]))
    tests = collected()
    if arguments.write:
        DOCUMENT.write_text(written(DOCUMENT.read_text(), tests))
    rows = documented(DOCUMENT.read_text())
    for number in ALL:
        row = rows.get(number)
        words = row.text if row else "?"
        state = row.tests if row and row.is_open else f"{len(tests.get(number, ()))} tests: {shown(tests.get(number, ()))}"
        sys.stdout.write(f"{number:3}  {words[:70]:70}  {state}\n")
    wrong = problems(rows, tests)
    num_proved = sum(number in tests for number in ALL)
    sys.stdout.write("\n".join([*wrong, f"{num_proved} of {len(ALL)} cases are proved by tests"]) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
