"""A soak of the real server: `python -m tests.soak` sends mixed traffic for some minutes, then makes the server account for all of it.

    python -m tests.soak                            ten minutes: a tiny server, a fault every two seconds, the goals of docs/reliability.md
    python -m tests.soak --full                     25 minutes: and what needs thousands of bad files and requests, overload, attackers
    python -m tests.soak --seconds 60               in small, which judges what must be right and not how much there was of it
    python -m tests.soak --minutes 10 --streams 32 --model FOLDER --out soak.json     plain traffic on a base of your own

Starts a server of its own, ends it, and leaves its log only where something was wrong. Exit code 0 only if every request is accounted for,
every number of the server agrees with the client's, greedy answers never changed, nothing is held at the end, and memory is flat (which
a run of less than four minutes only shows); with faults, if every goal was met.
The last line of standard output is the result as JSON; everything for people goes to standard error.
"""

import argparse
import asyncio
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))  # as pytest has it, so that modules here have one name

import storm as storms
import storm_faults
import storm_full
from agreement import Check, Scrape, memory_is_flat, reconcile, reconcile_log
from storm import Goal, Storm, Windows
from traffic import MAX_NEW_TOKENS, OVERLOADED, TEXT, WORDS, Client, Ledger, Mix, Outcome, bad_jobs, canary, last_leaver

READY_SECONDS, REST_SECONDS, STOP_SECONDS = 120.0, 15.0, 60.0
SAMPLE_SECONDS = 5.0
LINE_SECONDS = 30.0
MAX_WORDS = 120
TEMPLATE_TOKENS = 64  # that a chat template may put around a prompt
LOG = "server.log"
PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Sample:
    """The server at one moment, by its own word, and what the client had done by then."""

    seconds: float
    rss_bytes: float
    running: float
    waiting: float
    kv_usage: float
    requests: int
    generated_tokens: int
    errors: int


@dataclass(slots=True)
class Result:
    """A run: what was asked, what came of it, and whether the server agrees."""

    models: list[str]
    ledger: Ledger
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    @property
    def is_ok(self) -> bool:
        return all(check.is_met for check in self.checks)


async def soak(
    url: str,
    *,
    seconds: float,
    streams: int,
    seed: int,
    sample_seconds: float = SAMPLE_SECONDS,
    on_sample: Callable[[Sample], None] = lambda sample: None,
) -> Result:
    """Send traffic for some time, then reconcile. Nobody else may use the server meanwhile.

    Raises:
        httpx.HTTPError: the server is gone, or does not answer what it must be asked before and after.
    """
    ledger = Ledger()
    async with Client(url, ledger, f"soak-{seed}") as client:
        before = Scrape(await client.get("/metrics"))
        listed = json.loads(await client.get("/v1/models"))["data"]
        listed.sort(key=lambda model: model["parent"] is not None)  # the base first
        result = Result([model["id"] for model in listed], ledger)
        mixes = await _mixes(client, result.models, listed[0]["max_model_len"], streams, seed)
        canaries = Canaries(client, result.models)
        await canaries.sing_all()
        for job in bad_jobs(result.models[0], None):
            await client.send(job)
        start = time.monotonic()
        deadline = start + seconds
        pause = min(10.0, seconds / (4 * len(result.models)))
        try:
            async with asyncio.TaskGroup() as tasks:
                for mix in mixes:
                    tasks.create_task(_work(client, mix, deadline))
                tasks.create_task(_every(pause, deadline, canaries.sing_next))
                tasks.create_task(_every(sample_seconds, deadline, lambda: _sample(client, result, start, on_sample)))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        result.seconds = time.monotonic() - start
        await canaries.sing_all()
        await client.send(last_leaver(result.models[0]))
        after = await _at_rest(client)
        result.checks += reconcile(ledger, before, after, result.models)
        result.checks += [canaries.check(), memory_is_flat([sample.rss_bytes for sample in result.samples], seconds)]
    return result


async def _mixes(client: Client, models: Sequence[str], max_model_len: int, streams: int, seed: int) -> list[Mix]:
    """One for each worker, with prompts that fit the served context."""
    num_tokens = await client.count_tokens(prompt=TEXT)
    if num_tokens is None:
        raise SystemExit("error: the base has no tokenizer, so there is nothing to ask it in words")
    room = max_model_len - MAX_NEW_TOKENS - TEMPLATE_TOKENS
    max_words = max(1, min(MAX_WORDS, int(room * len(WORDS) / num_tokens / 1.5)))  # 1.5: some draws have longer words
    has_chat = await client.count_tokens(messages=[{"role": "user", "content": "hello"}]) is not None
    return [Mix(models, seed * 100_003 + worker, max_words=max_words, has_chat=has_chat) for worker in range(streams)]


async def _work(client: Client, mix: Mix, deadline: float) -> None:
    """One user after the other, until the deadline; the last one is waited for."""
    while time.monotonic() < deadline:
        entry = await client.send(mix.draw())
        if entry.status in OVERLOADED or entry.outcome is Outcome.ERROR:
            await asyncio.sleep(1)  # as Retry-After says; and a server that is gone must not fill the ledger


async def _every(pause_seconds: float, deadline: float, call: Callable[[], Awaitable[None]]) -> None:
    due = time.monotonic()
    while due < deadline:
        await call()
        due = max(due + pause_seconds, time.monotonic())
        await asyncio.sleep(min(due, deadline) - time.monotonic())


async def _sample(client: Client, result: Result, start: float, on_sample: Callable[[Sample], None]) -> None:
    try:
        page = Scrape(await client.get("/metrics"))
    except httpx.ConnectError:
        raise  # nobody listens any more: that ends the run
    except (httpx.HTTPError, ValueError) as error:
        result.checks.append(Check("/metrics can be read under load", False, f"{type(error).__name__}: {error}"))
        return
    running, waiting, kv_usage = (page.total(name) for name in ("moa_requests_running", "moa_requests_waiting", "moa_kv_usage_ratio"))
    rss_bytes, ledger = page.total("process_resident_memory_bytes"), result.ledger
    num_begun, num_tokens, num_errors = len(ledger.entries), ledger.generated_tokens, ledger.outcomes[Outcome.ERROR]
    seconds = time.monotonic() - start
    result.samples.append(Sample(seconds, rss_bytes, running, waiting, kv_usage, num_begun, num_tokens, num_errors))
    on_sample(result.samples[-1])


async def _at_rest(client: Client) -> Scrape:
    """The first scrape in which nothing is held, or the last one that there was time for."""
    deadline = time.monotonic() + REST_SECONDS
    while not (page := Scrape(await client.get("/metrics"))).is_at_rest and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    page = Scrape(await client.get("/metrics"))  # a record is made just after its row has gone
    client.ledger.statuses[200] -= 1  # a page does not count its own response
    return page


class Canaries:
    """A greedy answer of each model, which neither load nor time may change."""

    def __init__(self, client: Client, models: Sequence[str]) -> None:
        self._client, self._models = client, models
        self._texts: dict[str, str] = {}
        self._changes: list[str] = []
        self._num_sung = 0

    async def sing_all(self) -> None:
        for model in self._models:
            await self._sing(model)

    async def sing_next(self) -> None:
        await self._sing(self._models[self._num_sung % len(self._models)])

    async def _sing(self, model: str) -> None:
        self._num_sung += 1
        entry = await self._client.send(canary(model, None if model == self._models[0] else model))
        if entry.outcome is Outcome.OK and self._texts.setdefault(model, entry.text) != entry.text:
            self._changes.append(f"{entry.request_id}, {model}: {self._texts[model]!r} became {entry.text!r}")

    def check(self) -> Check:
        is_met = not self._changes and len(self._texts) == len(self._models)
        detail = "; ".join([f"{self._num_sung} answers of {len(self._texts)} models", *self._changes[:3]])
        return Check("greedy answers never change", is_met, detail)


# -- the server


@dataclass(slots=True)
class OwnServer:
    """The process that is soaked."""

    process: subprocess.Popen[bytes]
    log_file: Path

    def lines(self) -> list[dict[str, Any]]:
        whole, _, _ = self.log_file.read_text().rpartition("\n")  # the last line may still be written
        return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]

    def start_line(self) -> dict[str, Any]:
        """What it says of itself once it listens; empty before."""
        return next((line for line in self.lines() if line.get("event") == "starting"), {})

    async def url(self) -> str:
        """Its address, once it is ready. Raises SystemExit."""
        deadline = time.monotonic() + READY_SECONDS
        async with httpx.AsyncClient(trust_env=False) as http:
            while time.monotonic() < deadline and self.process.poll() is None:
                if url := self.start_line().get("url"):
                    with contextlib.suppress(httpx.TransportError):
                        if (await http.get(f"{url}/health/ready")).is_success:
                            return str(url)
                await asyncio.sleep(0.1)
        raise SystemExit(f"error: the server did not get ready; its log ends with:\n{self.log_file.read_text()[-2000:]}")

    def stop(self) -> Check:
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        code = self.process.poll()
        return Check("the server ends with 0 when told to", code == 0, "it did not end" if code is None else f"exit code {code}")


@contextmanager
def own_server(log_file: Path, flags: Sequence[str], env: Mapping[str, str] | None = None) -> Iterator[OwnServer]:
    """A server on a free port. Whatever happens, it does not outlive the block."""
    command = [sys.executable, "-m", "moa_serve", "serve", "--port", "0", *flags]
    with log_file.open("wb") as log:
        # A session of its own: Ctrl-C is for the soak, which then ends the server.
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, env={**os.environ, **(env or {})})
    try:
        yield OwnServer(process, log_file)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


# -- under faults

STORM_SECONDS, INTERVAL_SECONDS = 465.0, 1.5  # with restarts and what abuse leaves, ten minutes in all
JUDGED_STORM_SECONDS = 420.0  # of a run that is judged by how much it did, too
_QUIET = {"OMP_NUM_THREADS": "1"}  # the client has the other core


@dataclass(slots=True)
class Weathered:
    """What a run under faults has shown."""

    goals: list[Goal]
    checks: list[Check]
    storm: Storm
    seconds: float

    @property
    def is_ok(self) -> bool:
        return all(check.is_met for check in self.checks) and all(goal.is_met is not False for goal in self.goals)


async def weather(
    folder: Path, *, seconds: float, seed: int, full: bool = False, say: Callable[[str], None] = lambda text: None
) -> Weathered:
    """The whole run: golden answers, the storm, the phases that count something, quiet, and restarts.

    Args:
        seconds: of all but the restarts and what `full` adds.
    """
    is_long = seconds >= JUDGED_STORM_SECONDS
    share = min(1.0, seconds / STORM_SECONDS)
    models = storms.write_world(folder)
    prompts = storms.prompts_of(random.Random(seed))
    faults_file = folder / "faults.json"
    env = {**_QUIET, "MOA_SERVE_FAULTS": str(faults_file), "MOA_CACHE_DIR": str(folder / "cache")}
    flags = [*storms.server_flags(folder), "--device", "cpu"]

    @asynccontextmanager
    async def start(*, more: Sequence[str] = ()) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
        with own_server(folder / "restarts.log", [*flags, *more], env) as server:
            yield await server.url(), server.process

    started = time.monotonic()
    with own_server(folder / LOG, flags, env) as server:
        url = await server.url()
        ledger, side, windows = Ledger(), Ledger(), Windows()
        async with (
            Client(url, ledger, "storm", windows.is_planned) as client,
            Client(url, side, "side", lambda entry, code: True) as other,
            httpx.AsyncClient(
                base_url=url, timeout=60, trust_env=False, verify=False, limits=httpx.Limits(max_keepalive_connections=0)
            ) as http,
        ):
            rng, process = random.Random(seed), psutil.Process(server.process.pid)
            storm = Storm(url, folder, faults_file, process, client, http, other, rng, windows, server.start_line()["backend"])
            before = await storm.page()
            await storms.make_golden(storm, models, prompts)
            stop, is_quiet = asyncio.Event(), threading.Event()
            prober = asyncio.create_task(asyncio.to_thread(storms.probe_health, storm, is_quiet))
            kinds = {**storm_faults.KINDS, **await asyncio.to_thread(storm_faults.bad_kinds, folder)}
            storm.skipped = storm_faults.not_built()
            say(f"{storm.backend}: {len(models)} models, {len(kinds)} kinds of faults; skipped: {storm.skipped or 'none'}")
            async with asyncio.TaskGroup() as tasks:
                for number in range(storms.NUM_WORKERS):
                    tasks.create_task(storms.work(storm, models, prompts, seed * 1009 + number, stop))
                tasks.create_task(storms.reload_all_the_time(storm, stop))
                tasks.create_task(storms.sample_memory(storm, stop))
                try:
                    deadline = started + seconds - share * 60
                    await storms.inject_all(storm, kinds, deadline, INTERVAL_SECONDS if is_long else 0.3)
                    with _survives(storm, "an engine that is broken"):
                        await storm_faults.rebuild(storm)
                    say(f"{storm.survived.total()} faults survived, {len(storm.failed)} not")
                    for phase, run in (
                        ("poison", storms.poison_phase(storm, max(100, round(share * 1100)))),
                        ("disconnect", storms.disconnect_phase(storm, round(share * 1000))),
                    ):
                        storm.phase = phase
                        with _survives(storm, phase):
                            await run
                finally:
                    stop.set()
                    is_quiet.set()
            await prober
            for name in (storms.SCAPEGOAT, storms.POISON, storms.VICTIM):
                await storm.unload(name)
            await storms.measure_leaving(storm, max(5, round(share * 40)))
            after = await storms.at_rest(storm)
            storm.num_preemptions = int(after.total("moa_preemptions_total"))
            await storms.measure_abuse(storm, max(2, round(share * 100)))
            done = time.monotonic() - started
            checks = storms.reconciled(ledger, side, before, after, models)
            checks.append(server.stop())
    goals = storms.goals(storm, before, after, checks, done, is_long=is_long)
    say("restarts")
    goals += await storms.restart_phase(start, *((20, 3) if full else (5, 3) if is_long else (1, 1)), is_long=is_long)
    if full:
        goals += await storm_full.goals(folder, start, seed, say)
    return Weathered(goals, checks, storm, done)


@contextmanager
def _survives(storm: Storm, name: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, TimeoutError, httpx.HTTPError) as error:
        storm.failed.append(f"{name}: {type(error).__name__}: {error}"[:300])


def weathered_json(found: Weathered, seed: int) -> dict[str, Any]:
    ledger = found.storm.client.ledger
    return {
        "ok": found.is_ok,
        "seed": seed,
        "backend": found.storm.backend,
        "seconds": round(found.seconds, 1),
        "requests": len(ledger.entries),
        "outcomes": {outcome.value: ledger.outcomes[outcome] for outcome in Outcome},
        "golden": dict(found.storm.num_golden),
        "preemptions": found.storm.num_preemptions,
        "goals": {goal.name: {"goal": goal.text, "figure": goal.figure, "is_met": goal.is_met} for goal in found.goals},
        "faults": dict(sorted(found.storm.survived.items())),
        "skipped": found.storm.skipped,
        "failed_faults": found.storm.failed,
        "rss_mib": [(round(at - found.storm.rss[0][0]), round(size / 2**20, 1)) for at, size in found.storm.rss[::5]],
        "wrong_answers": found.storm.wrong[:5],
        "checks": [asdict(check) for check in found.checks],
    }


def show_weathered(console: Console, found: Weathered) -> None:
    for goal in found.goals:
        console.print(f"{goal.mark:7} {goal.name:4} {goal.figure}   (goal: {goal.text})", highlight=False, soft_wrap=True, markup=False)
    for name, why in found.storm.skipped.items():
        console.print(f"skipped: {name}: {why}", highlight=False, soft_wrap=True)
    for line in (*found.storm.failed[:10], *found.storm.wrong[:5]):
        console.print(f"WRONG   {line}", highlight=False, soft_wrap=True, markup=False)
    for entry in list(found.storm.client.ledger.of(Outcome.ERROR))[:5]:
        console.print(f"WRONG   {entry.request_id} {entry.job.model}: {entry.detail}", highlight=False, soft_wrap=True, markup=False)
    for check in found.checks:
        if not check.is_met:
            console.print(f"WRONG   {check.name}: {check.detail}", highlight=False, soft_wrap=True, markup=False)


# -- what people see


@asynccontextmanager
async def shown_progress(console: Console, seconds: float) -> AsyncIterator[Callable[[Sample], None]]:
    """A bar where standard error is a terminal, else a line every half minute."""
    if not console.is_terminal:
        due = 0.0

        def line(sample: Sample) -> None:
            nonlocal due
            if sample.seconds >= due:
                due += LINE_SECONDS
                console.print(f"{sample.seconds:6.0f} s  {_words(sample)}", highlight=False, soft_wrap=True)

        yield line
        return
    columns = (BarColumn(30), TimeElapsedColumn(), TextColumn("{task.fields[words]}"))
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=seconds, words="")
        yield lambda sample: progress.update(task, completed=sample.seconds, words=_words(sample))


def _words(sample: Sample) -> str:
    rate = sample.generated_tokens / max(sample.seconds, 1e-9)
    load = f"{sample.running:g} running, {sample.waiting:g} waiting"
    return f"{sample.requests:,} requests, {rate:.1f} tokens/s, {sample.errors} errors, {load}, RSS {sample.rss_bytes / 2**20:,.0f} MiB"


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """In milliseconds."""
    ranked = sorted(values)
    return {f"p{p}": round(1000 * ranked[min(len(ranked) - 1, len(ranked) * p // 100)], 2) for p in PERCENTILES} if ranked else {}


def to_json(result: Result, seed: int, streams: int) -> dict[str, Any]:
    ledger = result.ledger
    by_model = {
        model: {
            **{outcome.value: sum(1 for _ in ledger.of(outcome, model)) for outcome in Outcome},
            "prompt_tokens": sum(entry.prompt_tokens or 0 for entry in ledger.of(Outcome.OK, model)),
            "generated_tokens": sum(entry.generated_tokens for entry in ledger.of(Outcome.OK, model)),
        }
        for model in result.models
    }
    return {
        "ok": result.is_ok,
        "seed": seed,
        "streams": streams,
        "seconds": round(result.seconds, 1),
        "requests": len(ledger.entries),
        "requests_per_second": round(len(ledger.entries) / result.seconds, 2),
        "tokens_per_second": round(ledger.generated_tokens / result.seconds, 1),
        "outcomes": {outcome.value: ledger.outcomes[outcome] for outcome in Outcome},
        "statuses": {str(status): number for status, number in sorted(ledger.statuses.items())},
        "models": by_model,
        "ttft_ms": percentiles(ledger.ttft_seconds),
        "inter_token_ms": percentiles(ledger.gaps_seconds),
        "checks": [asdict(check) for check in result.checks],
    }


def show(console: Console, found: dict[str, Any]) -> None:
    table = Table(title=f"{found['requests']:,} requests in {found['seconds']:,} s, seed {found['seed']}", title_justify="left")
    names = list(next(iter(found["models"].values())))
    table.add_column("model")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right")
    for model, counts in found["models"].items():
        table.add_row(model, *(f"{counts[name]:,}" for name in names))
    console.print(table)
    console.print(f"{found['requests_per_second']} requests/s, {found['tokens_per_second']} generated tokens/s", highlight=False)
    for name, text in (("ttft_ms", "time to first token"), ("inter_token_ms", "between events of a stream")):
        console.print(
            f"{text}, ms: " + ", ".join(f"{key} {value:,}" for key, value in found[name].items()), highlight=False, soft_wrap=True
        )
    for check in found["checks"]:
        mark = "[green]ok   [/]" if check["is_met"] else "[red]WRONG[/]"
        console.print(mark, check["name"], highlight=False, end=": ")
        console.print(check["detail"], markup=False, highlight=False, soft_wrap=True)


def plot(result: Result, file: Path) -> None:
    """Raises SystemExit where matplotlib is not installed; it is no dependency."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(3, 1, sharex=True, figsize=(9, 7), layout="constrained")
    times = [sample.seconds for sample in result.samples]
    axes[0].plot(times, [sample.rss_bytes / 2**20 for sample in result.samples])
    axes[0].set_ylabel("server RSS, MiB")
    axes[0].set_ylim(bottom=0)
    for name in ("running", "waiting"):
        axes[1].plot(times, [getattr(sample, name) for sample in result.samples], label=name)
    axes[1].set_ylabel("rows")
    axes[1].legend()
    pairs = list(zip(result.samples, result.samples[1:], strict=False))
    rates = [(b.generated_tokens - a.generated_tokens) / (b.seconds - a.seconds) for a, b in pairs]
    axes[2].plot(times[1:], rates)
    axes[2].set_ylabel("generated tokens/s")
    axes[2].set_xlabel("seconds")
    figure.savefig(file, dpi=120)


def _pyplot() -> Any:
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError:
        raise SystemExit(
            "error: --plot needs matplotlib, which is not installed and is no dependency; install it, or leave --plot out"
        ) from None


# -- the command


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description="Load a real server, then make it account for everything.")
    parser.add_argument("--seconds", type=float, default=STORM_SECONDS, help="of a run under faults (%(default)g)")
    parser.add_argument("--full", action="store_true", help="25 minutes: bad files and requests by the thousand, overload, attackers")
    parser.add_argument(
        "--plain", action="store_true", help="no faults, on the default base; so is every run with a base or URL of its own"
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="of a plain run (%(default)g)")
    parser.add_argument("--streams", type=int, default=32, help="requests that are sent at the same time (%(default)s)")
    parser.add_argument("--model", help="base to serve; the default one if omitted")
    parser.add_argument("--adapters-dir", type=Path, help="adapters to serve; ./adapters where it exists")
    parser.add_argument("--url", help="a server that runs already and that nobody else uses; its log cannot be checked then")
    parser.add_argument("--seed", type=int, help="of the traffic; a random one if omitted, which is told")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the result, with all samples")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="memory, load and speed over time; needs matplotlib")
    arguments = parser.parse_args()
    arguments.plain = arguments.plain or bool(arguments.url or arguments.model or arguments.adapters_dir)
    if arguments.plain and arguments.full:
        parser.error("--full is for a run under faults")
    if arguments.minutes <= 0 or arguments.seconds <= 0 or arguments.streams < 1:
        parser.error("--minutes and --streams must be more than 0")
    if arguments.url and (arguments.model or arguments.adapters_dir):
        parser.error("--model and --adapters-dir are for a server of our own; leave them out with --url")
    return arguments


async def _run(arguments: argparse.Namespace, seed: int, console: Console, folder: Path | None) -> Result:
    seconds = 60 * arguments.minutes
    traffic = {"seconds": seconds, "streams": arguments.streams, "seed": seed}
    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)  # else the server would outlive us
    async with shown_progress(console, seconds) as on_sample:
        if folder is None:
            return await soak(arguments.url, **traffic, on_sample=on_sample)
        flags = ["--model", arguments.model] if arguments.model else []
        flags += ["--adapters-dir", str(arguments.adapters_dir)] if arguments.adapters_dir else []
        with own_server(folder / LOG, flags) as server:
            result = await soak(await server.url(), **traffic, on_sample=on_sample)
            result.checks.append(server.stop())
            result.checks += reconcile_log(result.ledger, server.lines())
            return result


def _weather(arguments: argparse.Namespace, seed: int, console: Console) -> int:
    folder = Path(tempfile.mkdtemp(prefix="moa-soak-"))
    console.print(f"seed {seed}, {arguments.seconds:g} s under faults, in {folder}", highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    found = asyncio.run(weather(folder, seconds=arguments.seconds, seed=seed, full=arguments.full, say=say))
    show_weathered(console, found)
    line = json.dumps(weathered_json(found, seed))
    if arguments.out:
        arguments.out.write_text(line + "\n")
    if found.is_ok:
        shutil.rmtree(folder)
    else:
        say(f"the server's log is {folder / LOG}")
    sys.stdout.write(line + "\n")
    return 0 if found.is_ok else 1


def main() -> int:
    arguments = _arguments()
    console = Console(stderr=True)
    if arguments.plot:
        _pyplot()  # ten minutes later is too late to say that it is missing
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    if not arguments.plain:
        return _weather(arguments, seed, console)
    console.print(f"seed {seed}, {arguments.streams} streams for {arguments.minutes:g} minutes", highlight=False)
    folder = None if arguments.url else Path(tempfile.mkdtemp(prefix="moa-soak-"))
    where = f"; the server's log is {folder / LOG}" if folder else ""
    try:
        result = asyncio.run(_run(arguments, seed, console, folder))
    except (KeyboardInterrupt, asyncio.CancelledError):
        console.print(f"interrupted; nothing was reconciled{where}", highlight=False, soft_wrap=True)
        return 130
    except httpx.HTTPError as error:
        console.print(f"error: the server cannot be asked: {type(error).__name__}: {error}{where}", highlight=False, soft_wrap=True)
        return 1
    found = to_json(result, seed, arguments.streams)
    show(console, found)
    if arguments.out:
        arguments.out.write_text(json.dumps(found | {"samples": [asdict(sample) for sample in result.samples]}, indent=1) + "\n")
    if arguments.plot:
        plot(result, arguments.plot)
    if folder and result.is_ok:
        shutil.rmtree(folder)
    elif folder:
        console.print(f"the server's log is {folder / LOG}", highlight=False, soft_wrap=True)
    sys.stdout.write(json.dumps(found) + "\n")
    return 0 if result.is_ok else 1


if __name__ == "__main__":
    sys.exit(main())
