"""Looks: when the adapters directory is looked at: one look at a time, one a second for requests, and again and again for the watch.

What a look sees is folders.py's, what it means the registry's. Belongs to the event loop; a look itself runs in a worker thread.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

REST_FACTOR = 20  # the watch rests this many times as long as its last look took


class Looks:
    """
    Args:
        look: looks, and takes over what is found.
    """

    def __init__(self, look: Callable[[], Awaitable[None]]) -> None:
        self._look = look
        self._running: asyncio.Task[None] | None = None
        self._ended_at, self._seconds = -1e9, 0.0

    def begin(self) -> None:
        """Look, unless a look is in progress."""
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def again(self, every: float) -> None:
        """Wait for the look in progress, or for a new one where the last is `every` seconds old."""
        if time.monotonic() - self._ended_at >= every:
            self.begin()
        if self._running is not None:
            await asyncio.shield(self._running)

    async def now(self) -> None:
        """A look that begins after this call."""
        if self._running is not None:
            await asyncio.shield(self._running)
        self.begin()
        assert self._running is not None
        await asyncio.shield(self._running)

    def has_looked(self) -> None:
        """Somebody else did: at the start."""
        self._ended_at = time.monotonic()

    async def watch(self, every: float, then: Callable[[], None]) -> None:
        """Look without end, less often where a look takes long, and call `then` after each."""
        while True:
            await asyncio.sleep(max(every, REST_FACTOR * self._seconds))
            try:
                await self.now()
                then()
            except Exception:  # the next look may see better
                logger.exception("following the adapters directory failed")

    async def _run(self) -> None:
        started = time.monotonic()
        try:
            await self._look()
        finally:
            self._ended_at = time.monotonic()
            self._seconds = self._ended_at - started
            self._running = None
