"""uvicorn as this server runs it: its HTTP/1.1 protocol with the deadlines and limits that it lacks, and the configuration.

uvicorn waits for ever for the headers of a request that has begun, since each byte of it resets the keep-alive timer
(github.com/encode/uvicorn/issues/157), answers what is no HTTP in plain text, and closes a connection only once all is written, which a
client that reads nothing never lets happen. Belongs to the event loop.
"""

import asyncio
import resource
import ssl
import sys
from typing import Any

import h11
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from moa_serve.api.errors import dump_json, error_body
from moa_serve.api.guard import ABORT, RECEIVED_AT
from moa_serve.settings import ServerSettings

LINGER_SECONDS = 1.0
_BACKLOG = 64
_RESERVED = _BACKLOG + 64
_REFUSED = {413: "body_too_large", 431: "headers_too_large"}


class _Connection(h11.Connection):
    """Counts the pieces of a chunked body: each one is an event to handle, whatever it holds."""

    def __init__(self, max_header_bytes: int, max_chunks: int) -> None:
        super().__init__(h11.SERVER, max_header_bytes)
        self._max_chunks, self._num_chunks = max_chunks, 0

    def next_event(self) -> Any:
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = 0
        elif isinstance(event, h11.Data) and event.chunk_start:
            self._num_chunks += 1
            if self._num_chunks > self._max_chunks:
                raise h11.RemoteProtocolError(f"more than {self._max_chunks} chunks", error_status_hint=413)
        return event


class _LingeringTransport:
    """What a response is written to: its end is `Protocol.close_gently` instead of the transport's."""

    def __init__(self, protocol: "Protocol") -> None:
        self._protocol = protocol
        self.write, self.is_closing = protocol.transport.write, protocol.transport.is_closing

    def close(self) -> None:
        self._protocol.close_gently()


class Protocol(H11Protocol):
    """One connection."""

    settings: ServerSettings  # these are of the subclass that `uvicorn_config` makes
    max_connections: int

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn = _Connection(self.settings.max_header_bytes, self.settings.max_body_chunks)
        self._header_timer: asyncio.TimerHandle | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self._received_at: float | None = None  # first byte of the request that is coming in
        self._can_discard: int | None = None  # bytes, once the connection lingers
        self._silent_since = self.loop.time()

    @property
    def _is_between(self) -> bool:
        """No request is being answered: what comes now is the head of one."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        self._start_header_timer()
        self._make_room()

    def _make_room(self) -> None:
        """Beyond the limit the connection that has been silent longest goes: idle ones must not shut out who asks, health above all."""
        if len(self.connections) <= self.max_connections:
            return
        silent = [other for other in self.connections if isinstance(other, Protocol) and other is not self and other._is_between]
        min(silent, key=lambda other: other._silent_since, default=self).transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._can_discard is not None:
            self._can_discard -= len(data)
            if self._can_discard < 0:
                self.transport.abort()
            return
        if self._received_at is None and self._is_between:
            self._received_at = self.loop.time()
            self._start_header_timer()
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and self.cycle is not None:  # a head is complete; its task has not begun to run
            self._stop_header_timer()
            self.scope["state"][ABORT] = self.transport.abort
            self.scope["state"][RECEIVED_AT] = self.loop.time() if self._received_at is None else self._received_at
            self._received_at = None
            self.cycle.transport = _LingeringTransport(self)  # type: ignore[assignment]

    def close_gently(self) -> None:
        """Close after a response whose request was not read to its end.

        Data that is there and not read would make the kernel send a reset, which takes the response away from many clients before they
        have read it; then they send everything again. So for a moment what still comes is thrown away.
        """
        if self.conn.their_state not in (h11.SEND_BODY, h11.ERROR) or self.transport.is_closing():
            self.transport.close()
            return
        self._can_discard = self.settings.max_body_bytes
        if self.transport.can_write_eof():  # TLS cannot say it in one direction only
            self.transport.write_eof()
        self.flow.resume_reading()
        self._close_timer = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def on_response_complete(self) -> None:
        if self._can_discard is not None:
            self.server_state.total_requests += 1
            return
        super().on_response_complete()
        self._silent_since = self.loop.time()
        if self.transport.is_closing():
            self._abort_unless_written()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._abort_unless_written()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_header_timer()
        if self._close_timer is not None:
            self._close_timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told so in our shape, and the connection ends. Called while h11's error is handled."""
        self._stop_header_timer()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # in the middle of an answer nothing else can be said
            return
        hint = getattr(sys.exception(), "error_status_hint", 400)
        status = hint if hint in _REFUSED else 400
        body = dump_json(error_body(status, _REFUSED.get(status, "invalid_http"), "this is no HTTP/1.1 request that can be read"))
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:  # its head was good: whoever answers it now would be too late
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.close_gently()

    def _start_header_timer(self) -> None:
        self._stop_header_timer()
        self._header_timer = self.loop.call_later(self.settings.header_timeout_seconds, self._on_header_timeout)

    def _stop_header_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _on_header_timeout(self) -> None:
        self.transport.abort()

    def _abort_unless_written(self) -> None:
        if self._close_timer is None:
            self._close_timer = self.loop.call_later(self.settings.write_timeout_seconds, self.transport.abort)


def uvicorn_config(app: Any, settings: ServerSettings, tls: ssl.SSLContext | None = None) -> Config:
    """What `uvicorn.Server` runs the app with. Logs are left to logs.py, the number of requests to the engine's queue."""
    # Files must still be opened when all connections are; the kernel hands over up to `_BACKLOG` new ones before one is looked at.
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = settings.max_connections if descriptors == resource.RLIM_INFINITY else min(settings.max_connections, descriptors - _RESERVED)
    protocol = type("BoundProtocol", (Protocol,), {"settings": settings, "max_connections": max(1, limit)})
    return Config(
        app,
        host=settings.host,
        port=settings.port,
        http=protocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # nobody's word on where a request is from is needed
        backlog=_BACKLOG,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        h11_max_incomplete_event_size=settings.max_header_bytes,
        ssl_context_factory=None if tls is None else lambda *_: tls,
    )
