"""Prompts from arguments, standard input and files; every mistake is named by its place."""

import io
from pathlib import Path

import pytest

from moa_serve.errors import InvalidRequest
from moa_serve.shell.prompts import PromptLine, read_prompts

NOTHING = io.BytesIO()


def test_arguments_come_before_the_file_and_a_dash_is_standard_input(tmp_path: Path) -> None:
    file = tmp_path / "more.txt"
    file.write_bytes(b"\xef\xbb\xbfthird \r\n\n  \nfourth")
    found = read_prompts(["first", "-"], str(file), io.BytesIO(b"second\n"))
    assert found == [
        PromptLine("first", "argument 1"),
        PromptLine("second", "standard input:1"),
        PromptLine("third ", f"{file}:1"),
        PromptLine("fourth", f"{file}:4"),
    ]


def test_json_lines_are_strings_or_objects(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        '"a"\n{"prompt": "b"}\n{"prompt": [1, 2], "adapter": "x"}\n{"prompt": "c", "adapter": null}\n{"prompt": "d", "adapter": "base"}'
    )
    found = [(line.prompt, line.has_adapter, line.adapter) for line in read_prompts([], str(file), NOTHING)]
    assert found == [("a", False, None), ("b", False, None), ([1, 2], True, "x"), ("c", True, None), ("d", True, None)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"\xff", "is not UTF-8 text"),
        (b"[1, 2]", "must be a string or an object with a prompt, not a list"),
        (b"null", "must be a string or an object with a prompt, not null"),
        (b"{}", "has no 'prompt'"),
        (b'{"prompt": 5}', "not a number"),
        (b'{"prompt": [true]}', "must be a string or a list of token ids"),
        (b'{"prompt": [1.5]}', "must be a string or a list of token ids"),
        (b'{"prompt": []}', "'prompt' is empty"),
        (b'""', "'prompt' is empty"),
        (b'{"prompt": "a", "adaptor": "x"}', "has an unknown key 'adaptor'"),
        (b'{"prompt": "a", "adapter": 3}', "'adapter' must be a name, or null for the base"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, reason: str) -> None:
    """Of a thousand lines, nobody finds the wrong one alone."""
    file = tmp_path / "p.jsonl"
    file.write_bytes(b'"fine"\n\n' + line + b"\n")
    with pytest.raises(InvalidRequest) as caught:
        read_prompts([], str(file), NOTHING)
    assert str(caught.value).startswith(f"{file}:3: ")
    assert reason in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    for file in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InvalidRequest, match="cannot be read"):
            read_prompts([], str(file), NOTHING)


def test_standard_input_can_be_read_once() -> None:
    with pytest.raises(InvalidRequest, match="given twice"):
        read_prompts(["-", "-"], None, NOTHING)
