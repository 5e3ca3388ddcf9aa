"""Log lines: one a request, none forged, no key, no prompt."""

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from moa_serve.api.logs import configure_logs, log_event, log_refused, log_request
from moa_serve.metrics import RequestRecord

KEY = "sk-very-secret-1"


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    stream = io.StringIO()
    configure_logs("info", [KEY, KEY + "-longer"], stream)
    yield stream
    logging.captureWarnings(False)
    root.handlers[:] = before
    root.setLevel(level)


def read(stream: io.StringIO) -> list[dict[str, Any]]:
    text = stream.getvalue()
    assert text.isascii()
    assert text.replace("\n", "").isprintable()
    return [json.loads(line) for line in text.splitlines()]


def record(**more: Any) -> RequestRecord:
    fields: dict[str, Any] = {
        "model": "math", "adapter": "math", "revision": "ab" * 32, "request_id": "r1", "endpoint": "completions", "prompt_tokens": 7,
        "completion_tokens": 5, "cached_tokens": 0, "finish_reason": "stop", "arrived": 1.0, "scheduled": 1.5, "first_token": 2.0,
        "finished": 4.0, "n": 1, "max_tokens": 16, "status": 200,
    }  # fmt: skip
    return RequestRecord(**fields | more)


def test_a_request_is_one_line_with_its_timings(lines: io.StringIO) -> None:
    log_request(record())
    (line,) = read(lines)
    assert line["event"] == "request"
    assert line["timings"] == {"queue": 0.5, "prefill": 0.5, "first_token": 1.0, "decode": 2.0, "tokens_per_second": 2.0}
    assert (line["status"], line["completion_tokens"], line["seconds"]) == (200, 5, 3.0)


@pytest.mark.case(87)
@pytest.mark.parametrize("evil", ['x\r\n{"level":"info"}', "\x1b[31mred", "a\u2028b\u2029c", "\x00\x7f\x85\x9b", "\ud800", 'q"\\'])
def test_no_client_forges_a_line(lines: io.StringIO, evil: str) -> None:
    """A model name or a path is the client's; a terminal or a log reader must not act on it."""
    log_request(record(model=evil))
    log_refused("r", "GET", evil, 404, "not_found")
    logging.getLogger("x").warning("%s", evil)
    assert len(read(lines)) == 3


@pytest.mark.case(88)
def test_keys_are_replaced_wherever_they_stand(lines: io.StringIO) -> None:
    log_refused("r", "GET", f"/{KEY}-longer/{KEY}", 401, "invalid_api_key")
    log_event("start", settings={"keys": [KEY]})
    try:
        raise RuntimeError(KEY)
    except RuntimeError:
        logging.getLogger("x").exception("failed")
    assert KEY not in lines.getvalue()
    assert read(lines)[0]["path"] == "/[key]/[key]"


def test_long_and_strange_values_stay_one_line_of_json(lines: io.StringIO) -> None:
    log_event("x", number=float("nan"), text="a" * 10**6, other=object())
    (line,) = read(lines)
    assert len(line["text"]) < 10_000
