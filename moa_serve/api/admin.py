"""Routes of the adapters: vLLM's two for loading and unloading, and our read-only list.

Statuses and success texts are vLLM's to the byte, for tools that were written for it; errors have the one shape of this server. Who may
call what is the guard's affair.
"""

from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import Field, StringConstraints
from starlette.responses import PlainTextResponse, Response

from moa_serve.api.adapters import AdapterItem
from moa_serve.api.context import server_of
from moa_serve.api.document import body_of
from moa_serve.api.errors import JsonResponse, error_response
from moa_serve.api.schemas import Schema, read_json
from moa_serve.errors import AdapterError, AdapterExists, AdapterNameInvalid, InvalidRequest

router = APIRouter()

_T = TypeVar("_T")
_Body = TypeVar("_Body", bound=Schema)
_Text = Annotated[str, StringConstraints(max_length=4096)]  # constrained, so that lone surrogates are refused
_PARAMS = {"name": "lora_name", "path": "lora_path"}  # the registry's words, and the fields that they came in


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
    registry = server_of(request).registry
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
    await _renamed(server_of(request).registry.unload(body.lora_name))
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.get("/v1/adapters")
async def list_adapters(request: Request) -> Response:
    """Every adapter that is served, being loaded or unloaded, or broken, and why."""
    return JsonResponse({"object": "list", "data": [_shape(item) for item in server_of(request).registry.items()]})


@router.get("/v1/adapters/{name}")
async def get_adapter(request: Request, name: str) -> Response:
    return JsonResponse(_shape(server_of(request).registry.item(name)))


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
    return {
        "id": item.name,
        "object": "adapter",
        "state": item.state,
        "revision": item.revision,
        "variant": item.variant,
        "bytes": item.bytes,
        "leases": item.leases,
        "path": item.path,
        "is_explicit": item.is_explicit,
        "warnings": list(item.warnings),
        "error": item.error,
    }
