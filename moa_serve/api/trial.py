"""The self-test of an adapter while others are served: a short request among theirs, judged in a worker thread.

What is asked and how it is judged is engine/self_test.py. Belongs to the event loop.
"""

import asyncio
import time
from collections.abc import Sequence

from torch import Tensor

from moa_serve.adapter.adapter import Adapter
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.routing import Routing
from moa_serve.engine.self_test import judge, read_scores, score_request, trial_prompt
from moa_serve.errors import Overloaded

_LOOK_EVERY_SECONDS = 0.05


class AdapterTrial:
    """Tries adapters that nobody can name yet."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._base_logits: Tensor | None = None  # (T, V) of the trial prompt: the base is frozen, so once is enough

    async def run(self, name: str, adapter: Adapter, *, room_seconds: float) -> Adapter:
        """The adapter, with a warning where it does nothing and may.

        Args:
            room_seconds: how long to wait for a place while the engine is full.
        Raises:
            AdapterNotFinite, AdapterIneffective: it must not be served.
            Overloaded: the engine stayed full. EngineError: it failed, or stops.
        """
        prompt = trial_prompt(self._engine.engine.model.config.vocab_size, self._engine.engine.max_model_len)
        if self._base_logits is None:
            self._base_logits, _ = await self._score(prompt, None, room_seconds)
        logits, routing = await self._score(prompt, adapter, room_seconds)
        self._engine.forget_routing(adapter.revision)
        return await asyncio.to_thread(judge, name, adapter, self._base_logits, logits, routing)

    async def _score(self, prompt: Sequence[int], adapter: Adapter | None, room_seconds: float) -> tuple[Tensor, Routing | None]:
        manifest = adapter.manifest if adapter else None
        request = score_request(prompt, adapter.revision if adapter else None, manifest)
        until = time.monotonic() + room_seconds
        while True:
            try:
                stream = self._engine.open(request, adapter)
                break
            except Overloaded:
                if time.monotonic() >= until:
                    raise
                await asyncio.sleep(_LOOK_EVERY_SECONDS)
        async with stream:
            async for events in stream:
                for event in events:
                    if event.error is not None:
                        raise event.error
        assert stream.collected is not None, "a request that collects ends with what it collected"
        logits, routing = await asyncio.to_thread(read_scores, stream.collected, manifest, len(prompt))
        assert logits is not None, "logits were asked for"
        return logits, routing
