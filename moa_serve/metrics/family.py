"""Family: one metric, its name, type, labels, buckets and meaning; and how a family becomes text. The page that a scrape gets and the one
that people read (docs/metrics.md) are made of the same ones.

Text format 0.0.4: a counter's name ends in `_total` in its header too.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Generic, TypeVar

from moa_serve.engine.buckets import Distribution

_SUFFIXES = ("", "_total", "_bucket", "_sum", "_count")
_Scene = TypeVar("_Scene")
Sample = tuple[tuple[str, ...], float | Distribution]
"""Values of the labels, and the series' value."""


@dataclass(frozen=True, slots=True)
class Family:
    """
    Args:
        kind: counter, gauge, histogram or summary.
        text: what it counts, and in which unit where the name does not say it.
        buckets: of a histogram, their upper bounds without infinity.
    """

    name: str
    kind: str
    text: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def header(self) -> list[str]:
        text = self.text.replace("\\", "\\\\").replace("\n", "\\n")
        return [f"# HELP {self.name} {text}", f"# TYPE {self.name} {self.kind}"]

    def lines(self, samples: Iterable[Sample]) -> Iterator[str]:
        for values, value in samples:
            pairs = [f'{label}="{_escaped(text)}"' for label, text in zip(self.labels, values, strict=True)]
            if not isinstance(value, Distribution):
                yield f"{self.name}{_braces(pairs)} {_number(value)}"
                continue
            bounds = [*map(_number, value.bounds), "+Inf"]
            for bound, number in zip(bounds, accumulate(value.counts), strict=True):
                yield f"{self.name}_bucket{_braces([*pairs, _le(bound)])} {_number(number)}"
            yield f"{self.name}_sum{_braces(pairs)} {_number(value.sum)}"
            yield f"{self.name}_count{_braces(pairs)} {_number(sum(value.counts))}"


def _number(value: float) -> str:
    return "+Inf" if value == math.inf else repr(float(value))


def _le(bound: str) -> str:
    return f'le="{bound}"'


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _braces(pairs: list[str]) -> str:
    return f"{{{','.join(pairs)}}}" if pairs else ""


@dataclass(frozen=True, slots=True)
class Shown(Generic[_Scene]):
    """A family, and what it says of a scene."""

    family: Family
    samples: Callable[[_Scene], Iterable[Sample]]


def one(
    name: str, kind: str, text: str, value: Callable[[_Scene], float | Distribution | None], buckets: tuple[float, ...] = ()
) -> Shown[_Scene]:  # fmt: skip
    """A family of one series without labels; None is none."""

    def samples(scene: _Scene) -> Iterator[Sample]:
        found = value(scene)
        if found is not None:
            yield (), found

    return Shown(Family(name, kind, text, buckets=buckets), samples)


class Wanted:
    """Which families a scrape asks for.

    Args:
        names: of families or of their series, as `moa_queue_seconds` or `moa_queue_seconds_bucket`; None for all.
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self.names: frozenset[str] | None = None
        """Of all series that the families may have."""
        if names is not None:
            stems = {name.removesuffix(suffix) for name in names for suffix in _SUFFIXES}
            self.names = frozenset(stem + suffix for stem in stems for suffix in _SUFFIXES)

    def __contains__(self, name: str) -> bool:
        return self.names is None or name in self.names


def text_of(shown: Iterable[Shown[_Scene]], scene: _Scene, wanted: Wanted) -> str:
    """The families that are wanted; of the others nothing is looked at."""
    lines: list[str] = []
    for one_of_them in shown:
        family = one_of_them.family
        if family.name in wanted:
            lines += family.header
            lines += family.lines(one_of_them.samples(scene))
    return "".join(f"{line}\n" for line in lines)
