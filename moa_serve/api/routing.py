"""The routing of tokens as JSON: `moa.routing` of a choice, `tokens` of a prompt's routing.

A token's routing is a few hundred numbers, or, with a router at each linear, thousands, which as Python objects would cost the event loop
more than the rest of the token. So the text is written once for each request, all numbers of one width, and a token puts its digits in.
Owns no state; safe in any thread.
"""

import json
import re
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from moa_serve.adapter.manifest import Manifest
from moa_serve.adapter.rules import RoutingRules
from moa_serve.engine.routing import expert_names, has_thresholds
from moa_serve.text import Tokenizer

MAX_BYTES = 2**25  # of routing that is held for one request
MOST_TEXT_BYTES = 64  # of an entry beside its numbers, about

_UNIT = 10_000  # four digits
_MOST = 6  # that is written; a weight is at most 1, but a threshold may be scaled beyond the reach of any
_NO_NUMBER = _MOST * _UNIT + 1  # NaN: a router that overflows
_DIGITS = np.array([list(f"{value / _UNIT:.4f}".encode()) for value in range(_MOST * _UNIT + 1)] + [list(b"null  ")], dtype=np.uint8)
_ZERO = ord("0")

Packed = npt.NDArray[np.uint16]


class RoutingText:
    """Writes the routing of one adapter's tokens, under a request's `rules`.

    Attributes:
        num_experts: that a token meets, over all layers.
        bytes_per_token: of JSON, about.
    """

    def __init__(self, manifest: Manifest, rules: RoutingRules | None = None) -> None:
        names = expert_names(manifest)
        self._experts = json.dumps(names, separators=(",", ":")).encode()
        self.num_experts = sum(map(len, names))
        thresholds = "null"
        if has_thresholds(manifest, rules):
            thresholds = f"[{','.join('0.0000' if layer else 'null' for layer in names)}]"
        text = f'"weights":{_lists(names, "0.0000")},"selected":{_lists(names, "0")},"threshold":{thresholds}}}'
        self._text = np.frombuffer(text.encode(), dtype=np.uint8)
        numbers = np.array([found.start() for found in re.finditer(r"\d\.\d{4}", text)], dtype=np.int64)
        self._numbers = numbers[:, None] + np.arange(_DIGITS.shape[1])
        self._flags = np.array([found.start() for found in re.finditer(r"(?<=[\[,])\d(?=[,\]])", text)], dtype=np.int64)
        self.bytes_per_token = len(text) + MOST_TEXT_BYTES

    def pack(self, words: npt.NDArray[np.float32]) -> Packed:
        """A token's words (`TokenRouting.words`) as they are held until they are written: in ten-thousandths."""
        packed: Packed = np.rint(np.where((words >= 0) & np.isfinite(words), np.minimum(words, _MOST), _NO_NUMBER / _UNIT) * _UNIT).astype(
            np.uint16
        )
        return packed

    def write(self, tokens: Iterable[tuple[int, Packed]], tokenizer: Tokenizer | None, *, has_names: bool) -> bytes:
        """`{"routing": ...}` of some tokens, id and words of each; `has_names` says the experts' names too."""
        names = b'"experts":' + self._experts + b"," if has_names else b""
        return b'{"routing":{' + names + b'"tokens":' + self.write_tokens(tokens, tokenizer) + b"}}"

    def write_tokens(self, tokens: Iterable[tuple[int, Packed]], tokenizer: Tokenizer | None) -> bytes:
        """A list with an entry for each token, id and words of each."""
        return b"[" + b",".join(self._entry(token_id, packed, tokenizer) for token_id, packed in tokens) + b"]"

    def _entry(self, token_id: int, packed: Packed, tokenizer: Tokenizer | None) -> bytes:
        text, count = self._text.copy(), self.num_experts
        text[self._numbers] = _DIGITS[np.concatenate((packed[:count], packed[2 * count :]))]
        text[self._flags] = _ZERO + (packed[count : 2 * count] > 0)
        shown = json.dumps(tokenizer.token_text(token_id) if tokenizer else "")
        return b'{"id":%d,"token":%b,' % (token_id, shown.encode()) + text.tobytes()


def _lists(names: list[list[str]], number: str) -> str:
    return f"[{','.join('[' + ','.join([number] * len(layer)) + ']' for layer in names)}]"
