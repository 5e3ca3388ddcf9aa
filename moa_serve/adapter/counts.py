"""TierCounts: how often adapters were found in a place that is scarce, host memory or a slot, and why they left it. Ints, for any thread
to read; whoever owns the place counts."""

from dataclasses import dataclass, field
from typing import Literal

EvictionReason = Literal["capacity", "pressure", "unloaded", "replaced", "failed"]
EVICTION_REASONS: tuple[EvictionReason, ...] = ("capacity", "pressure", "unloaded", "replaced", "failed")


@dataclass(eq=False, slots=True)
class TierCounts:
    """
    Args:
        hits, misses: how often the adapter that somebody needed was there, and was not.
        evictions: by reason: room for another was needed (capacity), memory is short (pressure), its name is gone (unloaded), a newer
            revision has its name (replaced), or it failed: its self-test, or the engine that it stood in.
    """

    hits: int = 0
    misses: int = 0
    evictions: dict[EvictionReason, int] = field(default_factory=lambda: dict.fromkeys(EVICTION_REASONS, 0))

    def found(self, is_there: bool) -> None:
        if is_there:
            self.hits += 1
        else:
            self.misses += 1
