"""How a GPU's memory is shared out. The device is only the numbers that it says, the base only the shapes of a real one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moa_serve.bench.shapes import SHAPES
from moa_serve.engine.engine import GPU_MEMORY_UTILIZATION, EngineOptions, plan_memory
from moa_serve.engine.pools import kv_cache_room
from moa_serve.errors import InvalidRequest
from moa_serve.model.bank import bytes_per_slot
from moa_serve.model.graphs import DecodeGraphs
from moa_serve.model.memory import available_bytes
from moa_serve.model.transformer import Transformer
from moa_serve.model.weights import allocate

GIB = 2**30
Gpu = Callable[..., None]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Sets what the device says: bytes in all, bytes free, and bytes of those in use that torch only keeps."""

    def say(total: int, free: int, kept: int = 0) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: kept + 7)
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7)

    return say


@pytest.fixture(scope="module")
def model() -> Transformer:
    """What computes llama-3.2-1b on CUDA, as far as its sizes go."""

    class OnCuda(Transformer):
        device = torch.device("cuda")

        def __init__(self) -> None:
            config = SHAPES["llama-3.2-1b"]
            self.config, self.weights, self._graphs = config, allocate(config, torch.device("meta"), torch.bfloat16), DecodeGraphs()

    return OnCuda()


def beside_the_cache(model: Transformer, options: EngineOptions, context: int) -> int:
    slots = options.num_slots * bytes_per_slot(model.config, torch.bfloat16)
    return model.step_bytes(options.max_batch_tokens, context) + slots + model.recorded_bytes(options.max_num_seqs, context)


def pool_bytes(model: Transformer, **options: Any) -> int:
    blocks, _ = plan_memory(model, EngineOptions(**options))
    return (blocks - 1) * model.bytes_per_block(16)


@pytest.mark.parametrize("share", [None, 0.5, 1.0])
def test_the_cache_takes_what_the_share_leaves_and_no_page_more(model: Transformer, gpu: Gpu, share: float | None) -> None:
    total, held = 24 * GIB, model.weight_bytes + GIB
    gpu(total, total - held)
    options = EngineOptions(gpu_memory_utilization=share)
    pool = pool_bytes(model, gpu_memory_utilization=share)
    left = int(total * (share or GPU_MEMORY_UTILIZATION)) - held - beside_the_cache(model, options, model.config.max_position) - pool
    assert 0 <= left < model.bytes_per_block(16)
    assert pool > 5 * GIB


def test_what_others_hold_is_not_planned_with_and_what_torch_keeps_is(model: Transformer, gpu: Gpu) -> None:
    """Two servers on one device would end each other at the first long prompt."""
    total = 24 * GIB
    gpu(total, total - 3 * GIB)
    alone = pool_bytes(model)
    gpu(total, total - 7 * GIB)
    assert alone - pool_bytes(model) == pytest.approx(4 * GIB, abs=model.bytes_per_block(16))
    gpu(total, total - 7 * GIB, kept=4 * GIB)
    assert pool_bytes(model) == alone
    assert available_bytes(torch.device("cuda")) == total - 3 * GIB


def test_kv_cache_bytes_wins(model: Transformer, gpu: Gpu) -> None:
    gpu(24 * GIB, 20 * GIB)
    assert pool_bytes(model, kv_cache_bytes=GIB, gpu_memory_utilization=0.2) == GIB
    with pytest.raises(InvalidRequest, match=r"20.00 GiB are free, but .* and the KV cache 21.00 GiB; lower kv_cache_bytes"):
        pool_bytes(model, kv_cache_bytes=21 * GIB)


def test_no_page_is_held_that_could_never_be_used(model: Transformer, gpu: Gpu) -> None:
    """All rows at the full context, and as much again for prompts that come again."""
    gpu(80 * GIB, 76 * GIB)
    rows = 4 * 1024 // 16 * model.bytes_per_block(16)
    assert pool_bytes(model, max_num_seqs=4, max_model_len=1024, prefix_cache=False) == rows
    assert pool_bytes(model, max_num_seqs=4, max_model_len=1024) == 2 * rows


def test_a_small_room_serves_a_shorter_context(model: Transformer, gpu: Gpu) -> None:
    gpu(5 * GIB, 5 * GIB - model.weight_bytes - GIB // 4)
    blocks, served = plan_memory(model, EngineOptions(max_num_seqs=4))
    assert served == (blocks - 1) * 16 < model.config.max_position
    with pytest.raises(InvalidRequest, match=r"max_model_len 131072 needs 4.00 GiB of KV cache, but it has [\d.]+ [GM]iB; lower it"):
        plan_memory(model, EngineOptions(max_num_seqs=4, max_model_len=131_072))


@pytest.mark.parametrize(
    ("held", "options", "told", "param"),
    [
        (GIB // 2, {"max_batch_tokens": 8192}, "lower max_batch_tokens, or raise gpu_memory_utilization", "max_batch_tokens"),
        (GIB // 2, {"max_batch_tokens": 8192, "gpu_memory_utilization": 1}, "; lower max_batch_tokens", "max_batch_tokens"),
        (GIB // 2, {"num_slots": 400}, "lower num_slots, or raise gpu_memory_utilization", "num_slots"),
        (6 * GIB, {}, "or end who else holds the device", "max_batch_tokens"),
    ],
)
def test_what_leaves_no_page_is_refused_with_all_sizes(
    model: Transformer, gpu: Gpu, held: int, options: dict[str, Any], told: str, param: str
) -> None:
    """Whoever must lower something has to see what it would bring."""
    gpu(8 * GIB, 8 * GIB - model.weight_bytes - held)
    with pytest.raises(InvalidRequest) as caught:
        pool_bytes(model, **options)
    message = str(caught.value)
    assert message.endswith(told)
    share = options.get("gpu_memory_utilization", 0.9)
    held_text = "512.00 MiB" if held == GIB // 2 else "6.00 GiB"
    assert f"gpu_memory_utilization {share:g} allows {8 * share:.2f} GiB of 8.00 GiB, of which the base's weights hold 2.30 GiB" in message
    assert f"all else that runs there {held_text};" in message
    for name in ("max_batch_tokens", "num_slots", "recorded steps of max_num_seqs", "a page of the KV cache 512.00 KiB"):
        assert name in message
    assert caught.value.param == param


@pytest.mark.parametrize(("total", "room"), [(24, 3.6), (48, 25.2), (80, 54.0)])
def test_the_room_of_a_made_up_gpu(total: int, room: float) -> None:
    """8 billion parameters in bfloat16: 15 GiB of weights, 1 GiB of CUDA's own and so on."""
    assert kv_cache_room(total * GIB, 0.9, 16 * GIB, GIB, GIB // 2, GIB // 2) / GIB == pytest.approx(room)
