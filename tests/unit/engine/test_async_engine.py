"""The engine in its thread: every request ends exactly once, and what it held is given back, whatever the exit."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, ask, events_of, is_idle, until, with_engine
from families import write_base, write_family
from native_tools import overflow

from moa_serve import LLM, SamplingParams
from moa_serve.adapter.adapter import AdapterSource
from moa_serve.adapter.importers import read_adapter
from moa_serve.engine.async_engine import PAUSE_AT, AsyncEngine
from moa_serve.engine.engine import Engine, EngineOptions, TokenEvent
from moa_serve.engine.request import Request
from moa_serve.errors import Draining, EngineError, InvalidRequest, Overloaded
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def test_streams_give_what_the_llm_gives(base: Path, tmp_path: Path) -> None:
    folders = {family: write_family(tmp_path / family, family) for family in ("soft", "sparse_fn", "instance", "molora")}
    with LLM(base, adapters=folders, backend="torch", device="cpu", kv_cache_bytes=2**21) as llm:
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
        expected = [llm.generate([list(PROMPT)], params, adapter=name)[0].token_ids for name in (*folders, None)]
        adapters = [read_adapter(AdapterSource(folder), llm.config) for folder in folders.values()]

    async def body(engine: AsyncEngine) -> list[list[int | None]]:
        streams = [engine.open(ask(9, adapter), adapter) for adapter in (*adapters, None)]
        found = [[event.token_id for event in events] for events in await asyncio.gather(*map(events_of, streams))]
        await until(lambda: is_idle(engine))
        assert engine.num_open == 0
        assert engine._adapters == {}
        return found

    assert with_engine(base, body, num_slots=2) == expected


@pytest.mark.case(49)
def test_closing_a_stream_frees_its_row_at_once(base: Path) -> None:
    closed = []

    async def body(engine: AsyncEngine) -> None:
        async with engine.open(ask(400), on_close=lambda: closed.append(1)) as stream:
            await anext(stream)
            assert engine.engine.block_pool.num_held > 0
        steps = engine.load.steps
        await until(lambda: is_idle(engine))
        assert engine.load.steps <= steps + 3
        stream.close()

    with_engine(base, body)
    assert closed == [1]


@pytest.mark.case(49)
def test_a_stream_closed_before_it_was_added_never_runs(base: Path) -> None:
    async def body(engine: AsyncEngine) -> None:
        for _ in range(20):
            engine.open(ask(400)).close()
        (event,) = await events_of(engine.open(ask(1)))
        assert event.finish_reason == "length"
        await until(lambda: is_idle(engine))

    with_engine(base, body)


@pytest.mark.case(48)
def test_a_slow_reader_pauses_its_own_row_only(base: Path) -> None:
    async def body(engine: AsyncEngine) -> None:
        slow = engine.open(ask(480))
        await until(lambda: len(slow._events) >= PAUSE_AT)
        held = len(slow._events)
        others = await asyncio.gather(*(events_of(engine.open(ask(60))) for _ in range(3)))
        assert [len(events) for events in others] == [60] * 3
        assert len(slow._events) <= held + 8, "a few steps may have been under way"
        events = [event for events in [await anext(slow)] for event in events]
        events += await events_of(slow)
        assert len(events) == 480
        assert events[-1].finish_reason == "length"

    with_engine(base, body, max_model_len=512)


def test_a_paused_row_that_is_closed_is_gone_from_the_load(base: Path) -> None:
    """Nothing else may come for hours, and until then the gauges would show a row that nobody has."""

    async def body(engine: AsyncEngine) -> None:
        streams = [engine.open(ask(PAUSE_AT + 100)) for _ in range(2)]
        await until(lambda: all(sequence.is_paused for sequence in engine._sequences.values()) and len(engine._sequences) == 2)
        for stream in streams:
            stream.close()
        await until(lambda: is_idle(engine))
        await until(lambda: (engine.load.running, engine.load.kv_usage) == (0, 0))

    with_engine(base, body, kv_cache_bytes=2**22)


@pytest.mark.case(48)
def test_a_paused_row_gives_its_pages_to_those_who_run(base: Path) -> None:
    """Else a reader that sleeps would hold the whole cache."""

    async def body(engine: AsyncEngine) -> None:
        slow = engine.open(ask(480))
        await until(lambda: len(slow._events) >= PAUSE_AT)
        other = await events_of(engine.open(ask(400)))
        assert len(other) == 400
        slow_events = [event for events in [await anext(slow)] for event in events] + await events_of(slow)
        assert len(slow_events) == 480

    page = 2 * 3 * 16 * 2 * 8 * 4
    with_engine(base, body, kv_cache_bytes=34 * page, max_model_len=512)


@pytest.mark.case(53)
def test_too_many_are_refused_at_once(base: Path) -> None:
    async def body(engine: AsyncEngine) -> None:
        streams = [engine.open(ask(20)) for _ in range(5)]
        with pytest.raises(Overloaded):
            engine.open(ask(1))
        ended = await asyncio.gather(*map(events_of, streams))
        assert [len(events) for events in ended] == [20] * 5
        assert len(await events_of(engine.open(ask(1)))) == 1

    with_engine(base, body, max_num_seqs=2, max_waiting=3)


def test_an_impossible_request_is_refused_before_it_is_queued(base: Path) -> None:
    async def body(engine: AsyncEngine) -> None:
        with pytest.raises(InvalidRequest):
            engine.open(ask(1, prompt=(96,)))
        assert engine.num_open == 0

    with_engine(base, body)


@pytest.mark.filterwarnings("ignore")
def test_a_failed_step_ends_its_requests_and_the_next_ones_run(base: Path) -> None:
    async def body(engine: AsyncEngine) -> None:
        step = engine.engine.step

        def fail() -> list[TokenEvent]:
            """One step for all three: three that fail one after the other would end the engine."""
            if engine.engine.scheduler.num_waiting < 3:
                return []
            raise ZeroDivisionError

        engine.engine.step = fail  # type: ignore[method-assign]
        ended = await asyncio.gather(*(events_of(engine.open(ask(20))) for _ in range(3)))
        assert all(isinstance(events[-1].error, EngineError) for events in ended)
        assert [events[-1].finish_reason for events in ended] == ["error"] * 3
        engine.engine.step = step  # type: ignore[method-assign]
        assert len(await events_of(engine.open(ask(5)))) == 5
        await until(lambda: is_idle(engine))
        assert engine.failure is None

    with_engine(base, body)


def poison(engine: AsyncEngine) -> None:
    """Finite weights that overflow in use."""
    for slot in range(engine.engine.slot_table.num_slots):
        if engine.engine.slot_table.revisions[slot] is not None:
            overflow(engine.engine._bank[slot])


@pytest.mark.case(11)
def test_a_request_behind_a_quarantine_ends_with_its_error(base: Path, tmp_path: Path) -> None:
    """It was admitted before the third overflow and is queued after it; the engine and everyone else go on."""
    adapter = read_adapter(AdapterSource(write_family(tmp_path / "a", "lora")), load_base(base, dtype=torch.float32).config)

    async def body(engine: AsyncEngine) -> None:
        await events_of(engine.open(ask(1, adapter), adapter))
        poison(engine)
        innocent = asyncio.create_task(events_of(engine.open(ask(200))))
        engine._commands.put(lambda: time.sleep(0.05))
        doomed = [asyncio.create_task(events_of(engine.open(ask(5, adapter), adapter))) for _ in range(12)]
        ended = [events[-1] for events in await asyncio.gather(*doomed)]
        engine.engine._nonfinite[adapter.revision] = 0  # `open` lets it pass, `add` does not
        stream = engine.open(ask(5, adapter), adapter)
        engine.engine._nonfinite[adapter.revision] = 3
        ended += (await events_of(stream))[-1:]
        assert all(event.finish_reason == "error" for event in ended)
        assert len(await innocent) == 200
        assert engine.failure is None
        await until(lambda: is_idle(engine))

    with_engine(base, body)


def test_a_watcher_that_fails_stops_nothing(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(engine: AsyncEngine) -> None:
        def broken(*_: object) -> None:
            raise ZeroDivisionError

        engine.on_step = broken
        assert len(await events_of(engine.open(ask(9)))) == 9
        assert engine.failure is None

    with_engine(base, body)
    assert "observing a step failed" in caplog.text


def test_dropping_a_busy_revision_frees_it_with_its_last_row(base: Path, tmp_path: Path) -> None:
    adapter = read_adapter(AdapterSource(write_family(tmp_path / "a", "soft")), load_base(base, dtype=torch.float32).config)

    async def body(engine: AsyncEngine) -> None:
        stream = engine.open(ask(60, adapter), adapter)
        await anext(stream)
        engine.drop(adapter.revision)
        await events_of(stream)
        await until(lambda: is_idle(engine))
        assert engine.engine._bank._slots == [None] * 8
        assert engine.engine.routing_totals(adapter.revision) is None

    with_engine(base, body)


def test_stopping_ends_every_stream(base: Path) -> None:
    async def body(engine: AsyncEngine) -> list[TokenEvent]:
        stream = engine.open(ask(400))
        await anext(stream)
        await engine.stop()
        return await events_of(stream)

    events = asyncio.run(_stop_twice(base, body))
    assert events[-1].finish_reason == "error"


async def _stop_twice(base: Path, body: Callable[[AsyncEngine], Awaitable[list[TokenEvent]]]) -> list[TokenEvent]:
    loaded = load_base(base, dtype=torch.float32)
    options = EngineOptions(kv_cache_bytes=2**21)
    engine = AsyncEngine(lambda lease: Engine(Transformer(loaded.config, loaded.weights), options, lease=lease, base_digest="d"))
    engine.start()
    return await body(engine)


@pytest.mark.parametrize(("length", "max_tokens"), [(57, 0), (57, 3), (33, 2), (34, 0), (1, 1), (2, 1)])
def test_prompt_logprobs_are_those_of_the_logits(base: Path, length: int, max_tokens: int) -> None:
    """Whatever the chunks: a last one of one token, and decode steps that have no prompt token at all."""
    prompt = tuple(range(3, 3 + length))
    with LLM(base, backend="torch", device="cpu", kv_cache_bytes=2**21) as llm:
        raw = llm.logits(prompt).log_softmax(-1)

    async def body(engine: AsyncEngine) -> Any:
        request = Request(prompt, SamplingParams(max_tokens=max_tokens), prompt_logprobs=2)
        stream = engine.open(request)
        await events_of(stream)
        return stream.collected

    collected = with_engine(base, body, max_batch_tokens=32)
    assert len(collected.prompt_logprobs) == len(prompt) - 1
    for place, found in enumerate(collected.prompt_logprobs):
        assert found.token_id == prompt[place + 1]
        assert found.logprob == pytest.approx(float(raw[place, prompt[place + 1]]), abs=1e-4)
        assert len(found.top) == 2


def test_nothing_is_accepted_while_it_stops(base: Path) -> None:
    """A request that was still being prepared must hear of it, and not wait for a thread that is gone."""

    async def body(engine: AsyncEngine) -> list[TokenEvent]:
        stream = engine.open(ask(400))
        await anext(stream)
        await engine.stop()
        with pytest.raises(Draining):
            engine.open(ask(1))
        return await events_of(stream)

    assert isinstance(asyncio.run(_stop_twice(base, body))[-1].error, Draining)
