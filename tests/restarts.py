"""Kill -9 at any instant, again and again: what was acknowledged is there after every restart, and nothing is there by half.

    python -m tests.restarts --times 20

A client changes the registry without pause; a server is killed under it and started anew. The client's ledger says what each name may be:
what was acknowledged, or, for the one change that was in flight, what was before or after it.
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

from servers import Running, running, write_adapters, write_talking_base

NAMES, PATHS = [f"name{number}" for number in range(8)], ["soft", "sparse_fn", "molora", "lora"]
READY_SECONDS = 10.0
Fact = tuple[str, str]  # adapter, alias or pin, and its name


@dataclass(slots=True)
class Report:
    restarts: int = 0
    changes: int = 0
    slowest_ready_seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


class Ledger:
    """What may be true of each name: one value, or two while a change is on its way."""

    def __init__(self) -> None:
        self.facts: dict[Fact, set[Any]] = {("adapter", name): {None} for name in NAMES} | {("alias", "all"): {None}}

    def one(self, fact: Fact) -> Any:
        (value,) = self.facts[fact]
        return value


class Changer(threading.Thread):
    """Changes the registry until the server is gone."""

    def __init__(self, url: str, ledger: Ledger, chance: random.Random) -> None:
        super().__init__()
        self._http, self._ledger, self._chance = httpx.Client(base_url=url, timeout=30), ledger, chance
        self.num_changes = 0
        self.problem: str | None = None

    def run(self) -> None:
        try:
            while True:
                self._change()
                self.num_changes += 1
        except httpx.TransportError:
            pass  # killed
        except Exception as error:
            self.problem = f"{type(error).__name__}: {error}"

    def _change(self) -> None:
        loaded = [name for name in NAMES if self._ledger.one(("adapter", name)) is not None]
        kind, name, path = self._chance.choice(["load", "load", "unload", "alias"]), self._chance.choice(NAMES), self._chance.choice(PATHS)
        if kind == "alias":
            targets = {target: self._chance.randint(1, 9) for target in loaded[:3]} or None
            fact: Fact = ("alias", "all")
            if targets is None and self._ledger.one(fact) is None:
                return
            answer = self._do(fact, targets, "PUT" if targets else "DELETE", "/v1/aliases/all", {"targets": targets} if targets else None)
        elif kind == "unload":
            if name not in loaded:
                return
            answer = self._do(("adapter", name), None, "DELETE", f"/v1/adapters/{name}", None)
        elif name in loaded:
            answer = self._do(("adapter", name), path, "POST", f"/v1/adapters/{name}/reload", {"path": f"sub/{path}"})
        else:
            answer = self._do(("adapter", name), path, "POST", "/v1/adapters", {"name": name, "path": f"sub/{path}"})
        if answer.status_code != 200:
            raise RuntimeError(f"{kind} of {name}: {answer.text}")

    def _do(self, fact: Fact, after: Any, method: str, url: str, body: Any) -> httpx.Response:
        self._ledger.facts[fact] = {_frozen(self._ledger.one(fact)), _frozen(after)}
        answer = self._http.request(method, url, json=body)
        if answer.status_code == 200:
            self._ledger.facts[fact] = {_frozen(after)}
        return answer


def _frozen(value: Any) -> Any:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


def check(server: Running, ledger: Ledger, folder: Path) -> Iterator[str]:
    """What is not as the ledger says; from here on the ledger says what is."""
    with httpx.Client(base_url=server.url, timeout=30) as http:
        items = {item["id"]: item for item in http.get("/v1/adapters").json()["data"]}
        aliases = {item["id"]: _frozen(item["targets"]) for item in http.get("/v1/aliases").json()["data"]}
        for name in NAMES:
            found = items.get(name)
            value = found["path"].removeprefix("sub/") if found else None
            yield from _settle(ledger, ("adapter", name), value)
            if found:
                answer = http.post("/v1/completions", json={"model": name, "prompt": "hi", "max_tokens": 2})
                if answer.status_code != 200 or answer.json()["moa"]["revision"] != found["revision"]:
                    yield f"{name} is listed, but answers {answer.status_code} {answer.text[:200]}"
        yield from _settle(ledger, ("alias", "all"), aliases.get("all"))
        if phantoms := set(items) - set(NAMES):
            yield f"nobody loaded {sorted(phantoms)}"
        if phantoms := set(aliases) - {"all"}:
            yield f"nobody made the aliases {sorted(phantoms)}"
    if leftovers := [entry.name for entry in (folder / "state").iterdir() if entry.name not in ("lock", "registry.json")]:
        yield f"left in the state directory: {leftovers}"


def _settle(ledger: Ledger, fact: Fact, value: Any) -> Iterator[str]:
    if value not in ledger.facts[fact]:
        yield f"{fact} is {value!r}, but may only be one of {ledger.facts[fact]!r}"
    ledger.facts[fact] = {value}


def kill_and_restart(folder: Path, times: int, seed: int) -> Report:
    """Over `folder/base` and `folder/adapters/sub`."""
    chance, ledger, report = random.Random(seed), Ledger(), Report()
    for turn in range(times + 1):
        started = time.monotonic()
        with running(folder, "--state-dir", str(folder / "state")) as server:
            if turn:
                report.restarts += 1
                report.slowest_ready_seconds = max(report.slowest_ready_seconds, time.monotonic() - started)
            report.problems += check(server, ledger, folder)
            if turn == times:
                break
            changer = Changer(server.url, ledger, chance)
            changer.start()
            time.sleep(chance.uniform(0.05, 1.5))
            server.stop(signal.SIGKILL)
            changer.join()
            report.changes += changer.num_changes
            if changer.problem:
                report.problems.append(changer.problem)
    if report.slowest_ready_seconds > READY_SECONDS:
        report.problems.append(f"a restart took {report.slowest_ready_seconds:.1f} s, more than {READY_SECONDS:g}")
    return report


def write_place(folder: Path) -> Path:
    write_talking_base(folder / "base")
    write_adapters(folder / "adapters" / "sub", *PATHS)
    return folder


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--times", type=int, default=20, help="kills")
    arguments.add_argument("--seed", type=int, default=random.randrange(2**31))
    options = arguments.parse_args()
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory() as place, console.status(f"killing a server {options.times} times, seed {options.seed}"):
        report = kill_and_restart(write_place(Path(place)), options.times, options.seed)
    for problem in report.problems:
        console.print(problem, style="red", markup=False)
    result = {"restarts": report.restarts, "changes": report.changes, "slowest_ready_seconds": round(report.slowest_ready_seconds, 2)}
    sys.stdout.write(json.dumps({**result, "problems": len(report.problems), "seed": options.seed}) + "\n")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
