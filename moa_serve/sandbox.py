"""Jinja templates in a sandbox, and a child process that renders those of strangers.

A template that came with the base is the operator's choice and runs in this process. One that came with an adapter is a tenant's: it may
loop without end or build a string of gigabytes, which no sandbox in the process can stop, so it runs in a child with limits, which is
killed when it takes too long. Imports nothing of the package, so that the file is also the child's script: JSON in, JSON out, line by line.
"""

import json
import os
import resource
import select
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 2.0  # for one rendering; real ones take a millisecond
MAX_CHARS = 2**22  # of what is rendered
MAX_LATE = 3  # times that a template may take too long before it is not tried again
_SPARE_BYTES = 2**28  # that the child may take beside what it begins with
_START_SECONDS = 20.0  # for the child to import jinja on a busy machine


class TemplateFailed(Exception):
    """A template cannot be used, or refuses what it was given; the message is fit for a user."""


def environment() -> ImmutableSandboxedEnvironment:
    """As transformers has it for chat templates."""
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    found.filters["tojson"] = _to_json
    found.globals["raise_exception"] = _raise_exception
    found.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return found


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's words for training; to serve it is nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """Jinja's own escapes for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


class SandboxProcess:
    """Renders templates of strangers, one after another, in a child that is started when it is first needed. Safe in any thread.

    Args:
        max_seconds: for one rendering; the child is killed then, and another one started for the next.
    """

    def __init__(self, max_seconds: float = MAX_SECONDS) -> None:
        self._max_seconds = max_seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._late: Counter[str] = Counter()

    def render(self, source: str, variables: dict[str, Any]) -> str:
        """
        Raises:
            TemplateFailed: it is no template, refuses, takes too long or too much, or did so too often before.
        """
        if self._late[source] >= MAX_LATE:
            raise TemplateFailed(f"it took more than {self._max_seconds:g} s {MAX_LATE} times and is not tried again")
        question = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        with self._lock:
            child = self._started()
            try:
                answer = json.loads(_exchange(child, question, time.monotonic() + self._max_seconds))
            except (OSError, ValueError) as error:
                self._end()
                if not isinstance(error, TimeoutError):
                    raise TemplateFailed("it took more memory than it may") from None
                self._late[source] += 1
                raise TemplateFailed(f"it took more than {self._max_seconds:g} s") from None
        if "error" in answer:
            raise TemplateFailed(str(answer["error"]))
        return str(answer["text"])

    def close(self) -> None:
        with self._lock:
            self._end()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            self._end()
            command = [sys.executable, "-E", "-s", str(Path(__file__).resolve())]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={})
            assert self._child.stdin is not None
            os.set_blocking(self._child.stdin.fileno(), False)
            try:
                _exchange(self._child, b"\n", time.monotonic() + _START_SECONDS)  # it answers when it is ready
            except OSError:
                self._end()
                raise TemplateFailed("the process that renders templates does not start") from None
        return self._child

    def _end(self) -> None:
        if self._child is not None:
            self._child.kill()
            self._child.wait()
            for pipe in (self._child.stdin, self._child.stdout):
                if pipe is not None:
                    pipe.close()
            self._child = None


def _exchange(child: subprocess.Popen[bytes], question: bytes, deadline: float) -> bytes:
    """Send a line, get one. Raises TimeoutError, or OSError where the child is gone."""
    assert child.stdin is not None
    assert child.stdout is not None
    into, out = child.stdin.fileno(), child.stdout.fileno()
    answer = bytearray()
    while not answer.endswith(b"\n"):
        readable, writable, _ = select.select([out], [into] if question else [], [], max(0.0, deadline - time.monotonic()))
        if not readable and not writable:
            raise TimeoutError
        if writable:
            question = question[os.write(into, question[:65536]) :]
        if readable:
            piece = os.read(out, 65536)
            if not piece:
                raise BrokenPipeError
            answer += piece
            if len(answer) > 8 * MAX_CHARS:
                raise BrokenPipeError
    return bytes(answer)


def _limit_self() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    memory = pages * resource.getpagesize() + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def _answer(question: dict[str, Any]) -> dict[str, str]:
    try:
        text = environment().from_string(question["source"]).render(**question["variables"])
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        return {"error": str(error)[:500]}
    except MemoryError:
        return {"error": "it took more memory than it may"}
    return {"text": text} if len(text) <= MAX_CHARS else {"error": f"what it renders has more than {MAX_CHARS} characters"}


def _main() -> None:
    for source in ("{{ x | tojson }}", "{{ x.y.z }}", "{% if %}"):  # what it imports late, it imports now
        _answer({"source": source, "variables": {"x": 1}})
    _limit_self()
    for line in sys.stdin.buffer:
        answer = _answer(json.loads(line)) if line.strip() else {}
        sys.stdout.buffer.write(json.dumps(answer).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _main()
