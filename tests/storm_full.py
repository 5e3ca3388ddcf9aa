"""What of the goals needs longer: files and requests mutated by the thousand, overload, attackers. `python -m tests.soak --full`."""

import asyncio
import contextlib
import json
import random
import re
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
from families import random_adapter
from servers import TALKING
from storm import BASE, Goal, p
from traffic import COMPLETIONS

from moa_serve.adapter.adapter import AdapterSource
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.store import AdapterStore
from moa_serve.config import ModelConfig
from moa_serve.errors import AdapterError

NUM_FILES, NUM_REQUESTS, NUM_ATTACKERS = 10_000, 50_000, 200
FIELDS = ("temperature", "top_p", "seed", "stream", "echo", "logprobs", "min_tokens", "frequency_penalty", "user", "moa", "lora_name")
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2.5, 1e308, 2**64, "", "x", "\ud800", "\x00", "x" * 5000, [], [1], ["a", "b"], [[3]], {}, {"5": 1},
)  # fmt: skip
NUM_ROWS, NUM_PLACES = 16, 80  # of the storm's server, and the same with those that wait
ANSWER_TOKENS = 128  # of a base whose token takes a third of a millisecond: with a few, HTTP would be all that there is to do
OVERLOAD_SECONDS, OVERLOAD_TURNS, PEAK_SECONDS = 60.0, 3, 10.0  # turns, for the speed of a machine changes
REFUSED_SECONDS = 0.15  # docs/reliability.md says why not 0.1
RAMP_SECONDS, ATTACK_SECONDS = 5.0, 40.0


async def goals(folder: Path, start: Callable[..., Any], seed: int, say: Callable[[str], None]) -> list[Goal]:
    found = [await asyncio.to_thread(mutated_files, folder, random.Random(seed), NUM_FILES)]
    say(found[-1].figure)
    runs: dict[str, Callable[[str], Awaitable[Goal]]] = {
        "G4": lambda url: mutated_requests(url, random.Random(seed), NUM_REQUESTS),
        "G9": overload,
        "G15": attackers,
    }
    for name, run in runs.items():
        async with start(more=("--kv-cache-bytes", str(2**22))) as (url, _):  # what is measured is not how often rows start over
            try:
                found.append(await run(url))
            except Exception as error:  # what was found until now is told all the same
                found.append(Goal(name, "can be measured", f"{type(error).__name__}: {error}", False))
        say(found[-1].figure)
    return found


def mutated_files(folder: Path, rng: random.Random, count: int) -> Goal:
    """A good adapter with bytes changed, cut out, doubled or cut off: it is refused, or every tensor is there, of its shape, and finite."""
    place = folder / "mutated" / "adapters" / "mutant"
    shutil.rmtree(place, ignore_errors=True)
    manifest, tensors = random_adapter("sparse_fn", 3, TALKING)
    write_adapter(place, manifest, tensors)
    store = AdapterStore(ModelConfig.from_hf(TALKING), base_name=BASE, adapters_dir=place.parent)
    files = {name: (place / name).read_bytes() for name in ("adapter.json", "adapter.safetensors")}
    head = 8 + int.from_bytes(files["adapter.safetensors"][:8], "little")
    seconds: list[float] = []
    refused = crashed = unfit = 0
    for _ in range(count):
        name = rng.choice(sorted(files))
        data = bytearray(files[name])
        reach = head if name.endswith("safetensors") and rng.random() < 0.8 else len(data)
        for _ in range(rng.randint(1, 4)):
            at, size = rng.randrange(max(1, min(reach, len(data)))), rng.randint(0, 8)
            data[at : at + size] = rng.choice((rng.randbytes(size), b"", bytes(data[at : at + size]) * 2, b"\xff" * size))
        if rng.random() < 0.1:
            del data[rng.randrange(len(data)) :]
        (place / name).write_bytes(data)
        began = time.monotonic()
        try:
            adapter = store.read("mutant", AdapterSource("mutant"))
            shapes = {key: tensor.shape for key, tensor in adapter.tensors.items()}
            unfit += shapes != {key: tensor.shape for key, tensor in tensors.items()} or not all(
                tensor.isfinite().all() for tensor in adapter.tensors.values()
            )
        except AdapterError:
            refused += 1
        except Exception:
            crashed += 1
        seconds.append(time.monotonic() - began)
        (place / name).write_bytes(files[name])
    text = (
        f"{count:,} mutated files: {refused:,} refused, {count - refused - crashed:,} taken, {unfit} of them not whole, {crashed} crashes, "
    )
    return Goal(
        "G3",
        ">= 10,000 mutated files, 0 crashes, p99 <= 1 s",
        text + f"p99 {1000 * p(seconds, 0.99):.0f} ms",
        crashed == unfit == 0 and p(seconds, 0.99) <= 1,
    )


async def mutated_requests(url: str, rng: random.Random, count: int) -> Goal:
    """Bodies and heads with bytes changed, on raw connections: an answer of our shape, or the end of the connection."""
    host, port = url.removeprefix("http://").split(":")
    good: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"model": BASE, "prompt": "x", "max_tokens": 1}),
        ("/v1/chat/completions", {"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
        (COMPLETIONS, {"model": "lora", "prompt": [3, 4], "n": 2, "stop": ["a"], "logit_bias": {"5": 1}, "max_tokens": 1}),
        ("/tokenize", {"prompt": "x"}),
        ("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "none"}),
    ]
    statuses: dict[int, int] = {}
    wrong: list[str] = []

    def mutate(data: bytes) -> bytes:
        found = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(found))
            found[at : at + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
        return bytes(found)

    def mutate_value(data: bytes) -> bytes:
        """One field of another value, or a field that is not there: still JSON, so that what looks at values sees it."""
        fields = json.loads(data)
        fields[rng.choice([*fields, *FIELDS])] = rng.choice(VALUES)
        return json.dumps(fields).encode()

    async def one(number: int) -> None:
        path, fields = rng.choice(good)
        body = json.dumps(fields).encode()
        if number % 4:
            body = rng.choice((mutate, mutate_value))(body)
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n".encode()
        head = (head if number % 4 else mutate(head)) + b"Connection: close\r\n\r\n"
        try:
            async with asyncio.timeout(40):
                reader, writer = await asyncio.open_connection(host, int(port))
                writer.write(head + body)
                if not number % 4:
                    writer.write_eof()  # a length that is too great would be waited for
                said = await reader.read()
                writer.close()
        except TimeoutError:
            wrong.append(f"no answer: {head + body!r}"[:300])
            return
        except OSError:
            return
        if not said:
            return
        status = int(said.split(b" ", 2)[1])
        statuses[status] = statuses.get(status, 0) + 1
        said_head, _, content = said.partition(b"\r\n\r\n")
        if length := re.search(rb"(?i)\r\ncontent-length: *(\d+)", said_head):
            content = content[: int(length[1])]  # a mutated length makes the rest of a body the next request, with an answer of its own
        is_shaped = status < 400 or set(json.loads(content or b"{}").get("error", {})) == {"message", "type", "param", "code"}
        if (status >= 500 and status != 503) or not is_shaped:
            wrong.append(f"{status}: {head + body!r}"[:300])

    for begin in range(0, count, 16):
        await asyncio.gather(*(one(number) for number in range(begin, min(begin + 16, count))))
    text = f"{count:,} requests: {dict(sorted(statuses.items()))}, {len(wrong)} wrong" + (f": {wrong[0]}" if wrong else "")
    return Goal("G4", ">= 50,000 fuzzed requests: no 5xx, no hang, all errors of one shape", text, not wrong)


async def overload(url: str) -> Goal:
    """Ten times as many clients as there are places, for a minute in all; in turns with it as many as there are rows, for the peak."""
    peaks, rates = [(await _load(url, NUM_ROWS, PEAK_SECONDS))[0]], []
    admitted: list[float] = []
    refused: list[float] = []
    for _ in range(OVERLOAD_TURNS):
        rate, *seconds = await _load(url, 10 * NUM_PLACES, OVERLOAD_SECONDS / OVERLOAD_TURNS)
        rates.append(rate)
        admitted += seconds[0]
        refused += seconds[1]
        peaks.append((await _load(url, NUM_ROWS, PEAK_SECONDS))[0])
    peak = statistics.mean(peaks)
    share = statistics.mean(rates) / peak
    text = (
        f"{100 * share:.0f} % of the peak of {peak:.0f} requests/s, {len(refused):,} refusals in {1000 * p(refused, 0.99):.0f} ms (p99), "
        f"{len(admitted):,} admitted in {p(admitted, 0.99):.1f} s (p99)"
    )
    is_met = share >= 0.9 and p(refused, 0.99) <= REFUSED_SECONDS and p(admitted, 0.99) <= 32
    most = f"{1000 * REFUSED_SECONDS:.0f} ms"
    goal = f"10x capacity for 60 s: goodput >= 90 % of peak, refusals p99 <= {most}, admitted within the queue's limit"
    return Goal("G9", goal, text, is_met)


async def _load(url: str, num_clients: int, seconds: float) -> tuple[float, list[float], list[float]]:
    """Clients that come one after the other in the first seconds and ask again and again; who is refused waits as long as it was told.

    On raw connections, for eight hundred of httpx would be the bottleneck. Returns answers a second once all are there, and the
    seconds of each answer and of each refusal.
    """
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": BASE, "prompt": "load", "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    begin = time.monotonic() + RAMP_SECONDS
    deadline = begin + seconds
    answers: list[tuple[float, float]] = []  # when, and after how long
    refused: list[float] = []

    async def client(number: int) -> None:
        await asyncio.sleep(RAMP_SECONDS * number / num_clients)
        reader, writer = await asyncio.open_connection(host, int(port))
        while (began := time.monotonic()) < deadline:
            writer.write(head % len(body) + body)
            said = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            fields = dict(line.split(": ", 1) for line in said.split("\r\n")[1:] if line)
            await reader.readexactly(int(fields["content-length"]))
            now, status = time.monotonic(), said.split(" ", 2)[1]
            if status == "200":
                answers.append((now, now - began))
            else:
                assert status == "503", said
                refused.append(now - began)
                if now + (wait := float(fields["retry-after"])) > deadline:
                    break
                writer.close()
                await asyncio.sleep(wait)
                reader, writer = await asyncio.open_connection(host, int(port))
        writer.close()

    await asyncio.gather(*(client(number) for number in range(num_clients)))
    return sum(begin <= at <= deadline for at, _ in answers) / seconds, [took for _, took in answers], refused


async def attackers(url: str) -> Goal:
    """Two hundred that send a byte a second, or nothing, beside normal users."""
    host, port = url.removeprefix("http://").split(":")
    body = {"model": BASE, "prompt": "normal", "max_tokens": 8, "temperature": 0}

    async def users(seconds: float) -> list[float]:
        found, deadline = [], time.monotonic() + seconds
        async with httpx.AsyncClient(base_url=url, trust_env=False, verify=False, timeout=60) as http:
            while time.monotonic() < deadline:
                began = time.monotonic()
                assert (await http.post(COMPLETIONS, json=body)).status_code == 200
                found.append(time.monotonic() - began)
                await asyncio.sleep(0.02)
        return found

    closed: list[float] = []

    async def attack(number: int) -> None:
        began = time.monotonic()
        reader, writer = await asyncio.open_connection(host, int(port))
        line = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n" + b"x" * 99
        with contextlib.suppress(OSError):
            for byte in line if number % 2 else b"":
                writer.write(bytes([byte]))
                await writer.drain()
                if writer.transport.is_closing() or reader.at_eof():
                    break
                await asyncio.sleep(1)
            await reader.read()
        closed.append(time.monotonic() - began)
        writer.close()

    quiet = await users(10)
    tasks = [asyncio.create_task(attack(number)) for number in range(NUM_ATTACKERS)]
    beside = await users(ATTACK_SECONDS)
    await asyncio.wait(tasks, timeout=5)
    ratio, worst = p(beside, 0.95) / p(quiet, 0.95), max(closed, default=0.0)
    text = f"normal p95 {ratio:.2f} times as long, {len(closed)} of {NUM_ATTACKERS} closed within {worst:.0f} s"
    return Goal(
        "G15",
        "200 slow attackers: normal p95 <= 2x, all closed within 30 s",
        text,
        ratio <= 2 and len(closed) == NUM_ATTACKERS and worst <= 32,
    )
