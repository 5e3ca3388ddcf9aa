"""/v1/completions as OpenAI shapes it: prompts as text or ids, `text` and log-probabilities in lists side by side."""

from collections.abc import Sequence
from typing import Any

from moa_serve.adapter.adapter import Adapter
from moa_serve.api.choice import Choice, Delta, Prompt, ScoredToken
from moa_serve.api.context import Server
from moa_serve.api.schemas import DEFAULT_MAX_TOKENS, CompletionRequest
from moa_serve.api.tools import ToolReader
from moa_serve.engine.request import SamplingParams
from moa_serve.errors import ContextLengthExceeded, InvalidRequest
from moa_serve.text import Tokenizer

MAX_BYTES_PER_TOKEN = 8  # of a prompt; what is longer can hardly fit, and would cost much to find out


class Completions:
    """The dialect of /v1/completions; see `Dialect`."""

    endpoint = "/v1/completions"
    schema = CompletionRequest
    id_prefix, kind, chunk_kind = "cmpl-", "text_completion", "text_completion"

    def num_prompts(self, body: CompletionRequest) -> int:
        return len(body.prompts)

    def encode(self, server: Server, body: CompletionRequest, adapter: Adapter | None) -> list[Prompt]:
        return [encode_prompt(server, prompt, body.moa.parse_special, echo=body.echo) for prompt in body.prompts]

    def asked(self, server: Server, body: CompletionRequest) -> list[Sequence[int]]:
        return [prompt.ids for prompt in self.encode(server, body, None)]

    def params(self, server: Server, body: CompletionRequest, prompt: Prompt, adapter: Adapter | None) -> SamplingParams:
        """The default of max_tokens yields to the context; a limit that was asked for does not."""
        room = max(1, server.max_model_len - len(prompt.ids))
        max_tokens = min(DEFAULT_MAX_TOKENS, room) if body.max_tokens is None else body.max_tokens
        if body.max_tokens is None and body.min_tokens > max_tokens:
            raise InvalidRequest(f"min_tokens is {body.min_tokens}, more than max_tokens, by default {max_tokens}", param="min_tokens")
        return body.sampling(max_tokens, body.logprobs)

    def prompt_logprobs(self, body: CompletionRequest) -> int | None:
        """With max_tokens 0 the prompt is scored even if nobody asks: that is what the request does."""
        echoed = None if not body.echo else 0 if body.logprobs is None and body.max_tokens == 0 else body.logprobs
        return max((wish for wish in (echoed, body.prompt_logprobs) if wish is not None), default=None)

    def guide_param(self, body: CompletionRequest) -> str:
        return body.guide_field

    def reader(self, server: Server, body: CompletionRequest, adapter: Adapter | None) -> ToolReader | None:
        return None

    def echoes(self, body: CompletionRequest) -> bool:
        return body.echo

    def whole(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        more = {"prompt_logprobs": shown_prompt_logprobs(choice)} if choice.num_prompt_logprobs is not None else {}
        return {
            "index": choice.index,
            "text": delta.text,
            "logprobs": _logprobs(delta.tokens, choice.tokenizer) if choice.has_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
            **more,
        }

    def more(self, choices: list[Choice]) -> dict[str, Any]:
        return {}

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        if delta.is_empty and not choice.is_finished:
            return []
        return [self.whole(choice, delta)]


def encode_prompt(server: Server, prompt: str | list[int], parse_special: bool, *, echo: bool, add_special: bool = True) -> Prompt:
    """Raises InvalidRequest, ContextLengthExceeded: it cannot be served, found out before it costs much."""
    tokenizer = server.tokenizer
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidRequest("prompt is text, but the base has no tokenizer; send token ids", param="prompt")
        check_length(server, prompt, "prompt")
        ids = tokenizer.encode(prompt, parse_special=parse_special, add_special=add_special)
        return Prompt(ids, prompt, shows_special=parse_special)
    if len(prompt) > server.max_model_len:
        raise ContextLengthExceeded(
            f"the prompt has {len(prompt)} tokens, but the served context is {server.max_model_len}; shorten it", param="prompt"
        )
    if (largest := max(prompt)) >= server.vocab_size:
        raise InvalidRequest(f"prompt has token id {largest}, but the vocabulary ends at {server.vocab_size - 1}", param="prompt")
    text = tokenizer.decode(prompt, skip_special=False) if tokenizer and echo else ""
    return Prompt(prompt, text, shows_special=True)


def check_length(server: Server, text: str, param: str) -> None:
    """Raises ContextLengthExceeded for a text that is too long to be worth tokenising, InvalidRequest for one that is no Unicode."""
    limit = MAX_BYTES_PER_TOKEN * server.max_model_len
    try:
        size = len(text) if len(text) > limit else len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(f"{param} is not Unicode: it has a lone surrogate; send valid UTF-8", param=param) from None
    if size > limit:
        raise ContextLengthExceeded(
            f"{param} has {size} bytes or more, but the served context is {server.max_model_len} tokens; at most {limit} bytes are read",
            param=param,
        )


def shown_prompt_logprobs(choice: Choice) -> list[dict[str, Any] | None]:
    """vLLM's `prompt_logprobs`: at each place the token itself and then the best ones, by id."""

    def shown(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        text = choice.tokenizer.token_text(token_id) if choice.tokenizer else ""
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    most = choice.num_prompt_logprobs
    places: list[dict[str, Any] | None] = []
    for score in choice.prompt_logprobs:
        if score is None:
            places.append(None)
            continue
        best = {str(token): shown(token, logprob, rank) for rank, (token, logprob) in enumerate(score.top[:most], start=1)}
        places.append({str(score.token_id): shown(score.token_id, score.logprob, score.rank)} | best)
    return places


def _logprobs(tokens: list[ScoredToken], tokenizer: Tokenizer | None) -> dict[str, Any]:
    return {
        "tokens": [_name(token.token_id, tokenizer) for token in tokens],
        "token_logprobs": [None if token.logprob is None else token.logprob.logprob for token in tokens],
        "top_logprobs": [_top(token, tokenizer) for token in tokens],
        "text_offset": [token.offset for token in tokens],
    }


def _top(token: ScoredToken, tokenizer: Tokenizer | None) -> dict[str, float] | None:
    """The best tokens, and the chosen one where it is none of them."""
    if token.logprob is None:
        return None
    best = dict([*token.logprob.top, (token.token_id, token.logprob.logprob)])
    return {_name(token_id, tokenizer): logprob for token_id, logprob in best.items()}


def _name(token_id: int, tokenizer: Tokenizer | None) -> str:
    """A token as text; half a character as OpenAI writes it, so that two of them have two names."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
