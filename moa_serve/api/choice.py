"""Choice: one row of a request while its tokens come: text, stop strings, log-probabilities, and what the client has not got yet.

A whole answer and a stream take the same way: a whole one is drained once. Belongs to the event loop.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moa_serve.api.routing import Packed, RoutingText
from moa_serve.api.tools import CallDelta, ToolReader
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
    """What came since the last one. `tokens` is empty where log-probabilities were not asked for, and `routed` where routing was not: the
    same tokens, by id. `is_first` of its choice. `text` is without the calls of tools that a reader found in it."""

    text: str
    tokens: list[ScoredToken]
    is_first: bool
    calls: list[CallDelta] = field(default_factory=list)
    routed: list[tuple[int, Packed]] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        return not (self.text or self.tokens or self.calls or self.routed)


class Choice:
    """
    Args:
        index: in the answer: prompt * n + i.
        echo: begin with the prompt's text and, where log-probabilities were asked for, with the prompt's.
        num_prompt_logprobs: best tokens that are told at each place of the prompt; None for nothing about it.
        reader: finds calls of tools in the text.
        routing: writes what the routers said, where that was asked for.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        stream: Stream,
        tokenizer: Tokenizer | None,
        *,
        echo: bool = False,
        num_prompt_logprobs: int | None = None,
        reader: ToolReader | None = None,
        routing: RoutingText | None = None,
    ) -> None:
        params = stream.request.params
        assert isinstance(params.stop, tuple)  # SamplingParams made it one
        self.index, self.prompt, self.stream = index, prompt, stream
        self.num_tokens = 0  # generated, up to the one that completed a stop string
        self.finish_reason: str | None = None  # known from here on, though tokens may still come
        self.stop_reason: str | int | None = None  # the stop string or the id of `stop_token_ids`
        self.error: MoaError | None = None
        self.routing = routing
        self.num_traced = self.num_evaluations = 0  # tokens that were computed, and experts for them; where routing was asked for
        self.tokenizer, self._echo, self._params = tokenizer, echo, params
        self.has_logprobs, self.num_prompt_logprobs, self._reader = params.logprobs is not None, num_prompt_logprobs, reader
        self._decoder = IncrementalDecoder(tokenizer, stop=params.stop, min_tokens=params.min_tokens) if tokenizer else None
        self._ruler = IncrementalDecoder(tokenizer) if tokenizer and self.has_logprobs else None  # counts characters, stop strings too
        self._start = len(prompt.text) if echo else 0
        self._text = [prompt.text] if echo else []
        self._tokens: list[ScoredToken] = []
        self._routed: list[tuple[int, Packed]] = []
        self._is_first = True

    @property
    def waits_for_end(self) -> bool:
        """What is said of the prompt's tokens is what the engine gives at its end."""
        return self._has_scored_echo or self.num_prompt_logprobs is not None

    @property
    def _has_scored_echo(self) -> bool:
        return self._echo and self.has_logprobs

    @property
    def has_calls(self) -> bool:
        return self._reader is not None and self._reader.num_calls > 0

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None and (not self.waits_for_end or self.stream.is_ended)

    def take(self, events: Sequence[TokenEvent]) -> None:
        """Tokens behind a stop string are dropped."""
        for event in events:
            if self.finish_reason is None and event.token_id is not None:
                self._take_token(event.token_id, event)
            if event.routing is not None:
                self.num_traced, self.num_evaluations = event.routing.num_tokens, event.routing.num_evaluations
            if event.error is not None:
                self.error, self.finish_reason = event.error, "error"
            if self.finish_reason is None and event.finish_reason is not None:
                self.finish_reason = event.finish_reason
                self._finish_text()

    def _take_token(self, token_id: int, event: TokenEvent) -> None:
        self.num_tokens += 1
        if event.logprob is not None:
            self._tokens.append(ScoredToken(token_id, event.logprob, self._start + (self._ruler.num_chars if self._ruler else 0)))
        if self.routing is not None and event.routing is not None and event.routing.words is not None:
            self._routed.append((token_id, self.routing.pack(event.routing.words)))
        if event.finish_reason == "stop" and token_id in event.sequence.stop_ids:  # it says that the text is over, and is no part of it
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
        if self._is_first and self._has_scored_echo:
            tokens = self._prompt_tokens() + tokens
        text = "".join(self._text)
        calls: list[CallDelta] = []
        if self._reader is not None:
            text, calls = self._reader.push(text, is_last=self.finish_reason is not None)
        delta = Delta(text, tokens, self._is_first, calls, self._routed)
        self._text, self._tokens, self._routed, self._is_first = [], [], [], False
        return delta

    @property
    def prompt_logprobs(self) -> list[TokenLogprob | None]:
        """Of each token of the prompt; None for the first, which nothing comes before."""
        return [None, *(self.stream.collected.prompt_logprobs if self.stream.collected else [])]

    def _prompt_tokens(self) -> list[ScoredToken]:
        ruler = IncrementalDecoder(self.tokenizer, skip_special=not self.prompt.shows_special) if self.tokenizer else None
        most = self._params.logprobs or 0
        scored = []
        for token_id, score in zip(self.prompt.ids, self.prompt_logprobs, strict=False):  # a request that failed has fewer
            if score is not None and len(score.top) > most:  # more were asked for as `prompt_logprobs`
                score = replace(score, top=score.top[:most])
            scored.append(ScoredToken(token_id, score, ruler.num_chars if ruler else 0))
            if ruler is not None:
                ruler.push([token_id])
        return scored
