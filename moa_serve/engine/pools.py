"""Ids of what is scarce: KV blocks (BlockPool) and adapter slots (SlotTable).

Only the book-keeping: the bytes behind the ids are KVCache's and AdapterBank's, one to one. Knows no tensors. Owned by the
engine thread, so nothing here locks.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moa_serve.adapter.counts import EvictionReason, TierCounts
from moa_serve.engine.page_times import PageTimes
from moa_serve.errors import EngineError

SLOT_BYTES = 256  # of the table for each slot, about


def kv_cache_room(total_bytes: int, utilization: float, held_bytes: int, *other_bytes: int) -> int:
    """Bytes that a GPU has for the KV cache; below 0, how many are missing.

    Args:
        total_bytes: of the device.
        utilization: share of them that may be held in the end, by anybody; 0 < utilization <= 1.
        held_bytes: what weights, CUDA itself and other processes hold already.
        other_bytes: what will be needed beside the cache: adapters in slots, buffers of a step, recorded steps.
    """
    return int(total_bytes * utilization) - held_bytes - sum(other_bytes)


class BlockPool:
    """Block ids 1 .. num_blocks - 1, each held by one sequence, shared by several, or free.

    Block 0 is never handed out: it stays zero, and padded rows of a block table point at it.

    A held block whose content is complete can be `keep`t under a key that names the content; `find` then gives it to whoever needs the
    same. Freed by its last holder it stays findable, free as it is, until its room is needed: the least recently used leaves first. As a
    table is freed from its end, a page leaves before those that it goes on from.

    Of the blocks without a key, the one freed last is handed out first: its memory is warm, and a cache whose pages are touched lazily
    grows only to the most that was ever held at once, and `max_kept` more. First in, first out would touch every page in the end.
    """

    def __init__(self, num_blocks: int, block_size: int = 16, *, max_kept: int = 0, times: PageTimes | None = None) -> None:
        """
        Args:
            num_blocks: block 0 included, as the cache counts.
            block_size: in tokens.
            max_kept: free blocks that stay findable; with 0 nothing is ever kept, nor shared.
            times: told of what becomes of blocks.
        """
        if num_blocks < 2 or block_size < 1:
            raise EngineError(f"a KV pool of {num_blocks} blocks of {block_size} tokens holds no sequence; give it more memory")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.times = times or PageTimes()
        self._max_kept = max_kept
        self._free = list(range(num_blocks - 1, 0, -1))
        self._num_holders = [0] * num_blocks
        self._num_held = 0
        self._names: dict[int, tuple[bytes, str | None]] = {}  # key and owner of the blocks that can be found, held or free
        self._found: dict[bytes, int] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # free ones that can be found, least recently used first

    @property
    def num_free(self) -> int:
        """That nobody holds, those that are kept for their content included."""
        return len(self._free) + len(self._kept)

    @property
    def num_held(self) -> int:
        return self._num_held

    @property
    def num_kept(self) -> int:
        """Free, but still findable."""
        return len(self._kept)

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest sequence that fits when it is alone."""
        return (self.num_blocks - 1) * self.block_size

    @property
    def is_keeping(self) -> bool:
        return self._max_kept > 0

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int, shared: Sequence[int] = ()) -> list[int] | None:
        """`count` blocks, and one more holder for those `shared`, which were found; None and nothing taken where there is no room.

        What the new ones contain is what their last holder left there.
        """
        if count + self.num_kept_of(shared) > self.num_free:
            return None
        for block in shared:
            self._kept.pop(block, None)
            self._hold(block)
            self.times.reuse(block)
        taken = [self._free.pop() if self._free else self._evict() for _ in range(count)]
        for block in taken:
            self._hold(block)
            self.times.begin(block)
        self._check()
        return taken

    def free(self, blocks: Sequence[int]) -> None:
        """Give back blocks in the order of their table: the next holder gets them in that order again."""
        for block in reversed(blocks):
            assert self._num_holders[block], f"block {block} is freed, but nobody holds it"
            self._num_holders[block] -= 1
            if self._num_holders[block]:
                continue
            self._num_held -= 1
            if block in self._names:
                self._kept[block] = None
                self.times.leave(block)
            else:
                self._free.append(block)
        while len(self._kept) > self._max_kept:
            self._free.append(self._evict())
        self._check()

    # -- content

    def find(self, key: bytes) -> int | None:
        """The block that was kept under `key`, held or free; `allocate` it as shared before anything else is taken."""
        return self._found.get(key)

    def num_kept_of(self, blocks: Iterable[int]) -> int:
        """How many of `blocks`, which were found, nobody holds: sharing them makes the pool so much smaller for others."""
        return sum(block in self._kept for block in blocks)

    def keep(self, block: int, key: bytes, owner: str | None = None) -> None:
        """A held block is complete, and is never written again while it can be found. Where the key is known already, nothing happens."""
        assert self._num_holders[block], f"block {block} is kept, but nobody holds it"
        if self.is_keeping and block not in self._names and key not in self._found:
            self._names[block] = (key, owner)
            self._found[key] = block

    def forget(self, blocks: Iterable[int]) -> None:
        """Nobody finds these any more; who holds them goes on."""
        for block in blocks:
            if block in self._names:
                self._unname(block)
                if block in self._kept:
                    del self._kept[block]
                    self._free.append(block)

    def forget_owner(self, owner: str | None) -> None:
        """`forget` all that was kept for `owner`."""
        self.forget([block for block, (_, whose) in self._names.items() if whose == owner])

    def _hold(self, block: int) -> None:
        self._num_held += not self._num_holders[block]
        self._num_holders[block] += 1

    def _evict(self) -> int:
        block, _ = self._kept.popitem(last=False)
        self._unname(block)
        self.times.evict(block)
        return block

    def _unname(self, block: int) -> None:
        key, _ = self._names.pop(block)
        del self._found[key]

    def _check(self) -> None:
        assert self.num_free + self.num_held == self.num_blocks - 1, "a block is lost"


@dataclass(slots=True)
class _Slot:
    index: int
    revision: str | None = None
    num_users: int = 0
    last_used: int = 0
    needs_upload: bool = False
    leaves_as: EvictionReason | None = None  # with its last user


class SlotTable:
    """Which adapter revision stands in which slot, and how many running sequences use it.

    A slot with users is never given to another revision. An idle one keeps its revision, at no cost, until the room is
    needed: then the least recently used goes.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 0:
            raise EngineError(f"num_slots is {num_slots}, but must be 0 or more")
        self._slots = [_Slot(index) for index in range(num_slots)]
        self._by_revision: dict[str, _Slot] = {}
        self._clock = 0  # counts uses, so that two of them never tie
        self.counts = TierCounts()  # hits: sequences that found their adapter in its slot; evictions: of those that had got there

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def num_busy(self) -> int:
        return sum(slot.num_users > 0 for slot in self._slots)

    @property
    def revisions(self) -> list[str | None]:
        """What stands in each slot, by index; None is empty."""
        return [slot.revision for slot in self._slots]

    @property
    def least_shared(self) -> list[int]:
        """The busy slots, those with the fewest users first, the lower index of equals."""
        busy = [slot for slot in self._slots if slot.num_users]
        return [slot.index for slot in sorted(busy, key=lambda slot: (slot.num_users, slot.index))]

    def find(self, revision: str) -> int | None:
        slot = self._by_revision.get(revision)
        return None if slot is None else slot.index

    def assign(self, revision: str) -> int | None:
        """Slot for `revision`: its own, else an empty one, else the least recently used idle one; None while all are busy.

        Only `acquire` keeps it from being assigned to another.
        """
        slot = self._by_revision.get(revision) or self._first_empty() or self._oldest_idle()
        if slot is None:
            return None
        if slot.revision != revision:
            self._clear(slot, "capacity")
            slot.revision, slot.needs_upload = revision, True
            self._by_revision[revision] = slot
        return slot.index

    def acquire(self, index: int, *, is_counted: bool = True) -> None:
        """One more sequence runs with this slot; counted as a hit or a miss."""
        slot = self._slots[index]
        assert slot.revision is not None, f"slot {index} is acquired, but nothing is assigned to it"
        if is_counted:
            self.counts.found(not slot.needs_upload)
        slot.num_users += 1
        self._touch(slot)

    def release(self, index: int) -> None:
        """One sequence fewer; exactly one for each `acquire`."""
        slot = self._slots[index]
        assert slot.num_users > 0, f"slot {index} is released, but nobody uses it"
        slot.num_users -= 1
        self._touch(slot)
        if slot.leaves_as is not None and not slot.num_users:
            self._clear(slot, slot.leaves_as)

    def drop(self, revision: str, reason: EvictionReason = "unloaded") -> int | None:
        """Unload: empty the slot of `revision` at once if it is idle, else when its last user is gone.

        Returns:
            The slot that is empty now; None while it is busy, or where the revision stands in none.
        """
        slot = self._by_revision.get(revision)
        if slot is None:
            return None
        slot.leaves_as = reason
        if slot.num_users:
            return None
        self._clear(slot, reason)
        return slot.index

    def evict_idle(self, reason: EvictionReason = "pressure") -> list[str]:
        """Empty every slot that nobody uses; the revisions that stood there."""
        idle = [slot for slot in self._slots if slot.revision is not None and not slot.num_users]
        revisions = [slot.revision for slot in idle if slot.revision is not None]
        for slot in idle:
            self._clear(slot, reason)
        return revisions

    def num_users(self, index: int) -> int:
        return self._slots[index].num_users

    def needs_upload(self, index: int) -> bool:
        """The weights are not in the slot yet; true until `mark_uploaded`, so an upload that failed is asked for again."""
        return self._slots[index].needs_upload

    def mark_uploaded(self, index: int, revision: str) -> None:
        """`revision` is in its slot now; harmless if it was dropped meanwhile."""
        slot = self._slots[index]
        if slot.revision == revision:
            slot.needs_upload = False

    def _first_empty(self) -> _Slot | None:
        return next((slot for slot in self._slots if slot.revision is None), None)

    def _oldest_idle(self) -> _Slot | None:
        idle = [slot for slot in self._slots if not slot.num_users]
        return min(idle, key=lambda slot: slot.last_used, default=None)

    def _touch(self, slot: _Slot) -> None:
        self._clock += 1
        slot.last_used = self._clock

    def _clear(self, slot: _Slot, reason: EvictionReason) -> None:
        assert not slot.num_users, f"slot {slot.index} is cleared under {slot.num_users} users"
        if slot.revision is not None:
            del self._by_revision[slot.revision]
            self.counts.evictions[reason] += not slot.needs_upload
        slot.revision, slot.needs_upload, slot.leaves_as = None, False, None
