"""ReturnTimes: when clients that are refused because there is no place may come again. Belongs to the event loop."""

import math
import time
from collections.abc import Callable

MAX_RETRY_SECONDS = 30.0
_NEWEST = 0.1  # weight of the newest request in the mean


class ReturnTimes:
    """Gives each client that is refused a turn of its own, as far from the one before as requests end from each other.

    If all were told "in a second", ten times as many clients as there are places would each ask every second, and refusing them would
    take what the server has to give to those who have a place (`python -m tests.soak --full`, G9).

    Args:
        num_rows: that run at once. They end as often as their number over the time that one takes (Little's law), which is known of
            earlier requests also where the server was idle until now.
    """

    def __init__(self, num_rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._num_rows, self._clock = num_rows, clock
        self._turn = clock()
        self._mean_seconds: float | None = None

    def observe(self, seconds: float) -> None:
        """A request has ended so long after its first row began."""
        mean = seconds if self._mean_seconds is None else self._mean_seconds
        self._mean_seconds = mean + _NEWEST * (seconds - mean)

    def next_seconds(self) -> int:
        """For `Retry-After`: until the next turn, 1 to 30; 1 as long as no request has ended."""
        now = self._clock()
        apart = (self._mean_seconds or 0.0) / self._num_rows
        self._turn = min(max(self._turn, now) + apart, now + MAX_RETRY_SECONDS)
        return max(1, math.ceil(self._turn - now))
