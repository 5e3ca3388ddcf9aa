"""AdapterCache: the budget holds, leases keep, and nothing changes where there is no room."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from support import random_tensors, tiny_config, tiny_manifest

from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.cache import AdapterCache
from moa_serve.errors import AdapterMemory, AdapterTooLarge

_MANIFEST = tiny_manifest(tiny_config(), "lora", targets=("Q",), layers=[0])
_TENSORS = random_tensors(_MANIFEST)
_SIZE = 4 * _MANIFEST.num_parameters


def adapter(revision: str) -> Adapter:
    return Adapter(_MANIFEST, _TENSORS, revision, "moa-adapter/1")


@pytest.mark.case(24)
def test_least_recently_used_idle_adapter_leaves_first() -> None:
    """Evicting a leased one would pull the weights from under a running request."""
    cache = AdapterCache(3 * _SIZE)
    for revision in "abc":
        cache.add(adapter(revision))
    assert cache.acquire("a") is not None
    cache.add(adapter("d"))
    assert [revision in cache for revision in "abcd"] == [True, False, True, True]
    assert cache.acquire("b") is None


@pytest.mark.case(24)
def test_no_room_changes_nothing() -> None:
    """Evicting some and failing all the same would cost a reload for nothing."""
    cache = AdapterCache(2 * _SIZE)
    cache.add(adapter("a"))
    cache.add(adapter("b"))
    cache.acquire("a")
    cache.acquire("b")
    with pytest.raises(AdapterMemory):
        cache.add(adapter("c"))
    assert "a" in cache
    assert "b" in cache
    with pytest.raises(AdapterTooLarge):
        AdapterCache(_SIZE - 1).add(adapter("a"))


def test_hits_misses_and_evictions_are_counted_once_each() -> None:
    """An operator sizes the cache by them: a look that belongs to the same request must not count again."""
    cache = AdapterCache(2 * _SIZE)
    cache.acquire(None)
    cache.acquire("a")
    cache.add(adapter("a"))
    cache.acquire("a", is_counted=False)
    cache.acquire("a")
    assert (cache.counts.hits, cache.counts.misses) == (1, 2)
    cache.add(adapter("b"))
    cache.add(adapter("c"))
    cache.discard("b")
    cache.discard("a", "replaced")
    assert cache.counts.evictions == {"capacity": 1, "pressure": 0, "unloaded": 0, "replaced": 0, "failed": 0}, "a is leased"
    cache.release("a")
    cache.release("a")
    cache.evict_idle()
    cache.add(adapter("d"))
    cache.discard("d")
    assert cache.counts.evictions == {"capacity": 1, "pressure": 1, "unloaded": 1, "replaced": 1, "failed": 0}
    assert cache.num_bytes == 0


def test_a_discarded_adapter_goes_with_its_last_lease() -> None:
    """Freed too early a request reads foreign memory; freed never, each reload leaks an adapter."""
    cache = AdapterCache(2 * _SIZE)
    cache.add(adapter("a"))
    cache.acquire("a")
    cache.acquire("a")
    cache.discard("a")
    cache.release("a")
    assert cache.num_bytes == _SIZE
    cache.release("a")
    assert cache.num_bytes == 0


class CacheMachine(RuleBasedStateMachine):
    """Any order of calls keeps the budget and every leased adapter."""

    revisions = st.sampled_from("abcdef")

    def __init__(self) -> None:
        super().__init__()
        self.cache = AdapterCache(3 * _SIZE)
        self.leases: list[str] = []

    @rule(revision=revisions)
    def add(self, revision: str) -> None:
        full = len(set(self.leases)) == 3 and revision not in self.cache
        if full:
            with pytest.raises(AdapterMemory):
                self.cache.add(adapter(revision))
        else:
            self.cache.add(adapter(revision))
            assert revision in self.cache

    @rule(revision=revisions)
    def acquire(self, revision: str) -> None:
        if self.cache.acquire(revision) is not None:
            self.leases.append(revision)

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        self.cache.release(self.leases.pop(0))

    @rule(revision=revisions)
    def discard(self, revision: str) -> None:
        self.cache.discard(revision)

    @invariant()
    def budget_and_leases_hold(self) -> None:
        assert self.cache.num_bytes <= 3 * _SIZE
        assert all(self.cache.num_leases(revision) == self.leases.count(revision) for revision in "abcdef")


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
