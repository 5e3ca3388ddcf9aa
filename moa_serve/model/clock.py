"""PartClock: how long a forward spends in which of its parts. Made for a forward that is timed, and only for that."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import torch

from moa_serve.model.backend import PARTS

_P = ParamSpec("_P")
_R = TypeVar("_R")


class PartClock:
    """A moment belongs to the part that was entered last and not yet left: a router inside an expert is no expert's time.

    `seconds` by PARTS. On CUDA, every border waits for the device: kernels run behind the calls that ask for them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._entered: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._turn()
        self._entered.append(name)
        try:
            yield
        finally:
            self._turn()
            self._entered.pop()

    def timing(self, name: str, work: Callable[_P, _R]) -> Callable[_P, _R]:
        """`work`, whose time is the part's."""

        def timed(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            with self.part(name):
                return work(*args, **kwargs)

        return timed

    def _turn(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._entered:
            self.seconds[self._entered[-1]] += now - self._since
        self._since = now
