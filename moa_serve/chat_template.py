"""Chat messages to token ids, through the base's own chat template.

The template is code that came with the model: it runs in a sandbox that cannot change what it is given. Its control tokens become control
tokens; those that stand inside a message stay text. Adapters have no templates of their own. Immutable; `encode` may run in any thread.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moa_serve.errors import InvalidRequest
from moa_serve.text import Tokenizer

_ROLES = {"developer": "system"}  # OpenAI's newer word; templates know the older one
_PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xF0400))


class Message(Protocol):
    """One message of a chat, of a request or of a data file."""

    @property
    def role(self) -> str: ...

    @property
    def text(self) -> str: ...


class ChatTemplate:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        control = sorted((tokenizer.token_text(token_id) for token_id in tokenizer.special_ids), key=len, reverse=True)
        self._control = re.compile("|".join(re.escape(text) for text in control if text) or "(?!)")

    def encode(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, check: Callable[[str], None] = lambda text: None
    ) -> list[int]:
        """Token ids of a chat, to be continued by the assistant.

        Before the template sees the messages, the first character of each control token in them is replaced by a private one, so every
        control token in what it renders is its own; it may still trim, split and compare texts. Then a piece that holds private
        characters gets the true ones back and is encoded as text; all others are encoded as the tokenizer would read them.

        Args:
            check: is shown the rendered text before it is tokenised, and may raise.
        Raises:
            InvalidRequest: the base has no template, or its template refuses these messages.
        """
        texts = [message.text for message in messages]
        marks = self._marks(texts)
        hide: Callable[[re.Match[str]], str] = lambda found: marks[found[0][0]] + found[0][1:]  # noqa: E731
        shown = [
            {"role": _ROLES.get(message.role, message.role), "content": self._hidden(text, hide)}
            for message, text in zip(messages, texts, strict=True)
        ]
        rendered = self._render(shown, add_generation_prompt)
        check(rendered)
        truth = {ord(mark): first for first, mark in marks.items()}
        ids: list[int] = []
        for is_text, piece in self._pieces(rendered, set(marks.values())):
            text = piece.translate(truth) if is_text else piece
            ids += self._tokenizer.encode(text, parse_special=not is_text, add_special=False)
        return ids

    def _hidden(self, text: str, hide: Callable[[re.Match[str]], str]) -> str:
        """Repeated, because hiding one may leave another that overlapped it."""
        while self._control.search(text):
            text = self._control.sub(hide, text)
        return text

    def _marks(self, texts: Sequence[str]) -> dict[str, str]:
        """First character of each control token that the messages hold -> a character that stands nowhere else."""
        firsts = sorted({found[0][0] for text in texts for found in self._control.finditer(text)})
        if not firsts:
            return {}
        used = set().union(*texts, self._control.pattern, self._tokenizer.chat_template or "")
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

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self._tokenizer.special_tokens
            )
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the base's chat template refuses these messages: {error}", param="messages") from None

    @cached_property
    def _template(self) -> jinja2.Template:
        source = self._tokenizer.chat_template
        if source is None:
            raise InvalidRequest("the base has no chat template, so it cannot chat; use /v1/completions", param="messages")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise InvalidRequest(f"the base's chat template cannot be used: {error}; use /v1/completions", param="messages") from None


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training; to serve it is nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Jinja's own escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)
