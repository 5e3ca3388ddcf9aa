"""Revisions: how long the content of an adapter stays in host memory and in the engine, beyond what a name serves now.

A request's lease keeps what it began with, a pin the current revision of its name, an alias an old one that it names. What nobody holds
and no name has is dropped everywhere. Belongs to the event loop.
"""

import logging
from collections.abc import Iterator, Sequence

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.counts import EvictionReason
from moa_serve.adapter.store import AdapterStore
from moa_serve.engine.async_engine import AsyncEngine

logger = logging.getLogger(__name__)


class Revisions:
    def __init__(self, store: AdapterStore, engine: AsyncEngine) -> None:
        self._store, self._engine = store, engine
        self._retired: dict[str, EvictionReason] = {}  # that no name has any more, but that are held, and why they go
        self._for_aliases: set[str] = set()  # of these, held because an alias names them
        self._old: dict[str, dict[str, str]] = {}  # by name: what a reload replaced and is still there, and its variant
        self._pinned: dict[str, str] = {}  # by name: what its pin holds now

    def acquire(self, revision: str | None, *, is_counted: bool = False) -> Adapter | None:
        """One more holder; None where it is not in memory. Give it back with `release`.

        Args:
            is_counted: as a hit or a miss of the cache.
        """
        return self._store.cache.acquire(revision, is_counted=is_counted)

    def release(self, revision: str) -> None:
        """One holder less; a retired revision goes with its last one."""
        self._store.cache.release(revision)
        if revision in self._retired and not self._store.cache.num_leases(revision):
            reason = self._retired.pop(revision)
            for name, old in list(self._old.items()):
                old.pop(revision, None)
                if not old:
                    del self._old[name]
            self._engine.drop(revision, reason)

    def retire(self, revision: str, reason: EvictionReason) -> None:
        """A name has it no more: unless another has, it goes everywhere, now or with its last holder."""
        if self._store.is_named(revision):
            return
        if self._store.cache.num_leases(revision):
            self._retired[revision] = reason
        else:
            self._engine.drop(revision, reason)

    def revive(self, name: str, revision: str) -> None:
        """A name serves it (again)."""
        self._retired.pop(revision, None)
        self._old.get(name, {}).pop(revision, None)
        self.drop_for_alias(revision)

    # -- old ones

    def replaced(self, name: str, revision: str, variant: str | None) -> None:
        """A reload has put another in its place."""
        if self._store.cache.num_leases(revision) and not self._store.is_named(revision):
            self._old.setdefault(name, {})[revision] = variant or ""
        self.retire(revision, "replaced")

    def old_of(self, name: str) -> Iterator[tuple[str, str, int]]:
        """Revision, variant and number of requests of each old one that is still there."""
        for revision, variant in self._old.get(name, {}).items():
            yield revision, variant, self._store.cache.num_leases(revision) - (revision in self._for_aliases)

    def acquire_old(self, name: str, digits: Sequence[str], *, is_counted: bool) -> Adapter | None:
        """One that begins with all of these digits."""
        for revision in self._old.get(name, {}):
            if all(revision.startswith(part) for part in digits):
                return self.acquire(revision, is_counted=is_counted)
        return None

    def hold_for_alias(self, name: str, revision: str) -> None:
        if revision in self._for_aliases:
            return
        if self.acquire(revision) is None:
            logger.warning("revision %s of adapter %s is an alias's target, but left memory before it was replaced", revision[:12], name)
        else:
            self._for_aliases.add(revision)

    def drop_for_alias(self, revision: str) -> None:
        if revision in self._for_aliases:
            self._for_aliases.discard(revision)
            self.release(revision)

    # -- pins

    def pin(self, name: str, revision: str | None) -> None:
        """Let the pin of a name hold this one in place of what it held; it holds nothing new where that is not in memory."""
        held = self._pinned.get(name)
        if held == revision or (revision is not None and self.acquire(revision) is None):
            return
        if revision is None:
            del self._pinned[name]
        else:
            self._pinned[name] = revision
        if held is not None:
            self.release(held)
