"""Steps that fail: whoever is not the cause gets the tokens that he would have got, and the engine goes on or says that it cannot."""

import asyncio
import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import PROMPT, ask, events_of, is_idle, until, with_engine
from families import write_base, write_family
from native_tools import SETS
from torch import Tensor

from moa_serve.adapter.adapter import Adapter, AdapterSource
from moa_serve.adapter.importers import read_adapter
from moa_serve.engine.async_engine import AsyncEngine
from moa_serve.engine.engine import Engine, TokenEvent
from moa_serve.engine.recovery import Recovery
from moa_serve.engine.request import Request, Sequence
from moa_serve.engine.watchdog import STUCK, TICK_SECONDS, Watchdog
from moa_serve.errors import AdapterQuarantined, EngineError, OutOfMemory, Overloaded
from moa_serve.model.memory import is_out_of_memory
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import load_base
from moa_serve.native.model import NativeModel

Inject = Callable[..., None]
ALWAYS = {"times": None}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    config = load_base(base, dtype=torch.float32).config
    folder = tmp_path_factory.mktemp("adapters")
    return [read_adapter(AdapterSource(write_family(folder / family, family)), config) for family in ("soft", "sparse_fn")]


@pytest.fixture(params=["torch", pytest.param("native", marks=pytest.mark.skipif(not SETS, reason="no native library"))])
def backend(request: pytest.FixtureRequest) -> Any:
    return Transformer if request.param == "torch" else NativeModel


async def run_all(engine: AsyncEngine, jobs: SequenceOf[tuple[Request, Adapter | None]]) -> list[list[TokenEvent]]:
    """All of them in one batch from the first step on."""
    engine._commands.put(lambda: time.sleep(0.02))
    return list(await asyncio.gather(*(events_of(engine.open(request, adapter)) for request, adapter in jobs)))


def tokens(events: list[TokenEvent]) -> list[int | None]:
    return [event.token_id for event in events]


def codes(ended: list[list[TokenEvent]]) -> list[str | None]:
    return [events[-1].error.code if events[-1].error else None for events in ended]


def mixed(adapters: list[Adapter]) -> list[tuple[Request, Adapter | None]]:
    """Two adapters and the base, several rows each; every row draws, with a seed of its own."""
    rows = [adapters[0], adapters[1], None, adapters[0], adapters[1], None]
    return [(ask(8, adapter, seed=seed, temperature=0.9), adapter) for seed, adapter in enumerate(rows, start=1)]


@pytest.mark.case(57)
@pytest.mark.parametrize(("times", "expected"), [(1, {None}), (2, {None, "out_of_memory"}), (3, {"out_of_memory"})])
def test_without_memory_a_batch_is_halved_and_tried_once_more(
    base: Path, adapters: list[Adapter], backend: Any, inject: Inject, times: int, expected: set[str | None]
) -> None:
    """A step that finds no memory must not end the process, nor those who fit."""

    async def body(engine: AsyncEngine) -> None:
        whole = await run_all(engine, mixed(adapters))
        inject({"at": "forward", "raise": "MemoryError", "times": times})
        ended = await run_all(engine, mixed(adapters))
        assert set(codes(ended)) == expected
        for events, good in zip(ended, whole, strict=True):
            assert events[-1].error is not None or tokens(events) == tokens(good)
            assert events[-1].error is None or isinstance(events[-1].error, OutOfMemory)
        assert engine.incidents["out_of_memory"] == sum(code is not None for code in codes(ended))
        assert [tokens(events) for events in await run_all(engine, mixed(adapters))] == [tokens(good) for good in whole]
        await until(lambda: is_idle(engine))
        assert engine.incidents["failed_step"] == 0

    with_engine(base, body, make_model=backend)


@pytest.mark.case(57)
def test_a_long_prompt_alone_goes_on_in_halves(base: Path, backend: Any, inject: Inject) -> None:
    """There is no second row to split off, but there are fewer tokens."""
    prompt = tuple(range(3, 93))

    async def body(engine: AsyncEngine) -> None:
        good = await events_of(engine.open(ask(5, prompt=prompt)))
        inject({"at": "forward", "raise": "MemoryError"})
        assert tokens(await events_of(engine.open(ask(5, prompt=prompt)))) == tokens(good)

    with_engine(base, body, make_model=backend)


@pytest.mark.case(57)
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"), False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
            True,
        ),
        (OutOfMemory("no memory for the buffers"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("shapes do not fit"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_is_short_is_told_from_other_mistakes(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


@pytest.mark.case(57)
def test_what_a_failed_step_held_is_free_when_memory_is_trimmed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception that is being handled keeps the tensors of all its frames: the halves would have as little room as the whole."""
    monkeypatch.setattr("moa_serve.engine.recovery.logger.disabled", True)  # pytest keeps what is logged, the server does not
    held: list[weakref.ref[Tensor]] = []

    def run(chunks: Any) -> Any:
        buffers = torch.empty(9)
        held.append(weakref.ref(buffers))
        raise torch.OutOfMemoryError(f"CUDA out of memory beside {buffers.shape}")

    def trim() -> None:
        assert [one() for one in held] == [None]

    def sample(logits: Tensor, sequences: SequenceOf[Sequence]) -> Any:
        raise AssertionError("there is nothing to draw from")

    rows = [(Sequence(ask(1), [5], b""), 1) for _ in range(2)]
    parts, failures = Recovery(run, sample, lambda: True, trim).compute(rows)
    assert (parts, [failure.kind for failure in failures]) == ([], ["out_of_memory"] * 2)
    assert len(held) == 3


@pytest.mark.case(57)
def test_a_draw_without_memory_is_tried_row_by_row_with_what_trimming_gave_back(
    base: Path, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch, inject: Inject
) -> None:
    """The client can try again: it is no mistake of the server."""
    trimmed: list[None] = []

    async def body(engine: AsyncEngine) -> None:
        whole = await run_all(engine, mixed(adapters))
        monkeypatch.setattr(engine.engine._recovery, "_trim", lambda: trimmed.append(None))
        inject({"at": "sample", "raise": "MemoryError", "where": {"seed": 2}} | ALWAYS)
        ended = await run_all(engine, mixed(adapters))
        assert codes(ended) == [None, "out_of_memory", None, None, None, None]
        assert [tokens(events) for events in (ended[0], *ended[2:])] == [tokens(events) for events in (whole[0], *whole[2:])]
        assert trimmed

    with_engine(base, body)


@pytest.mark.case(57)
def test_trimming_a_gpu_gives_its_allocators_memory_back_when_slots_are_empty(
    base: Path, adapters: list[Adapter], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is given back first is all that is given back."""
    filled: list[list[str | None]] = []

    async def body(engine: AsyncEngine) -> None:
        await events_of(engine.open(ask(1, adapters[1]), adapters[1]))
        inner = engine.engine
        assert adapters[1].revision in inner.slot_table.revisions
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: filled.append(list(inner.slot_table.revisions)))
        inner.trim()
        assert filled == []  # on a CPU there is none
        await events_of(engine.open(ask(1, adapters[1]), adapters[1]))
        monkeypatch.setattr(Transformer, "device", torch.device("cuda"))
        inner.trim()
        monkeypatch.undo()
        assert filled == [[None] * len(inner.slot_table.revisions)]

    with_engine(base, body)


@pytest.mark.case(57, 58)
def test_trimming_empties_idle_slots_only(base: Path, adapters: list[Adapter]) -> None:
    async def body(engine: AsyncEngine) -> None:
        await events_of(engine.open(ask(1, adapters[1]), adapters[1]))
        stream = engine.open(ask(60, adapters[0]), adapters[0])
        first = await anext(stream)
        engine.trim()
        rest = await events_of(stream)
        assert len(first) + len(rest) == 60
        assert set(engine.engine.slot_table.revisions) == {None, adapters[0].revision}
        assert len(await events_of(engine.open(ask(3, adapters[1]), adapters[1]))) == 3

    with_engine(base, body)


@pytest.mark.case(60)
def test_a_row_that_cannot_be_drawn_fails_alone(base: Path, adapters: list[Adapter], backend: Any, inject: Inject) -> None:
    async def body(engine: AsyncEngine) -> None:
        whole = await run_all(engine, mixed(adapters))
        inject({"at": "sample", "raise": "ZeroDivisionError", "where": {"seed": 2}} | ALWAYS)
        ended = await run_all(engine, mixed(adapters))
        assert codes(ended) == [None, "internal_error", None, None, None, None]
        assert [tokens(events) for events in (ended[0], *ended[2:])] == [tokens(events) for events in (whole[0], *whole[2:])]
        await until(lambda: is_idle(engine))
        for _ in range(5):  # alone it is as guilty, and nobody else's engine is given up for it
            assert codes([await events_of(engine.open(ask(3, seed=2)))]) == ["internal_error"]
        assert engine.incidents["failed_step"] == 0
        assert engine.incidents["sampler_error"] == 6

    with_engine(base, body, make_model=backend)


@pytest.mark.case(60)
@pytest.mark.skipif(not SETS, reason="torch's last digits depend on the size of the batch, and there is no native library")
def test_log_probabilities_of_the_others_survive_a_row_that_cannot_be_drawn(base: Path, inject: Inject) -> None:
    async def body(engine: AsyncEngine) -> None:
        jobs = [(ask(4, seed=1, logprobs=2), None), (ask(4, seed=2), None), (ask(4, seed=3), None)]
        whole = await run_all(engine, jobs)
        inject({"at": "sample", "raise": "ZeroDivisionError", "where": {"seed": 2}} | ALWAYS)
        ended = await run_all(engine, [(ask(4, seed=1, logprobs=2), None), *jobs[1:]])
        assert [event.logprob for event in ended[0]] == [event.logprob for event in whole[0]]
        assert {event.logprob for event in ended[2]} == {None}

    with_engine(base, body, make_model=NativeModel)


@pytest.mark.case(61)
def test_an_adapter_that_breaks_the_step_leaves_service_and_nobody_else_notices(
    base: Path, adapters: list[Adapter], backend: Any, inject: Inject
) -> None:
    guilty = adapters[0]

    async def body(engine: AsyncEngine) -> None:
        whole = await run_all(engine, mixed(adapters))
        inject({"at": "forward", "raise": "RuntimeError", "where": {"adapter": guilty.revision}} | ALWAYS)
        ended = await run_all(engine, mixed(adapters))
        assert codes(ended) == ["internal_error", None, None, "internal_error", None, None]
        for index in (1, 2, 4, 5):
            assert tokens(ended[index]) == tokens(whole[index])
        with pytest.raises(AdapterQuarantined, match="load a mended one"):
            engine.open(ask(1, guilty), guilty)
        inject()
        await engine.pardon(guilty.revision)
        await events_of(engine.open(ask(1)))
        assert tokens(await events_of(engine.open(ask(8, guilty, seed=1, temperature=0.9), guilty))) == tokens(whole[0])
        await until(lambda: is_idle(engine))
        assert engine.incidents["failed_step"] == 0

    with_engine(base, body, make_model=backend)


@pytest.mark.case(61)
def test_an_adapter_that_breaks_a_step_of_its_own_is_found_guilty_by_a_probe(base: Path, adapters: list[Adapter], inject: Inject) -> None:
    """Else it could end the process: three steps of its own in a row, and there is nobody to compare it with."""
    guilty = adapters[0]

    async def body(engine: AsyncEngine) -> None:
        inject({"at": "forward", "raise": "RuntimeError", "where": {"adapter": guilty.revision}} | ALWAYS)
        assert codes([await events_of(engine.open(ask(3, guilty), guilty))]) == ["internal_error"]
        with pytest.raises(AdapterQuarantined):
            engine.open(ask(1, guilty), guilty)
        for _ in range(4):  # nor is one prompt of the base the engine's fault
            inject({"at": "forward", "raise": "RuntimeError", "where": {"seed": 9}} | ALWAYS)
            assert codes([await events_of(engine.open(ask(3, seed=9)))]) == ["internal_error"]
        assert engine.incidents["failed_step"] == engine.incidents["rebuilt"] == 0
        assert engine.failure is None

    with_engine(base, body)


@pytest.mark.case(62)
def test_an_engine_that_keeps_failing_is_built_anew_once(
    base: Path, adapters: list[Adapter], backend: Any, inject: Inject, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_go_on = threading.Event()
    rebuilt = Engine.rebuilt

    def wait_and_rebuild(engine: Engine) -> Engine:
        may_go_on.wait(10)
        return rebuilt(engine)

    monkeypatch.setattr(Engine, "rebuilt", wait_and_rebuild)

    async def fail(engine: AsyncEngine) -> None:
        for _ in range(3):
            assert codes([await events_of(engine.open(ask(5)))]) == ["internal_error"]

    async def body(engine: AsyncEngine) -> None:
        whole = await run_all(engine, mixed(adapters))
        engine._engine._nonfinite["suspect"] = 2
        sizes = (engine.engine.block_pool.num_free, engine.engine.max_model_len)
        counted = engine.engine.routing_totals(adapters[0].revision)
        inject({"at": "forward", "raise": "RuntimeError"} | ALWAYS)
        await fail(engine)
        await until(lambda: engine.is_rebuilding)
        with pytest.raises(Overloaded, match="built anew"):
            engine.open(ask(1))
        inject()
        may_go_on.set()
        await until(lambda: not engine.is_rebuilding)
        assert [tokens(events) for events in await run_all(engine, mixed(adapters))] == [tokens(good) for good in whole]
        assert (engine.engine.block_pool.num_free, engine.engine.max_model_len) == sizes
        assert engine.engine._nonfinite == {"suspect": 2}
        again = engine.engine.routing_totals(adapters[0].revision)
        assert counted is not None
        assert again is not None
        assert again.tokens == 2 * counted.tokens
        inject({"at": "forward", "raise": "RuntimeError"} | ALWAYS)
        await fail(engine)
        await until(lambda: engine.failure is not None)
        with pytest.raises(EngineError, match="stopped"):
            engine.open(ask(5))

    with_engine(base, body, make_model=backend)


@pytest.mark.case(66)
def test_a_base_that_gives_nan_fails_that_row_and_is_counted(base: Path, adapters: list[Adapter], inject: Inject) -> None:
    async def body(engine: AsyncEngine) -> None:
        whole = await run_all(engine, mixed(adapters))
        inject({"at": "logits", "where": {"seed": 3}})
        ended = await run_all(engine, mixed(adapters))
        assert codes(ended) == [None, None, "internal_error", None, None, None]
        assert [tokens(events) for index, events in enumerate(ended) if index != 2] == [
            tokens(events) for index, events in enumerate(whole) if index != 2
        ]
        assert engine.incidents["base_nonfinite"] == 1

    with_engine(base, body)


@pytest.mark.case(66)
def test_pages_of_a_row_that_was_nan_are_clean_for_the_next(base: Path) -> None:
    """0 * NaN is NaN: what attention masks still reaches the one who gets the page."""

    async def body(engine: AsyncEngine) -> None:
        good = await events_of(engine.open(ask(5)))
        for keys_or_values in (engine.engine._cache.keys, engine.engine._cache.values):  # type: ignore[attr-defined]
            keys_or_values.fill_(torch.nan)
        assert tokens(await events_of(engine.open(ask(5)))) == tokens(good)

    with_engine(base, body)


async def watched(engine: AsyncEngine, seconds: float, work: Callable[[], Any]) -> list[int]:
    """Exit codes that a watchdog ends the process with while `work` runs."""
    exits: list[int] = []
    watchdog = Watchdog(engine, stuck_seconds=seconds, exit=exits.append)
    watchdog.start()
    try:
        await work()
    finally:
        watchdog.stop()
        await asyncio.to_thread(watchdog._thread.join)
    return exits


@pytest.mark.case(63)
def test_a_stuck_engine_is_told_and_ends_the_process(base: Path, inject: Inject, caplog: pytest.LogCaptureFixture) -> None:
    async def body(engine: AsyncEngine) -> None:
        inject({"at": "step", "sleep": 4})

        async def work() -> None:
            assert codes([await events_of(engine.open(ask(5)))]) == ["internal_error"]
            assert engine.failure is not None
            await asyncio.to_thread(time.sleep, 2.5)

        assert await watched(engine, 3 * TICK_SECONDS, work) == [STUCK]

    with_engine(base, body)
    assert "no progress" in caplog.text
    assert "stack of moa-engine" in caplog.text
    assert "time.sleep(fault" in caplog.text


@pytest.mark.case(64)
def test_a_long_step_that_gets_on_layer_by_layer_is_not_stuck(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Transformer.block

    def slow(*arguments: Any) -> Any:
        time.sleep(2 * TICK_SECONDS)
        return block(*arguments)

    monkeypatch.setattr(Transformer, "block", slow)

    async def body(engine: AsyncEngine) -> None:
        async def work() -> None:
            assert len(await events_of(engine.open(ask(1, prompt=PROMPT * 20)))) == 1

        assert await watched(engine, 4 * TICK_SECONDS, work) == []

    with_engine(base, body)


@pytest.mark.case(64)
@pytest.mark.skipif(not SETS, reason="no native library")
def test_the_native_step_counts_its_layers(base: Path) -> None:
    async def body(engine: AsyncEngine) -> None:
        before = engine.progress
        await events_of(engine.open(ask(4)))
        assert engine.engine.model.layers_done == 4 * 3
        assert engine.progress > before + 4 * 3

    with_engine(base, body, make_model=NativeModel)


@pytest.mark.case(63)
def test_paused_and_idle_engines_are_not_stuck(base: Path) -> None:
    async def body(engine: AsyncEngine) -> None:
        async def work() -> None:
            stream = engine.open(ask(400))
            await until(lambda: bool(engine._sequences) and all(row.is_paused for row in engine._sequences.values()))
            await asyncio.sleep(4 * TICK_SECONDS)
            stream.close()
            await until(lambda: is_idle(engine))
            await asyncio.sleep(4 * TICK_SECONDS)

        assert await watched(engine, 2 * TICK_SECONDS, work) == []

    with_engine(base, body, kv_cache_bytes=2**22)


@pytest.mark.case(65)
def test_a_blocked_event_loop_is_counted_and_its_stack_logged(base: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def body(engine: AsyncEngine) -> None:
        watchdog = Watchdog(engine)
        watchdog.start()
        await asyncio.sleep(0.1)
        time.sleep(1.8)
        await asyncio.sleep(0.1)
        watchdog.stop()
        assert list(watchdog.num_stalls.values()) == [1, 1]
        assert 1 < watchdog.longest_stall_seconds < 3
        lag = watchdog.lag.copy()
        assert sum(lag.counts) >= 3, "beats that came in time count, too"
        assert sum(lag.counts[lag.bounds.index(1) + 1 :]) == 1
        assert 1 < lag.sum < 4

    with_engine(base, body)
    assert "the event loop is blocked" in caplog.text
    assert "time.sleep(1.8)" in caplog.text
