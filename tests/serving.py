"""A whole server in this process: a tiny base with a tokenizer, two adapters, a real engine; requests go through the ASGI application."""

import asyncio
import json
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from families import TINY, write_base, write_tokenizer
from starlette.types import ASGIApp, Message

from moa_serve.adapter.store import AdapterStore
from moa_serve.api.adapters import AdapterRegistry
from moa_serve.api.app import build_app
from moa_serve.api.context import Server
from moa_serve.api.protocol import uvicorn_config
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.engine import Engine, EngineOptions
from moa_serve.metrics import Metrics, RequestRecord
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base
from moa_serve.settings import ServerSettings
from moa_serve.text import Tokenizer

CONFIG: dict[str, Any] = TINY | {"vocab_size": 259, "max_position_embeddings": 4096}
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "<s>{{ m.role }}\n{{ m.content | trim }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


class RecordingMetrics(Metrics):
    """The real metrics, and what they were told."""

    def __init__(self, base_name: str, *, has_vllm: bool = True) -> None:
        super().__init__(base_name, has_vllm=has_vllm)
        self.records: list[RequestRecord] = []
        self.num_gaps = 0

    def observe_request(self, record: RequestRecord) -> None:
        self.records.append(record)
        super().observe_request(record)

    def observe_tokens(self, adapter: str | None, gaps_seconds: Any) -> None:
        self.num_gaps += len(gaps_seconds)
        super().observe_tokens(adapter, gaps_seconds)


@dataclass
class Serving:
    """A running server and its event loop; requests are made one `run` at a time."""

    runner: asyncio.Runner
    server: Server
    app: ASGIApp
    metrics: RecordingMetrics

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    async def send(self, method: str, path: str, **more: Any) -> httpx.Response:
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, **more)

    def get(self, path: str) -> httpx.Response:
        response: httpx.Response = self.run(self.send("GET", path))
        return response

    def post(self, path: str, **body: Any) -> httpx.Response:
        response: httpx.Response = self.run(self.send("POST", path, json=body))
        return response

    def ok(self, path: str, **body: Any) -> dict[str, Any]:
        response = self.post(path, **body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def events(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream that ended well."""
        response = self.post(path, stream=True, **body)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        frames = response.text.split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]

    async def converse(self, path: str, body: Any, on_message: Callable[[Message], bool]) -> list[Message]:
        """Speak ASGI as a server does; the client leaves once `on_message` says so of a message that it got."""
        raw = json.dumps(body).encode()
        has_left = asyncio.Event()
        incoming = [{"type": "http.request", "body": raw, "more_body": False}]
        sent: list[Message] = []

        async def receive() -> Message:
            if incoming:
                return incoming.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            sent.append(message)
            if on_message(message):
                has_left.set()

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", str(len(raw)).encode())]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"", "headers": headers}
        work = asyncio.ensure_future(self.app({**scope, "http_version": "1.1", "scheme": "http", "state": {}}, receive, send))
        if on_message({"type": "sent"}):
            while not self.server.engine.num_open:  # gone while it is being served
                await asyncio.sleep(0)
            has_left.set()
        await work
        return sent

    def over_http(self, work: Callable[[str], Any]) -> Any:
        """What `work` returns of the URL at which the application is served meanwhile; it runs in a thread of its own."""

        async def run() -> Any:
            with socket.create_server(("127.0.0.1", 0)) as listener:
                http = uvicorn.Server(uvicorn_config(self.app, self.server.settings))
                running = asyncio.create_task(http.serve(sockets=[listener]))
                try:
                    return await asyncio.to_thread(work, f"http://127.0.0.1:{listener.getsockname()[1]}")
                finally:
                    http.should_exit = True
                    await running

        return self.run(run())

    def assert_clean(self) -> None:
        """Nothing is held, by the engine or the registry. The engine takes commands in order, so one request flushes them."""
        self.ok("/v1/completions", model="tiny", prompt=[5], max_tokens=1)
        assert self.server.engine.num_open == self.server.num_preparing == 0
        assert self.server.engine.engine.block_pool.num_held == 0
        assert not any(item.leases for item in self.server.registry.items())

    def stop(self) -> None:
        self.run(self.server.engine.stop())
        self.runner.close()


def start_serving(base: Path, adapters_dir: Path, *, has_tokenizer: bool = True, kv_cache_bytes: int = 2**23, **more: Any) -> Serving:
    """A running server with these settings; `stop` ends it."""
    settings = ServerSettings(adapters_dir=adapters_dir, **more)
    loaded = load_base(str(base), device=torch.device("cpu"), dtype=torch.float32)
    store = AdapterStore(loaded.config, base_name="tiny", base_digest=loaded.digest, adapters_dir=adapters_dir)
    options = EngineOptions(max_num_seqs=settings.max_num_seqs, kv_cache_bytes=kv_cache_bytes)
    model = Transformer(loaded.config, loaded.weights)
    engine = AsyncEngine(lambda lease: Engine(model, options, lease=lease, base_digest=loaded.digest), max_waiting=settings.max_waiting)
    metrics = RecordingMetrics("tiny", has_vllm=settings.vllm_metrics)
    registry = AdapterRegistry(store, engine, metrics=metrics)
    metrics.attach(engine, registry, store.cache)
    registry.scan()
    tokenizer = Tokenizer.from_folder(base) if has_tokenizer else None
    server = Server(engine, registry, tokenizer, metrics, settings, "tiny", loaded.digest, "0.0.0", 1_700_000_000)
    serving = Serving(asyncio.Runner(), server, build_app(server), metrics)
    serving.run(_start(engine))
    return serving


async def _start(engine: AsyncEngine) -> None:
    engine.start()


def write_talker(folder: Path) -> Path:
    """A base with a tokenizer and a chat template."""
    write_base(folder, CONFIG)
    write_tokenizer(folder)
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder
