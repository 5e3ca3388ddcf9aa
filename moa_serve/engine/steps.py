"""StepTimes: how long steps take, of how many rows and tokens, and for how long in which part of the model.

The engine thread adds to plain numbers, about a microsecond a step; who shows them reads copies, at any time, and asks the engine nothing.
Which part takes how long, the native library counts in every step. The torch backend times a step by part in some dozens at most, and so
seldom that it takes half a percent of the time: on a CPU such a step reads the clock a few hundred times, which is nothing, but on a GPU it
is computed operation by operation in place of a recorded one, and waits for the device at each part.
"""

import random
import time
from collections.abc import Callable, Mapping

from moa_serve.engine.buckets import Buckets
from moa_serve.model.backend import PARTS, Backend

SAMPLING, OTHER = "sampling", "other"
STEP_PARTS = (*PARTS, SAMPLING, OTHER)
STEP_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 10)
STEP_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TIME_EVERY = 48  # steps on the average, where timing by part is not free
TIMING_SHARE = 0.005  # of the time of all steps, that timed ones may take more than others


def _draw_wait() -> int:
    """Steps until the next timed one. Drawn, or a load of requests of one length could have the same token of each timed for ever."""
    return random.randint(TIME_EVERY // 2, TIME_EVERY * 3 // 2)


class StepTimes:
    """
    Args:
        draw_wait: how many steps later the next one is timed by part, where that is not free.
    """

    def __init__(self, *, draw_wait: Callable[[], int] = _draw_wait) -> None:
        self.seconds, self.rows, self.tokens = Buckets(STEP_SECONDS), Buckets(STEP_ROWS), Buckets(STEP_TOKENS)
        self.num_timed = 0
        self._parts = dict.fromkeys(STEP_PARTS, 0.0)
        self._draw_wait = draw_wait
        self._wait = draw_wait()
        self._owed = 0.0  # seconds that the last timed step took more than others, less what the steps since have paid of it
        self._typical: dict[int, float] = {}  # seconds lately of steps that were not timed, by the bit length of their tokens
        self._is_timed = False
        self._started = self._sampling = 0.0

    @property
    def part_seconds(self) -> Mapping[str, float]:
        """Of the timed steps, by STEP_PARTS. In any thread."""
        return dict(self._parts)

    # -- the engine thread's side

    def begin(self, model: Backend) -> None:
        """A step begins. One that has nothing to compute, or that fails, has no `end` and is not counted."""
        self._is_timed = model.timing_is_free or (self._wait <= 0 and self._owed <= 0)
        if self._is_timed:
            model.start_timing()
        self._sampling = 0.0
        self._started = time.perf_counter()

    def sampled(self, seconds: float) -> None:
        """So long it took in this step to draw tokens."""
        self._sampling += seconds

    def end(self, model: Backend, rows: int, tokens: int) -> None:
        seconds = time.perf_counter() - self._started
        self.seconds.add(seconds)
        self.rows.add(rows)
        self.tokens.add(tokens)
        size = tokens.bit_length()
        typical = self._typical.get(size, seconds)
        if not self._is_timed:
            self._typical[size] = typical + (seconds - typical) / 8
            self._wait -= 1
            self._owed -= TIMING_SHARE * seconds
            return
        self._wait, self._owed = self._draw_wait(), seconds - typical
        known = self._sampling
        for part, spent in model.take_timing().items():
            self._parts[part] += spent
            known += spent
        self._parts[SAMPLING] += self._sampling
        self._parts[OTHER] += max(0.0, seconds - known)
        self.num_timed += 1
