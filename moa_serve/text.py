"""Text to token ids and back: a base's tokenizer, and decoding token by token while text is streamed.

The `tokenizers` library does the encoding. Decoding goes through the bytes of each token, which makes one token cost the same however
long the text is, and never shows half a character. Not for chat templates, which are rendered above. A Tokenizer is immutable and shared by
all threads; an IncrementalDecoder belongs to one sequence.
"""

import codecs
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from moa_serve.errors import InvalidRequest, ModelCorrupt, ModelUnsupported

_SPACE = "▁"  # SentencePiece's space
_BYTE_LEVEL = {"ByteLevel", "Fuse"}
_SENTENCEPIECE = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def _byte_of_char() -> dict[str, int]:
    """GPT-2's table: a printable byte stands for itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """A base's tokenizer.

    Attributes:
        chat_template: the Jinja source, or None.
        special_tokens: the text of `bos_token`, `eos_token`, `unk_token`, `pad_token`, as far as the base has them.
        special_ids: ids of all control tokens.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, chat_template: str | None = None, special_tokens: dict[str, str] | None = None
    ) -> None:
        """Raises: ModelUnsupported where the decoder is of neither kind that LLaMA-family models have."""
        backend.no_truncation()  # some files carry what the training run had set
        backend.no_padding()
        self._backend = backend
        self._is_byte_level = _is_byte_level(backend)
        added = backend.get_added_tokens_decoder()
        self.chat_template = chat_template
        self.special_tokens = special_tokens or {}
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._added = {index: token.content.encode() for index, token in added.items()}
        self._bytes: dict[int, bytes] = {}  # filled as tokens are met; a race computes the same bytes twice

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer | None":
        """From `tokenizer.json` and what `tokenizer_config.json` adds; None where the folder has no tokenizer.

        Raises:
            ModelCorrupt, ModelUnsupported: name the file.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise ModelCorrupt(f"{path}: cannot be read as a tokenizer ({error})") from None
        config = _read_config(folder / "tokenizer_config.json")
        named = {name: _content(config.get(name)) for name in _NAMES}
        try:
            return cls(
                backend,
                chat_template=_chat_template(folder, config),
                special_tokens={name: text for name, text in named.items() if text is not None},
            )
        except ModelUnsupported as error:
            raise ModelUnsupported(f"{path}: {error}", param=error.param) from None

    @property
    def vocab_size(self) -> int:
        """Added tokens included; the base's own vocabulary may be larger, padded to a round number."""
        return self._backend.get_vocab_size()

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def encode(self, text: str, *, parse_special: bool, add_special: bool = True) -> list[int]:
        """Token ids of `text`.

        Args:
            parse_special: whether a control token that is written out in the text becomes that token; else it stays text, as
                it must in what a user sent.
            add_special: whether the tokenizer puts its own tokens around (BOS, where it has one).
        Raises:
            InvalidRequest: the text holds a lone surrogate, so it is no Unicode.
        """
        backend = self._backend if parse_special else self._plain
        try:
            # A batch of one, because it gives the GIL away while it works: a long prompt must not stop the engine's thread.
            return list(backend.encode_batch([text], add_special_tokens=add_special)[0].ids)
        except TypeError:  # all that the library says where it cannot turn the text into UTF-8
            raise InvalidRequest(f"the text is not Unicode: {_fault(text)}; send valid UTF-8") from None

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of a whole sequence, as the tokenizer's own decoder gives it; for a continuation see IncrementalDecoder."""
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def token_bytes(self, token_id: int) -> bytes:
        """What one token adds to the text; maybe a part of a character. Empty for an id that only the base's padding has."""
        found = self._bytes.get(token_id)
        if found is None:
            found = self._bytes[token_id] = self._compute_bytes(token_id)
        return found

    def token_text(self, token_id: int) -> str:
        """One token to show, in log-probabilities; a part of a character shows as U+FFFD, and `token_bytes` tells it."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer, to which control tokens are text. A second one, because the flag is not a matter of one call."""
        plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    def _compute_bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._is_byte_level:
            values = [_BYTE_OF_CHAR.get(char) for char in token]
            known = [value for value in values if value is not None]
            return bytes(known) if len(known) == len(values) else token.encode()
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace(_SPACE, " ").encode()


class IncrementalDecoder:
    """The text of one sequence while its tokens come, cut before the first stop string.

    A character is given out once all its bytes are there; text that may be the beginning of a stop string is held back until it is
    certain. What comes out does not depend on how the text is divided into tokens: the stop string that is *complete* first counts, of
    two that end together the longer one. The continuation keeps its leading space. Text of the first `min_tokens` - 1 tokens cannot stop.
    """

    def __init__(self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), min_tokens: int = 0, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if skip_special else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_StopMatcher(text) for text in stop if text]
        self._min_tokens = min_tokens
        self._held = ""
        self.num_tokens = 0  # taken, the one that completed the stop string included
        self.num_chars = 0  # given out; after a stop this is where the text is cut
        self.stopped: str | None = None  # the stop string that was met

    def push(self, ids: Iterable[int]) -> str:
        """Text that these tokens make certain; nothing after a stop string, and tokens behind it are not taken."""
        certain = []
        for token_id in ids:
            if self.stopped is not None:
                break
            self.num_tokens += 1
            if token_id not in self._hidden:
                certain.append(self._scan(self._utf8.decode(self._tokenizer.token_bytes(token_id))))
        return self._give("".join(certain))

    def finish(self) -> str:
        """The rest, when no more tokens come; a character that was begun shows as U+FFFD."""
        if self.stopped is not None:
            return ""
        certain = self._scan(self._utf8.decode(b"", True))
        if self.stopped is None:
            certain, self._held = certain + self._held, ""
        return self._give(certain)

    def _give(self, text: str) -> str:
        self.num_chars += len(text)
        return text

    def _scan(self, text: str) -> str:
        """What of the text held back and `text` is certain; the rest is held back, or dropped behind a stop string."""
        if not self._matchers or self.num_tokens < self._min_tokens:
            return text
        buffer, first = self._held + text, len(self._held)
        for position, char in enumerate(text, start=first + 1):
            met = [matcher.text for matcher in self._matchers if matcher.step(char)]
            if met:
                self.stopped, self._held = max(met, key=len), ""
                return buffer[: position - len(self.stopped)]
        keep = max(matcher.matched for matcher in self._matchers)
        cut = len(buffer) - keep
        self._held = buffer[cut:]
        return buffer[:cut]


class _StopMatcher:
    """One stop string, matched character by character (Knuth, Morris, Pratt): constant time each, whatever its length."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0  # longest end of the text so far that begins the stop string
        self._fallback = [0] * len(text)
        length = 0
        for index in range(1, len(text)):
            while length and text[index] != text[length]:
                length = self._fallback[length - 1]
            length += text[index] == text[length]
            self._fallback[index] = length

    def step(self, char: str) -> bool:
        """Take one character; whether the stop string is complete."""
        while self.matched and self.text[self.matched] != char:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.text[self.matched] == char
        return self.matched == len(self.text)


_BYTE_OF_CHAR = _byte_of_char()


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    """Whether tokens are written in GPT-2's byte alphabet; else they are SentencePiece's, with U+2581 and <0xNN>."""
    state: Any = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": None}
    kinds = {step["type"] for step in state.get("decoders", [state])}
    if "ByteLevel" in kinds and kinds <= _BYTE_LEVEL:
        return True
    if kinds <= _SENTENCEPIECE:
        return False
    raise ModelUnsupported(f"decoder {state['type']!r} is not served; served are ByteLevel and SentencePiece's", param="decoder")


def _fault(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
    return "it is no string"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelCorrupt(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise ModelCorrupt(f"{path}: must be a JSON object, not {type(config).__name__}")
    return config


def _content(token: Any) -> str | None:
    """A special token is written as text, or as an object with its text in `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """A file of its own in newer models; in older ones a text, or a list of named ones of which `default` counts."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
