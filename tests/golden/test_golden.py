"""Every golden folder against the numbers of the authors' own code, in float32, through the same engine that serves, on every backend."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from backends import BACKENDS, computing
from goldens import NAMES, Golden, goldens
from torch import Tensor

from moa_serve import LLM, SamplingParams
from moa_serve.engine.request import Request, Sequence
from moa_serve.model.attention import CausalAttention
from moa_serve.model.batch import ForwardBatch, PooledRows, Segment
from moa_serve.model.moa import MoaWeights
from moa_serve.model.transformer import Transformer

ALL = goldens()
ROUTER_ATOL = 2e-5


@pytest.fixture(scope="module", params=ALL, ids=lambda golden: golden.name)
def golden(request: pytest.FixtureRequest) -> Golden:
    found: Golden = request.param
    return found


@pytest.fixture(scope="module", params=BACKENDS)
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {**computing(request.param), "dtype": "float32"}


@pytest.fixture(scope="module")
def llm(golden: Golden, where: dict[str, Any]) -> Iterator[LLM]:
    with LLM(golden.base, adapters={"a": golden.source}, **where, kv_cache_bytes=2**22) as made:
        yield made


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.cpu(), expected, atol=2e-4, rtol=1e-4)


def test_prefill_logits(golden: Golden, llm: LLM) -> None:
    for row, prompt in enumerate(golden.prompts):
        close(llm.logits(prompt, adapter="a"), golden.expected["logits"][row])
        close(llm.logits(prompt), golden.expected["base.logits"][row])


def test_chunked_prefill_logits(golden: Golden, where: dict[str, Any]) -> None:
    """The router sees each token once, whatever chunk it comes in; a mean over the prompt needs it whole."""
    sizes = (3, 7)
    for size in sizes:
        options: dict[str, Any] = {"max_batch_tokens": size, "max_num_seqs": 2, "kv_cache_bytes": 2**22}
        with LLM(golden.base, adapters={"a": golden.source}, **where, **options) as llm:
            if golden.is_pooled:
                close(llm.logits(golden.prompts[0], adapter="a"), golden.expected["logits"][0])  # whole, though over the budget
            else:
                for row, prompt in enumerate(golden.prompts):
                    close(llm.logits(prompt, adapter="a"), golden.expected["logits"][row])


def test_decode_through_the_cache(golden: Golden, llm: LLM) -> None:
    """The last four tokens of all rows at once, one step each, over pages that the prefill filled."""
    engine, steps = llm._engine, 4
    revision, manifest = llm._resolve("a")
    assert manifest is not None
    slot = engine.slot_table.assign(str(revision))
    assert slot is not None
    with llm._lease(str(revision)) as adapter:
        engine._bank.upload(slot, adapter)
    rows = []
    for prompt in golden.prompts:
        blocks = engine.block_pool.allocate(2)
        assert blocks is not None
        engine._cache.zero(blocks)
        request = Request(tuple(prompt[:-steps]), SamplingParams(max_tokens=9), revision, manifest.is_pooled, collect_logits=True)
        rows.append(Sequence(request, list(request.prompt_ids), b"", block_table=blocks, slot=slot))
    output = engine._runner.run([(row, row.num_pending) for row in rows])
    prefill = torch.stack([logits for _, logits in output.collected_logits])
    close(prefill, golden.expected["decode.prefill_logits"])
    for step in range(steps):
        for row, prompt in zip(rows, golden.prompts, strict=True):
            row.num_computed = len(row.token_ids)
            row.append(prompt[len(row.token_ids)])
        close(engine._runner.run([(row, 1) for row in rows]).logits, golden.expected["decode.step_logits"][:, step])
    for row in rows:
        engine.block_pool.free(row.block_table)


def test_greedy_tokens_are_exact(golden: Golden, llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=golden.expected["greedy.ids"].shape[1], ignore_eos=True)
    found = [completion.token_ids for completion in llm.generate(golden.prompts, params, adapter="a")]
    assert found == golden.expected["greedy.ids"].tolist()


def test_hidden_states(golden: Golden, llm: LLM) -> None:
    """Layer by layer, so that a wrong layer is named."""

    class Recording(Transformer):
        def block(self, *args: Any) -> Tensor:
            out = super().block(*args)
            hidden.append(out)
            return out

    hidden: list[Tensor] = []
    base = llm._engine.model
    if not isinstance(base, Transformer):
        pytest.skip("the native step has no layers to look into")
    revision, manifest = llm._resolve("a")
    assert manifest is not None
    with llm._lease(str(revision)) as adapter:
        llm._engine._bank.upload(0, adapter)
    weights = llm._engine._bank[0]
    assert isinstance(weights, MoaWeights)
    ids = golden.expected["input_ids"].to(base.device)
    count, length = ids.shape
    spans = [(row * length, row * length + length) for row in range(count)]
    pooled = None
    if manifest.is_pooled:
        pooled = PooledRows.of_whole([length] * count, [length] * count, weights, base.device)
    positions = torch.arange(length, device=base.device).repeat(count)
    batch = ForwardBatch(ids.flatten(), positions, (Segment(0, count * length, weights, pooled),))
    Recording(base.config, base.weights).hidden(batch, CausalAttention(spans))
    for layer, out in enumerate(hidden):
        close(out.view(count, length, -1), golden.expected[f"layers.{layer}.hidden"])


def test_router_weights_and_selected_experts(golden: Golden, llm: LLM) -> None:
    """Selection is compared exactly: two folders hold exact ties that tell >= from >."""
    _, manifest = llm._resolve("a")
    assert manifest is not None
    if manifest.router.site == "none":
        pytest.skip("plain experts, no router")
    for row, prompt in enumerate(golden.prompts):
        routing = llm.route(prompt, adapter="a")
        for layer, names in enumerate(routing.experts):
            if manifest.router.site == "linear":
                check_linear_routers(golden, row, layer, names, routing.gates[layer], routing.selected[layer])
            elif manifest.variant == "unipeft":
                gates = golden.expected[f"layers.{layer}.gates"][row]
                theirs = [gates[:, {"PROMPT": 1, "P_ADAPTER": 2}.get(name, 0)].expand(len(prompt)) for name in names]
                torch.testing.assert_close(routing.weights[layer, :, : len(names)], torch.stack(theirs, 1), atol=ROUTER_ATOL, rtol=0)
            else:
                check_layer_router(golden, row, layer, names, routing.weights[layer], routing.selected[layer])
                if (threshold := golden.expected.get(f"layers.{layer}.router.threshold")) is not None and names:
                    assert routing.threshold is not None
                    torch.testing.assert_close(routing.threshold[layer], threshold[row, :, 0], atol=ROUTER_ATOL, rtol=0)


def test_the_first_tokens_routing_is_that_of_the_prompts_last(golden: Golden, llm: LLM) -> None:
    """As it goes with the tokens of an answer, against the authors' numbers."""
    revision, manifest = llm._resolve("a")
    assert manifest is not None
    if manifest.router.site == "none":
        pytest.skip("plain experts, no router")
    for row, prompt in enumerate(golden.prompts):
        request = Request(tuple(prompt), SamplingParams(temperature=0, max_tokens=1), revision, manifest.is_pooled, return_routing=True)
        with llm._exclusive():
            llm._engine.add(request)
            (event,) = llm._engine.step()
        assert event.routing is not None
        assert event.routing.words is not None
        words = torch.from_numpy(event.routing.words)
        routing = llm.route(prompt, adapter="a")
        sizes = [len(names) for names in routing.experts]
        weights, selected = words[: sum(sizes)], words[sum(sizes) : 2 * sum(sizes)]
        for layer, (own, kept) in enumerate(zip(torch.split(weights, sizes), torch.split(selected, sizes), strict=True)):
            names = routing.experts[layer]
            torch.testing.assert_close(own, routing.weights[layer, -1, : len(names)], atol=ROUTER_ATOL, rtol=0)
            assert torch.equal(kept != 0, routing.selected[layer, -1, : len(names)])
            if manifest.router.site == "layer" and manifest.variant != "unipeft":
                theirs = golden.expected[f"layers.{layer}.router.weights"][row]
                torch.testing.assert_close(own, theirs.expand(len(prompt), -1)[-1], atol=ROUTER_ATOL, rtol=0)


def check_layer_router(golden: Golden, row: int, layer: int, names: list[str], weights: Tensor, selected: Tensor) -> None:
    theirs = golden.expected[f"layers.{layer}.router.weights"][row]
    order = golden.meta["expert_order_per_layer"]
    if order:
        assert names == [NAMES.get(name, name) for name in order[layer]]
    torch.testing.assert_close(weights[:, : len(names)], theirs.expand(len(weights), -1), atol=ROUTER_ATOL, rtol=0)
    kept = golden.expected.get(f"layers.{layer}.router.selected")
    expected = torch.ones(len(weights), len(names), dtype=torch.bool) if kept is None else kept[row].bool()
    assert torch.equal(selected[:, : len(names)], expected)
    assert not selected[:, len(names) :].any()


def check_linear_routers(golden: Golden, row: int, layer: int, names: list[str], gates: Tensor, selected: Tensor) -> None:
    offset = 0
    for theirs, ours in (("Q", "Q"), ("K", "K"), ("V", "V"), ("O", "O"), ("FFN_DOWN", "DOWN")):
        expected = golden.expected[f"layers.{layer}.{theirs}.route_weight"][row]
        count = expected.shape[-1]
        assert names[offset : offset + count] == [f"{ours}/{index}" for index in range(count)]
        torch.testing.assert_close(gates[:, offset : offset + count], expected, atol=ROUTER_ATOL, rtol=0)
        kept = golden.expected.get(f"layers.{layer}.{theirs}.selected")
        if kept is not None:
            assert torch.equal(selected[:, offset : offset + count], kept[row].bool())
        offset += count
