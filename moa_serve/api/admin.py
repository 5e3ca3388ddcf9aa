"""Routes of the adapters: vLLM's two for loading and unloading, and our own for all that can be done with them.

Statuses and success texts of vLLM's are its own to the byte, for tools that were written for it; errors have the one shape of this server.
Who may call what is the guard's affair.
"""

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable
from dataclasses import asdict
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Query, Request
from pydantic import Field, StringConstraints
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.manifest import KINDS
from moa_serve.api.adapter_events import MAX_LISTENERS
from moa_serve.api.adapters import AdapterItem, AdapterRegistry, AliasItem
from moa_serve.api.aliases import MAX_TARGETS, MAX_WEIGHT
from moa_serve.api.context import server_of
from moa_serve.api.document import EVENTS, body_of
from moa_serve.api.errors import JsonResponse, dump_json, error_response
from moa_serve.api.schemas import Schema, read_json
from moa_serve.errors import AdapterError, AdapterExists, AdapterNameInvalid, AdapterNotFound, InvalidRequest, Overloaded
from moa_serve.metrics import ExpertsUse
from moa_serve.metrics.pruning import UNUSED_SELECTED, UNUSED_WEIGHT, Bound, suggest

router = APIRouter()

_T = TypeVar("_T")
_Body = TypeVar("_Body", bound=Schema)
_Text = Annotated[str, StringConstraints(max_length=4096)]  # constrained, so that lone surrogates are refused
_PARAMS = {"name": "lora_name", "path": "lora_path"}  # the registry's words, and the fields that they came in


_PING_SECONDS = 15.0  # of silence, so that proxies keep the connection open
_BOTH = "Both 'lora_name' and 'lora_path' must be provided."


class LoadRequest(Schema):
    """vLLM's body, and `variant`."""

    lora_name: _Text = Field("", description="What requests will call it.")
    lora_path: _Text = Field("", description="Its folder: absolute below the adapters directory, or relative to it.")
    load_inplace: bool = Field(False, description="Replace what was loaded under this name; requests in flight keep the old one.")
    variant: str | None = Field(None, description="Which one it is, where the files alone cannot tell, such as soft_moa_instance.")


class UnloadRequest(Schema):
    lora_name: _Text = Field("", description="The name that requests call it.")
    lora_int_id: int | None = Field(None, description="Accepted and not used, as in vLLM: adapters have no numbers here.")


@router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, openapi_extra=body_of(LoadRequest))
async def load_lora_adapter(request: Request) -> Response:
    """Load an adapter. vLLM's 400 for what was loaded before; an adapter that only requests had read can be loaded once more."""
    body = await _read(request, LoadRequest)
    if not body.lora_name:
        raise AdapterNameInvalid(_BOTH, param="lora_name")
    if not body.lora_path:
        raise InvalidRequest(_BOTH, param="lora_path")
    registry = _registry(request)
    try:
        await _renamed(registry.load(body.lora_name, body.lora_path, variant=body.variant, load_inplace=body.load_inplace))
    except AdapterExists as error:  # a conflict, 409, everywhere else
        return error_response(400, error.code, str(error), param=error.param)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, openapi_extra=body_of(UnloadRequest))
async def unload_lora_adapter(request: Request) -> Response:
    """Unload an adapter: new requests get 404 at once; the answer comes when those in flight have ended and its memory is free."""
    body = await _read(request, UnloadRequest)
    if not body.lora_name:
        raise AdapterNameInvalid("'lora_name' needs to be provided to unload a LoRA adapter.", param="lora_name")
    await _renamed(_registry(request).unload(body.lora_name))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


# -- our own


class LoadAdapter(Schema):
    name: _Text = Field(description="What requests will call it.")
    path: _Text | None = Field(
        None, description="Its folder: absolute below the adapters directory, or relative to it; its name if omitted."
    )
    variant: str | None = Field(None, description="Which one it is, where the files alone cannot tell, such as soft_moa_instance.")
    pinned: bool = Field(False, description="Keep it in host memory.")


class ReloadAdapter(Schema):
    revision: _Text | None = Field(None, description="The revision that is to be replaced: 409 if another one is served by now.")
    path: _Text | None = Field(None, description="Its folder; where it was loaded from if omitted.")
    variant: str | None = Field(None, description="As before if omitted.")


class SetAlias(Schema):
    targets: dict[str, Annotated[int, Field(ge=0, le=MAX_WEIGHT)]] = Field(
        description="Adapters, or `name@revision` with 8 hex digits or more, and their shares of the requests.", max_length=MAX_TARGETS
    )


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> Response:
    """Every adapter that is served, being loaded or unloaded, or broken, and why."""
    return JsonResponse({"object": "list", "data": [_shape(item) for item in _registry(request).items()]})


@router.post("/v1/adapters", openapi_extra=body_of(LoadAdapter))
async def load_adapter(request: Request) -> Response:
    """Load an adapter; 409 where an operator loaded one of this name before."""
    body, registry = await read_json(request, LoadAdapter), _registry(request)
    await registry.load(body.name, body.name if body.path is None else body.path, variant=body.variant)
    if body.pinned:
        await registry.pin(body.name, True)
    return JsonResponse(_shape(registry.item(body.name)))


@router.get("/v1/adapters/events", response_class=StreamingResponse, responses=EVENTS)
async def adapter_events(request: Request) -> Response:
    """What happens to adapters, as server-sent events, from now on; with Last-Event-ID, from the event after that one."""
    events = _registry(request).events
    if events.is_full:
        raise Overloaded(f"{MAX_LISTENERS} clients listen to the adapters' events, which is the limit; try again later")
    seen = request.headers.get("last-event-id", "")
    after = int(seen) if seen.isascii() and seen.isdigit() and len(seen) < 16 else None

    async def lines() -> AsyncIterator[bytes]:
        yield b": listening\n\n"  # so that a client knows that it is connected
        async for event in events.listen(after, every=_PING_SECONDS):
            if event is None:
                yield b": ping\n\n"
                continue
            data = {"name": event.name, "time": event.time, **event.more}
            yield b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.kind.encode(), dump_json(data))

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


@router.get("/v1/adapters/{name}")
async def get_adapter(request: Request, name: str) -> Response:
    """One of them."""
    return JsonResponse(_shape(_registry(request).item(name)))


@router.get("/v1/adapters/{name}/experts")
async def adapter_experts(
    request: Request,
    name: str,
    max_selected: Annotated[
        str | None, Query(description=f"Suggest what at most this share of tokens kept, 0 to 1; {UNUSED_SELECTED} if omitted.")
    ] = None,
    max_weight: Annotated[
        str | None,
        Query(
            description=f"Where tokens keep every expert: suggest what has at most this mean weight, 0 to 1; {UNUSED_WEIGHT} if omitted."
        ),
    ] = None,
) -> Response:
    """What an adapter's routers did with live tokens since its revision was loaded: weights, shares and thresholds by layer and expert,
    beside those of training; which experts could go, up to the use that `?max_selected=` or, where tokens keep every expert,
    `?max_weight=` sets; and what leaving experts out costs, where the shadow check runs."""
    item, use = _registry(request).item(name), server_of(request).metrics.experts(name)
    if use is None:
        raise AdapterNotFound(f"adapter {item.name!r} is {item.state}, but was not read yet; its first request does it", param="name")
    if not use.layers:
        raise InvalidRequest(f"adapter {item.name!r} has no router, so there is nothing to choose between its experts", param="name")
    asked = [_share(param, text) for param, text in (("max_selected", max_selected), ("max_weight", max_weight))]
    adapter = _registry(request).store.cache.peek(use.revision)
    shadow = server_of(request).metrics.shadow(item.name, use.revision)
    shown = await asyncio.to_thread(_experts_shape, use, adapter, *asked)
    return JsonResponse(shown | {"shadow": None if shadow is None else asdict(shadow)})


def _share(param: str, text: str | None) -> float | None:
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = math.nan
    if value is not None and not 0 <= value <= 1:
        raise InvalidRequest(f"{param} is {(text or '')[:40]!a}, but must be a number from 0 to 1", param=param)
    return value


def _experts_shape(use: ExpertsUse, adapter: Adapter | None, max_selected: float | None, max_weight: float | None) -> dict[str, Any]:
    """What only the adapter itself can tell is null where it is not in memory."""
    shown = asdict(use) | {"bytes": None, "prune": None}
    sizes = {} if adapter is None else adapter.bytes_by_owner
    for layer in shown["layers"]:
        for expert in layer["experts"]:
            expert["bytes"] = sizes.get((expert["name"], layer["layer"]))
    if adapter is not None:
        suggestion = suggest(adapter, use, Bound.of(adapter.manifest, max_selected, max_weight))
        shown |= {"bytes": _bytes_shape(adapter), "prune": None if suggestion is None else asdict(suggestion)}
    return shown


def _bytes_shape(adapter: Adapter) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    shared = 0
    for (owner, _), size in adapter.bytes_by_owner.items():
        if owner is None:
            shared += size
        else:
            site = owner.partition("/")[0]
            kinds[site] = kinds.get(site, 0) + size
    return {"total": adapter.num_bytes, "shared": shared, "experts": {site: kinds[site] for site in KINDS if site in kinds}}


@router.delete("/v1/adapters/{name}")
async def unload_adapter(request: Request, name: str) -> Response:
    """Unload an adapter: new requests get 404 at once; the answer comes when those in flight have ended and its memory is free."""
    freed = await _registry(request).unload(name)
    return JsonResponse({"id": name, "object": "adapter.deleted", "deleted": True, "freed_bytes": freed})


@router.post("/v1/adapters/{name}/reload", openapi_extra=body_of(ReloadAdapter))
async def reload_adapter(request: Request, name: str) -> Response:
    """Read an adapter again in place: requests in flight keep the old revision, and a broken new one changes nothing."""
    body, registry = await read_json(request, ReloadAdapter), _registry(request)
    await registry.reload(name, revision=body.revision, path=body.path, variant=body.variant)
    return JsonResponse(_shape(registry.item(name)))


@router.post("/v1/adapters/{name}/pin")
async def pin_adapter(request: Request, name: str) -> Response:
    """Keep an adapter in host memory, through reloads too."""
    return JsonResponse(_shape(await _registry(request).pin(name, True)))


@router.post("/v1/adapters/{name}/unpin")
async def unpin_adapter(request: Request, name: str) -> Response:
    """Let it leave host memory again when others need the room."""
    return JsonResponse(_shape(await _registry(request).pin(name, False)))


@router.get("/v1/aliases")
async def list_aliases(request: Request) -> Response:
    """Names that stand for adapters."""
    return JsonResponse({"object": "list", "data": [_alias_shape(item) for item in _registry(request).aliases()]})


@router.put("/v1/aliases/{alias}", openapi_extra=body_of(SetAlias))
async def set_alias(request: Request, alias: str) -> Response:
    """Let a name stand for adapters, for each by its share. A `user`, or else a key, gets the same one each time."""
    body = await read_json(request, SetAlias)
    return JsonResponse(_alias_shape(await _registry(request).set_alias(alias, body.targets)))


@router.delete("/v1/aliases/{alias}")
async def remove_alias(request: Request, alias: str) -> Response:
    """Requests for it are 404 from now on."""
    await _registry(request).remove_alias(alias)
    return JsonResponse({"id": alias, "object": "alias.deleted", "deleted": True})


def _registry(request: Request) -> AdapterRegistry:
    return server_of(request).registry


async def _read(request: Request, schema: type[_Body]) -> _Body:
    """The body. A name of another type is an invalid name like any other."""
    try:
        return await read_json(request, schema)
    except InvalidRequest as error:
        if error.param == "lora_name":
            raise AdapterNameInvalid(str(error), param="lora_name") from None
        raise


async def _renamed(work: Awaitable[_T]) -> _T:
    """What the registry says of a name or path, said of the field that it came in."""
    try:
        return await work
    except AdapterError as error:
        error.param = _PARAMS.get(error.param or "", error.param)
        raise


def _shape(item: AdapterItem) -> dict[str, Any]:
    shown = asdict(item)
    del shown["is_listed"]
    return {"id": shown.pop("name"), "object": "adapter", **shown}


def _alias_shape(item: AliasItem) -> dict[str, Any]:
    return {"id": item.name, "object": "alias", "targets": dict(item.targets)}
