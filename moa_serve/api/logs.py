"""Structured logs: one JSON object a line on standard error; one line for each request that ended.

A line that cannot be written, because the disk is full, the reader has gone or reads no more, is dropped and counted: the event loop waits
for no log. Never a prompt, a completion or a key: requests are logged from their record, which has none, and the configured keys are
replaced wherever else they turn up. All that is not printable ASCII is escaped, so no client can forge a line, colour it, or end it with
U+2028.
"""

import json
import logging
import os
import select
import sys
from collections.abc import Collection, Iterable
from datetime import UTC, datetime
from typing import Any, TextIO

from moa_serve.metrics import RequestRecord, timings
from moa_serve.settings import DEFAULT, Explained

logger = logging.getLogger("moa_serve.request")

REDACTED = "[key]"
MIN_SECRET_CHARS = 4
MAX_TEXT_CHARS = 8192  # of one value: a traceback fits, a client's megabyte does not
_EVENT = "moa_event"  # attribute of a LogRecord: the fields of a structured line


class JsonFormatter(logging.Formatter):
    """
    Args:
        keys: secrets to replace, wherever they stand; shorter ones than MIN_SECRET_CHARS stay, since words are made of them.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        super().__init__()
        secrets = (key for key in keys if len(key) >= MIN_SECRET_CHARS)
        self._keys = sorted(secrets, key=len, reverse=True)  # a key may begin with another one

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        event = getattr(record, _EVENT, None)
        line |= event if isinstance(event, dict) else {"message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(self._clean(line), allow_nan=False, separators=(",", ":"))

    def _clean(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {str(name): self._clean(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(part) for part in value]
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if value - value == 0 else str(value)  # JSON has no NaN
        text = str(value)
        for key in self._keys:
            text = text.replace(key, REDACTED)
        text = text.replace("\x7f", "\\x7f")  # DEL, the one control character that json leaves as it is
        return text if len(text) <= MAX_TEXT_CHARS else text[:MAX_TEXT_CHARS] + "..."


class LineHandler(logging.Handler):
    """Writes whole lines to a stream, past its buffers, while it takes them at once.

    Args:
        stream: None where there is none: standard error was closed.
    """

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__()
        self._stream, self._descriptor = stream, _descriptor_of(stream)
        self._num_dropped, self._is_torn = 0, False

    def emit(self, record: logging.LogRecord) -> None:
        if self._num_dropped and self._write(self._format_own("log lines were dropped", count=self._num_dropped)):
            self._num_dropped = 0
        if self._num_dropped or not self._write(self._line_of(record)):
            self._num_dropped += 1

    def _line_of(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as error:  # a bug of whoever logs; what it was to say is told all the same
            return self._format_own("a log line could not be made", template=record.msg, error=error)

    def _format_own(self, event: str, **fields: Any) -> str:
        record = {"levelname": "WARNING", "name": logger.name, _EVENT: {"event": event, **fields}}
        return self.format(logging.makeLogRecord(record))

    def _write(self, line: str) -> bool:
        try:
            if self._descriptor is None:
                if self._stream is not None:
                    self._stream.write(line + "\n")
                return True
            rest = memoryview(f"{chr(10) if self._is_torn else ''}{line}\n".encode())
            while rest:
                if not self._takes_more():
                    return False
                written = os.write(self._descriptor, rest[: select.PIPE_BUF])  # so many fit in a pipe that says that it takes more
                rest = rest[written:]
                self._is_torn = bool(rest)
            return True
        except (OSError, ValueError):  # ValueError: a stream that somebody has closed
            return False

    def _takes_more(self) -> bool:
        """A pipe whose reader has stopped takes nothing, and would hold whoever writes. Files always say yes."""
        assert self._descriptor is not None
        poll = select.poll()
        poll.register(self._descriptor, select.POLLOUT)
        return bool(poll.poll(0))


def _descriptor_of(stream: TextIO | None) -> int | None:
    """None for a stream in memory."""
    try:
        return None if stream is None else stream.fileno()
    except (OSError, ValueError, AttributeError):
        return None


def configure_logs(level: str, keys: Collection[str] = (), stream: TextIO | None = None) -> None:
    """Send every logger of the process to standard error as JSON lines, once; uvicorn's too (`log_config=None` leaves them to us)."""
    handler = LineHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(keys))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    if short := sum(0 < len(key) < MIN_SECRET_CHARS for key in keys):
        logger.warning(
            "%d of the keys have fewer than %d characters: they can be guessed, and the log does not hide them", short, MIN_SECRET_CHARS
        )


def log_request(record: RequestRecord) -> None:
    """The line of one request, with the timings that its response had."""
    fields: dict[str, Any] = {
        "event": "request",
        "request_id": record.request_id,
        "endpoint": record.endpoint,
        "status": record.status,
        "model": record.model[:128],
        "adapter": record.adapter,
        "revision": record.revision,
        "finish_reason": record.finish_reason,
        "n": record.n,
        "max_tokens": record.max_tokens,
        "threshold_scale": record.threshold_scale,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "completion_tokens": record.completion_tokens,
        "seconds": round(max(0.0, record.finished - record.arrived), 6),
        "timings": timings(record),
    }
    logger.info("request", extra={_EVENT: fields})


def log_refused(request_id: str, method: str, path: str, status: int, code: str) -> None:
    """The line of a request that no handler saw: too large, too slow, without a key."""
    fields = {"event": "refused", "request_id": request_id, "method": method[:16], "path": path[:128], "status": status, "code": code}
    logger.info("refused", extra={_EVENT: fields})


def log_settings(settings: Iterable[Explained]) -> None:
    """What is not as usual, and where each of it comes from; secrets are hidden."""
    given = {item.name: {"value": item.value, "from": item.source} for item in settings if item.source != DEFAULT}
    log_event("settings", given=given)


def log_event(event: str, **fields: Any) -> None:
    """A line about the server itself: start, ready, draining."""
    logger.info(event, extra={_EVENT: {"event": event, **fields}})
