"""The prefix cache in whole engines: a hit is a miss that took less, and nobody meets what is not his."""

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from backends import computing
from families import FAMILIES, TINY, write_base, write_family, write_overflowing
from torch import Tensor

from moa_serve import LLM, SamplingParams
from moa_serve.engine.request import Request, Sequence
from moa_serve.errors import AdapterNonfiniteOutput

PAGE = 16
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
BACKENDS = [("native", "bfloat16"), ("native", "float32"), ("torch", "float32"), pytest.param("cuda", "float32", marks=pytest.mark.gpu)]
Row = tuple[tuple[int, ...], str | None, int]  # a prompt, its adapter, how many tokens are there


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("prefix")
    return {"base": write_base(root / "base")} | {family: write_family(root / family, family) for family in FAMILIES}


def open_llm(folders: dict[str, Path], backend: str = "torch", dtype: str = "float32", **options: Any) -> LLM:
    names = options.pop("names", list(FAMILIES))
    where = computing(backend)
    return LLM(
        folders["base"], adapters={name: folders[name] for name in names}, **where, dtype=dtype, **({"kv_cache_bytes": 2**22} | options)
    )


def record(llm: LLM) -> dict[Row, Tensor]:
    """The logits of every row that is sampled from now on."""
    seen: dict[Row, Tensor] = {}
    sampler = llm._engine._sampler
    sample = sampler.sample

    def recording(logits: Tensor, sequences: list[Sequence]) -> Any:
        for row, sequence in zip(logits, sequences, strict=True):
            request = sequence.request
            seen[tuple(request.prompt_ids), request.adapter, len(sequence.token_ids)] = row.clone()
        return sample(logits, sequences)

    sampler.sample = recording  # type: ignore[method-assign,assignment]
    return seen


def draw(length: int, seed: int) -> list[int]:
    drawn = random.Random(seed)
    return [drawn.randrange(TINY["vocab_size"]) for _ in range(length)]


def run_waves(llm: LLM, names: list[str]) -> list[list[int]]:
    """A prompt that ends with a page for every name and the base, then what begins as it does, cut within and between pages."""
    first, every = draw(4 * PAGE, seed=0), [*names, None]
    again = [first, [*first, 5], first[: 2 * PAGE] + draw(9, seed=1)]
    tokens = []
    for jobs in ([(first, name) for name in every], [(prompt, name) for name in every for prompt in again]):
        tokens += [done.token_ids for done in llm.generate([prompt for prompt, _ in jobs], GREEDY, adapter=[name for _, name in jobs])]
    assert llm._engine.block_pool.num_held == 0
    return tokens


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_hit_equals_a_miss(folders: dict[str, Path], backend: str, dtype: str) -> None:
    """Native: bit by bit, for every family, in chunks and in mixed batches. Torch: the same tokens."""
    found: list[list[list[int]]] = []
    logits: list[dict[Row, Tensor]] = []
    names = list(FAMILIES) if backend == "native" else ["soft", "sparse_const", "instance", "molora", "nested_hydra"]
    chunked = {"max_num_seqs": 6, "max_batch_tokens": 24, "max_mixed_prefill_tokens": 7, "num_slots": 2}
    for options in ({"prefix_cache": False}, {}, chunked):
        with open_llm(folders, backend, dtype, names=names, **options) as llm:
            logits.append(record(llm))
            found.append(run_waves(llm, names))
            assert (llm._engine.scheduler.num_hit_tokens > 0) == ("prefix_cache" not in options)
    check_equal(backend, found, logits)


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS)
def test_a_row_that_was_preempted_goes_on_from_its_own_pages(folders: dict[str, Path], backend: str, dtype: str) -> None:
    """With a cache it computes less than anew, and comes to the same bits."""
    names: list[str | None] = ["soft", "nested_hydra", "mola_layerwise", None]
    prompts = [draw(40, seed) for seed in range(8)]
    params = [dataclasses.replace(GREEDY, max_tokens=8 + 24 * (index % 3)) for index in range(8)]
    found, num_computed = [], []
    logits: list[dict[Row, Tensor]] = []
    for is_tight, prefix_cache in ((False, False), (True, False), (True, True)):
        options = {"kv_cache_bytes": 13 * page_bytes(folders, backend, dtype)} if is_tight else {}
        with open_llm(folders, backend, dtype, names=names[:3], prefix_cache=prefix_cache, max_num_seqs=4, **options) as llm:
            logits.append(record(llm))
            num_computed.append(count_computed(llm))
            found.append([done.token_ids for done in llm.generate(prompts, params, adapter=names * 2)])
            assert (llm._engine.num_preemptions > 0) == is_tight
    check_equal(backend, found, logits)
    [roomy], [anew], [known] = num_computed
    assert roomy <= known < anew


def count_computed(llm: LLM) -> list[int]:
    """Tokens that are computed from now on: its one number grows."""
    total, run = [0], llm._engine._runner.run

    def counting(work: Any) -> Any:
        total[0] += sum(count for _, count in work)
        return run(work)

    llm._engine._runner.run = counting  # type: ignore[method-assign]
    return total


def check_equal(backend: str, found: list[list[list[int]]], logits: list[dict[Row, Tensor]]) -> None:
    assert all(tokens == found[0] for tokens in found)
    if backend == "native":
        assert all(seen.keys() == logits[0].keys() for seen in logits)
        assert all(torch.equal(seen[row], logits[0][row]) for seen in logits for row in seen)


def page_bytes(folders: dict[str, Path], backend: str, dtype: str) -> int:
    with open_llm(folders, backend, dtype, names=[]) as llm:
        return llm._engine.model.bytes_per_block(PAGE)


@pytest.fixture
def llm(folders: dict[str, Path]) -> Iterator[LLM]:
    with open_llm(folders, names=["soft", "lora", "instance"]) as opened:
        yield opened


def cached(llm: LLM, prompt: list[int], adapter: str | None = None, **more: Any) -> int:
    """Prompt tokens that a request did not have to compute."""
    revision, manifest = llm._resolve(adapter)
    request = Request(prompt, more.pop("params", GREEDY), revision, is_pooled=manifest is not None and manifest.is_pooled, **more)
    sequence = llm._engine.add(request)
    while llm._engine.has_work:
        llm._engine.step()
    llm._engine.collected.pop(request.request_id, None)
    return sequence.num_cached


def test_full_pages_are_found_and_the_last_token_is_always_computed(llm: LLM) -> None:
    """Without a computed token there are no logits to answer with."""
    prompt = draw(3 * PAGE, seed=2)
    assert [cached(llm, prompt) for _ in range(2)] == [0, 2 * PAGE]
    assert cached(llm, [*prompt, 1]) == 3 * PAGE
    assert cached(llm, prompt[: PAGE + 1]) == PAGE
    assert cached(llm, prompt[:PAGE]) == 0
    assert cached(llm, [*prompt[:PAGE], 1 - min(prompt[PAGE], 1), *prompt[PAGE + 1 :]]) == PAGE
    scheduler = llm._engine.scheduler
    assert scheduler.num_queried_tokens == 3 * PAGE * 2 + 3 * PAGE + 1 + PAGE + 1 + PAGE + 3 * PAGE
    assert scheduler.num_hit_tokens == 2 * PAGE + 3 * PAGE + PAGE + PAGE


def test_what_was_generated_is_found_by_the_next_turn(llm: LLM) -> None:
    """A chat sends its history back: it is known up to the last full page."""
    params = dataclasses.replace(GREEDY, max_tokens=2 * PAGE + 1)
    prompt = draw(PAGE, seed=3)
    [answer] = llm.generate([prompt], params)
    assert cached(llm, [*prompt, *answer.token_ids, 4]) == 3 * PAGE


def test_nothing_is_shared_across_adapters_or_salts(llm: LLM) -> None:
    """Keys and values of another adapter are wrong, and of another tenant a way to learn what it asks."""
    prompt = draw(2 * PAGE + 1, seed=4)
    kinds: list[dict[str, Any]] = [
        {},
        {"adapter": "soft"},
        {"adapter": "lora"},
        {"salt": "a"},
        {"salt": "b"},
        {"adapter": "soft", "salt": "a"},
    ]
    assert [cached(llm, prompt, **kind) for kind in kinds] == [0] * len(kinds)
    assert [cached(llm, prompt, **kind) for kind in kinds] == [2 * PAGE] * len(kinds)
    assert cached(llm, prompt, tenant="c") == 2 * PAGE, "who asks is no matter without a salt"


@pytest.mark.parametrize(
    "more",
    [
        {"adapter": "instance"},
        {"params": SamplingParams(max_tokens=0), "collect_logits": True},
        {"params": SamplingParams(max_tokens=0), "branches": ((1, 2), (3,))},
        {"prompt_logprobs": 0},
        {"adapter": "soft", "collect_routing": True},
    ],
    ids=lambda more: next(iter(reversed(more))),
)
def test_who_needs_every_position_shares_nothing(llm: LLM, more: dict[str, Any]) -> None:
    """A mean over half of a prompt is another mean; of what is not computed there are no logits, and no routing."""
    prompt = draw(2 * PAGE + 1, seed=5)
    assert [cached(llm, prompt, **more) for _ in range(2)] == [0, 0]
    adapter = {"adapter": more["adapter"]} if more.get("adapter") == "soft" else {}
    cached(llm, prompt, **adapter)
    assert cached(llm, prompt, **more) == 0


def test_an_unloaded_adapter_leaves_no_pages(llm: LLM, folders: dict[str, Path]) -> None:
    """They would take room for nobody; and loaded again, it begins like a new one."""
    prompt = draw(2 * PAGE + 1, seed=6)
    cached(llm, prompt, "lora")
    cached(llm, prompt)
    kept = llm._engine.block_pool.num_kept
    llm.unload_adapter("lora")
    assert llm._engine.block_pool.num_kept == kept - 2
    llm.load_adapter("lora", folders["lora"])
    assert cached(llm, prompt, "lora") == 0
    assert cached(llm, prompt) == 2 * PAGE


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_pages_of_a_row_that_failed_are_not_found_and_hurt_nobody(tmp_path: Path, backend: str) -> None:
    """NaN that outlives its request would end everybody who begins the same, or, with a share of 0, anybody at all."""
    config = TINY | {"vocab_size": 24}  # fewer tokens than dimensions, so that one of them can be told from all others
    token, prompt = 9, [id_ for id_ in draw(400, seed=7) if id_ < 24 and id_ != 9][: 3 * PAGE]
    base = {"base": write_base(tmp_path / "base", config)}
    write_overflowing(tmp_path / "overflowing", config, token=token)
    with open_llm(base, backend, names=[], kv_cache_bytes=2**18) as llm:
        llm.load_adapter("overflowing", tmp_path / "overflowing")
        [before] = llm.generate([prompt], GREEDY, adapter="overflowing")
        pool = llm._engine.block_pool
        kept = pool.num_kept
        assert kept >= 3
        # The first page is shared with the sound request; from the second on there are NaN.
        [failed] = llm.generate([[*prompt[:PAGE], token, *prompt[PAGE:]]], GREEDY, adapter="overflowing")
        assert isinstance(failed.error, AdapterNonfiniteOutput)
        assert pool.num_kept <= kept
        assert cached(llm, prompt, "overflowing") < 3 * PAGE, "what a failed row held is not trusted any more"
        others = [[id_ % 24 for id_ in draw(length, seed=length)] for length in range(1, 40)]
        [*rest, after] = llm.generate([*others, prompt], GREEDY, adapter=[*[None] * len(others), "overflowing"])
        assert all(completion.finish_reason == "length" for completion in rest)
        assert after.token_ids == before.token_ids


def test_rows_that_run_share_the_pages_of_one_another(llm: LLM) -> None:
    """Eight answers to one prompt hold it once."""
    prompt = draw(6 * PAGE + 3, seed=8)
    engine = llm._engine
    first = engine.add(Request(prompt, dataclasses.replace(GREEDY, max_tokens=40)))
    while first.num_generated == 0:
        engine.step()
    rest = [engine.add(Request(prompt, dataclasses.replace(GREEDY, max_tokens=40))) for _ in range(7)]
    engine.step()
    assert [row.num_cached for row in rest] == [6 * PAGE] * 7
    assert engine.block_pool.num_held == 6 + 8
    while engine.has_work:
        engine.step()
    assert len({tuple(row.token_ids) for row in (first, *rest)}) == 1
    assert engine.block_pool.num_held == 0


def test_the_hashes_of_two_engines_differ(folders: dict[str, Path]) -> None:
    """Who can work out under which hash a page is kept, can look for one that collides."""
    keys: set[bytes] = set()
    for _ in range(2):
        with open_llm(folders, names=[]) as llm:
            cached(llm, draw(PAGE, seed=9))
            keys |= llm._engine.block_pool._found.keys()
    assert len(keys) == 2
