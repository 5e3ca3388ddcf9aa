"""What one API key may do: requests and tokens a minute, and requests at once. A key that floods meets 429, and nobody else does.

Decided from the head of a request, before its body is read; off unless the operator sets a limit. Tokens are charged when they are known,
a prompt's when it is tokenised and a completion's at its end, and may leave a key in debt, which it waits off: over any length of time it
gets its rate, plus one minute's worth, plus what ran when the limit was reached. There is one account for each configured key,
so nobody can fill memory with them. Time is monotonic: a clock that is set changes nothing. Belongs to the event loop.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from moa_serve.errors import MoaError
from moa_serve.settings import ServerSettings


class RateLimited(MoaError):
    """A limit of this key is reached. `retry_seconds` is when to try again, at least 1."""

    code = "rate_limit_exceeded"

    def __init__(self, message: str, retry_seconds: float) -> None:
        self.retry_seconds = max(1, math.ceil(retry_seconds))
        super().__init__(f"{message}; try again in {self.retry_seconds} s")


class Bucket:
    """Holds a minute's worth and fills up evenly.

    Args:
        limit: units a minute, and the most that it holds.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._level, self._filled_at = float(limit), time.monotonic()

    @property
    def level(self) -> float:
        """What is there now; below 0 is a debt."""
        now = time.monotonic()
        self._level = min(float(self.limit), self._level + (now - self._filled_at) * self.limit / 60)
        self._filled_at = now
        return self._level

    def take(self, units: int) -> None:
        self._level = self.level - units

    def seconds_until(self, level: float) -> float:
        return max(0.0, (level - self.level) * 60 / self.limit)


class Account:
    """One key's."""

    def __init__(self, requests: int | None, tokens: int | None, at_once: int | None) -> None:
        self._buckets = {name: Bucket(limit) for name, limit in (("requests", requests), ("tokens", tokens)) if limit is not None}
        self._at_once, self._num_running = at_once, 0

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Room for one request, for as long as it lasts.

        Raises:
            RateLimited: nothing was taken then.
        """
        if self._at_once is not None and self._num_running >= self._at_once:
            raise RateLimited(f"this key may have {self._at_once} requests at once", 1)
        for name, bucket in self._buckets.items():
            if bucket.level < 1:
                raise RateLimited(f"this key may use {bucket.limit} {name} a minute", bucket.seconds_until(1))
        if "requests" in self._buckets:
            self._buckets["requests"].take(1)
        self._num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1

    def charge(self, num_tokens: int) -> None:
        if "tokens" in self._buckets:
            self._buckets["tokens"].take(num_tokens)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """OpenAI's: the limit, what is left of it, and when all of it will be there again."""
        found = []
        for name, bucket in self._buckets.items():
            values = ("limit", str(bucket.limit)), ("remaining", str(max(0, int(bucket.level)))), ("reset", _duration(bucket))
            found += [(f"x-ratelimit-{what}-{name}".encode(), value.encode()) for what, value in values]
        return found


class Accounts:
    """Args: keys: the ids of all that are limited."""

    def __init__(self, settings: ServerSettings, keys: list[str]) -> None:
        limits = settings.key_requests_per_minute, settings.key_tokens_per_minute, settings.key_concurrent_requests
        is_limited = any(limit is not None for limit in limits)
        self._accounts = {key: Account(*limits) for key in keys} if is_limited else {}

    def of(self, key: str | None) -> Account | None:
        """None where nothing limits it."""
        return None if key is None else self._accounts.get(key)


def _duration(bucket: Bucket) -> str:
    """As OpenAI writes it: 20ms, 1s, 6m0s."""
    seconds = bucket.seconds_until(bucket.limit)
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms" if seconds > 0 else "0s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
