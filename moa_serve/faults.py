"""Faults on purpose: what a test may do to a running server from outside, to see that it survives.

Off, which is always but in tests, a place where a fault can strike costs one look at `active`:

    if faults.active:
        faults.active.strike("forward", adapter=revisions)

`MOA_SERVE_FAULTS` names a JSON file, read again whenever it changes; a server that is not started with `--unsafe-test-hooks` refuses to run
with the variable set. A fault is an object:

    {"id": "f1", "at": "forward", "raise": "RuntimeError", "times": 3, "where": {"adapter": "3fa9..."}}

    id      names it in the log; a new id is a new fault, so it strikes `times` again
    at      step, forward, sample, logits, upload, read, write, memory, loop, clock: the places that call `strike`, `is_struck` or `value`
    raise   an exception: a builtin's name, or ENOSPC, EIO, EMFILE for an OSError with that number
    sleep   seconds for which the place hangs
    value   a number for the places that ask for one: share of memory in use; seconds by which the clock is wrong
    times   how often it strikes; 1 where omitted, null for as long as it stands in the file
    where   facts that must be so: {"adapter": prefix of a revision, "seed": of the request, "name": ...}

Imports nothing of the package. Places are in every thread; a lock keeps counts true.
"""

import builtins
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

VARIABLE = "MOA_SERVE_FAULTS"
Fact = str | int | None | Iterable[str | int | None]


class Faults:
    """The faults of one file."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._faults: list[dict[str, Any]] = []
        self._struck: dict[str, int] = {}

    def strike(self, at: str, **facts: Fact) -> None:
        """Hang, raise, or do nothing, as the file says."""
        for fault in self._due(at, facts):
            if "sleep" in fault:
                time.sleep(fault["sleep"])
            if "raise" in fault:
                raise _exception(fault["raise"], str(fault["id"]))

    def is_struck(self, at: str, **facts: Fact) -> bool:
        """For places that know themselves what to spoil."""
        return bool(self._due(at, facts))

    def value(self, at: str, otherwise: float, **facts: Fact) -> float:
        """The number that the last fault at this place gives."""
        values = [float(fault["value"]) for fault in self._due(at, facts)]
        return values[-1] if values else otherwise

    def _due(self, at: str, facts: dict[str, Fact]) -> list[dict[str, Any]]:
        with self._lock:
            self._read_if_changed()
            due = [fault for fault in self._faults if fault["at"] == at and self._is_left(fault) and _fits(fault.get("where", {}), facts)]
            for fault in due:
                self._struck[fault["id"]] = self._struck.get(fault["id"], 0) + 1
                if fault.get("times", 1) is not None:
                    logger.info("fault %s strikes at %s", fault["id"], at)
            return due

    def _is_left(self, fault: dict[str, Any]) -> bool:
        times = fault.get("times", 1)
        return times is None or self._struck.get(fault["id"], 0) < times

    def _read_if_changed(self) -> None:
        try:
            stat = self._file.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if seen == self._seen:
                return
            self._faults, self._seen = json.loads(self._file.read_text()), seen
        except FileNotFoundError:
            self._faults, self._seen = [], None
        except (OSError, ValueError):  # no descriptor is free, or half written: the next look sees the rest
            return
        _set_clock(sum(float(fault["value"]) for fault in self._faults if fault["at"] == "clock"))


def _fits(where: dict[str, str | int], facts: dict[str, Fact]) -> bool:
    """Whether each condition holds for one of the facts of its name; a text holds where it begins one."""
    for name, wanted in where.items():
        given = facts.get(name)
        values = [given] if given is None or isinstance(given, str | int) else list(given)
        if not any(value.startswith(wanted) if isinstance(value, str) and isinstance(wanted, str) else value == wanted for value in values):
            return False
    return True


def _exception(name: str, fault_id: str) -> BaseException:
    if name in errno.errorcode.values():
        number = int(getattr(errno, name))
        return OSError(number, os.strerror(number))
    kind = getattr(builtins, name)
    assert issubclass(kind, Exception), f"fault {fault_id} names {name}, which is no exception"
    return kind(f"fault {fault_id}")  # type: ignore[no-any-return]


_true_time = time.time


def _set_clock(seconds: float) -> None:
    """Let the wall clock, as this process reads it, be wrong by so much."""
    time.time = (lambda: _true_time() + seconds) if seconds else _true_time


active: Faults | None = None


def activate(file: Path) -> None:
    """Let the faults of this file strike, in this process, from now on."""
    global active
    active = Faults(file)
