"""Errors as OpenAI's clients read them: which status and type each error has, and the body that says it.

The one place that maps error codes to HTTP. Messages of MoaError are written for users; of every other exception the answer says nothing
and the log everything. Owns no state.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from moa_serve.errors import EngineError, InvalidRequest, MoaError, Overloaded

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
FAILED = "the server failed while it handled this request; its log has the details"
MAX_MESSAGE_CHARS = 1000  # a message quotes what was sent, and what was sent may be long

_STATUS = {
    "invalid_value": 400,
    "context_length_exceeded": 400,
    "invalid_grammar": 400,
    "invalid_json": 400,
    "unknown_parameter": 400,
    "unsupported_parameter": 400,
    "unsupported_media_type": 415,
    "model_not_found": 404,
    "revision_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "queue_timeout": 503,
    "server_overloaded": 503,
    "rate_limit_exceeded": 429,
    "out_of_memory": 503,
    "draining": 503,
    "not_ready": 503,
    "request_timeout": 504,
    "internal_error": 500,
    "adapter_not_found": 404,
    "adapter_exists": 409,
    "adapter_busy": 409,
    "adapter_changing": 409,
    "alias_not_found": 404,
    "revision_conflict": 409,
    "registry_write_failed": 507,
    "adapter_limit": 507,
    "adapter_memory": 503,
    "adapter_unavailable": 503,
    "adapter_quarantined": 503,
    "adapter_nonfinite_output": 500,
}


class InvalidJson(InvalidRequest):
    code = "invalid_json"


class UnknownParameter(InvalidRequest):
    code = "unknown_parameter"


class UnsupportedParameter(InvalidRequest):
    code = "unsupported_parameter"


class UnsupportedMediaType(InvalidRequest):
    code = "unsupported_media_type"


class QueueTimeout(Overloaded):
    code = "queue_timeout"


class RequestTimeout(EngineError):
    code = "request_timeout"


class KeyOverloaded(Overloaded):
    code = "rate_limit_exceeded"


class NotReady(Overloaded):
    code = "not_ready"


def status_of(error: MoaError) -> int:
    """The HTTP status of an error. What is wrong with an adapter's files is the sender's mistake, whatever it is: 400."""
    if error.code in _STATUS:
        return _STATUS[error.code]
    return 400 if error.code.startswith(("adapter_", "alias_")) or isinstance(error, InvalidRequest) else 500


def type_of(status: int) -> str:
    """OpenAI's `type` for a status."""
    named = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return named.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(status: int, code: str, message: str, param: str | None = None) -> dict[str, Any]:
    """`{"error": ...}`, with all four fields and a string code."""
    if len(message) > MAX_MESSAGE_CHARS:
        message = message[:MAX_MESSAGE_CHARS] + "..."
    return {"error": {"message": message, "type": type_of(status), "param": param, "code": code}}


def error_response(
    status: int, code: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
) -> "JsonResponse":
    """503 and 429 come with Retry-After."""
    extra = dict(headers or {})
    if status in (429, 503):
        extra.setdefault("Retry-After", str(RETRY_AFTER_SECONDS))
    return JsonResponse(error_body(status, code, message, param), status_code=status, headers=extra)


def as_moa_error(error: Exception) -> MoaError:
    """`error` itself where it was written for users; else one that says nothing, and the details in the log."""
    if isinstance(error, MoaError):
        return error
    logger.error("a request failed", exc_info=error)
    return EngineError(FAILED)


def response_of(error: Exception) -> "JsonResponse":
    known = as_moa_error(error)
    headers = {"Retry-After": str(known.retry_seconds)} if isinstance(known, Overloaded) else {}
    return error_response(status_of(known), known.code, str(known), param=known.param, headers=headers)


def dump_json(content: Any) -> bytes:
    """Compact ASCII: a lone surrogate that a client sent cannot break it, nor a U+2028 the lines of an event stream.

    Raises: ValueError for NaN and infinity, which JSON does not have.
    """
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")


class JsonResponse(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump_json(content)
