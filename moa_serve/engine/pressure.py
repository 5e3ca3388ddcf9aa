"""MemoryWatch: what happens before memory runs out, so that the system need not choose whom to kill.

At 90 % of what the process may use, whatever is idle is evicted and new work refused; at 95 % the server is not ready, so that a load
balancer sends its requests elsewhere. What runs goes on. A server without work gives back what its allocator keeps of requests that are
over. Belongs to the event loop.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from moa_serve import faults
from moa_serve.model.memory import memory_in_use, release_memory

logger = logging.getLogger(__name__)

SHORT, CRITICAL = 0.90, 0.95
LOOK_SECONDS = 0.5
_EVICT_SECONDS = 2.0  # between two evictions: what was in use at the first may be idle now
_IDLE_LOOKS = 4  # without work, before freed memory goes back: the next request pays for its pages anew
_WORTH_TRIMMING = 2**20  # bytes that the process has grown by since


class MemoryWatch:
    """
    Args:
        limit_bytes: that the process may use; None for its control groups' alone.
        evict: gives back what is idle.
        is_idle: whether nobody waits for an answer. glibc keeps tens of MiB of bodies of megabytes for ever otherwise (issue 6, G12); to
            let it keep less all the time (M_MMAP_THRESHOLD) costs steps of 32 rows 6 %.
    """

    def __init__(
        self,
        limit_bytes: int | None = None,
        evict: Callable[[], None] = lambda: None,
        is_idle: Callable[[], bool] = lambda: False,
    ) -> None:
        self._limit_bytes, self._evict, self._is_idle = limit_bytes, evict, is_idle
        self._evicted_at = -1e9
        self._num_idle, self._trimmed_bytes = 0, 0
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
            if self.is_worth_trimming():
                await asyncio.to_thread(release_memory)  # some tens of milliseconds
                with suppress(OSError):
                    self._trimmed_bytes = psutil.Process().memory_info().rss
            await asyncio.sleep(LOOK_SECONDS)

    def is_worth_trimming(self) -> bool:
        """At every look: whether there has been no work for some of them, and the process holds more than after it was trimmed last."""
        self._num_idle = self._num_idle + 1 if self._is_idle() else 0
        if self._num_idle < _IDLE_LOOKS:
            return False
        held: int = self._trimmed_bytes
        with suppress(OSError):  # no descriptor is free
            held = psutil.Process().memory_info().rss
        return held > self._trimmed_bytes + _WORTH_TRIMMING

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
