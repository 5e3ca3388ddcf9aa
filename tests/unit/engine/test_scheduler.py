"""The scheduler against an engine of counters: everything ends, nothing is lost, and every token meets its own keys and values."""

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moa_serve.engine.pools import BlockPool, SlotTable
from moa_serve.engine.request import Request, SamplingParams, Sequence, SequenceStatus
from moa_serve.engine.scheduler import Scheduler, SchedulerOutput
from moa_serve.errors import ContextLengthExceeded, EngineError


def make_sequence(
    prompt: int | list[int],
    max_tokens: int | None = 4,
    adapter: str | None = None,
    *,
    is_pooled: bool = False,
    tenant: str | None = None,
    salt: str = "",
) -> Sequence:
    """Of a prompt, or of one of so many tokens, all alike."""
    ids = [7] * prompt if isinstance(prompt, int) else prompt
    request = Request(ids, SamplingParams(max_tokens=max_tokens), adapter, is_pooled=is_pooled, tenant=tenant, salt=salt)
    return Sequence(request, list(ids), f"{adapter} {salt}".encode())


def make_scoring(prompt: int, branches: list[int], adapter: str | None = None, *, is_pooled: bool = False) -> Sequence:
    """A prompt and the lengths of its branches."""
    ids = tuple((7,) * length for length in branches)
    request = Request([7] * prompt, SamplingParams(max_tokens=0), adapter, is_pooled=is_pooled, branches=ids)
    return Sequence(request, request.given_ids, f"{adapter} ".encode())


def content(sequence: Sequence, position: int) -> tuple[bytes, tuple[int, ...]]:
    """What the keys and values of a token depend on; a pooled adapter's on the whole prompt, and branches see no other."""
    own = (id(sequence),) if sequence.request.is_pooled or sequence.request.branches else ()
    return sequence.kv_root, (*own, *sequence.token_ids[: position + 1])


@dataclass
class Engine:
    """Runs a scheduler as the real engine does, with a cache that remembers what was written to each position."""

    num_blocks: int = 65
    block_size: int = 4
    num_slots: int = 2
    max_num_seqs: int = 4
    max_batch_tokens: int = 16
    max_mixed_prefill_tokens: int = 4
    max_model_len: int = 1000
    max_skips: int = 4
    max_kept: int = 0
    caps: dict[str, int] = field(default_factory=dict)
    cache: dict[tuple[int, int], tuple[bytes, tuple[int, ...]]] = field(default_factory=dict)
    was_alone: bool = False
    ran: list[Sequence] = field(default_factory=list)  # before the step that is checked

    def __post_init__(self) -> None:
        self.blocks = BlockPool(self.num_blocks, self.block_size, max_kept=self.max_kept)
        self.slots = SlotTable(self.num_slots)
        self.bank: list[str | None] = [None] * self.num_slots
        self.started: list[Sequence] = []
        self.scheduler = Scheduler(
            self.blocks,
            self.slots,
            max_num_seqs=self.max_num_seqs,
            max_batch_tokens=self.max_batch_tokens,
            max_mixed_prefill_tokens=self.max_mixed_prefill_tokens,
            max_model_len=self.max_model_len,
            max_skips=self.max_skips,
            **self.caps,
        )

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)

    def step(self, *, fails: bool = False) -> SchedulerOutput:
        """One step, checked; a step that `fails` stops before the forward, as an exception there would."""
        plan = self.scheduler.schedule()
        self.check(plan)
        if fails:
            return plan
        for slot, revision in plan.uploads:
            self.bank[slot] = revision
        for block in plan.new_blocks:
            for offset in range(self.block_size):
                self.cache.pop((block, offset), None)
        for sequence, count in plan.chunks:
            self.forward(sequence, count)
        self.scheduler.advance(plan)
        for sequence, _ in plan.chunks:
            if sequence.num_pending == 0:
                self.scheduler.share(sequence)
                sequence.append(8)
                if sequence.num_generated >= (sequence.request.params.max_tokens or 0):
                    sequence.finish_reason = "length"
                    self.scheduler.finish(sequence)
        return plan

    def forward(self, sequence: Sequence, count: int) -> None:
        if sequence not in self.started:
            self.started.append(sequence)
        if sequence.slot is not None:
            assert self.bank[sequence.slot] == sequence.request.adapter, "the slot holds another adapter's weights"
        if sequence.request.branches:
            assert (sequence.num_computed, count) == (0, len(sequence.token_ids)), "branches were cut"
        if sequence.request.is_pooled and sequence.gates is None:
            assert (sequence.num_computed, count) == (0, len(sequence.request.given_ids)), "a pooled prompt was cut"
            sequence.gates = "known"
        for position in range(sequence.num_computed, sequence.num_computed + count):
            place = (sequence.block_table[position // self.block_size], position % self.block_size)
            assert place not in self.cache, "a block was not zeroed, or a token is computed twice"
            self.cache[place] = content(sequence, position)
        for position in range(sequence.num_computed):
            place = (sequence.block_table[position // self.block_size], position % self.block_size)
            assert self.cache[place] == content(sequence, position), "keys and values of other tokens"

    def check(self, plan: SchedulerOutput) -> None:
        running, chunks = self.scheduler._running, plan.chunks
        assert chunks or not self.scheduler.has_work
        assert len({sequence.order for sequence, _ in chunks}) == len(chunks), "a sequence is in a step twice"
        assert all(1 <= count <= sequence.num_pending for sequence, count in chunks)
        assert all(sequence.status is SequenceStatus.RUNNING for sequence, _ in chunks)
        assert len(running) <= self.max_num_seqs
        slots = [-1 if sequence.slot is None else sequence.slot for sequence, _ in chunks]
        assert slots == sorted(slots), "the tokens of an adapter are not one run"

        decode = [sequence for sequence, _ in chunks if not sequence.is_prefill]
        prefill = [(sequence, count) for sequence, count in chunks if sequence.is_prefill]
        if any(sequence.is_whole for sequence, _ in prefill):
            assert plan.num_tokens <= self.max_batch_tokens or len(chunks) == 1, "over the budget only alone"
        else:
            assert plan.num_tokens <= self.max_batch_tokens
            # One that comes back and finds all but its last token in the cache breaks its pause, and is no stream to keep in pace.
            is_mixed = any(sequence in self.ran and sequence not in plan.preempted for sequence in decode)
            assert not is_mixed or sum(count for _, count in prefill) <= self.max_mixed_prefill_tokens
        waiting_rows = [sequence for sequence in running if not sequence.is_prefill and sequence not in decode]
        assert not waiting_rows or not self.was_alone, "rows that decode were left out twice running"
        self.was_alone = bool(waiting_rows)

        for sequence in plan.preempted:
            stayed = [row for row in self.ran if row in running and row not in plan.preempted]
            assert all(row.turn < sequence.turn for row in stayed), "a row gave way to one that started later"
            # It may run again at once: where it had computed the same as another, it takes the other's pages now.
            assert sequence in running or (sequence.num_computed, sequence.block_table, sequence.slot) == (0, [], None)
            assert sequence not in running or self.max_kept
        held = [block for sequence in running for block in sequence.block_table]
        assert len(set(held)) == self.blocks.num_held
        assert self.max_kept or len(set(held)) == len(held)
        users = Counter(sequence.slot for sequence in running if sequence.slot is not None)
        assert [users[slot] for slot in range(self.num_slots)] == [self.slots.num_users(slot) for slot in range(self.num_slots)]
        self.ran = list(running)
        turns = [[sequence.turn for sequence in rows] for rows in (running, self.scheduler._waiting._resuming)]
        assert turns == [sorted(rows) for rows in turns]

    def run(self, max_steps: int = 2000) -> None:
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self.scheduler.has_work, "livelock"
        assert (self.blocks.num_held, self.slots.num_busy) == (0, 0)


def counts(plan: SchedulerOutput) -> dict[int, int]:
    return {sequence.order: count for sequence, count in plan.chunks}


def test_a_long_prompt_comes_in_chunks_and_decode_rows_keep_their_pace() -> None:
    """Without the cap a long prompt stops every running stream for a step."""
    engine = Engine()
    engine.add(make_sequence(3, 20), make_sequence(40))
    assert counts(engine.step()) == {0: 3, 1: 13}
    assert counts(engine.step()) == {0: 1, 1: 4}
    assert counts(engine.step()) == {0: 1, 1: 4}


def test_first_come_is_first_served() -> None:
    """A small request that overtakes for ever starves a large one."""
    engine = Engine(num_blocks=8, max_num_seqs=2)
    sequences = [make_sequence(prompt) for prompt in (3, 20, 1, 2, 20, 1)]
    engine.add(*sequences)
    engine.run()
    assert engine.started == sequences


def test_a_sequence_that_could_never_end_is_refused_at_once() -> None:
    """It would be preempted and recomputed for ever, for want of blocks that do not exist."""
    engine = Engine(num_blocks=5)  # 16 tokens
    with pytest.raises(ContextLengthExceeded) as caught:
        engine.add(make_sequence(10, 7))
    assert caught.value.param == "max_tokens"
    for prompt, max_tokens in ((17, 1), (16, None), (16, 1)):
        with pytest.raises(ContextLengthExceeded) as caught:
            engine.add(make_sequence(prompt, max_tokens))
        assert caught.value.param == "prompt"
    engine.add(make_sequence(10, 6), make_sequence(15, None))
    assert engine.scheduler.num_waiting == 2


def test_an_adapter_without_slots_is_refused() -> None:
    """It would wait for ever."""
    with pytest.raises(EngineError):
        Engine(num_slots=0).add(make_sequence(3, adapter="a"))


def test_budgets_that_cannot_work_are_refused() -> None:
    """With fewer tokens than rows, some row would stand still."""
    with pytest.raises(EngineError):
        Engine(max_batch_tokens=3)
    with pytest.raises(EngineError):
        Engine(max_num_seqs=0)
    with pytest.raises(EngineError):
        Engine(max_mixed_prefill_tokens=0)


def test_a_newcomer_is_let_in_only_beside_a_spare_block_for_each_row() -> None:
    """Let in with the last block, it is prefilled, thrown out by the next row that grows, and prefilled again."""
    engine = Engine(num_blocks=4)
    engine.add(make_sequence(4, 5), make_sequence(8, 2))
    plans = [engine.step() for _ in range(8)]
    assert not any(plan.preempted for plan in plans)
    assert not engine.scheduler.has_work


@pytest.mark.case(56)
def test_the_youngest_row_gives_way_and_keeps_its_tokens() -> None:
    """Taking from an older row lets two rows undo each other's work without end."""
    engine = Engine(num_blocks=6)
    old, young = make_sequence(7, 12), make_sequence(4, 8)
    engine.add(old, young)
    preempted: list[Sequence] = []
    while engine.scheduler.has_work:
        preempted += engine.step().preempted
    assert preempted
    assert set(preempted) == {young}
    assert young.num_preemptions == len(preempted)
    assert (old.num_generated, young.num_generated) == (12, 8)


def test_weights_of_a_pooled_adapter_survive_preemption() -> None:
    """Computed anew over prompt and completion, their mean, and the text, would be another."""
    engine = Engine(num_blocks=8, max_mixed_prefill_tokens=2)
    old, young = make_sequence(7, 16), make_sequence(9, 8, "a", is_pooled=True)
    engine.add(old, young)
    while not young.num_preemptions:
        engine.step()
    assert young.gates == "known"
    assert not young.is_whole, "now it may come in chunks"
    engine.run()
    assert young.num_generated == 8


def test_a_pooled_prompt_over_the_budget_runs_alone_and_takes_turns_with_decode() -> None:
    """Cut in two it would be weighed by the mean of its first half; one after another they would stop all streams."""
    engine = Engine(max_batch_tokens=16)
    engine.add(make_sequence(2, 30), *(make_sequence(20, 1, "a", is_pooled=True) for _ in range(2)), make_sequence(3))
    plans = [counts(engine.step()) for _ in range(5)]
    assert plans == [{0: 2}, {1: 20}, {0: 1, 3: 3}, {2: 20}, {0: 1, 3: 1}]


def test_branches_are_never_cut_and_take_turns_with_decode() -> None:
    """Half of them would attend to keys that the mask knows nothing of; one after another they would stop all streams."""
    engine = Engine(max_batch_tokens=16)
    engine.add(make_sequence(2, 30), *(make_scoring(10, [6, 1, 6]) for _ in range(2)), make_sequence(3))
    plans = [counts(engine.step()) for _ in range(5)]
    assert plans == [{0: 2}, {1: 20}, {0: 1}, {2: 20}, {0: 1, 3: 3}]
    engine = Engine(max_batch_tokens=16)
    engine.add(make_scoring(5, [4]), make_scoring(5, [2, 2]), make_scoring(2, [1]))
    assert [counts(engine.step()) for _ in range(2)] == [{0: 8, 1: 7}, {2: 2}]


def test_branches_that_the_pool_cannot_hold_are_refused_at_once() -> None:
    """They would wait for ever, and everyone behind them."""
    engine = Engine(num_blocks=5)  # 16 tokens
    with pytest.raises(ContextLengthExceeded, match="17 tokens") as caught:
        engine.add(make_scoring(8, [4, 4, 4]))
    assert caught.value.param == "choices"
    engine.add(make_scoring(8, [4, 4, 3]))
    engine.run()


def test_branches_whose_step_fails_for_ever_can_still_be_preempted() -> None:
    """They hold blocks without having computed a token; rows that decode may need them, and then they start over."""
    engine = Engine(num_blocks=8, max_batch_tokens=16)
    row, scoring = make_sequence(2, 22), make_scoring(10, [6, 1, 6])
    engine.add(row, scoring)
    engine.step()
    assert counts(engine.step(fails=True)) == {1: 20}
    for number in range(40):
        if not scoring.num_preemptions:
            engine.step(fails=number % 2 == 1)
    assert (row.num_preemptions, scoring.num_preemptions) == (0, 1)
    engine.run()
    assert (row.num_generated, scoring.status) == (22, SequenceStatus.FINISHED)


def test_a_pooled_prompt_within_the_budget_joins_the_decode_rows() -> None:
    """Alone it would stop the streams for nothing."""
    engine = Engine(max_batch_tokens=16, max_mixed_prefill_tokens=4)
    engine.add(make_sequence(2, 30))
    engine.step()
    engine.add(make_sequence(10, adapter="a", is_pooled=True), make_sequence(3))
    assert counts(engine.step()) == {0: 1, 1: 10}


def test_who_waits_for_a_slot_does_not_hold_up_others() -> None:
    """One cold adapter at the head of the queue would idle the machine."""
    engine = Engine(num_slots=1)
    engine.add(*(make_sequence(2, 9, adapter) for adapter in ("a", "b", None, "a")))
    assert counts(engine.step()).keys() == {0, 2, 3}


@pytest.mark.case(59)
def test_a_hot_adapter_cannot_starve_a_cold_one() -> None:
    """Its requests join the slot that never empties; the cold one's users would wait as long as traffic lasts."""
    engine = Engine(num_slots=1, max_skips=4)
    cold = make_sequence(2, 2, "cold")
    engine.add(make_sequence(2, 6, "hot"), cold)
    for _ in range(40):
        engine.add(make_sequence(2, 6, "hot"))
        engine.step()
        if cold.status is SequenceStatus.FINISHED:
            break
    assert cold.status is SequenceStatus.FINISHED
    engine.run()


def test_only_one_slot_is_kept_for_each_who_waits() -> None:
    """Draining every slot for one cold adapter would stop the traffic of all hot ones."""
    engine = Engine(num_slots=2, max_num_seqs=8, max_skips=2)
    engine.add(*(make_sequence(1, 30, adapter) for adapter in ("a", "b", "b", "cold")))
    for _ in range(4):
        engine.step()
    late = [make_sequence(1, 2, adapter) for adapter in ("a", "b")]
    engine.add(*late)
    engine.step()
    assert [sequence.status for sequence in late] == [SequenceStatus.WAITING, SequenceStatus.RUNNING]


def started_in_order(engine: Engine, *sequences: Sequence) -> list[int]:
    """Indices of `sequences` in the order in which they start, one a row."""
    engine.add(*sequences)
    engine.run()
    return [sequences.index(sequence) for sequence in engine.started]


def test_tenants_take_turns_and_their_adapters_too() -> None:
    """A flood by one key, or of one adapter, would be served to its end before anybody else."""
    flood = [make_sequence(2, 2, tenant="flood") for _ in range(6)]
    others = [make_sequence(2, 2, tenant="x"), make_sequence(2, 2, tenant="y"), make_sequence(2, 2, tenant="x")]
    assert started_in_order(Engine(max_num_seqs=1), *flood, *others) == [0, 6, 7, 1, 8, 2, 3, 4, 5]
    hot, cold = [make_sequence(2, 2, "hot") for _ in range(4)], [make_sequence(2, 2, "cold"), make_sequence(2, 2)]
    assert started_in_order(Engine(max_num_seqs=1), *hot, *cold) == [0, 4, 5, 1, 2, 3]


def test_who_comes_back_waits_for_the_others_of_its_round_only() -> None:
    """One request at a time, while another key floods: each waits for one of the flood's, not for all that came before."""
    engine = Engine(max_num_seqs=1)
    engine.add(*(make_sequence(2, 2, tenant="flood") for _ in range(50)))
    for _ in range(5):
        mine, before = make_sequence(2, 2, tenant="x"), len(engine.started)
        engine.add(mine)
        while mine.status is not SequenceStatus.FINISHED:
            engine.step()
        assert len(engine.started) <= before + 2 + (before == 0)


def test_an_adapter_is_capped_and_so_is_a_tenant() -> None:
    """Above its cap it waits, and holds up nobody else."""
    for cap, adapter, tenant in (("max_num_seqs_per_adapter", "a", None), ("max_num_seqs_per_tenant", None, "a")):
        engine = Engine(max_num_seqs=4, caps={cap: 2})
        capped = [make_sequence(2, 9, adapter, tenant=tenant) for _ in range(4)]
        engine.add(*capped, make_sequence(2, 9))
        assert counts(engine.step()).keys() == {0, 1, 4}
        engine.run()
        assert all(sequence.num_generated == 9 for sequence in capped)


@pytest.mark.parametrize("hot_clients", [1, 8], ids=["uniform", "hot"])
def test_each_of_many_adapters_on_few_slots_is_served_again_and_again(hot_clients: int) -> None:
    """64 adapters on 8 slots (reliability case 59): none waits for longer than a round of all takes, also where 8 of them have clients
    enough to fill every slot for ever. With one slot for all who wait for one, it is 7 times as long."""
    num_slots, longest_row, max_skips, rng = 8, 16, 8, random.Random(0)
    engine = Engine(
        num_blocks=999, num_slots=num_slots, max_num_seqs=32, max_batch_tokens=256, max_mixed_prefill_tokens=64, max_skips=max_skips
    )
    clients = {f"{index}": hot_clients if index < 8 else 1 for index in range(64)}
    open_now: Counter[str] = Counter()
    served: dict[str, list[int]] = {name: [0] for name in clients}  # steps in which a row of it got its first token
    num_steps = 1000
    for step in range(num_steps):
        for name, count in clients.items():
            for _ in range(count - open_now[name]):
                engine.add(make_sequence(2, rng.randint(longest_row // 2, longest_row), name))
            open_now[name] = count
        for sequence, _ in engine.step().chunks:
            name = str(sequence.request.adapter)
            if sequence.num_generated == 1:
                served[name].append(step)
            open_now[name] -= sequence.status is SequenceStatus.FINISHED
    longest = max(after - before for steps in served.values() for before, after in pairwise([*steps, num_steps]))
    # Half of the slots go round among those who wait: each takes until its wait is noticed, and the longest row that is in its way.
    assert longest <= len(clients) / (num_slots / 2) * (longest_row + max_skips)


def test_uploads_and_new_blocks_are_asked_for_until_a_step_went_through() -> None:
    """A failed step that counts as done leaves a slot without weights and a block with a dead sequence's NaN."""
    engine = Engine()
    engine.add(make_sequence(5, adapter="a"))
    failed = engine.step(fails=True)
    again = engine.step()
    assert (failed.uploads, failed.new_blocks) == (again.uploads, again.new_blocks) == ([(0, "a")], [1, 2])
    after = engine.step()
    assert (after.uploads, after.new_blocks) == ([], [])


@pytest.mark.parametrize("when", ["waiting", "prefill", "decode", "finished", "never added"])
def test_abort_gives_everything_back_and_twice_is_once(when: str) -> None:
    """A disconnect may come at any time, and may race with the end."""
    engine = Engine()
    sequence = make_sequence(20, adapter="a")
    if when != "never added":
        engine.add(sequence)
    for _ in range({"prefill": 1, "decode": 2, "finished": 9}.get(when, 0)):
        engine.step()
    for _ in range(2):
        engine.scheduler.abort(sequence)
    assert sequence.finish_reason == ("length" if when == "finished" else "abort")
    assert (engine.blocks.num_held, engine.slots.num_busy, engine.scheduler.has_work) == (0, 0, False)


def test_a_sequence_that_ended_during_the_step_is_not_advanced() -> None:
    """Its blocks are gone; counting them as computed would resurrect it."""
    engine = Engine()
    sequence = make_sequence(5)
    engine.add(sequence)
    plan = engine.scheduler.schedule()
    engine.scheduler.abort(sequence)
    engine.scheduler.advance(plan)
    assert sequence.num_computed == 0


@st.composite
def traffic(draw: st.DrawFn) -> tuple[Engine, dict[int, list[Sequence]], dict[int, int], set[int]]:
    """A small engine, some with a prefix cache and with caps; who arrives and who leaves at which step; steps that fail."""
    engine = Engine(
        num_blocks=draw(st.integers(3, 14)),
        num_slots=draw(st.integers(1, 3)),
        max_num_seqs=draw(st.integers(1, 5)),
        max_batch_tokens=draw(st.integers(5, 24)),
        max_mixed_prefill_tokens=draw(st.integers(1, 9)),
        max_skips=draw(st.integers(0, 6)),
        max_kept=draw(st.sampled_from([0, 2, 100])),
        caps=draw(st.sampled_from([{}, {"max_num_seqs_per_adapter": 1}, {"max_num_seqs_per_tenant": 2}])),
    )
    arrivals: dict[int, list[Sequence]] = {}
    for _ in range(draw(st.integers(1, 14))):
        prompt = draw(st.integers(1, engine.blocks.max_tokens - 1))
        max_tokens = draw(st.integers(1, engine.blocks.max_tokens - prompt))
        adapter = draw(st.sampled_from([None, None, *"abcde"]))
        is_pooled = adapter is not None and draw(st.booleans())
        tenant = draw(st.sampled_from([None, "x", "y"]))
        sequence = make_sequence(prompt, max_tokens, adapter, is_pooled=is_pooled, tenant=tenant)
        if draw(st.integers(0, 2)) == 0:
            branches = draw(st.lists(st.integers(1, max_tokens), min_size=1, max_size=3))
            sequence = make_scoring(max(1, prompt - sum(branches)), branches, adapter, is_pooled=is_pooled)
            if len(sequence.token_ids) > engine.blocks.max_tokens:
                sequence = make_scoring(prompt, [max_tokens], adapter, is_pooled=is_pooled)
        arrivals.setdefault(draw(st.integers(0, 25)), []).append(sequence)
    leaving = draw(st.dictionaries(st.integers(0, 40), st.integers(0, 13), max_size=5))
    return engine, arrivals, leaving, draw(st.sets(st.integers(0, 40), max_size=5))


@pytest.mark.case(56, 59)
@settings(max_examples=250, deadline=None)
@given(traffic())
def test_whatever_happens_everything_ends_and_nothing_is_lost(
    case: tuple[Engine, dict[int, list[Sequence]], dict[int, int], set[int]],
) -> None:
    """Tiny pools, more adapters than slots, pooled prompts, readers that leave, steps that fail: no livelock, no leak, no mix-up."""
    engine, arrivals, leaving, failing = case
    everyone = [sequence for step in sorted(arrivals) for sequence in arrivals[step]]
    for step in range(41):
        engine.add(*arrivals.get(step, []))
        arrived = [sequence for sequence in everyone if sequence.order >= 0]
        if step in leaving and leaving[step] < len(arrived):
            engine.scheduler.abort(arrived[leaving[step]])
        if engine.scheduler.has_work:
            engine.step(fails=step in failing)
    engine.run(max_steps=sum(10 * (sequence.num_prompt + 60) for sequence in everyone))
    for sequence in everyone:
        assert sequence.status is SequenceStatus.FINISHED
        wanted = sequence.request.params.max_tokens
        assert not sequence.request.branches or sequence.finish_reason == "abort" or sequence in engine.started
        assert sequence.finish_reason == "abort" or sequence.num_generated == wanted
