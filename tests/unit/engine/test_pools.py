"""BlockPool and SlotTable: nothing is lost, nothing is given twice, whatever the order of calls."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

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


class BlockPoolMachine(RuleBasedStateMachine):
    """Random takers and givers against a list of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[list[int]] = []

    @initialize(num_blocks=st.integers(2, 20))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks)

    @rule(count=st.integers(0, 8))
    def take(self, count: int) -> None:
        free = self.pool.num_free
        blocks = self.pool.allocate(count)
        assert (blocks is None) == (count > free)
        if blocks is not None:
            assert len(blocks) == count
            self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        self.pool.free(self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1))))

    @invariant()
    def each_block_has_one_holder(self) -> None:
        if not hasattr(self, "pool"):
            return
        held = [block for table in self.tables for block in table]
        assert len(held) == len(set(held)) == self.pool.num_held
        assert all(0 < block < self.pool.num_blocks for block in held)
        assert self.pool.num_free + self.pool.num_held == self.pool.num_blocks - 1


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


class SlotTableMachine(RuleBasedStateMachine):
    """Random traffic against a counter of users."""

    def __init__(self) -> None:
        super().__init__()
        self.users: Counter[tuple[int, str]] = Counter()

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


TestBlockPool = BlockPoolMachine.TestCase
TestSlotTable = SlotTableMachine.TestCase
TestBlockPool.settings = TestSlotTable.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
