"""What the tests of bad input need beside a server: raw sockets, a judge of error bodies, and a good request that must never change."""

import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families
from servers import Running, running_command

USER, ADMIN = "user-key-1", "admin-key-1"
WAIT_SECONDS = 10.0  # a limit for what takes milliseconds, on a machine that does other things too
GOOD: dict[str, Any] = {"model": "good", "prompt": "hello", "max_tokens": 8, "temperature": 0, "logprobs": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, read by httpx or from a socket."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def of(cls, response: httpx.Response) -> "Answer":
        return cls(response.status_code, {name.lower(): value for name, value in response.headers.items()}, response.content)

    @classmethod
    def read(cls, raw: bytes) -> "Answer":
        head, _, body = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return cls(int(first.split()[1]), headers, body)

    def error(self) -> dict[str, Any]:
        """The error that it is: nothing else in the body, four fields, a string code, and nothing of the machine it runs on."""
        assert self.headers["content-type"] == "application/json"
        content = json.loads(self.body)
        assert set(content) == {"error"}, content
        error: dict[str, Any] = content["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert isinstance(error["message"], str)
        assert isinstance(error["code"], str)
        assert isinstance(error["type"], str)
        assert error["param"] is None or isinstance(error["param"], str)
        assert error["message"]
        for secret in ("Traceback", "object at 0x", "/tmp/", '.py", line', USER, ADMIN, str(Path.cwd())):
            assert secret not in error["message"]
        if self.status in (429, 503):
            assert int(self.headers["retry-after"]) >= 1
        return error

    def assert_error(self, status: int, code: str, param: str | None) -> dict[str, Any]:
        error = self.error()
        assert (self.status, error["code"], error["param"]) == (status, code, param), error
        return error


@dataclass(eq=False)
class Target:
    """A server under attack, its folder, and what it says as long as it is well."""

    running: Running
    folder: Path
    client: httpx.Client = field(default_factory=lambda: httpx.Client(verify=False, timeout=30, limits=httpx.Limits(max_connections=64)))

    @property
    def adapters(self) -> Path:
        return self.folder / "adapters"

    @cached_property
    def address(self) -> tuple[str, int]:
        host, _, port = self.running.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    @cached_property
    def process(self) -> psutil.Process:
        return psutil.Process(self.running.process.pid)

    @cached_property
    def expected(self) -> list[Any]:
        return self.ask_good()

    # -- asking

    def send(self, method: str, path: str, *, key: str = USER, headers: Any = None, **more: Any) -> Answer:
        """On a connection of its own: an old one may be closed by the server just now, as it should."""
        given = httpx.Headers({**bearer(key), "Connection": "close"} if key else {"Connection": "close"})
        for name, value in headers.items() if isinstance(headers, dict) else headers or ():
            given[name] = value
        return Answer.of(self.client.request(method, self.running.url + path, headers=given, **more))

    def post(self, path: str, *, key: str = USER, **body: Any) -> Answer:
        return self.send("POST", path, key=key, json=body)

    def complete(self, **body: Any) -> Answer:
        return self.post("/v1/completions", **{"prompt": "x", "max_tokens": 1, **body})

    def load(self, name: Any, path: Any, **more: Any) -> Answer:
        return self.post("/v1/load_lora_adapter", key=ADMIN, lora_name=name, lora_path=path, **more)

    def unload(self, name: str) -> Answer:
        return self.post("/v1/unload_lora_adapter", key=ADMIN, lora_name=name)

    def ask_good(self) -> list[Any]:
        """What a good request is answered, but for times and names. Beside other rows the last digits of its scores may differ."""
        answer = self.complete(**GOOD)
        assert answer.status == 200, answer.body
        content = json.loads(answer.body)
        return [content["choices"], content["usage"], content["system_fingerprint"]]

    def assert_well_beside_others(self) -> None:
        for answer, expected in zip(self.ask_good()[0], self.expected[0], strict=True):
            assert answer["text"] == expected["text"]
            assert answer["logprobs"]["tokens"] == expected["logprobs"]["tokens"]

    def assert_well(self) -> None:
        assert self.running.process.poll() is None, self.running.log_file.read_text()
        assert self.ask_good() == self.expected
        assert self.send("GET", "/health/live", key="").status == 200

    # -- what it says of itself

    def models(self) -> set[str]:
        return {item["id"] for item in json.loads(self.send("GET", "/v1/models").body)["data"]}

    def adapter(self, name: str) -> dict[str, Any] | None:
        listed = json.loads(self.send("GET", "/v1/adapters").body)["data"]
        return next((item for item in listed if item["id"] == name), None)

    def metrics(self) -> dict[str, float]:
        """Sum of each series by name; requests by how they ended as `moa_requests_total/abort`."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self.send("GET", "/metrics").body.decode()):
            for sample in family.samples:
                reason = sample.labels.get("finish_reason")
                for name in {sample.name, f"{sample.name}/{reason}" if reason else sample.name}:
                    sums[name] = sums.get(name, 0) + sample.value
        return sums

    def is_idle(self) -> bool:
        """No row, no page, no lease is held."""
        metrics = self.metrics()
        busy = [metrics[f"vllm:{name}"] for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")]
        listed = json.loads(self.send("GET", "/v1/adapters").body)["data"]
        return not any(busy) and not any(item["leases"] for item in listed)

    # -- raw sockets

    def connect(self, *, is_narrow: bool = False) -> socket.socket:
        """`is_narrow`: kilobytes fit into the connection, where on a loopback megabytes would, before its sender has to wait."""
        connection = socket.socket()
        connection.settimeout(WAIT_SECONDS)
        if is_narrow:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        connection.connect(self.address)
        return connection

    def talk(self, pieces: Iterable[bytes]) -> bytes:
        """All that the server says until it closes. It may stop reading before everything is sent."""
        with self.connect() as connection:
            try:
                for piece in pieces:
                    connection.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                pass
            said = b""
            try:
                while data := connection.recv(65536):
                    said += data
            except ConnectionResetError:
                pass
            return said

    def begin(self, path: str = "/v1/completions", *, is_narrow: bool = False, **body: Any) -> socket.socket:
        """A request that is sent and not read."""
        connection = self.connect(is_narrow=is_narrow)
        connection.sendall(request_bytes(path, json.dumps({"prompt": "x", **body}).encode()))
        return connection


def request_bytes(path: str, body: bytes, *, length: int | None = None) -> bytes:
    return head("POST", path, f"Content-Length: {len(body) if length is None else length}") + body


def head(method: str, path: str, *lines: str) -> bytes:
    fixed = ("Host: localhost", f"Authorization: Bearer {USER}", "Content-Type: application/json")
    return "\r\n".join((f"{method} {path} HTTP/1.1", *fixed, *lines, "", "")).encode("latin-1")


def wait_until(is_so: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.02)


@contextmanager
def under_attack(folder: Path, *flags: str) -> Iterator[Target]:
    """A server with keys, without root's power to read what it may not; `folder` has base and adapters, one of them `good`."""
    command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", "0", "--device", "cpu"]
    command += ["--adapters-dir", str(folder / "adapters"), "--api-key", USER, "--admin-key", ADMIN]
    if os.geteuid() == 0 and shutil.which("setpriv"):
        command = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search", *command]
    with running_command([*command, *flags], folder) as started:
        target = Target(started, folder)
        with target.client:
            assert target.expected
            yield target
