"""AdapterCache: adapters in host memory by revision, within a budget of bytes.

Knows no names and no files. A lease keeps an adapter; idle ones leave least recently used first when room is needed. State is owned
by the caller's thread (the event loop, or LLM): no locks.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.counts import EvictionReason, TierCounts
from moa_serve.errors import AdapterMemory, AdapterTooLarge


@dataclass(slots=True)
class _Cached:
    adapter: Adapter
    num_leases: int = 0
    leaves_as: EvictionReason | None = None  # with its last lease


class AdapterCache:
    """revision -> Adapter. Every method is all or nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.counts = TierCounts()
        self.on_evict: Callable[[str], None] | None = None  # told the revision of each that left to make room
        self._cached: OrderedDict[str, _Cached] = OrderedDict()  # least recently used first

    def __contains__(self, revision: str) -> bool:
        return revision in self._cached

    def __len__(self) -> int:
        return len(self._cached)

    @property
    def num_bytes(self) -> int:
        """Host memory in use, of discarded adapters that are still leased too."""
        return sum(cached.adapter.num_bytes for cached in self._cached.values())

    def bytes_of(self, revision: str) -> int:
        """Host memory that an adapter takes now; 0 where it is not here."""
        cached = self._cached.get(revision)
        return cached.adapter.num_bytes if cached else 0

    def peek(self, revision: str) -> Adapter | None:
        """An adapter to look at, without a lease; None if it is not here."""
        cached = self._cached.get(revision)
        return cached.adapter if cached else None

    def num_leases(self, revision: str) -> int:
        cached = self._cached.get(revision)
        return cached.num_leases if cached else 0

    def add(self, adapter: Adapter) -> None:
        """Keep an adapter, evicting idle ones for it; one that is there already is as good.

        Raises:
            AdapterTooLarge: it alone is above the budget.
            AdapterMemory: the leased ones leave too little; nothing was evicted.
        """
        known = self._cached.get(adapter.revision)
        if known:
            known.leaves_as = None
            return
        if adapter.num_bytes > self.max_bytes:
            raise AdapterTooLarge(
                f"the adapter has {adapter.num_bytes:,} bytes, the budget for all adapters is {self.max_bytes:,}; raise it"
            )
        excess = self.num_bytes + adapter.num_bytes - self.max_bytes
        leaving: list[str] = []
        for revision, cached in self._cached.items():
            if excess <= 0:
                break
            if cached.num_leases == 0:
                leaving.append(revision)
                excess -= cached.adapter.num_bytes
        if excess > 0:
            raise AdapterMemory(f"no room for {adapter.num_bytes:,} bytes: all other adapters are in use; try again, or raise the budget")
        for revision in leaving:
            self._evict(revision, "capacity")
        self._cached[adapter.revision] = _Cached(adapter)

    def acquire(self, revision: str | None, *, is_counted: bool = True) -> Adapter | None:
        """Lease an adapter; None if it is not here (evicted, or never added). Give it back with `release`.

        Args:
            revision: None of an adapter that was never read.
            is_counted: as a hit or a miss: once for each who needs it, not again after a miss.
        """
        cached = None if revision is None else self._cached.get(revision)
        if is_counted:
            self.counts.found(cached is not None)
        if cached is None or revision is None:
            return None
        cached.num_leases += 1
        self._cached.move_to_end(revision)
        return cached.adapter

    def release(self, revision: str) -> None:
        """End one lease."""
        cached = self._cached[revision]
        assert cached.num_leases > 0, "released more often than acquired"
        cached.num_leases -= 1
        if cached.leaves_as is not None and cached.num_leases == 0:
            self._remove(revision, cached.leaves_as)

    def evict_idle(self) -> int:
        """Memory is short: free every adapter that is not leased; the bytes that became free. They are read again when asked for."""
        idle = [revision for revision, cached in self._cached.items() if cached.num_leases == 0]
        return sum(self._evict(revision, "pressure") for revision in idle)

    def _evict(self, revision: str, reason: EvictionReason) -> int:
        num_bytes = self._remove(revision, reason)
        if self.on_evict is not None:
            self.on_evict(revision)
        return num_bytes

    def _remove(self, revision: str, reason: EvictionReason) -> int:
        self.counts.evictions[reason] += 1
        return self._cached.pop(revision).adapter.num_bytes

    def discard(self, revision: str, reason: EvictionReason = "unloaded") -> None:
        """Free an adapter that nobody will ask for again: now, or with its last lease."""
        cached = self._cached.get(revision)
        if cached is None:
            return
        cached.leaves_as = reason
        if cached.num_leases == 0:
            self._remove(revision, reason)
