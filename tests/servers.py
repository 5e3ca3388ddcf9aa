"""A real server process for tests: started on a free port, waited for, and always ended."""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from families import TINY, write_base, write_family, write_tokenizer

READY_SECONDS = 60
TALKING: dict[str, Any] = TINY | {"vocab_size": 259, "eos_token_id": 2}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@dataclass(slots=True)
class Running:
    """A server: its address, process and log."""

    url: str
    process: subprocess.Popen[bytes]
    log_file: Path

    def log(self) -> list[dict[str, Any]]:
        """Its lines so far; the last one may be half written."""
        return [json.loads(line) for line in self.log_file.read_text().splitlines() if line.startswith("{") and line.endswith("}")]

    def stop(self, number: int = signal.SIGTERM, seconds: float = 40) -> int:
        self.process.send_signal(number)
        return self.process.wait(seconds)


def write_talking_base(folder: Path) -> Path:
    """A tiny base with a byte-level tokenizer and a chat template."""
    write_base(folder, TALKING)
    write_tokenizer(folder)
    config = {"chat_template": TEMPLATE, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_adapters(folder: Path, *families: str) -> Path:
    """One random adapter of each family for that base, named after it."""
    for seed, family in enumerate(families, start=1):
        write_family(folder / family, family, seed, TALKING)
    return folder


@contextmanager
def running(
    folder: Path, *flags: str, env: Mapping[str, str] | None = None, under: Sequence[str] = (), trusts: Path | None = None
) -> Iterator[Running]:
    """A server over `folder/base` and `folder/adapters`; ready inside the block, ended behind it. `under`: a command that runs it."""
    command = [*under, sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", "0"]
    command += ["--adapters-dir", str(folder / "adapters"), "--device", "cpu", "--kv-cache-bytes", str(2**22), *flags]
    with running_command(command, folder, env=env, trusts=trusts) as server:
        yield server


@contextmanager
def running_command(
    command: list[str], folder: Path, *, env: Mapping[str, str] | None = None, trusts: Path | None = None
) -> Iterator[Running]:
    """The server that `command` starts in `folder`; `trusts` is its own certificate, where it has one."""
    log_file = folder / "server.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    server = Running("", process, log_file)
    try:
        server.url = _wait(server, ssl.create_default_context(cafile=trusts) if trusts else True)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


def _wait(server: Running, verify: ssl.SSLContext | bool) -> str:
    """The address, once it is ready."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        starting = [line for line in server.log() if line.get("event") == "starting"]
        if starting:
            url = str(starting[0]["url"])
            try:
                if httpx.get(f"{url}/health/ready", verify=verify).status_code == 200:
                    return url
            except httpx.TransportError:
                pass
        time.sleep(0.02)
    raise AssertionError(f"the server did not get ready:\n{server.log_file.read_text()}")
