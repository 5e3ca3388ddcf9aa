"""Structured logs: one JSON object a line on standard error; one line for each request that ended.

Never a prompt, a completion or a key: requests are logged from their record, which has none, and the configured keys are replaced wherever
else they turn up. All that is not printable ASCII is escaped, so no client can forge a line, colour it, or end it with U+2028.
"""

import json
import logging
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, TextIO

from moa_serve.metrics import RequestRecord, timings

logger = logging.getLogger("moa_serve.request")

REDACTED = "[key]"
MAX_TEXT_CHARS = 8192  # of one value: a traceback fits, a client's megabyte does not
_EVENT = "moa_event"  # attribute of a LogRecord: the fields of a structured line


class JsonFormatter(logging.Formatter):
    """
    Args:
        keys: secrets to replace, wherever they stand.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        super().__init__()
        self._keys = sorted((key for key in keys if key), key=len, reverse=True)  # a key may begin with another one

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


def configure_logs(level: str, keys: Iterable[str] = (), stream: TextIO | None = None) -> None:
    """Send every logger of the process to standard error as JSON lines, once; uvicorn's too (`log_config=None` leaves them to us)."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(keys))
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)


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


def log_event(event: str, **fields: Any) -> None:
    """A line about the server itself: start, ready, draining."""
    logger.info(event, extra={_EVENT: {"event": event, **fields}})
