"""Standard output and standard error: colours and tables where a person watches, plain and complete text where none does.

Everything that comes from a model, a file or a user passes through `visible` before it is shown: a completion must not be able to
move the cursor, set the window's title or pretend to be a message of ours.
"""

import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.table import Table
from rich.text import Text

from moa_serve.errors import MoaError

PLAIN_WIDTH = 120  # columns to lay tables out for where there is no terminal
_UNCUT = 1_000_000  # width at which rich neither wraps nor cuts a line
_JOINERS = "\u200c\u200d"  # they join letters and emoji, and show nothing themselves


def visible(text: str) -> str:
    """`text` with everything that is not shown as itself written out: ESC as \\x1b, a change of direction as \\u202e.

    New lines, tabs and every kind of space stay.
    """
    if text.isprintable():
        return text
    return "".join(char if _is_harmless(char) else char.encode("unicode_escape").decode() for char in text)


def _is_harmless(char: str) -> bool:
    return char.isprintable() or char in "\n\t" or char in _JOINERS or unicodedata.category(char) == "Zs"


def one_line(text: str) -> str:
    """For messages: visible, and without new lines."""
    return " ".join(visible(text).split())


def counted(number: int, word: str) -> str:
    """1 token, 2 tokens."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def is_terminal() -> bool:
    """Whether a person reads standard output."""
    return sys.stdout is not None and sys.stdout.isatty()


def output() -> Console:
    """Standard output; where it is no terminal, without escape sequences and without any width."""
    if is_terminal():
        return Console(highlight=False, markup=False, emoji=False)
    return Console(highlight=False, markup=False, emoji=False, force_terminal=False, color_system=None, width=_UNCUT)


def messages() -> Console:
    """Standard error, the same way."""
    if sys.stderr is not None and sys.stderr.isatty():
        return Console(stderr=True, highlight=False, markup=False, emoji=False)
    return Console(stderr=True, highlight=False, markup=False, emoji=False, force_terminal=False, color_system=None)


def print_table(console: Console, table: Table) -> None:
    """A table; where there is no terminal, without the spaces that only fill it up."""
    if is_terminal():
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    console.print(Text("\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())), soft_wrap=True)


def show_error(error: MoaError) -> None:
    """One line, and every finding below it where there are several."""
    console = messages()
    console.print(Text.assemble(("error:", "bold red"), " ", one_line(str(error))), soft_wrap=True)
    if len(error.problems) > 1:
        for problem in error.problems:
            console.print(Text(f"  - {one_line(problem)}"), soft_wrap=True)


def warn(message: str) -> None:
    messages().print(Text.assemble(("warning:", "bold yellow"), " ", one_line(message)), soft_wrap=True)


def note(message: str) -> None:
    messages().print(Text(one_line(message), style="dim"), soft_wrap=True)


@contextmanager
def spinner(message: str, *, shown: bool = True) -> Iterator[None]:
    """Says on standard error what is going on, while it goes on; nothing where nobody watches."""
    console = messages()
    with console.status(Text(message, style="dim")) if shown and console.is_terminal else nullcontext():
        yield
