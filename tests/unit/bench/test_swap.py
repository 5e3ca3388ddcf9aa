"""The numbers of `bench swap`: the same traffic for all engines, swaps where there must be some and nowhere else."""

import json
from pathlib import Path
from typing import Any

import pytest
from training import tiny_base

from moa_serve.bench import swap
from moa_serve.bench.swap import CONTROL, FEW, IDLE, NONE, RESIDENT, SWAPPED, Plan, measure
from moa_serve.engine.engine import Engine
from moa_serve.engine.request import Request, Sequence
from moa_serve.errors import InvalidRequest
from moa_serve.native.library import NativeUnavailable, instruction_sets

SMALL = Plan(adapters=4, slots=2, streams=2, requests=3, prompt_tokens=5, max_tokens=4, rounds=2)
ENGINES = (RESIDENT, CONTROL, SWAPPED, FEW, NONE, IDLE)


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        try:
            instruction_sets()
        except NativeUnavailable as error:
            pytest.skip(f"no native backend here: {error}")
    return str(request.param)


class Journal:
    """Which requests each engine got, by the order in which engines were made, and what stood in its slots when it was last asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engines: list[Engine] = []
        self.sequences: dict[Engine, list[Sequence]] = {}
        make, add = Engine.__init__, Engine.add

        def made(engine: Engine, *arguments: Any, **options: Any) -> None:
            make(engine, *arguments, **options)
            self.engines.append(engine)
            self.sequences[engine] = []

        def added(engine: Engine, request: Request) -> Sequence:
            self.sequences[engine].append(add(engine, request))
            return self.sequences[engine][-1]

        monkeypatch.setattr(Engine, "__init__", made)
        monkeypatch.setattr(Engine, "add", added)

    def of(self, name: str, num_fill: int) -> list[Sequence]:
        """In the order in which streams and their requests are drawn, which is not that in which they came."""
        sequences = self.sequences[self.engines[ENGINES.index(name)]][num_fill:]
        return sorted(sequences, key=lambda sequence: sequence.request.prompt_ids)


def test_engines_get_the_same_traffic_and_only_few_slots_swap(backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOA_CACHE_DIR", str(tmp_path / "cache"))
    base = tiny_base(tmp_path / "base")
    journal = Journal(monkeypatch)
    report = measure(base, backend, SMALL)

    waves = 1 + SMALL.rounds
    resident = journal.of(RESIDENT, SMALL.adapters)
    assert len(resident) == waves * SMALL.streams * SMALL.requests
    for name, num_fill in ((CONTROL, 4), (SWAPPED, 2), (FEW, 2), (NONE, 0), (IDLE, 2)):
        others = journal.of(name, num_fill)
        assert [one.request.prompt_ids for one in others] == [one.request.prompt_ids for one in resident]
        assert [one.num_generated for one in others] == [one.num_generated for one in resident]
        if name in (CONTROL, SWAPPED):  # a swapped adapter computes what it does when it stays
            assert [one.token_ids for one in others] == [one.token_ids for one in resident]
    asked = {name: {one.request.adapter for one in journal.of(name, 4)} for name in ENGINES}
    assert [len(asked[name]) for name in ENGINES] == [4, 4, 4, 2, 1, 1]
    assert asked[NONE] == asked[IDLE] == {None}
    assert [sum(revision is not None for revision in engine.slot_table.revisions) for engine in journal.engines] == [4, 4, 2, 2, 0, 2]

    assert report.swaps == {RESIDENT: 0, CONTROL: 0, SWAPPED: SMALL.streams * SMALL.requests, FEW: 0, NONE: 0, IDLE: 0}
    found = json.loads(json.dumps(report.to_json()))
    assert [one["server"] for one in found["measured"]] == list(ENGINES)
    assert [len(one["rounds"]) for one in found["measured"]] == [SMALL.rounds] * len(ENGINES)
    assert found["backend"] == backend
    assert 0 < found["swap_ms"]["median"] < found["pack_ms"]["median"] or backend == "torch"  # torch puts it into its layout every time
    speeds = {one["server"]: [wave["tokens_per_second"] for wave in one["rounds"]] for one in found["measured"]}
    halves = sorted(a / b for a, b in zip(speeds[SWAPPED], speeds[FEW], strict=True))
    assert found["ratios"]["swap_throughput"]["median"] == pytest.approx(sum(halves) / 2)
    goals = {name: judged["goal"] for name, judged in found["ratios"].items()}
    wanted = {"swap_gap_p99": 1.5, "swap_throughput": 0.9, "idle_throughput": 0.99}
    assert goals == {"control_throughput": None, "control_gap_p99": None} | wanted
    assert not (tmp_path / "cache" / "packed").exists()


def test_streams_that_wait_for_slots_are_not_judged(tmp_path: Path) -> None:
    plan = Plan(adapters=3, slots=2, streams=3, requests=2, prompt_tokens=5, max_tokens=4, rounds=1)
    ratios = measure(tiny_base(tmp_path), "torch", plan).ratios
    assert (ratios["swap_gap_p99"].goal, ratios["swap_throughput"].goal, ratios["idle_throughput"].goal) == (None, None, 0.99)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"adapters": 8}, "adapters is 8 and slots 8, so that none would ever be swapped"),
        ({"requests": 1}, "requests is 1"),
        ({"max_tokens": 3}, "max_tokens is 3"),
        ({"rounds": 0}, "rounds is 0"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        Plan(**wrong)


def test_a_longer_context_than_the_bases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="500 prompt tokens and up to 48 to generate are more than the 512"):
        swap.measure(tiny_base(tmp_path), "torch", Plan(prompt_tokens=500))
