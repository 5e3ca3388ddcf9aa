"""The prompts of `moa-serve generate`: arguments, standard input, text files, JSONL files. No torch, no terminal."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Never

from moa_serve.errors import InvalidRequest

BASE = "base"  # stands for the base alone wherever an adapter can be named
STDIN = "-"


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One prompt and where it stands.

    Args:
        prompt: text, or token ids.
        where: for messages: `argument 1`, `prompts.jsonl:7`.
        has_adapter: the line itself says under which adapter it runs, and runs under no other.
        adapter: that adapter; None is the base.
    """

    prompt: str | list[int]
    where: str
    has_adapter: bool = False
    adapter: str | None = None


def read_prompts(arguments: Sequence[str], file: str | None, stdin: BinaryIO) -> list[PromptLine]:
    """Prompts of the arguments, then those of the file; `-` is standard input in both places. Blank lines are none.

    Raises:
        InvalidRequest: names the file and the line.
    """
    if [*arguments, file].count(STDIN) > 1:
        raise InvalidRequest("standard input (-) is given twice; it can be read once", param="file")
    lines: list[PromptLine] = []
    for number, argument in enumerate(arguments, start=1):
        if argument == STDIN:
            lines += _text_lines(stdin.read(), "standard input")
        else:
            lines.append(PromptLine(argument, f"argument {number}"))
    if file == STDIN:
        lines += _text_lines(stdin.read(), "standard input")
    elif file is not None:
        read = _json_lines if Path(file).suffix == ".jsonl" else _text_lines
        lines += read(_read(file), file)
    return lines


def _read(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidRequest(f"{file}: cannot be read ({reason})", param="file") from None


def _numbered(data: bytes, name: str) -> Iterator[tuple[str, str]]:
    """(where, text) of every line that is not blank."""
    data = data.removeprefix(b"\xef\xbb\xbf")  # the mark that some editors put before UTF-8
    for number, line in enumerate(data.split(b"\n"), start=1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8").removesuffix("\r")
        except UnicodeDecodeError:
            raise InvalidRequest(f"{where}: is not UTF-8 text", param="file") from None
        if text.strip():
            yield where, text


def _text_lines(data: bytes, name: str) -> list[PromptLine]:
    return [PromptLine(text, where) for where, text in _numbered(data, name)]


def _json_lines(data: bytes, name: str) -> list[PromptLine]:
    lines = []
    for where, text in _numbered(data, name):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise InvalidRequest(f"{where}: is not valid JSON; a line is a string or an object with a prompt", param="file") from None
        lines.append(_json_line(value, where))
    return lines


def _json_line(value: Any, where: str) -> PromptLine:
    def refuse(reason: str) -> Never:
        raise InvalidRequest(f"{where}: {reason}", param="file")

    if isinstance(value, str):
        value = {"prompt": value}
    if not isinstance(value, dict):
        refuse(f"must be a string or an object with a prompt, not {_kind(value)}")
    if unknown := [key for key in value if key not in ("prompt", "adapter")]:
        refuse(f"has an unknown key {unknown[0]!r}; known are 'prompt' and 'adapter'")
    if "prompt" not in value:
        refuse("has no 'prompt'")
    prompt, adapter = value["prompt"], value.get("adapter")
    is_ids = isinstance(prompt, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in prompt)
    if not isinstance(prompt, str) and not is_ids:
        refuse(f"'prompt' must be a string or a list of token ids, not {_kind(prompt)}")
    if not prompt:
        refuse("'prompt' is empty")
    if adapter is not None and not isinstance(adapter, str):
        refuse(f"'adapter' must be a name, or null for the base, not {_kind(adapter)}")
    return PromptLine(prompt, where, "adapter" in value, None if adapter == BASE else adapter)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    if isinstance(value, list) and value:
        return "a list of other things"
    return names.get(type(value), "a number")
