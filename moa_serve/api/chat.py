"""/v1/chat/completions as OpenAI shapes it: messages through the base's chat template, `message` or `delta`, scores token by token."""

from typing import Any

from moa_serve.api.choice import Choice, Delta, Prompt, ScoredToken
from moa_serve.api.completions import check_length
from moa_serve.api.context import Server
from moa_serve.api.schemas import ChatRequest, Message
from moa_serve.engine.request import SamplingParams
from moa_serve.errors import InvalidRequest
from moa_serve.text import Tokenizer


class Chat:
    """The dialect of /v1/chat/completions; see `Dialect`."""

    endpoint = "/v1/chat/completions"
    schema = ChatRequest
    id_prefix, kind, chunk_kind = "chatcmpl-", "chat.completion", "chat.completion.chunk"

    def num_prompts(self, body: ChatRequest) -> int:
        return 1

    def encode(self, server: Server, body: ChatRequest) -> list[Prompt]:
        return [Prompt(encode_chat(server, body.messages))]

    def params(self, server: Server, body: ChatRequest, prompt: Prompt) -> SamplingParams:
        return body.sampling(body.max_tokens or body.max_completion_tokens, (body.top_logprobs or 0) if body.logprobs else None)

    def prompt_logprobs(self, body: ChatRequest) -> int | None:
        return None

    def echoes(self, body: ChatRequest) -> bool:
        return False

    def whole(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": delta.text, "refusal": None},
            "logprobs": _logprobs(delta.tokens, choice.tokenizer) if choice.has_logprobs else None,
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        """The role comes first, in a chunk of its own."""
        chunks: list[dict[str, Any]] = []
        if delta.is_first:
            role = {"role": "assistant", "content": ""}
            chunks.append({"index": choice.index, "delta": role, "logprobs": None, "finish_reason": None, "stop_reason": None})
        if choice.is_finished or not delta.is_empty:
            chunks.append(
                {
                    "index": choice.index,
                    "delta": {"content": delta.text} if delta.text else {},
                    "logprobs": _logprobs(delta.tokens, choice.tokenizer) if choice.has_logprobs else None,
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                }
            )
        return chunks


def encode_chat(server: Server, messages: list[Message], *, add_generation_prompt: bool = True) -> list[int]:
    """Raises InvalidRequest: the base cannot chat, or not like this."""
    if server.chat_template is None:
        raise InvalidRequest("the base has no tokenizer, so it cannot chat; use /v1/completions with token ids", param="messages")
    check_length(server, "".join(message.text for message in messages), "messages")
    return server.chat_template.encode(
        messages, add_generation_prompt=add_generation_prompt, check=lambda rendered: check_length(server, rendered, "messages")
    )


def _logprobs(tokens: list[ScoredToken], tokenizer: Tokenizer | None) -> dict[str, Any]:
    content = []
    for token in tokens:
        assert token.logprob is not None, "only an echo has a token without one"
        top = [_named(token_id, logprob, tokenizer) for token_id, logprob in token.logprob.top]
        content.append({**_named(token.token_id, token.logprob.logprob, tokenizer), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _named(token_id: int, logprob: float, tokenizer: Tokenizer | None) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token_id) if tokenizer else b""
    return {"token": raw.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(raw)}
