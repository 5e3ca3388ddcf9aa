"""Requests by the thousand against the real process: each gets an answer that the document tells of, in time, in the one shape of errors.

    python -m tests.fuzz_http --requests 50000

schemathesis makes them from the server's own OpenAPI document, good ones and bad ones, for every operation and from every kind of client:
with a user's key, the admin's, a wrong one, none. Others are damaged byte by byte, in head and body, on bare sockets. A few are sent in
every test run (tests/e2e/test_fuzz.py). Exit code 1 where anything was wrong; the last line is a JSON object.
"""

import argparse
import contextlib
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

from hostile import ADMIN, GOOD, USER, Answer, bearer, head, request_bytes
from servers import Running, running, write_adapters, write_talking_base

from moa_serve.api.guard import ADMIN as ADMIN_PATHS
from moa_serve.api.guard import PUBLIC

CONTEXT = 48  # a chat generates up to here where it does not say how much
HANG_SECONDS = 30.0
CHECKS: list[Any] = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
EVENTS = "GET /v1/adapters/events"
KEYS: dict[str, str | None] = {"user": USER, "admin": ADMIN, "wrong": "wrong-key", "none": None}
# Of bodies that are made up, hardly one has nothing that this base refuses: now and then a good one is sent.
PLAIN: dict[str, dict[str, Any]] = {
    "POST /v1/completions": {"model": "soft", "prompt": "hi", "max_tokens": 2, "moa": {"return_routing": True}},
    "POST /v1/chat/completions": {
        "model": "soft",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 2,
        "moa": {"return_routing": True},
    },
    "POST /v1/moa/route": {"models": ["soft", "sparse_fn"], "prompt": "hi", "detail": "tokens"},
    "POST /tokenize": {"prompt": "hi"},
    "POST /detokenize": {"tokens": [5, 6]},
}
PLAIN_EACH = 5
READS = ("GET", "HEAD", "OPTIONS")


@dataclass
class Score:
    """G4 of docs/reliability.md."""

    statuses: Counter[int] = field(default_factory=Counter)
    by_operation: dict[str, Counter[int]] = field(default_factory=dict)
    by_client: Counter[str] = field(default_factory=Counter)
    closed: int = 0  # what is no HTTP may be hung up on
    slowest: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.statuses.values()) + self.closed

    def summary(self) -> dict[str, Any]:
        return {
            "requests": self.total, "server_errors": sum(count for status, count in self.statuses.items() if status >= 500),
            "closed_without_an_answer": self.closed, "operations": len(self.by_operation), "clients": dict(self.by_client),
            "slowest_seconds": round(self.slowest, 3), "statuses": {str(status): self.statuses[status] for status in sorted(self.statuses)},
        }  # fmt: skip


class Fuzzer:
    """A server to send to, and what came back. Everything raises AssertionError where an answer is not as it must be."""

    def __init__(self, server: Running) -> None:
        self.server, self.score = server, Score()
        self.session = requests.Session()
        document = httpx.get(f"{server.url}/openapi.json", headers=bearer(USER)).json()
        schema = schemathesis.openapi.from_dict(document)
        self.operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
        host, _, port = server.url.removeprefix("http://").rpartition(":")
        self.address = host, int(port)

    # -- what schemathesis makes

    def fuzz(self, operation: Any, mode: GenerationMode, examples: int, *, is_new: bool) -> None:
        @settings(max_examples=examples, derandomize=not is_new, database=None, deadline=None, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode), st.sampled_from([*KEYS, "user", "admin"]))
        def send_each(case: Any, client: str) -> None:
            self.send(operation.label, case, client)

        send_each()

    def send(self, label: str, case: Any, client: str) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            case.body["model"] = "soft"  # else hardly any request would come further than to its name
        if isinstance(case.body, dict) and case.body.get("models") and isinstance(case.body["models"], list):
            case.body["models"][:2] = ["soft", "sparse_fn"][: len(case.body["models"])]
        if label in PLAIN and not sum(self.score.by_operation.get(label, Counter()).values()) % PLAIN_EACH:
            case.body = dict(PLAIN[label])
        if label.endswith(("/reload", "/pin", "/unpin")):
            case.path_parameters["name"] = "soft"
        key = KEYS[client]
        case.headers = {**dict(case.headers or {}), **(bearer(key) if key else {})}
        if label == EVENTS:
            self.listen(case, client)
            return
        started = time.monotonic()
        response = case.call(base_url=self.server.url, timeout=HANG_SECONDS, session=self.session)
        self.score.slowest = max(self.score.slowest, time.monotonic() - started)
        self.score.by_client[client] += 1
        self.score.by_operation.setdefault(label, Counter())[response.status_code] += 1
        answer = Answer(response.status_code, {name.lower(): values[0] for name, values in response.headers.items()}, response.content)
        self.judge(answer)
        case.validate_response(response, checks=CHECKS)
        expected = refusal(case.method.upper(), case.operation.path, client)
        assert answer.status == expected or expected is None, (client, label, answer.status)

    def listen(self, case: Any, client: str) -> None:
        """A stream that ends with its client: only its beginning is asked for."""
        with httpx.stream("GET", self.server.url + case.operation.path, headers=dict(case.headers), timeout=HANG_SECONDS) as response:
            body = b"" if response.status_code == 200 else response.read()
            if response.status_code == 200:
                assert next(response.iter_lines()) == ": listening"
            self.judge(Answer(response.status_code, dict(response.headers), body))
        self.score.by_client[client] += 1
        self.score.by_operation.setdefault(EVENTS, Counter())[response.status_code] += 1
        expected = refusal("GET", case.operation.path, client)
        assert response.status_code == (200 if expected is None else expected)

    def judge(self, answer: Answer) -> None:
        self.score.statuses[answer.status] += 1
        assert answer.status < 500, answer.body[:500]
        if answer.status >= 400:
            answer.error()
        elif answer.headers.get("content-type") == "application/json":
            assert "detail" not in json.loads(answer.body)

    # -- what no client library would send

    def wire(self, rng: random.Random) -> None:
        """One damaged request on a connection of its own; an answer, or the connection closed, before long."""
        raw = damaged(rng)
        started = time.monotonic()
        with socket.create_connection(self.address, timeout=HANG_SECONDS) as connection:
            said = b""
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
                while data := connection.recv(65536):
                    said += data
        self.score.slowest = max(self.score.slowest, time.monotonic() - started)
        while said.startswith(b"HTTP/1.1 100 "):  # it was asked whether the body may come
            said = said.partition(b"\r\n\r\n")[2]
        if not said:
            self.score.closed += 1
            return
        if b"\r\ncontent-type: text/event-stream" in said.partition(b"\r\n\r\n")[0].lower():
            self.score.statuses[200] += 1
            return
        first = Answer.read(said)
        if raw.lstrip(b"\r\n").startswith(b"HEAD "):
            self.score.statuses[first.status] += 1
            return
        length = int(first.headers.get("content-length", len(first.body)))
        self.judge(Answer(first.status, first.headers, first.body[:length]))


def refusal(method: str, path: str, client: str) -> int | None:
    """The status that a client must get whatever it asks; None where that depends."""
    if path in PUBLIC and method in READS:
        return None
    if client in ("none", "wrong"):
        return 401
    return 403 if client == "user" and method not in READS and path.startswith(ADMIN_PATHS) else None


_CHAT = {"model": "soft", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
_COMPLETION = {**GOOD, "model": "soft", "max_tokens": 2}
_SEEDS = [
    request_bytes("/v1/completions", json.dumps(_COMPLETION).encode()),
    request_bytes("/v1/completions", json.dumps({**_COMPLETION, "stream": True, "n": 2}).encode()),
    request_bytes("/v1/chat/completions", json.dumps(_CHAT).encode()),
    request_bytes("/tokenize", json.dumps({"prompt": "hello"}).encode()),
    request_bytes("/v1/load_lora_adapter", json.dumps({"lora_name": "x", "lora_path": "soft"}).encode()),
    head("GET", "/v1/models/soft"),
    head("HEAD", "/metrics"),
    head("POST", "/v1/completions", "Transfer-Encoding: chunked") + b"5\r\n{\"a\":\r\n2\r\n1}\r\n0\r\n\r\n",
]  # fmt: skip
_PIECES = [
    b"\r\n", b"\n", b"\x00", b" ", b"\t", b":", b"/", b"//", b"..", b"%2e", b"%00", b"%", b"?", b"#", b"HTTP/1.0", b"HTTP/9.9",
    b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n", b"Host: evil.example\r\n", b"Content-Encoding: gzip\r\n", b"A" * 9000,
    b"\xff\xfe", "\u202e".encode(), b'"', b"{", b"[" * 500, b"9" * 400, b"null", b"1e999", b"NaN", b"\\ud800",
]  # fmt: skip


def damaged(rng: random.Random) -> bytes:
    """A request with one to four edits, half of them in its body only, so that it is still read as one."""
    raw = rng.choice(_SEEDS)
    first, _, body = raw.partition(b"\r\n\r\n")
    is_body = bool(body) and rng.random() < 0.5
    part = bytearray(body if is_body else raw)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(part) + 1)
        part[place : place + rng.choice((0, 0, 1, 2, 8))] = rng.choice((rng.randbytes(rng.randint(0, 4)), rng.choice(_PIECES)))
    if not is_body:
        return bytes(part)
    lines = [line for line in first.split(b"\r\n") if not line.lower().startswith(b"content-length")]
    if any(line.lower().startswith(b"transfer-encoding") for line in lines):
        return first + b"\r\n\r\n" + bytes(part)
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(part), b"Connection: close"]) + b"\r\n\r\n" + bytes(part)


@contextlib.contextmanager
def fuzzing(folder: Path) -> Iterator[Fuzzer]:
    write_talking_base(folder / "base")
    write_adapters(folder / "adapters", "soft", "sparse_fn")
    flags = ("--max-model-len", str(CONTEXT), "--api-key", USER, "--admin-key", ADMIN)
    with running(folder, *flags) as server:
        yield Fuzzer(server)


def modes(operation: Any) -> list[GenerationMode]:
    """Where nothing is sent, nothing is wrong."""
    return list(GenerationMode) if operation.body else [GenerationMode.POSITIVE]


def assert_well(fuzzer: Fuzzer) -> None:
    body = {"model": "soft", "prompt": "x", "max_tokens": 1}
    assert httpx.post(f"{fuzzer.server.url}/v1/completions", json=body, headers=bearer(USER)).status_code == 200
    assert fuzzer.server.process.poll() is None
    assert "Traceback" not in fuzzer.server.log_file.read_text()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--seed", type=int, default=None, help="Of the damaged bytes; a new one if omitted.")
    arguments = parser.parse_args()
    rng = random.Random(seed := arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**32))
    wrong: str | None = None
    with tempfile.TemporaryDirectory() as folder, fuzzing(Path(folder)) as fuzzer:
        rounds = [
            (operation, mode) for operation in fuzzer.operations for mode in modes(operation) for _ in range(4 if operation.body else 1)
        ]
        try:
            while fuzzer.score.total < arguments.requests:
                for operation, mode in rounds:
                    fuzzer.fuzz(operation, mode, 50, is_new=True)
                    for _ in range(100):
                        fuzzer.wire(rng)
                    sys.stderr.write(f"\r{fuzzer.score.total:,} requests")
                    if fuzzer.score.total >= arguments.requests:
                        break
            assert_well(fuzzer)
        except Exception as error:  # of whatever kind: it is the finding
            sys.excepthook(type(error), error, error.__traceback__)
            wrong = f"{type(error).__name__}: {str(error)[:2000]}"
            sys.stderr.write(fuzzer.server.log_file.read_text()[-3000:])
    sys.stdout.write(json.dumps({"ok": wrong is None, "wrong": wrong, "seed": seed, **fuzzer.score.summary()}) + os.linesep)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
