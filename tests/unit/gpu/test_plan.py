"""The plan and what is really held: whoever adds a buffer to the fused step without planning it is found here, and not by a full GPU."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import TINY, random_adapter
from torch import Tensor

from moa_serve.bench.shapes import SHAPES
from moa_serve.config import ModelConfig
from moa_serve.engine.engine import EngineOptions, plan_memory
from moa_serve.errors import InvalidRequest
from moa_serve.gpu import plan as planning
from moa_serve.gpu.attention import SplitResults
from moa_serve.gpu.layout import SlotShape
from moa_serve.gpu.model import FusedTransformer
from moa_serve.gpu.plan import FusedSizes, plan
from moa_serve.llm import new_model
from moa_serve.model.weights import Base, allocate

CPU = torch.device("cpu")
GIB = 2**30
CONFIG = ModelConfig.from_hf(TINY | {"vocab_size": 4096})
UNTIED = ModelConfig.from_hf(TINY | {"tie_word_embeddings": False, "max_position_embeddings": 2048})
SHAPES_OF_SLOTS = {
    "none": SlotShape(),
    "usual": SlotShape.usual(),
    **{family: SlotShape.of(random_adapter(family)[0]) for family in ("sparse_fn", "hydralora", "adamole", "nested_hydra", "prompt")},
}


def fused(config: ModelConfig, shape: SlotShape, dtype: torch.dtype, *, num_slots: int = 3, max_tokens: int = 24) -> FusedTransformer:
    weights = allocate(config, CPU, dtype)
    return FusedTransformer(config, weights, num_slots=num_slots, shape=shape, max_tokens=max_tokens)


def planned(config: ModelConfig, shape: SlotShape, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> planning.MemoryPlan:
    sizes: dict[str, Any] = {
        "num_slots": 3, "max_num_seqs": 4, "max_batch_tokens": 24, "block_size": 16, "total_bytes": GIB, "utilization": 0.9,
        "held_bytes": 0,
    }  # fmt: skip
    return plan(config, shape, dtype=dtype, **(sizes | changes))


def held_bytes(found: object) -> int:
    """Of every storage that can be reached from an object, through whatever refers to it."""
    seen: set[int] = set()
    storages: dict[int, int] = {}
    waiting = [found]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or isinstance(item, type | type(gc)) or callable(item):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        waiting += gc.get_referents(item)
    return sum(size for address, size in storages.items() if address)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES_OF_SLOTS)
def test_every_part_is_what_the_model_holds(name: str, dtype: torch.dtype) -> None:
    """A part that is planned too small ends a server at its first long prompt; one that is planned too large is never served."""
    for config in (CONFIG, UNTIED):
        model, found = fused(config, SHAPES_OF_SLOTS[name], dtype), planned(config, SHAPES_OF_SLOTS[name], dtype)
        weights = model.weights
        assert found.embedding == weights.embed.nbytes
        assert found.head == weights.norm.nbytes + (0 if config.tie_word_embeddings else weights.head.nbytes)
        assert found.weights == weights.num_bytes == model.weight_bytes
        own = {"QKV": "qkv", "O": "o", "GATE_UP": "gate_up", "DOWN": "down"}
        rows = sum(
            whole.nbytes - getattr(layer, own[product]).nbytes
            for product, buffers in model._buffers.items()
            for whole, layer in zip(buffers, weights.layers, strict=True)
        )
        assert found.slot_rows == rows
        bank, rules = model.bank, model._rules
        beside = (bank.ints, bank.floats, bank.matrices, bank.prompt, rules.ints, rules.thresholds)
        assert found.slot_bank == sum(part.nbytes for part in beside)
        space = [part for part in vars(model._workspace).values() if isinstance(part, Tensor)]
        assert found.workspace == sum(part.nbytes for part in space) + 2 * model._frequencies.nbytes
        assert model.beside_bytes == found.slot_rows + found.slot_bank + found.workspace
        assert held_bytes(model) == found.weights + model.beside_bytes
        cache = model.new_cache(found.num_pages + 1, 16)  # page 0 is padding
        assert cache.keys.nbytes + cache.values.nbytes == found.kv_cache + model.bytes_per_block(16)


def test_what_is_made_with_the_steps_is_what_was_planned_for_them() -> None:
    heads, size, count = UNTIED.num_heads, UNTIED.head_dim, planning.num_splits(UNTIED)
    assert count > 1
    results = SplitResults.empty(5, heads, size, count, CPU)
    assert planning.split_bytes(UNTIED, 5) == held_bytes(results)
    assert planning.split_bytes(CONFIG, 5) == 0
    row = 2 * 4096 * 4 + -(-CONFIG.max_position // 16) * 4  # logits of both kinds, and a table of pages
    assert planning.recorded_bytes(CONFIG, 5) == (1 + 2 + 4 + 8) * row
    assert planning.recorded_bytes(CONFIG, 999) == sum(planning.ROW_BUCKETS) * row


@pytest.mark.parametrize(("share", "context"), [(0.9, None), (0.5, None), (0.5, 8192), (1.0, 131_072)])
def test_the_engine_plans_the_same_pages(share: float, context: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots and workspace are in memory when the engine plans: counted again, they would take room from sequences."""
    config, shape, total = SHAPES["llama-3.1-8b"], SlotShape.usual(), 48 * GIB
    expected = plan(
        config, shape, num_slots=8, max_num_seqs=32, max_batch_tokens=256, block_size=16, dtype=torch.bfloat16, total_bytes=total,
        utilization=share, held_bytes=GIB, max_model_len=context,
    )  # fmt: skip
    options = EngineOptions(gpu_memory_utilization=share, max_model_len=context)
    sizes = FusedSizes(config, shape, 8, 256, torch.bfloat16, torch.device("cuda"))
    free = total - GIB - sizes.weight_bytes
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
    before = plan_memory(sizes, options)
    assert before == (expected.num_pages + 1, expected.served_context)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - sizes.made_bytes, total))
    assert plan_memory(_Made(config, shape, 8, 256, torch.bfloat16, torch.device("cuda")), options) == before


class _Made(FusedSizes):
    """As the model says it once it is made."""

    @property
    def beside_bytes(self) -> int:
        return self.made_bytes

    slots_bytes: Callable[..., int] = FusedTransformer.slots_bytes

    def step_bytes(self, num_tokens: int, context: int) -> int:
        return planning.step_bytes(self.config, num_tokens, context, self.dtype.itemsize)


def test_a_made_model_says_what_the_plan_says() -> None:
    """What the test above takes for a model of 8 billion parameters, of a small one that is really there."""
    shape = SlotShape.usual()
    model, sizes = fused(UNTIED, shape, torch.bfloat16), _Made(UNTIED, shape, 3, 24, torch.bfloat16, CPU)
    assert (model.weight_bytes, model.beside_bytes, model.slots_bytes(3)) == (sizes.weight_bytes, sizes.beside_bytes, 0)
    assert model.step_bytes(24, 512) == sizes.step_bytes(24, 512)
    assert model.recorded_bytes(4, 512) == sizes.recorded_bytes(4, 512)
    assert model.bytes_per_block(16) == sizes.bytes_per_block(16)


def test_the_parts_add_up_to_the_card() -> None:
    parts = ("reserve", "held", "weights", "slot_rows", "slot_bank", "workspace", "step", "recorded", "kv_cache", "unused")
    for total in (GIB // 64, GIB):
        found = planned(CONFIG, SlotShape.usual(), total_bytes=total, held_bytes=1000)
        assert sum(getattr(found, part) for part in parts) == total
        assert found.num_pages > 0
    assert found.num_pages == 2 * 4 * 512 // 16, "no page that no row could use"
    assert (found.served_context, found.num_sequences(512), found.num_sequences(500), found.num_sequences(17)) == (512, 8, 8, 128)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"num_slots": 400}, "lower num_slots"),
        ({"max_batch_tokens": 4096}, "lower max_batch_tokens"),
        ({"total_bytes": 300_000}, "take a larger card or a smaller base"),
    ],
)
def test_what_does_not_fit_says_what_to_lower(changes: dict[str, Any], remedy: str) -> None:
    found = planned(CONFIG, SlotShape.usual(), **{"total_bytes": GIB // 64} | changes)
    assert (found.remedy, found.num_pages, found.kv_cache, found.served_context, found.num_sequences(1)) == (remedy, 0, 0, 0, 0)
    raised = planned(CONFIG, SlotShape.usual(), **{"total_bytes": GIB // 64} | changes, utilization=1.0)
    enough = planned(CONFIG, SlotShape.usual(), **changes | {"total_bytes": raised.total + raised.short}, utilization=1.0)
    assert (enough.num_pages, enough.short, enough.remedy) == (1, 0, "")


@pytest.fixture
def tiny() -> Base:
    return Base(CONFIG, allocate(CONFIG, CPU, torch.float32), "tiny", "0" * 64, None)


def test_a_shortage_is_refused_before_anything_is_allocated(tiny: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's own error would name neither a size nor a setting; and a server that gets its slots and no page is none."""
    before = [id(layer.qkv) for layer in tiny.weights.layers]
    options = EngineOptions(num_slots=8, max_batch_tokens=64, kv_cache_bytes=2**16)
    sizes = FusedSizes(CONFIG, SlotShape.usual(), 8, 64, torch.float32, CPU)
    needed = sizes.made_bytes + planning.step_bytes(CONFIG, 64, 512, 4) + planning.recorded_bytes(CONFIG, 32) + 8 * 256 + 2**16
    monkeypatch.setattr("moa_serve.engine.engine.available_bytes", lambda device: needed - 1)
    with pytest.raises(InvalidRequest, match=r"buffers for max_batch_tokens 64 take .*, num_slots 8 takes .*, recorded steps") as caught:
        new_model("triton", tiny, options=options)
    assert caught.value.param in ("num_slots", "max_batch_tokens")
    assert str(caught.value).endswith(f"lower {caught.value.param}")
    assert [id(layer.qkv) for layer in tiny.weights.layers] == before
    monkeypatch.setattr("moa_serve.engine.engine.available_bytes", lambda device: needed)
    new_model("triton", tiny, options=options).close()


def test_what_others_take_meanwhile_is_told_apart_from_slots_and_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who must end something has to know whether it is somebody else's."""
    sizes = _Made(SHAPES["llama-3.2-1b"], SlotShape.usual(), 8, 256, torch.bfloat16, torch.device("cuda"))
    held = sizes.weight_bytes + sizes.made_bytes + 5 * GIB
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (8 * GIB - held, 8 * GIB))
    with pytest.raises(InvalidRequest, match=r"weights hold 2.30 GiB, slots and buffers [\d.]+ MiB and all else that runs there 5.00 GiB;"):
        plan_memory(sizes, EngineOptions())
