"""Choice: one row of a request while its tokens come: text, stop strings, log-probabilities, and what the client has not got yet.

A whole answer and a stream take the same way: a whole one is drained once. Belongs to the event loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from moa_serve.engine.async_engine import Stream
from moa_serve.engine.engine import TokenEvent
from moa_serve.engine.request import TokenLogprob
from moa_serve.errors import MoaError
from moa_serve.text import IncrementalDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """
    Args:
        ids: what the engine gets.
        text: as it is echoed.
        shows_special: whether control tokens among the ids stand in `text`.
    """

    ids: Sequence[int]
    text: str = ""
    shows_special: bool = False


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token with its log-probability, None for the first one of a prompt; `offset` is the character of the text at which it begins."""

    token_id: int
    logprob: TokenLogprob | None
    offset: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What came since the last one. `tokens` is empty where log-probabilities were not asked for. `is_first` of its choice."""

    text: str
    tokens: list[ScoredToken]
    is_first: bool

    @property
    def is_empty(self) -> bool:
        return not self.text and not self.tokens


class Choice:
    """
    Args:
        index: in the answer: prompt * n + i.
        echo: begin with the prompt's text and, where log-probabilities were asked for, with the prompt's.
    """

    def __init__(self, index: int, prompt: Prompt, stream: Stream, tokenizer: Tokenizer | None, *, echo: bool = False) -> None:
        params = stream.request.params
        assert isinstance(params.stop, tuple)  # SamplingParams made it one
        self.index, self.prompt, self.stream = index, prompt, stream
        self.num_tokens = 0  # generated, up to the one that completed a stop string
        self.finish_reason: str | None = None  # known from here on, though tokens may still come
        self.stop_reason: str | int | None = None  # the stop string or the id of `stop_token_ids`
        self.error: MoaError | None = None
        self.tokenizer, self._echo, self._params = tokenizer, echo, params
        self.has_logprobs = params.logprobs is not None
        self._decoder = IncrementalDecoder(tokenizer, stop=params.stop, min_tokens=params.min_tokens) if tokenizer else None
        self._ruler = IncrementalDecoder(tokenizer) if tokenizer and self.has_logprobs else None  # counts characters, stop strings too
        self._start = len(prompt.text) if echo else 0
        self._text = [prompt.text] if echo else []
        self._tokens: list[ScoredToken] = []
        self._is_first = True

    @property
    def waits_for_end(self) -> bool:
        """An echo with log-probabilities begins with what the engine gives at its end."""
        return self._echo and self.has_logprobs

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None and (not self.waits_for_end or self.stream.is_ended)

    def take(self, events: Sequence[TokenEvent]) -> None:
        """Tokens behind a stop string are dropped."""
        for event in events:
            if self.finish_reason is None and event.token_id is not None:
                self._take_token(event.token_id, event)
            if event.error is not None:
                self.error, self.finish_reason = event.error, "error"
            if self.finish_reason is None and event.finish_reason is not None:
                self.finish_reason = event.finish_reason
                self._finish_text()

    def _take_token(self, token_id: int, event: TokenEvent) -> None:
        self.num_tokens += 1
        if event.logprob is not None:
            self._tokens.append(ScoredToken(token_id, event.logprob, self._start + (self._ruler.num_chars if self._ruler else 0)))
        if (
            event.finish_reason == "stop" and token_id in event.sequence.stop_ids
        ):  # the token says that it is over; it is no part of the text
            self.stop_reason = token_id if token_id in self._params.stop_token_ids else None
            return
        if self._ruler is not None:
            self._ruler.push([token_id])
        if self._decoder is not None:
            self._text.append(self._decoder.push([token_id]))
            self._note_stop(self._decoder)

    def _finish_text(self) -> None:
        if self._decoder is not None:
            self._text.append(self._decoder.finish())
            self._note_stop(self._decoder)

    def _note_stop(self, decoder: IncrementalDecoder) -> None:
        if decoder.stopped is not None:
            self.finish_reason, self.stop_reason = "stop", decoder.stopped

    def drain(self) -> Delta:
        """What the client has not got yet; from now on it has."""
        tokens = self._tokens
        if self._is_first and self.waits_for_end:
            tokens = self._prompt_tokens() + tokens
        delta = Delta("".join(self._text), tokens, self._is_first)
        self._text, self._tokens, self._is_first = [], [], False
        return delta

    def _prompt_tokens(self) -> list[ScoredToken]:
        ruler = IncrementalDecoder(self.tokenizer, skip_special=not self.prompt.shows_special) if self.tokenizer else None
        scores = self.stream.collected.prompt_logprobs if self.stream.collected else []
        scored = []
        for token_id, score in zip(self.prompt.ids, [None, *scores], strict=False):  # a request that failed has fewer
            scored.append(ScoredToken(token_id, score, ruler.num_chars if ruler else 0))
            if ruler is not None:
                ruler.push([token_id])
        return scored
