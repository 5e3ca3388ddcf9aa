"""Buckets: how large values were, as the histogram of a metric wants it. One thread adds, and any other copies; neither waits."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Distribution:
    """A copy. `counts[i]` values were at most `bounds[i]` and above the one before it; the last count is of those above all bounds."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    sum: float


class Buckets:
    """
    Args:
        bounds: in ascending order.
    """

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def copy(self) -> Distribution:
        return Distribution(self._bounds, tuple(self._counts), self._sum)
