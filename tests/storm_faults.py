"""The faults of the soak, one function each: what is done to the server, and what must be so afterwards. Seeded, short, in any order.

A kind whose part of the server is not built is left out, and the run says so.
"""

import asyncio
import contextlib
import json
import resource
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from bad_adapters import Bad, bad_adapters
from servers import TALKING
from storm import BASE, NO_ROOM, POISON, SCAPEGOAT, SWAPPED, VICTIM, Storm, job_of, overflow_job
from support import random_tensors, tiny_manifest
from traffic import COMPLETIONS, Job, Outcome, bad_jobs

from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.config import ModelConfig
from moa_serve.settings import ServerSettings

Kind = Callable[[Storm], Awaitable[None]]
KINDS: dict[str, Kind] = {}
BAD_CASES = (1, 3, 5, 6, 7, 8, 10, 13, 14, 15)  # ten kinds of bad adapters, each with several of its case


def kind(name: str) -> Callable[[Kind], Kind]:
    def add(run: Kind) -> Kind:
        KINDS[name] = run
        return run

    return add


def not_built() -> dict[str, str]:
    """Kinds of the list that this version has no part for, and why."""
    found = {}
    if "Refused" in (ServerSettings.model_fields["state_dir"].description or ""):
        for name in ("registry write without space", "registry file torn"):
            found[name] = "not built: the registry is in memory"
    if not any("rate" in name or "per_key" in name for name in ServerSettings.model_fields):
        found["one key floods"] = "not built: no limits per key"
    return found


def bad_kinds(folder: Path) -> dict[str, Kind]:
    """A bad folder of each case, loaded by an operator; written beforehand."""
    manifest = tiny_manifest(ModelConfig.from_hf(TALKING), "soft_moa", targets=("Q",))
    tensors = random_tensors(manifest)
    write_adapter(folder / "pristine" / "good", manifest, tensors)
    by_case: dict[int, list[Bad]] = {}
    for bad in bad_adapters(manifest, tensors):
        if bad.case in BAD_CASES and "no folder" not in bad.name:
            by_case.setdefault(bad.case, []).append(bad)

    def make(case: int, found: list[Bad]) -> Kind:
        async def run(storm: Storm) -> None:
            bad = storm.random.choice(found)
            place = folder / "adapters" / f"bad-{case}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(folder / "pristine" / "good", place)
            await asyncio.to_thread(bad.damage, place)
            status, code = await storm.load(f"bad-{case}", f"bad-{case}")
            assert status == 400, f"{bad}: {status} {code}"
            assert not (place / "ran").exists(), f"{bad}: its code ran"
            shutil.rmtree(place, ignore_errors=True)

        return run

    return {f"bad adapter, case {case}": make(case, found) for case, found in sorted(by_case.items())}


# -- clients


@kind("burst of 160")
async def burst(storm: Storm) -> None:
    entries = await asyncio.gather(*(storm.client.send(job_of(BASE, "burst")) for _ in range(160)))
    assert {entry.outcome for entry in entries} <= {Outcome.OK, Outcome.REFUSED}


@kind("clients that leave")
async def leavers(storm: Storm) -> None:
    job = job_of(BASE, "leaving", stream=True, max_tokens=100, ignore_eos=True)
    await asyncio.gather(*(storm.client.send(replace(job, leave_events=1 + number % 4)) for number in range(20)))


@kind("clients that leave before the answer")
async def early_leavers(storm: Storm) -> None:
    job = job_of(BASE, "leaving early", max_tokens=100, ignore_eos=True)
    await asyncio.gather(*(storm.client.send(replace(job, leave_seconds=storm.random.uniform(0, 0.1))) for _ in range(20)))


@kind("clients that ask again")
async def impatient(storm: Storm) -> None:
    job = job_of(BASE, "again", max_tokens=60, ignore_eos=True)
    await storm.client.send(replace(job, leave_seconds=0.01))
    entry = await storm.client.send(job)
    assert entry.outcome in (Outcome.OK, Outcome.REFUSED), entry.detail


@kind("readers that pause")
async def slow_readers(storm: Storm) -> None:
    job = replace(job_of(BASE, "slowly", stream=True, max_tokens=300, ignore_eos=True), pause_seconds=1.0)
    entries = await asyncio.gather(*(storm.client.send(job) for _ in range(4)))
    assert {entry.outcome for entry in entries} <= {Outcome.OK, Outcome.REFUSED}


def connect(storm: Storm) -> socket.socket:
    host, port = storm.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=5)


@kind("senders that stop")
async def slow_senders(storm: Storm) -> None:
    def run() -> list[socket.socket]:
        found = [connect(storm) for _ in range(20)]
        for number, connection in enumerate(found):
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"[: number * 3])
        return found

    for connection in await asyncio.to_thread(run):
        connection.close()


@kind("silent connections")
async def silent(storm: Storm) -> None:
    found = await asyncio.to_thread(lambda: [connect(storm) for _ in range(100)])
    await asyncio.sleep(0.2)
    for connection in found:
        connection.close()


@kind("bad requests")
async def bad_requests(storm: Storm) -> None:
    entries = [await storm.client.send(job) for job in bad_jobs(BASE, None)]
    assert {entry.outcome for entry in entries} == {Outcome.REFUSED}, [entry.detail for entry in entries]


@kind("junk names, paths and methods")
async def junk(storm: Storm) -> None:
    """No client can make a series of /metrics."""

    async def series() -> set[str]:
        page = (await storm.http.get("/metrics")).text
        return {line.rpartition(" ")[0] for line in page.splitlines() if not line.startswith("#")}

    before = await series()
    for number in range(20):
        name = f"junk-{storm.random.randrange(10**9)}"
        body = json.dumps({"model": name, "prompt": "x"}).encode()
        entry = await storm.client.send(Job(BASE, None, COMPLETIONS, body, expected=404))
        assert entry.outcome is Outcome.REFUSED, entry.detail
        answer = await storm.http.request(storm.random.choice(("PUT", "DELETE", "GET", "BREW")), f"/{name}/{number}")
        assert answer.status_code in (404, 405), answer.status_code
    after = await series()
    storm.num_series = max(storm.num_series, len(after))
    storm.grown += [
        line for line in sorted(after - before) if "junk" in line or "BREW" in line
    ]  # traffic goes on, and has series of its own


# -- adapters


@kind("reload under traffic")
async def reload(storm: Storm) -> None:
    for version in (2, 1, 2, 1):
        status, code = await storm.load(SWAPPED, f"{SWAPPED}-{version}")
        assert status == 200 or code in NO_ROOM, code
        storm.num_reloads += status == 200


@kind("weights that overflow")
async def overflow(storm: Storm) -> None:
    if not await is_loaded(storm, POISON):
        return
    for _ in range(3):
        entry = await storm.side.send(overflow_job())
        assert entry.detail in ("adapter_nonfinite_output", *NO_ROOM), (entry.outcome, entry.detail)


@kind("unload in use")
async def unload_in_use(storm: Storm) -> None:
    if not await is_loaded(storm, VICTIM):
        return
    job = job_of(VICTIM, "going", stream=True, max_tokens=200, ignore_eos=True)
    begun = [asyncio.create_task(storm.side.send(job)) for _ in range(3)]
    await asyncio.sleep(0.05)
    status, code = await storm.unload(VICTIM)
    assert status in (200, 409), (status, code)
    for entry in await asyncio.gather(*begun):
        assert entry.outcome in (Outcome.OK, Outcome.REFUSED) or "model_not_found" in entry.detail, entry.detail


async def is_loaded(storm: Storm, name: str) -> bool:
    """Load it; no room is no fault."""
    status, code = await storm.load(name, name)
    assert status == 200 or code in NO_ROOM, (status, code)
    return status == 200


# -- the disk


@kind("no space on the disk")
async def no_space(storm: Storm) -> None:
    """Caches are a help and no need: an adapter that cannot be cached is served."""
    async with storm.injected({"at": "write", "raise": "ENOSPC", "times": None}):
        for version in (2, 1):
            status, code = await storm.load(SWAPPED, f"{SWAPPED}-{version}")
            assert status == 200 or code in NO_ROOM, code


@kind("input error while reading")
async def input_error(storm: Storm) -> None:
    async with storm.injected({"at": "read", "raise": "EIO", "times": 2, "where": {"name": f"{VICTIM}/adapter"}}, allows=EVICTED):
        status, code = await storm.load(VICTIM, VICTIM)
        assert (status, code) == (400, "adapter_unreadable") or status == 200, (status, code)
    await is_loaded(storm, VICTIM)


EVICTED = ("adapter_unavailable", "model_not_found", "adapter_unreadable")  # one that a worker had read again at that moment


# -- the process


@kind("few file descriptors")
async def descriptors(storm: Storm) -> None:
    limits = resource.prlimit(storm.process.pid, resource.RLIMIT_NOFILE)
    found: list[socket.socket] = []
    close = storm.windows.open(*EVICTED)
    resource.prlimit(storm.process.pid, resource.RLIMIT_NOFILE, (storm.process.num_fds() + 8, limits[1]))
    try:
        with contextlib.suppress(OSError):
            found += await asyncio.to_thread(lambda: [connect(storm) for _ in range(16)])
        await asyncio.sleep(0.3)
    finally:
        resource.prlimit(storm.process.pid, resource.RLIMIT_NOFILE, limits)
        for connection in found:
            connection.close()
        await asyncio.sleep(1.1)  # asyncio looks again a second after an accept that failed
        close()


@kind("stopped and continued")
async def stopped(storm: Storm) -> None:
    storm.process.send_signal(signal.SIGSTOP)
    await asyncio.sleep(0.7)
    storm.process.send_signal(signal.SIGCONT)


@kind("SIGHUP")
async def hangup(storm: Storm) -> None:
    for _ in range(3):
        storm.process.send_signal(signal.SIGHUP)
        await asyncio.sleep(0.05)


@kind("SIGPIPE")
async def broken_pipe(storm: Storm) -> None:
    storm.process.send_signal(signal.SIGPIPE)


@kind("clock an hour off")
async def clock(storm: Storm) -> None:
    async with storm.injected({"at": "clock", "value": storm.random.choice((3600, -3600, -10 * 365 * 86400))}):
        await asyncio.sleep(0.7)


# -- the engine


async def fails(storm: Storm, job: Job, code: str) -> None:
    entry = await storm.client.send(job)
    assert entry.outcome is Outcome.REFUSED, f"{entry.outcome}, though a fault was injected: {entry.detail}"
    assert entry.detail in (code, "server_overloaded"), entry.detail


@kind("a row that cannot be drawn")
async def row_exception(storm: Storm) -> None:
    seed = storm.random.randrange(2**30)
    async with storm.injected({"at": "sample", "raise": "ZeroDivisionError", "times": None, "where": {"seed": seed}}, allows=()):
        close = storm.windows.open("internal_error")
        await fails(storm, job_of(BASE, "row", seed=seed), "internal_error")
        close()


@kind("a prompt that breaks the forward")
async def bad_prompt(storm: Storm) -> None:
    seed = storm.random.randrange(2**30)
    fault = {"at": "forward", "raise": "RuntimeError", "times": None, "where": {"seed": seed}}
    async with storm.injected(fault, allows=("internal_error",)):
        await fails(storm, job_of(BASE, "forward", seed=seed), "internal_error")


@kind("NaN from the base")
async def nan(storm: Storm) -> None:
    seed = storm.random.randrange(2**30)
    async with storm.injected({"at": "logits", "times": None, "where": {"seed": seed}}, allows=("internal_error",)):
        await fails(storm, job_of(BASE, "nan", seed=seed), "internal_error")


@kind("an adapter that breaks the forward")
async def bad_adapter_step(storm: Storm) -> None:
    if not await is_loaded(storm, SCAPEGOAT):
        return
    revision = (await storm.http.get(f"/v1/adapters/{SCAPEGOAT}")).json()["revision"]
    job = replace(job_of(SCAPEGOAT, "guilty"), expected=500)
    async with storm.injected({"at": "forward", "raise": "RuntimeError", "times": None, "where": {"adapter": revision}}):
        entry = await storm.side.send(job)
        assert entry.detail in ("internal_error", *NO_ROOM), (entry.outcome, entry.detail)
        if entry.detail == "internal_error":
            entry = await storm.side.send(job)
            assert entry.detail in ("adapter_quarantined", *NO_ROOM), entry.detail
    await is_loaded(storm, SCAPEGOAT)


@kind("no memory for a step")
async def no_memory(storm: Storm) -> None:
    """Halved, and nobody notices."""
    async with storm.injected({"at": "forward", "raise": "MemoryError"}):
        await asyncio.sleep(0.3)


@kind("no memory for the halves either")
async def no_memory_at_all(storm: Storm) -> None:
    async with storm.injected({"at": "forward", "raise": "MemoryError", "times": 3}, allows=("out_of_memory",)):
        await asyncio.sleep(0.3)


@kind("two steps that fail for everybody")
async def failed_steps(storm: Storm) -> None:
    """One less than what the engine is rebuilt for."""
    async with storm.injected({"at": "step", "raise": "RuntimeError", "times": 2}, allows=("internal_error",)):
        await asyncio.sleep(0.3)


@kind("a step that hangs")
async def hanging(storm: Storm) -> None:
    async with storm.injected({"at": "step", "sleep": 0.5}):
        await asyncio.sleep(0.7)


@kind("an upload that fails")
async def upload(storm: Storm) -> None:
    async with storm.injected({"at": "upload", "raise": "RuntimeError"}, allows=("internal_error", *EVICTED)):
        await asyncio.sleep(0.3)


@kind("memory runs short")
async def pressure(storm: Storm) -> None:
    async with storm.injected({"at": "memory", "value": 0.92, "times": None}, allows=("server_overloaded",)):
        await asyncio.sleep(1.2)


@kind("memory is nearly out")
async def readiness(storm: Storm) -> None:
    async with storm.injected({"at": "memory", "value": 0.97, "times": None}, allows=("not_ready",)):
        await asyncio.sleep(0.8)
        assert (await storm.http.get("/health/live")).status_code == 200
        assert (await storm.http.get("/health/ready")).status_code == 503
    await asyncio.sleep(0.6)


async def rebuild(storm: Storm) -> None:
    """Once in a run: a second time within ten minutes would end the process, as it should."""
    fault: dict[str, Any] = {"at": "step", "raise": "RuntimeError", "times": 3}
    async with storm.injected(fault, allows=("internal_error", "not_ready", "server_overloaded")):
        for _ in range(100):
            if (await storm.page()).total("moa_incidents_total", kind="rebuilt") == 1:
                break
            await asyncio.sleep(0.05)
        else:
            raise AssertionError("the engine was not rebuilt")
    storm.survived["an engine that is broken"] += 1
