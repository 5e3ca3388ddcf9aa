"""The native backend against the torch definition: logits, routing and counters of every family, and the promises about batches."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, TINY, write_base, write_family
from native_tools import SETS
from torch import Tensor

from moa_serve import LLM, SamplingParams
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch
from moa_serve.model.weights import load_base
from moa_serve.native import library as lib
from moa_serve.native import model as native

pytestmark = pytest.mark.skipif(not SETS, reason="the native library is not built")
PROMPT = [(7 * index + 3) % TINY["vocab_size"] for index in range(37)]  # three pages, the last one not full
KV = 2**22


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("native")
    return {"base": write_base(root / "base")} | {family: write_family(root / family, family) for family in FAMILIES}


def made(folders: dict[str, Path], backend: str, dtype: str = "float32", **options: Any) -> LLM:
    adapters = {family: folders[family] for family in FAMILIES}
    return LLM(folders["base"], adapters=adapters, backend=backend, device="cpu", dtype=dtype, **{"kv_cache_bytes": KV} | options)


@pytest.fixture(scope="module")
def torch_llm(folders: dict[str, Path]) -> Iterator[LLM]:
    with made(folders, "torch") as llm:
        yield llm


@pytest.fixture(scope="module", params=["float32", "bfloat16", "int8"])
def llm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Iterator[LLM]:
    dtype, base_dtype = ("bfloat16", "int8") if request.param == "int8" else (request.param, "auto")
    with made(folders, "native", dtype, base_dtype=base_dtype) as found:
        yield found


@pytest.mark.parametrize("family", [None, *FAMILIES])
@pytest.mark.parametrize("isa", SETS)
def test_logits(isa: str, family: str | None, folders: dict[str, Path], torch_llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lib, "instruction_sets", lambda: [isa])
    adapters = {} if family is None else {family: folders[family]}
    with LLM(folders["base"], adapters=adapters, backend="native", device="cpu", dtype="float32", kv_cache_bytes=KV) as llm:
        torch.testing.assert_close(llm.logits(PROMPT, adapter=family), torch_llm.logits(PROMPT, adapter=family), rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family][1]["site"] != "none"])
def test_routing_is_told_alike(family: str, folders: dict[str, Path], torch_llm: LLM) -> None:
    with LLM(
        folders["base"], adapters={family: folders[family]}, backend="native", device="cpu", dtype="float32", kv_cache_bytes=KV
    ) as llm:
        ours, theirs = llm.route(PROMPT, adapter=family), torch_llm.route(PROMPT, adapter=family)
        assert ours.experts == theirs.experts
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours.selected, theirs.selected)
        torch.testing.assert_close(ours.gates, theirs.gates, rtol=1e-4, atol=1e-5)
        assert (ours.threshold is None) == (theirs.threshold is None)
        if ours.threshold is not None and theirs.threshold is not None:
            torch.testing.assert_close(ours.threshold, theirs.threshold, rtol=1e-4, atol=1e-5)
        assert ours.inner.keys() == theirs.inner.keys()
        for name, inner in theirs.inner.items():
            torch.testing.assert_close(ours.inner[name], inner, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_counters_count_alike(family: str, folders: dict[str, Path]) -> None:
    totals = []
    for backend in ("native", "torch"):
        with LLM(
            folders["base"], adapters={family: folders[family]}, backend=backend, device="cpu", dtype="float32", kv_cache_bytes=KV
        ) as llm:
            llm.generate([PROMPT, PROMPT[:5]], SamplingParams(temperature=0, max_tokens=4), adapter=family)
            totals.append(llm.routing_totals(family))
    ours, theirs = totals
    assert ours is not None
    assert theirs is not None
    assert (ours.tokens, ours.experts) == (theirs.tokens, theirs.experts)
    np.testing.assert_array_equal(ours.selected, theirs.selected)
    np.testing.assert_allclose(ours.gate_sum, theirs.gate_sum, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(ours.thresholds, theirs.thresholds, rtol=1e-4, atol=1e-4)
    assert (ours.computed <= theirs.computed).all(), "the torch backend computes all"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", [family for family in FAMILIES if FAMILIES[family][1]["site"] != "none"])
def test_what_is_computed_is_counted(family: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    """An expert is left out for each token that does not keep it; with tiles, for neighbours of which none does."""
    options: dict[str, Any] = {"backend": "native", "device": "cpu", "dtype": str(dtype).removeprefix("torch."), "kv_cache_bytes": KV}
    with LLM(folders["base"], adapters={family: folders[family]}, **options) as llm:
        kept = llm.route(PROMPT, adapter=family).gates != 0
        totals = llm.routing_totals(family)
    assert totals is not None
    if lib.has_tiles(lib.instruction_sets()[0], dtype):
        tiles = [kept[:, first : first + 16] for first in range(0, kept.shape[1], 16)]
        kept = torch.cat([tile.any(1, keepdim=True).expand_as(tile) for tile in tiles], dim=1)
    np.testing.assert_array_equal(totals.computed, kept.sum(1).double().numpy())


def jobs() -> list[tuple[list[int], str | None]]:
    """Every family and the base twice, with prompts of many lengths."""
    names: list[str | None] = [None, *FAMILIES]
    return [([(5 * index + 11 * place) % 96 for index in range(1 + (7 * place) % 40)], name) for place, name in enumerate([*names, *names])]


def generated(llm: LLM, work: list[tuple[list[int], str | None]]) -> list[list[tuple[int, float]]]:
    """Tokens with their log-probabilities, which are equal bit by bit only where the logits are."""
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    found = llm.generate([prompt for prompt, _ in work], params, adapter=[name for _, name in work])
    return [[(one.token_id, one.logprob) for one in completion.logprobs or []] for completion in found]


def test_a_mixed_batch_is_bitwise_each_request_alone(llm: LLM) -> None:
    work = jobs()
    together = generated(llm, work)
    assert [generated(llm, [job])[0] for job in work] == together
    backwards = generated(llm, work[::-1])
    assert backwards[::-1] == together


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunked_is_bitwise_whole_and_decode_is_prefill(dtype: str, folders: dict[str, Path]) -> None:
    """A prompt in chunks of any size, and the tokens that were decoded one by one read again as a prompt: the same logits."""
    work = jobs()
    with (
        made(folders, "native", dtype) as whole,
        made(folders, "native", dtype, max_batch_tokens=7, max_num_seqs=5, num_slots=2) as chunked,
    ):
        expected = generated(whole, work)
        assert generated(chunked, work) == expected
        for prompt, name in work:
            is_pooled = name in ("instance", "unipeft")
            found = whole.generate([prompt], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), adapter=name)[0]
            text = [*prompt, *found.token_ids]
            if not is_pooled:  # a longer prompt has other instance-level weights
                logits = whole.logits(text, adapter=name)[len(prompt) - 1 : -1]
                assert logits.argmax(-1).tolist() == found.token_ids
            assert torch.equal(whole.logits(text, adapter=name), chunked.logits(text, adapter=name))


def test_threads_do_not_change_a_bit(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(native, "num_threads", lambda threads=threads: threads)
        with made(folders, "native", "bfloat16") as llm:
            found.append(generated(llm, jobs()))
    assert found[0] == found[1] == found[2]


def test_choices_score_as_their_own_prompts_do(llm: LLM, torch_llm: LLM) -> None:
    choices = [[5, 6, 7], [8], [9, 10]]
    ours = llm.score_choices([PROMPT], [choices], adapter="sparse_fn")[0]
    theirs = torch_llm.score_choices([PROMPT], [choices], adapter="sparse_fn")[0]
    if llm.dtype == torch.float32:
        assert [one.logprob for one in ours] == pytest.approx([one.logprob for one in theirs], abs=1e-3)
    logprobs = llm.logits([*PROMPT, *choices[0]], adapter="sparse_fn").log_softmax(-1)
    expected = sum(float(logprobs[len(PROMPT) - 1 + place, token]) for place, token in enumerate(choices[0]))
    assert ours[0].logprob == pytest.approx(expected, abs=1e-4 if llm.dtype == torch.float32 else 0.05)


def test_pages_that_a_broken_row_left_do_no_harm(folders: dict[str, Path]) -> None:
    """A hidden place still meets a share of 0, and 0 * NaN is NaN: the first token of a page clears it."""
    base = load_base(folders["base"], dtype=torch.float32)
    model = native.NativeModel(base.config, base.weights)
    cache = model.new_cache(8, 16)
    for buffer in (cache.keys, cache.values):
        buffer.view(torch.float32).fill_(math.nan)  # what a broken row may have left

    def logits(ids: list[int], blocks: list[int]) -> Tensor:
        batch = ForwardBatch(torch.tensor(ids), torch.arange(len(ids)))
        return model.forward(batch, cache.attention([CachedSpan(0, len(ids), 0, blocks)]))

    first = logits(PROMPT, [1, 2, 3])
    assert bool(first.isfinite().all())
    assert torch.equal(first, logits(PROMPT, [5, 4, 6]))
    model.close()
