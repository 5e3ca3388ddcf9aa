"""What steps are counted as: every one once, with all of its time, and by part where that is timed."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from families import write_base, write_family
from native_tools import SETS

from moa_serve import LLM, SamplingParams
from moa_serve.engine.buckets import Buckets
from moa_serve.engine.steps import STEP_PARTS, TIME_EVERY, StepTimes, _draw_wait

TOKENS, NUM_PROMPT = 6, 40


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


def test_buckets_have_their_upper_bounds_in_them() -> None:
    buckets = Buckets((1, 2, 5))
    for value in (0.5, 1, 1.5, 2, 5, 6):
        buckets.add(value)
    found = buckets.copy()
    assert (found.counts, found.sum) == ((2, 2, 1, 1), 16)


def run(base: Path, folder: Path, family: str | None, backend: str, times: StepTimes, *, rows: int = 3) -> None:
    adapters = {} if family is None else {"a": write_family(folder / "a", family)}
    with LLM(base, adapters=adapters, backend=backend, kv_cache_bytes=2**21, prefix_cache=False) as llm:
        llm._engine.times = times
        params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=1)
        llm.generate([[5] * NUM_PROMPT] * rows, params, adapter="a" if adapters else None)


BACKENDS = ["torch", pytest.param("native", marks=pytest.mark.skipif(not SETS, reason="the native library is not built"))]


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_step_is_counted_once_with_its_rows_and_tokens(base: Path, tmp_path: Path, backend: str) -> None:
    times = StepTimes()
    run(base, tmp_path, None, backend, times)
    seconds, rows, tokens = times.seconds.copy(), times.rows.copy(), times.tokens.copy()
    assert sum(seconds.counts) == sum(rows.counts) == sum(tokens.counts) == TOKENS
    assert rows.sum == 3 * TOKENS
    assert tokens.sum == 3 * (NUM_PROMPT + TOKENS - 1)


@pytest.mark.parametrize("family", ["sparse_fn", "mola_layerwise", "instance", "lora"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_parts_of_a_timed_step_are_its_whole_time(base: Path, tmp_path: Path, backend: str, family: str) -> None:
    """What is in no part is not seen, and what is in two makes a dashboard's stack higher than the step."""
    times = StepTimes(draw_wait=lambda: 0)
    run(base, tmp_path, family, backend, times)
    parts = times.part_seconds
    assert times.num_timed == TOKENS
    assert tuple(parts) == STEP_PARTS
    assert sum(parts.values()) == pytest.approx(times.seconds.copy().sum, rel=1e-6)
    has_router = family != "lora"
    assert {part for part, spent in parts.items() if spent > 0} == set(STEP_PARTS) - ({"router"} if not has_router else set())


def test_timing_by_part_changes_no_logits(base: Path, tmp_path: Path) -> None:
    adapter = write_family(tmp_path / "a", "sparse_fn")
    with LLM(base, adapters={"a": adapter}, backend="torch", kv_cache_bytes=2**21) as llm:
        before = llm.logits([5, 17, 80], adapter="a")
        llm._engine.times = StepTimes(draw_wait=lambda: 0)
        assert torch.equal(llm.logits([5, 17, 80], adapter="a"), before)
        assert llm._engine.times.num_timed == 1


def test_the_torch_backend_times_a_step_in_some_dozens(base: Path, tmp_path: Path) -> None:
    """It is paid for with the time of the step; and no load may have the same token of each request timed for ever."""
    waits = {_draw_wait() for _ in range(500)}
    assert len(waits) > 10
    assert min(waits) >= TIME_EVERY // 2
    times = StepTimes(draw_wait=lambda: 3)
    run(base, tmp_path, None, "torch", times)
    assert times.num_timed == TOKENS // 4


class Dear:
    """A backend whose timed steps take eleven times as long."""

    timing_is_free = False
    num_started = 0

    def start_timing(self) -> None:
        self.num_started += 1

    def take_timing(self) -> dict[str, float]:
        return {"base": 0.0}


def test_where_timing_is_dear_it_is_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a timed step cannot be a recorded one, and takes many times as long."""
    times, model, now = StepTimes(), Dear(), 0.0
    monkeypatch.setattr("moa_serve.engine.steps.time.perf_counter", lambda: now)
    for _ in range(20_000):
        times.begin(cast(Any, model))
        now += 0.011 if model.num_started > times.num_timed else 0.001
        times.end(cast(Any, model), 1, 1)
    assert times.num_timed == model.num_started
    assert 5 <= times.num_timed <= 0.005 * now / 0.010 + 1, "half a percent of the time"


def test_a_step_that_fails_is_not_counted_and_leaves_no_timer(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with LLM(base, backend="torch", kv_cache_bytes=2**21) as llm:
        times = llm._engine.times = StepTimes(draw_wait=lambda: 0)
        with monkeypatch.context() as patched:
            patched.setattr(llm._engine.scheduler, "advance", _fail)
            with pytest.raises(RuntimeError, match="no step"):
                llm.generate([[5, 6]], SamplingParams(max_tokens=2))
        assert times.num_timed == sum(times.seconds.copy().counts) == 0
        llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))
        assert times.num_timed == 2


def _fail(*_: object) -> None:
    raise RuntimeError("no step")


def test_a_rebuilt_engine_goes_on_counting(base: Path) -> None:
    with LLM(base, backend="torch", kv_cache_bytes=2**21) as llm:
        times = llm._engine.times = StepTimes()
        llm._engine.slot_table.counts.hits = 5
        llm._engine = llm._engine.rebuilt()
        llm.generate([[5, 6]], SamplingParams(max_tokens=2, ignore_eos=True))
        assert sum(times.seconds.copy().counts) == 2
        assert llm._engine.slot_table.counts.hits == 5
