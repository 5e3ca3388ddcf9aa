"""A soak under faults: a tiny server with sixteen adapters and room for fewer, mixed traffic whose every answer is known beforehand, and a
seeded script that injects a fault every two seconds. `python -m tests.soak` runs it; the faults are in storm_faults.py, goals in goals().

Every answer is greedy and was asked for once before, alone: what comes under load, beside broken adapters and after reloads must be the
same text with the same log-probabilities. Errors are wrong unless a fault that was injected at that moment explains them.
"""

import asyncio
import contextlib
import itertools
import json
import random
import secrets
import shutil
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import psutil
from agreement import OTHER, Check, Delta, Scrape, reconcile
from bad_adapters import write_overflowing
from families import FAMILIES, write_family
from servers import TALKING, write_talking_base
from traffic import COMPLETIONS, Client, Entry, Job, Ledger, Outcome, last_leaver

from moa_serve.engine.self_test import trial_prompt

NUM_ADAPTERS, NUM_PROMPTS, NUM_WORKERS = 16, 8, 24
MAX_TOKENS = 12
SWAPPED = "swapped"  # an adapter whose content changes under traffic
SCAPEGOAT, POISON, VICTIM = "scapegoat", "poison", "victim"  # adapters that faults are about; never asked for by the workers
OVERFLOW_TOKEN = next(token for token in range(100, 259) if token not in trial_prompt(259, 512))
BASE = "base"
TOLERANCES = {"native": 0.0, "torch": 1e-4}  # of log-probabilities; torch's float32 products depend on the batch
NO_ROOM = ("adapter_memory", "server_overloaded", "adapter_busy")  # what anybody may meet


@dataclass(slots=True)
class Goal:
    """A figure of docs/reliability.md: what was reached, what was wanted, whether that is enough."""

    name: str
    text: str
    figure: str
    is_met: bool | None  # None: the run was too short to judge, or it belongs to the full run

    @property
    def mark(self) -> str:
        return "-" if self.is_met is None else "ok" if self.is_met else "MISSED"


@dataclass(slots=True)
class Windows:
    """When which error codes are explained by a fault."""

    _spans: list[tuple[float, float, frozenset[str]]] = field(default_factory=list)

    def is_planned(self, entry: Entry, code: str) -> bool:
        now = time.monotonic()
        return any(start <= now and entry.begun <= end and code in codes for start, end, codes in self._spans)

    def open(self, *codes: str) -> Callable[[], None]:
        """From now on, until half a second after what comes back is called."""
        index = len(self._spans)
        self._spans.append((time.monotonic(), float("inf"), frozenset(codes)))

        def close() -> None:
            start, _, found = self._spans[index]
            self._spans[index] = (start, time.monotonic() + 0.5, found)

        return close


@dataclass(slots=True)
class Storm:
    """What the parts of a run share."""

    url: str
    folder: Path
    faults_file: Path
    process: psutil.Process
    client: Client  # of the ledger that is reconciled
    http: httpx.AsyncClient  # for what is not in a ledger
    side: Client  # of requests to adapters that faults are about, whose series go with them
    random: random.Random
    windows: Windows
    backend: str
    golden: dict[tuple[str, str], tuple[str, list[float]]] = field(default_factory=dict)  # by revision and prompt
    wrong: list[str] = field(default_factory=list)  # answers that were not golden
    num_golden: Counter[str] = field(default_factory=Counter)  # answers that were, by phase
    num_of_model: Counter[str] = field(default_factory=Counter)
    phase: str = "storm"
    survived: Counter[str] = field(default_factory=Counter)  # faults by kind
    failed: list[str] = field(default_factory=list)  # faults after which something was not as it must be
    skipped: dict[str, str] = field(default_factory=dict)
    num_reloads: int = 0
    health_seconds: list[float] = field(default_factory=list)
    rss: list[tuple[float, float]] = field(default_factory=list)  # (seconds, bytes)
    num_series: int = 0  # of /metrics
    grown: list[str] = field(default_factory=list)  # series that came while junk was sent
    kept_mib: float = 0.0  # after abuse
    num_preemptions: int = 0
    overruns: list[int] = field(default_factory=list)  # tokens that a row made after its client had left

    def inject(self, *found: dict[str, Any]) -> None:
        """These faults strike from now on, and none of those before."""
        beside = self.faults_file.with_suffix(".new")
        beside.write_text(json.dumps([{"id": f"{fault['at']}-{secrets.token_hex(4)}", **fault} for fault in found]))
        beside.replace(self.faults_file)

    @asynccontextmanager
    async def injected(self, *found: dict[str, Any], allows: tuple[str, ...] = ()) -> AsyncIterator[None]:
        """Faults for the length of a block, and the errors that they explain."""
        close = self.windows.open(*allows)
        self.inject(*found)
        try:
            yield
        finally:
            self.inject()
            close()

    async def admin(self, path: str, **body: Any) -> tuple[int, str]:
        """An operator's request: (status, error code or "")."""
        answer = await self.http.post(path, json=body)
        return answer.status_code, "" if answer.is_success else str(answer.json()["error"]["code"])

    async def load(self, name: str, path: str, *, in_place: bool = True) -> tuple[int, str]:
        return await self.admin("/v1/load_lora_adapter", lora_name=name, lora_path=path, load_inplace=in_place)

    async def unload(self, name: str) -> tuple[int, str]:
        return await self.admin("/v1/unload_lora_adapter", lora_name=name)

    async def page(self) -> Scrape:
        return Scrape((await self.http.get("/metrics")).text)

    def check(self, entry: Entry, prompt: str) -> None:
        """Hold an answer against the one that was given alone."""
        if entry.outcome is not Outcome.OK:
            return
        text, logprobs = self.golden.get((entry.revision or "", prompt), ("", []))
        difference = max((abs(a - b) for a, b in zip(entry.logprobs, logprobs, strict=False)), default=0.0)
        if entry.text != text or len(entry.logprobs) != len(logprobs) or difference > TOLERANCES[self.backend]:
            self.wrong.append(
                f"{entry.request_id}, {entry.job.model}, {self.phase}: {entry.text!r} instead of {text!r}, {difference:.2g} apart"
            )
            return
        self.num_golden[self.phase] += 1
        self.num_of_model[entry.job.model] += 1


def write_world(folder: Path) -> list[str]:
    """A base and its adapters; the names that workers ask for, the base first."""
    write_talking_base(folder / "base")
    families = sorted(FAMILIES)[: NUM_ADAPTERS - 1]
    for seed, family in enumerate(families, start=1):
        write_family(folder / "adapters" / family, family, seed, TALKING)
    for version in (1, 2):
        write_family(folder / "adapters" / f"{SWAPPED}-{version}", "soft", 100 + version, TALKING)
    for number, name in enumerate((SCAPEGOAT, VICTIM), start=1):
        write_family(folder / "adapters" / name, "sparse_fn", 200 + number, TALKING)
    write_overflowing(folder / "adapters" / POISON, TALKING, OVERFLOW_TOKEN, TALKING["max_position_embeddings"])
    shutil.copytree(folder / "adapters", folder / "pristine")
    return [BASE, *families, SWAPPED]


def server_flags(folder: Path) -> list[str]:
    """Room for 6 adapters in slots, for about 10 in memory, and a pool that does not hold all rows' contexts."""
    sizes = [(folder / "adapters" / name / "adapter.safetensors").stat().st_size for name in sorted(FAMILIES)[: NUM_ADAPTERS - 1]]
    room = int(10 * statistics.mean(sizes))
    return [
        *("--model", str(folder / "base"), "--adapters-dir", str(folder / "adapters"), "--served-model-name", BASE),
        *("--num-slots", "6", "--adapter-cache-bytes", str(room), "--max-num-seqs", "16", "--kv-cache-bytes", str(2**17)),
        *("--unsafe-test-hooks", "--watchdog-seconds", "10"),
    ]  # fmt: skip


def job_of(model: str, prompt: str, *, stream: bool = False, **more: Any) -> Job:
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "logprobs": 1, "stream": stream, **more}
    if stream:
        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    content = json.dumps(body).encode()
    adapter = None if model == BASE else model
    limit = int(body["max_tokens"])
    return Job(model, adapter, COMPLETIONS, content, max_tokens=limit, max_prompt_tokens=len(prompt) + 8, is_stream=stream)


def prompts_of(rng: random.Random) -> list[str]:
    letters = "abcdefghij klmnop qrstu"
    return ["".join(rng.choices(letters, k=length)) for length in (3, 8, 16, 24, 40, 64, 96, 160)][:NUM_PROMPTS]


async def make_golden(storm: Storm, models: list[str], prompts: list[str]) -> None:
    """Every answer once, alone."""
    for name in models:
        if name not in (BASE, SWAPPED):  # by an operator: what only requests have read is forgotten when it cannot be read again
            assert (await storm.load(name, name))[0] == 200
    for version in (2, 1):
        status, code = await storm.load(SWAPPED, f"{SWAPPED}-{version}")
        assert status == 200, code
        for model in models if version == 1 else [SWAPPED]:
            for prompt in prompts:
                entry = await storm.client.send(job_of(model, prompt))
                assert entry.outcome is Outcome.OK, entry.detail
                assert entry.revision is not None
                storm.golden[entry.revision, prompt] = (entry.text, entry.logprobs)


async def work(storm: Storm, models: list[str], prompts: list[str], seed: int, stop: asyncio.Event) -> None:
    """One user after the other."""
    rng = random.Random(seed)
    weights = list(accumulate(1 / rank**0.7 for rank in range(1, len(models) + 1)))
    while not stop.is_set():
        model, prompt = rng.choices(models, cum_weights=weights)[0], rng.choice(prompts)
        entry = await storm.client.send(job_of(model, prompt, stream=rng.random() < 0.7))
        storm.check(entry, prompt)
        if entry.outcome is not Outcome.OK:
            await asyncio.sleep(0.1)


def probe_health(storm: Storm, stop: threading.Event) -> None:
    """As an orchestrator does, on a connection of its own each time; in a thread, which the client's other work does not hold up much."""
    host, port = storm.url.removeprefix("http://").split(":")
    while not stop.wait(0.2):
        started = time.monotonic()
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            while connection.recv(4096):
                pass
        storm.health_seconds.append(time.monotonic() - started)


async def sample_memory(storm: Storm, stop: asyncio.Event) -> None:
    while not stop.is_set():
        storm.rss.append((time.monotonic(), float(storm.process.memory_info().rss)))
        await asyncio.sleep(1)


async def inject_all(storm: Storm, kinds: dict[str, Callable[[Storm], Any]], deadline: float, interval: float) -> None:
    """One fault after the other, each kind once and then until the deadline again, in an order that the seed decides."""
    due = time.monotonic()
    for turn in itertools.count():
        for name in storm.random.sample(sorted(kinds), len(kinds)):
            if turn and time.monotonic() >= deadline:
                return
            try:
                async with asyncio.timeout(20):
                    await kinds[name](storm)
                storm.survived[name] += 1
            except (AssertionError, TimeoutError, httpx.HTTPError, OSError) as error:
                storm.failed.append(f"{name}: {type(error).__name__}: {error}"[:300])
                storm.inject()
            due = max(due + interval, time.monotonic())
            await asyncio.sleep(due - time.monotonic())


async def poison_phase(storm: Storm, count: int, seconds: float = 60.0) -> None:
    """An adapter that overflows asks without a pause, so that its rows are in every batch, until so many others were answered."""
    deadline = time.monotonic() + seconds
    while storm.num_golden["poison"] < count and time.monotonic() < deadline:
        for _ in range(3):
            entry = await storm.side.send(overflow_job())
            assert entry.detail in ("adapter_nonfinite_output", "adapter_quarantined", *NO_ROOM), (entry.outcome, entry.detail)
        assert (await storm.load(POISON, POISON))[0] in (200, 503)


def overflow_job() -> Job:
    body = {"model": POISON, "prompt": [OVERFLOW_TOKEN], "max_tokens": 2}
    return Job(POISON, POISON, COMPLETIONS, json.dumps(body).encode(), max_tokens=2, max_prompt_tokens=1, expected=500)


async def reload_all_the_time(storm: Storm, stop: asyncio.Event) -> None:
    """From the storm's first second to its last, in place, one version after the other."""
    for turn in itertools.count():
        if stop.is_set():
            return
        status, code = await storm.load(SWAPPED, f"{SWAPPED}-{1 + turn % 2}")
        storm.num_reloads += status == 200
        if status != 200 and code not in (*NO_ROOM, "not_ready", "internal_error", "out_of_memory", "adapter_unreadable"):
            storm.failed.append(f"reload: {status} {code}")
        await asyncio.sleep(0.3)


async def disconnect_phase(storm: Storm, count: int) -> None:
    """Clients that leave in the middle, twenty at a time."""

    async def leave(number: int) -> None:
        job = job_of(BASE, "leaving", stream=True, max_tokens=200, ignore_eos=True)
        await storm.client.send(replace(job, leave_events=1 + number % 5))

    for start in range(0, count, 20):
        await asyncio.gather(*(leave(start + number) for number in range(min(20, count - start))))


async def measure_leaving(storm: Storm, count: int) -> None:
    """One that leaves a server with nothing else to do: what its row still makes that nobody reads."""
    await at_rest(storm)
    before = (await storm.page()).total("moa_generated_tokens_total")
    for _ in range(count):
        entry = await storm.client.send(replace(last_leaver(BASE), leave_events=3))
        after = (await at_rest(storm)).total("moa_generated_tokens_total")
        storm.overruns.append(int(after - before) - entry.generated_tokens)
        before = after


def _asking(**fields: Any) -> bytes:
    return json.dumps({"model": BASE, "prompt": "x", "max_tokens": 1, **fields}).encode()


def _schema(number: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"field{number}_{index}": {"type": "string"} for index in range(50)}}


ABUSE: dict[str, Callable[[int], bytes]] = {  # bodies that are refused, or cost much; the number makes each differ from the next
    "a body above the limit": lambda number: b"x" * (5 * 2**20),
    "a prompt above the context": lambda number: _asking(prompt=f"{number} " * 400_000),
    "100,000 brackets": lambda number: b'{"model":"base","prompt":' + b"[" * 100_000,
    "5,000 unknown fields": lambda number: _asking(**{f"{number}-{index}": 1 for index in range(5_000)}),
    "an unknown model": lambda number: _asking(model=f"junk-{number}" * 20),
    "a schema of its own": lambda number: _asking(guided_json=_schema(number)),
}


GIVES_BACK_SECONDS = 3.0  # the memory watch of a server without work: four looks, and a little


async def measure_abuse(storm: Storm, count: int) -> None:
    """Of each kind so many, five times: what the server holds more after the last two rounds than after the two before, each time after it
    gave back what it only kept; the first makes what is made once. Of two the less, since a request's last frames may live a while."""
    headers = {"Content-Type": "application/json"}
    numbers = itertools.count()
    held: list[int] = []
    for _ in range(5):
        for body in ABUSE.values():
            for _ in range(count):
                with contextlib.suppress(httpx.TransportError):  # a body that is too large is not read to its end
                    await storm.http.post(COMPLETIONS, content=body(next(numbers)), headers=headers)
        await at_rest(storm)
        await asyncio.sleep(GIVES_BACK_SECONDS)
        held.append(storm.process.memory_info().rss)
    storm.kept_mib = (min(held[3:]) - min(held[1:3])) / 2**20


async def at_rest(storm: Storm) -> Scrape:
    deadline = time.monotonic() + 20
    while not (await storm.page()).is_at_rest and time.monotonic() < deadline:
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.05)  # a record is made just after its row has gone
    return await storm.page()


def p(values: list[float], share: float) -> float:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))] if ranked else 0.0


def slope_mib_per_minute(rss: list[tuple[float, float]], seconds: float = 300.0) -> float:
    """Of the straight line through the last minutes of samples."""
    last = [sample for sample in rss if sample[0] >= rss[-1][0] - seconds] if rss else []
    if len(last) < 10:
        return 0.0
    return statistics.linear_regression([t for t, _ in last], [b for _, b in last]).slope * 60 / 2**20


def reconciled(ledger: Ledger, side: Ledger, before: Scrape, after: Scrape, models: list[str]) -> list[Check]:
    """Client and server, without what holds only where nobody but the ledger's client asks and nothing fails: responses by status."""

    def is_of_victims(name: str, labels: Mapping[str, str]) -> bool:
        """A request that outlives its adapter is counted as `other`; a refusal is, whoever sent it."""
        is_other = OTHER in (labels.get("adapter"), labels.get("model_name"))
        is_refusal = name == "moa_requests_total" and labels["finish_reason"] == "error"
        return is_other and not is_refusal and not name.startswith(("moa_router", "moa_expert"))

    checks = reconcile(ledger, before.without(is_of_victims), after.without(is_of_victims), models, has_faults=True)
    delta = Delta(before.without(is_of_victims), after.without(is_of_victims))
    ended = (Outcome.OK, Outcome.REFUSED)
    ours = sum(ledger.outcomes[outcome] for outcome in ended) + sum(entry.is_sent for entry in ledger.of(Outcome.CANCELLED))
    theirs = delta.total("moa_requests_total")
    # Whoever names an adapter that is being unloaded is counted under its name, which is forgotten in a moment, or as `other`.
    unsure = sum(entry.detail == "model_not_found" for entry in side.of(Outcome.REFUSED))
    detail = f"server {theirs:,}, client {ours:,}" + (f" to {ours + unsure:,}" if unsure else "")
    everyone = Check("every request is counted once", ours <= theirs <= ours + unsure, detail)
    return [everyone, *(check for check in checks if check.name != "responses by status")]


def goals(storm: Storm, before: Scrape, after: Scrape, checks: list[Check], seconds: float, *, is_long: bool) -> list[Goal]:
    """The figures of a run against those of docs/reliability.md; too short a run is not judged by how much it did."""
    ledger = storm.client.ledger
    num_requests, num_golden, num_wrong = len(ledger.entries), sum(storm.num_golden.values()), len(storm.wrong)
    lost = [check for check in checks if not check.is_met]
    errors = ledger.outcomes[Outcome.ERROR]
    num_faults, num_kinds = storm.survived.total(), len(storm.survived)
    stalls = int(after.total("moa_event_loop_stalls_total", longer_than="0.25"))
    cancelled = list(ledger.of(Outcome.CANCELLED))
    seen = sum(entry.generated_tokens for entry in (*ledger.of(Outcome.OK), *cancelled))
    planned = sum(entry.job.max_tokens for entry in ledger.entries if entry.is_planned)
    made = after.total("moa_generated_tokens_total") - before.total("moa_generated_tokens_total")
    wasted = max(0.0, made - seen - planned) / max(1.0, made)
    slope = slope_mib_per_minute(storm.rss)
    p99, worst = p(storm.health_seconds, 0.99), max(storm.health_seconds, default=0.0)
    poisoned, reloads, mixed = storm.num_golden["poison"], storm.num_reloads, min(num_golden, sum(storm.num_of_model.values()))
    overruns = [float(tokens) for tokens in storm.overruns]
    longest = after.total("moa_event_loop_longest_stall_seconds")

    def amount(is_enough: bool, is_right: bool) -> bool | None:
        """What must be right always, and enough in a long run only."""
        return False if not is_right else is_enough if is_long else None

    def in_time(is_met: bool) -> bool | None:
        return is_met if is_long else None

    return [
        Goal("G1", ">= 20,000 requests in 8 min, 0 lost, 0 wrong, 0 unplanned errors",
             f"{num_requests:,} requests in {seconds / 60:.1f} min, {len(lost)} disagreements, {num_wrong} wrong, {errors} errors",
             amount(num_requests >= 20_000, not (lost or num_wrong or errors))),
        Goal("G2", ">= 200 faults of >= 25 kinds survived",
             f"{num_faults} of {num_kinds} kinds survived, {len(storm.failed)} not",
             amount(num_faults >= 200 and num_kinds >= 25, not storm.failed)),
        Goal("G6", "1,000 answers beside an overflowing adapter, all as alone",
             f"{poisoned:,} answers, {num_wrong} wrong", amount(poisoned >= 1000, not num_wrong)),
        Goal("G7", "2,000 answers in mixed batches over 16 adapters, all as alone",
             f"{mixed:,} answers of {len(storm.num_of_model)} models, {num_wrong} wrong",
             amount(mixed >= 2000 and len(storm.num_of_model) >= NUM_ADAPTERS, not num_wrong)),
        Goal("G8", "500 reloads under traffic, 0 answers of two versions",
             f"{reloads} reloads, {storm.num_of_model[SWAPPED]:,} answers of the adapter", amount(reloads >= 500, not num_wrong)),
        Goal("G10", "1,000 disconnects, wasted tokens <= 2 %; alone, a row makes at most 2 more (median)",
             f"{len(cancelled):,} disconnects, {100 * wasted:.2f} % wasted; alone {p(overruns, 0.5):.0f} more, p99 {p(overruns, 0.99):.0f}",
             amount(len(cancelled) >= 1000 and p(overruns, 0.5) <= 2, True) if wasted <= 0.02 or not is_long else False),
        Goal("G11", "health: p99 <= 250 ms, at most 2 s",
             f"p99 {1000 * p99:.0f} ms, at most {1000 * worst:.0f} ms of {len(storm.health_seconds)}", in_time(p99 <= 0.25 and worst <= 2)),
        Goal("G12", "memory of the last 5 min: slope <= 1 MiB/min; 100 abusive requests of each kind keep at most 1 MiB",
             f"{slope:+.2f} MiB/min; {storm.kept_mib:+.2f} MiB by {len(ABUSE)} kinds", in_time(slope <= 1 and storm.kept_mib <= 1)),
        Goal("G13", "turns of the event loop above 250 ms: 0", f"{stalls}, the longest {longest:.2f} s", in_time(stalls == 0)),
        Goal("G16", "<= 10,000 series with 20 adapters; junk adds none",
             f"{storm.num_series:,} series, {len(storm.grown)} more under abuse" + (f": {storm.grown[0]}" if storm.grown else ""),
             storm.num_series <= 10_000 and not storm.grown),
    ]  # fmt: skip


async def restart_phase(start: Callable[[], Any], count_kill: int, count_term: int, *, is_long: bool) -> list[Goal]:
    """G5 and G14 in small: killed, it starts again; told to stop, streams end whole."""
    ready: list[float] = []
    for _ in range(count_kill):
        started = time.monotonic()
        async with start() as (url, process):
            ready.append(time.monotonic() - started)
            async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as http:
                answer = await http.post(COMPLETIONS, json={"model": BASE, "prompt": "a", "max_tokens": 2})
                assert answer.status_code == 200, answer.text
            process.send_signal(signal.SIGKILL)
    whole = total = clean = 0
    for _ in range(count_term):
        async with start() as (url, process), httpx.AsyncClient(base_url=url, trust_env=False, verify=False, timeout=60) as http:
            first = asyncio.Event()

            async def stream(http: httpx.AsyncClient = http, first: asyncio.Event = first) -> bool:
                body = {"model": BASE, "prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True}
                async with http.stream("POST", COMPLETIONS, json=body) as answer:
                    lines = []
                    async for line in answer.aiter_lines():
                        lines.append(line)
                        first.set()
                    return "data: [DONE]" in lines

            streams = [asyncio.create_task(stream()) for _ in range(16)]
            await first.wait()
            process.send_signal(signal.SIGTERM)
            ended = await asyncio.gather(*streams, return_exceptions=True)
            whole, total = whole + sum(found is True for found in ended), total + len(ended)
            clean += await asyncio.to_thread(process.wait, 40) == 0
    goals = []
    if ready:
        slow = max(ready)
        text = f"{len(ready)} of {count_kill} ready again, within {slow:.1f} s"
        goals.append(Goal("G5", "kill -9: ready again within 10 s", text, slow <= 10 if is_long else None))
    if total:
        text = f"{whole} of {total} streams whole, {clean} of {count_term} exits with 0"
        goals.append(Goal("G14", "SIGTERM: every stream whole, exit 0", text, whole == total and clean == count_term))
    return goals
