"""The Python surface on a tiny base: what it promises, and what it says to mistakes."""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backends import BACKENDS, computing, exact
from families import FAMILIES, TINY, random_adapter, write_base, write_family, write_tokenizer
from native_tools import SETS, a_tensor, overflow

from moa_serve import LLM, AdapterSource, SamplingParams
from moa_serve.adapter.adapter import Adapter
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.engine.pools import SLOT_BYTES
from moa_serve.errors import (
    AdapterError,
    AdapterExists,
    AdapterIneffective,
    AdapterNonfiniteOutput,
    AdapterNotFinite,
    AdapterNotFound,
    AdapterQuarantined,
    ContextLengthExceeded,
    InvalidRequest,
    MoaError,
    ModelUnsupported,
    sized,
)
from moa_serve.model.backend import PreparedAdapter
from moa_serve.model.bank import bytes_per_slot
from moa_serve.model.transformer import Transformer

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPTS = [[5, 17, 80], [3], [44, 44, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23]]
WITH_TEXT: dict[str, Any] = TINY | {"vocab_size": 259, "eos_token_id": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=BACKENDS)
def llm(request: pytest.FixtureRequest, base: Path) -> Iterator[LLM]:
    with LLM(base, **computing(request.param), dtype="float32", kv_cache_bytes=2**21) as made:
        yield made


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    """A base that has a tokenizer."""
    folder = write_base(tmp_path_factory.mktemp("talker"), WITH_TEXT)
    write_tokenizer(folder)
    with LLM(folder, device="cpu", kv_cache_bytes=2**21) as made:
        yield made


def tokens(llm: LLM, adapter: str | None, prompts: list[list[int]] = PROMPTS) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate(prompts, GREEDY, adapter=adapter)]


# -- loading and the self-test


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_generates_and_changes_the_base(llm: LLM, family: str, tmp_path: Path) -> None:
    loaded = llm.load_adapter("a", write_family(tmp_path / "a", family))
    assert loaded.warnings == () or family == "instance"
    assert len(loaded.revision) == 64
    assert not torch.equal(llm.logits(PROMPTS[0], adapter="a"), llm.logits(PROMPTS[0]))
    assert tokens(llm, "a") == [tokens(llm, "a", [prompt])[0] for prompt in PROMPTS]


def test_a_fresh_adapter_is_served_with_a_warning(llm: LLM, tmp_path: Path) -> None:
    manifest, tensors = random_adapter("soft")
    for name in tensors:
        if name.endswith(("lora_B", "up.weight", "up.bias", "PROMPT.gate")):
            tensors[name].zero_()
    write_adapter(tmp_path / "a", manifest, tensors)
    loaded = llm.load_adapter("a", tmp_path / "a")
    assert any("every output factor is zero" in warning for warning in loaded.warnings)
    assert tokens(llm, "a") == tokens(llm, None)


def test_an_adapter_that_selects_nothing_is_served_with_a_warning(llm: LLM, tmp_path: Path) -> None:
    manifest, tensors = random_adapter("partial")
    for name in tensors:
        if name.endswith("router.bias"):
            tensors[name].fill_(-50)
    write_adapter(tmp_path / "a", manifest, tensors)
    assert any("selected no expert" in warning for warning in llm.load_adapter("a", tmp_path / "a").warnings)


def test_an_adapter_without_effect_is_refused(llm: LLM, tmp_path: Path) -> None:
    """It would be served as if it worked: the commonest complaint about adapter servers."""
    manifest, tensors = random_adapter("lora")
    for name in tensors:
        if name.endswith("lora_A"):
            tensors[name].zero_()
    write_adapter(tmp_path / "a", manifest, tensors)
    with pytest.raises(AdapterIneffective, match="'a'"):
        llm.load_adapter("a", tmp_path / "a")
    assert llm.adapters == []


def test_an_adapter_that_always_overflows_is_refused(llm: LLM, tmp_path: Path) -> None:
    manifest, tensors = random_adapter("lora")
    for name in tensors:
        tensors[name].mul_(1e25)
    write_adapter(tmp_path / "a", manifest, tensors)
    with pytest.raises(AdapterNotFinite):
        llm.load_adapter("a", tmp_path / "a")
    assert llm.adapters == []
    assert tokens(llm, None)


def test_a_broken_adapter_changes_nothing(llm: LLM, tmp_path: Path) -> None:
    llm.load_adapter("good", write_family(tmp_path / "good", "soft"))
    before = tokens(llm, "good")
    bad = write_family(tmp_path / "bad", "soft", seed=2)
    data = (bad / "adapter.safetensors").read_bytes()
    (bad / "adapter.safetensors").write_bytes(data[:-1])
    for _ in range(3):
        with pytest.raises(AdapterError):
            llm.load_adapter("bad", bad)
    assert llm.adapters == ["good"]
    assert tokens(llm, "good") == before


def test_a_name_is_taken_until_it_is_unloaded_and_then_never_stale(llm: LLM, tmp_path: Path) -> None:
    first, second = write_family(tmp_path / "1", "soft", seed=1), write_family(tmp_path / "2", "sparse_fn", seed=2)
    llm.load_adapter("a", first)
    with pytest.raises(AdapterExists):
        llm.load_adapter("a", second)
    old = tokens(llm, "a")
    llm.unload_adapter("a")
    with pytest.raises(AdapterNotFound):
        llm.generate(PROMPTS, GREEDY, adapter="a")
    llm.load_adapter("a", second)
    new = tokens(llm, "a")
    assert new != old
    llm.load_adapter("b", second)
    assert tokens(llm, "b") == new


def test_two_names_may_have_one_revision(llm: LLM, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "a", "soft")
    assert llm.load_adapter("a", folder).revision == llm.load_adapter("b", folder).revision
    expected = tokens(llm, "a")
    llm.unload_adapter("a")
    assert tokens(llm, "b") == expected


def test_unloading_frees_the_tensors(llm: LLM, tmp_path: Path) -> None:
    """A name that is forgotten while its memory stays is the peers' commonest leak."""
    loaded = llm.load_adapter("a", write_family(tmp_path / "a", "molora"))
    tokens(llm, "a")
    alive = [weakref.ref(tensor) for tensor in loaded.tensors.values()]
    slot = llm._engine.slot_table.find(loaded.revision)
    assert slot is not None
    alive.append(weakref.ref(a_tensor(llm._engine._bank[slot])))
    del loaded
    llm.unload_adapter("a")
    gc.collect()
    assert [reference() for reference in alive] == [None] * len(alive)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_adapter_is_laid_out_once(base: Path, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its self-test has put it into a slot already."""
    prepared = []
    with LLM(base, **computing(backend), kv_cache_bytes=2**21) as llm:
        prepare = llm._engine.model.prepare

        def counted(adapter: Adapter, slot: int | None = None) -> PreparedAdapter:
            prepared.append(adapter.revision)
            return prepare(adapter, slot)

        monkeypatch.setattr(llm._engine.model, "prepare", counted)
        loaded = llm.load_adapter("a", write_family(tmp_path / "a", "soft"))
        tokens(llm, "a")
        assert prepared == [loaded.revision]
        with pytest.raises(AdapterError):
            llm.load_adapter("not a name", write_family(tmp_path / "b", "soft", 2))
        assert set(llm._engine.slot_table.revisions) == {None, loaded.revision}


def test_more_adapters_than_slots_and_than_memory(base: Path, device: str, tmp_path: Path) -> None:
    """They queue for slots, and leave and enter host memory, and nothing of that shows in the tokens."""
    folders = {family: write_family(tmp_path / family, family) for family in FAMILIES}
    options: dict[str, Any] = {**exact(device), "kv_cache_bytes": 2**21}
    with LLM(base, adapters=folders, **options) as roomy:
        expected = {family: tokens(roomy, family) for family in folders}
        largest = max(adapter.num_bytes for adapter in (roomy.load_adapter(f"{f}2", folder) for f, folder in folders.items()))
    with LLM(base, adapters=folders, **options, num_slots=2, adapter_cache_bytes=largest + 1) as tight:
        names = [family for family in folders for _ in PROMPTS]
        completions = tight.generate(PROMPTS * len(folders), GREEDY, adapter=names)
        assert [completion.token_ids for completion in completions] == [ids for family in folders for ids in expected[family]]
        assert tight._store.cache.num_bytes <= largest + 1


def test_the_variant_that_files_cannot_tell(llm: LLM, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "a", "soft")
    with pytest.raises(AdapterError, match="variant"):
        llm.load_adapter("a", AdapterSource(folder, "no_such_variant"))


# -- rows that overflow


def test_a_row_of_nan_ends_alone_and_leaves_nothing_behind(base: Path, device: str, tmp_path: Path) -> None:
    """Its pages are used again by others, and a masked NaN would still be one."""
    folder = write_family(tmp_path / "a", "soft")
    options: dict[str, Any] = {**exact(device), "kv_cache_bytes": 2**17, "max_num_seqs": 4}
    with LLM(base, adapters={"good": folder}, **options) as clean:
        expected = {name: tokens(clean, name) for name in ("good", None)}
    with LLM(base, adapters={"good": folder, "bad": write_family(tmp_path / "b", "lora", seed=5)}, **options) as llm:
        revision = llm._store.get("bad").revision
        llm.generate([[1]], GREEDY, adapter="bad")  # its slot is filled now
        slot = llm._engine.slot_table.find(revision)
        assert slot is not None
        overflow(llm._engine._bank[slot])
        for attempt in range(3):
            mixed = llm.generate(PROMPTS * 3, GREEDY, adapter=["bad"] * 1 + ["good"] * 2 + [None] * 3 + ["good"] * 3)
            assert mixed[0].finish_reason == "error"
            assert isinstance(mixed[0].error, AdapterNonfiniteOutput), attempt
            assert [c.token_ids for c in mixed[1:3]] == expected["good"][1:]
            assert [c.token_ids for c in mixed[3:6]] == expected[None]
            assert [c.token_ids for c in mixed[6:]] == expected["good"]
        with pytest.raises(AdapterQuarantined, match=revision[:12]):
            llm.generate([[1]], GREEDY, adapter="bad")
        assert tokens(llm, "good") == expected["good"]
        assert llm._engine.block_pool.num_held == 0


def test_an_adapter_that_cannot_be_read_again_fails_alone(base: Path, tmp_path: Path) -> None:
    folders = {family: write_family(tmp_path / family, family) for family in ("soft", "lora")}
    with LLM(base, adapters=folders, device="cpu", kv_cache_bytes=2**21) as roomy:
        expected = {name: tokens(roomy, name) for name in (*folders, None)}
        size = max(roomy._store.cache.num_bytes, 1)
    with LLM(base, adapters=folders, device="cpu", kv_cache_bytes=2**21, num_slots=1, adapter_cache_bytes=size - 1) as llm:
        gone = next(name for name in folders if llm._store.get(name).revision not in llm._store.cache)
        (folders[gone] / "adapter.json").unlink()
        kept = next(name for name in folders if name != gone)
        completions = llm.generate(PROMPTS * 3, GREEDY, adapter=[gone] * 3 + [kept] * 3 + [None] * 3)
        assert [completion.finish_reason for completion in completions[:3]] == ["error"] * 3
        assert all(isinstance(completion.error, AdapterError) for completion in completions[:3])
        assert [completion.token_ids for completion in completions[3:]] == expected[kept] + expected[None]
        assert llm._engine.block_pool.num_held == 0


def test_an_end_of_text_beyond_the_vocabulary_touches_no_neighbour(tmp_path: Path) -> None:
    """An index past a row's end is the next row's logit."""
    with LLM(write_base(tmp_path, TINY | {"eos_token_id": [101]}), device="cpu", kv_cache_bytes=2**20) as llm:
        waiting = SamplingParams(temperature=0, max_tokens=6, min_tokens=6)
        biased = SamplingParams(temperature=0, max_tokens=6, logit_bias={5: 100.0})
        assert llm.generate([[1], [1]], [waiting, biased])[1].token_ids == [5] * 6
        assert llm.generate([[1], [1]], [biased, waiting])[0].token_ids == [5] * 6


def test_a_row_with_nothing_to_choose_is_its_own_mistake(llm: LLM, tmp_path: Path) -> None:
    """It must not take its adapter out of service."""
    llm.load_adapter("a", write_family(tmp_path / "a", "soft"))
    nothing = SamplingParams(max_tokens=2, min_tokens=2, stop_token_ids=tuple(range(96)))
    for _ in range(4):
        (completion,) = llm.generate([[1]], nothing, adapter="a")
        assert isinstance(completion.error, InvalidRequest)
    assert tokens(llm, "a")


def test_rows_of_very_different_lengths_do_not_change_each_other(llm: LLM) -> None:
    prompts = [[7] * length for length in (1, 15, 16, 17, 31, 33, 120, 500)]
    params = SamplingParams(temperature=0, max_tokens=6)
    together = llm.generate(prompts, params)
    assert together == [llm.generate([prompt], params)[0] for prompt in prompts]


def test_a_batch_of_the_base_alone_runs_no_adapter_code(llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that are loaded and idle must cost nothing."""
    llm.load_adapter("a", write_family(tmp_path / "a", "soft"))
    expected = tokens(llm, None)

    def never(*_: object) -> None:
        raise AssertionError("an adapter's layer was made for rows without an adapter")

    monkeypatch.setattr("moa_serve.model.transformer.ActiveLayer.__init__", never)
    assert tokens(llm, None) == expected


def test_one_call_at_a_time(llm: LLM) -> None:
    step, met = llm._engine.step, []

    def within() -> Any:
        with pytest.raises(InvalidRequest, match="one call at a time"):
            llm.generate([[1]])
        met.append(1)
        return step()

    llm._engine.step = within  # type: ignore[method-assign]
    assert tokens(llm, None)
    assert met


# -- requests


def test_defaults_are_temperature_one_and_sixteen_tokens(llm: LLM) -> None:
    (completion,) = llm.generate([[5]])
    assert len(completion.token_ids) == 16
    assert completion.finish_reason == "length"
    assert completion.text == ""
    assert completion.logprobs is None


def test_a_list_of_prompts_is_answered_in_order_with_own_parameters(llm: LLM) -> None:
    params = [SamplingParams(temperature=0, max_tokens=count) for count in (1, 5, 3)]
    assert [len(completion.token_ids) for completion in llm.generate(PROMPTS, params)] == [1, 5, 3]
    assert llm.generate([]) == []


def test_logprobs_are_those_of_the_raw_logits(llm: LLM) -> None:
    prompt = PROMPTS[0]
    (completion,) = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=4, logprobs=3, logit_bias={7: 100.0}))
    assert completion.token_ids == [7] * 4
    assert completion.logprobs is not None
    raw = llm.logits(prompt + completion.token_ids).log_softmax(-1)[len(prompt) - 1 : -1]
    for row, found in zip(raw, completion.logprobs, strict=True):
        assert found.logprob == pytest.approx(float(row[7]), abs=1e-4)
        assert [token for token, _ in found.top] == row.topk(3).indices.tolist()


def test_text_stops_before_a_stop_string_and_tokens_end_with_it(talker: LLM) -> None:
    (whole,) = talker.generate(["hello"], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True))
    stop = whole.text[5:8]
    (cut,) = talker.generate(["hello"], SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=stop))
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert len(cut.token_ids) < len(whole.token_ids)


def test_a_string_is_encoded_and_ids_are_taken_as_they_are(talker: LLM) -> None:
    assert talker.tokenizer is not None
    ids = talker.tokenizer.encode("hello", parse_special=True)
    text, taken = talker.generate(["hello", ids], GREEDY)
    assert text == taken
    assert text.prompt_token_ids == tuple(ids)


def test_one_invalid_prompt_stops_all_before_any_runs(llm: LLM) -> None:
    steps = []
    step = llm._engine.step
    llm._engine.step = lambda: steps.append(1) or step()  # type: ignore[method-assign, func-returns-value]
    with pytest.raises(InvalidRequest, match="vocabulary"):
        llm.generate([[1], [96]], GREEDY)
    assert steps == []


def test_the_context_is_a_limit_and_can_be_used_up(base: Path) -> None:
    with LLM(base, device="cpu", max_model_len=40, kv_cache_bytes=2**19) as llm:
        assert llm.max_model_len == 40
        (full,) = llm.generate([[1] * 30], SamplingParams(temperature=0, max_tokens=10))
        assert len(full.token_ids) == 10
        (rest,) = llm.generate([[1] * 30], SamplingParams(temperature=0, max_tokens=None))
        assert rest.token_ids == full.token_ids
        assert llm.logits([1] * 40).shape == (40, 96)
        for prompt, count in ((30, 11), (40, 1), (41, None)):
            with pytest.raises(ContextLengthExceeded, match="40"):
                llm.generate([[1] * prompt], SamplingParams(max_tokens=count))


def test_a_numpy_or_torch_prompt_is_a_prompt(llm: LLM) -> None:
    ids = [5, 17, 80]
    as_list, as_numpy, as_torch = llm.generate([ids, np.array(ids), torch.tensor(ids)], GREEDY)  # type: ignore[list-item]
    assert as_list.token_ids == as_numpy.token_ids == as_torch.token_ids


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "one string": ({"prompts": "hello"}, "prompts"),
    "text without a tokenizer": ({"prompts": ["hello"]}, "prompts"),
    "empty prompt": ({"prompts": [[]]}, "prompt"),
    "negative id": ({"prompts": [[-1]]}, "prompt"),
    "fraction": ({"prompts": [[1.5]]}, "prompt"),
    "bool": ({"prompts": [[True]]}, "prompt"),
    "huge id": ({"prompts": [[2**70]]}, "prompt"),
    "number": ({"prompts": [5]}, "prompts"),
    "none": ({"prompts": None}, "prompts"),
    "nested": ({"prompts": [[[1]]]}, "prompt"),
    "unknown adapter": ({"prompts": [[1]], "adapter": "x"}, "adapter"),
    "adapter of no kind": ({"prompts": [[1]], "adapter": {"x": 1}}, "adapter"),
    "too few adapters": ({"prompts": [[1], [2]], "adapter": [None]}, "adapter"),
    "params of no kind": ({"prompts": [[1]], "params": {"temperature": 0}}, "params"),
    "too many params": ({"prompts": [[1]], "params": [GREEDY, GREEDY]}, "params"),
    "params with a hole": ({"prompts": [[1], [2]], "params": [GREEDY, None]}, "params"),
    "empty params": ({"prompts": [[1], [2]], "params": []}, "params"),
    "list in a list of adapters": ({"prompts": [[1]], "adapter": [["x"]]}, "adapter"),
    "id of 5,000 digits": ({"prompts": [[10**5000]]}, "prompt"),
    "nothing to generate": ({"prompts": [[1]], "params": SamplingParams(max_tokens=0)}, "max_tokens"),
    "stop without text": ({"prompts": [[1]], "params": SamplingParams(stop="x")}, "stop"),
    "bias of no token": ({"prompts": [[1]], "params": SamplingParams(logit_bias={96: 1.0})}, "logit_bias"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_by_field(llm: LLM, case: str) -> None:
    arguments, param = MISTAKES[case]
    with pytest.raises(MoaError) as caught:
        llm.generate(**arguments)
    assert caught.value.param == param
    assert tokens(llm, None)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"backend": "native", "block_size": 32}, "16 tokens") if SETS else ({"backend": "native"}, "not built"),
        ({"backend": "jax"}, "jax"),
        ({"device": "tpu"}, "tpu"),
        ({"dtype": "int4"}, "int4"),
        ({"max_rows": 3}, "max_rows"),
        ({"num_slots": 0}, "num_slots"),
        ({"num_slots": True}, "num_slots"),
        ({"kv_cache_bytes": 2**60}, "lower kv_cache_bytes"),
        ({"num_slots": 10**12}, "lower num_slots"),
        ({"max_batch_tokens": 10**12}, "lower max_batch_tokens"),
        ({"kv_cache_bytes": 10}, "KV cache"),
        ({"gpu_memory_utilization": 0.9}, "gpu_memory_utilization is a share of a GPU's memory, but this engine computes on cpu"),
        ({"gpu_memory_utilization": 1.01}, "gpu_memory_utilization is 1.01"),
        ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0"),
        ({"gpu_memory_utilization": True}, "gpu_memory_utilization is True"),
        ({"gpu_memory_utilization": float("nan")}, "gpu_memory_utilization is nan"),
        ({"kv_cache_bytes": 2**16, "max_model_len": 512}, "max_model_len"),
        ({"max_model_len": 100_000}, "max_model_len"),
        ({"adapters": ["a"]}, "adapters"),
        ({"adapters": {"a": 5}}, "adapter 'a'"),
        ({"dtype": [1]}, "dtype"),
        ({"max_num_seqs": 32, "max_batch_tokens": 8}, "max_batch_tokens"),
    ],
)
def test_options_are_checked_when_the_engine_is_made(base: Path, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(MoaError, match=match):
        LLM(base, **{"device": "cpu"} | arguments)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=pytest.mark.skipif(not SETS, reason="it is not built"))])
def test_what_does_not_fit_together_is_refused_with_the_bytes_of_each_part(
    base: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(base, backend=backend, device="cpu", kv_cache_bytes=2**20) as llm:
        model, options = llm._engine.model, llm._engine.options
        step, weights = model.step_bytes(options.max_batch_tokens, model.config.max_position), model.weight_bytes
    slots = options.num_slots * (bytes_per_slot(model.config, model.adapter_dtype) + SLOT_BYTES)
    room = step + slots + 2**20
    monkeypatch.setattr("moa_serve.engine.engine.available_bytes", lambda _: room)
    with LLM(base, backend=backend, device="cpu", kv_cache_bytes=2**20):
        pass
    monkeypatch.setattr("moa_serve.engine.engine.available_bytes", lambda _: room - 1)
    with pytest.raises(InvalidRequest) as caught:
        LLM(base, backend=backend, device="cpu", kv_cache_bytes=2**20)
    largest = max([(step, "max_batch_tokens"), (slots, "num_slots"), (2**20, "kv_cache_bytes")])[1]
    assert str(caught.value) == (
        f"memory is short on cpu: beside the base's {sized(weights)} of weights {sized(room - 1)} are free, but buffers for "
        f"max_batch_tokens 256 take {sized(step)}, num_slots 8 takes {sized(slots)}, and the KV cache 1.00 MiB; lower {largest}"
    )
    assert caught.value.param == largest
    with LLM(base, backend=backend, device="cpu") as llm:  # the KV cache takes what is left
        assert llm._engine.block_pool.max_tokens * model.bytes_per_block(16) // 16 <= 2**20 * 3 // 4


def test_a_base_that_does_not_fit_is_not_begun(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_serve.model.weights.available_bytes", lambda _: 1000)
    with pytest.raises(ModelUnsupported, match=r"its weights take [\d.]+ KiB in float32, but 1000 bytes are free on cpu; .*bfloat16"):
        LLM(base, device="cpu", backend="torch")


@pytest.mark.skipif(not SETS, reason="the native library is not built")
def test_a_base_that_cannot_be_packed_is_refused(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moa_serve.native.model.available_bytes", lambda _: 1000)
    with pytest.raises(ModelUnsupported, match=r"packing the base takes \d+ bytes .* its \d+ bytes of weights, but 1000 are free"):
        LLM(base, device="cpu", backend="native")


def test_a_closed_llm_says_so(base: Path) -> None:
    llm = LLM(base, device="cpu", kv_cache_bytes=2**20)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate([[1]]), lambda: llm.logits([1]), lambda: llm.adapters, lambda: llm.load_adapter("a", "b")):
        with pytest.raises(MoaError, match="closed"):
            call()


def test_closing_frees_weights_and_cache(base: Path) -> None:
    llm = LLM(base, backend="torch", device="cpu", kv_cache_bytes=2**20)
    llm.generate([[1]])
    assert isinstance(llm._engine.model, Transformer)
    alive: list[weakref.ref[Any]] = [weakref.ref(llm._engine.model.weights.embed), weakref.ref(llm._engine._cache)]
    llm.close()
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


# -- routing


@pytest.mark.parametrize("family", FAMILIES)
def test_routing_has_a_layers_own_experts_left_aligned(llm: LLM, family: str, tmp_path: Path) -> None:
    loaded = llm.load_adapter("a", write_family(tmp_path / "a", family))
    manifest, prompt = loaded.manifest, PROMPTS[2]
    if manifest.router.site == "none":
        with pytest.raises(InvalidRequest, match="no router"):
            llm.route(prompt, adapter="a")
        return
    routing = llm.route(prompt, adapter="a")
    widest = max(len(manifest.layer(layer).experts) for layer in range(3))
    assert routing.weights.shape == routing.selected.shape == routing.gates.shape == (3, len(prompt), widest)
    for layer, names in enumerate(routing.experts):
        assert names == [expert.name for expert in manifest.layer(layer).experts]
        assert not routing.weights[layer, :, len(names) :].any()
        assert not routing.selected[layer, :, len(names) :].any()
        assert (routing.gates[layer] > 0).equal(routing.selected[layer])
    assert (routing.threshold is not None) == (manifest.variant == "sparse_moa")
    if manifest.is_pooled:
        assert torch.equal(routing.weights[:, :1].expand_as(routing.weights), routing.weights)
    assert set(routing.inner) == {expert.name for expert in manifest.experts if expert.inner}
    for shares in routing.inner.values():
        torch.testing.assert_close(shares.sum(-1), torch.ones(3, len(prompt)))


def test_options_of_routing_are_refused_rather_than_ignored(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="threshold"):
        llm.logits([1], moa={"threshold": 0.5})
