"""Recorded decode steps: what is copied, kept and told apart. On a CPU "recording" is computing again on the recorded step's own inputs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import computing
from families import FAMILIES, write_base, write_family
from torch import Tensor

from moa_serve import LLM, SamplingParams
from moa_serve.model.graphs import RECORDED_AT, DecodeGraphs, Replay
from moa_serve.model.transformer import Transformer

PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)  # the shortest prompts stay in their first page
PROMPTS = [[5, 17, 80], [3], [44, 44, *range(9, 40)], [7, 8]]


class Again:
    """Computes again, on the same inputs; refuses where it is to be `broken`."""

    def __init__(self, *, broken: bool = False, is_full: Exception | None = None) -> None:
        self.is_full = is_full
        self.broken, self.num_recorded, self.num_replays = broken, 0, 0

    def renew(self) -> None:
        pass

    def record(self, compute: Replay) -> Replay:
        if self.is_full is not None:
            try:
                raise self.is_full
            finally:
                raise RuntimeError("operation failed due to a previous error during capture")
        if self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.num_recorded += 1

        def replay() -> Tensor:
            self.num_replays += 1
            return compute()

        return replay


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("graphs")
    return {"base": write_base(root / "base")} | {family: write_family(root / family, family) for family in FAMILIES}


@pytest.fixture
def llm(folders: dict[str, Path]) -> Iterator[LLM]:
    with open_llm(folders) as made:
        yield made


def open_llm(folders: dict[str, Path], backend: str = "torch", **options: Any) -> LLM:
    adapters = {family: folders[family] for family in FAMILIES}
    sizes = {"kv_cache_bytes": 2**22, "num_slots": len(FAMILIES)} | options
    return LLM(folders["base"], adapters=adapters, **computing(backend), dtype="float32", **sizes)


def model_of(llm: LLM) -> Transformer:
    model = llm._engine.model
    assert isinstance(model, Transformer)
    return model


def record(llm: LLM, *, broken: bool = False) -> Again:
    again = Again(broken=broken)
    model_of(llm)._graphs = DecodeGraphs(again)
    return again


def run(llm: LLM, names: list[str | None]) -> list[list[int]]:
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(len(names))]
    return [done.token_ids for done in llm.generate(prompts, PARAMS, adapter=names)]


def test_recorded_steps_give_the_same_tokens_and_counts(folders: dict[str, Path], llm: LLM) -> None:
    """Every family in one batch, some of them twice: a stale input, or an adapter of another row, would show at once."""
    names: list[str | None] = [None, *FAMILIES, None, *FAMILIES]
    expected = run(llm, names)
    with open_llm(folders) as other:
        again = record(other)
        assert run(other, names) == expected
        assert again.num_replays > RECORDED_AT
        for family in FAMILIES:
            mine, theirs = llm.routing_totals(family), other.routing_totals(family)
            assert mine is not None
            assert theirs is not None
            assert mine.tokens == theirs.tokens
            for field in ("selected", "gate_sum", "computed", "thresholds"):
                torch.testing.assert_close(torch.from_numpy(getattr(theirs, field)), torch.from_numpy(getattr(mine, field)))


def test_one_layout_is_recorded_once(llm: LLM) -> None:
    """Another prompt of the same adapter is the same operations; another adapter is not."""
    again = record(llm)
    first = run(llm, ["soft"])
    assert again.num_recorded == 1
    replays = again.num_replays
    assert run(llm, ["soft"]) == first
    assert (again.num_recorded, again.num_replays) == (1, replays + PARAMS.max_tokens - 1)  # type: ignore[operator]
    run(llm, ["sparse_fn"])
    assert again.num_recorded == 2


def test_a_recorded_step_keeps_no_adapter_that_left(llm: LLM) -> None:
    record(llm)
    run(llm, ["soft"])
    graphs = model_of(llm)._graphs
    assert graphs is not None
    assert graphs.num_recorded == 1
    llm.unload_adapter("soft")
    assert graphs.num_recorded == 0


def test_what_cannot_be_recorded_is_computed(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    expected = run(llm, ["soft", None])
    again = record(llm, broken=True)
    assert run(llm, ["soft", None]) == expected
    assert run(llm, ["sparse_fn", None])
    assert again.num_replays == 0
    assert [line.message for line in caplog.records if "cannot be recorded" in line.message] == [
        "a decode step cannot be recorded as a CUDA graph; steps are computed one operation at a time"
    ]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_short_memory_ends_no_recording_for_good(llm: LLM, error: Exception) -> None:
    expected = run(llm, ["soft"])
    again = record(llm)
    again.is_full = error
    assert run(llm, ["soft"]) == expected
    assert again.num_recorded == 0
    again.is_full = None
    assert run(llm, ["soft"]) == expected
    assert again.num_recorded == 1
    graphs = model_of(llm)._graphs
    assert graphs is not None
    llm._engine.trim()
    assert graphs.num_recorded == 0, "what they keep is given back first where memory is short"


def test_more_layouts_than_are_kept_are_not_recorded_at_each_sighting(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording takes as long as some steps: in turns of one layout too many, decoding would be slower than without."""
    monkeypatch.setattr("moa_serve.model.graphs.MOST", 2)
    again = record(llm)
    for _ in range(6):
        for names in (["soft"], ["sparse_fn"], ["molora"]):
            llm.generate([[5, 17]], SamplingParams(temperature=0, max_tokens=3, ignore_eos=True), adapter=names[0])
    assert again.num_recorded <= 3 * 2 * 6 / RECORDED_AT


@pytest.mark.gpu
def test_graphs_on_a_gpu_give_the_tokens_of_single_operations(folders: dict[str, Path]) -> None:
    names: list[str | None] = [None, *FAMILIES, None, *FAMILIES]
    with open_llm(folders, "cuda", prefix_cache=False) as llm:
        graphs = model_of(llm)._graphs
        assert graphs is not None
        recorded = [run(llm, names) for _ in range(2)]
        assert graphs.num_recorded > 0
        assert not graphs._is_broken
        totals = [llm.routing_totals(family) for family in FAMILIES]
        model_of(llm)._graphs = None
        assert [run(llm, names) for _ in range(2)] == recorded
        for family, before in zip(FAMILIES, totals, strict=True):
            after = llm.routing_totals(family)
            assert after is not None
            assert before is not None
            added = after.since(before)
            assert added.tokens == before.tokens
            torch.testing.assert_close(torch.from_numpy(added.selected), torch.from_numpy(before.selected))
            torch.testing.assert_close(torch.from_numpy(added.computed), torch.from_numpy(before.computed))
