"""Structured output: what the generated text must be (Guide), what that means in tokens (Grammar), how far a sequence is (Matcher).

llguidance does the work. Whatever a guide says, it costs little: its size, its repetitions and the work of each mask are bounded, it
reaches no file and no network, and it is compiled in threads of its own, never in the engine's. A Guide and a Grammar never change, and
any thread may share them; a GrammarCompiler may be called from any thread; a Matcher belongs to the engine thread.
"""

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from math import lcm
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from moa_serve.errors import GrammarInvalid, InvalidRequest, Overloaded

MAX_SOURCE_BYTES = 128 * 2**10
MAX_CHOICES = 1024
COMPILE_SECONDS = 5.0  # what is real takes milliseconds
MAX_COMPILING = 2

_NUM_CACHED = 128
_STACK_BYTES = 256 * 2**20  # of address space: a chain of rules as long as the source allows is followed by recursion
_MAX_MULTIPLE = 100_000  # an automaton has a state for each remainder: 2 us each
_MAX_MESSAGE_CHARS = 300

_SPARE_SECONDS, _SECONDS_A_TOKEN = 0.1, 0.002
"""Processor time for all masks of a row: an ambiguous grammar costs more with every token. What is usual takes 0.02 to 0.2 ms a token."""

_MARK = "\x02"  # a character that no tokenizer joins with its neighbours

_LIMITS = LLParserLimits(
    step_lexer_fuel=50_000,  # of one mask, at about 14 a microsecond
    step_max_items=20_000,  # of one mask, at about 20 a microsecond
    verbose_errors=False,
)
_JSON_OPTIONS: Any = {
    # JSON allows white space without end, and so a model that never ends.
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}",
    "coerce_one_of": True,
}

TokenBits = npt.NDArray[np.uint8]
"""(4 * ceil(V / 32),) a bit for each token, the lowest of a byte first."""


@dataclass(frozen=True, slots=True)
class Guide:
    """What the generated text must be. Made by one of the four class methods; all they raise is InvalidRequest with `param` "guide".

    Args:
        kind: of `source`: a JSON schema as JSON, a regular expression, a JSON list of texts, or a grammar.
    """

    kind: Literal["json", "regex", "choice", "grammar"]
    source: str

    @classmethod
    def json(cls, schema: Mapping[str, Any] | bool | str) -> "Guide":
        """A JSON value that fits `schema`, an object or its JSON text; `{"type": "object"}` is any object.

        `oneOf` is taken as `anyOf`; a keyword that cannot be enforced is refused when the guide is compiled.
        """
        if isinstance(schema, str):
            try:
                schema = json.loads(schema)
            except (ValueError, RecursionError):
                raise InvalidRequest("guide: the JSON schema is text, but no JSON", param="guide") from None
        if not isinstance(schema, Mapping | bool):
            raise InvalidRequest(f"guide: a JSON schema is an object, not {type(schema).__name__}", param="guide")
        try:
            source = json.dumps(schema if isinstance(schema, bool) else dict(schema), allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            raise InvalidRequest("guide: the JSON schema cannot be written as JSON, or is nested too deep", param="guide") from None
        return cls("json", _checked(source))

    @classmethod
    def regex(cls, pattern: str) -> "Guide":
        """A text that fits as a whole, in the syntax of Rust's regex crate; without anchors, look-around and back-references."""
        return cls("regex", _checked(pattern))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> "Guide":
        """One of these texts: 1 to 1,024, none empty."""
        if isinstance(choices, str) or not isinstance(choices, Sequence) or not all(isinstance(text, str) for text in choices):
            raise InvalidRequest("guide: choices must be a list of strings", param="guide")
        if not 1 <= len(choices) <= MAX_CHOICES or not all(choices):
            raise InvalidRequest(f"guide: choices must be 1 to {MAX_CHOICES} strings, none empty", param="guide")
        return cls("choice", _checked(json.dumps(list(choices))))

    @classmethod
    def grammar(cls, text: str) -> "Guide":
        """A text that the rule `start` (or `root`) derives, in llguidance's Lark syntax or llama.cpp's GBNF."""
        return cls("grammar", _checked(text))


def _checked(source: object) -> str:
    if not isinstance(source, str):
        raise InvalidRequest(f"guide: must be a string, not {type(source).__name__}", param="guide")
    if not source:
        raise InvalidRequest("guide: is empty", param="guide")
    try:
        size = len(source.encode())
    except UnicodeEncodeError:
        raise InvalidRequest("guide: is not Unicode, it has a lone surrogate", param="guide") from None
    if size > MAX_SOURCE_BYTES:
        raise InvalidRequest(f"guide: has {size} bytes; at most {MAX_SOURCE_BYTES} are allowed", param="guide")
    return source


class Grammar:
    """A compiled guide."""

    def __init__(self, start: LLMatcher, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._start, self._vocab_size = start, vocab_size
        self._eos_token_ids = list(eos_token_ids)

    def matcher(self) -> "Matcher":
        """For one sequence from its first token on."""
        return Matcher(self._start.deep_copy(), self._vocab_size, self._eos_token_ids)


class Matcher:
    """Where one sequence stands in its grammar.

    Attributes:
        error: why it cannot go on, or None. It is the sequence's error, and nobody else's.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, eos_token_ids: list[int]) -> None:
        self._matcher, self._vocab_size, self._eos_token_ids = matcher, vocab_size, eos_token_ids
        self.error: GrammarInvalid | None = None
        self._seconds_left = _SPARE_SECONDS

    def allowed(self, *, without: Sequence[int] = (), may_end: bool = True) -> TokenBits:
        """Which tokens may come next; all of them once there is an error. Asking twice changes nothing.

        Args:
            without: tokens that are not wanted,
            may_end: and whether an end of text is: where the grammar has nothing else, they are allowed all the same.
        """
        bits = np.zeros((self._vocab_size + 31) // 32, dtype=np.uint32)
        self._guarded(lambda: self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes))
        if self.error is not None:
            bits.fill(2**32 - 1)
        unwanted = np.array([*without, *(() if may_end else self._eos_token_ids)], dtype=np.uint32)
        if len(unwanted):
            rest = bits.copy()
            np.bitwise_and.at(rest, unwanted >> 5, ~(np.uint32(1) << (unwanted & 31)))
            bits = rest if rest.any() else bits
        return bits.view(np.uint8)

    def take(self, token_id: int) -> None:
        """One more token was generated."""
        self._seconds_left += _SECONDS_A_TOKEN
        self._guarded(lambda: self._matcher.consume_token(token_id))

    def _guarded(self, work: Callable[[], object]) -> None:
        """llguidance keeps its errors to itself, but whatever comes out of it, and what it costs, is this sequence's matter."""
        started = time.thread_time()
        try:
            work()
            message = self._matcher.get_error()
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        self._seconds_left -= time.thread_time() - started
        if not message and self._seconds_left < 0:
            message = "it takes too long to find out which tokens may come next"
        if message:
            self.error = GrammarInvalid(f"the guide cannot be followed any further: {_clean(message)}; make it simpler", param="guide")

    @property
    def is_complete(self) -> bool:
        """Nothing can follow: the text is what the guide asks for."""
        return self.error is None and self._matcher.is_stopped()


class Vocabulary(Protocol):
    """What is asked of a tokenizer."""

    @property
    def special_ids(self) -> Collection[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def encode(self, text: str, *, parse_special: bool, add_special: bool = True) -> list[int]: ...


class _Tokens:
    """A vocabulary as llguidance reads it. Its own reader of tokenizers takes every added token in angle brackets for a control token,
    though to models `<tool_call>` is text."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_token_id: int) -> None:
        self._vocabulary, self.eos_token_id = vocabulary, eos_token_id
        self.tokens = [vocabulary.token_bytes(token) for token in range(vocab_size)]
        self.special_token_ids = sorted(vocabulary.special_ids)
        self._ids = {text: token for token, text in enumerate(self.tokens) if text and token not in vocabulary.special_ids}
        self._max_bytes = max(map(len, self._ids), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """How a model would write `text` in the midst of others, used where a grammar leaves no choice."""
        ids = self._encode(text.decode())
        if self._bytes(ids) == text:
            return ids
        ids = self._encode(_MARK + text.decode())  # SentencePiece puts a space before what it takes for the beginning
        while ids and len(self._bytes(ids)) > len(text):
            del ids[0]
        return ids if self._bytes(ids) == text else self._longest(text)

    def _encode(self, text: str) -> list[int]:
        return self._vocabulary.encode(text, parse_special=False, add_special=False)

    def _bytes(self, ids: list[int]) -> bytes:
        return b"".join(self.tokens[token] for token in ids)

    def _longest(self, text: bytes) -> list[int]:
        """For tokenizers that change what they encode: the longest token that fits, again and again."""
        ids: list[int] = []
        while text:
            end = next((end for end in range(min(len(text), self._max_bytes), 0, -1) if text[:end] in self._ids), None)
            if end is None:
                break
            ids.append(self._ids[text[:end]])
            text = text[end:]
        return ids


class GrammarCompiler:
    """Compiles guides for one tokenizer, and keeps the last ones.

    Args:
        vocab_size: V of the logits, which may be more than the tokenizer has.
        eos_token_ids: what may end a text.
    """

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._vocabulary, self._vocab_size = vocabulary, vocab_size
        self._eos_token_ids = tuple(token for token in eos_token_ids if token < vocab_size)
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None  # built for the first guide: 0.5 s with 49,152 tokens
        self._grammars: OrderedDict[Guide, Grammar] = OrderedDict()
        self._room = threading.Semaphore(MAX_COMPILING)

    def compile(self, guide: Guide) -> Grammar:
        """Takes milliseconds, and the first time a moment for the tokenizer.

        Raises:
            GrammarInvalid: the guide is malformed, too complex, or leaves nothing to generate; `param` is "guide".
            InvalidRequest: this base cannot be guided. Overloaded: guides that take long are being compiled.
        """
        with self._lock:
            if guide in self._grammars:
                self._grammars.move_to_end(guide)
                return self._grammars[guide]
        if not self._eos_token_ids:
            raise InvalidRequest("guide: the base names no end of text, so nothing could end a guided one", param="guide")
        if not self._room.acquire(timeout=COMPILE_SECONDS):
            raise Overloaded("guides that take long are being compiled; try again later")
        found: list[Grammar | Exception] = []
        thread = _start_deep(lambda: self._run(guide, found))
        thread.join(COMPILE_SECONDS)
        if not found:
            raise GrammarInvalid(f"the guide takes more than {COMPILE_SECONDS:g} s to compile; make it simpler", param="guide")
        if isinstance(found[0], Exception):
            raise found[0]
        return found[0]

    def _run(self, guide: Guide, found: list[Grammar | Exception]) -> None:
        try:
            grammar = self._compile(guide)
            with self._lock:
                self._grammars[guide] = grammar
                if len(self._grammars) > _NUM_CACHED:
                    self._grammars.popitem(last=False)
            found.append(grammar)
        except Exception as error:
            found.append(error)
        finally:
            self._room.release()

    def _compile(self, guide: Guide) -> Grammar:
        with self._lock:
            tokenizer = self._tokenizer = self._tokenizer or self._build_tokenizer()
        try:
            start = LLMatcher(tokenizer, _translated(guide), limits=_LIMITS, log_level=0)
        except (ValueError, RecursionError) as error:  # the translation from GBNF is Python, and says no with any error it likes
            raise GrammarInvalid(f"the guide is no valid {guide.kind}: {_clean(str(error))}", param="guide") from None
        if start.is_error():
            raise GrammarInvalid(f"the guide is no valid {guide.kind}: {_clean(start.get_error())}", param="guide")
        grammar = Grammar(start, self._vocab_size, self._eos_token_ids)
        first = grammar.matcher()  # the first mask costs the most; what is learned for it is shared by all copies
        first.allowed()
        if first.error is not None:
            raise GrammarInvalid(f"the guide allows no text, or is too complex: {_clean(str(first.error))}", param="guide")
        return grammar

    def _build_tokenizer(self) -> LLTokenizer:
        tokens = TokenizerWrapper(_Tokens(self._vocabulary, self._vocab_size, self._eos_token_ids[0]))
        return LLTokenizer(tokens, n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids))


def _start_deep(work: Callable[[], None]) -> threading.Thread:
    """A daemon thread with a deep stack: one that hangs must not keep the process."""
    with _stack_size_lock:
        before = threading.stack_size(_STACK_BYTES)
        try:
            thread = threading.Thread(target=work, name="moa-grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    return thread


_stack_size_lock = threading.Lock()


def _translated(guide: Guide) -> str:
    """In llguidance's own words."""
    if guide.kind == "json":
        schema = json.loads(guide.source)
        _check_multiples([schema])
        return LLMatcher.grammar_from_json_schema(json.dumps(with_options(schema)))
    if guide.kind == "regex":
        return LLMatcher.grammar_from_regex(guide.source)
    if guide.kind == "choice":
        return LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(text) for text in json.loads(guide.source)))
    _check_multiples(_schemas_in(guide.source))
    try:
        text = any_to_lark(guide.source)
    except Exception as error:
        raise ValueError(str(error)) from None
    return LLMatcher.grammar_from_lark(text)


def with_options(schema: Any) -> Any:
    """A JSON schema with our options in its `x-guidance`, as far as it has none of its own: how `%json` in a grammar takes them too."""
    if not isinstance(schema, dict):
        return {"allOf": [schema], "x-guidance": _JSON_OPTIONS} if isinstance(schema, bool) else schema
    own = schema.get("x-guidance", {})
    if not isinstance(own, dict):
        return schema
    ours = {name: value for name, value in _JSON_OPTIONS.items() if name != "whitespace_pattern" or "whitespace_flexible" not in own}
    return schema | {"x-guidance": ours | own}


def _schemas_in(grammar: str) -> Iterator[Any]:
    """The JSON schemas that stand in a grammar."""
    for found in re.finditer(r"%json\s*", grammar):
        try:
            yield json.JSONDecoder().raw_decode(grammar, found.end())[0]
        except ValueError:
            raise GrammarInvalid("the guide has a %json that no JSON schema follows", param="guide") from None


def _check_multiples(schemas: Any) -> None:
    """Raises GrammarInvalid: `multipleOf` would need an automaton of too many states."""
    together, left = 1, list(schemas)
    while left:
        value = left.pop()
        if isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += value.values()
            multiple = value.get("multipleOf")
            if isinstance(multiple, int | float) and not isinstance(multiple, bool) and multiple:
                together = lcm(together, _whole(multiple))
                if together > _MAX_MULTIPLE:
                    raise GrammarInvalid(
                        f"the guide has multipleOf {str(multiple)[:20]}, in all more than {_MAX_MULTIPLE} remainders; leave it out",
                        param="guide",
                    )


def _whole(multiple: int | float) -> int:
    """0.25 is told by 25 remainders; at most one more than is allowed."""
    try:
        _, digits, exponent = Decimal(str(multiple)).as_tuple()
    except (InvalidOperation, ValueError):  # thousands of digits
        return _MAX_MULTIPLE + 1
    if not isinstance(exponent, int) or len(digits) + max(exponent, 0) > 9:
        return _MAX_MULTIPLE + 1
    whole: int = int("".join(map(str, digits))) * 10 ** max(exponent, 0)
    return max(whole, 10 ** -max(exponent, -9)) if exponent < 0 else whole


def _clean(message: str) -> str:
    """What llguidance says, on one line."""
    text = " ".join(message.replace("<non-verbose/>", "").split())
    return text if len(text) <= _MAX_MESSAGE_CHARS else text[:_MAX_MESSAGE_CHARS] + "..."
