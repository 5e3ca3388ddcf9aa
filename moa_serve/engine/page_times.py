"""PageTimes: how long KV pages keep their content, how long nobody holds it before it goes, and after how long somebody wants it again.

Of one page in SAMPLED, so that a step does not read the clock for each of them. Knows no tensors. The engine thread adds, any other copies.
"""

import time
from collections.abc import Callable

from moa_serve.engine.buckets import Buckets

SAMPLED = 16  # the first page is handed out before all others, and is one of them
PAGE_SECONDS = (
    0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800,
)  # fmt: skip


class PageTimes:
    """
    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.lifetime, self.idle, self.reuse_gap = (Buckets(PAGE_SECONDS) for _ in range(3))
        self._clock = clock
        self._began: dict[int, float] = {}  # when a sampled page was handed out for what it contains
        self._used: dict[int, float] = {}  # when a sequence last began to hold it
        self._left: dict[int, float] = {}  # when its last holder went

    def begin(self, page: int) -> None:
        """It is handed out, to be filled."""
        if page % SAMPLED == 1:
            self._began[page] = self._used[page] = self._clock()

    def reuse(self, page: int) -> None:
        """Another sequence begins to hold what it contains."""
        if page in self._used:
            now = self._clock()
            self.reuse_gap.add(now - self._used[page])
            self._used[page] = now

    def leave(self, page: int) -> None:
        """Nobody holds it any more; it may be found again."""
        if page in self._used:
            self._left[page] = self._clock()

    def evict(self, page: int) -> None:
        """Its content goes, for another's room; nobody has held it since it was left."""
        if page in self._left:
            now = self._clock()
            self.lifetime.add(now - self._began[page])
            self.idle.add(now - self._left[page])

    def renewed(self) -> "PageTimes":
        """Goes on counting, for other pages."""
        renewed = PageTimes(self._clock)
        renewed.lifetime, renewed.idle, renewed.reuse_gap = self.lifetime, self.idle, self.reuse_gap
        return renewed
