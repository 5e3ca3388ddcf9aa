"""OpenAI's routes, vLLM's for tokens, and our own for a prompt's routing: parse, resolve, call, shape. Rows are work.py's."""

import asyncio
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from moa_serve.api.adapters import AdapterItem, AliasItem
from moa_serve.api.auto import AUTO
from moa_serve.api.chat import Chat, encode_chat
from moa_serve.api.completions import Completions, check_length, encode_prompt
from moa_serve.api.context import Server, server_of
from moa_serve.api.document import GENERATED, body_of
from moa_serve.api.errors import JsonResponse
from moa_serve.api.generation import Generation
from moa_serve.api.prompt_routing import ENDPOINT, PromptRouting
from moa_serve.api.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, PromptRoutingRequest, TokenizeRequest, read_json
from moa_serve.errors import InvalidRequest, ModelNotListed

WORKING = ("/v1/completions", "/v1/chat/completions", ENDPOINT)  # what takes a place

router = APIRouter()
_COMPLETIONS, _CHAT = Completions(), Chat()


@router.post(WORKING[0], openapi_extra=body_of(CompletionRequest), responses=GENERATED)
async def create_completion(request: Request) -> Response:
    """Complete a prompt, or several."""
    return Generation(server_of(request), request, _COMPLETIONS)


@router.post(WORKING[1], openapi_extra=body_of(ChatRequest), responses=GENERATED)
async def create_chat_completion(request: Request) -> Response:
    """Answer a chat, by the base's template."""
    return Generation(server_of(request), request, _CHAT)


@router.post(WORKING[2], openapi_extra=body_of(PromptRoutingRequest))
async def route_prompt(request: Request) -> Response:
    """What the routers of one adapter, or of several, say of a prompt; nothing is generated."""
    return PromptRouting(server_of(request), request)


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The base, every adapter and alias that a request may name, and `auto` where it is on."""
    server = server_of(request)
    adapters = [_adapter_model(server, item) for item in server.registry.items() if item.is_listed and not server.picker(item.name)]
    aliases = [_alias_model(server, item) for item in server.registry.aliases() if not server.picker(item.name)]
    auto = [_auto_model(server)] if server.auto else []
    return JsonResponse({"object": "list", "data": [_base_model(server), *auto, *adapters, *aliases]})


@router.get("/v1/models/{model:path}")
async def retrieve_model(request: Request, model: str) -> Response:
    """One of them."""
    return JsonResponse(_model_of(server_of(request), model))


@router.post("/tokenize", openapi_extra=body_of(TokenizeRequest))
async def tokenize(request: Request) -> Response:
    """The tokens of a text, or of a chat."""
    server = server_of(request)
    body = await read_json(request, TokenizeRequest)
    _check_model(server, body.model)
    ids = await asyncio.to_thread(_encode, server, body)
    strings = [server.tokenizer.token_text(token_id) for token_id in ids] if server.tokenizer and body.return_token_strs else None
    return JsonResponse({"count": len(ids), "max_model_len": server.max_model_len, "tokens": ids, "token_strs": strings})


@router.post("/detokenize", openapi_extra=body_of(DetokenizeRequest))
async def detokenize(request: Request) -> Response:
    """The text of a whole sequence, control tokens included."""
    server = server_of(request)
    body = await read_json(request, DetokenizeRequest)
    _check_model(server, body.model)
    if server.tokenizer is None:
        raise InvalidRequest("the base has no tokenizer, so tokens have no text", param="tokens")
    if (largest := max(body.tokens, default=-1)) >= server.vocab_size:
        raise InvalidRequest(f"tokens has id {largest}, but the vocabulary ends at {server.vocab_size - 1}", param="tokens")
    text = await asyncio.to_thread(server.tokenizer.decode, body.tokens, skip_special=False)
    return JsonResponse({"prompt": text})


@router.get("/tokenizer_info")
async def tokenizer_info(request: Request) -> Response:
    """What a client needs to know of the base's tokenizer, as vLLM tells it; clients that evaluate read the end of text here."""
    server = server_of(request)
    if server.tokenizer is None:
        raise InvalidRequest("the base has no tokenizer; prompts are token ids")
    tokens = {name: server.tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    rest = {"chat_template": server.tokenizer.chat_template, "vocab_size": server.vocab_size, "model_max_length": server.max_model_len}
    return JsonResponse({"tokenizer_class": "PreTrainedTokenizerFast", **tokens, **rest})


def _encode(server: Server, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        return encode_chat(
            server, server.chat_template, body.messages, body.tools, add_generation_prompt=body.add_generation_prompt is not False
        )
    assert body.prompt is not None, "the schema takes one of the two"
    if server.tokenizer is not None:
        check_length(server, body.prompt, "prompt")
        if (token_id := server.tokenizer.token_to_id(body.prompt)) in server.tokenizer.special_ids:
            return [token_id]
    add_special = body.add_special_tokens is not False
    return list(encode_prompt(server, body.prompt, body.moa.parse_special, echo=False, add_special=add_special).ids)


def _check_model(server: Server, model: str | None) -> None:
    """Which one does not matter, as all have the base's tokenizer, but a wrong name is a mistake. Loads nothing."""
    if model is not None:
        _model_of(server, model)


def _model_of(server: Server, name: str) -> dict[str, Any]:
    """Raises ModelNotListed."""
    if server.picker(name) is not None:
        return _auto_model(server)
    if name == server.base_name:
        return _base_model(server)
    if (alias := server.registry.alias(name)) is not None:
        return _alias_model(server, alias)
    for item in server.registry.items():
        if item.name == name and item.is_listed:
            return _adapter_model(server, item)
    raise ModelNotListed(f"The model `{name[:64]}` does not exist; GET /v1/models lists what is served", param="model")


def _base_model(server: Server) -> dict[str, Any]:
    return _model(server, server.base_name, root=server.base_name, parent=None, max_model_len=server.max_model_len)


def _auto_model(server: Server) -> dict[str, Any]:
    return _model(server, AUTO, root=server.base_name, parent=server.base_name, max_model_len=None)


def _adapter_model(server: Server, item: AdapterItem) -> dict[str, Any]:
    return _model(server, item.name, root=item.path, parent=server.base_name, max_model_len=None)


def _alias_model(server: Server, item: AliasItem) -> dict[str, Any]:
    """`root` is the adapter that gets most of the requests."""
    root = max(item.targets, key=lambda target: item.targets[target])
    return _model(server, item.name, root=root, parent=server.base_name, max_model_len=None)


def _model(server: Server, name: str, *, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
    """Field by field what vLLM says of a model, but for paths, which are no client's business: `root` is the base's name or the
    adapter's place below the adapters directory."""
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": server.started,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": server.started,
        "owned_by": "moa_serve",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }
