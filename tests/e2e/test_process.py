"""The process: signals, what it does when the engine or memory fails, and how it ends. Faults are injected by MOA_SERVE_FAULTS."""

import concurrent.futures
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from servers import Running, running, write_adapters, write_talking_base

LONG: dict[str, Any] = {"model": "soft", "prompt": "a", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("process")
    write_talking_base(place / "base")
    write_adapters(place / "adapters", "soft", "sparse_fn")
    return place


@contextlib.contextmanager
def breakable(folder: Path, *flags: str, under: Sequence[str] = ()) -> Iterator[tuple[Running, Callable[..., None]]]:
    """A server, and what writes the faults that strike in it next."""
    file = folder / f"faults-{secrets.token_hex(4)}.json"

    def inject(*found: dict[str, Any]) -> None:
        file.with_suffix(".new").write_text(json.dumps([{"id": secrets.token_hex(4), **fault} for fault in found]))
        file.with_suffix(".new").replace(file)

    with running(folder, "--unsafe-test-hooks", *flags, env={"MOA_SERVE_FAULTS": str(file)}, under=under) as server:
        yield server, inject


@pytest.fixture(scope="module")
def shared(folder: Path) -> Iterator[tuple[Running, Callable[..., None]]]:
    """For what a server survives; with a quick watchdog, and as few descriptors as in case 51."""
    with breakable(folder, "--watchdog-seconds", "1.5", under=("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")) as found:
        yield found


Shared = tuple[Running, Callable[..., None]]


def ask(server: Running, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json={"model": "soft", "prompt": "a", "max_tokens": 4} | body, timeout=30)


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def health(server: Running, path: str = "live") -> int:
    return httpx.get(f"{server.url}/health/{path}").status_code


def metric(server: Running, series: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(series)), 0.0)


def until(is_so: Callable[[], bool], seconds: float = 15) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.02)


@pytest.mark.case(57, 60, 61, 62, 66)
def test_faults_of_a_step_are_answered_and_the_server_goes_on(folder: Path) -> None:
    with breakable(folder, "--queue-timeout-seconds", "5") as (server, inject):
        good = ask(server, temperature=0).json()["choices"]
        inject({"at": "forward", "raise": "MemoryError", "times": 2})
        answer = ask(server)
        assert code_of(answer) == (503, "out_of_memory")
        assert int(answer.headers["retry-after"]) >= 1
        inject({"at": "sample", "raise": "ZeroDivisionError", "where": {"seed": 5}, "times": 2})
        assert code_of(ask(server, seed=5)) == (500, "internal_error")
        inject({"at": "logits", "where": {"adapter": None}})
        assert code_of(ask(server, model="base")) == (500, "internal_error")
        assert metric(server, 'moa_incidents_total{kind="base_nonfinite"}') == 1
        sparse = ask(server, model="sparse_fn").json()["moa"]["revision"]
        inject({"at": "forward", "raise": "RuntimeError", "where": {"adapter": sparse}})
        assert code_of(ask(server, model="sparse_fn")) == (500, "internal_error")
        assert code_of(ask(server, model="sparse_fn")) == (503, "adapter_quarantined")
        load = {"lora_name": "sparse_fn", "lora_path": "sparse_fn"}
        assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=load).status_code == 200
        assert ask(server, model="sparse_fn").status_code == 200
        inject({"at": "forward", "raise": "RuntimeError", "times": None})
        for _ in range(3):
            assert code_of(ask(server)) == (500, "internal_error")
        inject()
        until(lambda: health(server, "ready") == 200, 5)
        assert ask(server, temperature=0).json()["choices"] == good
        assert metric(server, 'moa_incidents_total{kind="rebuilt"}') == 1
        assert health(server) == 200
        inject({"at": "forward", "raise": "RuntimeError", "times": None})
        for _ in range(3):
            assert code_of(ask(server)) == (500, "internal_error")
        assert server.process.wait(15) == 1


@pytest.mark.case(58)
def test_short_of_memory_it_sheds_and_then_is_not_ready(shared: Shared) -> None:
    server, inject = shared
    assert ask(server).status_code == 200
    assert "moa_memory_used_ratio" in httpx.get(f"{server.url}/metrics").text

    def item() -> dict[str, Any]:
        listed = httpx.get(f"{server.url}/v1/adapters").json()["data"]
        return next(found for found in listed if found["id"] == "soft")

    assert item()["bytes"] > 0
    inject({"at": "memory", "value": 0.91, "times": None})
    until(lambda: ask(server).status_code == 503)
    assert code_of(ask(server)) == (503, "server_overloaded")
    until(lambda: item()["bytes"] == 0)  # what was idle has left memory
    assert (health(server, "ready"), health(server)) == (200, 200)
    inject({"at": "memory", "value": 0.96, "times": None})
    until(lambda: health(server, "ready") == 503)
    assert health(server) == 200
    assert code_of(ask(server)) == (503, "not_ready")
    inject()
    until(lambda: health(server, "ready") == 200)
    assert ask(server).status_code == 200


@pytest.mark.case(58)
def test_a_limit_that_is_passed_already_is_said_by_readiness(folder: Path) -> None:
    command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", "0", "--device", "cpu"]
    log = folder / "limit.log"
    with log.open("wb") as out:
        process = subprocess.Popen([*command, "--memory-limit-bytes", str(2**20)], stdout=out, stderr=out, cwd=folder)
    try:
        until(lambda: '"starting"' in log.read_text(), 60)
        url = next(json.loads(line)["url"] for line in log.read_text().splitlines() if '"starting"' in line)
        until(lambda: _status(f"{url}/health/live") == 200)
        assert _status(f"{url}/health/ready") == 503
    finally:
        process.terminate()
        assert process.wait(20) == 0


def _status(url: str) -> int | None:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url).status_code
    return None


@pytest.mark.case(63, 65)
def test_an_engine_that_is_stuck_ends_the_process_with_70(folder: Path) -> None:
    with breakable(folder, "--watchdog-seconds", "1") as (server, inject):
        assert ask(server).status_code == 200
        inject({"at": "step", "sleep": 60})
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask, server)
            until(lambda: _status(f"{server.url}/health/live") == 503)
            assert code_of(waiting.result(10)) == (500, "internal_error")
        assert server.process.wait(10) == 70
        log = server.log_file.read_text()
        assert "stack of moa-engine" in log
        assert "faults.active.strike" in log


@pytest.mark.case(65, 70)
def test_a_blocked_loop_is_counted_and_a_stopped_process_is_not_taken_for_one(shared: Shared) -> None:
    """Deadlines count time that the process had: SIGSTOP must not look like a hang to the watchdog, nor to clients that wait."""
    stalls = 'moa_event_loop_stalls_total{longer_than="1"}'
    server, inject = shared
    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}, timeout=30) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGSTOP)
        time.sleep(5)
        server.process.send_signal(signal.SIGCONT)
        assert "data: [DONE]" in list(lines)
    assert health(server) == 200
    assert metric(server, stalls) == 0
    inject({"at": "loop", "sleep": 1.6})
    until(lambda: metric(server, stalls) == 1)
    assert "the event loop is blocked" in server.log_file.read_text()
    assert ask(server).status_code == 200


@pytest.mark.case(51)
def test_health_answers_while_all_descriptors_are_taken(shared: Shared) -> None:
    """A thousand silent connections at a limit of 256: the longest silent one makes room, so nobody is shut out for long."""
    server, _ = shared
    address = (server.url.rpartition("/")[2].partition(":")[0], int(server.url.rpartition(":")[2]))
    idle: list[socket.socket] = []
    try:
        for number in range(1000):
            with contextlib.suppress(OSError):
                idle.append(socket.create_connection(address, timeout=1))
                time.sleep(0.002)  # the kernel queues 64, and whom it drops asks again a second later
            if number % 250 == 249:
                until(lambda: _status(f"{server.url}/health") == 200)
        assert len(idle) > 500
        assert ask(server).status_code == 200
    finally:
        for connection in idle:
            connection.close()
    until(lambda: ask(server).status_code == 200)


@pytest.mark.case(68)
def test_a_second_signal_ends_it_at_once(folder: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with running(folder) as server, httpx.stream("POST", f"{server.url}/v1/completions", json=LONG | {"stream": True}) as answer:
            next(answer.iter_lines())
            server.process.send_signal(signal.SIGSTOP)  # so that 400 tokens are not over between the two
            server.process.send_signal(number)
            server.process.send_signal(signal.SIGCONT)
            until(lambda server=server: '"draining"' in server.log_file.read_text())  # type: ignore[misc]
            started = time.monotonic()
            server.process.send_signal(number)
            assert server.process.wait(10) == 143
            assert time.monotonic() - started < 2


@pytest.mark.case(68)
def test_a_pipe_that_nobody_reads_ends_nothing(shared: Shared) -> None:
    server, _ = shared
    server.process.send_signal(signal.SIGPIPE)
    assert ask(server).status_code == 200


@pytest.mark.case(83)
def test_a_log_that_cannot_be_written_stops_nothing(folder: Path) -> None:
    """Standard error is a pipe whose reader is gone."""
    command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=folder, text=True)
    try:
        assert process.stderr is not None
        url = next(json.loads(line)["url"] for line in process.stderr if '"starting"' in line)
        process.stderr.close()
        until(lambda: _status(f"{url}/health/ready") == 200)
        for _ in range(3):
            assert httpx.post(f"{url}/v1/completions", json={"model": "base", "prompt": "a"}).status_code == 200
    finally:
        process.terminate()
        assert process.wait(20) == 0


@pytest.mark.case(69)
@pytest.mark.parametrize("what", ["loading", "starting", "unloading"])
def test_sigterm_while_something_is_under_way(folder: Path, what: str) -> None:
    """It ends within five seconds; a load that was not answered has not happened."""
    if what == "starting":
        command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", "0"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder)
        time.sleep(2.5)
        process.terminate()
        assert process.wait(5) in (0, -signal.SIGTERM)
        return
    with breakable(folder) as (server, inject), concurrent.futures.ThreadPoolExecutor(2) as pool:
        if what == "loading":
            inject({"at": "read", "sleep": 30, "where": {"name": "adapter.safetensors"}})
            body, path = {"lora_name": "late", "lora_path": "soft"}, "load_lora_adapter"
        else:
            body, path = {"lora_name": "soft"}, "unload_lora_adapter"
            assert ask(server).status_code == 200
        waiting = pool.submit(httpx.post, f"{server.url}/v1/{path}", json=body, timeout=30)
        if what == "loading":
            until(lambda: "strikes at read" in server.log_file.read_text())
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
        assert time.monotonic() - started < 5
        with contextlib.suppress(httpx.TransportError):
            assert waiting.result(10).status_code in ((503,) if what == "loading" else (200, 503))


@pytest.mark.case(71)
def test_killed_at_any_moment_it_starts_again(folder: Path, tmp_path: Path) -> None:
    """Five times here, twenty in the soak. What it leaves behind does not hinder the next one."""
    env = {"MOA_CACHE_DIR": str(tmp_path / "cache")}
    for delay in (0, 0.05, 0.2):
        with running(folder, env=env) as server, concurrent.futures.ThreadPoolExecutor(4) as pool:
            work = [pool.submit(ask, server, model=model, max_tokens=300, ignore_eos=True) for model in ("soft", "sparse_fn")]
            time.sleep(delay)
            server.process.kill()
            server.process.wait(10)
            for answer in work:
                with contextlib.suppress(httpx.TransportError):
                    answer.result(10)
    started = time.monotonic()
    with running(folder, env=env) as server:
        assert time.monotonic() - started < 30
        assert ask(server).status_code == ask(server, model="sparse_fn").status_code == 200


@pytest.mark.case(72)
def test_a_base_that_is_cut_short_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "base", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    with weights.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(weights.stat().st_size // 2)
    command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(tmp_path / "base"), "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.case(74)
def test_threads_are_bounded_and_nothing_is_forked(folder: Path) -> None:
    """Two threads of one core only wait for each other, and a fork would have none of them."""
    with running(folder, env={"OMP_NUM_THREADS": ""}) as server:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert {answer.status_code for answer in pool.map(lambda _: ask(server, max_tokens=30), range(24))} == {200}
        process = psutil.Process(server.process.pid)
        cores = len(os.sched_getaffinity(0))
        # The loop, the engine, the watchdog; torch's and the library's, each one a core; readers of files, as many as Python gives.
        assert process.num_threads() <= 3 + 3 * cores + min(32, cores + 4)
        assert process.children() == []


def test_faults_are_refused_without_the_flag(folder: Path) -> None:
    """A variable that somebody forgot must not break what people use."""
    command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", "0"]
    env = {**os.environ, "MOA_SERVE_FAULTS": str(folder / "any.json")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=env)
    assert done.returncode == 2
    assert "--unsafe-test-hooks" in done.stderr
