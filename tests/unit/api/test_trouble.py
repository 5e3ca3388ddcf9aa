"""Trouble that no client makes: a clock that jumps, an engine that hangs while others look at the server."""

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from serving import Serving

REAL = time.time


class JumpingClock:
    """An hour ahead, an hour behind, ten years back, in no order."""

    def __init__(self) -> None:
        self._rng = random.Random(84)

    def __call__(self) -> float:
        return REAL() + self._rng.choice((0.0, 3600.0, -3600.0, -10 * 365 * 86400.0, 10 * 365 * 86400.0))


@pytest.mark.case(84)
def test_a_clock_that_is_set_ends_no_request_and_holds_none(start: Callable[..., Serving], monkeypatch: pytest.MonkeyPatch) -> None:
    """Daylight saving done wrong, a virtual machine that wakes up: `created` may be odd, and nothing else."""
    limits = {"queue_timeout_seconds": 60, "request_timeout_seconds": 60, "key_requests_per_minute": 10**6, "api_key": ["k"]}
    serving = start(**limits)
    body = {"model": "soft", "prompt": "hello", "temperature": 0, "max_tokens": 30}
    headers = {"Authorization": "Bearer k"}

    def texts() -> list[str]:
        async def ask() -> list[str]:
            answers = await asyncio.gather(
                *(serving.send("POST", "/v1/completions", json=body | {"n": n}, headers=headers) for n in range(1, 4))
            )
            assert [answer.status_code for answer in answers] == [200] * 3
            for answer in answers:
                assert all(value >= 0 for value in answer.json()["moa"]["timings"].values())
            return [choice["text"] for answer in answers for choice in answer.json()["choices"]]

        found: list[str] = serving.run(ask())
        return found

    expected = texts()
    monkeypatch.setattr(time, "time", JumpingClock())
    for _ in range(5):
        assert texts() == expected
    assert serving.get("/health/ready").status_code == 200
    assert serving.server.engine.num_open == serving.server.num_preparing == 0


@pytest.fixture
def stuck(start: Callable[..., Serving]) -> Iterator[Serving]:
    """A server whose engine thread is held in a step, with a request in it."""
    serving = start()
    engine, may_go_on, is_held = serving.server.engine.engine, threading.Event(), threading.Event()
    step = engine.step

    def held() -> object:
        is_held.set()
        may_go_on.wait(30)
        return step()

    engine.step = held  # type: ignore[method-assign, assignment]

    async def begin() -> "asyncio.Task[object]":
        task = asyncio.ensure_future(serving.send("POST", "/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 2}))
        await asyncio.to_thread(is_held.wait, 30)
        return task

    async def finish(task: "asyncio.Task[object]") -> None:
        await task

    task = serving.run(begin())
    try:
        yield serving
    finally:
        may_go_on.set()
        engine.step = step  # type: ignore[method-assign]
        serving.run(finish(task))


@pytest.mark.case(89)
def test_a_scrape_never_waits_for_the_engine(stuck: Serving) -> None:
    """Ten scrapers beside a step that does not end: what they see is the state before it."""

    async def scrape() -> list[int]:
        answers = await asyncio.wait_for(asyncio.gather(*(stuck.send("GET", "/metrics") for _ in range(10))), 20)
        return [answer.status_code for answer in answers]

    assert stuck.run(scrape()) == [200] * 10
    for path in ("/health/live", "/health/ready", "/v1/models", "/v1/adapters", "/version"):
        assert stuck.get(path).status_code == 200
