"""What operators do with the real process: TLS, limits for each key, logs that cannot be written, a container, the drain."""

import concurrent.futures
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from agreement import Scrape
from certificates import write_certificate
from hostile import bearer, wait_until
from openai import OpenAI, RateLimitError
from servers import READY_SECONDS, Running, running, write_adapters, write_talking_base

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
LONG: dict[str, Any] = {"model": "soft", "prompt": "a", "max_tokens": 150, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("operating")
    write_talking_base(place / "base")
    write_adapters(place / "adapters", "soft")
    return place


def address(server: Running) -> tuple[str, int]:
    host, _, port = server.url.partition("://")[2].rpartition(":")
    return host, int(port)


# -- TLS


@pytest.fixture(scope="module")
def pair(folder: Path) -> tuple[Path, Path]:
    return write_certificate(folder, "server")


@pytest.fixture(scope="module")
def secure(folder: Path, pair: tuple[Path, Path]) -> Iterator[Running]:
    flags = ("--tls-cert", str(pair[0]), "--tls-key", str(pair[1]), "--header-timeout-seconds", "1")
    with running(folder, *flags, trusts=pair[0]) as started:
        yield started


@needs_openssl
@pytest.mark.case(91)
class TestTls:
    def test_everything_is_served_over_it(self, secure: Running, pair: tuple[Path, Path]) -> None:
        assert secure.url.startswith("https://127.0.0.1:")
        with httpx.Client(verify=ssl.create_default_context(cafile=pair[0]), base_url=secure.url) as http:
            body = {"model": "soft", "prompt": "a", "max_tokens": 20, "stream": True}
            with http.stream("POST", "/v1/completions", json=body) as stream:
                assert [line for line in stream.iter_lines() if line][-1] == "data: [DONE]"
            refused = http.post("/v1/completions", content=b"x" * 5_000_000, headers={"Content-Type": "application/json"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "body_too_large")
            assert http.post("/v1/completions", json={"model": "soft", "prompt": "a"}, headers={"Origin": secure.url}).status_code == 200

    def test_without_it_nothing_is(self, secure: Running) -> None:
        plain = secure.url.replace("https", "http")
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{plain}/health")

    def test_old_versions_are_refused(self, secure: Running) -> None:
        def version(**limits: Any) -> str | None:
            context = ssl._create_unverified_context()
            for name, value in limits.items():
                setattr(context, name, value)
            context.set_ciphers("ALL:@SECLEVEL=0")
            with socket.create_connection(address(secure)) as raw, context.wrap_socket(raw) as wrapped:
                return wrapped.version()

        assert version() == "TLSv1.3"
        assert version(maximum_version=ssl.TLSVersion.TLSv1_2) == "TLSv1.2"
        with pytest.warns(DeprecationWarning, match="TLS"), pytest.raises(ssl.SSLError):
            version(minimum_version=ssl.TLSVersion.TLSv1, maximum_version=ssl.TLSVersion.TLSv1_1)

    @pytest.mark.case(46)
    def test_who_begins_no_handshake_is_cut(self, secure: Running) -> None:
        """asyncio would wait for a minute."""
        with socket.create_connection(address(secure)) as silent:
            silent.settimeout(15)
            with contextlib.suppress(ConnectionResetError):
                assert silent.recv(1) == b""

    def test_a_renewed_certificate_is_taken_at_sighup_and_a_broken_one_is_not(self, secure: Running, pair: tuple[Path, Path]) -> None:
        def served() -> str:
            return ssl.get_server_certificate(address(secure))

        before = served()
        cert, key = write_certificate(pair[0].parent, "renewed")
        kept = [path.read_bytes() for path in pair]
        pair[0].write_text("half of a file")
        secure.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "the certificate in use is kept" in secure.log_file.read_text())
        assert served() == before
        for path, source in zip(pair, (cert, key), strict=True):
            path.write_bytes(source.read_bytes())
        secure.process.send_signal(signal.SIGHUP)
        wait_until(lambda: served() != before)
        assert served().split() == cert.read_text().split()
        for path, data in zip(pair, kept, strict=True):
            path.write_bytes(data)

    def test_what_cannot_be_used_ends_the_start_in_one_line(self, folder: Path, pair: tuple[Path, Path]) -> None:
        """Before torch is loaded: whoever mistypes a path waits for it."""
        other = write_certificate(folder, "other")[1]
        ended = write_certificate(folder, "ended", days=-1)
        for cert, key, reason in (
            (folder / "no.pem", pair[1], "cannot be read"),
            (*ended, "expired"),
            (pair[0], other, "another certificate"),
        ):
            command = [sys.executable, "-m", "moa_serve", "serve", "--tls-cert", str(cert), "--tls-key", str(key)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
            assert done.returncode == 2
            assert reason in done.stderr
            assert len(done.stderr.splitlines()) == 1

    def test_an_open_key_is_warned_of_in_the_log(self, folder: Path) -> None:
        cert, key = write_certificate(folder, "open")
        key.chmod(0o644)
        with running(folder, "--tls-cert", str(cert), "--tls-key", str(key), trusts=cert) as server:
            assert [line for line in server.log() if line["level"] == "warning" and "0644" in line.get("message", "")]


# -- keys and settings


@pytest.mark.case(54)
def test_a_key_that_floods_is_limited_and_others_are_served(folder: Path) -> None:
    """By requests and by the tokens that they really had; told as OpenAI's client expects it."""
    flags = ("--api-key", "first", "--api-key", "second", "--key-requests-per-minute", "20", "--key-tokens-per-minute", "400")
    with running(folder, *flags) as server:
        first, second = (OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in ("first", "second"))

        def ask(client: OpenAI, tokens: int) -> int:
            answer = client.completions.with_raw_response.create(
                model="soft", prompt="x" * 9, max_tokens=tokens, extra_body={"ignore_eos": True}
            )
            return int(answer.headers["x-ratelimit-remaining-tokens"])

        left = [ask(first, 41), ask(first, 1)]  # 50 are charged when the answer has ended, so the next one tells
        assert 340 <= left[1] <= 351 < left[0]
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            flood = [pool.submit(ask, first, 1) for _ in range(60)]
            served = [pool.submit(ask, second, 1) for _ in range(10)]
            errors = [future.exception() for future in flood]
            assert [future.exception() for future in served] == [None] * 10
        limited = [error for error in errors if isinstance(error, RateLimitError)]
        assert 40 <= len(limited) <= 43
        assert len(limited) + errors.count(None) == 60
        assert limited[0].code == "rate_limit_exceeded"
        assert int(limited[0].response.headers["retry-after"]) >= 1
        assert ask(second, 400) <= 320
        with pytest.raises(RateLimitError, match="400 tokens a minute"):
            ask(second, 1)
        assert httpx.get(f"{server.url}/v1/models", headers=bearer("first")).status_code == 200


@pytest.mark.case(88)
def test_the_first_line_tells_the_settings_and_no_secret_is_anywhere(folder: Path) -> None:
    config = folder / "moa.toml"
    config.write_text("max_waiting = 9\napi_key = ['file-secret']\n")
    env = {"MOA_ADMIN_KEY": "admin-secret", "MOA_MAX_STOPS": "3", "MOA_LOG_LEVEL": "debug"}
    with running(folder, "--config", str(config), env=env) as server:
        for key in ("file-secret", "admin-secret", "wrong-secret"):
            for query in ("", f"?api_key={key}"):
                httpx.get(f"{server.url}/v1/models{query}", headers=bearer(key))
            body = {"model": "soft", "prompt": "prompt-secret " * 3, "max_tokens": 5, "user": "me"}
            httpx.post(f"{server.url}/v1/completions", json=body, headers=bearer(key))
            httpx.post(f"{server.url}/v1/completions", json=body | {"max_tokens": "prompt-secret"}, headers=bearer(key))
        (line,) = [line for line in server.log() if line.get("event") == "settings"]
        assert line["given"]["max_waiting"] == {"value": 9, "from": str(config)}
        assert line["given"]["admin_key"] == {"value": "(hidden)", "from": "MOA_ADMIN_KEY"}
        assert line["given"]["adapters_dir"] == {"value": str(folder / "adapters"), "from": "flag"}
        assert "host" not in line["given"]
        warned = [line["message"] for line in server.log() if line["level"] == "warning" and "message" in line]
        assert [message for message in warned if "MOA_MAX_STOPS is no setting (did you mean MOA_MAX_STOP?)" in message]
        text = server.log_file.read_text()
        for secret in ("file-secret", "admin-secret", "wrong-secret", "prompt-secret", "Authorization", "Bearer"):
            assert secret not in text


# -- a log that cannot be written


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def unheard(folder: Path, **streams: Any) -> Iterator[str]:
    """The URL of a server whose log nobody can read."""
    port = free_port()
    command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", str(port), "--device", "cpu"]
    command += ["--kv-cache-bytes", str(2**22), "--adapters-dir", str(folder / "adapters"), "--log-level", "debug"]
    process = subprocess.Popen(command, cwd=folder, **streams)
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"{url}/health/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        wait_until(is_ready, READY_SECONDS)
        yield url
        process.terminate()
        assert process.wait(40) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(10)


@pytest.mark.case(83)
@pytest.mark.parametrize("kind", ["full disk", "full pipe", "closed"])
def test_a_log_that_cannot_be_written_stops_nobody(folder: Path, kind: str) -> None:
    """A full disk, a collector that hangs, or `>&- 2>&-`: where a line of the log can wait, all requests wait with it."""
    with contextlib.ExitStack() as stack:
        if kind == "full disk":
            full = stack.enter_context(open("/dev/full", "wb"))
            streams: dict[str, Any] = {"stdout": full, "stderr": full}
        elif kind == "full pipe":
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            stack.callback(os.close, writer)
            os.set_blocking(writer, False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(writer, b"x" * 4096)
            os.set_blocking(writer, True)
            streams = {"stdout": writer, "stderr": writer}
        else:
            streams = {"preexec_fn": lambda: os.closerange(0, 3)}
        url = stack.enter_context(unheard(folder, **streams))
        for _ in range(20):
            assert httpx.post(f"{url}/v1/completions", json={"model": "soft", "prompt": "a"}).status_code == 200
            assert httpx.get(f"{url}/nothing").status_code == 404


# -- a container


IN_CONTAINER = """
    import json, os, subprocess, sys, time, urllib.request

    base, adapters, cache = sys.argv[1:]
    try:
        open(os.path.join(os.path.dirname(base), "written"), "w")
    except OSError:
        pass
    else:
        sys.exit("the root can be written to")
    assert os.getuid() == 10001
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ["PYTHONPATH"], "MOA_CACHE_DIR": cache, "MOA_API_KEY": "key"}
    command = [sys.executable, "-m", "moa_serve", "serve", "--model", base, "--adapters-dir", adapters, "--host", "0.0.0.0"]
    command += ["--port", "8123", "--device", "cpu", "--kv-cache-bytes", "4194304"]
    server = subprocess.Popen(command, env=environment, cwd="/")

    def ask(path, body=None):
        headers = {"Authorization": "Bearer key", "Content-Type": "application/json"}
        request = urllib.request.Request("http://127.0.0.1:8123" + path, body and json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=20).read()

    for _ in range(600):
        try:
            ask("/health/ready")
            break
        except OSError:
            assert server.poll() is None
            time.sleep(0.1)
    for model in ("base", "soft"):
        answer = json.loads(ask("/v1/completions", {"model": model, "prompt": "a", "max_tokens": 3}))
        assert answer["usage"]["completion_tokens"] > 0
    assert b"moa_requests_total" in ask("/metrics")
    server.terminate()
    assert server.wait(40) == 0
    print("smoke test passed")
"""


def _open_to_others(place: Path) -> str:
    """Shell commands that show `place` to other users where a folder above it is closed to them, as root's home is."""
    closed = next((folder for folder in reversed(place.parents) if not folder.stat().st_mode & 0o001), None)
    if closed is None:
        return ""
    commands = ["mount -t tmpfs -o mode=755 tmpfs /mnt", "mkdir /mnt/python", f"mount --bind '{place}' /mnt/python"]
    commands += [f"mount -t tmpfs -o mode=755 tmpfs '{closed}'", f"mkdir -p '{place}'", f"mount --bind /mnt/python '{place}'"]
    return "; ".join(commands)


@pytest.mark.case(90)
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("setpriv"), reason="needs root, unshare, setpriv")
def test_it_runs_as_in_a_locked_container(folder: Path) -> None:
    """What docker/compose.yaml asks for: another user without capabilities, a root that cannot be written, no network but its own."""
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to others, again and again
        shutil.copytree(folder, Path(place) / "server", ignore=shutil.ignore_patterns("*.log"))
        _run_locked(Path(place) / "server")


def _run_locked(folder: Path) -> None:
    if subprocess.run(["unshare", "--mount", "--net", "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not allowed here")
    script = folder / "smoke.py"
    script.write_text(textwrap.dedent(IN_CONTAINER))
    cache = folder / "cache"
    cache.mkdir()
    for place in (folder.parent, folder, *folder.rglob("*")):
        place.chmod(0o755)
    locked = "setpriv --reuid 10001 --regid 10001 --clear-groups --inh-caps=-all --bounding-set=-all --no-new-privs"
    shell = f"""
        set -e
        ip link set lo up
        {_open_to_others(Path(sys.base_prefix))}
        mount --bind '{folder}' '{folder}'
        mount -o remount,ro,bind '{folder}'
        mount -o remount,ro,bind /
        mount -t tmpfs -o size=64m,mode=1777 tmpfs '{cache}'
        exec {locked} '{sys.executable}' '{script}' '{folder}/base' '{folder}/adapters' '{cache}'
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["unshare", "--mount", "--net", "sh", "-c", shell], capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert "smoke test passed" in done.stdout
    assert "Traceback" not in done.stderr


# -- the drain


@pytest.mark.case(67)
def test_fifty_streams_end_whole_while_nothing_new_is_taken(folder: Path) -> None:
    with running(folder, "--max-num-seqs", "50") as server, contextlib.ExitStack() as stack:
        idle = stack.enter_context(socket.create_connection(address(server)))
        client = stack.enter_context(httpx.Client(base_url=server.url, limits=httpx.Limits(max_connections=60), timeout=60))
        streams = [stack.enter_context(client.stream("POST", "/v1/completions", json=LONG)) for _ in range(50)]
        lines = [stream.iter_lines() for stream in streams]
        assert [next(line).startswith("data: ") for line in lines] == [True] * 50
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: client.get("/health/ready").status_code == 503)
        refused = client.get("/health/ready")
        assert (refused.json()["error"]["code"], int(refused.headers["retry-after"]) >= 1) == ("draining", True)
        assert client.get("/health/live").status_code == 200
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter"):
            late = client.post(path, json={"model": "soft", "prompt": "a"})
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert Scrape(client.get("/metrics").text).by("moa_ready") == {(): 0}
        rest = [list(line) for line in lines]
        assert [line[-2] for line in rest] == ["data: [DONE]"] * 50 or [line[-1] for line in rest] == ["data: [DONE]"] * 50
        assert server.process.wait(40) == 0
        idle.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            assert idle.recv(1) == b""


@pytest.mark.case(67)
def test_what_does_not_end_in_time_ends_with_an_error(folder: Path) -> None:
    """A stream that breaks off without a word is taken for a whole answer by many."""
    with running(folder, "--drain-seconds", "0.1", "--kv-cache-bytes", str(2**24)) as server:
        body = LONG | {"n": 8, "prompt": ["a"] * 4, "max_tokens": 500}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert server.process.wait(40) == 0
        error = json.loads(rest[-1].removeprefix("data: "))["error"]
        assert (error["type"], error["code"]) == ("server_error", "draining")


def test_an_idle_server_waits_for_nobody(folder: Path) -> None:
    with running(folder, "--drain-seconds", "3600") as server:
        assert server.stop() == 0
