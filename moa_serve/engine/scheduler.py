"""Which sequences compute how many tokens in the next step, and who waits for blocks or an adapter slot.

Prefill, chunk, recomputation and decode are one case: some of a sequence's pending tokens. Knows ids, no tensors. Owned by
the engine thread.

The rules, and why nothing can wait for ever:

- Decode rows come first, one token each; prefill takes what the budget leaves, in the order in which rows started.
- A sequence is admitted with the blocks of all its pending tokens at once, so only a decode row ever asks for another one.
- A paused row (its reader is behind) gets no tokens; it is the first to lose its blocks, for it would not use them.
- When blocks run out, the row that started last gives all of its back and is computed anew later. It never takes from one that
  started before, so the oldest running row always advances; it fits the pool alone, so it ends, and then the next is the oldest.
- Who lost its blocks starts again first, in the order of the first starts. Then tenants (API keys) take turns, in each of them its
  adapters, in each of those who came first (waiting.py): a turn passes with a start, so nobody waits for more starts than there are
  others in the round. Who is next and finds no blocks or no tokens holds up all behind it, or the small would starve the large.
- Only a sequence that waits for nothing but a slot is passed over, by those whose adapter has one or that need none. After `max_skips`
  steps it reserves a busy slot, of those with the fewest users: nobody who came later joins that slot, so its users run out. Each adapter
  that waits so long reserves one, but no more than half of the slots at a time: the others go on with what is asked for most.
- A cap on the rows of one adapter or tenant passes over whoever is above it; rows below it end, so this ends.

The prefix cache: a full page is kept under a hash of all that its keys and values depend on, once finite logits behind it vouch for it
(a NaN in a key or value reaches every later token of its sequence). A sequence that starts, also one that lost its blocks, takes the
pages of its longest known beginning, and computes the rest: at least one token, whose logits are the answer.
"""

import secrets
from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

from moa_serve.engine.pools import BlockPool, SlotTable
from moa_serve.engine.request import Request, Sequence, SequenceStatus, page_key
from moa_serve.engine.waiting import WaitingLine
from moa_serve.errors import ContextLengthExceeded, EngineError

_LOOKAHEAD = 512
"""Adapters that wait to look at in a step, so that 10,000 of them do not cost more than the step itself."""


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """One step.

    Args:
        chunks: (sequence, tokens of it to compute), at least one token each. Sorted by `Sequence.kind`, the base first, so that all
            tokens that are computed alike are one run; in a run decode rows before prefill.
        new_blocks: blocks handed out since the last step that went through. They must be zeroed before use: they hold
            what their last owner left, and a NaN there would reach the new one even where attention masks it (0 * NaN is NaN).
        uploads: (slot, revision) whose weights must be put in place before the forward.
        preempted: sequences that lost their blocks and wait again.
    """

    chunks: list[tuple[Sequence, int]]
    new_blocks: list[int]
    uploads: list[tuple[int, str]]
    preempted: list[Sequence]

    @property
    def num_tokens(self) -> int:
        return sum(count for _, count in self.chunks)


@dataclass(slots=True)
class _Step:
    """A step in the making; `prefill_budget` is in tokens."""

    decode: list[tuple[Sequence, int]] = field(default_factory=list)
    prefill: list[tuple[Sequence, int]] = field(default_factory=list)
    prefill_budget: int = 0
    preempted: list[Sequence] = field(default_factory=list)


class Scheduler:
    """
    Args:
        block_pool, slot_table: shared with the engine, which only reads them and drops revisions.
        max_num_seqs: running sequences, those in prefill included.
        max_batch_tokens: tokens in one step; at least max_num_seqs, so that decode rows alone never exceed it.
        max_mixed_prefill_tokens: prefill tokens in a step that also decodes: bounds the gap between two tokens of a stream.
        max_model_len: prompt and generated tokens of one sequence; what the pool holds limits it too.
        max_skips: steps that a sequence is passed over for want of a slot before it reserves one.
        max_num_seqs_per_adapter, max_num_seqs_per_tenant: running sequences of one adapter, of one tenant; None is no cap. The base
            alone, and requests of no tenant, have none.
    """

    def __init__(
        self,
        block_pool: BlockPool,
        slot_table: SlotTable,
        *,
        max_num_seqs: int = 32,
        max_batch_tokens: int = 256,
        max_mixed_prefill_tokens: int = 64,
        max_model_len: int,
        max_skips: int = 32,
        max_num_seqs_per_adapter: int | None = None,
        max_num_seqs_per_tenant: int | None = None,
    ) -> None:
        if max_num_seqs < 1 or max_mixed_prefill_tokens < 1:
            raise EngineError(
                f"max_num_seqs is {max_num_seqs} and max_mixed_prefill_tokens {max_mixed_prefill_tokens}, but both must be at least 1"
            )
        if max_batch_tokens < max_num_seqs:
            raise EngineError(
                f"max_batch_tokens {max_batch_tokens} is less than max_num_seqs {max_num_seqs}: a step could not give each row one token; "
                f"raise max_batch_tokens",
                param="max_batch_tokens",
            )
        self._blocks, self._slots = block_pool, slot_table
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_mixed_prefill_tokens = max_mixed_prefill_tokens
        self._max_skips = max_skips
        self._max_per_adapter, self._max_per_tenant = max_num_seqs_per_adapter, max_num_seqs_per_tenant
        self.max_model_len = min(max_model_len, block_pool.max_tokens)
        self._waiting = WaitingLine()
        self._running: list[Sequence] = []  # by turn: who started first stands first
        self._rows_of: Counter[tuple[str, str]] = Counter()  # running rows of each adapter and tenant
        self._num_added = self._num_started = 0
        self._seed = secrets.token_bytes(32)  # of this boot: nobody can work out beforehand under which hash a page is kept
        self.num_queried_tokens = self.num_hit_tokens = 0  # prompt tokens that were looked for in the prefix cache, and found
        self._new_blocks: dict[int, None] = {}  # an ordered set: a block may go round twice before a step goes through
        self._was_alone = False

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def _is_held_up(self) -> bool:
        return not self.has_work or any(sequence.is_paused for sequence in (*self._running, *self._waiting))

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence.

        Raises:
            ContextLengthExceeded: it could not end even if it had the pool to itself.
            EngineError: it needs an adapter, and there are no slots at all.
        """
        assert sequence.order < 0, "a sequence is added once"
        assert sequence.status is SequenceStatus.WAITING, "a sequence that has ended does not come back"
        max_tokens = sequence.request.params.max_tokens
        wanted = sequence.num_prompt + (1 if max_tokens is None else max_tokens)
        if wanted > self.max_model_len:
            raise ContextLengthExceeded(
                f"the prompt of {sequence.num_prompt} tokens and {wanted - sequence.num_prompt} to generate are {wanted}, but the served "
                f"context is {self.max_model_len}; shorten the prompt or lower max_tokens",
                param="prompt" if sequence.num_prompt >= self.max_model_len else "max_tokens",
            )
        if len(sequence.token_ids) > self._blocks.max_tokens:
            raise ContextLengthExceeded(
                f"the prompt and its choices are {len(sequence.token_ids)} tokens, but the KV cache holds {self._blocks.max_tokens}; "
                f"score fewer choices at a time",
                param="choices",
            )
        if sequence.request.adapter is not None and not self._slots.num_slots:
            raise EngineError("the request names an adapter, but this engine has no adapter slots; raise num_slots")
        sequence.order = self._num_added
        self._num_added += 1
        self._waiting.add(sequence)

    def abort(self, sequence: Sequence) -> None:
        """End a sequence whose reader is gone; nothing happens to one that has ended."""
        if sequence.status is not SequenceStatus.FINISHED:
            sequence.finish_reason = "abort"
            self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Take a sequence out, running or waiting, and give back what it holds; nothing happens to one that has ended."""
        self._release(sequence)
        sequence.status = SequenceStatus.FINISHED

    def schedule(self) -> SchedulerOutput:
        """The next step. Changes nothing in `num_computed`: the engine calls `advance` after the forward, so that a step
        that failed can be scheduled again.

        Wherever there is work, there is at least one chunk, unless paused rows are all there is or hold what the others need.
        """
        step = _Step()
        self._schedule_decode(step)
        budget = self._max_batch_tokens - len(step.decode)
        step.prefill_budget = min(budget, self._max_mixed_prefill_tokens) if step.decode else budget
        for sequence in self._running:
            if sequence.is_prefill and not sequence.is_paused:
                self._schedule_prefill(step, sequence)
        self._admit(step)
        self._was_alone = any(sequence.is_whole and not step.decode for sequence, _ in step.prefill)
        chunks = sorted(step.decode + step.prefill, key=lambda chunk: chunk[0].kind)
        assert chunks or self._is_held_up(), "there is work, but nothing to run"
        return SchedulerOutput(chunks, list(self._new_blocks), self._uploads(chunks), step.preempted)

    def advance(self, output: SchedulerOutput) -> None:
        """The forward of `output` went through: its tokens are in the cache, its uploads in their slots.

        Before the sampled tokens are appended. Sequences that have ended meanwhile are left alone.
        """
        for sequence, count in output.chunks:
            if sequence.status is SequenceStatus.RUNNING:
                sequence.num_computed += count
        for slot, revision in output.uploads:
            self._slots.mark_uploaded(slot, revision)
        self._new_blocks.clear()

    def share(self, sequence: Sequence) -> None:
        """The logits behind all that is computed of `sequence` are finite: its full pages may serve others."""
        num_full = sequence.num_computed // self._blocks.block_size
        if num_full <= sequence.num_shared or not (self._blocks.is_keeping and sequence.shares_pages):
            return
        for index in range(sequence.num_shared, num_full):
            self._blocks.keep(sequence.block_table[index], self._page_key(sequence, index), sequence.request.adapter)
        sequence.num_shared = num_full

    def _page_key(self, sequence: Sequence, index: int) -> bytes:
        """Of a page whose tokens are known; made once for each sequence."""
        keys, size = sequence.page_keys, self._blocks.block_size
        while len(keys) <= index:
            start = len(keys) * size
            keys.append(page_key(keys[-1] if keys else self._seed + sequence.kv_root, sequence.token_ids[start : start + size]))
        return keys[index]

    def _find_pages(self, sequence: Sequence) -> list[int]:
        """Pages that hold the longest known beginning of `sequence`, and not its last token."""
        found: list[int] = []
        if not (sequence.shares_pages and self._blocks.is_keeping):
            return found
        for index in range((len(sequence.token_ids) - 1) // self._blocks.block_size):
            block = self._blocks.find(self._page_key(sequence, index))
            if block is None:
                break
            found.append(block)
        return found

    def _schedule_decode(self, step: _Step) -> None:
        for sequence in list(self._running):  # preemption shortens it
            if sequence.status is not SequenceStatus.RUNNING or sequence.is_prefill or sequence.is_paused:
                continue
            assert sequence.num_pending == 1, "a row that runs got a token or was finished after its last step"
            if self._grow(step, sequence):
                step.decode.append((sequence, 1))

    def _grow(self, step: _Step, sequence: Sequence) -> bool:
        """Have a block for the pending token, at the expense of paused and then younger rows; False where `sequence` is the youngest."""
        missing = self._blocks.blocks_for(len(sequence.token_ids)) - len(sequence.block_table)
        while (blocks := self._blocks.allocate(missing)) is None:
            victim = next((row for row in self._running if row.is_paused), self._running[-1])
            self._preempt(step, victim)
            if victim is sequence:
                return False
        sequence.block_table += blocks
        self._new_blocks.update(dict.fromkeys(blocks))
        return True

    def _schedule_prefill(self, step: _Step, sequence: Sequence) -> None:
        """Give `sequence`, which has its blocks, its share of the step; that may be nothing."""
        count = self._prefill_size(step, sequence)
        if not count:
            return
        step.prefill.append((sequence, count))
        step.prefill_budget = max(0, step.prefill_budget - count)
        if len(step.decode) + count > self._max_batch_tokens:
            step.decode.clear()  # alone: the rows keep their new blocks and go on in the next step

    def _prefill_size(self, step: _Step, sequence: Sequence) -> int:
        """Tokens that `sequence` may compute now, 0 for none.

        What must be whole may exceed the share of prefill, and even the budget, if it is the only prefill of its
        step. Over the budget it runs without the decode rows; two such steps never follow each other while rows decode.
        """
        pending = sequence.num_pending
        if not sequence.is_whole:
            # Who comes meanwhile waits for a step of background work: two such rows make one as long as a mixed step's prefill.
            most = max(1, self._max_mixed_prefill_tokens // 2) if sequence.request.is_background else pending
            return min(pending, most, step.prefill_budget)
        if pending <= step.prefill_budget:
            return pending
        if step.prefill:
            return 0
        is_over = len(step.decode) + pending > self._max_batch_tokens
        return 0 if is_over and step.decode and self._was_alone else pending

    def _admit(self, step: _Step) -> None:
        """Start waiting sequences while there are rows, tokens, blocks and slots for them."""
        if not self._waiting or len(self._running) >= self._max_num_seqs:
            return
        reserved = self._reserved_slots()
        for sequence in islice(self._waiting.candidates(), _LOOKAHEAD):
            if len(self._running) >= self._max_num_seqs or not step.prefill_budget:
                return
            if sequence.is_paused or self._is_capped(sequence.request):
                continue
            slot = self._find_slot(sequence, reserved)
            if slot is None and sequence.request.adapter is not None:
                sequence.num_skipped += 1
                continue
            if not self._prefill_size(step, sequence):
                return
            # One spare block for each running row, or the next rows to grow would throw the newcomer out again. It also keeps
            # blocks that were won by preemption from going straight back to the row that lost them.
            known = self._find_pages(sequence)
            missing = self._blocks.blocks_for(len(sequence.token_ids)) - len(known)
            if self._blocks.num_free < missing + self._blocks.num_kept_of(known) + len(self._running):
                return
            blocks = self._blocks.allocate(missing, shared=known)
            assert blocks is not None, "these blocks were free a moment ago"
            self._start(sequence, known, blocks, slot)
            self._schedule_prefill(step, sequence)

    def _is_capped(self, request: Request) -> bool:
        return any(limit is not None and self._rows_of[place] >= limit for place, limit in self._places(request))

    def _places(self, request: Request) -> list[tuple[tuple[str, str], int | None]]:
        """What a row of `request` counts towards, and how much that may be."""
        places: list[tuple[tuple[str, str], int | None]] = []
        if request.adapter is not None:
            places.append((("adapter", request.adapter), self._max_per_adapter))
        if request.tenant is not None:
            places.append((("tenant", request.tenant), self._max_per_tenant))
        return places

    def _reserved_slots(self) -> dict[int, int]:
        """slot -> order of the sequence that it is kept for: of those that were passed over too often, the oldest of each adapter."""
        starved: dict[str | None, int] = {}
        for sequence in islice(self._waiting.heads(), _LOOKAHEAD):
            if sequence.num_skipped >= self._max_skips:
                adapter = sequence.request.adapter
                starved[adapter] = min(sequence.order, starved.get(adapter, sequence.order))
        if not starved:
            return {}
        slots = self._slots.least_shared[: max(1, self._slots.num_slots // 2)]
        return dict(zip(slots, sorted(starved.values()), strict=False))

    def _find_slot(self, sequence: Sequence, reserved: dict[int, int]) -> int | None:
        revision = sequence.request.adapter
        if revision is None:
            return None
        slot = self._slots.find(revision)
        if slot is not None and sequence.order > reserved.get(slot, sequence.order):
            return None
        return self._slots.assign(revision)

    def _start(self, sequence: Sequence, known: list[int], blocks: list[int], slot: int | None) -> None:
        """Run `sequence` with the pages that are `known` already and new `blocks` behind them."""
        self._waiting.take(sequence)
        if sequence.turn < 0:
            sequence.turn = self._num_started
            self._num_started += 1
            self._count_hit(sequence, len(known))
        insort(self._running, sequence, key=lambda other: other.turn)
        self._rows_of.update(place for place, _ in self._places(sequence.request))
        sequence.status = SequenceStatus.RUNNING
        sequence.block_table = known + blocks
        sequence.num_computed = len(known) * self._blocks.block_size
        sequence.num_shared = len(known)
        self._new_blocks.update(dict.fromkeys(blocks))
        sequence.num_skipped = 0
        if slot is not None:
            self._slots.acquire(slot, is_counted=not sequence.request.is_background)
            sequence.slot = slot

    def _count_hit(self, sequence: Sequence, num_pages: int) -> None:
        sequence.num_cached = num_pages * self._blocks.block_size
        if sequence.shares_pages and self._blocks.is_keeping:
            self.num_queried_tokens += sequence.num_prompt
            self.num_hit_tokens += sequence.num_cached

    def _preempt(self, step: _Step, sequence: Sequence) -> None:
        self._release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self._waiting.add(sequence)
        step.preempted.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        """The one place where blocks and slot go back; twice is as good as once."""
        if sequence.status is SequenceStatus.RUNNING:
            self._running.remove(sequence)
            self._rows_of -= Counter(place for place, _ in self._places(sequence.request))
        elif sequence.status is SequenceStatus.WAITING and sequence.order >= 0:
            self._waiting.remove(sequence)
        self._blocks.free(sequence.block_table)
        sequence.block_table = []
        sequence.num_computed = sequence.num_shared = 0
        if sequence.slot is not None:
            self._slots.release(sequence.slot)
            sequence.slot = None

    def _uploads(self, chunks: list[tuple[Sequence, int]]) -> list[tuple[int, str]]:
        slots = {sequence.slot: sequence.request.adapter for sequence, _ in chunks}
        return [(slot, revision) for slot, revision in slots.items() if slot is not None and revision and self._slots.needs_upload(slot)]
