"""What a request meets before a handler does, in memory and over real sockets."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from typing import Any, ClassVar

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moa_serve.api.guard import Guard
from moa_serve.api.protocol import uvicorn_config
from moa_serve.errors import InvalidRequest
from moa_serve.settings import ServerSettings, load_settings

USER, ADMIN = "user-key-1", "admin-key-1"


async def _echo(request: Request) -> Response:
    body = await request.body()
    return PlainTextResponse(f"{request.method} {request.url.path} {len(body)} {getattr(request.state, 'key_id', '-')}")


async def _fail(request: Request) -> Response:
    raise RuntimeError("the secret of the house")


def make_app() -> ASGIApp:
    posts = ("/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    gets = ("/health", "/health/live", "/v1/models", "/v1/adapters", "/metrics", "/version")
    routes = [Route(path, _echo, methods=["POST"]) for path in posts] + [Route(path, _echo, methods=["GET"]) for path in gets]
    return Starlette(routes=[*routes, Route("/fail", _fail)])


def settings(**more: Any) -> ServerSettings:
    return load_settings(more)


def ask(
    method: str, path: str, *, app: ASGIApp | None = None, is_draining: bool = False, base: str = "http://localhost", **request: Any
) -> httpx.Response:
    """One request through the guard in memory; `limits` are settings."""
    guard = Guard(app or make_app(), settings(**request.pop("limits", {})), is_draining=lambda: is_draining)

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(guard, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **request)

    return asyncio.run(run())


def error_of(response: httpx.Response) -> tuple[int, str]:
    """(status, code), after the shape was checked."""
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    return response.status_code, error["code"]


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


class TestKeys:
    BOTH: ClassVar[dict[str, Any]] = {"api_key": ["other-key", USER], "admin_key": ADMIN}

    @pytest.mark.case(41)
    @pytest.mark.parametrize(
        ("headers", "path"),
        [
            ({}, "/v1/models"),
            (bearer("wrong"), "/v1/models"),
            (bearer(""), "/v1/models"),
            (bearer(USER + "x"), "/v1/models"),
            (bearer(USER[:-1]), "/v1/models"),
            ({"Authorization": f"Basic {USER}"}, "/v1/models"),
            ({"Authorization": USER}, "/v1/models"),
            ({"X-Api-Key": USER}, "/v1/models"),
            ({}, f"/v1/models?api_key={USER}"),
            ({"Authorization": b"Bearer \xff\xfe"}, "/v1/models"),
        ],
    )
    def test_a_missing_or_wrong_key_is_401(self, headers: dict[str, Any], path: str) -> None:
        """A key that is compared by prefix, or found in a query that every proxy logs, is no key."""
        response = ask("GET", path, headers=headers, limits=self.BOTH)
        assert error_of(response) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"

    def test_two_authorization_headers_are_none(self) -> None:
        response = ask("GET", "/v1/models", headers=[("Authorization", f"Bearer {USER}"), ("Authorization", "Bearer x")], limits=self.BOTH)
        assert response.status_code == 401

    @pytest.mark.parametrize("key", [USER, "other-key", ADMIN])
    def test_every_key_reads_and_completes(self, key: str) -> None:
        for method, path in (("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/v1/adapters"), ("POST", "/v1/completions")):
            assert ask(method, path, headers=bearer(key), limits=self.BOTH).status_code == 200

    @pytest.mark.case(41)
    @pytest.mark.parametrize("path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/v1/adapters", "/v1/adapters/x/pin"])
    def test_adapters_are_changed_with_the_admin_key_only(self, path: str) -> None:
        """A user who can load an adapter can replace what others are served."""
        assert error_of(ask("POST", path, headers=bearer(USER), limits=self.BOTH)) == (403, "admin_key_required")
        assert ask("POST", path, headers=bearer(ADMIN), limits=self.BOTH).status_code in (200, 404, 405)

    def test_without_an_admin_key_nobody_changes_adapters(self) -> None:
        """With API keys but no admin key, a user key must not become one."""
        limits = {"api_key": [USER]}
        assert error_of(ask("POST", "/v1/load_lora_adapter", headers=bearer(USER), limits=limits)) == (403, "admin_key_required")
        assert ask("POST", "/v1/load_lora_adapter", limits=limits).status_code == 401

    def test_an_admin_key_alone_guards_changes_and_leaves_the_rest_open(self) -> None:
        limits = {"admin_key": ADMIN}
        assert ask("POST", "/v1/completions", limits=limits).status_code == 200
        assert ask("POST", "/v1/load_lora_adapter", limits=limits).status_code == 401
        assert ask("POST", "/v1/load_lora_adapter", headers=bearer(ADMIN), limits=limits).status_code == 200

    def test_without_keys_any_token_will_do(self) -> None:
        """OpenAI's client cannot send none."""
        assert ask("POST", "/v1/completions", headers=bearer("anything")).status_code == 200
        assert ask("POST", "/v1/load_lora_adapter").status_code == 200

    def test_health_is_public(self) -> None:
        assert ask("GET", "/health", limits=self.BOTH).status_code == 200
        assert ask("HEAD", "/health/live", limits=self.BOTH).status_code == 200

    @pytest.mark.case(42)
    @pytest.mark.parametrize(
        "path",
        [
            "//v1/models", "/v1//models", "/v1/./models", "/v1/../v1/models", "/v1/%2e/models", "/%2e%2e/v1/models", "/v1/models/",
            "/V1/MODELS", "/v1%2fmodels", "/v1/models%00", "/v1\\models", "/v1/%6dodels", "/health/", "/health/../v1/models",
            "/health/%2e%2e/v1/models", "/health;/v1/models", "/nothing", "/docs", "/openapi.json", "/v1/models?x=/health",
        ],
    )  # fmt: skip
    def test_no_way_of_writing_a_path_gets_round_the_key(self, path: str) -> None:
        """What a proxy, the guard and the router read differently is how keys are got round."""
        assert error_of(ask("GET", path, limits=self.BOTH)) == (401, "invalid_api_key")
        with_key = ask("GET", path, headers=bearer(USER), limits=self.BOTH)
        assert with_key.status_code in (200, 404)
        if with_key.status_code == 200:
            assert with_key.text.startswith("GET /v1/models ")

    @pytest.mark.case(42)
    @pytest.mark.parametrize(
        "path", ["//v1/load_lora_adapter", "/v1/load_lora_adapter/", "/v1/./load_lora_adapter", "/v1/%6coad_lora_adapter"]
    )
    def test_no_way_of_writing_a_path_gets_round_the_admin_key(self, path: str) -> None:
        assert ask("POST", path, headers=bearer(USER), limits=self.BOTH).status_code in (403, 404)

    def test_handlers_learn_the_keys_id_and_not_the_key(self) -> None:
        text = ask("GET", "/v1/models", headers=bearer(USER), limits=self.BOTH).text
        assert USER not in text
        assert len(text.split()[-1]) == 16

    def test_an_admin_key_that_users_have_is_refused(self) -> None:
        with pytest.raises(InvalidRequest, match="admin_key"):
            settings(api_key=[USER], admin_key=USER)


class TestHead:
    """Limits that the head of a request alone can break."""

    @pytest.mark.case(43)
    @pytest.mark.parametrize("given", ["a" * 128, "req_1.2-3"])
    def test_a_plain_request_id_is_kept(self, given: str) -> None:
        for path in ("/v1/models", "/nothing", "/fail", "//"):
            assert ask("GET", path, headers={"X-Request-Id": given}).headers.get_list("x-request-id") == [given]

    @pytest.mark.case(43)
    @pytest.mark.parametrize("given", ["", "a" * 129, "a b", "a\u00e9", "a;b", '{"x":1}'])
    def test_any_other_request_id_is_replaced(self, given: str) -> None:
        """It stands in logs and in other systems' headers."""
        answer = ask("GET", "/v1/models", headers={"X-Request-Id": given.encode("latin-1")}).headers["x-request-id"]
        assert answer != given
        assert len(answer) == 32

    @pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
    def test_a_loopback_server_answers_to_its_names(self, host: str) -> None:
        for port in ("", ":8000", ":1"):
            assert ask("GET", "/health", headers={"Host": host + port}).status_code == 200

    @pytest.mark.case(44)
    @pytest.mark.parametrize(
        "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "localhost:8000@evil", "", "[::2]", "a b"]
    )
    def test_a_loopback_server_does_not_answer_to_others(self, host: str) -> None:
        """DNS rebinding: a page's own name that suddenly means 127.0.0.1."""
        assert error_of(ask("GET", "/health", headers={"Host": host})) == (421, "misdirected_request")

    def test_configured_hosts_are_answered(self) -> None:
        limits: dict[str, Any] = {"allowed_hosts": ["moa.test"]}
        assert ask("GET", "/health", headers={"Host": "moa.test:80"}, limits=limits).status_code == 200
        limits |= {"host": "0.0.0.0", "api_key": ["k"]}
        assert ask("GET", "/version", headers={"Host": "moa.test", **bearer("k")}, limits=limits).status_code == 200
        assert ask("GET", "/version", headers={"Host": "localhost", **bearer("k")}, limits=limits).status_code == 421
        assert ask("GET", "/health", headers={"Host": "10.0.0.7:8000"}, limits=limits).status_code == 200, "a probe comes by address"
        assert ask("GET", "/health", headers={"Host": "any"}, limits={"host": "0.0.0.0", "api_key": ["k"]}).status_code == 200

    def test_pages_of_other_origins_change_nothing(self) -> None:
        """A form on any page can send a POST to 127.0.0.1 without asking."""
        evil = {"Origin": "https://evil.example"}
        assert error_of(ask("POST", "/v1/load_lora_adapter", headers=evil)) == (403, "origin_denied")
        assert error_of(ask("POST", "/v1/completions", headers={"Origin": "null"})) == (403, "origin_denied")
        assert ask("POST", "/v1/completions", headers={"Origin": "http://localhost"}).status_code == 200
        assert ask("POST", "/v1/completions", headers=evil, limits={"cors_origin": ["https://evil.example"]}).status_code == 200

    @pytest.mark.case(36)
    def test_cors_is_off_unless_asked_for(self) -> None:
        preflight = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        assert ask("OPTIONS", "/v1/completions", headers=preflight).status_code == 405
        limits = {"cors_origin": ["https://app.example"], "api_key": [USER]}
        allowed = ask("OPTIONS", "/v1/completions", headers=preflight, limits=limits)
        assert (allowed.status_code, allowed.headers["access-control-allow-origin"]) == (204, "https://app.example")
        assert "Authorization" in allowed.headers["access-control-allow-headers"]
        refused = ask("GET", "/v1/models", headers={"Origin": "https://app.example"}, limits=limits)
        assert refused.headers["access-control-allow-origin"] == "https://app.example", "a page must be able to read its 401"
        other = ask("OPTIONS", "/v1/completions", headers=preflight | {"Origin": "https://b.example"}, limits=limits)
        assert "access-control-allow-origin" not in other.headers

    @pytest.mark.case(33)
    def test_too_many_or_too_large_headers_and_urls_are_refused(self) -> None:
        assert error_of(ask("GET", "/health", headers=[(f"x-{i}", "1") for i in range(101)])) == (431, "headers_too_large")
        assert error_of(ask("GET", "/health", headers={"x-large": "a" * 17_000})) == (431, "headers_too_large")
        assert error_of(ask("GET", "/health?" + "a" * 9000)) == (414, "url_too_long")

    @pytest.mark.case(35)
    @pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "gzip, identity"])
    def test_a_compressed_body_is_never_decoded(self, encoding: str) -> None:
        """A bomb of a few kilobytes is gigabytes."""
        response = ask("POST", "/v1/completions", headers={"Content-Encoding": encoding}, content=b"x")
        assert error_of(response) == (415, "unsupported_media_type")

    @pytest.mark.case(34)
    def test_a_request_with_two_lengths_is_refused(self) -> None:
        """Two servers that read its end in different places let one request hide in another."""
        both = [("Content-Length", "1"), ("Transfer-Encoding", "chunked")]
        assert error_of(ask("POST", "/v1/completions", headers=both)) == (400, "invalid_http")
        assert error_of(ask("POST", "/v1/completions", headers=[("Content-Length", "1"), ("Content-Length", "2")])) == (400, "invalid_http")
        assert error_of(ask("POST", "/v1/completions", headers=[("Content-Length", "-1")])) == (400, "invalid_http")

    @pytest.mark.case(36)
    def test_head_is_get_without_a_body(self) -> None:
        for path in ("/health", "/v1/models", "/metrics"):
            assert (ask("HEAD", path).status_code, ask("HEAD", path).content) == (200, b"")
        assert ask("HEAD", "/v1/completions").status_code == 405

    @pytest.mark.case(67)
    def test_a_draining_server_takes_nothing_new_and_still_tells(self) -> None:
        response = ask("POST", "/v1/completions", is_draining=True)
        assert error_of(response) == (503, "draining")
        assert int(response.headers["retry-after"]) >= 1
        assert ask("GET", "/metrics", is_draining=True).status_code == 200

    def test_an_exception_is_told_to_the_log_only(self, caplog: pytest.LogCaptureFixture) -> None:
        async def broken(scope: Scope, receive: Receive, send: Send) -> None:
            raise RuntimeError("the secret of the house")

        response = ask("GET", "/x", app=broken)
        assert error_of(response) == (500, "internal_error")
        assert "secret" not in response.text
        assert "the secret of the house" in caplog.text


class TestBody:
    """The body is taken whole, or not at all."""

    LIMITS: ClassVar[dict[str, Any]] = {"max_body_bytes": 1024, "max_body_chunks": 4, "body_timeout_seconds": 0.05}

    def feed(self, messages: list[Message], headers: list[tuple[bytes, bytes]], **limits: Any) -> tuple[list[Message], int]:
        """What is sent, and how many messages were taken, when `messages` come; after them nothing comes any more."""
        sent: list[Message] = []
        taken = 0

        async def receive() -> Message:
            nonlocal taken
            if taken == len(messages):
                await asyncio.Event().wait()
            taken += 1
            return messages[taken - 1]

        async def send(message: Message) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"host", b"localhost"), *headers],
            "query_string": b"",
        }
        asyncio.run(Guard(make_app(), settings(**self.LIMITS, **limits))(scope, receive, send))
        return sent, taken

    CHUNKED: ClassVar[list[tuple[bytes, bytes]]] = [(b"transfer-encoding", b"chunked")]

    @pytest.mark.case(32)
    def test_a_declared_length_above_the_limit_is_refused_unread(self) -> None:
        for length in (b"1025", b"9" * 4000):
            sent, taken = self.feed([], [(b"content-length", length)])
            assert (sent[0]["status"], taken) == (413, 0)
            assert (b"connection", b"close") in sent[0]["headers"]

    @pytest.mark.case(32)
    def test_a_chunked_body_is_cut_at_the_limit(self) -> None:
        """A body without a declared length must not fill the memory."""
        part: Message = {"type": "http.request", "body": b"x" * 600, "more_body": True}
        sent, taken = self.feed([part] * 9, self.CHUNKED)
        assert (sent[0]["status"], taken) == (413, 2)

    @pytest.mark.case(32)
    def test_many_tiny_chunks_are_cut(self) -> None:
        sent, taken = self.feed([{"type": "http.request", "body": b"x", "more_body": True}] * 9, self.CHUNKED)
        assert (sent[0]["status"], taken) == (413, 5)

    @pytest.mark.case(46)
    def test_a_sender_that_stops_gets_408(self) -> None:
        sent, _ = self.feed([{"type": "http.request", "body": b"x", "more_body": True}], self.CHUNKED)
        assert sent[0]["status"] == 408

    def test_a_client_that_leaves_in_the_middle_is_not_answered(self) -> None:
        sent, _ = self.feed([{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}], self.CHUNKED)
        assert sent == []

    def test_pieces_become_one_body(self) -> None:
        parts: list[Message] = [{"type": "http.request", "body": b"x" * 300, "more_body": more} for more in (True, True, False)]
        sent, _ = self.feed(parts, self.CHUNKED)
        assert sent[1]["body"].split()[2] == b"900"


class TestReply:
    @pytest.mark.case(48)
    def test_a_reader_that_takes_nothing_is_cut(self) -> None:
        """Its answer would stay in memory for as long as it likes."""
        aborted: list[bool] = []
        ended: list[BaseException] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            try:
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": b"x", "more_body": True})
            except OSError as error:
                ended.append(error)
                raise

        async def send(message: Message) -> None:
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
        scope["state"] = {"moa.abort": lambda: aborted.append(True)}
        asyncio.run(Guard(app, settings(write_timeout_seconds=0.02))(scope, receive, send))
        assert aborted == [True]
        assert len(ended) == 1

    def test_what_breaks_off_is_not_taken_for_the_whole(self) -> None:
        aborted: list[bool] = []

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise RuntimeError

        async def nothing(*_: Any) -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": [], "query_string": b""}
        scope["state"] = {"moa.abort": lambda: aborted.append(True)}
        asyncio.run(Guard(app, settings())(scope, nothing, nothing))
        assert aborted == [True]

    def test_every_response_is_counted(self) -> None:
        seen: list[int] = []
        ended: list[tuple[Any, ...]] = []

        class Counter:
            def observe_response(self, status: int) -> None:
                seen.append(status)

            def observe_http(
                self, handler: str, method: str, status: int, seconds: float, request_bytes: int, response_bytes: int
            ) -> None:  # fmt: skip
                assert seconds >= 0
                ended.append((handler, method, status, request_bytes, response_bytes > 0))

        async def run() -> None:
            guard = Guard(make_app(), settings(api_key=[USER]), metrics=Counter(), handler_of=lambda path: f"route of {path}")
            async with httpx.AsyncClient(transport=httpx.ASGITransport(guard), base_url="http://localhost") as client:
                await client.get("/health")
                await client.get("/v1/models")
                await client.post("/v1/models", headers={"authorization": f"Bearer {USER}"}, json={"a": 1})

        asyncio.run(run())
        assert seen[:2] == [200, 401]
        assert ended[0] == ("route of /health", "GET", 200, 0, True)
        assert ended[1] == ("route of /v1/models", "GET", 401, 0, True)
        assert ended[2][:2] == ("route of /v1/models", "POST")
        assert ended[2][3] == len(b'{"a":1}')


# -- over a socket, as uvicorn runs it


@asynccontextmanager
async def serving(app: ASGIApp | None = None, **limits: Any) -> Any:
    config = settings(port=0, **{"header_timeout_seconds": 0.2, "body_timeout_seconds": 0.3, "write_timeout_seconds": 0.3, **limits})
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn_config(Guard(app or make_app(), config), config))
        server.capture_signals = _no_signals  # type: ignore[method-assign]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await task


def _no_signals() -> Any:
    return nullcontext()


async def talk(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """All that the server says until it closes; a server that does not close in time fails the test."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    said = asyncio.create_task(reader.read())
    try:
        for piece in pieces:
            writer.write(piece)
            if pause and not said.done():
                await asyncio.wait([said], timeout=pause)
        return await asyncio.wait_for(said, 5)
    except ConnectionError:
        return b""
    finally:
        writer.close()


def over_a_socket(test: Callable[[int], Awaitable[None]], app: ASGIApp | None = None, **limits: Any) -> None:
    async def run() -> None:
        async with serving(app, **limits) as port:
            await test(port)

    asyncio.run(run())


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.case(46)
def test_slow_and_silent_senders_are_cut() -> None:
    """uvicorn waits for ever for the rest of a request; a hundred of them are an outage."""

    async def test(port: int) -> None:
        silent = talk(port)
        half = talk(port, HEAD)
        drip = talk(port, *[b"G", b"E", b"T", *[b" "] * 40], pause=0.02)
        body = talk(port, HEAD + b"Content-Length: 100\r\n\r\nabc")
        body_drip = talk(port, HEAD + b"Content-Length: 100\r\n\r\n", *[b"x"] * 40, pause=0.02)
        second = talk(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET", pause=0.05)
        answers = await asyncio.gather(silent, half, drip, body, body_drip, second)
        assert [*answers[:3]] == [b"", b"", b""]
        assert answers[3].startswith(b"HTTP/1.1 408 ")
        assert answers[4].startswith(b"HTTP/1.1 408 ") or answers[4] == b""
        assert answers[5].count(b"HTTP/1.1") == 1

    over_a_socket(test, keep_alive_seconds=30)


@pytest.mark.case(47)
def test_an_idle_connection_is_closed() -> None:
    async def test(port: int) -> None:
        answer = await talk(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ")

    over_a_socket(test, keep_alive_seconds=1)


@pytest.mark.case(34)
@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"nonsense\r\n\r\n", 400, "invalid_http"),
        (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_http"),
        (HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nx", 400, "invalid_http"),
        (HEAD + b"Content-Length: -1\r\n\r\n", 400, "invalid_http"),
        (HEAD + b"Content-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "invalid_http"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400, "invalid_http"),
        (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n", 400, "invalid_http"),
        (HEAD + b"X: " + b"a" * 40_000, 431, "headers_too_large"),
        (HEAD + b"Content-Length: 99999999\r\n\r\n" + b"x" * 1000, 413, "body_too_large"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 20, 413, "body_too_large"),
        (b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404, "not_found"),
    ],
)  # fmt: skip
def test_what_is_no_good_http_is_told_in_our_shape_and_closed(sent: bytes, status: int, code: str) -> None:
    """uvicorn answers these in plain text, or reads on."""

    async def test(port: int) -> None:
        head, _, body = (await talk(port, sent)).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"connection: close" in head.lower()
        assert json.loads(body)["error"]["code"] == code

    over_a_socket(test, max_body_chunks=10)


@pytest.mark.case(34)
@pytest.mark.parametrize("path", [b"/v1/completions", b"//nothing"])
def test_a_body_that_breaks_off_right_behind_its_head_is_answered_once(path: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """The request's own answer came second, to a closed connection: a traceback in the log for whoever wanted one there."""

    async def test(port: int) -> None:
        said = await talk(port, b"POST " + path + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\t\n")
        assert said.startswith(b"HTTP/1.1 400 ")
        assert said.count(b"HTTP/1.1 4") == 1

    over_a_socket(test)
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


@pytest.mark.case(48)
def test_a_reader_that_stops_is_cut_while_others_are_served() -> None:
    """Its connection and its row would be held for ever."""
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == "/health":
            await make_app()(scope, receive, send)
            return
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        finally:
            ended.set()

    async def test(port: int) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
        writer.write(HEAD + b"Content-Length: 0\r\n\r\n")
        other = await talk(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert other.startswith(b"HTTP/1.1 200 ")
        await asyncio.wait_for(ended.wait(), 5)
        writer.close()

    over_a_socket(test, app)


def test_a_good_client_keeps_its_connection() -> None:
    async def test(port: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
            for _ in range(3):
                response = await client.post("/v1/completions", content=b"x" * 100_000)
                assert response.text.split()[2] == "100000"
                assert "connection" not in response.headers
                assert "server" not in response.headers
            refused = await client.post("/v1/completions", content=b"x" * 5_000_000)
            assert error_of(refused) == (413, "body_too_large")

    over_a_socket(test)
