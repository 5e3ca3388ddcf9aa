"""Work: one HTTP request that takes rows of the engine, from its body to the last byte of its answer.

What all of them have in common, whatever they ask and answer: a client that leaves, time limits, errors before and after the first byte,
the account of the key, and the one record of how it went. What is done with the rows is for a subclass: generation.py, prompt_routing.py.
Belongs to the event loop.
"""

import asyncio
import secrets
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from moa_serve.api.context import Server
from moa_serve.api.errors import QueueTimeout, RequestTimeout, as_moa_error, dump_json, error_body, response_of, status_of
from moa_serve.api.guard import CHARGE, CLIENT_CLOSED_REQUEST, KEY_ID, OUTCOME, ClientGone
from moa_serve.api.logs import log_request
from moa_serve.api.schemas import read_json
from moa_serve.engine.async_engine import Stream
from moa_serve.engine.engine import TokenEvent
from moa_serve.engine.request import Sequence
from moa_serve.errors import MoaError
from moa_serve.metrics.record import RequestRecord

JSON_HEADERS = [(b"content-type", b"application/json")]

_Prepared = TypeVar("_Prepared")


@dataclass(slots=True)
class Progress:
    """How far a request has come: what its record says, at whatever point it ends."""

    arrived: float
    status: int = 200
    is_cancelled: bool = False
    error: MoaError | None = None
    is_started: bool = False  # the status is sent
    is_answered: bool = False  # the last byte is being sent: who leaves now has his answer


class Work(Response):
    """The response of a route that takes rows. It reads the request itself, so that one place sees every way in which it can end.

    Args:
        schema: what the body is read as, and `_serve` gets.
        progress: a subclass's own, which it fills.
    """

    def __init__(self, server: Server, request: HttpRequest, schema: type[BaseModel], id_prefix: str, progress: Progress) -> None:
        super().__init__()
        self._server, self._request, self._schema, self._progress = server, request, schema, progress
        self._id = id_prefix + secrets.token_hex(12)
        self._model_param = "model"  # the client's name for what the engine calls the adapter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        progress = self._progress
        try:
            body = await read_json(self._request, self._schema)
            progress.arrived = time.monotonic()
            is_done = await _until_gone(self._serve(body, send), receive)
            progress.is_cancelled = not (is_done or progress.is_answered)
        except (ClientDisconnect, ClientGone):
            progress.is_cancelled = True
        except asyncio.CancelledError:
            progress.is_cancelled = True
            raise
        except Exception as error:
            await self._answer_error(error, scope, receive, send)
        finally:
            self._observe()

    # -- what a subclass does

    async def _serve(self, body: Any, send: Send) -> None:
        """From the body to the last byte. All that it takes it gives back, whatever the exit."""
        raise NotImplementedError

    @property
    def _streams(self) -> list[Stream]:
        """Its rows, as far as they are opened."""
        raise NotImplementedError

    def _record(self) -> RequestRecord:
        """What is known of it now."""
        raise NotImplementedError

    def _count(self, record: RequestRecord) -> None:
        """Tell the metrics of it."""
        self._server.metrics.observe_request(record)

    # -- time

    async def _in_time(self, work: Coroutine[Any, Any, _Prepared]) -> _Prepared:
        """What is done before there are rows. Raises RequestTimeout."""
        try:
            async with asyncio.timeout(self._server.settings.request_timeout_seconds):
                return await work
        except TimeoutError:
            raise self._late() from None

    @contextmanager
    def _time_limits(self) -> Iterator[None]:
        """End every stream with an error when the request has waited or run for too long."""
        loop, settings, streams = asyncio.get_running_loop(), self._server.settings, self._streams

        def end_all(error: MoaError) -> None:
            for stream in streams:
                _fail(stream, error)

        def end_queued() -> None:
            if all(stream.sequence is None or stream.sequence.scheduled_at is None for stream in streams):
                end_all(QueueTimeout(f"the request waited {settings.queue_timeout_seconds:g} s for a row; try again later"))

        def end_late() -> None:
            end_all(self._late())

        elapsed = time.monotonic() - self._progress.arrived
        timers = [
            loop.call_later(max(0.0, settings.queue_timeout_seconds - elapsed), end_queued),
            loop.call_later(max(0.0, settings.request_timeout_seconds - elapsed), end_late),
        ]
        try:
            yield
        finally:
            for timer in timers:
                timer.cancel()

    def _late(self) -> RequestTimeout:
        return RequestTimeout(f"the request took more than {self._server.settings.request_timeout_seconds:g} s; ask for fewer tokens")

    # -- out

    async def _start(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        self._progress.is_started = True
        await send({"type": "http.response.start", "status": 200, "headers": headers})

    async def _answer_error(self, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        """A status, or, where one is sent already, an event after which nothing comes."""
        progress = self._progress
        progress.error = as_moa_error(error)
        if progress.error.param in ("adapter", "model"):
            progress.error.param = self._model_param
        progress.status = status_of(progress.error)
        if not progress.is_started:
            await response_of(progress.error)(scope, receive, send)
            return
        scope.setdefault("state", {})[OUTCOME] = progress.status
        content = error_body(progress.status, progress.error.code, str(progress.error), progress.error.param)
        with suppress(OSError):  # the client may be gone as well
            await send({"type": "http.response.body", "body": b"data: " + dump_json(content) + b"\n\n", "more_body": False})

    # -- what is said of it

    @property
    def _key_id(self) -> str | None:
        """Of the API key that it came with; None on a server without keys."""
        key_id: str | None = self._request.scope.get("state", {}).get(KEY_ID)
        return key_id

    @property
    def _request_id(self) -> str:
        return self._request.scope.get("state", {}).get("request_id") or self._id

    @property
    def _status(self) -> int:
        """For its record."""
        progress = self._progress
        return CLIENT_CLOSED_REQUEST if progress.is_cancelled and not progress.is_started else progress.status

    @property
    def _started(self) -> tuple[float | None, float | None]:
        """`time.monotonic()` seconds: when its first row began, and when the first token came."""
        sequences = [stream.sequence for stream in self._streams if stream.sequence is not None]
        scheduled = min((sequence.scheduled_at for sequence in sequences if sequence.scheduled_at is not None), default=None)
        return scheduled, min((sequence.first_token_at for sequence in sequences if sequence.first_token_at is not None), default=None)

    def _charge(self, num_tokens: int) -> None:
        """To the account of the key, where tokens are limited."""
        charge = self._request.scope.get("state", {}).get(CHARGE)
        if charge is not None:
            charge(num_tokens)

    def _observe(self) -> None:
        record = self._record()
        self._count(record)
        if record.scheduled is not None:
            self._server.return_times.observe(record.finished - record.scheduled)
        log_request(record)
        if self._server.traces is not None:
            error = self._progress.error
            code = None if error is None else error.code
            self._server.traces.add(record, response_id=self._id, error=code, headers=self._request.headers)


async def _until_gone(work: Coroutine[Any, Any, None], receive: Receive) -> bool:
    """Run `work` to its end, or cancel it when the client leaves; whether it came to its end."""
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        return False
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _fail(stream: Stream, error: MoaError) -> None:
    """End a stream from this side: its reader gets `error`, and closing it frees the row."""
    sequence = stream.sequence or Sequence(stream.request, list(stream.request.prompt_ids), b"")
    stream.deliver(TokenEvent(sequence, None, finish_reason="error", error=error))
