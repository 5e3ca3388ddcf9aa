"""An adapter made smaller under traffic: ask what nobody uses, try it, prune it, reload it, with the real process and the real command."""

import concurrent.futures
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from servers import Running, running, write_adapters, write_talking_base

PROMPTS = [f"{word} and what comes after it" for word in ("one", "two", "three", "four")]


def answers(server: Running, **more: Any) -> list[tuple[str, list[float]]]:
    """Texts and log-probabilities."""
    found = []
    for prompt in PROMPTS:
        body = {"model": "sparse_fn", "prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "logprobs": 0} | more
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert response.status_code == 200, response.text
        choice = response.json()["choices"][0]
        found.append((choice["text"], choice["logprobs"]["token_logprobs"]))
    return found


def stream_until(server: Running, is_over: threading.Event, number: int) -> tuple[int, set[str]]:
    """(streams that ended well, revisions that gave them) of a client that asks again and again."""
    count, revisions = 0, set()
    while not is_over.is_set():
        body = {"model": "sparse_fn", "prompt": f"{number} {count} " * 8, "max_tokens": 24, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert response.status_code == 200, lines
        assert lines[-1] == "[DONE]", lines[-1]
        revisions |= {piece["moa"]["revision"] for line in lines[:-1] if "moa" in (piece := json.loads(line))}
        count += 1
    return count, revisions


def test_an_adapter_is_made_smaller_under_traffic(tmp_path: Path) -> None:
    """Its answers are from then on those that were tried with the experts disabled, and no request hears of it."""
    write_talking_base(tmp_path / "base")
    write_adapters(tmp_path / "adapters", "sparse_fn")
    with running(tmp_path) as server, concurrent.futures.ThreadPoolExecutor(2) as pool:
        httpx.post(f"{server.url}/v1/adapters", json={"name": "sparse_fn"}).raise_for_status()
        is_over = threading.Event()
        clients = [pool.submit(stream_until, server, is_over, number) for number in range(2)]
        try:
            experts = f"{server.url}/v1/adapters/sparse_fn/experts"
            while httpx.get(experts).json().get("prune") is None:
                assert not any(client.done() for client in clients), [client.result() for client in clients if client.done()]
            told = httpx.get(experts, params={"max_selected": 0.3})
            prune = told.json()["prune"]
            assert prune["disable"], told.text
            own, tried = answers(server), answers(server, moa={"disable": prune["disable"]})
            assert own != tried, "the experts must matter, or this test shows nothing"
            command = [
                sys.executable,
                "-m",
                "moa_serve",
                "convert",
                "adapters/sparse_fn",
                "adapters/sparse_fn",
                "--model",
                "base",
                "--prune",
                "-",
            ]
            written = subprocess.run(command, cwd=tmp_path, input=told.text, capture_output=True, text=True, timeout=120)
            assert written.returncode == 0, written.stderr
            old = told.json()["revision"]
            reloaded = httpx.post(f"{server.url}/v1/adapters/sparse_fn/reload", json={"revision": old}, timeout=60)
            assert reloaded.status_code == 200, reloaded.text
            after = reloaded.json()
            assert after["revision"] in written.stdout
            assert after["bytes"] == told.json()["bytes"]["total"] - prune["bytes"]
            slim = answers(server)
        finally:
            is_over.set()
        ended = [client.result(timeout=60) for client in clients]
        assert all(count for count, _ in ended)
        assert set.union(*(revisions for _, revisions in ended)) == {old, after["revision"]}
        assert [text for text, _ in slim] == [text for text, _ in tried]
        exact = httpx.get(f"{server.url}/version").json()["backend"] == "native"
        for (_, mine), (_, theirs) in zip(slim, tried, strict=True):
            assert mine == (theirs if exact else pytest.approx(theirs, abs=1e-5))
        left = httpx.get(experts).json()
        gone = {(layer, one["expert"]) for one in prune["experts"] for layer in one["layers"]}
        assert not gone & {(layer["layer"], expert["name"]) for layer in left["layers"] for expert in layer["experts"]}
