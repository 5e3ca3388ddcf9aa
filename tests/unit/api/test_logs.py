"""Log lines: one a request, none forged, no key, no prompt."""

import io
import json
import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from moa_serve.api.logs import JsonFormatter, LineHandler, configure_logs, log_event, log_refused, log_request
from moa_serve.metrics import RequestRecord

REPOSITORY = Path(__file__).parents[3]
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
        "completion_tokens": 5, "longest_completion": 5, "cached_tokens": 0, "finish_reason": "stop", "arrived": 1.0, "scheduled": 1.5,
        "first_token": 2.0, "finished": 4.0, "n": 1, "max_tokens": 16, "status": 200,
    }  # fmt: skip
    return RequestRecord(**fields | more)


def test_a_request_is_one_line_with_its_timings(lines: io.StringIO) -> None:
    log_request(record())
    (line,) = read(lines)
    assert line["event"] == "request"
    assert line["timings"] == {"queue": 0.5, "prefill": 0.5, "first_token": 1.0, "decode": 2.0, "tokens_per_second": 2.0}
    assert (line["status"], line["completion_tokens"], line["seconds"]) == (200, 5, 3.0)
    assert line["threshold_scale"] is None
    log_request(record(threshold_scale=1.5))
    assert read(lines)[1]["threshold_scale"] == 1.5


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


def test_a_key_of_a_few_characters_does_not_make_the_log_unreadable() -> None:
    reader, writer = os.pipe()
    with logging_to(writer, keys=("e", KEY)):
        logging.getLogger("x").warning("the level of %s", KEY)
        warned, line = read_all(reader)
    os.close(reader)
    assert warned["message"].startswith("1 of the keys have fewer than 4 characters")
    assert line["message"] == "the level of [key]"


def test_long_and_strange_values_stay_one_line_of_json(lines: io.StringIO) -> None:
    log_event("x", number=float("nan"), text="a" * 10**6, other=object())
    (line,) = read(lines)
    assert len(line["text"]) < 10_000


@contextmanager
def logging_to(descriptor: int, keys: Collection[str] = ()) -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    with os.fdopen(descriptor, "w") as stream:
        configure_logs("info", keys, stream)
        try:
            yield
        finally:
            logging.captureWarnings(False)
            root.handlers[:] = before
            root.setLevel(level)


def read_all(descriptor: int) -> list[dict[str, Any]]:
    os.set_blocking(descriptor, False)
    data = b""
    while True:
        try:
            part = os.read(descriptor, 2**16)
        except BlockingIOError:
            break
        data += part
    return [json.loads(line) for line in data.splitlines() if line.startswith(b"{") and line.endswith(b"}")]


@pytest.mark.case(83)
@pytest.mark.parametrize("size", [10, 8000])
def test_a_reader_that_reads_no_more_stops_nobody(size: int) -> None:
    """A log collector that hangs leaves its pipe full, and whoever writes to that waits for ever: here, the event loop."""
    reader, writer = os.pipe()
    try:
        with logging_to(writer):
            for number in range(2000):
                log_event("x", number=number, text="a" * size)
            got = read_all(reader)
            numbers = [line["number"] for line in got]
            assert numbers == list(range(len(numbers)))
            assert 0 < len(numbers) < 2000
            log_event("after")
            lost, after = read_all(reader)
            assert lost["event"] == "log lines were dropped"
            assert lost["count"] == 2000 - len(numbers)
            assert (lost["level"], after["event"]) == ("warning", "after")
    finally:
        os.close(reader)


@pytest.mark.case(83)
def test_a_full_disk_and_a_reader_who_has_gone_stop_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    with logging_to(os.open("/dev/full", os.O_WRONLY)):
        log_event("x")
        logging.getLogger("y").error("failed")
    reader, writer = os.pipe()
    with logging_to(writer):
        os.close(reader)
        log_event("x")
    assert capfd.readouterr() == ("", "")


@pytest.mark.case(83)
def test_what_cannot_be_formatted_is_told_and_no_reason_to_fail() -> None:
    stream = io.StringIO()
    handler = LineHandler(stream)
    handler.setFormatter(JsonFormatter())
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("not a number",)}))
    (line,) = read(stream)
    assert (line["event"], line["template"]) == ("a log line could not be made", "%d")


@pytest.mark.case(84)
def test_only_what_is_shown_to_people_reads_the_wall_clock() -> None:
    """A clock that is set, by an hour or ten years, must neither end a request nor let it wait for ever."""
    allowed = {
        "moa_serve/api/generation.py": 1,  # `created` of an answer
        "moa_serve/shell/server.py": 1,  # `created` of a model
        "moa_serve/api/tls.py": 1,  # when a certificate ends
        "moa_serve/adapter/store.py": 1,  # how old a file is
        "moa_serve/api/folders.py": 1,  # likewise; two looks a second apart count as well
        "moa_serve/api/adapters.py": 1,  # when an adapter was last used
        "moa_serve/api/adapter_events.py": 1,  # when an event happened
        "moa_serve/metrics/vllm.py": 1,  # the value of vLLM's gauge of running adapters
    }
    layers = ("api", "engine", "metrics", "adapter", "shell/server.py")
    found: dict[str, int] = {}
    for layer in layers:
        place = REPOSITORY / "moa_serve" / layer
        for path in [place] if place.is_file() else place.rglob("*.py"):
            if count := len(re.findall(r"\btime\.time\(|datetime\.(now|utcnow|today)\(", path.read_text())):
                found[str(path.relative_to(REPOSITORY))] = count
    assert found == allowed
