"""ShadowCheck: what sparsity costs, measured on live answers while the server is idle.

A share of the answers whose adapters left experts out is kept, as token ids, and scored again when nobody needs the engine: under the rules
that it was answered with, and with every expert kept. Only sums per adapter come out (metrics/shadow.py). A request that comes ends the
scoring; it is tried again later. Nothing is loaded for it, and nothing of it is traffic. Belongs to the event loop; the comparison runs in
a worker thread. How an answer is scored is engine/shadow.py.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack

import torch

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.rules import RoutingOptions, RoutingRules
from moa_serve.api.adapters import AdapterRegistry
from moa_serve.engine.async_engine import AsyncEngine, Stream
from moa_serve.engine.shadow import MAX_TOKENS, ROWS, ShadowSample, ShadowScore, compare, cut, dense_rules
from moa_serve.errors import MoaError
from moa_serve.metrics import Metrics

MAX_KEPT = 64  # answers that wait; the oldest makes room
QUIET_SECONDS = 0.5  # without a request, before the first is scored
LOOK_SECONDS = 0.1  # between two looks at whether it is quiet

logger = logging.getLogger(__name__)


class Interrupted(Exception):
    """Somebody needs the engine."""


class Skipped(Exception):
    """The answer will not be scored; `reason` is one of `SKIPPED`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class ShadowCheck:
    """
    Args:
        share: of the answers that qualify, 0 to 1.
        is_free: whether the server, apart from the engine's rows, has nothing better to do.
        draw: a number in [0, 1) for each answer.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        registry: AdapterRegistry,
        metrics: Metrics,
        share: float,
        is_free: Callable[[], bool],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._engine, self._registry, self._metrics = engine, registry, metrics
        self._share, self._is_free, self._draw = share, is_free, draw
        self._kept: deque[ShadowSample] = deque()  # oldest first
        self._is_filled = asyncio.Event()

    @property
    def num_kept(self) -> int:
        return len(self._kept)

    def offer(
        self,
        name: str,
        adapter: Adapter,
        rules: RoutingRules | None,
        options: RoutingOptions | None,
        answers: Sequence[tuple[Sequence[int], Sequence[int]]],
    ) -> None:
        """A request has ended well: keep a sample of its answers (prompt, answer), if its adapter left experts out."""
        drawn = [answer for answer in answers if self._draw() < self._share]
        if not drawn:
            return
        is_sparse, dense = dense_rules(rules, options, adapter.manifest)
        if not is_sparse:
            return
        engine = self._engine.engine
        # Two of them fit in half of the cache; the prefix cache keeps no more than the other half, so no page of it makes room for them.
        pool = engine.block_pool
        most = min(MAX_TOKENS, engine.max_model_len, (pool.num_blocks - 1) // 4 * pool.block_size)
        for prompt_ids, answer_ids in drawn:
            token_ids, num_scored = cut(prompt_ids, answer_ids, vocab_size=engine.model.config.vocab_size, most=most)
            if not num_scored:
                self._metrics.observe_shadow_skipped(name, "too_long")
                continue
            self._metrics.begin_shadow(name)
            self._keep(ShadowSample(name, adapter.revision, rules, dense, token_ids, num_scored))

    def _keep(self, sample: ShadowSample) -> None:
        if len(self._kept) == MAX_KEPT:
            self._metrics.observe_shadow_skipped(self._kept.popleft().adapter, "dropped")
        self._kept.append(sample)
        self._is_filled.set()

    async def run(self) -> None:
        """Score what is kept whenever it is quiet, until cancelled."""
        while True:
            await self._is_filled.wait()
            if not self._is_quiet():
                await asyncio.sleep(LOOK_SECONDS)
                continue
            sample = self._kept.popleft()
            try:
                score = await self._score(sample)
            except Interrupted:
                self._put_back(sample)
            except Skipped as skipped:
                self._metrics.observe_shadow_skipped(sample.adapter, skipped.reason)
            except Exception:  # one answer more or less: what watches must not end
                logger.exception("the shadow check of an answer failed")
                self._metrics.observe_shadow_skipped(sample.adapter, "failed")
            else:
                self._metrics.observe_shadow(sample.adapter, sample.revision, score)
            if not self._kept:
                self._is_filled.clear()

    def _is_quiet(self) -> bool:
        return self._engine.idle_seconds >= QUIET_SECONDS and self._is_free()

    def _put_back(self, sample: ShadowSample) -> None:
        if len(self._kept) < MAX_KEPT:
            self._kept.appendleft(sample)
        else:
            self._metrics.observe_shadow_skipped(sample.adapter, "dropped")

    async def _score(self, sample: ShadowSample) -> ShadowScore:
        """Raises Interrupted, Skipped."""
        async with AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(stream) for stream in self._open(sample)]
            for stream in streams:
                await _until_ended(stream)
        sparse, dense = [await asyncio.to_thread(_logits, stream) for stream in streams]
        total, token_ids = ShadowScore(), sample.token_ids[-sample.num_scored :]
        for start in range(0, sample.num_scored, ROWS):
            rows = slice(start, start + ROWS)
            part = await asyncio.to_thread(compare, sparse[rows], dense[rows], token_ids[rows])
            if part is None:
                raise Skipped("not_finite")
            if not self._is_quiet():
                raise Interrupted
            total += part
        if not self._registry.serves(sample.adapter, sample.revision):
            raise Skipped("gone")
        return total

    def _open(self, sample: ShadowSample) -> Iterator[Stream]:
        for request in sample.requests():
            lease = self._registry.lease_resident(sample.adapter, sample.revision)
            if lease is None:
                raise Skipped("gone")
            try:
                yield self._engine.open(request, lease.adapter, lease.release)
            except MoaError:  # it is out of service since, say
                lease.release()
                raise Skipped("failed") from None


async def _until_ended(stream: Stream) -> None:
    """Raises Interrupted, Skipped."""
    async for events in stream:
        if events[-1].error is not None:
            raise Skipped("failed")
        if events[-1].finish_reason == "abort":
            raise Interrupted


def _logits(stream: Stream) -> torch.Tensor:
    """(n, V), and no longer in pieces: 12 MiB are copied, so not in the loop."""
    assert stream.collected is not None, "a request that collects ends with what it collected"
    pieces = stream.collected.logits
    joined = torch.cat(pieces)
    pieces.clear()
    return joined
