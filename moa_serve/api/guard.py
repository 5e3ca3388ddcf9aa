"""Guard: what every request meets before a handler does: its name, its limits, its deadlines, who may send it.

Pure ASGI around the whole app, so that no route, no error page and no framework default is outside of it. A request's body is taken whole
before the app runs: it is small (JSON), and so a handler never meets half of one, nor a client that stops sending. Deny by default: where
keys are set, every path needs one but those that are named here as public. No state but constants; belongs to the event loop.
"""

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moa_serve.api import dashboard
from moa_serve.api.errors import RETRY_AFTER_SECONDS, dump_json, error_body
from moa_serve.api.limits import Account, Accounts, RateLimited
from moa_serve.api.logs import log_refused
from moa_serve.errors import Overloaded
from moa_serve.settings import ServerSettings

logger = logging.getLogger(__name__)

_PROBED = frozenset({"/health", "/health/live", "/health/ready"})
PUBLIC = _PROBED | dashboard.PATHS
# Changing these changes what others are served.
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters", "/v1/aliases")
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\[\]:/@\s]+)(:\d{1,5})?")
_LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

# What the server's protocol (protocol.py) puts into `scope["state"]`, and what the guard puts there for handlers.
ABORT, RECEIVED_AT = "moa.abort", "moa.received_at"
REQUEST_ID = "request_id"
KEY_ID = "key_id"  # who asks: 16 hex digits of the key's SHA-256, the same after a restart; absent where no key was asked for
CLIENT_CLOSED_REQUEST = 499  # for records only: nobody is there to read it
NO_ROUTE = "none"
OUTCOME = "moa.outcome"  # the status that an answer would have had, whose stream failed after its first byte
CHARGE = "moa.charge"  # a function to be told of every token that a request has used; absent where tokens are not limited


class ResponseCounter(Protocol):
    def observe_response(self, status: int) -> None: ...
    def observe_http(
        self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
    ) -> None: ...  # fmt: skip


class ClientGone(ConnectionAbortedError):
    """The client took nothing of its response for too long and was cut."""


@dataclass(eq=False)
class Refusal(Exception):
    """A request that no handler sees. `closes`: the connection ends, for its next request stands behind a body that nobody reads."""

    status: int
    code: str
    message: str
    headers: tuple[tuple[bytes, bytes], ...] = ()
    closes: bool = False


class Guard:
    """
    Args:
        is_draining: whether the server is about to end.
        check_room: raises Overloaded for a path whose requests have no place now. They are told so here, where it costs least: nobody
            parses their bodies.
        metrics: counts the responses.
        handler_of: the template of the route that a path belongs to, as metrics name it.
    """

    def __init__(
        self,
        app: ASGIApp,
        settings: ServerSettings,
        *,
        is_draining: Callable[[], bool] = lambda: False,
        check_room: Callable[[str], None] = lambda path: None,
        metrics: ResponseCounter | None = None,
        handler_of: Callable[[str], str] = lambda path: NO_ROUTE,
    ) -> None:
        self._app, self._settings, self._metrics, self._handler_of = app, settings, metrics, handler_of
        self._is_draining, self._check_room = is_draining, check_room
        self._user_keys = [_digest(key.get_secret_value()) for key in settings.api_key]
        self._admin_key = _digest(settings.admin_key.get_secret_value()) if settings.admin_key else None
        self._accounts = Accounts(settings, [_key_id(key) for key in self._user_keys])
        extra = {host.lower() for host in settings.allowed_hosts}
        self._hosts = _LOOPBACK_HOSTS | extra | {_bracketed(settings.host)} if settings.is_loopback else frozenset(extra)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await self._app(scope, receive, send)  # lifespan

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = _Headers(scope)
        request_id = headers.one("x-request-id") or ""
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        state: dict[str, Any] = scope.setdefault("state", {})
        state[REQUEST_ID] = request_id
        reply = _Reply(scope, send, self._extra_headers(request_id, headers), self._settings.write_timeout_seconds, self._metrics)
        started, num_read = time.monotonic(), 0
        try:
            if self._is_preflight(scope, headers):
                await reply.empty(204, _PREFLIGHT)
                return
            self._check(scope, headers)
            reply.account = self._account(scope)
            with reply.account.admit() if reply.account else nullcontext():
                if reply.account is not None:
                    state[CHARGE] = reply.account.charge
                body = await self._body(state, headers, receive)
                if body is None:
                    return  # gone before it had sent its request
                num_read = len(body)
                if scope["method"] not in _READS:
                    self._check_room(scope["path"])
                await self._app(_as_get(scope), _Replay(body, receive), reply)
        except (Refusal, RateLimited, Overloaded) as error:
            refusal = _refusal(error, headers)
            log_refused(request_id, scope["method"], scope["path"], refusal.status, refusal.code)
            await reply.error(refusal)
        except asyncio.CancelledError:  # the time to drain is over
            if not reply.is_begun:
                with suppress(Exception):
                    await reply.error(Refusal(503, "draining", "the server is shutting down; send the request to another one"))
            raise
        except Exception:
            if reply.is_cut:
                return
            logger.exception("request %s failed", request_id)
            # The app answers its own errors; one that comes out of it is answered here, unless the answer has begun.
            if reply.is_begun:
                reply.abort_unless_complete()
            else:
                message = "the server failed while it handled this request; its log has the details"
                await reply.error(Refusal(500, "internal_error", message, closes=True))
        finally:
            if self._metrics is not None:
                handler, seconds = self._handler_of(scope["path"]), time.monotonic() - started
                status = state.get(OUTCOME, reply.status)
                self._metrics.observe_http(handler, scope["method"], status, seconds, num_read, reply.num_bytes)

    def _extra_headers(self, request_id: str, headers: "_Headers") -> list[tuple[bytes, bytes]]:
        extra = [(b"x-request-id", request_id.encode("ascii"))]
        if self._settings.cors_origin:
            extra.append((b"vary", b"Origin"))
            origin = headers.one("origin")
            if origin in self._settings.cors_origin:
                extra.append((b"access-control-allow-origin", origin.encode("latin-1")))
                extra.append((b"access-control-expose-headers", b"X-Request-Id, Retry-After, X-MoA-Threshold-Scale"))
        return extra

    def _is_preflight(self, scope: Scope, headers: "_Headers") -> bool:
        """A browser asks, without a key, whether its page may send one."""
        asks = scope["method"] == "OPTIONS" and headers.one("access-control-request-method") is not None
        return asks and headers.one("origin") in self._settings.cors_origin

    # -- what needs the head of the request only; in the order in which it is least told to strangers

    def _check(self, scope: Scope, headers: "_Headers") -> None:
        """Raises Refusal."""
        self._check_size(scope, headers)
        self._check_framing(headers)
        self._check_host(scope, headers)
        self._check_origin(scope, headers)
        self._check_key(scope, headers)
        if not _is_plain(scope):
            raise Refusal(404, "not_found", "there is nothing at this path; write it plainly, as in /v1/models", closes=headers.has_body)
        if headers.one("content-encoding") not in (None, "", "identity"):
            raise Refusal(415, "unsupported_media_type", "compressed request bodies are not read; send plain JSON", closes=headers.has_body)
        if self._is_draining() and scope["method"] not in _READS:
            raise Refusal(503, "draining", "the server is shutting down and takes no new requests; try again", _retry(), closes=True)

    def _check_size(self, scope: Scope, headers: "_Headers") -> None:
        limits = self._settings
        length = len(scope.get("raw_path") or scope["path"].encode()) + len(scope.get("query_string", b""))
        if length > limits.max_url_bytes:
            raise Refusal(414, "url_too_long", f"the URL has {length} bytes; at most {limits.max_url_bytes} are read", closes=True)
        if headers.count > limits.max_headers or headers.num_bytes > limits.max_header_bytes:
            raise Refusal(
                431,
                "headers_too_large",
                f"the request has {headers.count} headers of {headers.num_bytes} bytes; at most {limits.max_headers} headers of "
                f"{limits.max_header_bytes} bytes are read",
                closes=True,
            )

    def _check_framing(self, headers: "_Headers") -> None:
        declared = headers.all("content-length")
        if len(set(declared)) > 1 or (declared and headers.all("transfer-encoding")):
            message = "the request says twice how long it is (Content-Length, Transfer-Encoding); a proxy may read it otherwise"
            raise Refusal(400, "invalid_http", message, closes=True)
        if declared and not (declared[0].isascii() and declared[0].isdecimal()):
            raise Refusal(400, "invalid_http", "Content-Length must be a number of bytes", closes=True)

    def _check_host(self, scope: Scope, headers: "_Headers") -> None:
        """On a loopback bind a page of any site could reach the server by a name of its own that resolves to 127.0.0.1."""
        hosts = headers.all("host")
        if not self._hosts or not hosts:
            return
        if scope["path"] in _PROBED and not self._settings.is_loopback:
            return  # probes come by address
        match = _HOST.fullmatch(hosts[0])
        if len(hosts) > 1 or match is None or match[1].lower() not in self._hosts:
            # What is no name is not repeated: of a header that was run together with the next one it could be a key.
            named = f"{hosts[0][:64]!a}; add the name to MOA_ALLOWED_HOSTS if it is meant" if match else "what the Host header says"
            message = f"this server is not {named}"
            raise Refusal(421, "misdirected_request", message, closes=headers.has_body)

    def _check_origin(self, scope: Scope, headers: "_Headers") -> None:
        """A page of another site can send a POST without asking first; its browser says where it is from."""
        origin = headers.one("origin")
        if origin is None or scope["method"] in _READS or origin in self._settings.cors_origin:
            return
        if origin.partition("://")[2] != headers.one("host"):
            message = "pages of this origin may not change anything here; add it with --cors-origin if it is meant"
            raise Refusal(403, "origin_denied", message, closes=headers.has_body)

    def _check_key(self, scope: Scope, headers: "_Headers") -> None:
        is_change = scope["method"] not in _READS and scope["path"].startswith(ADMIN)
        is_public = scope["path"] in PUBLIC and scope["method"] in _READS
        needs_admin = is_change and (self._admin_key is not None or bool(self._user_keys))
        if is_public or not (self._user_keys or needs_admin):
            return
        digest = _bearer(headers)
        # All keys are compared, whichever fits, and in constant time: how long it takes tells nothing.
        matches = [hmac.compare_digest(digest, key) for key in self._user_keys]
        is_admin = self._admin_key is not None and hmac.compare_digest(digest, self._admin_key)
        if not (any(matches) or is_admin):
            message = "the API key is missing or wrong; send it as `Authorization: Bearer KEY`"
            raise Refusal(401, "invalid_api_key", message, ((b"www-authenticate", b"Bearer"),), closes=headers.has_body)
        if needs_admin and not is_admin:
            message = "changing adapters needs the admin key"
            if self._admin_key is None:
                message += ", and this server has none; start it with MOA_ADMIN_KEY"
            raise Refusal(403, "admin_key_required", message, closes=headers.has_body)
        scope["state"][KEY_ID] = _key_id(digest)

    def _account(self, scope: Scope) -> Account | None:
        """Of a request that makes work. Reading is cheap and watches the server; who changes adapters is the operator."""
        is_limited = scope["method"] not in _READS and not scope["path"].startswith(ADMIN)
        return self._accounts.of(scope["state"].get(KEY_ID)) if is_limited else None

    # -- the body

    async def _body(self, state: Mapping[str, Any], headers: "_Headers", receive: Receive) -> bytes | None:
        """All of it; None if the client left. Raises Refusal before more than the limit, and one message, is held."""
        limit, declared = self._settings.max_body_bytes, headers.one("content-length")
        if not headers.has_body:
            return b""
        if declared is not None and (len(declared) > 18 or int(declared) > limit):
            raise self._too_large()
        loop = asyncio.get_running_loop()
        deadline = state.get(RECEIVED_AT, loop.time()) + self._settings.body_timeout_seconds
        parts: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout_at(deadline):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    num_bytes += len(parts[-1])
                    if num_bytes > limit or len(parts) > self._settings.max_body_chunks:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            message_text = f"the request was not complete within {self._settings.body_timeout_seconds:g} seconds"
            raise Refusal(408, "body_timeout", message_text, closes=True) from None

    def _too_large(self) -> Refusal:
        limits = self._settings
        message = f"a request body may have {limits.max_body_bytes} bytes in {limits.max_body_chunks} chunks; send less at once"
        return Refusal(413, "body_too_large", message, closes=True)


class _Headers:
    """Of a request; names in lower case."""

    def __init__(self, scope: Scope) -> None:
        self._pairs: list[tuple[bytes, bytes]] = scope["headers"]
        self.count = len(self._pairs)
        self.num_bytes = sum(len(name) + len(value) + 4 for name, value in self._pairs)  # ": " and the end of the line

    def all(self, name: str) -> list[str]:
        wanted = name.encode("ascii")
        return [value.decode("latin-1").strip() for key, value in self._pairs if key.lower() == wanted]

    def one(self, name: str) -> str | None:
        """None too where there are several that differ."""
        values = set(self.all(name))
        return values.pop() if len(values) == 1 else None

    @property
    def has_body(self) -> bool:
        return bool(self.all("transfer-encoding")) or self.one("content-length") not in (None, "0")


class _Replay:
    """`receive` for the app: the body in one message, then whatever the server says, which is that the client has left."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is not None:
            message: Message = {"type": "http.request", "body": self._body, "more_body": False}
            self._body = None
            return message
        while (message := await self._receive())["type"] != "http.disconnect":
            pass  # a server that was not asked for an empty body says so first
        return message


class _Reply:
    """`send` for the app: every response has the request's name, and no write waits longer than the deadline."""

    def __init__(
        self, scope: Scope, send: Send, extra: list[tuple[bytes, bytes]], timeout: float, metrics: ResponseCounter | None
    ) -> None:  # fmt: skip
        self._send, self._extra, self._timeout, self._metrics = send, extra, timeout, metrics
        self._abort: Callable[[], None] | None = scope["state"].get(ABORT)
        self._is_head = scope["method"] == "HEAD"
        self.account: Account | None = None
        self.status, self.num_bytes = CLIENT_CLOSED_REQUEST, 0  # of the response so far
        self.is_begun = self.is_complete = self.is_cut = False

    async def __call__(self, message: Message) -> None:
        if self.is_cut:
            raise ClientGone
        if message["type"] == "http.response.start":
            self.is_begun, self.status = True, message["status"]
            kept = [pair for pair in message.get("headers", []) if pair[0].lower() != b"x-request-id"]
            limits = self.account.headers() if self.account else ()
            message = {**message, "headers": [*kept, *self._extra, *limits]}
            if self._metrics is not None:
                self._metrics.observe_response(message["status"])
        elif message["type"] == "http.response.body":
            self.is_complete = not message.get("more_body", False)
            if self._is_head:
                message = {**message, "body": b""}
            self.num_bytes += len(message.get("body", b""))
        try:
            async with asyncio.timeout(self._timeout):
                await self._send(message)
        except TimeoutError:
            self._cut()
            raise ClientGone from None

    def _cut(self) -> None:
        self.is_cut = True
        logger.info("a client took nothing of its response for %g seconds and was cut", self._timeout)
        if self._abort is not None:
            self._abort()

    def abort_unless_complete(self) -> None:
        """End a response that cannot be finished, so that the client does not take half of it for the whole."""
        if not self.is_complete and self._abort is not None:
            self._abort()

    async def error(self, refusal: Refusal) -> None:
        body = dump_json(error_body(refusal.status, refusal.code, refusal.message))
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *refusal.headers]
        if refusal.closes:
            headers.append((b"connection", b"close"))
        await self({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})

    async def empty(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        await self({"type": "http.response.start", "status": status, "headers": headers})
        await self({"type": "http.response.body", "body": b""})


def _refusal(error: Refusal | RateLimited | Overloaded, headers: _Headers) -> Refusal:
    if isinstance(error, Refusal):
        return error
    is_limited = isinstance(error, RateLimited)  # before its body was read
    retry = _retry(error.retry_seconds)
    return Refusal(429 if is_limited else 503, error.code, str(error), retry, closes=is_limited and headers.has_body)


def _retry(seconds: int = RETRY_AFTER_SECONDS) -> tuple[tuple[bytes, bytes], ...]:
    return ((b"retry-after", str(seconds).encode("ascii")),)


_PREFLIGHT = [
    (b"access-control-allow-methods", b"GET, POST, PUT, DELETE"),
    (b"access-control-allow-headers", b"Authorization, Content-Type, X-Request-Id"),
    (b"access-control-max-age", b"600"),
]


def _digest(key: str) -> bytes:
    """Of equal length whatever the key, so that comparing takes equal time."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _key_id(digest: bytes) -> str:
    return digest.hex()[:16]


def _bearer(headers: _Headers) -> bytes:
    """Digest of the bearer token; of nothing that any key has where there is none, or several."""
    scheme, _, token = (headers.one("authorization") or "").partition(" ")
    return _digest(token.strip()) if scheme.lower() == "bearer" and token.strip() else bytes(32)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host.lower()


def _is_plain(scope: Scope) -> bool:
    """A path is written the one way that routes and the rules above know: no `//`, `.`, `..` or trailing `/`, hidden by `%` or not."""
    path: str = scope["path"]
    if path == "/":
        return True
    parts = path.split("/")
    return not parts[0] and path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(parts[1:])


def _as_get(scope: Scope) -> Scope:
    """HEAD is GET without its body, wherever there is a GET."""
    return {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
