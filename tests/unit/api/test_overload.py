"""Clients that find no place: refused at little cost, and told when to come again."""

import asyncio

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from moa_serve.api.guard import Guard
from moa_serve.api.overload import MAX_RETRY_SECONDS, ReturnTimes
from moa_serve.errors import Overloaded
from moa_serve.settings import load_settings


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def times_of(num_rows: int, *seconds: float) -> tuple[ReturnTimes, Clock]:
    clock = Clock()
    times = ReturnTimes(num_rows, clock)
    for took in seconds:
        times.observe(took)
    return times, clock


def test_who_is_refused_comes_back_at_the_rate_at_which_requests_end() -> None:
    times, _ = times_of(16, *[1.6] * 50)
    turns = [times.next_seconds() for _ in range(100)]
    assert turns == sorted(turns)
    assert turns[0] == 1
    for second in range(2, 9):
        assert turns.count(second) == pytest.approx(10, abs=1)


def test_nobody_waits_longer_than_the_limit_and_after_it_everything_is_as_before() -> None:
    times, clock = times_of(4, 2.0)
    assert max(times.next_seconds() for _ in range(1000)) == MAX_RETRY_SECONDS
    clock.now += MAX_RETRY_SECONDS
    assert times.next_seconds() == 1


def test_the_mean_follows_what_requests_take_now() -> None:
    times, _ = times_of(1, 100.0, *[2.0] * 100)
    assert [times.next_seconds() for _ in range(3)] == [3, 5, 7]


def test_before_any_request_has_ended_nobody_is_sent_away_for_long() -> None:
    times, _ = times_of(16)
    assert [times.next_seconds() for _ in range(100)] == [1] * 100


@pytest.mark.case(53)
def test_a_request_without_a_place_is_refused_before_the_application_sees_it() -> None:
    seen: list[str] = []

    async def handle(request: Request) -> Response:
        seen.append(request.url.path)
        return PlainTextResponse("served")

    def check_room(path: str) -> None:
        if path == "/full":
            raise Overloaded("no place", retry_seconds=7)

    routes = [Route(path, handle, methods=["GET", "POST"]) for path in ("/full", "/free")]
    guard = Guard(Starlette(routes=routes), load_settings({}), check_room=check_room)

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://localhost") as http:
            return [await http.post("/full", json={}), await http.get("/full"), await http.post("/free", json={})]

    refused, read, served = asyncio.run(ask())
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "7")
    assert refused.json()["error"] == {"message": "no place", "type": "server_error", "param": None, "code": "server_overloaded"}
    assert "connection" not in refused.headers  # its body was read, so the connection can be used again
    assert (read.status_code, served.status_code) == (200, 200)
    assert seen == ["/full", "/free"]
