"""Tool calls: the grammar that holds a model to them, and the reader that finds them in its text.

Two ways of writing are known, told apart by the base's chat template. Hermes and Qwen: `{"name": ..., "arguments": {...}}` on a line of its
own between `<tool_call>` and `</tool_call>`, as often as there are calls, with text before. Llama 3: the whole answer is
`{"name": ..., "parameters": {...}}`, more of them after `; `. A reader belongs to one choice and to the event loop.
"""

import json
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from moa_serve.api.schemas import Function, Tool
from moa_serve.engine.guide import Guide, with_options

Format = Literal["hermes", "llama"]

_ARGUMENTS = {"hermes": "arguments", "llama": "parameters"}
_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)')


def tool_guide(form: Format, tools: Sequence[Tool], *, is_required: bool, has_many: bool) -> Guide:
    """Calls of these tools with arguments that fit, one or more, and nothing else; if not required, text and any number of calls.

    Raises:
        InvalidRequest: they are too large together.
    """
    calls, rules = [], []
    for number, tool in enumerate(tools):
        head = f'{{"name": {json.dumps(tool.function.name)}, "{_ARGUMENTS[form]}": '
        calls.append(f'{json.dumps(head)} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {json.dumps(_schema(tool.function))}")
    call = " | ".join(calls)
    if form == "llama":
        # Free text is what does not begin as a call does.
        start = 'start: call ("; " call)*' if has_many else "start: call"
        start += "" if is_required else "\n    | TEXT?\nTEXT: /[^{\\s](.|\\n)*/"
        return Guide.grammar("\n".join([start, f"call: {call}", *rules]))
    begin, end = json.dumps(_OPEN + "\n"), json.dumps("\n" + _CLOSE)
    if is_required:
        start = f'start: {begin} call {end} ("\\n" {begin} call {end})*' if has_many else f"start: {begin} call {end}"
        return Guide.grammar("\n".join([start, f"call: {call}", *rules]))
    start = f"start: (head call {end}){'*' if has_many else '?'} tail\nhead[lazy]: /(.|\\n)*/ {begin}\ntail: /(.|\\n)*/"
    return Guide.grammar("\n".join([start, f"call: {call}", *rules]))


def _schema(function: Function) -> Any:
    """What cannot be enforced is refused only where the client insists."""
    schema = function.parameters
    return with_options(schema if function.strict else {"x-guidance": {"lenient": True}} | schema)


@dataclass(slots=True)
class CallDelta:
    """A piece of one call: its first has the name and the id, all have some of the arguments' text, maybe none."""

    index: int
    arguments: str
    name: str | None = None
    id: str | None = None


class ToolReader:
    """Text in pieces, as it is generated, to what of it is content and what is calls.

    A call is told as soon as its name is there, and its arguments as they come: as the model wrote them, valid or not. What begins as a
    call and turns out to be none is content. What comes out does not depend on how the text is divided.

    Args:
        has_many: whether calls after the first count; else they are dropped.
    """

    def __init__(self, form: Format, *, has_many: bool = True) -> None:
        self._form, self._has_many = form, has_many
        self._buffer = ""
        self._state: Callable[[bool], str | None] = self._read_text if form == "hermes" else self._read_start
        self._content: list[str] = []
        self._calls: list[CallDelta] = []
        self._depth, self._in_string, self._is_escaped = 0, False, False
        self.num_calls = 0

    def push(self, text: str, *, is_last: bool = False) -> tuple[str, list[CallDelta]]:
        """Content and pieces of calls that are certain now; with the last piece of text, all there is."""
        self._buffer += text
        while True:
            rest = self._state(is_last)
            if rest is None:
                break
            self._buffer = rest
        content, self._content = "".join(self._content), []
        calls, self._calls = self._calls, []
        return content, calls if self._has_many else [call for call in calls if call.index == 0]

    # Each state takes what it can from the buffer, and gives the rest where there is more to do, None where more text must come first.

    def _read_text(self, is_last: bool) -> str | None:
        """Outside of calls. White space is content only where more content follows."""
        before, mark, after = self._buffer.partition(_OPEN)
        if mark:
            self._content.append(before.rstrip())
            self._state = self._read_head
            return after
        held = 0 if is_last else max(n for n in range(len(_OPEN)) if self._buffer.endswith(_OPEN[:n]))
        certain = self._buffer[: len(self._buffer) - held]
        if not is_last or self.num_calls:
            certain = certain.rstrip()
        if self.num_calls and not certain:
            self._buffer = "" if is_last else self._buffer
            return None
        self._content.append(certain)
        self._buffer = self._buffer[len(certain) :]
        return None

    def _read_start(self, is_last: bool) -> str | None:
        """Llama: the first character that is no white space tells whether the answer is calls or text."""
        begun = self._buffer.lstrip()
        if not begun and not is_last:
            return None
        self._state = self._read_head if begun.startswith("{") else self._read_rest
        return self._buffer

    def _read_head(self, is_last: bool) -> str | None:
        found = _HEAD.match(self._buffer)
        name = _loaded(found[1]) if found else None
        if found is None or not isinstance(name, str):
            return self._read_whole(is_last)
        self._begin(name, "")
        self._state = self._read_arguments
        return self._buffer[found.end() :]

    def _read_whole(self, is_last: bool) -> str | None:
        """A call whose arguments come before its name, or none at all; known when its end is there."""
        text, mark, after = self._buffer.partition(_CLOSE) if self._form == "hermes" else (self._buffer, "", "")
        if not mark and not is_last:
            return None
        call = _loaded(text)
        name, arguments = (call.get("name"), call.get(_ARGUMENTS[self._form])) if isinstance(call, dict) else (None, None)
        if isinstance(name, str) and isinstance(arguments, dict):
            self._begin(name, json.dumps(arguments))
        else:
            self._content.append(_OPEN + text + mark if self._form == "hermes" else text)
        self._state = self._read_text if self._form == "hermes" else self._read_rest
        return after

    def _begin(self, name: str, arguments: str) -> None:
        self._calls.append(CallDelta(self.num_calls, arguments, name, f"call_{secrets.token_hex(12)}"))
        self.num_calls += 1

    def _read_arguments(self, is_last: bool) -> str | None:
        """Up to the bracket that closes the object; brackets in strings do not count."""
        for place, char in enumerate(self._buffer):
            if self._in_string:
                if self._is_escaped:
                    self._is_escaped = False
                elif char == "\\":
                    self._is_escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    self._calls.append(CallDelta(self.num_calls - 1, self._buffer[: place + 1]))
                    self._state = self._read_end
                    return self._buffer[place + 1 :]
        if self._buffer:
            self._calls.append(CallDelta(self.num_calls - 1, self._buffer))
            self._buffer = ""
        return None

    def _read_end(self, is_last: bool) -> str | None:
        """What stands behind the arguments: the object's own bracket, and the mark that closes the call or a semicolon before the next."""
        if self._form == "hermes":
            _, mark, after = self._buffer.partition(_CLOSE)
            if mark:
                self._state = self._read_text
                return after
        else:
            rest = self._buffer.lstrip("} \n\t")
            if rest.startswith(";"):
                self._state = self._read_head
                return rest[1:]
            if rest:
                self._state = self._read_rest
                return rest
        return None

    def _read_rest(self, is_last: bool) -> str | None:
        self._content.append(self._buffer)
        self._buffer = ""
        return None


def _loaded(text: str) -> Any:
    try:
        return json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None


def as_template_wants(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as OpenAI's API writes them, without what is for the server alone."""
    return [{"type": "function", "function": tool.function.model_dump(exclude={"strict"}, exclude_none=True)} for tool in tools]
