"""An engine in its thread for tests, and requests for it; `body` of `with_engine` runs in the event loop that it serves."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch

from moa_serve.adapter.adapter import Adapter
from moa_serve.config import ModelConfig
from moa_serve.engine.async_engine import AsyncEngine, Stream
from moa_serve.engine.engine import Engine, EngineOptions, TokenEvent
from moa_serve.engine.request import Request, SamplingParams
from moa_serve.model.backend import Backend
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import BaseWeights, load_base

PROMPT = (5, 17, 80)


def with_engine(
    base: Path,
    body: Callable[[AsyncEngine], Awaitable[Any]],
    max_waiting: int = 64,
    make_model: Callable[[ModelConfig, BaseWeights], Backend] = Transformer,
    **options: Any,
) -> Any:
    loaded = load_base(base, dtype=torch.float32)

    async def main() -> Any:
        chosen = EngineOptions(**{"kv_cache_bytes": 2**21} | options)
        engine = AsyncEngine(
            lambda lease: Engine(make_model(loaded.config, loaded.weights), chosen, lease=lease, base_digest="d"),
            max_waiting=max_waiting,
        )
        engine.start()
        try:
            async with asyncio.timeout(30):
                return await body(engine)
        finally:
            await engine.stop()

    return asyncio.run(main())


def ask(count: int | None, adapter: Adapter | None = None, prompt: tuple[int, ...] = PROMPT, **more: Any) -> Request:
    params = SamplingParams(**({"temperature": 0, "max_tokens": count, "ignore_eos": True} | more))
    return Request(prompt, params, adapter.revision if adapter else None, is_pooled=bool(adapter and adapter.manifest.is_pooled))


async def events_of(stream: Stream) -> list[TokenEvent]:
    async with stream:
        return [event async for events in stream for event in events]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def is_idle(engine: AsyncEngine) -> bool:
    return engine.engine.block_pool.num_held == 0 and engine.engine.slot_table.num_busy == 0 and not engine._sequences
