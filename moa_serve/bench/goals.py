"""What good looks like, as numbers, and a figure beside its goal.

All are ratios of one interleaved run on a CPU; on one pinned thread, but for `http_to_engine`, whose server has what threads it likes.
Those of a GPU say so.
"""

from dataclasses import dataclass
from typing import Any

from moa_serve.bench.timing import Spread

SPARSE_TO_SOFT = 1.02  # a whole step, at every size
SPARSE_TO_SOFT_TICKS = 0.85  # routers and experts alone
TOGETHER_TO_APART = 4.0  # eight tenants one after the other, over the same in one batch
BANDWIDTH_SHARE = 0.75  # of what memory was measured to give, at one row
SWAP_GAP = 1.5  # 99th percentile of the gaps between tokens with twice as many adapters as slots, over all of them resident
SWAP_THROUGHPUT = 0.9  # the same, tokens/s, over as many adapters as slots
IDLE_THROUGHPUT = 0.99  # the base alone with adapters in all slots, over none
HIT_TO_MISS = 0.15  # time to the first token with 512 tokens of the prompt in the prefix cache, over none
CROSSED_TOKENS = 0.0  # that one adapter found of what another had left there
METRICS_TO_NONE = 1.01  # a decode step that is counted, over one that is not
INT8_TO_BFLOAT16 = 0.62  # the base's step at one row, kept in eight bits over kept in bfloat16
MIXED_ADAPTERS = 8  # the goals for mixed batches are of this many
DISTINCT_ADAPTERS, DISTINCT_TO_BASE_ON_GPU = 32, 1.10  # so many in one batch, a row each, over the base alone
_LARGE_BASE = 800_000_000  # weights; from here on an adapter's bytes hardly count beside the base's


@dataclass(frozen=True, slots=True)
class Judged:
    """What was found, and the most that it may be; the least, where `is_floor`. Without a goal it is only shown."""

    found: Spread
    goal: float | None = None
    is_floor: bool = False

    @property
    def is_met(self) -> bool | None:
        """By the median; None without a goal."""
        if self.goal is None:
            return None
        return self.found.median >= self.goal if self.is_floor else self.found.median <= self.goal

    def to_json(self) -> dict[str, Any]:
        return self.found.to_json() | {"goal": self.goal, "is_met": self.is_met}


def adapter_to_base(rows: int, tokens: int) -> float:
    """A step with one MoA adapter over one of the base alone."""
    if tokens > 1:
        return 1.10
    return 1.06 if rows == 1 else 1.08


def adapter_to_base_on_gpu(rows: int) -> float | None:
    """A decode step with one MoA adapter over one of the base alone, which reads the same weights for one row as for many."""
    if rows >= 16:
        return 1.03
    return 1.05 if rows == 1 else None


def mixed_throughput(num_weights: int) -> float:
    """Eight adapters in one batch over one: each adapter is read once a step, which a small base makes a visible share of its bytes."""
    return 0.95 if num_weights >= _LARGE_BASE else 0.87


def http_to_engine(streams: int) -> float | None:
    """Tokens/s of a server over HTTP, over those of the engine alone in the client's process."""
    return 0.92 if streams == 8 else None


def against_authors(backend: str, rows: int) -> float | None:
    """Their step over ours, with the same adapter."""
    if backend == "torch":
        return 2.5 if rows == 1 else None
    return 5.0 if rows in (1, 8, 16) else None


def against_transformers(backend: str, rows: int) -> float | None:
    """transformers' step over ours, the base alone."""
    return {1: 3.5, 8: 4.0}.get(rows) if backend == "native" else None
