"""MemoryWatch: what happens before memory runs out, so that the system need not choose whom to kill.

At 90 % of what the process may use, whatever is idle is evicted and new work refused; at 95 % the server is not ready, so that a load
balancer sends its requests elsewhere. What runs goes on. Belongs to the event loop; without a limit there is nothing to watch.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from moa_serve import faults
from moa_serve.model.memory import memory_in_use

logger = logging.getLogger(__name__)

SHORT, CRITICAL = 0.90, 0.95
LOOK_SECONDS = 0.5
_EVICT_SECONDS = 2.0  # between two evictions: what was in use at the first may be idle now


class MemoryWatch:
    """
    Args:
        limit_bytes: that the process may use; None for its control groups' alone.
        evict: gives back what is idle.
    """

    def __init__(self, limit_bytes: int | None = None, evict: Callable[[], None] = lambda: None) -> None:
        self._limit_bytes, self._evict = limit_bytes, evict
        self._evicted_at = -1e9
        self.share: float | None = None  # of the limit that is in use; None without one

    @property
    def is_short(self) -> bool:
        return self.share is not None and self.share >= SHORT

    @property
    def is_critical(self) -> bool:
        return self.share is not None and self.share >= CRITICAL

    async def run(self) -> None:
        while True:
            self.look()
            await asyncio.sleep(LOOK_SECONDS)

    def look(self) -> None:
        was_short = self.is_short
        with suppress(OSError):  # it cannot be read now, as where no descriptor is free: it is what it was, and the watch goes on
            self.share = memory_in_use(self._limit_bytes)
        if faults.active:
            faults.active.strike("loop")
            self.share = faults.active.value("memory", self.share or 0.0)
        if self.is_short and time.monotonic() - self._evicted_at >= _EVICT_SECONDS:
            self._evicted_at = time.monotonic()
            self._evict()
        if self.is_short != was_short:
            what = "refused" if self.is_short else "taken"
            logger.warning("%.0f %% of the memory limit are in use; new work is %s", 100 * (self.share or 0), what)
