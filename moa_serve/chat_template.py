"""Chat messages to token ids, through a chat template.

The base's template is code that came with the model: it runs in a sandbox that cannot change what it is given. An adapter's, where the
operator lets it, runs in a child process (sandbox.py). Control tokens of a template become control tokens; those that stand inside a
message stay text. Immutable; `encode` may run in any thread.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol

import jinja2
from jinja2.meta import find_undeclared_variables

from moa_serve.errors import InvalidRequest
from moa_serve.sandbox import TemplateFailed, environment
from moa_serve.text import Tokenizer

_ROLES = {"developer": "system"}  # OpenAI's newer word; templates know the older one
_PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xF0400))


class Message(Protocol):
    """One message of a chat, of a request or of a data file."""

    @property
    def role(self) -> str: ...

    @property
    def text(self) -> str: ...

    @property
    def more(self) -> Mapping[str, Any]:
        """What templates may read besides: tool_calls, tool_call_id."""
        ...


class ChatTemplate:
    """
    Args:
        source: an adapter's template; the tokenizer's own if omitted.
        render: renders an adapter's: gets the source and the variables. Raises TemplateFailed.
    """

    def __init__(
        self, tokenizer: Tokenizer, source: str | None = None, *, render: Callable[[str, dict[str, Any]], str] | None = None
    ) -> None:
        self._tokenizer, self._render_outside = tokenizer, render
        self._source = tokenizer.chat_template if source is None else source
        self._whose = "base" if source is None else "adapter"
        control = sorted((tokenizer.token_text(token_id) for token_id in tokenizer.special_ids), key=len, reverse=True)
        self._control = re.compile("|".join(re.escape(text) for text in control if text) or "(?!)")

    @cached_property
    def tool_format(self) -> Literal["hermes", "llama"] | None:
        """How the template has tools called: `<tool_call>{...}</tool_call>` (Hermes, Qwen), a bare JSON object (Llama 3), or not at all."""
        source = self._source or ""
        try:
            if "tools" not in find_undeclared_variables(environment().parse(source)):
                return None
        except (jinja2.TemplateError, RecursionError):
            return None
        if "<tool_call>" in source and not self._control.fullmatch("<tool_call>"):
            return "hermes"
        return "llama" if '"parameters"' in source else None

    def encode(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        check: Callable[[str], None] = lambda text: None,
    ) -> list[int]:
        """Token ids of a chat, to be continued by the assistant.

        Before the template sees the messages, the first character of each control token in them is replaced by a private one, so every
        control token in what it renders is its own; it may still trim, split and compare texts. Then a piece that holds private
        characters gets the true ones back and is encoded as text; all others are encoded as the tokenizer would read them.

        Args:
            tools: as OpenAI's API writes them.
            check: is shown the rendered text before it is tokenised, and may raise.
        Raises:
            InvalidRequest: the base has no template, or its template refuses these messages.
        """
        try:
            return self._encode(messages, list(tools), add_generation_prompt, check)
        except RecursionError:
            raise InvalidRequest("the tools, or the arguments of a call, are nested too deep", param="messages") from None

    def _encode(
        self, messages: Sequence[Message], tools: list[Any], add_generation_prompt: bool, check: Callable[[str], None]
    ) -> list[int]:
        given = [{"role": _ROLES.get(message.role, message.role), "content": message.text, **message.more} for message in messages]
        marks = self._marks([*_texts(given), *_texts(tools)])
        hide: Callable[[re.Match[str]], str] = lambda found: marks[found[0][0]] + found[0][1:]  # noqa: E731
        shown, shown_tools = self._hidden(given, hide), self._hidden(tools, hide)
        rendered = self._render(shown, shown_tools or None, add_generation_prompt)
        check(rendered)
        truth = {ord(mark): first for first, mark in marks.items()}
        ids: list[int] = []
        for is_text, piece in self._pieces(rendered, set(marks.values())):
            text = piece.translate(truth) if is_text else piece
            ids += self._tokenizer.encode(text, parse_special=not is_text, add_special=False)
        return ids

    def _hidden(self, value: Any, hide: Callable[[re.Match[str]], str]) -> Any:
        """A JSON value with every text in it hidden; repeated, because hiding one may leave another that overlapped it."""
        if isinstance(value, dict):
            return {self._hidden(key, hide): self._hidden(item, hide) for key, item in value.items()}
        if isinstance(value, list):
            return [self._hidden(item, hide) for item in value]
        while isinstance(value, str) and self._control.search(value):
            value = self._control.sub(hide, value)
        return value

    def _marks(self, texts: Sequence[str]) -> dict[str, str]:
        """First character of each control token that the messages hold -> a character that stands nowhere else."""
        firsts = sorted({found[0][0] for text in texts for found in self._control.finditer(text)})
        if not firsts:
            return {}
        used = set().union(*texts, self._control.pattern, self._source or "")
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        try:
            return {first: next(free) for first in firsts}
        except StopIteration:
            raise InvalidRequest("the messages use all private-use characters and hold control tokens", param="messages") from None

    def _pieces(self, rendered: str, marks: set[str]) -> list[tuple[bool, str]]:
        """(is it text only, piece): cut at control tokens, and only around pieces with a mark, so that all else is encoded as a whole."""
        if not marks:
            return [(False, rendered)]
        pieces: list[tuple[bool, str]] = []
        clean, end = "", 0
        for found in [*self._control.finditer(rendered), None]:
            between = rendered[end : found.start() if found else None]
            if marks.isdisjoint(between):
                clean += between
            else:
                pieces += [(False, clean), (True, between)]
                clean = ""
            if found:
                clean += found[0]
                end = found.end()
        return [(is_text, piece) for is_text, piece in [*pieces, (False, clean)] if piece]

    def _render(self, messages: list[dict[str, Any]], tools: list[Any] | None, add_generation_prompt: bool) -> str:
        variables = {
            "messages": messages,
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokenizer.special_tokens,
        }
        try:
            if self._render_outside is not None and self._source is not None:
                return self._render_outside(self._source, variables)
            return self._template.render(variables)
        except (jinja2.TemplateError, TemplateFailed) as error:
            raise InvalidRequest(f"the {self._whose}'s chat template refuses these messages: {error}", param="messages") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        if self._source is None:
            raise InvalidRequest("the base has no chat template, so it cannot chat; use /v1/completions", param="messages")
        try:
            return environment().from_string(self._source)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the base's chat template cannot be used: {error}; use /v1/completions", param="messages") from None


def _texts(value: Any) -> Iterator[str]:
    """Every text in a JSON value, names included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
