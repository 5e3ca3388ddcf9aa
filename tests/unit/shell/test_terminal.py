"""What may reach a terminal."""

import pytest

from moa_serve.shell.terminal import one_line, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\nlines\tand a\u00a0space", "two\nlines\tand a\u00a0space"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\x9b2J", "\\x9b2J"),
        ("bell\x07 and\r", "bell\\x07 and\\r"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\ud800", "\\ud800"),
        ("日本語 é", "日本語 é"),
        ("👩\u200d💻", "👩\u200d💻"),
        ("\ufffd", "\ufffd"),
    ],
)
def test_what_is_not_shown_as_itself_is_written_out(text: str, shown: str) -> None:
    """A terminal obeys ESC and the C1 controls; a change of direction makes a text look like another."""
    assert visible(text) == shown


def test_a_message_is_one_line() -> None:
    """A name with a new line could otherwise forge a line of ours."""
    assert one_line("name\nerror: \x1b forged") == "name error: \\x1b forged"
