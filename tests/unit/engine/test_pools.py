"""BlockPool and SlotTable: nothing is lost, nothing is given twice, whatever the order of calls."""

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from moa_serve.engine.page_times import PageTimes
from moa_serve.engine.pools import BlockPool, SlotTable
from moa_serve.errors import EngineError


def test_block_zero_is_never_handed_out() -> None:
    """Padded rows point at it: whoever owned it would be read by others."""
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    assert blocks is not None
    assert sorted(blocks) == [1, 2, 3, 4]
    assert pool.allocate(1) is None


def test_allocation_is_all_or_nothing() -> None:
    """A part that was taken before the refusal would leak."""
    pool = BlockPool(4)
    assert pool.allocate(4) is None
    assert pool.num_free == 3
    assert pool.allocate(0) == []


def test_freed_blocks_come_back_first_and_in_their_order() -> None:
    """Handing out the oldest instead would touch every page of a cache that is meant to grow lazily."""
    pool = BlockPool(100)
    first = pool.allocate(3)
    assert first is not None
    pool.free(first)
    assert pool.allocate(3) == first


@pytest.mark.parametrize("blocks", [[1, 1], [2], [0]])
def test_a_block_that_nobody_holds_cannot_be_freed(blocks: list[int]) -> None:
    """A double free gives one block to two sequences, which then read each other's text."""
    pool = BlockPool(4)
    pool.allocate(1)
    with pytest.raises(AssertionError):
        pool.free(blocks)


def test_blocks_for_rounds_up() -> None:
    """One token more than a whole block needs another."""
    pool = BlockPool(4, block_size=16)
    assert [pool.blocks_for(n) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    assert pool.max_tokens == 48


def test_a_pool_without_room_is_refused() -> None:
    """It would accept requests and never run one."""
    with pytest.raises(EngineError):
        BlockPool(1)
    with pytest.raises(EngineError):
        SlotTable(-1)


def taken(pool: BlockPool, count: int) -> list[int]:
    blocks = pool.allocate(count)
    assert blocks is not None
    return blocks


def test_what_was_kept_is_found_while_its_room_is_not_needed() -> None:
    """Given away though there is an empty one, a page is computed again; not given away, the pool has shrunk."""
    pool = BlockPool(5, max_kept=4)
    first, second, third = taken(pool, 3)
    for block, key in ((first, b"1"), (second, b"2")):
        pool.keep(block, key)
    pool.free([first, second, third])
    assert (pool.num_held, pool.num_free, pool.num_kept) == (0, 4, 2)
    assert set(taken(pool, 2)) == {third, 4}
    assert (pool.find(b"1"), pool.find(b"2")) == (first, second)
    assert taken(pool, 1) == [second], "the last page of a text leaves first: without the one before it, it is of no use"
    assert (pool.find(b"1"), pool.find(b"2")) == (first, None)
    assert pool.allocate(2) is None


def test_a_shared_block_is_free_when_its_last_holder_has_gone() -> None:
    """Freed with the first, it is given to another while the second still reads it."""
    pool = BlockPool(5, max_kept=4)
    [block] = taken(pool, 1)
    pool.keep(block, b"1")
    assert pool.allocate(2, shared=[block]) is not None
    pool.free([block])
    assert (pool.num_held, pool.num_kept) == (3, 0)
    pool.free([block])
    assert (pool.num_held, pool.num_kept) == (2, 1)
    assert pool.allocate(2, shared=[block]) is None, "the shared one is not room for another"
    assert pool.allocate(1, shared=[block]) is not None


def test_no_more_is_kept_than_the_pool_was_told_to() -> None:
    """Every page of a cache that is touched lazily would be touched in the end."""
    pool = BlockPool(100, max_kept=3)
    for number in range(40):
        [block] = taken(pool, 1)
        pool.keep(block, bytes([number]))
        pool.free([block])
        assert block <= 4
    assert pool.num_kept == 3
    assert [number for number in range(40) if pool.find(bytes([number]))] == [37, 38, 39]
    nothing = BlockPool(100)
    [block] = taken(nothing, 1)
    nothing.keep(block, b"1")
    assert nothing.find(b"1") is None


def test_how_long_pages_live_and_lie_idle_is_timed() -> None:
    now = 0.0
    times = PageTimes(lambda: now)
    pool = BlockPool(40, max_kept=4, times=times)
    [page] = taken(pool, 1)
    pool.keep(page, b"1")
    now = 3.0
    assert pool.allocate(0, shared=[page]) == []  # found three seconds after the first row began to hold it
    now = 4.0
    pool.free([page])
    now = 10.0
    pool.free([page])
    others = taken(pool, 4)  # none of them is a page that is timed
    for number, other in enumerate(others):
        pool.keep(other, bytes([number + 2]))
    now = 50.0
    pool.free(others)  # five are too many to be kept
    assert pool.find(b"1") is None
    lifetime, idle, gap = times.lifetime.copy(), times.idle.copy(), times.reuse_gap.copy()
    assert (lifetime.sum, sum(lifetime.counts)) == (50.0, 1)
    assert (idle.sum, sum(idle.counts)) == (40.0, 1)
    assert (gap.sum, sum(gap.counts)) == (3.0, 1)

    renewed = BlockPool(40, max_kept=4, times=times.renewed())
    [page] = taken(renewed, 1)
    renewed.keep(page, b"1")
    now = 51.0
    renewed.free([page, *taken(renewed, 0)])
    for number in range(4):
        [other] = taken(renewed, 1)
        renewed.keep(other, bytes([number + 2]))
        renewed.free([other])
    assert (times.lifetime.copy().sum, sum(times.lifetime.copy().counts)) == (51.0, 2), "it goes on counting, for pages of its own"


def test_a_content_that_is_known_is_not_kept_twice() -> None:
    """Two rows that began at the same time computed the same; the second copy would take room for nothing."""
    pool = BlockPool(5, max_kept=4)
    one, other = taken(pool, 2)
    for block in (one, other):
        pool.keep(block, b"1")
    assert pool.find(b"1") == one
    pool.free([one, other])
    assert (pool.num_kept, pool.num_free) == (1, 4)


@pytest.mark.parametrize("is_held", [True, False])
def test_what_is_forgotten_is_never_found_again(is_held: bool) -> None:
    """Pages of an adapter that is gone, or of a row that failed."""
    pool = BlockPool(5, max_kept=4)
    one, other = taken(pool, 2)
    pool.keep(one, b"1", "a")
    pool.keep(other, b"2", "b")
    if not is_held:
        pool.free([one, other])
    pool.forget_owner("a")
    assert (pool.find(b"1"), pool.find(b"2")) == (None, other)
    pool.forget([other, other])
    assert pool.find(b"2") is None
    if is_held:
        pool.free([one, other])
    assert (pool.num_kept, pool.num_free) == (0, 4)


@dataclass(frozen=True)
class Table:
    """What one taker holds."""

    blocks: list[int]


class BlockPoolMachine(RuleBasedStateMachine):
    """Random takers, sharers and givers against a list of who holds what, and a dict of what each block contains."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Table] = []
        self.content: dict[int, int] = {}  # written by the last who took a block as new, who may have kept it since
        self.forgotten: set[int] = set()
        self.num_written = 0

    @initialize(num_blocks=st.integers(2, 20), max_kept=st.sampled_from([0, 1, 4, 20]))
    def start(self, num_blocks: int, max_kept: int) -> None:
        self.pool, self.max_kept = BlockPool(num_blocks, max_kept=max_kept), max_kept

    def key(self, content: int) -> bytes:
        return content.to_bytes(4, "big")

    def find(self, contents: list[int]) -> list[int]:
        found = [self.pool.find(self.key(content)) for content in contents]
        return [block for block in found if block is not None]

    @rule(count=st.integers(0, 8), data=st.data())
    def take(self, count: int, data: st.DataObject) -> None:
        known = data.draw(st.lists(st.integers(1, max(1, self.num_written)), unique=True, max_size=4))
        shared, free = self.find(known), self.pool.num_free
        idle = [block for block in shared if not any(block in table.blocks for table in self.tables)]
        assert self.pool.num_kept_of(shared) == len(idle)
        blocks = self.pool.allocate(count, shared=shared)
        assert (blocks is None) == (count + len(idle) > free)
        if blocks is None:
            assert self.find(known) == shared, "a refusal has changed something"
            return
        held = {block for table in self.tables for block in table.blocks}
        assert len(set(blocks)) == count
        assert not held & set(blocks), "a block that is written anew is somebody else's"
        assert not set(shared) & set(blocks)
        for block in blocks:
            self.num_written += 1
            self.content[block] = self.num_written
        self.tables.append(Table(shared + blocks))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), owner=st.sampled_from([None, "a", "b"]))
    def keep(self, data: st.DataObject, owner: str | None) -> None:
        for block in data.draw(st.sampled_from(self.tables)).blocks:
            self.pool.keep(block, self.key(self.content[block]), owner)
            found = self.pool.find(self.key(self.content[block]))
            assert found == (block if self.max_kept else None)
            self.forgotten.discard(self.content[block])

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        self.pool.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))).blocks)

    @rule(data=st.data())
    def forget(self, data: st.DataObject) -> None:
        blocks = data.draw(st.lists(st.integers(1, self.pool.num_blocks - 1), max_size=4))
        self.pool.forget(blocks)
        self.forgotten |= {self.content[block] for block in blocks if block in self.content}

    @rule(owner=st.sampled_from([None, "a", "b"]))
    def forget_owner(self, owner: str | None) -> None:
        self.pool.forget_owner(owner)
        assert all(whose != owner for _, whose in self.pool._names.values())

    @invariant()
    def whatever_is_held_stays_and_nothing_is_lost(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = {block for table in self.tables for block in table.blocks}
        assert len(held) == self.pool.num_held
        assert all(0 < block < self.pool.num_blocks for block in held)
        assert self.pool.num_free + self.pool.num_held == self.pool.num_blocks - 1
        assert self.pool.num_kept <= self.max_kept

    @invariant()
    def who_finds_a_block_finds_what_was_written_there(self) -> None:
        if not hasattr(self, "pool"):
            return
        for content in range(1, self.num_written + 1):
            block = self.pool.find(self.key(content))
            assert block is None or (self.content[block] == content and content not in self.forgotten)


def test_the_least_recently_used_idle_slot_is_evicted() -> None:
    """Evicting the hot one instead makes every request upload its adapter."""
    table = SlotTable(2)
    for revision in ("a", "b"):
        slot = table.assign(revision)
        assert slot is not None
        table.acquire(slot)
        table.release(slot)
    table.acquire(0)  # "a" again: now "b" is the older
    table.release(0)
    assert table.assign("c") == 1
    assert table.revisions == ["a", "c"]


def test_an_empty_slot_is_taken_before_anything_is_evicted() -> None:
    """What stands in an idle slot may be wanted again."""
    table = SlotTable(3)
    assert [table.assign(revision) for revision in ("a", "b", "a")] == [0, 1, 0]


def test_a_busy_slot_is_never_taken() -> None:
    """Its rows would go on with another adapter's weights."""
    table = SlotTable(1)
    assert table.assign("a") == 0
    table.acquire(0)
    assert table.assign("b") is None
    table.release(0)
    assert table.assign("b") == 0
    assert table.find("a") is None


def test_an_upload_is_asked_for_until_it_is_done() -> None:
    """One that failed half way must not be taken for a loaded adapter."""
    table = SlotTable(1)
    table.assign("a")
    assert table.needs_upload(0)
    table.assign("a")
    assert table.needs_upload(0)
    table.mark_uploaded(0, "other")
    assert table.needs_upload(0)
    table.mark_uploaded(0, "a")
    assert not table.needs_upload(0)
    table.assign("b")
    assert table.needs_upload(0)


def test_drop_waits_for_the_last_user() -> None:
    """Running requests keep the revision that they began with; an idle one goes at once."""
    table = SlotTable(2)
    table.assign("a")
    table.acquire(0)
    table.assign("b")
    assert table.drop("b") == 1
    assert table.drop("a") is None
    assert table.drop("unknown") is None
    assert table.revisions == ["a", None]
    table.release(0)
    assert table.revisions == [None, None]
    table.assign("a")
    assert table.needs_upload(0), "after a drop nothing is taken for loaded"


def test_a_release_without_an_acquire_is_our_bug() -> None:
    """The count would go below zero and the slot would be evicted under its next user."""
    table = SlotTable(1)
    with pytest.raises(AssertionError):
        table.acquire(0)
    table.assign("a")
    with pytest.raises(AssertionError):
        table.release(0)


def test_a_slot_counts_who_found_his_adapter_and_why_adapters_left() -> None:
    """What never got into its slot, as its upload failed, neither was there nor left it."""
    table = SlotTable(2)
    for revision in ("a", "a", "b"):
        slot = table.assign(revision)
        assert slot is not None
        table.acquire(slot)
        table.mark_uploaded(slot, revision)
    assert (table.counts.hits, table.counts.misses) == (1, 2)
    for slot in (0, 0, 1):
        table.release(slot)
    assert table.assign("c") == 0
    table.drop("c", "failed")
    table.assign("d")
    table.acquire(0)
    table.acquire(0)
    table.mark_uploaded(0, "d")
    assert (table.counts.hits, table.counts.misses) == (1, 4), "who waits for an upload has not found it there"
    table.drop("d", "replaced")
    assert table.counts.evictions == {"capacity": 1, "pressure": 0, "unloaded": 0, "replaced": 0, "failed": 0}
    table.release(0)
    table.release(0)
    table.evict_idle()
    assert table.counts.evictions == {"capacity": 1, "pressure": 1, "unloaded": 0, "replaced": 1, "failed": 0}


class SlotTableMachine(RuleBasedStateMachine):
    """Random traffic against a counter of users."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[tuple[int, str]] = Counter()
        self.hits = self.misses = 0

    @initialize(num_slots=st.integers(0, 4))
    def start(self, num_slots: int) -> None:
        self.table = SlotTable(num_slots)

    @rule(revision=st.sampled_from("abcdef"))
    def run(self, revision: str) -> None:
        resident = self.table.find(revision)
        slot = self.table.assign(revision)
        assert (slot is None) == (resident is None and self.table.num_busy == self.table.num_slots)
        if slot is not None:
            assert resident in (None, slot)
            assert self.table.needs_upload(slot) or resident == slot
            self.table.acquire(slot)
            self.table.mark_uploaded(slot, revision)
            self.users[slot, revision] += 1
            self.hits, self.misses = self.hits + (resident is not None), self.misses + (resident is None)

    @precondition(lambda self: self.users)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        slot, revision = data.draw(st.sampled_from(sorted(self.users)))
        self.table.release(slot)
        self.users[slot, revision] -= 1
        self.users = +self.users

    @rule(revision=st.sampled_from("abcdef"))
    def unload(self, revision: str) -> None:
        is_busy = any(name == revision for _, name in self.users)
        resident = self.table.find(revision)
        assert self.table.drop(revision) == (None if is_busy else resident)
        assert (self.table.find(revision) is not None) == is_busy

    @invariant()
    def users_keep_their_slots(self) -> None:
        if not hasattr(self, "table"):
            return
        present = [revision for revision in self.table.revisions if revision]
        assert len(present) == len(set(present)), "a revision stands in two slots"
        for (slot, revision), count in self.users.items():
            assert self.table.revisions[slot] == revision
            assert self.table.num_users(slot) == count
        assert self.table.num_busy == len(self.users)
        counts = self.table.counts
        assert (counts.hits, counts.misses) == (self.hits, self.misses)
        assert sum(counts.evictions.values()) == self.misses - len(present), "whoever came is there, or left once"


TestBlockPool = BlockPoolMachine.TestCase
TestSlotTable = SlotTableMachine.TestCase
TestBlockPool.settings = TestSlotTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
