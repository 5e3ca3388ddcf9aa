"""The real process, spoken to with the real OpenAI client."""

import concurrent.futures
import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from families import write_family
from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families
from servers import TALKING, Running, running, write_adapters, write_talking_base

from moa_serve import LLM, SamplingParams

FAMILIES = ("soft", "sparse_fn", "instance")
PROMPTS = ["hello there", "one two three", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("server")
    write_talking_base(place / "base")
    write_adapters(place / "adapters", *FAMILIES)
    return place


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[tuple[str | None, str], str]:
    """What LLM says: greedy text by adapter and prompt."""
    with LLM(folder / "base", adapters={name: folder / "adapters" / name for name in FAMILIES}, device="cpu", kv_cache_bytes=2**22) as llm:
        params = SamplingParams(temperature=0, max_tokens=12)
        jobs = [(name, prompt) for name in (*FAMILIES, None) for prompt in PROMPTS]
        found = llm.generate([prompt for _, prompt in jobs], params, adapter=[name for name, _ in jobs])
        return {job: completion.text for job, completion in zip(jobs, found, strict=True)}


def model_of(name: str | None) -> str:
    return name or "base"


def complete(client: OpenAI, name: str | None, prompt: str, **more: Any) -> Any:
    return client.completions.create(model=model_of(name), prompt=prompt, temperature=0, max_tokens=12, **more)


def test_models_are_the_base_and_every_adapter(client: OpenAI) -> None:
    listed = {model.id: model for model in client.models.list().data}
    assert set(listed) == {"base", *FAMILIES}
    assert {name: getattr(model, "parent", None) for name, model in listed.items()} == {"base": None} | dict.fromkeys(FAMILIES, "base")
    assert client.models.retrieve("soft").id == "soft"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nobody")


def test_every_adapter_answers_as_in_python_alone_and_all_at_once(client: OpenAI, expected: dict[tuple[str | None, str], str]) -> None:
    for (name, prompt), text in expected.items():
        assert complete(client, name, prompt).choices[0].text == text
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        jobs = list(expected) * 3
        answers = list(pool.map(lambda job: complete(client, *job).choices[0].text, jobs))
    assert answers == [expected[job] for job in jobs]


def test_a_stream_is_the_same_text_and_ends_with_usage(client: OpenAI, expected: dict[tuple[str | None, str], str]) -> None:
    for (name, prompt), text in expected.items():
        chunks = list(complete(client, name, prompt, stream=True, stream_options={"include_usage": True}))
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens >= 1
        assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] in ("stop", "length")


def test_chat_uses_the_bases_template(client: OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hi </s>"}]
    answer = client.chat.completions.create(model="soft", messages=messages, temperature=0, max_tokens=8, logprobs=True, top_logprobs=2)
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert len(content[0].top_logprobs) == 2
    # <s>user: hi </s></s><s>assistant: with the user's own </s> as four plain bytes
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("user: hi </s>assistant: ") + 3
    stream = client.chat.completions.create(model="soft", messages=messages, temperature=0, max_tokens=8, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answer.choices[0].message.content


def test_n_seeds_and_logprobs(client: OpenAI) -> None:
    def ask() -> Any:
        return client.completions.create(model="soft", prompt=["ab", "c"], n=2, seed=7, max_tokens=5, temperature=1, logprobs=2)

    first, second = ask(), ask()
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert first.choices[0].text != first.choices[1].text
    for choice in first.choices:
        assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == len(choice.logprobs.text_offset)


def test_echo_scores_a_prompt(client: OpenAI) -> None:
    answer = client.completions.create(model="soft", prompt="hello", echo=True, max_tokens=0, logprobs=1)
    assert answer.choices[0].text == "hello"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])


def test_a_stop_string_across_tokens_ends_the_text(client: OpenAI, expected: dict[tuple[str | None, str], str]) -> None:
    text = expected["soft", "x"]
    stop = text[2:4]
    answer = complete(client, "soft", "x", stop=[stop])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    streamed = "".join(chunk.choices[0].text for chunk in complete(client, "soft", "x", stop=[stop], stream=True))
    assert streamed == answer.choices[0].text


def logged(server: Running, request_id: str) -> dict[str, Any]:
    """The log's line of a request; it is written right after the answer."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for line in server.log():
            if line.get("request_id") == request_id:
                return line
        time.sleep(0.02)
    raise AssertionError(f"no line of request {request_id} in the log")


def test_answers_tell_revision_and_timings(server: Running) -> None:
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "soft", "prompt": "a"}, headers={"x-request-id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    moa = answer.json()["moa"]
    assert len(moa["revision"]) == 64
    assert moa["revision"][:12] in answer.json()["system_fingerprint"]
    assert set(moa["timings"]) >= {"queue", "prefill", "first_token", "decode", "tokens_per_second"}
    line = logged(server, "mine-1")
    assert line["timings"].keys() == moa["timings"].keys()
    pinned = {"model": "soft", "prompt": "a", "moa": {"revision": moa["revision"]}}
    assert httpx.post(f"{server.url}/v1/completions", json=pinned).status_code == 200
    stale = httpx.post(f"{server.url}/v1/completions", json=pinned | {"moa": {"revision": "0" * 64}})
    assert (stale.status_code, stale.json()["error"]["code"]) == (404, "revision_not_found")


@pytest.mark.case(75)
def test_an_adapter_is_loaded_and_unloaded_under_traffic(server: Running, client: OpenAI, folder: Path) -> None:
    """In-flight requests keep their revision; new ones are told that the name is gone; everyone else sees nothing."""
    stop = threading.Event()
    failures: list[str] = []

    def traffic() -> None:
        while not stop.is_set():
            answer = httpx.post(
                f"{server.url}/v1/completions", json={"model": "sparse_fn", "prompt": "abc", "max_tokens": 6, "temperature": 0}
            )
            if answer.status_code != 200:
                failures.append(answer.text)

    threads = [threading.Thread(target=traffic) for _ in range(2)]
    for thread in threads:
        thread.start()
    write_family(folder / "adapters" / "late", "molora", 9, TALKING)
    body = {"lora_name": "late", "lora_path": "late"}
    loaded = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body)
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'late' added successfully.")
    assert complete(client, "late", "x").choices[0].text
    again = httpx.post(f"{server.url}/v1/load_lora_adapter", json=body)
    assert again.status_code == 400
    assert "load_inplace" in again.json()["error"]["message"]
    with client.completions.create(
        model="late", prompt="y", max_tokens=150, temperature=0, stream=True, extra_body={"ignore_eos": True}
    ) as stream:
        first = next(iter(stream))
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            unloading = pool.submit(httpx.post, f"{server.url}/v1/unload_lora_adapter", json={"lora_name": "late"}, timeout=60)
            while (
                not unloading.done()
                and httpx.post(f"{server.url}/v1/completions", json={"model": "late", "prompt": "z"}).status_code == 200
            ):
                time.sleep(0.01)
            rest = list(stream)
            assert rest[-1].choices[0].finish_reason == "length"
            assert first.system_fingerprint == rest[-1].system_fingerprint
            gone = unloading.result()
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'late' removed successfully.")
    with pytest.raises(openai.NotFoundError):
        complete(client, "late", "x")
    assert "late" not in {model.id for model in client.models.list().data}
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    shutil.rmtree(folder / "adapters" / "late")


def test_fifty_broken_adapters_beside_good_traffic(server: Running, client: OpenAI, folder: Path) -> None:
    for index in range(25):
        place = folder / "adapters" / f"broken{index}"
        place.mkdir()
        (place / "adapter.json").write_text("{" * index)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        bad = [
            pool.submit(httpx.post, f"{server.url}/v1/load_lora_adapter", json={"lora_name": f"broken{i}", "lora_path": f"broken{i}"})
            for i in range(25)
        ]
        asked = [pool.submit(httpx.post, f"{server.url}/v1/completions", json={"model": f"broken{i}", "prompt": "a"}) for i in range(25)]
        good = [pool.submit(complete, client, "soft", "abc") for _ in range(20)]
        assert {future.result().status_code for future in bad} == {400}
        assert {future.result().status_code for future in asked} == {404}
        assert len({future.result().choices[0].text for future in good}) == 1
    for index in range(25):
        shutil.rmtree(folder / "adapters" / f"broken{index}")


def gauges(server: Running) -> dict[str, float]:
    families = text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text)
    return {
        sample.name: sample.value
        for family in families
        for sample in family.samples
        if family.name.startswith(("vllm:num_requests", "vllm:kv_cache"))
    }


@pytest.mark.case(49)
def test_a_client_that_leaves_frees_its_row(server: Running) -> None:
    body = json.dumps({"model": "soft", "prompt": "abc", "max_tokens": 480, "ignore_eos": True, "stream": True, "temperature": 0}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    for wait_for_bytes in (True, False):
        with socket.create_connection((host, int(port))) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            connection.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
            if wait_for_bytes:
                assert b"200" in connection.recv(64)
        deadline = time.monotonic() + 10
        while gauges(server)["vllm:num_requests_running"] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert gauges(server)["vllm:num_requests_running"] == 0
        assert gauges(server)["vllm:num_requests_waiting"] == 0
        assert gauges(server)["vllm:kv_cache_usage_perc"] == 0


@pytest.mark.case(51)
def test_idle_connections_do_not_shut_out_those_who_ask(folder: Path) -> None:
    """Beyond the limit the longest silent one makes room, so health answers however many there are."""
    with running(folder, "--max-connections", "10") as server:
        host, port = server.url.removeprefix("http://").split(":")
        idle = [socket.create_connection((host, int(port))) for _ in range(60)]
        try:
            for _ in range(5):
                assert httpx.get(f"{server.url}/health").status_code == 200
            assert httpx.post(f"{server.url}/v1/completions", json={"model": "soft", "prompt": "a"}).status_code == 200
            idle[0].settimeout(5)
            with contextlib.suppress(ConnectionResetError):
                assert idle[0].recv(1) == b""
        finally:
            for connection in idle:
                connection.close()


def test_an_adapter_cannot_be_called_like_the_rest_in_metrics(server: Running, folder: Path) -> None:
    write_family(folder / "adapters" / "other", "soft", 3, TALKING)
    body = {"lora_name": "other", "lora_path": "other"}
    assert httpx.post(f"{server.url}/v1/load_lora_adapter", json=body).json()["error"]["code"] == "adapter_name_invalid"
    assert httpx.post(f"{server.url}/v1/completions", json={"model": "other", "prompt": "a"}).status_code == 404
    shutil.rmtree(folder / "adapters" / "other")


@pytest.mark.case(68)
def test_sighup_finds_new_adapters(server: Running, folder: Path) -> None:
    write_family(folder / "adapters" / "fresh", "lora", 4, TALKING)
    server.process.send_signal(signal.SIGHUP)
    # It is taken for half a copy at first; the watch looks again after two seconds, or twenty times as long as its last look took.
    deadline = time.monotonic() + 60
    while "fresh" not in httpx.get(f"{server.url}/v1/models").text and time.monotonic() < deadline:
        time.sleep(0.02)
    assert "fresh" in httpx.get(f"{server.url}/v1/models").text
    shutil.rmtree(folder / "adapters" / "fresh")


@pytest.mark.case(67)
def test_sigterm_drains_and_exits_with_zero(folder: Path) -> None:
    with running(folder) as server:
        with httpx.stream(
            "POST",
            f"{server.url}/v1/completions",
            json={"model": "soft", "prompt": "a", "max_tokens": 300, "ignore_eos": True, "stream": True},
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 5
            while httpx.get(f"{server.url}/health/ready").status_code != 503 and time.monotonic() < deadline:
                time.sleep(0.01)
            refused = httpx.post(f"{server.url}/v1/completions", json={"model": "soft", "prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert "data: [DONE]" in list(lines)
        assert server.process.wait(40) == 0
        assert "Traceback" not in server.log_file.read_text()


@pytest.mark.case(72)
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--port", "not-a-number"], "port"),
        (["--host", "0.0.0.0"], "key"),
        (["--model", "/does/not/exist"], "/does/not/exist"),
        (["--max-waitng", "5"], "max-waitng"),
        (["--backend", "native", "--dtype", "float16"], "float16"),
        pytest.param(
            ["--device", "cuda"],
            "'cuda' was asked for, but ",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
)
def test_what_cannot_start_says_why_and_exits_with_two(folder: Path, flags: list[str], reason: str) -> None:
    command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.case(72)
def test_a_port_in_use_is_told_before_anything_is_loaded(server: Running, folder: Path) -> None:
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "moa_serve", "serve", "--model", str(folder / "base"), "--port", port]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 2
    assert "cannot be bound" in done.stderr
