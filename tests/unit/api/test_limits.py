"""What one key may do: who is limited by what, what it is told, and that nobody else notices."""

import asyncio
import hashlib
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from moa_serve.api import limits
from moa_serve.api.guard import Guard
from moa_serve.api.limits import Bucket
from moa_serve.errors import InvalidRequest
from moa_serve.settings import load_settings

FIRST, SECOND, ADMIN = "first-key", "second-key", "admin-key"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(limits, "time", clock)
    return clock


async def _answer(request: Request) -> Response:
    """Uses as many tokens as its body says."""
    used = int((await request.body()) or b"0")
    charge: Callable[[int], None] | None = request.scope["state"].get("moa.charge")
    if charge is not None:
        charge(used)
    return PlainTextResponse(request.scope["state"].get("key_id", "-"))


ROUTES = [
    Route("/v1/completions", _answer, methods=["POST"]),
    Route("/v1/models", _answer, methods=["GET"]),
    Route("/health", _answer, methods=["GET"]),
    Route("/v1/load_lora_adapter", _answer, methods=["POST"]),
]


class Shop:
    """A guard that lives for several requests."""

    def __init__(self, **given: int) -> None:
        settings = load_settings({"api_key": [FIRST, SECOND], "admin_key": ADMIN, **given})
        self.guard = Guard(Starlette(routes=ROUTES), settings)

    def ask(self, key: str = FIRST, *, tokens: int = 0, method: str = "POST", path: str = "/v1/completions") -> httpx.Response:
        return asyncio.run(self.send(key, tokens=tokens, method=method, path=path))

    async def send(self, key: str = FIRST, *, tokens: int = 0, method: str = "POST", path: str = "/v1/completions") -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.guard), base_url="http://localhost") as client:
            return await client.request(method, path, content=str(tokens).encode(), headers={"Authorization": f"Bearer {key}"})


def assert_limited(answer: httpx.Response, says: str) -> int:
    """The seconds after which to try again."""
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"], error["param"]) == (429, "rate_limit_exceeded", "rate_limit_error", None)
    assert says in error["message"]
    return int(answer.headers["retry-after"])


def told(answer: httpx.Response, name: str) -> tuple[str, ...]:
    return tuple(answer.headers[f"x-ratelimit-{what}-{name}"] for what in ("limit", "remaining", "reset"))


@pytest.mark.case(54)
def test_a_key_that_floods_is_told_when_to_come_back_and_others_are_served(clock: Clock) -> None:
    shop = Shop(key_requests_per_minute=3)
    answers = [shop.ask() for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [told(answer, "requests") for answer in answers] == [("3", "2", "20s"), ("3", "1", "40s"), ("3", "0", "1m0s")]
    refused = shop.ask()
    assert assert_limited(refused, "3 requests a minute") == 20
    assert told(refused, "requests") == ("3", "0", "1m0s")
    assert shop.ask(SECOND).status_code == 200
    clock.now += 19.5
    assert assert_limited(shop.ask(), "3 requests") == 1
    clock.now += 0.5
    assert shop.ask().status_code == 200
    assert shop.ask().status_code == 429


@pytest.mark.case(54)
def test_tokens_are_paid_for_when_they_are_known_and_debts_are_waited_off(clock: Clock) -> None:
    shop = Shop(key_tokens_per_minute=600)
    assert told(shop.ask(tokens=100), "tokens") == ("600", "500", "10s")
    assert told(shop.ask(tokens=1400), "tokens") == ("600", "0", "2m30s")
    assert assert_limited(shop.ask(), "600 tokens a minute") == 91
    assert shop.ask(SECOND).status_code == 200
    clock.now += 91
    assert shop.ask(tokens=10).status_code == 200
    assert shop.ask().status_code == 429


def test_a_rate_holds_over_any_length_of_time(clock: Clock) -> None:
    shop = Shop(key_tokens_per_minute=600)
    used = 0
    for _ in range(200):
        clock.now += 5
        if shop.ask(tokens=300).status_code == 200:
            used += 300
    assert 600 * 1000 / 60 <= used <= 600 * 1000 / 60 + 600 + 300


@pytest.mark.case(54)
def test_requests_at_once_are_counted_while_they_last() -> None:
    """However they end: an answer, an error, a client that leaves."""
    settings = load_settings({"api_key": [FIRST, SECOND], "key_concurrent_requests": 1})
    may_end = asyncio.Event()
    fails = False

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["headers"][-1] == (b"x-wait", b"1"):
            await may_end.wait()
        if fails:
            raise RuntimeError
        await PlainTextResponse("x")(scope, receive, send)

    guard = Guard(app, settings)

    async def send(key: str, wait: str) -> httpx.Response:
        transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/v1/completions", headers={"Authorization": f"Bearer {key}", "X-Wait": wait})

    async def run() -> None:
        nonlocal fails
        held = asyncio.create_task(send(FIRST, "1"))
        await asyncio.sleep(0.01)
        assert assert_limited(await send(FIRST, "0"), "1 requests at once") == 1
        assert (await send(SECOND, "0")).status_code == 200
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        fails = True
        assert (await send(FIRST, "0")).status_code == 500
        fails = False
        assert (await send(FIRST, "0")).status_code == 200

    asyncio.run(run())


def test_what_makes_no_work_and_what_an_operator_does_is_not_limited() -> None:
    """Health, metrics and lists must be readable for whoever has used up his requests."""
    shop = Shop(key_requests_per_minute=1, key_tokens_per_minute=1, key_concurrent_requests=1)
    assert shop.ask().status_code == 200
    assert shop.ask().status_code == 429
    for _ in range(3):
        assert shop.ask(method="GET", path="/v1/models").status_code == 200
        assert shop.ask(method="GET", path="/health").status_code == 200
        assert shop.ask(ADMIN).status_code == 200
        assert shop.ask(ADMIN, path="/v1/load_lora_adapter").status_code == 200
    assert shop.ask(path="/v1/load_lora_adapter").status_code == 403


def test_nothing_is_said_of_limits_that_are_not_set() -> None:
    answer = Shop().ask(tokens=10**9)
    assert answer.status_code == 200
    assert not [name for name in answer.headers if name.startswith("x-ratelimit")]


def test_a_wrong_key_takes_nothing_from_a_right_one() -> None:
    shop = Shop(key_requests_per_minute=1)
    assert [shop.ask("wrong").status_code for _ in range(3)] == [401] * 3
    assert shop.ask().status_code == 200


def test_a_keys_id_is_stable_and_not_the_key() -> None:
    """The scheduler's turns, the cache's salt and the log go by it."""
    assert Shop().ask().text == hashlib.sha256(FIRST.encode()).hexdigest()[:16]
    assert Shop().ask(ADMIN).text != Shop().ask().text


@pytest.mark.parametrize("name", ["key_requests_per_minute", "key_tokens_per_minute", "key_concurrent_requests"])
def test_a_limit_that_would_limit_nobody_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="no API key") as error:
        load_settings({name: 5})
    assert error.value.param == name
    with pytest.raises(InvalidRequest):
        load_settings({name: 0, "api_key": [FIRST]})


def test_a_bucket_never_holds_more_than_a_minute(clock: Clock) -> None:
    bucket = Bucket(60)
    clock.now += 10**9
    assert bucket.level == 60
    bucket.take(61)
    assert bucket.level == -1
    assert bucket.seconds_until(1) == 2
