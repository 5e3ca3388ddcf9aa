"""An adapter registry on a real engine, with its routes, for tests."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.state import StateDirectory
from moa_serve.adapter.store import AdapterStore
from moa_serve.api.adapters import AdapterRegistry
from moa_serve.api.admin import router
from moa_serve.api.context import Server
from moa_serve.api.errors import response_of
from moa_serve.engine.async_engine import AsyncEngine, Stream
from moa_serve.engine.engine import Engine, EngineOptions
from moa_serve.engine.request import Request, SamplingParams
from moa_serve.errors import MoaError
from moa_serve.metrics import Metrics
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base
from moa_serve.settings import ServerSettings

PROMPT = (5, 17, 80)


class SlowStore(AdapterStore):
    """A store that counts what it reads, and waits where a test asks it to."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reads: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def read(self, name: str, source: AdapterSource) -> Adapter:
        assert threading.current_thread() is not threading.main_thread(), "files are read in a worker thread"
        self.reads.append(name)
        assert self.gate.wait(30)
        return super().read(name, source)


@dataclass
class Place:
    """One server without its other routes."""

    folder: Path
    store: SlowStore
    engine: AsyncEngine
    registry: AdapterRegistry
    http: httpx.AsyncClient
    metrics: Metrics

    async def load(self, name: str, path: str | None = None, **more: Any) -> httpx.Response:
        return await self.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path or name, **more})

    async def unload(self, name: str) -> httpx.Response:
        return await self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    def states(self) -> dict[str, str]:
        return {item.name: item.state for item in self.registry.items()}

    async def use(self, name: str) -> str:
        """Lease and give back; the revision."""
        lease = await self.registry.lease(name)
        lease.release()
        return lease.adapter.revision

    async def open(self, name: str, count: int) -> Stream:
        lease = await self.registry.lease(name)
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        request = Request(PROMPT, params, lease.adapter.revision, is_pooled=lease.adapter.manifest.is_pooled)
        return self.engine.open(request, lease.adapter, lease.release)

    async def tokens(self, name: str, count: int = 6) -> list[int | None]:
        async with await self.open(name, count) as stream:
            return await rest(stream)

    async def settle(self) -> None:
        """Until the engine thread has taken every command that was given before."""
        params = SamplingParams(temperature=0, max_tokens=1)
        async with self.engine.open(Request(PROMPT, params)) as stream:
            await rest(stream)


async def rest(stream: Stream) -> list[int | None]:
    return [event.token_id async for events in stream for event in events]


def serve(base: Path, folder: Path, body: Callable[[Place], Awaitable[Any]], **options: Any) -> Any:
    loaded = load_base(base, dtype=torch.float32)
    unload_seconds, max_waiting = options.pop("unload_seconds", 10.0), options.pop("max_waiting", 64)
    look_seconds, state_dir = options.pop("look_seconds", 0.0), options.pop("state_dir", None)
    store_options = {name: options.pop(name) for name in ("max_bytes", "max_adapters") if name in options}
    folder.mkdir(exist_ok=True)

    async def main() -> Any:
        chosen = EngineOptions(**{"kv_cache_bytes": 2**21} | options)
        engine = AsyncEngine(
            lambda lease: Engine(Transformer(loaded.config, loaded.weights), chosen, lease=lease, base_digest="d"),
            max_waiting=max_waiting,
        )
        store = SlowStore(loaded.config, base_name="base", adapters_dir=folder, **store_options)
        metrics = Metrics("base")
        directory = StateDirectory(state_dir) if state_dir is not None else None
        registry = AdapterRegistry(store, engine, metrics=metrics, unload_seconds=unload_seconds, directory=directory)
        metrics.attach(engine, registry)
        app = FastAPI()
        app.include_router(router)
        app.add_exception_handler(MoaError, _answer)
        app.state.server = Server(engine, registry, None, metrics, ServerSettings(), "base", "d", "0", 0)
        engine.start()
        registry.scan()
        registry.start(look_seconds=look_seconds)
        try:
            async with asyncio.timeout(30), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as http:
                return await body(Place(folder, store, engine, registry, http, metrics))
        finally:
            registry.stop()
            await engine.stop()
            if directory is not None:
                directory.close()

    return asyncio.run(main())


async def _answer(request: HttpRequest, error: Exception) -> Response:
    return response_of(error)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def refused(response: httpx.Response, status: int, code: str, *, param: str | None = None) -> str:
    """The message of an error in the server's one shape."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"]) == (status, code), error
    if param is not None:
        assert error["param"] == param
    return str(error["message"])
