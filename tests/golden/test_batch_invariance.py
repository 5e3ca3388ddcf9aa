"""A sequence's tokens do not depend on its neighbours, their adapters, preemption or swapping."""

import random
from typing import Any

import pytest
from backends import BACKENDS, computing
from goldens import Golden, goldens

from moa_serve import LLM, SamplingParams
from moa_serve.engine.scheduler import SchedulerOutput

PARAMS = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
NUM_JOBS = 12
Job = tuple[list[int], str | None]


def of_family(family: str) -> list[Golden]:
    return [golden for golden in goldens() if golden.family == family]


def jobs_of(mix: str, names: list[str], vocab_size: int = 256) -> list[Job]:
    """`NUM_JOBS` prompts of 1 to 30 tokens whose adapters follow `mix`; every mix but `identical` has rows of the base alone."""
    rng = random.Random(f"{mix} {len(names)}")
    choices: list[str | None] = [*names, None]
    weights = {
        "identical": [1.0] + [0.0] * len(names),
        "uniform": [1.0] * len(choices),
        "zipf": [1 / (rank + 1) for rank in range(len(choices))],
        "skewed": [0.9, *([0.1 / len(names)] * len(names))],
    }
    if mix == "distinct":
        chosen = [choices[(index - 1) % len(choices)] for index in range(max(NUM_JOBS, len(choices)))]
    else:
        chosen = rng.choices(choices, weights[mix], k=NUM_JOBS)
    return [([rng.randrange(vocab_size) for _ in range(rng.randint(1, 30))], name) for name in chosen]


def run(llm: LLM, jobs: list[Job], params: SamplingParams = PARAMS) -> list[list[int]]:
    completions = llm.generate([prompt for prompt, _ in jobs], params, adapter=[name for _, name in jobs])
    assert [completion.finish_reason for completion in completions] == ["length"] * len(jobs)
    return [completion.token_ids for completion in completions]


def open_llm(family: str, backend: str, **options: Any) -> LLM:
    """In float32; native in bfloat16, whose logits must not move by a bit either."""
    dtype = "bfloat16" if backend == "native" else "float32"
    members = of_family(family)
    return LLM(members[0].base, adapters={golden.name: golden.source for golden in members}, **computing(backend), dtype=dtype, **options)


backends = pytest.mark.parametrize("backend", BACKENDS)


@backends
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("mix", ["identical", "distinct", "uniform", "zipf", "skewed"])
def test_batch_equals_single(family: str, mix: str, backend: str) -> None:
    """Rooms for two adapters of many and pages for a third of the rows: every job waits, swaps or starts over at some time."""
    names = [golden.name for golden in of_family(family)]
    jobs = jobs_of(mix, names)
    with open_llm(family, backend, kv_cache_bytes=2**22) as roomy:
        alone = [run(roomy, [job])[0] for job in jobs]
        page = roomy._engine.model.bytes_per_block(16)
    with open_llm(
        family, backend, kv_cache_bytes=9 * page, num_slots=2, max_num_seqs=6, max_batch_tokens=12, max_mixed_prefill_tokens=5
    ) as tight:
        preempted, uploads = 0, 0
        schedule = tight._engine.scheduler.schedule
        standing = set(tight._engine.slot_table._by_revision)  # since their self-tests

        def counting() -> SchedulerOutput:
            nonlocal preempted, uploads
            output = schedule()
            preempted += len(output.preempted)
            uploads += len(output.uploads)
            return output

        tight._engine.scheduler.schedule = counting  # type: ignore[method-assign]
        assert run(tight, jobs) == alone
        assert preempted > 0
        assert uploads >= len({tight._resolve(name)[0] for _, name in jobs if name} - standing)
        assert tight._engine.block_pool.num_held == 0
        assert tight._engine.slot_table.num_busy == 0


@backends
def test_sampled_tokens_do_not_depend_on_neighbours_either(backend: str) -> None:
    """Seeds count for a request and its position, not for what else is in the batch."""
    names = [golden.name for golden in of_family("llama")]
    jobs = jobs_of("uniform", names)
    settings = [
        SamplingParams(temperature=0.9, seed=index, max_tokens=12, top_p=0.9 if index % 2 else 1.0, top_k=20 if index % 3 else 0)
        for index in range(len(jobs))
    ]
    with open_llm("llama", backend, kv_cache_bytes=2**22) as llm:
        together = llm.generate([prompt for prompt, _ in jobs], settings, adapter=[name for _, name in jobs])
        alone = [llm.generate([prompt], one, adapter=name)[0] for (prompt, name), one in zip(jobs, settings, strict=True)]
    assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone]
