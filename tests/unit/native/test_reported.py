"""Cases that a review of the native backend found, each as it was found."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import FAMILIES, TINY, base_tensors, layer_router, lora, raw_manifest, write_base, write_family
from native_tools import SETS

from moa_serve import LLM, SamplingParams
from moa_serve.adapter.checkpoint import write_adapter
from moa_serve.adapter.manifest import Manifest
from moa_serve.errors import AdapterNonfiniteOutput, EngineError
from moa_serve.model.attention import CachedSpan
from moa_serve.model.batch import ForwardBatch
from moa_serve.model.memory import reset_peak_memory
from moa_serve.model.weights import load_base
from moa_serve.native.model import NativeModel

pytestmark = pytest.mark.skipif(not SETS, reason="the native library is not built")
SHAPE: dict[str, Any] = TINY | {"hidden_size": 64, "vocab_size": 48}
TOKEN = 10


def write_overflow_at_one_token(folder: Path) -> None:
    """K of one token alone becomes infinite: A's rows are orthogonal to every other token's input."""
    embed = base_tensors(SHAPE)["model.embed_tokens.weight"].double()
    scale = base_tensors(SHAPE)["model.layers.0.input_layernorm.weight"].double()
    normed = embed / embed.square().mean(-1, keepdim=True).sqrt() * scale
    others = torch.cat([normed[:TOKEN], normed[TOKEN + 1 :]])
    own = normed[TOKEN] - others.T @ torch.linalg.lstsq(others.T, normed[TOKEN]).solution
    manifest = Manifest.parse(raw_manifest("lora", SHAPE) | {"experts": [lora("K", layers=[0])]})
    (a, a_shape), (b, b_shape) = manifest.expected_tensors().items()
    write_adapter(folder, manifest, {a: own.float().expand(a_shape).clone(), b: torch.full(b_shape, 3e38)})


@pytest.mark.parametrize("prompt", [[21, 22, 23, 24, 25], list(range(20, 36))], ids=["a page shared with the choice", "a page of its own"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_score_that_is_no_number_is_not_hidden(dtype: str, prompt: list[int], tmp_path: Path) -> None:
    write_overflow_at_one_token(tmp_path / "a")
    base = write_base(tmp_path / "base", SHAPE)
    with LLM(base, adapters={"a": tmp_path / "a"}, backend="native", device="cpu", dtype=dtype, kv_cache_bytes=2**22) as llm:
        with pytest.raises(AdapterNonfiniteOutput):
            llm.score_choices([prompt], [[[TOKEN, 6, 7]]], adapter="a")
        assert llm.score_choices([prompt], [[[5, 6, 7]]], adapter="a")


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_closing_waits_for_the_call_that_runs(backend: str, tmp_path: Path) -> None:
    llm = LLM(write_base(tmp_path), backend=backend, device="cpu", kv_cache_bytes=2**22)
    found: list[object] = []

    def work() -> None:
        found.append(llm.generate([[1, 2, 3]] * 8, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)))

    thread = threading.Thread(target=work)
    thread.start()
    while not llm._running.locked() and thread.is_alive():
        time.sleep(0.001)
    llm.close()
    thread.join(60)
    assert len(found) == 1, "the call came to its end"
    assert not hasattr(llm, "_engine"), "and what it used is free"


def test_a_shared_factor_is_skipped_where_no_expert_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested HydraLoRA in a Sparse MoA: experts that are not selected cost less than half of those that are."""
    shape: dict[str, Any] = TINY | {"hidden_size": 256, "intermediate_size": 256}
    monkeypatch.setattr("moa_serve.native.model.num_threads", lambda: 1)
    base, ticks = write_base(tmp_path / "base", shape), {}
    for threshold in (0.0, 1.0):
        select = {"kind": "constant", "threshold": threshold}
        experts = [lora(target, inner={"variant": "hydralora", "num_experts": 2}, rank=64) for target in ("Q", "V", "UP", "DOWN")]
        monkeypatch.setitem(FAMILIES, "h", ("sparse_moa", layer_router(select=select), experts))
        folder = write_family(tmp_path / f"{threshold}", "h", config=shape)
        with LLM(base, adapters={"h": folder}, backend="native", device="cpu", kv_cache_bytes=2**22) as llm:
            model = llm._engine.model
            assert isinstance(model, NativeModel)
            costs = []
            for _ in range(5):
                model.ticks()
                llm.generate([[3 * place % 90 for place in range(128)]], SamplingParams(max_tokens=1, temperature=0), adapter="h")
                costs.append(model.ticks()["experts"])
            ticks[threshold] = min(costs)
    assert ticks[1.0] < 0.5 * ticks[0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_buffers_of_a_step_take_what_was_planned(dtype: torch.dtype, tmp_path: Path) -> None:
    shape: dict[str, Any] = TINY | {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 8192, "max_position_embeddings": 4096}
    count = 2048
    base = load_base(write_base(tmp_path, shape), dtype=dtype)
    model = NativeModel(base.config, base.weights)
    cache = model.new_cache(count // 16 + 1, 16)
    batch = ForwardBatch(torch.arange(count) % 8192, torch.arange(count))
    attention = cache.attention([CachedSpan(0, count, 0, range(1, count // 16 + 1))])
    pages = model.bytes_per_block(16) * count // 16
    reset_peak_memory(model.device)  # what loading freed goes back to the system, so that nothing is taken from it
    before = psutil.Process().memory_info().rss
    logits = model.forward(batch, attention)
    taken = psutil.Process().memory_info().rss - before - pages
    assert logits.shape == (count, 8192)
    planned = model.step_bytes(count, count)
    assert 0.9 * planned < taken < 1.1 * planned


def test_a_forked_process_is_told_instead_of_hanging(tmp_path: Path) -> None:
    """It has the memory of its parent and none of its threads."""
    with LLM(write_base(tmp_path), backend="native", device="cpu", kv_cache_bytes=2**22) as llm:
        llm.generate([[1, 2]], SamplingParams(max_tokens=2))
        model = llm._engine.model
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:  # no torch operation in here: its threads are not there either
            signal.alarm(30)
            try:
                model.forward(ForwardBatch(torch.empty(0), torch.empty(0)), None)
                os.write(writing, b"it ran")
            except EngineError as error:
                os.write(writing, str(error).encode())
                model.close()
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            assert "forked" in pipe.read()
        assert os.waitpid(child, 0)[1] == 0
        assert llm.generate([[1, 2]], SamplingParams(max_tokens=2)), "the parent goes on"


def test_threads_that_cannot_be_had_leave_none_behind(tmp_path: Path) -> None:
    code = (
        "import resource, sys, threading, pathlib, torch\n"
        "from moa_serve.errors import EngineError\n"
        "from moa_serve.model.weights import load_base\n"
        "from moa_serve.native.model import NativeModel\n"
        "base = load_base(sys.argv[1], dtype=torch.bfloat16)\n"
        "model = NativeModel(base.config, base.weights, threads=100_000)\n"
        "count = lambda: len(list(pathlib.Path('/proc/self/task').iterdir()))\n"
        "before = count()\n"
        "used = int(pathlib.Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, resource.RLIM_INFINITY))\n"
        "try:\n"
        "    model.new_cache(2, 16)\n"
        "except EngineError as error:\n"
        "    print(error, count() - before)\n"
    )
    found = subprocess.run([sys.executable, "-c", code, str(write_base(tmp_path))], capture_output=True, text=True, timeout=120)
    expected = "the system does not give the native library 100000 threads; raise its limit of processes or memory 0\n"
    assert found.stdout == expected, found.stderr
