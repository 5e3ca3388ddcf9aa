"""How things are timed against each other: round robin in one run, medians of what each round says, and a control.

Absolute times drift with the machine's neighbours by a factor of two; a ratio of two things that took turns does not.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of some values and their quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def ratio(of: Sequence[float], to: Sequence[float]) -> Spread:
    """What each round says of one over the other."""
    return Spread.of([a / b for a, b in zip(of, to, strict=True)])


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved(cases: Mapping[str, Callable[[], float]], rounds: int, *, warmups: int = 1) -> dict[str, list[float]]:
    """Measure every case once a round, `rounds` times; the order turns, so that none always follows the same one.

    Args:
        cases: name -> a measurement, in seconds.
        warmups: rounds that do not count.
    """
    names = list(cases)
    found: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmups, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            value = cases[name]()
            if turn >= 0:
                found[name].append(value)
    return found


@contextmanager
def quiet(core: int | None = None) -> Iterator[None]:
    """Without the garbage collector and, where a core is given, with this process on that core alone."""
    before = os.sched_getaffinity(0)
    if core is not None:
        os.sched_setaffinity(0, {core})
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        os.sched_setaffinity(0, before)
