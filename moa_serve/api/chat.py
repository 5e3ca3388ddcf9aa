"""/v1/chat/completions as OpenAI shapes it: messages through the base's chat template, `message` or `delta`, scores token by token."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from moa_serve.adapter.adapter import Adapter
from moa_serve.api.choice import Choice, Delta, Prompt, ScoredToken
from moa_serve.api.completions import check_length, shown_prompt_logprobs
from moa_serve.api.context import Server
from moa_serve.api.errors import UnsupportedParameter
from moa_serve.api.schemas import ChatRequest, Message, NamedTool, Tool, named
from moa_serve.api.tools import CallDelta, Format, ToolReader, as_template_wants, tool_guide
from moa_serve.chat_template import ChatTemplate
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

    def encode(self, server: Server, body: ChatRequest, adapter: Adapter | None) -> list[Prompt]:
        return [Prompt(encode_chat(server, server.template_of(adapter), body.messages, body.shown_tools))]

    def asked(self, server: Server, body: ChatRequest) -> list[Sequence[int]]:
        return [encode_contents(server, body.messages)]

    def params(self, server: Server, body: ChatRequest, prompt: Prompt, adapter: Adapter | None) -> SamplingParams:
        params = body.sampling(body.max_tokens or body.max_completion_tokens, (body.top_logprobs or 0) if body.logprobs else None)
        tools, choice = body.shown_tools, body.tool_choice
        if not tools or (choice == "auto" and not any(tool.function.strict for tool in tools)):
            return params
        if isinstance(choice, NamedTool):
            tools = [tool for tool in tools if tool.function.name == choice.function.name]
        has_many = body.parallel_tool_calls and not isinstance(choice, NamedTool)
        with named("tools"):
            return replace(
                params, guide=tool_guide(_tool_format(server.template_of(adapter)), tools, is_required=choice != "auto", has_many=has_many)
            )

    def guide_param(self, body: ChatRequest) -> str:
        return "tools" if body.shown_tools else body.guide_field

    def reader(self, server: Server, body: ChatRequest, adapter: Adapter | None) -> ToolReader | None:
        return ToolReader(_tool_format(server.template_of(adapter)), has_many=body.parallel_tool_calls) if body.shown_tools else None

    def prompt_logprobs(self, body: ChatRequest) -> int | None:
        return body.prompt_logprobs

    def echoes(self, body: ChatRequest) -> bool:
        return False

    def whole(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.text, "refusal": None}
        if choice.has_calls:
            calls: list[dict[str, Any]] = []
            for call in delta.calls:
                if call.name is not None:
                    calls.append({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}})
                calls[call.index]["function"]["arguments"] += call.arguments
            message |= {"content": delta.text or None, "tool_calls": calls}
        return {
            "index": choice.index,
            "message": message,
            "logprobs": _logprobs(delta.tokens, choice.tokenizer) if choice.has_logprobs else None,
            "finish_reason": _finish_reason(choice),
            "stop_reason": choice.stop_reason,
        }

    def more(self, choices: list[Choice]) -> dict[str, Any]:
        """All choices have one prompt."""
        return {} if choices[0].num_prompt_logprobs is None else {"prompt_logprobs": shown_prompt_logprobs(choices[0])}

    def chunks(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        """The role comes first, in a chunk of its own; then content, and the calls of tools, the first piece of each with its name."""
        deltas: list[dict[str, Any]] = []
        if choice.is_finished or not delta.is_empty:
            first: dict[str, Any] = {"content": delta.text} if delta.text else {}
            if delta.calls:
                first["tool_calls"] = [_call_piece(call) for call in delta.calls]
            deltas.append(first)
        if delta.is_first:
            deltas.insert(0, {"role": "assistant", "content": ""})
        rest: dict[str, Any] = {"logprobs": None, "finish_reason": None, "stop_reason": None}
        chunks = [{"index": choice.index, "delta": piece, **rest} for piece in deltas]
        if choice.is_finished or not delta.is_empty:
            chunks[-1] |= {
                "logprobs": _logprobs(delta.tokens, choice.tokenizer) if choice.has_logprobs else None,
                "finish_reason": _finish_reason(choice),
                "stop_reason": choice.stop_reason,
            }
        return chunks


def _finish_reason(choice: Choice) -> str | None:
    return "tool_calls" if choice.finish_reason == "stop" and choice.has_calls else choice.finish_reason


def _call_piece(call: CallDelta) -> dict[str, Any]:
    if call.name is None:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _tool_format(template: ChatTemplate | None) -> Format:
    """Raises UnsupportedParameter: the template writes no tools."""
    form = template.tool_format if template else None
    if form is None:
        raise UnsupportedParameter("tools are not supported by this base: its chat template has none", param="tools")
    return form


def encode_chat(
    server: Server,
    template: ChatTemplate | None,
    messages: list[Message],
    tools: Sequence[Tool] = (),
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Raises InvalidRequest: the base cannot chat, or not like this."""
    if template is None:
        raise InvalidRequest("the base has no tokenizer, so it cannot chat; use /v1/completions with token ids", param="messages")
    check_length(server, "".join(message.text for message in messages), "messages")
    if tools:
        _tool_format(template)
    if any(message.is_about_tools for message in messages) and template.tool_format is None:
        raise UnsupportedParameter("messages of tools are not supported by this base: its chat template has none", param="messages")
    return template.encode(
        messages,
        tools=as_template_wants(tools),
        add_generation_prompt=add_generation_prompt,
        check=lambda rendered: check_length(server, rendered, "messages"),
    )


def encode_contents(server: Server, messages: list[Message]) -> list[int]:
    """What the messages say, without what a template writes around it. Raises InvalidRequest: the base has no tokenizer, or too long."""
    if server.tokenizer is None:
        raise InvalidRequest("the base has no tokenizer, so it cannot chat; use /v1/completions with token ids", param="messages")
    text = "\n".join(message.text for message in messages)
    check_length(server, text, "messages")
    return server.tokenizer.encode(text, parse_special=False)


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
